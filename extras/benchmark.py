"""Measure this machine, and how near to its limits the networks and the stages work.

    python extras/benchmark.py            # 5 minutes on 2 CPU cores; --quick: 2 minutes

The limits are the speeds of a large matrix product and of a large 3x3 convolution. Then come the networks of the
presets, each in a process of its own, so that its peak memory is its own: a forward pass, and a training step as
in stage 03. "plain" is the same network as it is often written: fp32, attention in single steps, an optimiser and
an EMA that go from tensor to tensor. "of limit" counts the multiply-adds of convolutions and linear layers (of a
step: three times those of a forward pass). At the end: what every preset costs, in counted operations, and in days
at the speed that was measured (on a GPU: --batch 128).

Reads   nothing
Writes  out/benchmark.md
"""
import concurrent.futures
import contextlib
import importlib
import io
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (PRESETS, Attention, Trainer, UNet, load, on_device, read_settings, require, run, save, say,
                    start, writing)

STAGES = [importlib.import_module(name) for name in (
    "01_train_teacher", "02_generate_pairs", "03_annealing_reflow", "04_flow_guided_distill", "05_eval_fid")]
SETTINGS = [
    # name, its value for shapes, cifar10_quick, cifar10, ffhq64 and imagenet64, text
    ("quick", *[False] * 5, "only two networks, and fewer repetitions"),
    ("batch", 16, 16, 16, 16, 16, "images per call and per training step"),
    ("max_gmacs", 4.0, 4.0, 4.0, 4.0, 4.0, "leave out networks with more multiply-adds per image (10^9)"),
    ("n_pairs", *[50_000] * 5, "made-up pairs that the 3.4M network is trained with"),
    ("precision", *["auto"] * 5, "measured beside fp32: bf16, or auto"),
]


def settings(number, preset, *arguments):
    """The settings of a stage (1 to 5)."""
    return read_settings(STAGES[number - 1].SETTINGS, "", ["--preset", preset, *map(str, arguments)])


def networks():
    """{name: UNet's arguments} of all presets, and of the paper's smallest student; without repetitions."""
    found = {"paper's 3.4M": dict(image_size=32, base=64, mult=(1, 1, 2), blocks=1, attn=(16,))}
    for preset in PRESETS:
        size = settings(1, preset).image_size
        for kind, cfg in (("student", settings(3, preset)), ("teacher", settings(1, preset))):
            args = dict(image_size=size, base=cfg.base, mult=cfg.mult, blocks=cfg.blocks, attn=cfg.attn)
            if args not in found.values():
                found[f"{preset} {kind}"] = args
    return found


def now(device):
    """Seconds, when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(call, device, at_least=3, seconds=0.5):
    """Median seconds of a call, of at least so many calls and seconds, after one to warm up."""
    times = []
    while len(times) < at_least + 1 or sum(times[1:]) < seconds:
        began = now(device)
        call()
        times.append(now(device) - began)
    return statistics.median(times[1:])


def limit(device, precision):
    """What the machine can do at best, in operations per second."""
    n, batch, c = (2048, 16, 192) if device.type == "cpu" else (8192, 128, 512)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, x = (torch.randn(size, device=device, dtype=dtype) for size in ((n, n), (batch, c, 32, 32)))
    conv = nn.Conv2d(c, c, 3, padding=1, device=device, dtype=dtype).requires_grad_(False)
    speeds = [2 * n**3 / median_seconds(lambda: a @ a, device)]
    for layout in (torch.contiguous_format, torch.channels_last):
        x, conv = x.to(memory_format=layout), conv.to(memory_format=layout)
        speeds.append(2 * 9 * c * x.numel() / median_seconds(lambda: conv(x), device))
    return max(speeds)


# ---------------------------------------------------------------------------------- in a process of its own

def megabytes(name):
    """What Linux says of this process's memory; not a number on other systems."""
    path = Path("/proc/self/status")
    return int(re.search(rf"{name}:\s+(\d+)", path.read_text())[1]) / 1e3 if path.exists() else math.nan


def made_up_pairs(cfg, n, args):
    """Writes an artifact like 02's, with n pairs of noise."""
    shape, path = (3, args["image_size"], args["image_size"]), cfg.folder / "numbers"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = np.memmap(path, np.float16, "w+", shape=(2, n, *shape))
    block = np.random.default_rng(0).standard_normal((min(n, 10_000), *shape)).astype(np.float16)
    for first in range(0, n, len(block)):
        arrays[:, first:first + len(block)] = block[:n - first]
    z, x = torch.from_numpy(arrays)
    save(cfg.folder / "02_pairs.pt", preset=cfg.preset, id="", made_from={}, z=z, x=x, network=args)
    path.unlink()


