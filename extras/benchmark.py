"""Measure this machine, and how near to its limits the networks and the stages work.

    python extras/benchmark.py            # 5 minutes on 2 CPU cores; --quick: 2 minutes

The limit is the speed of a large matrix product or 3x3 convolution. Then come the networks of the presets,
each in a process of its own: a forward pass, and a training step as in stage 03. "plain" is the same as it is
often written: fp32, attention in single steps, an optimiser and an EMA that go from tensor to tensor. "of
limit" counts the multiply-adds of convolutions and linear layers (of a step: three times those of a forward
pass). At the end: what every preset costs, in counted operations, and in days at the speed that was measured.

Writes  out/benchmark.md
"""
import concurrent.futures
import contextlib
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
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ablations import STAGES  # it makes common importable
import common
from common import PRESETS, UNet, load, on_device, read_settings, require, run, save, say, start, writing

SETTINGS = [  # name, its value for each preset, text
    ("quick", *[False] * 5, "only two networks, and fewer repetitions"),
    ("batch", 16, 16, 16, 16, 16, "images per call and per training step"),
    ("max_gmacs", 4.0, 4.0, 4.0, 4.0, 4.0, "leave out networks with more multiply-adds per image (10^9)"),
    ("n_pairs", *[50_000] * 5, "made-up pairs that the 3.4M network is trained with"),
    ("precision", *["auto"] * 5, "measured beside fp32: bf16, or auto"),
]


def settings(number, preset, *arguments):
    """The settings of a stage ("01" ... "05")."""
    return read_settings(STAGES[number].SETTINGS, "", ["--preset", preset, *map(str, arguments)])


def networks():
    """{name: UNet's arguments} of all presets, and of the paper's smallest student; without repetitions."""
    found = {"paper's 3.4M": dict(image_size=32, base=64, mult=(1, 1, 2), blocks=1, attn=(16,))}
    for preset in PRESETS:
        for kind, number in (("student", "03"), ("teacher", "01")):
            cfg, size = settings(number, preset), settings("01", preset).image_size
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
    conv = torch.nn.Conv2d(c, c, 3, padding=1, device=device, dtype=dtype).requires_grad_(False)
    speeds = [2 * n**3 / median_seconds(lambda: a @ a, device)]
    for layout in (torch.contiguous_format, torch.channels_last):
        x, conv = x.to(memory_format=layout), conv.to(memory_format=layout)
        speeds.append(2 * 9 * c * x.numel() / median_seconds(lambda: conv(x), device))
    return max(speeds)


def megabytes(name):
    """What Linux says of this process's memory; not a number on other systems."""
    path = Path("/proc/self/status")
    return int(re.search(rf"{name}:\s+(\d+)", path.read_text())[1]) / 1e3 if path.exists() else math.nan


def made_up_pairs(cfg, n, args):
    """Writes an artifact like 02's, with n pairs of noise."""
    path, shape = cfg.folder / "numbers", (2, n, 3, args["image_size"], args["image_size"])
    path.parent.mkdir(parents=True, exist_ok=True)
    z, x = torch.from_file(str(path), True, math.prod(shape), dtype=torch.half).view(shape).normal_()
    save(cfg.folder / "02_pairs.pt", preset=cfg.preset, id="", made_from={}, z=z, x=x, network=args)
    path.unlink()


def plain_attention(self, x):
    """common.Attention.forward in single steps."""
    b, c, height, width = x.shape
    q, k, v = self.qkv(self.norm(x)).view(b, 3, c, height * width).unbind(1)
    weights = torch.einsum("bcq,bck->bqk", q, k).mul(c**-0.5).softmax(dim=2)
    h = torch.einsum("bqk,bck->bcq", weights, v).reshape(b, c, height, width)
    return (x + self.proj(h)) * math.sqrt(0.5)


@torch.no_grad()
def plain_ema_update(averages, weights, decay, n):
    """common.ema_update from tensor to tensor."""
    for shadow, p in zip(averages, weights):
        shadow.sub_((shadow - p) * (1 - min(decay, (1 + n) / (10 + n))))


