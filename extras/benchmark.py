"""Measure this machine, how near to its limits the networks work, and count what every preset needs.

    python extras/benchmark.py                        # 4 minutes on 2 CPU cores; --quick: 2 minutes
    python extras/benchmark.py --batch 128 --quick    # on a GPU

"of limit" is of the speed of a large matrix product or 3x3 convolution. It counts the multiply-adds of
convolutions and linear layers, in a training step three times those of a forward pass. "plain" is as it is
often written: fp32, attention in single steps, an optimiser and an EMA that go from tensor to tensor. On a
GPU torch warns of what waits for it in a step. What is counted needs no GPU.
"""
import concurrent.futures
import math
import multiprocessing
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ablations import STAGES  # it makes common importable
import common
from common import PRESETS, UNet, read_settings, require, run, say, start

SETTINGS = [  # name, its value for each preset, text
    ("quick", *[False] * 5, "only two of the networks: the small ones, on a GPU the large ones"),
    ("batch", *[16] * 5, "images per call and per training step"),
    ("precision", *["auto"] * 5, "measured beside fp32", ("fp32", "bf16", "auto")),
]


def settings(number, preset, *arguments):
    """The settings of a stage ("01" ... "05")."""
    return read_settings(STAGES[number].SETTINGS, "", ["--preset", preset, *map(str, arguments)])


def network_of(number, preset):
    """UNet's arguments in stage 01, 03 or 04 (which has the network of 03), without classes."""
    size, cfg = settings("01", preset).image_size, settings("01" if number == "01" else "03", preset)
    return dict(image_size=size, base=cfg.base, mult=cfg.mult, blocks=cfg.blocks, attn=cfg.attn,
                dropout=cfg.dropout)