def training_step(cfg, net, pairs, device):
    """(median seconds of stage 03's training step, share of it that is not the network's two passes).

    The share is None on a GPU, which does not tell when a part of a step is done without being made to wait.
    """
    began, network_began, network_ended = [], [], {}

    def note_end(parameter):  # called as each gradient is ready: at last at the end of the backward pass
        network_ended[len(began) - 1] = time.perf_counter()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(note_end)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(cfg, "03 benchmark", net, {})
        for step in trainer.steps():
            began.append(now(device))
            i = torch.randint(len(pairs["x"]), (trainer.batch,))
            z, x = pairs["z"][i].to(device).float(), pairs["x"][i].to(device).float()
            mirrored = torch.rand(len(x), 1, 1, 1, device=device) < 0.5
            z, x = torch.where(mirrored, z.flip(3), z), torch.where(mirrored, x.flip(3), x)
            network_began.append(time.perf_counter())
            trainer.update(STAGES[2].reflow_loss(trainer.net, z, x, 0.5))
    steps = np.diff(began)[1:]  # the first is to warm up
    inside = [network_ended[i] - network_began[i] for i in range(1, len(began) - 1)]
    return statistics.median(steps), statistics.median(1 - inside / steps) if device.type == "cpu" else None


def plain_attention(self, x):
    """Attention.forward in single steps."""
    b, c, height, width = x.shape
    q, k, v = self.qkv(self.norm(x)).view(b, 3, c, height * width).unbind(1)
    weights = torch.einsum("bcq,bck->bqk", q, k).mul(c**-0.5).softmax(dim=2)
    h = torch.einsum("bqk,bck->bcq", weights, v).reshape(b, c, height, width)
    return (x + self.proj(h)) * math.sqrt(0.5)


def plain_step(net, z, x, t):
    """Median seconds of a training step as it is often written."""
    optimizer = torch.optim.Adam(net.train().parameters(), lr=1e-4, foreach=False)
    ema = [p.detach().clone() for p in net.parameters()]

    def step():
        optimizer.zero_grad()
        s = t.view(-1, 1, 1, 1)
        (net(s * x + (1 - s) * z, t) - (x - z)).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        for shadow, p in zip(ema, net.parameters()):
            shadow.sub_((shadow - p.detach()) * 0.01)

    return median_seconds(step, z.device)


