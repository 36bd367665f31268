"""Measure this machine, how near to its limits the networks work, and count what every preset needs.

    python extras/benchmark.py                        # 5 minutes on 2 CPU cores; --quick: 2 minutes
    python extras/benchmark.py --batch 128 --quick    # on a GPU

The limit is the speed of a large matrix product or 3x3 convolution. Then come the networks of the presets,
each in a process of its own: a forward pass, and a training step as in stage 03. "plain" is the same as it is
often written: fp32, attention in single steps, an optimiser and an EMA that go from tensor to tensor. "of
limit" counts the multiply-adds of convolutions and linear layers (of a step: three times those of a forward
pass). On a GPU the last kind is compiled, and it is measured how much of a step the GPU works, whether
something waits for it (torch warns, and names the line), and how long 50,000 images of one call and their
Inception features take. What is counted at the end needs no GPU: kernels, bytes, memory, operations.

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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ablations import STAGES  # it makes common importable
import common
from common import PRESETS, UNet, on_device, read_settings, require, run, say, start, writing

SETTINGS = [  # name, its value for each preset, text
    ("quick", *[False] * 5, "only two networks, and fewer repetitions"),
    ("batch", *[16] * 5, "images per call and per training step"),
    ("max_gmacs", *[4.0] * 5, "leave out networks with more multiply-adds per image (10^9)"),
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
            args = network_of(number, preset)
            if args not in found.values():
                found[f"{preset} {kind}"] = args
    return found


def network_of(number, preset):
    """UNet's arguments in stage 01 or 03 (04 has those of 03), but for classes and dropout."""
    cfg, size = settings(number.replace("04", "03"), preset), settings("01", preset).image_size
    return dict(image_size=size, base=cfg.base, mult=cfg.mult, blocks=cfg.blocks, attn=cfg.attn)


# ---------------------------------------------------------------------------------------------- What is timed

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


def training_step(cfg, net, device, plain):
    """Median seconds of stage 03's training step, and of the network's two passes in it."""
    began, reflow_loss = [], STAGES["03"].reflow_loss
    z, x = torch.randn(2, 512, 3, net.args["image_size"], net.args["image_size"]).half()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = common.Trainer(cfg, "03 benchmark", net, {})
        if plain:
            trainer.optimizers = [torch.optim.Adam(net.parameters(), cfg.lr, foreach=False)]
        for step in trainer.steps():
            began.append(now(device))
            if device.type == "cuda":  # a wait in the step is named, but not those of log lines
                torch.cuda.set_sync_debug_mode("warn")
            z_, x_ = (part.float() for part in trainer.draw(z, x))
            mirrored = torch.rand(len(x_), 1, 1, 1, device=device) < 0.5
            z_, x_ = torch.where(mirrored, z_.flip(3), z_), torch.where(mirrored, x_.flip(3), x_)
            t = torch.rand(len(x_), device=device)
            trainer.update(reflow_loss(trainer.net, z_, x_, t, 0.5))
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    passes = median_seconds(lambda: reflow_loss(net, z_, x_, t, 0.5).backward(), device)
    return np.median(np.diff(began)[1:]).item(), passes  # the first step is to warm up


@torch.no_grad()
def on_a_gpu(net, x, t, device):
    """Share of ten training passes in which the GPU works; seconds for 50,000 images, and their features."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.enable_grad(), torch.profiler.profile(activities=activities) as trace:
        began = now(device)
        for _ in range(10):
            net(x, t).square().mean().backward()
        seconds = now(device) - began
    found = {"busy": sum(event.self_device_time_total for event in trace.key_averages()) / 1e6 / seconds}
    net, inception = net.eval(), STAGES["05"].Inception().to(device).eval()
    for n in (1000, 50_000):  # first to warm up
        began = now(device)
        images = [common.to_uint8(common.samples(net, 0, range(i, i + 500), 1)) for i in range(0, n, 500)]
        found["images"], began = now(device) - began, now(device)
        for part in images:
            STAGES["05"].inception_features(inception, part.to(device)).cpu()
        found["features"] = now(device) - began
    return found


def measure(args, kind, device, batch, steps, out):
    """What a network takes ("plain fp32", "fp32", "bf16" or "compiled bf16"): seconds forward, alone (one
    image), step, passes (in a step); MB peak; on a GPU also what on_a_gpu() says.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
    torch.manual_seed(0)
    net, found = UNet(**args).eval(), {}
    if kind == "plain fp32":  # in this process only
        common.Attention.forward, common.ema_update, net = plain_attention, plain_ema_update, net.to(device)
    else:
        net = common.compiled(on_device(net, device, kind[-4:]), 10**9 if kind.startswith("compiled") else 0)
    x = torch.randn(batch, 3, args["image_size"], args["image_size"], device=device)
    t = torch.rand(batch, device=device)
    with torch.no_grad():
        found["forward"] = median_seconds(lambda: net(x, t), device)
        found["alone"] = median_seconds(lambda: net(x[:1], t[:1]), device)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        flags = ["--out", folder, "--batch", batch, "--steps", steps, "--optimizer", "adam"]
        found["step"], found["passes"] = training_step(settings("03", "shapes", *flags), net, device,
                                                       kind == "plain fp32")
    if device.type == "cuda":
        return {**found, "peak": torch.cuda.max_memory_allocated() / 1e6, **on_a_gpu(net, x, t, device)}
    status = Path("/proc/self/status")  # Linux: the most memory that this process has had
    peak = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1e3 if status.exists() else math.nan
    return {**found, "peak": peak}


