"""Measure this machine as the stages use it, or count what the presets cost.

    python extras/benchmark.py            # --quick: two networks, on a GPU 200 s at most
    python extras/benchmark.py --count    # counts the presets' operations and measures nothing

Each row is a network and a kind, and is measured in a process of its own. Each cell is printed as
soon as it is measured, so a run that is cut off has still shown something. The kinds are fp32 (on a
GPU as torch does it, with convolutions in TF32), bf16, bf16 compiled, and on a GPU bf16 graphs:
compiled with CUDA graphs, as the stages do there. "of the limit" is the speed of a training step as
a share of the machine's limit, the faster of a large matrix product and a large convolution. A
training step counts as three times the operations of a forward pass, without those of attention.
"""
import contextlib
import copy
import io
import math
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ablations import STAGES  # it makes common importable
import common
from common import PRESETS, Trainer, UNet, euler, noise_for, read_settings, require, run, say, start

SETTINGS = {
    "quick": dict(others=False, help="two networks, on a GPU the large ones and 200 s at most"),
    "count": dict(others=False, help="count what every preset needs, and measure nothing"),
    "kind": dict(others="all", choices=("all", "fp32", "bf16", "bf16 compiled", "bf16 graphs"),
                 help="only the rows of this kind"),
    "batch": dict(others=0, help="images per training step; 0: 128 on a GPU, 16 on a CPU"),
}
QUICK_SECONDS = 200  # what --quick may take on a GPU
TFLOPS = 132  # an H200 in a training step, compiled with CUDA graphs (docs/speed.md)
CELLS = ("network", "kind", "first step, s", "step of 03, ms", "img/s", "of the limit", "peak, GB",
         "GPU busy", "sampling, ms a call", "50,000 pairs of 100 calls, s", "step of 04, ms",
         "04 to 03", "LPIPS's share of 04")


def settings(number, preset, *arguments):
    """The settings of a stage ("01" ... "05")."""
    given = ["--preset", preset, *map(str, arguments)]
    return read_settings(STAGES[number].SETTINGS, "", given)


def network_of(number, preset):
    """UNet's arguments in stage 01 or 03, without classes."""
    cfg = settings(number, preset)
    size = settings("01", preset).image_size
    return dict(image_size=size, base=cfg.base, mult=cfg.mult, blocks=cfg.blocks,
                attn=cfg.attn, dropout=cfg.dropout)


# ---------------------------------------------------------------------------------------- Measured

def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call, device, span=2.0):
    """Seconds of a call: the mean of as many as fit into `span`.

    As in training, Python goes on while the GPU computes. It waits only before the first and after
    the last call.
    """
    def mean_of(n):
        synchronise(device)
        began = time.monotonic()
        for _ in range(n):
            call()
        synchronise(device)
        return (time.monotonic() - began) / n

    mean_of(1)
    return mean_of(max(2, round(span / mean_of(2))))