def measure(args, kind, device, batch, steps, n_pairs, out):
    """{"forward", "alone" (one image), "step", "open" (the pairs): seconds; "outside": share of a step that is
    outside of the network; "peak", "own" (growth by the pairs): MB}. kind: "fp32", "bf16" or "plain fp32".
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    net, found = UNet(**args).eval(), {"outside": None}
    shape = (batch, 3, args["image_size"], args["image_size"])
    z, x, t = (torch.randn(size, device=device) for size in (shape, shape, batch))
    if kind == "plain fp32":
        Attention.forward, net = plain_attention, net.to(device)  # in this process only
    else:
        net = on_device(net, device, kind)
    with torch.no_grad():
        found["forward"] = median_seconds(lambda: net(z, t), device)
        found["alone"] = median_seconds(lambda: net(z[:1], t[:1]), device)
    if kind == "plain fp32":
        found["step"] = plain_step(net, z, x, t)
    else:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as folder:
            cfg = settings(3, "shapes", "--out", folder, "--batch", batch, "--steps", steps)
            made_up_pairs(cfg, n_pairs, args)
            own, began = megabytes("RssAnon"), time.perf_counter()  # without the pages of mapped files
            pairs = load(cfg, "02_pairs.pt")
            found["open"] = time.perf_counter() - began
            for _ in range(100):  # as training would: many pairs, in no order
                pairs["x"][torch.randint(n_pairs, (128,))]
            found["own"] = megabytes("RssAnon") - own
            found["step"], found["outside"] = training_step(cfg, net, pairs, device)
    found["peak"] = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else megabytes("VmHWM")
    return found


# ----------------------------------------------------------------------------------------------------- costs

@torch.no_grad()
def operations(net, *shapes):
    """Operations (two for each multiply-add) of net(a tensor of each shape)."""
    with FlopCounterMode(display=False) as counter:
        net(*map(torch.zeros, shapes))
    return counter.get_total_flops()


def costs(preset):
    """Operations of each of the five stages: [01, ..., 05]. A gradient counts as two more forward passes."""
    c1, c2, c3, c4, c5 = (settings(number, preset) for number in range(1, 6))
    big, small = (operations(UNet(c1.image_size, 3, c.base, c.mult, c.blocks, c.attn),
                             (1, 3, c1.image_size, c1.image_size), (1,)) for c in (c1, c3))
    # 04: the student on pairs and on fresh noise, the flow once. D sees two images of each, one with a gradient.
    distance = 3 * operations(STAGES[3].LPIPS().features, (1, 3, 64, 64)) if c4.distance == "lpips" else 0
    own_pairs = c4.n_pairs * c4.pair_steps * small if c4.pairs_from == "flow" else 0
    distilled = c4.batch * c4.steps * (7 * small + 2 * distance) + own_pairs
    measured = c5.n_samples * ((c5.teacher_steps + 1) * big + (c5.flow_steps + 2) * small)
    if c5.metric == "fid":  # five rows, and the data: 50,000 images or more
        measured += (5 * c5.n_samples + 50_000) * operations(STAGES[4].Inception(), (1, 3, 299, 299))
    return [3 * big * c1.batch * c1.steps, big * c2.n_pairs * c2.sample_steps,
            3 * small * c3.batch * c3.steps, distilled, measured]


def main(cfg):
    device = start(cfg, "benchmark")
    require(device.type in ("cpu", "cuda"), f"--device {cfg.device}: this measures a CPU or an NVIDIA GPU")
    require(cfg.batch and cfg.n_pairs, "--batch and --n_pairs must be at least 1")

    # 1. The machine.
    limits = {precision: limit(device, precision) for precision in ("fp32", cfg.precision)}
    hardware = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    lines = [f"{hardware}, torch {torch.__version__}, batch {cfg.batch}, {time.strftime('%Y-%m-%d')}; limits: "
             + ", ".join(f"{name} {speed / 1e9:,.0f} GFLOP/s" for name, speed in limits.items()), "",
             "| network | parameters | as | forward, img/s | of limit | step, img/s | of limit | to plain: forward, "
             "step | outside of the network | peak, MB | one image, ms |", "|---|---:|---" + "|---:" * 8 + "|"]
    say(lines[0])

    # 2. The networks, and the pairs.
    fastest, trained = 0, ""
    for name, args in networks().items():
        net, chosen = UNet(**args), name in ("paper's 3.4M", "shapes student")
        parameters, macs = sum(p.numel() for p in net.parameters()), STAGES[4].count_macs(net)
        if not chosen and (cfg.quick or macs > cfg.max_gmacs * 1e9):
            continue
        for kind in ("plain fp32", *limits):
            arguments = (args, kind, device, cfg.batch, 5 if cfg.quick else 7, cfg.n_pairs if chosen else 256, cfg.out)
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, *arguments).result()
            plain, cells = found if kind == "plain fp32" else plain, [name, f"{parameters:,}", kind]
            for part, passes in (("forward", 1), ("step", 3)):
                speed = passes * 2 * macs * cfg.batch / found[part]  # operations per second
                cells += [f"{cfg.batch / found[part]:,.1f}", f"{speed / limits[kind[-4:]]:.0%}"]
            fastest, trained = max((fastest, trained), (speed, name))
            cells += [", ".join(f"{plain[part] / found[part]:.2f}" for part in ("forward", "step")),
                      "-" if found["outside"] is None else f"{found['outside']:.1%}",
                      f"{found['peak']:,.0f}", f"{1000 * found['alone']:.3g}"]
            lines.append(f"| {' | '.join(cells)} |")
            say(lines[-1])
        if name == "paper's 3.4M":
            pairs = (f"{cfg.n_pairs:,} pairs of 32x32, with which the 3.4M network was trained, were checked and "
                     f"opened in {found['open']:.2f} s, and let memory grow by {found['own']:.0f} MB.")

    # 3. What the presets cost.
    lines += ["", pairs, "", "| preset | 01 | 02 | 03 | 04 | 05 | all, EFLOP | days here |", "|---" + "|---:" * 7 + "|"]
    for preset in PRESETS:
        stages = costs(preset)
        figures = [*(n / 1e18 for n in (*stages, sum(stages))), sum(stages) / fastest / 86400]
        lines.append(f"| {preset} | {' | '.join(f'{n:,.0f}' if n >= 10 else f'{n:.2g}' for n in figures)} |")
    lines += ["", f"10^18 operations; days at {fastest / 1e12:.2f} TFLOP/s, reached in training {trained}.", ""]
    with writing(Path(cfg.out, "benchmark.md")) as file:
        file.write("\n".join(lines).encode())
    say("\n".join(["", *lines, f"wrote {cfg.out}/benchmark.md"]))


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
