"""Measure this machine, and how near to its limits the networks and the stages work.

    python extras/benchmark.py            # 4 minutes on 2 CPU cores
    python extras/benchmark.py --quick    # fewer networks, 2 minutes

First the limits: the fastest large matrix product and 3x3 convolution, and copying. Then every network of the presets, each
in a process of its own so that its peak memory is its own: a forward pass, and a whole training step as train() makes it, with
pairs, noise, clipping, Adam and EMA. "plain" is the same network as it is often written: fp32, attention in single steps,
an optimiser and an EMA that go from tensor to tensor. "of limit": the share of the fastest product or convolution in that
precision, counting the multiply-adds of convolutions and linear layers (a training step: three times those of a forward pass). At the end:
what every preset costs, in counted operations, and in days at the speed that was measured (on a GPU: --batch 128).

Reads   nothing
Writes  out/benchmark.md, out/benchmark.json
"""
import concurrent.futures
import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (EVALUATION, PAIRS, Attention, Settings, UNet, autocast, best_precision, check_ranges, count_parameters,
                    draw_shapes, generate, load, load_images, noise_for, on_device, pair_batch, random_flip, read, require, run, save, say,
                    start, train, writing)

SCRIPTS = [importlib.import_module(name) for name in ("01_train_teacher", "02_generate_pairs", "03_annealing_reflow",
                                                      "04_flow_guided_distill", "05_eval_fid")]
teacher, _, reflow, distillation, evaluation = SCRIPTS


@dataclass
class Config(Settings):
    quick: bool = False  # only the shapes student and the 3.4M network, and fewer repetitions
    batch: int = 16  # images per call and per training step
    max_gmacs: float = 4.0  # networks with more multiply-adds per image (10^9) are left out
    n_pairs: int = 50_000  # pairs (32x32) of the made-up set that training is timed with
    compile: bool = False  # also time the training step with torch.compile

    def __post_init__(self):
        check_ranges(self, batch=(1, None), max_gmacs=(0, None), n_pairs=(64, None))


def networks():
    """{name: UNet's arguments} of all presets, and of the paper's smallest student; without repetitions."""
    found = {"paper's 3.4M": dict(image_size=32, base=64, mult=(1, 1, 2), blocks=1, attn=(16,))}
    for preset in teacher.PRESETS:
        t, s = (module.Config(preset=preset, **module.PRESETS[preset]) for module in (teacher, reflow))
        for kind, cfg in (("student", s), ("teacher", t)):
            args = dict(image_size=t.image_size, base=cfg.base, mult=cfg.mult, blocks=cfg.blocks, attn=cfg.attn)
            if args not in found.values():
                found[f"{preset} {kind}"] = args
    return found


def wait_for(device):
    """Until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def medians(calls, device, at_least=3, seconds=0.5):
    """Median time of each call, in turn, over `at_least` rounds and that many seconds, after one to warm up. Waits for the GPU."""
    rounds = []
    while len(rounds) < at_least + 1 or sum(map(sum, rounds[1:])) < seconds:
        times = []
        for call in calls:
            wait_for(device)
            began = time.perf_counter()
            call()
            wait_for(device)
            times.append(time.perf_counter() - began)
        rounds.append(times)
    return [statistics.median(times) for times in zip(*rounds[1:])]


def median_seconds(call, device, at_least=3, seconds=0.5):
    """medians() of a single call."""
    return medians([call], device, at_least, seconds)[0]


def limits(device, precisions):
    """What the machine can do at best: {"fp32 product": GFLOP/s, "fp32 convolution": ..., the same for bf16, "copy": GB/s}."""
    n, batch, c = (2048, 16, 192) if device.type == "cpu" else (8192, 128, 512)
    found = {}
    for precision in precisions:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        a = torch.randn(n, n, device=device, dtype=dtype)
        found[f"{precision} product"] = 2 * n**3 / median_seconds(lambda: a @ a, device) / 1e9
        speeds = []
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(batch, c, 32, 32, device=device, dtype=dtype).to(memory_format=layout)
            conv = nn.Conv2d(c, c, 3, padding=1, device=device, dtype=dtype).to(memory_format=layout).requires_grad_(False)
            speeds.append(2 * 9 * c * x.numel() / median_seconds(lambda: conv(x), device) / 1e9)
        found[f"{precision} convolution"] = max(speeds)
    source = torch.ones(64 << 20, device=device)  # 256 MB
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device) / 1e9
    return found


# ------------------------------------------------------------------------------------------------- in a process of its own

def prepare(device):
    """What start() does for a stage's process."""
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        torch.cuda.set_device(device)