def apart(*arguments):
    """measure(*arguments) in a new process, whose memory nothing else has used."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


# -------------------------------------------------------------------------------------------- What is counted

class Counter(TorchDispatchMode):
    """Counts kernels, and the bytes that all but convolutions and matrix products read and write."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read, written = (list(filter(torch.is_tensor, tree_leaves(part))) for part in ((args, kwargs), out))
        if written and not func.is_view and name not in ("detach", "empty_like", "_reshape_alias"):
            self.kernels += 1
            if not any(part in name for part in ("convolution", "mm", "attention")):
                self.bytes += sum(a.numel() * a.element_size() for a in read + written)
        return out


def counts(number, preset, precision):
    """(kernels, GB moved by element-wise operations, GB kept for the gradient) of a training pass of stage
    01, 03 or 04, not compiled; GB of weights, gradient, Adam's two moments and EMA. Nothing is computed.
    """
    cfg, args, kept, counter = settings(number, preset), network_of(number, preset), {}, Counter()
    dropout = settings(number.replace("04", "03"), preset).dropout

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        net, size = UNet(**args, dropout=dropout), args["image_size"]
        batch = cfg.batch * (2 if number == "04" else 1)  # the student answers for pairs and for fresh noise
        lpips = number == "04" and cfg.distance == "lpips"
        distance = STAGES["04"].LPIPS() if lpips else STAGES["04"].squared_l2
        net.precision = precision
        x, t, weights = torch.randn(batch, 3, size, size), torch.rand(batch), list(net.parameters())
        with counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = distance(net(x, t), x).mean()
            loss.backward()
        for p in weights:
            kept.pop(p.untyped_storage()._cdata, None)
        return (counter.kernels, counter.bytes / 1e9, sum(kept.values()) / 1e9,
                sum(p.numel() for p in weights) * 5 * 4 / 1e9)


@torch.no_grad()
def operations(net, *shapes):
    """Operations (two for each multiply-add) of net(a tensor of each shape)."""
    with FlopCounterMode(display=False) as counter:
        net(*map(torch.zeros, shapes))
    return counter.get_total_flops()


def costs(preset):
    """Operations of each of the five stages: [01, ..., 05]. A gradient counts as two more forward passes."""
    c1, c2, c3, c4, c5 = (settings(number, preset) for number in STAGES)
    shapes = (1, 3, c1.image_size, c1.image_size), (1,)
    big, small = (operations(UNet(**network_of(number, preset)), *shapes) for number in ("01", "03"))
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
    require(cfg.batch, "--batch must be at least 1")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)

    # 1. The machine.
    limits = {precision: limit(device, precision) for precision in ("fp32", cfg.precision)}
    cuda, today = device.type == "cuda", time.strftime("%Y-%m-%d")
    machine = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {os.cpu_count()} cores"
    lines = [f"{machine}, torch {torch.__version__}, batch {cfg.batch}, {today}. Limits in GFLOP/s: "
             + ", ".join(f"{precision} {speed / 1e9:,.0f}" for precision, speed in limits.items()), "",
             "| network | parameters | as | forward, img/s | of limit | step, img/s | of limit | to plain: "
             "forward, step | outside of the network | peak, MB | one image, ms |"
             + " GPU works | 50,000 images, s | features, s |" * cuda,
             "|---|---:|---" + "|---:" * (11 if cuda else 8) + "|"]
    say(lines[0])

    # 2. The networks.
    fastest, trained, steps = 0, "", 5 if cfg.quick else 7
    chosen = ("cifar10_quick student", "cifar10 student") if cuda else ("paper's 3.4M", "shapes student")
    for name, args in networks().items():
        net = UNet(**args)
        parameters, macs = sum(p.numel() for p in net.parameters()), STAGES["05"].count_macs(net)
        if name not in chosen and (cfg.quick or macs > cfg.max_gmacs * 1e9):
            continue
        for kind in ("plain fp32", *limits, *([f"compiled {cfg.precision}"] if cuda else [])):
            found = apart(args, kind, device, cfg.batch, steps, cfg.out)
            plain, cells = found if kind == "plain fp32" else plain, [name, f"{parameters:,}", kind]
            for part, passes in (("forward", 1), ("step", 3)):
                speed = passes * 2 * macs * cfg.batch / found[part]  # operations per second
                cells += [f"{cfg.batch / found[part]:,.1f}", f"{speed / limits[kind[-4:]]:.0%}"]
            fastest, trained = max((fastest, trained), (speed, name))
            cells += [", ".join(f"{plain[part] / found[part]:.2f}" for part in ("forward", "step")),
                      f"{1 - found['passes'] / found['step']:.1%}", f"{found['peak']:,.0f}",
                      f"{1000 * found['alone']:.3g}"]
            if cuda:
                cells += [f"{found['busy']:.0%}", f"{found['images']:.1f}", f"{found['features']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
            say(lines[-1])

    # 3. What a training step of each preset needs, at its batch. Counted: no GPU is asked.
    lines += ["", "| preset | stage | batch | kernels: fp32, bf16 | element-wise, GB: fp32, bf16 | kept for "
              "the gradient, GB: fp32, bf16 | weights, gradient, Adam, EMA, GB |", "|---" + "|---:" * 6 + "|"]
    for preset in PRESETS:
        for number in ("01", "03", "04"):
            both = zip(counts(number, preset, "fp32"), counts(number, preset, "bf16"))
            cells = [f"{a:,.4g}, {b:,.4g}" for a, b in both]
            lines.append(f"| {preset} | {number} | {settings(number, preset).batch} | "
                         f"{' | '.join(cells[:3])} | {cells[3].split()[1]} |")

    # 4. What the presets cost.
    lines += ["", "| preset | 01 | 02 | 03 | 04 | 05 | all | days here |", "|---" + "|---:" * 7 + "|"]
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