def training_step(cfg, net, pairs, device, plain):
    """Median seconds of stage 03's training step, and of the network's two passes in it."""
    began = []
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = common.Trainer(cfg, "03 benchmark", net, {})
        if plain:
            trainer.optimizers = [torch.optim.Adam(net.parameters(), cfg.lr, foreach=False)]
        for step in trainer.steps():
            began.append(now(device))
            z, x = (part.float() for part in trainer.draw(pairs["z"], pairs["x"]))
            mirrored = torch.rand(len(x), 1, 1, 1, device=device) < 0.5
            z, x = torch.where(mirrored, z.flip(3), z), torch.where(mirrored, x.flip(3), x)
            t = torch.rand(len(x), device=device)
            trainer.update(STAGES["03"].reflow_loss(trainer.net, z, x, t, 0.5))
    passes = median_seconds(lambda: STAGES["03"].reflow_loss(net, z, x, t, 0.5).backward(), device)
    return np.median(np.diff(began)[1:]).item(), passes  # the first step is to warm up


def measure(args, kind, device, batch, steps, n_pairs, out):
    """What a network ("fp32", "bf16" or "plain fp32") takes: seconds forward, alone (one image), step, passes
    (in a step), open (the pairs); MB peak, own (by which opened pairs let memory grow).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    net, found = UNet(**args).eval(), {}
    if kind == "plain fp32":  # in this process only
        common.Attention.forward, common.ema_update, net = plain_attention, plain_ema_update, net.to(device)
    else:
        net = on_device(net, device, kind)
    x = torch.randn(batch, 3, args["image_size"], args["image_size"], device=device)
    t = torch.rand(batch, device=device)
    with torch.no_grad():
        found["forward"] = median_seconds(lambda: net(x, t), device)
        found["alone"] = median_seconds(lambda: net(x[:1], t[:1]), device)
    Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        flags = ["--out", folder, "--batch", batch, "--steps", steps, "--optimizer", "adam"]
        cfg = settings("03", "shapes", *flags)
        made_up_pairs(cfg, n_pairs, args)
        own, began = megabytes("RssAnon"), time.perf_counter()  # without the pages of mapped files
        pairs = load(cfg, "02_pairs.pt")
        found["open"] = time.perf_counter() - began
        for _ in range(100):  # as training would: many pairs, in no order
            pairs["x"][torch.randint(n_pairs, (128,))]
        found["own"] = megabytes("RssAnon") - own
        found["step"], found["passes"] = training_step(cfg, net, pairs, device, kind == "plain fp32")
    found["peak"] = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else megabytes("VmHWM")
    return found


def apart(*arguments):
    """measure(*arguments) in a new process, whose memory nothing else has used."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


@torch.no_grad()
def operations(net, *shapes):
    """Operations (two for each multiply-add) of net(a tensor of each shape)."""
    with FlopCounterMode(display=False) as counter:
        net(*map(torch.zeros, shapes))
    return counter.get_total_flops()


def costs(preset):
    """Operations of each of the five stages: [01, ..., 05]. A gradient counts as two more forward passes."""
    c1, c2, c3, c4, c5 = (settings(number, preset) for number in STAGES)
    big, small = (operations(UNet(c1.image_size, 3, c.base, c.mult, c.blocks, c.attn),
                             (1, 3, c1.image_size, c1.image_size), (1,)) for c in (c1, c3))
    # 04: the student on pairs and fresh noise, the flow once. D sees two images of each, one with a gradient.
    distance = 3 * operations(STAGES["04"].LPIPS().features, (1, 3, 64, 64)) if c4.distance == "lpips" else 0
    own_pairs = c4.n_pairs * c4.pair_steps * small if c4.pairs_from == "flow" else 0
    distilled = c4.batch * c4.steps * (7 * small + 2 * distance) + own_pairs
    measured = c5.n_samples * ((c5.teacher_steps + 1) * big + (c5.flow_steps + 2) * small)
    if c5.metric == "fid":  # five rows, and the data: 50,000 images or more
        measured += (5 * c5.n_samples + 50_000) * operations(STAGES["05"].Inception(), (1, 3, 299, 299))
    return [3 * big * c1.batch * c1.steps, big * c2.n_pairs * c2.sample_steps,
            3 * small * c3.batch * c3.steps, distilled, measured]