def apart(device, function, *arguments):
    """function(*arguments) in a new process, whose memory nothing else has used."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, prepare, (device,)) as pool:
        return pool.submit(function, *arguments).result()


def peak_megabytes(device):
    """The most memory that was in use: the process's, or the GPU's by tensors."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else megabytes("VmHWM")[0]


def megabytes(*names):
    """What Linux says of this process's memory; not a number on other systems."""
    path = Path("/proc/self/status")
    status = dict(line.split(":", 1) for line in path.read_text().splitlines()) if path.exists() else {}
    return np.array([int(status[name].split()[0]) * 1024 / 1e6 if name in status else math.nan for name in names])


def made_up_pairs(path, cfg, n, shape):
    """An artifact like 02's, with n images of noise."""
    images = np.memmap(f"{path}.images", np.float16, "w+", shape=(n, *shape))
    block = np.random.default_rng(0).standard_normal((min(n, 10_000), *shape)).astype(np.float16)
    for first in range(0, n, len(block)):
        images[first:first + len(block)] = block[:n - first]
    save(path, cfg, images=torch.from_numpy(images), labels=None, noise_seed=0, first_index=PAIRS)
    Path(f"{path}.images").unlink()


def steps_of(cfg, net, pairs, device):
    """(median seconds of a training step of stage 03, and the share of it that is not the network's forward and backward pass).

    The share is None on a GPU, which does not tell when a part of a step is done without being made to wait.
    """
    began, network_began, network_ended = [], [], {}

    def loss_at(net, step, part):
        wait_for(device)
        began.append(time.perf_counter())
        noise, data, labels = pair_batch(pairs, part, device)
        noise, data = random_flip(part.rand(device), noise, data)
        fresh = part.randn(*noise.shape[1:], device=device)
        network_began.append(time.perf_counter())
        return reflow.reflow_loss(net, noise, data, 0.5, labels, fresh, part.rand(device))

    def note_end(parameter):  # called as each gradient is ready: the last call is the end of the backward pass
        network_ended[len(began) - 1] = time.perf_counter()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(note_end)
    with contextlib.redirect_stdout(io.StringIO()):
        train("03 benchmark", cfg, net, loss_at)
    first = 1 + cfg.compile  # to warm up; compiling tries a step more
    steps = np.diff(began)[first:]
    inside = [network_ended[i] - network_began[i] for i in range(first, len(began) - 1)]
    return statistics.median(steps), statistics.median(1 - inside / steps) if device.type == "cpu" else None


def measure_network(args, precision, batch, device, compiled, repeat):
    """{"forward", "step": seconds; "outside": share of a step outside of the network; "peak": MB} of a network."""
    torch.manual_seed(0)
    net = on_device(UNet(**args).eval(), device, precision)
    shape = (3, args["image_size"], args["image_size"])
    x, t = torch.randn(batch, *shape, device=device), torch.rand(batch, device=device)
    with torch.no_grad(), autocast(precision, device):
        forward = median_seconds(lambda: net(x, t), device, repeat)
    with tempfile.TemporaryDirectory() as folder:
        cfg = reflow.Config(out=folder, batch=batch, precision=precision, steps=repeat + 2, save_every=10**9, compile=compiled)
        made_up_pairs(Path(folder, "02_pairs.pt"), cfg, 256, shape)
        step, outside = steps_of(cfg, net, read(Path(folder, "02_pairs.pt")), device)
    return {"forward": forward, "step": step, "outside": outside, "peak": peak_megabytes(device)}