def kernels_of(call):
    """Seconds that the GPU's kernels take in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    kernels = [event for event in trace.events() if not event.is_user_annotation]
    return sum(event.self_device_time_total for event in kernels) / 5 / 1e6


@torch.no_grad()
def limit(device, precision):
    """The most operations per second that the machine can do."""
    n, batch, c = 8192, 128, 512
    if device.type == "cpu":
        n, batch, c = 2048, 16, 192
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    a = torch.randn(n, n, device=device, dtype=dtype)
    where = dict(device=device, dtype=dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, c, 32, 32).to(**where)
    conv = torch.nn.Conv2d(c, c, 3, padding=1).to(**where)
    product = 2 * n**3
    convolution = 2 * 9 * c * x.numel()
    return max(product / seconds(lambda: a @ a, device, 0.5),
               convolution / seconds(lambda: conv(x), device, 0.5))


def step_of_03(cfg, net):
    """A function that makes one training step, as main() in stage 03 does."""
    s = STAGES["03"]
    pairs = torch.randn(2, 4096, *net.shape).half()
    trainer = Trainer(cfg, "benchmark", net, {}, cfg.batch)
    steps = trainer.steps()

    def step():
        next(steps)
        z, x = (part.float() for part in trainer.draw(*pairs))
        t = s.draw_t(len(x), cfg.t_distribution, x.device)
        trainer.update(s.reflow_loss(trainer.net, z, x, t, 0.5))

    return step


def step_of_04(cfg, flow):
    """A function of the distance D that makes one training step, as main() in stage 04 does."""
    s = STAGES["04"]
    pairs = torch.randn(2, 4096, *flow.shape).half()
    trainer = Trainer(cfg, "benchmark", copy.deepcopy(flow), {}, 2 * cfg.batch)
    steps = trainer.steps()
    flow.eval().requires_grad_(False)
    guide = common.compiled(cfg, flow, cfg.steps, cfg.batch)

    def step(distance):
        next(steps)
        z, x = (part.float() for part in trainer.draw(*pairs))
        z_new = torch.randn_like(z)
        velocities = s.first_velocity(trainer.net, torch.cat([z, z_new]))
        v_pairs, v_new = velocities.chunk(2)
        t = torch.rand(len(z), device=z.device)
        t = cfg.t_low + (cfg.t_high - cfg.t_low) * t
        loss = s.distill_loss(v_pairs, z, x, distance)
        trainer.update(loss + s.guided_loss(v_new, guide, z_new, t, distance))

    return step


def measure(args, kind, batch, device, limit, out, cell):
    """Calls cell(text) with each measurement, in the order of CELLS. args: UNet's."""
    precision = kind[:4]
    given = ["--device", device, "--precision", precision, "--batch", batch, "--out", out]
    given += ["--compile", "off" if kind == precision else "on"]
    cfg = settings("03", "cifar10", *given)
    device = start(cfg, "benchmark")
    cuda = device.type == "cuda"
    net = UNet(**args, precision=precision)
    operations = 3 * 2 * STAGES["05"].count_macs(net) * batch  # of a training step

    # 1. Training, as in stage 03.
    net.to(device)
    began = time.monotonic()
    step = step_of_03(cfg, net)
    step()
    synchronise(device)
    cell(f"{time.monotonic() - began:.1f}")
    if cuda:  # the memory that cuDNN needed to find its fastest convolutions does not count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    reflow = seconds(step, device)
    cell(f"{1000 * reflow:.1f}")
    cell(f"{batch / reflow:,.0f}")
    cell(f"{operations / reflow / limit:.0%}")
    cell(f"{torch.cuda.max_memory_reserved() / 1e9:.1f}" if cuda else "-")
    cell(f"{kernels_of(step) / reflow:.0%}" if cuda else "-")
    del step

    # 2. Sampling, as in stage 02.
    net.eval()
    n = common.sampling_batch(net)
    calls = 10 if cuda else 1
    fast = common.compiled(cfg, net, 10**6, n)
    z = noise_for(0, range(n), net.shape).to(device)
    call = seconds(lambda: euler(fast, z, calls).half().cpu(), device)
    call /= calls
    cell(f"{1000 * call:.1f}")
    cell(f"{call * 100 * 50_000 / n:,.0f}")

    # 3. Training, as in stage 04. LPIPS takes as long with random weights as with its own.
    if kind == ("bf16 graphs" if cuda else "fp32"):
        s = STAGES["04"]
        step = step_of_04(settings("04", "cifar10", *given), net)
        huber = seconds(lambda: step(s.pseudo_huber), device)
        cell(f"{1000 * huber:.1f}")
        cell(f"{huber / reflow:.2f}")
        lpips = s.LPIPS().to(device)
        cell(f"{1 - huber / seconds(lambda: step(lpips), device):.0%}")


def row(name, args, kind, *given):
    """Prints a row. If something fails, the row ends with the first line of the error."""
    screen, log, cells = sys.stdout, io.StringIO(), []

    def cell(text):
        said = log.getvalue().strip()
        require("not compiled" not in said, said.split("\n")[-1])  # the network ran as it is
        cells.append(text)
        print(f" {text} |", end="", file=screen, flush=True)

    common.SAVE_SECONDS = math.inf  # in this process: nothing is kept
    if kind == "bf16 compiled":  # without graphs
        compile = torch.compile
        torch.compile = lambda net, **how: compile(net, dynamic=False)
    print("|", end="", file=screen)
    with contextlib.redirect_stdout(log):
        try:
            cell(name)
            cell(kind)
            measure(args, kind, *given, cell)
            for _ in CELLS[len(cells):]:
                cell("-")
        except Exception as error:  # compilers fail in many ways, and a GPU runs out of memory
            print(f" {(str(error) or repr(error)).splitlines()[0]} |", end="", file=screen)
    print(file=screen, flush=True)


def features(device):
    """Prints how many images Inception takes in a second, as in stage 05."""
    with contextlib.redirect_stdout(io.StringIO()):
        device = start(settings("05", "cifar10", "--device", device), "benchmark")
    s, n = STAGES["05"], 128 if device.type == "cuda" else 8
    net = s.Inception().to(device).eval()
    images = torch.zeros(n, 3, 32, 32, dtype=torch.uint8, device=device)
    found = seconds(lambda: s.inception_features(net, images).cpu(), device)
    print(f"\nInception's features: {n / found:,.0f} img/s")