def main(cfg):
    device = start(cfg, "benchmark")
    require(device.type in ("cpu", "cuda"), f"--device {cfg.device}: this measures a CPU or an NVIDIA GPU")
    require(cfg.batch and cfg.n_pairs, "--batch and --n_pairs must be at least 1")

    # 1. The machine.
    limits = {precision: limit(device, precision) for precision in ("fp32", cfg.precision)}
    cuda, today = device.type == "cuda", time.strftime("%Y-%m-%d")
    machine = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {os.cpu_count()} cores"
    lines = [f"{machine}, torch {torch.__version__}, batch {cfg.batch}, {today}. Limits in GFLOP/s: "
             + ", ".join(f"{precision} {speed / 1e9:,.0f}" for precision, speed in limits.items()), "",
             "| network | parameters | as | forward, img/s | of limit | step, img/s | of limit | to plain: "
             "forward, step | outside of the network | peak, MB | one image, ms |",
             "|---|---:|---" + "|---:" * 8 + "|"]
    say(lines[0])

    # 2. The networks.
    fastest, trained, steps = 0, "", 5 if cfg.quick else 7
    for name, args in networks().items():
        net, chosen = UNet(**args), name in ("paper's 3.4M", "shapes student")
        parameters, macs = sum(p.numel() for p in net.parameters()), STAGES["05"].count_macs(net)
        if not chosen and (cfg.quick or macs > cfg.max_gmacs * 1e9):
            continue
        for kind in ("plain fp32", *limits):
            found = apart(args, kind, device, cfg.batch, steps, 256, cfg.out)
            plain, cells = found if kind == "plain fp32" else plain, [name, f"{parameters:,}", kind]
            for part, passes in (("forward", 1), ("step", 3)):
                speed = passes * 2 * macs * cfg.batch / found[part]  # operations per second
                cells += [f"{cfg.batch / found[part]:,.1f}", f"{speed / limits[kind[-4:]]:.0%}"]
            fastest, trained = max((fastest, trained), (speed, name))
            cells += [", ".join(f"{plain[part] / found[part]:.2f}" for part in ("forward", "step")),
                      f"{1 - found['passes'] / found['step']:.1%}", f"{found['peak']:,.0f}",
                      f"{1000 * found['alone']:.3g}"]
            lines.append(f"| {' | '.join(cells)} |")
            say(lines[-1])

    # 3. Pairs.
    found = apart(networks()["paper's 3.4M"], cfg.precision, device, cfg.batch, steps, cfg.n_pairs, cfg.out)
    lines += ["", f"{cfg.n_pairs:,} pairs of 32x32: to check and open them takes {found['open']:.2f} s and "
              f"{found['own']:.0f} MB of memory; with them, the 3.4M network trains on "
              f"{cfg.batch / found['step']:.1f} img/s ({cfg.precision}).", ""]

    # 4. What the presets cost.
    lines += ["| preset | 01 | 02 | 03 | 04 | 05 | all | days here |", "|---" + "|---:" * 7 + "|"]
    for preset in PRESETS:
        stages = costs(preset)
        figures = [*(n / 1e18 for n in (*stages, sum(stages))), sum(stages) / fastest / 86400]
        lines.append(f"| {preset} | {' | '.join(f'{n:,.0f}' if n >= 10 else f'{n:.2g}' for n in figures)} |")
    lines += ["", f"10^18 operations; days at {fastest / 1e12:.2f} TFLOP/s, as in training {trained}.", ""]
    with writing(Path(cfg.out, "benchmark.md")) as file:
        file.write("\n".join(lines).encode())
    say("\n".join(["", *lines, f"wrote {cfg.out}/benchmark.md"]))


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