def measure_plain(args, batch, device, repeat):
    """measure_network for the same network as it is often written."""
    def attention(self, x):
        b, c, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, c, height * width).unbind(1)
        weights = torch.einsum("bcq,bck->bqk", q, k).mul(c**-0.5).softmax(dim=2)
        h = torch.einsum("bqk,bck->bcq", weights, v).reshape(b, c, height, width)
        return (x + self.proj(h)) * math.sqrt(0.5)

    Attention.forward = attention  # in this process only
    torch.manual_seed(0)
    net = UNet(**args).to(device).eval()
    shape = (batch, 3, args["image_size"], args["image_size"])
    noise, data, t = torch.randn(shape, device=device), torch.randn(shape, device=device), torch.rand(batch, device=device)
    with torch.no_grad():
        forward = median_seconds(lambda: net(noise, t), device, repeat)
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, foreach=False)
    ema = [p.detach().clone() for p in net.parameters()]

    def step():
        optimizer.zero_grad()
        s = t[:, None, None, None]
        (net(s * data + (1 - s) * noise, t) - (data - noise)).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        for shadow, parameter in zip(ema, net.parameters()):
            shadow.sub_((shadow - parameter.detach()) * 0.01)

    return {"forward": forward, "step": median_seconds(step, device, repeat), "outside": None, "peak": peak_megabytes(device)}


def measure_pairs(args, n, batch, precision, device, steps, out):
    """Training with n pairs: the file's size in MB, seconds to open it and per step, and by how much memory grows."""
    Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        cfg = reflow.Config(out=folder, batch=batch, precision=precision, steps=steps, save_every=10**9)
        path = cfg.folder / "02_pairs.pt"
        cfg.folder.mkdir()
        made_up_pairs(path, cfg, n, (3, args["image_size"], args["image_size"]))
        memory = "RssAnon", "RssFile"  # its own; pages of mapped files, which the system takes back when it needs them
        before, began = megabytes(*memory), time.perf_counter()
        pairs = load(path, cfg)
        opening = time.perf_counter() - began
        for _ in range(200):  # as training would: many pairs, in no order
            torch.stack([pairs["images"][i] for i in torch.randint(n, (128,))])
        own, mapped = megabytes(*memory) - before
        step, _ = steps_of(cfg, on_device(UNet(**args), device, precision), pairs, device)
        return {"megabytes": path.stat().st_size / 1e6, "open": opening, "step": step, "own": own, "mapped": mapped}


# ------------------------------------------------------------------------------------------------- one after another

def bare_layers(net, inputs):
    """A function that calls only the convolutions and linear layers of net(*inputs), with the inputs that they have there."""
    calls = []
    hooks = [layer.register_forward_pre_hook(lambda layer, given: calls.append((layer, *given)))
             for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    net(*inputs)
    for hook in hooks:
        hook.remove()
    return lambda: [layer(given) for layer, given in calls]


@torch.no_grad()
def latency(args, precision, device):
    """(seconds of one call for one image, seconds of its bare convolutions and linear layers)."""
    net = on_device(UNet(**args).eval(), device, precision)
    inputs = torch.randn(1, 3, args["image_size"], args["image_size"], device=device), torch.zeros(1, device=device)
    bare = bare_layers(net, inputs)

    def whole_of(call):  # autocast keeps a weight's bf16 copy until it ends: one call has to make them all
        with autocast(precision, device):
            call()

    return medians([lambda: whole_of(lambda: net(*inputs)), lambda: whole_of(bare)], device, 20, 2.0)


def data_rows():
    """Rows (what, value, unit) for what feeds the networks."""
    yield "draw 16,384 shapes", median_seconds(lambda: draw_shapes(16_384, 16), "cpu", 1), "s"
    images = draw_shapes(1000, 32)[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "set.zip")
        with zipfile.ZipFile(path, "w") as archive:
            for i, image in enumerate(images):
                content = io.BytesIO()
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "PNG")
                archive.writestr(f"{i}.png", content.getvalue())
        yield "read a zip of PNGs, 32x32", 1000 / median_seconds(lambda: load_images(str(path), 32), "cpu"), "img/s"
    indices = torch.arange(128)
    yield "noise for a batch of 128, 32x32", 1000 * median_seconds(lambda: noise_for(0, indices, (3, 32, 32)), "cpu"), "ms"
    yield "gather a batch of 128 images, 32x32", 1000 * median_seconds(lambda: images[torch.randint(1000, (128,))], "cpu"), "ms"