def in_a_process(until, function, *given):
    """Calls function(*given) in a process of its own, which is ended at the time `until`."""
    if time.monotonic() > until:
        return
    process = multiprocessing.get_context("spawn").Process(target=function, args=given)
    process.start()
    process.join(min(until - time.monotonic(), 10**6))  # infinity is refused
    if process.is_alive():
        process.kill()
        say(f" cut off: --quick ends after {QUICK_SECONDS} s")
    elif process.exitcode:
        say(f" the process ended with {process.exitcode}")


def measure_all(cfg):
    began = time.monotonic()
    device = start(cfg, "benchmark")
    cuda, until = device.type == "cuda", math.inf
    require(cuda or device.type == "cpu", "this measures a CPU or an NVIDIA GPU")
    presets = {"student of shapes, 0.11M": "shapes", "7.0M": "cifar10_quick", "15.7M": "cifar10"}
    networks = [(name, network_of("03", preset)) for name, preset in presets.items()]
    kinds = ["fp32", "bf16"]
    if cuda:  # what matters most comes first
        networks.reverse()
        kinds = ["bf16 graphs", *kinds, "bf16 compiled"]
    elif cfg.compile == "on":
        kinds.append("bf16 compiled")
    if cfg.kind != "all":
        kinds = [cfg.kind]
    if cfg.quick:
        networks = networks[:2]
        until = began + QUICK_SECONDS if cuda else math.inf

    limits = {precision: limit(device, precision) for precision in ("fp32", "bf16")}
    for precision, speed in limits.items():
        say(f"{precision} at best: {speed / 1e9:,.0f} GFLOP/s")
    batch = cfg.batch or (128 if cuda else 16)
    say(f"\n| {' | '.join(CELLS)} |\n|---|---{'|---:' * (len(CELLS) - 2)}|")
    with tempfile.TemporaryDirectory() as out:
        for name, args in networks:
            for kind in kinds:
                given = batch, str(device), limits[kind[:4]], out
                in_a_process(until, row, name, args, kind, *given)
    in_a_process(until, features, str(device))


# ----------------------------------------------------------------------------------------- Counted

@torch.no_grad()
def operations(net, *shapes):
    """Operations (two for each multiply-add) of net(a tensor of each shape)."""
    one_by_one = torch.nn.attention.SDPBackend.MATH  # a CPU's fused attention is not counted
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(one_by_one):
        net(*map(torch.zeros, shapes))
    return counter.get_total_flops()


def costs(preset):
    """Operations of the stages: [01, ..., 05]. A gradient counts as two more forward passes."""
    c1, c2, c3, c4, c5 = (settings(number, preset) for number in STAGES)
    image = (1, 3, c1.image_size, c1.image_size)
    big = operations(UNet(**network_of("01", preset)), image, (1,))
    small = operations(UNet(**network_of("03", preset)), image, (1,))
    # 04: the student on pairs and fresh noise, the flow once. D sees two images of each, one with a
    # gradient.
    distilled = c4.batch * c4.steps * 7 * small
    if c4.distance == "lpips":
        vgg = operations(STAGES["04"].LPIPS().features, (1, 3, 64, 64))
        distilled += c4.batch * c4.steps * 6 * vgg
    if c4.pairs_from == "flow":
        distilled += c4.n_pairs * c4.pair_steps * small
    judged = (c5.teacher_steps + 1) * big + (c5.flow_steps + 2) * small
    measured = c5.n_samples * judged
    if c5.metric == "fid":  # five rows, and the data: 50,000 images or more
        inception = operations(STAGES["05"].Inception(), (1, 3, 299, 299))
        measured += (5 * c5.n_samples + 50_000) * inception
    return [3 * big * c1.batch * c1.steps, big * c2.n_pairs * c2.sample_steps,
            3 * small * c3.batch * c3.steps, distilled, measured]


def count_all():
    say(f"| preset, 10^18 operations | 01 | 02 | 03 | 04 | 05 | all | hours at {TFLOPS} TFLOP/s |")
    say(f"|---{'|---:' * 7}|")
    for preset in PRESETS:
        figures = [n / 1e18 for n in costs(preset)]
        figures.append(sum(figures))
        figures.append(figures[-1] * 1e6 / TFLOPS / 3600)
        say(f"| {preset} | {' | '.join(f'{n:.3g}' for n in figures)} |")


def main(cfg):
    if cfg.count:
        count_all()
    else:
        measure_all(cfg)


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