def seconds(call):
    """Median seconds of a call. It is repeated until the times agree to a fifth, for 0.5 to 3 seconds."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.adaptive_autorange(0.2, min_run_time=0.5, max_run_time=3.0).median


@torch.no_grad()
def limit(device, precision):
    """What the machine can do at best, in operations per second."""
    n, batch, c = (2048, 16, 192) if device.type == "cpu" else (8192, 128, 512)
    how = dict(device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    a = torch.randn(n, n, **how)
    x = torch.randn(batch, c, 32, 32, **how).to(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(c, c, 3, padding=1, **how).to(memory_format=torch.channels_last)
    return max(2 * n**3 / seconds(lambda: a @ a), 2 * 9 * c * x.numel() / seconds(lambda: conv(x)))


def plain_attention(self, x):
    """common.Attention.forward in single steps."""
    q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, HW)
    weights = (q.mT @ k * q.shape[1] ** -0.5).softmax(dim=2)  # (B, HW, HW)
    return (x + self.proj((v @ weights.mT).view_as(x))) * math.sqrt(0.5)


@torch.no_grad()
def plain_update(trainer, adam, loss):
    """common.Trainer.update from tensor to tensor."""
    adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.weights, 1.0)
    adam.step()
    for average, p in zip(trainer.averages, trainer.weights):
        average.sub_((average - p) * 0.001)


def measure(args, kind, device, batch, steps, out):
    """Seconds: "forward", "alone" (one image), "step" (of 03), "passes" (the network's in it). MB: "peak". On
    a GPU: "busy", its share of the passes; seconds for 50,000 "images" of one call, and for their "features".

    args: UNet's; kind: "plain fp32", "fp32", "bf16" or "compiled bf16"; steps: setting of 03, below 5000.
    """
    cuda, plain = device.type == "cuda", kind == "plain fp32"
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
    net = UNet(**{**args, "dropout": 0.0}, precision=kind[-4:]).to(device).eval()
    if plain:
        common.Attention.forward = plain_attention  # in this process only
        net.to(memory_format=torch.contiguous_format)
    if "compiled" in kind:
        net.compile(dynamic=False)
    x = torch.randn(batch, 3, args["image_size"], args["image_size"], device=device)
    t = torch.rand(batch, device=device)
    with torch.no_grad():
        found = {"forward": seconds(lambda: net(x, t)), "alone": seconds(lambda: net(x[:1], t[:1]))}

    cfg = settings("03", "shapes", "--out", out, "--batch", batch, "--steps", steps, "--optimizer", "adam")
    trainer, reflow_loss = common.Trainer(cfg, "benchmark", net, {}), STAGES["03"].reflow_loss
    adam = torch.optim.Adam(trainer.weights, foreach=False)
    pairs = torch.randn(2, 512, *x.shape[1:]).half()

    def step():
        z, x = (part.float() for part in trainer.draw(*pairs))
        loss = reflow_loss(net, z, x, torch.rand(batch, device=device), 0.5)
        if plain:
            plain_update(trainer, adam, loss)
        else:
            trainer.update(loss)

    def passes():
        reflow_loss(net, x, x, t, 0.5).backward()

    found |= {"step": seconds(step), "passes": seconds(passes), "peak": math.nan}
    status = Path("/proc/self/status")
    if cuda:
        found["peak"] = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            passes()
        busy = sum(event.self_device_time_total for event in trace.key_averages()) / 1e6
        net, inception = net.eval(), STAGES["05"].Inception().to(device).eval()
        images = common.to_uint8(common.samples(net, 0, range(500), 1)).to(device)
        found |= {"busy": busy / found["passes"],
                  "images": 100 * seconds(lambda: common.samples(net, 0, range(500), 1)),
                  "features": 100 * seconds(lambda: STAGES["05"].inception_features(inception, images).cpu())}
    elif status.exists():  # Linux: the most memory that this process has had
        found["peak"] = int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3
    return found


class Counter(TorchDispatchMode):
    """Counts kernels, and the bytes that all but convolutions and matrix products read and write."""
    kernels, bytes = 0, 0

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
    """(Kernels, GB moved by element-wise operations, GB kept for the gradient) of a training pass of stage
    01, 03 or 04, not compiled; GB of weights, gradient, Adam's two moments and EMA. Nothing is computed.
    """
    cfg, args, kept, counter = settings(number, preset), network_of(number, preset), {}, Counter()

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        net, batch, distance = UNet(**args, precision="bf16"), cfg.batch, STAGES["04"].squared_l2
        net.precision = precision  # only now: fake weights cannot be brought into the layout of fp32
        if number == "04":
            batch = 2 * cfg.batch  # the student answers for pairs and for fresh noise
            distance = STAGES["04"].LPIPS() if cfg.distance == "lpips" else distance
        x, t = torch.randn(batch, 3, args["image_size"], args["image_size"]), torch.rand(batch)
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            distance(net(x, t), x).mean().backward()
        for p in net.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
    weights = sum(p.numel() for p in net.parameters())
    return counter.kernels, counter.bytes / 1e9, sum(kept.values()) / 1e9, weights * 5 * 4 / 1e9


@torch.no_grad()
def operations(net, *shapes):
    """Operations (two for each multiply-add) of net(a tensor of each shape)."""
    one_by_one = torch.nn.attention.SDPBackend.MATH  # a CPU's fused attention would not be counted
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(one_by_one):
        net(*map(torch.zeros, shapes))
    return counter.get_total_flops()


def costs(preset):
    """Operations of each of the five stages: [01, ..., 05]. A gradient counts as two more forward passes."""
    c1, c2, c3, c4, c5 = (settings(number, preset) for number in STAGES)
    image = (1, 3, c1.image_size, c1.image_size)
    big, small = (operations(UNet(**network_of(number, preset)), image, (1,)) for number in ("01", "03"))
    # 04: the student on pairs and fresh noise, the flow once. D sees two images of each, one with a gradient.
    distilled = c4.batch * c4.steps * 7 * small
    if c4.distance == "lpips":
        distilled += c4.batch * c4.steps * 6 * operations(STAGES["04"].LPIPS().features, (1, 3, 64, 64))
    if c4.pairs_from == "flow":
        distilled += c4.n_pairs * c4.pair_steps * small
    measured = c5.n_samples * ((c5.teacher_steps + 1) * big + (c5.flow_steps + 2) * small)
    if c5.metric == "fid":  # five rows, and the data: 50,000 images or more
        measured += (5 * c5.n_samples + 50_000) * operations(STAGES["05"].Inception(), (1, 3, 299, 299))
    return [3 * big * c1.batch * c1.steps, big * c2.n_pairs * c2.sample_steps,
            3 * small * c3.batch * c3.steps, distilled, measured]


def main(cfg):
    device = start(cfg, "benchmark")
    cuda, fastest = device.type == "cuda", 0
    require(cuda or device.type == "cpu", f"--device {cfg.device}: this measures a CPU or an NVIDIA GPU")

    # 1. What is timed.
    limits = {precision: limit(device, precision) for precision in ("fp32", cfg.precision)}
    say("GFLOP/s at best: " + ", ".join(f"{name} {speed / 1e9:,.0f}" for name, speed in limits.items()))
    networks = [("student of shapes, 0.11M", network_of("03", "shapes")),
                ("3.4M", dict(image_size=32, base=64, mult=(1, 1, 2), blocks=1)),  # the paper's smallest
                ("7.0M", network_of("03", "cifar10_quick")), ("15.7M", network_of("03", "cifar10"))]
    if cfg.quick:
        networks = networks[2:] if cuda else networks[:2]
    gpu = " GPU works | 50,000 images, s | their features, s |" if cuda else ""
    say("\n| network | as | forward, img/s | of limit | step, img/s | of limit | to plain: forward, step | "
        f"outside of the network | peak, MB | one image, ms |{gpu}\n|---|---{'|---:' * (11 if cuda else 8)}|")
    for name, args in networks:
        operations = 2 * STAGES["05"].count_macs(UNet(**args))  # of a forward pass, for an image
        for kind in ("plain fp32", *limits, *([f"compiled {cfg.precision}"] if cuda else [])):
            # Each in a process of its own, whose memory nothing else has used.
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, args, kind, device, cfg.batch, 4999, cfg.out).result()
            plain = found if kind == "plain fp32" else plain
            forward, step = cfg.batch / found["forward"], cfg.batch / found["step"]  # images per second
            share = operations / limits[kind[-4:]]
            fastest = max(fastest, 3 * step * operations)
            cells = [f"{forward:,.1f}", f"{forward * share:.0%}", f"{step:,.1f}", f"{3 * step * share:.0%}",
                     f"{plain['forward'] / found['forward']:.2f}, {plain['step'] / found['step']:.2f}",
                     f"{1 - found['passes'] / found['step']:.1%}", f"{found['peak']:,.0f}",
                     f"{1000 * found['alone']:.3g}"]
            if cuda:
                cells += [f"{found['busy']:.0%}", f"{found['images']:.1f}", f"{found['features']:.1f}"]
            say(f"| {name} | {kind} | {' | '.join(cells)} |")

    # 2. What a training step of each preset needs, at its batch. Counted: no GPU is asked.
    say("\n| preset | stage | batch | kernels: fp32, bf16 | element-wise, GB: fp32, bf16 | kept for the "
        f"gradient, GB: fp32, bf16 | weights, gradient, Adam, EMA, GB |\n|---{'|---:' * 6}|")
    for preset in PRESETS:
        for number in ("01", "03", "04"):
            fp32, bf16 = counts(number, preset, "fp32"), counts(number, preset, "bf16")
            cells = [f"{a:,.4g}, {b:,.4g}" for a, b in zip(fp32[:3], bf16)] + [f"{fp32[3]:,.4g}"]
            say(f"| {preset} | {number} | {settings(number, preset).batch} | {' | '.join(cells)} |")

    # 3. What the presets cost.
    say(f"\n| preset, 10^18 operations | 01 | 02 | 03 | 04 | 05 | all | days here |\n|---{'|---:' * 7}|")
    for preset in PRESETS:
        stages = costs(preset)
        figures = [*(n / 1e18 for n in (*stages, sum(stages))), sum(stages) / fastest / 86400]
        say(f"| {preset} | {' | '.join(f'{n:,.0f}' if n >= 10 else f'{n:.2g}' for n in figures)} |")
    say(f"\nDays at {fastest / 1e12:.2f} TFLOP/s, as in the fastest training above.")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