def evaluation_rows(device):
    """Rows for sampling and for the distance."""
    inception, features = evaluation.Inception().to(device).eval(), torch.randn(32, 3, 299, 299, device=device)
    given = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, device=device)
    with torch.no_grad():
        bare, whole = medians([lambda: inception(features), lambda: evaluation.inception_features(inception, given)], device, 3)
    yield "Inception features, batch 32", 32 / whole, f"img/s, {bare / whole:.0%} of the bare network's"
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(4096, 2048, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
    gaussians = [value for f in samples for value in (f.mean(0), f.T.cov())]
    yield "Frechet distance of 2,048 features", median_seconds(lambda: evaluation.frechet_distance(*gaussians), device, 1), "s"


def sampling_row(name, args, steps, precision, device):
    """The row for Euler sampling, from the noise's indices to images in the CPU's memory."""
    net = on_device(UNet(**args).eval(), device, precision)
    indices = torch.arange(EVALUATION, EVALUATION + 128)
    sample = lambda: list(generate(net, 0, indices, steps, batch=128, precision=precision))
    return f"{name}, {steps} Euler steps, batch 128, {precision}", 128 / median_seconds(sample, device, 1), "img/s"


@torch.no_grad()
def operations(net, *shapes):
    """Operations (two for each multiply-add) of net(a tensor of each shape)."""
    with FlopCounterMode(display=False) as counter:
        net(*map(torch.zeros, shapes))
    return counter.get_total_flops()


def costs(preset):
    """Operations of each of the five stages with a preset's settings: [01, ..., 05].

    The gradient of a forward pass is counted as two more.
    """
    c1, c2, c3, c4, c5 = (script.Config(preset=preset, **script.PRESETS[preset]) for script in SCRIPTS)
    image = (1, 3, c1.image_size, c1.image_size)
    big, small = (operations(UNet(c1.image_size, 3, c.base, c.mult, c.blocks, c.attn), image, (1,)) for c in (c1, c3))
    # 04: the student on pairs and on fresh noise, the flow once. D sees two images of each; one has a gradient, the weights none.
    distance = 3 * operations(distillation.LPIPS().features, (1, 3, 64, 64)) if c4.distance == "lpips" else 0
    own_pairs = c4.n_pairs * c4.pair_steps * small if c4.pairs_from == "flow" else 0
    measured = c5.n_samples * ((c5.teacher_steps + 1) * big + (c5.flow_steps + 2) * small)
    if c5.metric == "fid":  # five rows, and the data: 50,000 images or more
        measured += (5 * c5.n_samples + 50_000) * operations(evaluation.Inception(), (1, 3, 299, 299))
    return [3 * big * c1.batch * c1.steps, big * c2.n_pairs * c2.sample_steps, 3 * small * c3.batch * c3.steps,
            c4.batch * c4.steps * (7 * small + 2 * distance) + own_pairs, measured]


def main(cfg):
    device = start(cfg, "benchmark")
    require(device.type in ("cpu", "cuda"), f"--device {cfg.device}: this measures a CPU or an NVIDIA GPU")
    best, repeat = best_precision(device), 3 if cfg.quick else 5

    # 1. The machine.
    peak = limits(device, dict.fromkeys(["fp32", best]))
    say("limits | " + " | ".join(f"{name} {value:,.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}" for name, value in peak.items()))

    # 2. The networks.
    chosen = {name: (args, evaluation.count_macs(UNet(**args))) for name, args in networks().items()}
    chosen = {name: (args, macs) for name, (args, macs) in chosen.items() if macs <= cfg.max_gmacs * 1e9}
    if cfg.quick:
        chosen = {name: chosen[name] for name in ("shapes student", "paper's 3.4M") if name in chosen}
    rows, lines = [], ["| network | parameters | as | forward, img/s | of limit | step, img/s | of limit | to plain: forward, step | "
                       "outside of the network | peak, MB |", "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, (args, macs) in sorted(chosen.items(), key=lambda item: item[1][1]):
        parameters = count_parameters(UNet(**args))
        kinds = ["plain fp32", "fp32", *(["bf16"] if best == "bf16" else []), *([f"{best} compiled"] if cfg.compile else [])]
        for kind in kinds:
            if kind == "plain fp32":
                found = plain = apart(device, measure_plain, args, cfg.batch, device, repeat)
            else:
                found = apart(device, measure_network, args, kind[:4], cfg.batch, device, "compiled" in kind, repeat)
            limit = max(peak[f"{kind.replace('plain ', '')[:4]} {what}"] for what in ("product", "convolution")) * 1e9
            share = {part: factor * 2 * macs * cfg.batch / found[part] / limit for part, factor in (("forward", 1), ("step", 3))}
            rows.append({"network": name, "parameters": parameters, "macs": macs, "as": kind, "batch": cfg.batch, **found,
                         "forward_share": share["forward"], "step_share": share["step"]})
            outside = "-" if found["outside"] is None else f"{found['outside']:.1%}"
            lines.append(f"| {name} | {parameters:,} | {kind} | {cfg.batch / found['forward']:,.1f} | {share['forward']:.0%} | "
                         f"{cfg.batch / found['step']:,.1f} | {share['step']:.0%} | {plain['forward'] / found['forward']:.2f}, "
                         f"{plain['step'] / found['step']:.2f} | {outside} | {found['peak']:,.0f} |")
            say(lines[-1])

    # 3. One call for one image.
    for name, (args, _) in chosen.items():
        if "teacher" not in name:
            for precision in dict.fromkeys(["fp32", best]):
                call, bare = latency(args, precision, device)
                rows.append({"what": f"one call for one image, {name}, {precision}", "value": 1000 * call, "bare": 1000 * bare, "unit":
                             f"ms, {call / bare - 1:.0%} more than its bare convolutions"})

    # 4. Everything around the networks.
    pairs = apart(device, measure_pairs, networks()["paper's 3.4M"], cfg.n_pairs, cfg.batch, best, device, 5 if cfg.quick else 20, cfg.out)
    shapes = networks()["shapes teacher"]
    others = [*data_rows(), (f"{cfg.n_pairs:,} pairs, 32x32: the file", pairs["megabytes"], "MB"),
              (f"{cfg.n_pairs:,} pairs: check and open the file", pairs["open"], f"s; memory grows by {pairs['own']:.0f} MB, and by "
               f"{pairs['mapped']:.0f} MB of the file's pages"),
              (f"{cfg.n_pairs:,} pairs: training the 3.4M network, {best}", cfg.batch / pairs["step"], "img/s"),
              sampling_row("shapes teacher", shapes, 25, best, device), *evaluation_rows(device)]
    rows += [{"what": what, "value": value, "unit": unit} for what, value, unit in others]

    # 5. What the presets cost.
    speed, name = max((3 * 2 * row["macs"] * row["batch"] / row["step"], row["network"]) for row in rows if "step" in row)
    bill = ["| preset | 01 | 02 | 03 | 04 | 05 | together, EFLOP | days here |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for preset in teacher.PRESETS:
        stages = costs(preset)
        figures = [n / 1e18 for n in (*stages, sum(stages))] + [sum(stages) / speed / 86400]
        bill.append(f"| {preset} | {' | '.join(f'{n:,.0f}' if n >= 10 else f'{n:.2g}' for n in figures)} |")
    bill.append(f"\n10^18 operations; days at {speed / 1e12:.2f} TFLOP/s, reached in training the {name}.")

    # 6. The report.
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    head = f"{hardware}, torch {torch.__version__}, batch {cfg.batch}, {time.strftime('%Y-%m-%d')}. Limits: " + ", ".join(
        f"{name} {value:,.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}" for name, value in peak.items())
    lines = [head, "", *lines, "", "| what | value |", "|---|---:|",
             *(f"| {row['what']} | {row['value']:,.3g} {row['unit']} |" if row["value"] < 1000 else
               f"| {row['what']} | {row['value']:,.0f} {row['unit']} |" for row in rows if "what" in row),
             "", *bill]
    for suffix, text in ((".md", "\n".join([*lines, ""])), (".json", json.dumps({"machine": head, "limits": peak, "rows": rows}, indent=1))):
        with writing(Path(cfg.out, f"benchmark{suffix}")) as file:
            file.write(text.encode())
    say("\n".join(["", *lines, "", f"wrote {cfg.out}/benchmark.md, benchmark.json"]))


if __name__ == "__main__":
    run(main, Config, {Config.preset: {}}, __doc__)
