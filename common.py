"""What two or more of the five scripts share: the U-Net, euler and the Trainer; then the plumbing.

Notation, the same in every script and in the equations:

    z      noise N(0, I), shape (B, 3, H, W)
    x      image in [-1, 1], real or made by a network, shape (B, 3, H, W)
    t      time, shape (B,): t = 0 is noise, t = 1 is data
    x_t    t x + (1 - t) z, a point on the straight line from z to x
    v      velocity: what every network predicts, as v(x_t, t). In stage 01 its target is x - z
    y      labels of the images: int64 (B,), or None
    |.|^2  in the losses of 01 and 03, the mean of the squares of all values; elsewhere their sum

A couple is any noise with any image. A pair is a noise with the image that a trained network makes
of it. Images are uint8 on disk and float in [-1, 1] everywhere else.

Each file that a stage writes remembers the ids of the files that it was made from ("made_from", and
"lineage" with its own id; see load()). So a stage can refuse files that do not belong together.

Constants carry their origin: "paper:" (Zhu, Liu, Liu: SlimFlow, arXiv 2407.12718), "official
code:" (only in the code that its authors published) or "ours:". The settings of cifar10 and ffhq64
are the paper's unless the text says otherwise; those of the other presets are ours.
"""
import argparse
import contextlib
import copy
import datetime
import hashlib
import importlib
import math
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PRESETS = ("shapes", "cifar10_quick", "cifar10", "ffhq64", "imagenet64")
PRESET = "shapes"  # the one in use; --preset NAME chooses another for one run

# Stages 01 and 03 draw t from [EPS, 1], and sampling begins at t = EPS, as in the official code.
# Nothing here needs it: it is a habit from diffusion models. (Sampling feeds pure noise at t = EPS,
# and its steps of 1/N add up to 1, not to 1 - EPS. Nobody sees these two differences of 0.1 %.)
EPS = 1e-3
# Noises are numbered. Each use has a range of its own, which begins at one of these numbers: the
# pairs of stage 02, the flow's own pairs in stage 04, and the images that are looked at and judged.
# So no image that is judged comes from a noise that was trained on.
PAIRS, OWN_PAIRS, EVALUATION = 0, 10**9, 2 * 10**9
# `torchrun --nproc_per_node=8 01_train_teacher.py` starts 8 processes, one for each GPU. They share
# each batch, so its size stays the same; only the random numbers of training differ.
RANK = int(os.environ.get("RANK") or 0)
WORLD = int(os.environ.get("WORLD_SIZE") or 1)


# ------------------------------------------------------------------------------------------- U-Net
# The paper's network (NCSN++, as "DDPM++"; EDM calls it SongUNet). An encoder halves the image step
# by step. A decoder doubles it again. At each size it sees what the encoder left there: the skips.
# The student of `shapes` (image_size 16, base 12, mult (1, 2), blocks 1, attn (8,)):
#                                   channels   size    skips
#     conv_in                        3 -> 12   16x16   leaves 12
#     encoder  block                12 -> 12   16x16   leaves 12
#              block, halving       12 -> 12    8x8    leaves 12
#              block, attention     12 -> 24    8x8    leaves 24
#     middle   block, attention     24 -> 24    8x8
#              block                24 -> 24    8x8
#     decoder  block                24 -> 24    8x8    takes 24: sees 24 + 24 channels
#              block, attention     24 -> 24    8x8    takes 12: sees 24 + 12
#              block, doubling      24 -> 24   16x16
#              block                24 -> 12   16x16   takes 12: sees 24 + 12
#              block                12 -> 12   16x16   takes 12: sees 12 + 12
#     conv_out                      12 -> 3    16x16

# Official code: the scale of the last layer of each branch. A new block therefore passes its input
# on (scaled), and a new network answers 0. Deep networks learn best from such a start.
NEARLY_ZERO = 1e-10


def init_(layer, scale=1.0):
    """Official code: Xavier-uniform weights with their variance multiplied by `scale`, biases 0."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    """Normalisation in groups of 4 channels, or of more, so that there are at most 32 groups."""
    groups = min(channels // 4, 32)
    require(groups and channels % groups == 0,
            f"{channels} channels do not divide into groups: try a --base that is a multiple of 32")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Attention(nn.Module):
    """Every pixel looks at every pixel: one head over all channels, added to its input."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = init_(nn.Conv2d(channels, 3 * channels, 1), 0.2)  # official code: 0.2
        self.proj = init_(nn.Conv2d(channels, channels, 1), NEARLY_ZERO)

    def forward(self, x):
        b, c = x.shape[:2]
        qkv = self.qkv(self.norm(x))  # (B, 3C, H, W)
        qkv = qkv.view(b, 3, 1, c, -1)  # (B, 3, one head, C, HW)
        qkv = qkv.transpose(3, 4).contiguous()  # fused attention wants C last
        q, k, v = qkv.unbind(1)  # (B, 1, HW, C) each
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(2, 3).reshape(x.shape)
        return (x + self.proj(h)) * math.sqrt(0.5)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, added to their input. The time enters between them, as an embedding.

    resample: a layer that doubles or halves the size, or None. The block may end in attention.
    """

    def __init__(self, c_in, c_out, c_emb, dropout, attention=False, resample=None):
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm0 = group_norm(c_in)
        self.conv0 = init_(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb = init_(nn.Linear(c_emb, c_out))
        self.norm1 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = init_(nn.Conv2d(c_out, c_out, 3, padding=1), NEARLY_ZERO)
        self.skip = nn.Identity()
        if c_in != c_out or resample:
            self.skip = init_(nn.Conv2d(c_in, c_out, 1))
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        h = F.silu(self.norm0(x))
        h = self.conv0(self.resample(h))
        h = h + self.emb(emb)[:, :, None, None]
        h = F.silu(self.norm1(h))
        h = self.conv1(self.dropout(h))
        x = self.skip(self.resample(x))
        return self.attention((x + h) * math.sqrt(0.5))  # a sum of two has twice the variance


class UNet(nn.Module):
    """The velocity network v(x_t, t).

    Level i has base * mult[i] channels and `blocks` residual blocks; in the decoder it has one
    more. At the image sizes in `attn`, attention follows every encoder block but the halving one,
    and the last decoder block before the doubling one. It always follows the first block of the
    middle.
    precision "bf16": bfloat16 in all layers but the last; the weights stay float32.
    """

    def __init__(
        self,
        image_size,
        channels=3,
        base=64,
        mult=(1, 2, 2),
        blocks=2,
        attn=(16,),
        classes=0,
        dropout=0.0,
        precision="fp32",
    ):
        super().__init__()
        self.args = dict(image_size=image_size, channels=channels, base=base, mult=tuple(mult),
                         blocks=blocks, attn=tuple(attn), classes=classes, dropout=dropout)
        self.precision = precision
        self.class_names = [str(i) for i in range(classes)]  # until somebody knows better ones
        sizes = [image_size // 2**level for level in range(len(mult))]
        require(base >= 4 and blocks and min(mult) >= 1 and dropout < 1,
                "a network needs base >= 4, blocks >= 1, mult >= 1, dropout < 1")
        halvings = len(mult) - 1
        require(sizes[-1] and image_size % 2**halvings == 0,
                f"image_size {image_size} cannot be halved {halvings} times, as {mult=} wants")
        if not set(attn) <= set(sizes):
            say(f"note | attn {attn} names a size that no level has; they have {sizes}")

        # 1. What embeds the time and the label.
        c_emb = 4 * base
        self.time0 = init_(nn.Linear(base, c_emb))
        self.time1 = init_(nn.Linear(c_emb, c_emb))
        self.label = init_(nn.Linear(classes, base)) if classes else None
        n = base // 2
        decay = math.log(10_000) / (n - 1)
        frequencies = torch.exp(torch.arange(n) * -decay)
        self.register_buffer("frequencies", frequencies, persistent=False)  # from 1 to 1/10000

        # 2. The encoder. skips: the channels of what it leaves for the decoder.
        self.conv_in = init_(nn.Conv2d(channels, base, 3, padding=1))
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        c, skips = base, [base]
        for m, size in zip(mult, sizes):
            for _ in range(blocks):
                self.encoder.append(ResBlock(c, base * m, c_emb, dropout, size in attn))
                c = base * m
                skips.append(c)
            if size > sizes[-1]:
                self.encoder.append(ResBlock(c, c, c_emb, dropout, resample=nn.AvgPool2d(2)))
                skips.append(c)

        # 3. The middle, and the decoder.
        self.middle = nn.ModuleList([
            ResBlock(c, c, c_emb, dropout, attention=True),
            ResBlock(c, c, c_emb, dropout),
        ])
        for m, size in zip(reversed(mult), reversed(sizes)):
            for i in range(blocks + 1):
                attention = size in attn and i == blocks
                c_in = c + skips.pop()
                c = base * m
                self.decoder.append(ResBlock(c_in, c, c_emb, dropout, attention))
            if size < image_size:
                twice = nn.Upsample(scale_factor=2)
                self.decoder.append(ResBlock(c, c, c_emb, dropout, resample=twice))
        self.norm_out = group_norm(c)
        self.conv_out = init_(nn.Conv2d(c, channels, 3, padding=1), NEARLY_ZERO)
        if precision == "fp32":
            self.to(memory_format=torch.channels_last)  # in memory: 10 % faster on CPUs

    @property
    def device(self):
        return self.conv_in.weight.device

    @property
    def shape(self):
        """(C, H, W) of an image."""
        size = self.args["image_size"]
        return self.args["channels"], size, size

    def forward(self, x, t, labels=None):
        """x (B, C, H, W), t (B,) in [0, 1], labels int64 (B,) or None -> velocity (B, C, H, W)."""
        assert (labels is None) == (self.label is None), "labels are for networks with classes"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            # Official code: 999 t, since this embedding was made for step numbers from 0 to 999.
            angles = 999 * t[:, None] * self.frequencies  # (B, base / 2)
            emb = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, base)
            if labels is not None:
                classes = self.label.in_features
                one_hot = F.one_hot(labels, classes).to(emb.dtype)
                # As in EDM: times sqrt(classes), so that a one-hot vector has mean square 1.
                emb = emb + self.label(one_hot * math.sqrt(classes))
            emb = F.silu(self.time0(emb))
            emb = F.silu(self.time1(emb))  # (B, 4 base)
            h = self.conv_in(x)
            skips = [h]
            for block in self.encoder:
                h = block(h, emb)
                skips.append(h)
            for block in self.middle:
                h = block(h, emb)
            for block in self.decoder:
                if not isinstance(block.resample, nn.Upsample):
                    h = torch.cat([h, skips.pop()], dim=1)
                h = block(h, emb)
        # The last layer is always float32: its rounding would be seen in the image.
        h = h.to(self.conv_out.weight.dtype)
        return self.conv_out(F.silu(self.norm_out(h)))


# ---------------------------------------------------------------------------------------- sampling

@torch.no_grad()
def euler(net, z, steps, labels=None):
    """Follows dx/dt = v(x, t) from noise z (B, C, H, W) to images (B, C, H, W), in `steps` calls.

    One step is x = z + v(z, EPS).
    """
    require(steps, "an image needs at least 1 step")
    x = z
    for i in range(steps):
        # x <- x + v(x, t_i) / N,  t_i = EPS + (1 - EPS) i / N
        t = EPS + (1 - EPS) * i / steps
        t = torch.full(x.shape[:1], t, device=x.device)  # (B,)
        x = x + net(x, t, labels) / steps
    return x


def noise_for(seed, indices, shape):
    """Noise z ~ N(0, I) for each index, float32 (len(indices), *shape).

    A function of (seed, index) alone: neither the batch nor the machine changes it.
    """
    noise = torch.empty(len(indices), *shape)
    for row, index in zip(noise.numpy(), indices):  # rows are views: what fills them fills noise
        key = np.array([seed, index], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        rng.standard_normal(out=row, dtype=np.float32)
    return noise


def labels_for(seed, n, classes):
    """n labels, int64 (n,), uniform over the classes; None if there are none.

    The first of them are the same for every n.
    """
    if not classes:
        return None
    labels = np.random.default_rng(seed).integers(classes, size=n)
    return torch.from_numpy(labels)


def samples(net, seed, numbers, steps, labels=None):
    """Images (N, 3, H, W) from noises that no stage trains on: EVALUATION + i for i in numbers.

    numbers: a range. Image number i has the label labels[i]. With labels=None, a network with
    classes gets random ones, which depend on the seed alone.
    """
    z = noise_for(seed, [EVALUATION + i for i in numbers], net.shape)
    if labels is None:
        labels = labels_for(seed, numbers[-1] + 1, net.args["classes"])
    if labels is not None:
        labels = labels[list(numbers)].to(net.device)
    return euler(net, z.to(net.device), steps, labels).cpu()


def sampling_batch(net):
    """Ours: images per network call where nothing is trained. A GPU needs more to be busy."""
    return 512 if net.device.type == "cuda" else 128


COMPILE_CALLS = 2000  # ours: this many calls win back the minute that compiling takes


def compiled(cfg, net, calls, batch, training=False):
    """net, compiled for batches of `batch` images if that saves time over this many calls; or net.

    A GPU computes faster than Python can start its kernels. So the compiler joins the kernels
    between the convolutions; all are recorded once, as a CUDA graph, and started together
    (docs/speed.md). Batches of another size need net itself, which has the same weights.
    training: with a gradient.
    """
    if cfg.compile == "off":
        return net
    if cfg.compile == "auto" and (net.device.type != "cuda" or calls < COMPILE_CALLS):
        return net
    say(f"compiling for {calls:,} calls: a minute or two. --compile off goes without")
    began = time.monotonic()
    torch._dynamo.config.optimize_ddp = False  # one graph with several processes, too
    fast = torch.compile(net, dynamic=False, mode="reduce-overhead")
    x = torch.randn(batch, *net.shape, device=net.device)
    t = torch.rand(batch, device=net.device)
    labels = labels_for(0, batch, net.args["classes"])
    if labels is not None:
        labels = labels.to(net.device)
    try:
        for _ in range(3):  # the first call compiles, the second records, the third replays
            with torch.set_grad_enabled(training):
                velocity = fast(x, t, labels)
            if training:
                velocity.square().mean().backward()
                net.zero_grad()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        say(f"not compiled, so slower: {error!r:.200}")
        return net
    say(f"compiled in {time.monotonic() - began:.0f} s")
    return fast


# ---------------------------------------------------------------------------------------- training
LOG_SECONDS, SAVE_SECONDS = 10, 300  # ours: between two log lines, and between two saved states


def orthogonalise(m):
    """The matrices m (N, rows, columns), with all their singular values brought near 1.

    This is the heart of Muon (Jordan et al. 2024), an optimiser that trains small networks faster
    than Adam does. An update with equal singular values changes all directions of a weight matrix
    equally fast. You can skip this: the method does not depend on it.
    """
    length = m.norm(dim=(1, 2), keepdim=True)
    x = m / (length + 1e-12)
    for _ in range(5):  # Newton-Schulz: singular values end between 0.7 and 1.2
        # x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a a
        x = torch.baddbmm(x, b, x, beta=3.4445)  # 3.4445 x + b x
    return x


class Trainer:
    """What surrounds a training step: optimiser, learning rate, EMA, log, resume, processes.

        trainer = Trainer(cfg, "01 teacher", net, made_from, cfg.batch)
        for step in trainer.steps():             # also logs, and saves the state now and then
            x, y = trainer.draw(images, labels)  # random rows, on the device
            loss = ...                           # calls trainer.net
            trainer.update(loss)                 # backward, clipping, optimiser, EMA

    trainer.ema is the network with averaged weights (the exponential moving average; stage 01 says
    why). Only this one makes images, and only this one is passed on to the next stages.
    """

    def __init__(self, cfg, name, net, made_from, batch):
        """batch: images in a call of trainer.net."""
        require(cfg.steps and cfg.batch and cfg.batch % WORLD == 0, f"--steps {cfg.steps} and "
                f"--batch {cfg.batch} must be at least 1, and the batch a multiple of the {WORLD} "
                "processes")
        self.cfg, self.name = cfg, name
        self.path = cfg.folder / f"{name[:2]}_state.pt"  # name begins with the stage's number
        self.device = next(net.parameters()).device
        self.trained = net.train()  # with dropout; self.net is the same, perhaps compiled
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)  # without
        self.weights = list(net.parameters())
        self.averages = list(self.ema.parameters())
        self.done = 0  # steps
        self.strips = {}  # title: samples along the way
        self.recent, self.note = [], ""  # for the log line: losses and gradient norms, and a text
        self.asked_to_stop = False

        # Adam trains all weights; with "muon", all but the 3x3 convolutions inside of the network.
        self.hidden, rest = {}, []
        for p in self.weights:
            inside = p.shape[2:] == (3, 3) and min(p.shape[:2]) > 3  # more channels than an image
            if cfg.optimizer == "muon" and inside:
                self.hidden.setdefault(p.shape, []).append(p)  # those of one shape step together
            else:
                rest.append(p)
        self.adam = torch.optim.Adam(rest, betas=(0.9, 0.999), eps=1e-8, fused=True)  # paper
        self.momenta = []
        for same in self.hidden.values():
            self.momenta.append(torch.zeros_like(torch.stack(same).flatten(2)))

        # What must not change in a run. The images count by their fingerprint, not by their path.
        self.run = {**settings_of(cfg), "data": "", "made from": made_from}
        if cfg.restart and RANK == 0:
            self.path.unlink(missing_ok=True)
        if self.path.exists() and not cfg.restart:
            self.load_state()
        self.net = compiled(cfg, net, cfg.steps - self.done, batch // WORLD, training=True)
        if WORLD > 1:  # averages the gradients of all processes
            self.net = nn.parallel.DistributedDataParallel(self.net, broadcast_buffers=False)

    def load_state(self):
        state = read(self.path)
        require_same_run(self.path, state["run"], self.run)
        self.trained.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["ema"])
        self.adam.load_state_dict(state["adam"])
        self.momenta = [momentum.to(self.device) for momentum in state["momenta"]]
        self.done, self.strips = state["done"], state["strips"]
        say(f"{self.name} | continues after step {self.done} of {self.cfg.steps}, from {self.path}")

    def save_state(self):
        if RANK == 0:
            save(self.path, run=self.run, done=self.done, strips=self.strips,
                 weights=self.trained.state_dict(), ema=self.ema.state_dict(),
                 adam=self.adam.state_dict(), momenta=self.momenta)

    def steps(self):
        """Yields the number of each step. In between it logs, saves, and stops when asked to."""
        cfg, first = self.cfg, self.done
        logged = saved = time.monotonic()
        with self.stop_signals():
            for step in range(first, cfg.steps):
                # A run that continues draws what the unbroken one would have drawn, so that no
                # random state has to be saved.
                seeds = np.random.SeedSequence(cfg.seed, spawn_key=(step, RANK))
                torch.manual_seed(int(seeds.generate_state(1)[0]))
                yield step
                now = time.monotonic()
                end = self.done == cfg.steps or self.asked_to_stop
                save_now = end or now - saved > SAVE_SECONDS
                if step == first:  # it also set up the device: its speed means nothing
                    self.log(None)
                    logged = now
                elif save_now or now - logged > LOG_SECONDS:
                    self.log(now - logged)
                    logged = now
                if save_now:
                    self.save_state()
                    saved = now
                if end and self.done < cfg.steps:
                    raise KeyboardInterrupt(f"stopped after step {self.done}: repeat the command "
                                            "without --restart to go on")

    @contextlib.contextmanager
    def stop_signals(self):
        """Inside, the first Ctrl-C or SIGTERM waits for the end of the step, the second does not.

        (With several processes none waits, and the run continues from the last saved state.)
        """
        def ask(number, frame):
            self.asked_to_stop = True
            signal.signal(number, signal.default_int_handler)  # the next raises KeyboardInterrupt
            say("stopping after this step; once more stops at once")

        before = {}
        with contextlib.suppress(ValueError):  # only the main thread may have signals
            if WORLD == 1:
                for number in (signal.SIGINT, signal.SIGTERM):
                    before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def log(self, seconds):
        """Prints the means since the last line, `seconds` ago (None: without speed).

        Raises UserError if a loss or gradient was not finite.
        """
        recent = torch.stack(self.recent)
        first, last = self.done - len(recent), self.done - 1
        require(recent.isfinite().all(), f"a loss or gradient of steps {first} to {last} was not "
                "finite. Look at the data, or --restart with a lower --lr")
        self.recent = []
        line = (f"{self.name} | step {self.done:>6}/{self.cfg.steps} | "
                f"loss {recent[:, 0].mean():.4f} | {self.note}lr {self.lr:.1e}")
        if seconds:
            speed = len(recent) / seconds
            left = round((self.cfg.steps - self.done) / speed)
            left = datetime.timedelta(seconds=left)
            line += f" | {self.cfg.batch * speed:.0f} img/s | left {left}"
        say(line)

    def draw(self, *tensors):
        """The same random rows of each tensor (None stays None), on the device."""
        i = torch.randint(len(tensors[0]), (self.cfg.batch // WORLD,))
        rows, cuda = [], self.device.type == "cuda"
        for tensor in tensors:
            if tensor is not None:
                tensor = tensor[i]
                if cuda:
                    tensor = tensor.pin_memory()  # so that the copy does not wait for the GPU
                tensor = tensor.to(self.device, non_blocking=cuda)
            rows.append(tensor)
        return rows

    @torch.no_grad()
    def update(self, loss, note=""):
        """One step down the gradient of `loss`, and one of the EMA. `note` is for the log line."""
        cfg, n = self.cfg, self.done
        self.trained.zero_grad()
        loss.backward()  # works under no_grad, because the graph has been recorded before
        norm = nn.utils.clip_grad_norm_(self.weights, 1.0)  # paper: 1

        # The learning rate rises over the first `warmup` steps, and falls to 0 over the last
        # `cooldown` (a share of all steps, which is why a finished run cannot be made longer).
        falling = cfg.cooldown * cfg.steps
        rise = min(1.0, (n + 1) / max(1, cfg.warmup))
        fall = min(1.0, (cfg.steps - n) / max(1.0, falling))
        self.lr = cfg.lr * rise * fall
        self.adam.param_groups[0]["lr"] = self.lr
        self.adam.step()
        for weights, momentum in zip(self.hidden.values(), self.momenta):
            gradient = torch.stack([p.grad for p in weights])
            gradient = gradient.flatten(2)  # (N, C_out, C_in * 9)
            momentum.lerp_(gradient, 0.05)
            x = orthogonalise(gradient.lerp(momentum, 0.95))  # Nesterov's: a look ahead
            # 0.2 sqrt(longer side): so that a weight moves by about 0.2 lr, as Adam's do
            size = 0.2 * math.sqrt(max(x.shape[1:]))
            changes = list(x.view(-1, *weights[0].shape))
            torch._foreach_sub_(weights, changes, alpha=size * self.lr)

        # average <- d average + (1 - d) weights,  d = min(ema, (1 + n) / (10 + n)); see stage 01
        n = self.done = n + 1
        d = min(cfg.ema, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.averages, self.weights, 1 - d)
        self.recent.append(torch.stack([loss, norm]))  # reading it here would wait for the GPU
        self.note = note


# -------------------------------------------------------------------------- images and their labels
def from_uint8(images):
    return images.float() / 127.5 - 1  # 0..255 -> float32 -1..1


def to_uint8(images):
    images = (images.float() * 127.5 + 127.5).round()
    return images.clamp(0, 255).to(torch.uint8)


def load_data(source, image_size):
    """A data set: images uint8 (N, 3, H, W), labels int64 (N,) or None, names of the classes or [].

    source: "shapes" (drawn), "cifar10" (downloaded), or a path: of CIFAR-10's binary version
    (.tar.gz), or of images, a folder or zip (docs/images.md). Images are cropped and resized to
    image_size; with None all must have one size. Prints a line that says what was read. Raises
    UserError, which names the files that are wrong.
    """
    from extras import drawings, image_files  # long, and not about the method

    if source == "shapes":
        images, labels = drawings.draw_shapes(16_384, image_size or 16)
        names, notes = drawings.CLASSES, ""
    else:
        images, labels, names, notes = image_files.read_source(source, image_size)
    say(image_files.describe(source, images, labels, names) + notes)
    return images, labels, names


# ---------------------------------------------------------------------------------------- pictures

def save_grid(path, rows, titles=(), columns=()):
    """Process 0 writes a PNG: a row of images for each float tensor (N, 3, H, W) in [-1, 1].

    titles: a text above each row; columns: a text of two words above each column.
    """
    rows, titles = list(rows), list(titles)
    size = rows[0].shape[-1]
    cell = size * max(1, 64 // size) + 2  # small images are enlarged
    bar = 18 if titles else 0
    top = 32 if columns else 0
    height = top + len(rows) * (cell + bar) + 2
    width = len(rows[0]) * cell + 2
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, column in enumerate(columns):
        text = column.replace(" ", "\n", 1)  # in two lines
        draw.text((i * cell + 4, 2), text, "black", font_size=12)
    for r, row in enumerate(rows):
        y = top + r * (cell + bar)
        if titles:
            draw.text((4, y + 2), titles[r], "black", font_size=12)
        for i, image in enumerate(to_uint8(row.cpu())):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            tile = tile.resize((cell - 2, cell - 2), Image.NEAREST)
            canvas.paste(tile, (i * cell + 2, y + bar + 2))
    if RANK == 0:
        with writing(path) as file:
            canvas.save(file, "PNG")


# ----------------------------------------------------------------------- settings and the processes

class UserError(ValueError):
    """Something that the user can put right. run() prints it as one line, without a traceback."""


def stage(number):
    """The script of a stage, "01" ... "05", as a module: `import` takes no name like 01_..."""
    file, = Path(__file__).parent.glob(f"{number}_*.py")
    return importlib.import_module(file.stem)


def require(condition, message):
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


# A row of settings has a value for each preset that differs from the others, a text for --help, and
# sometimes the values that are allowed. These are the settings of every script:
SETTINGS = {
    "preset": dict(others=PRESET, choices=PRESETS, help="whose values the settings have"),
    "out": dict(others="out", help="results go into <out>/<preset>/"),
    "seed": dict(others=0, help="of all random numbers"),
    "device": dict(others="auto", help="auto (cuda if there is any), cpu, cuda:1, mps"),
    "restart": dict(others=False, help="start over instead of continuing"),
    "compile": dict(others="auto", choices=("auto", "on", "off"),
                    help="networks; auto: on a CUDA GPU where it saves time"),
    "allow_mixed": dict(others=False, help="accept files whose sources were replaced"),
}


def integers(text):
    """ "1,2" -> (1, 2)"""
    return tuple(int(part) for part in text.split(","))


def read_settings(table, doc, argv=None):
    """The settings as attributes: the preset's values in the table, then the command line's."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, add_help=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = PRESET
    for name, row in {**SETTINGS, **table}.items():
        value = row.get(preset, row["others"])
        text = f"{row['help']} [{value}]"
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", default=value, help=text,
                                action=argparse.BooleanOptionalAction)
        else:
            kind = integers if isinstance(value, tuple) else type(value)
            parser.add_argument(f"--{name}", default=value, help=text, type=kind,
                                choices=row.get("choices"))
        if name == "preset":  # it decides about the values of the others
            preset = parser.parse_known_args(argv)[0].preset
    parser.add_argument("--help", "-h", action="help", help="show this, with the preset's values")
    cfg = parser.parse_args(argv)
    for name, value in vars(cfg).items():
        if isinstance(value, int | float):
            require(0 <= value < math.inf, f"--{name} {value} must be finite, and not negative")
    cfg.folder = Path(cfg.out, cfg.preset)
    return cfg


def settings_of(cfg):
    """The settings that a result depends on, as a dict."""
    others = {*SETTINGS, "folder"} - {"preset", "seed"}
    return {name: value for name, value in vars(cfg).items() if name not in others}


def require_same_run(path, then, now):
    """Raises UserError unless the run that left `path` had the same settings. then, now: dicts."""
    differ = [key for key in now if then.get(key) != now[key]]
    text = "; ".join(f"{key} was {then.get(key)}, is {now[key]}" for key in differ)
    require(not differ, f"{path} is of another run: {text}. --restart, or another --out?")


def run(main, table, doc, argv=None):
    """Calls main(settings). What the user can put right ends in one line and exit code 1."""
    try:
        with contextlib.suppress(ValueError):  # raised in all threads but the main one
            if WORLD == 1:
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        cfg = read_settings(table, doc, argv)
        with locked(cfg.folder):
            main(cfg)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(str(stop) or "stopped: what was saved is kept, and the same command continues")
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: a smaller --batch or more processes need less")


@contextlib.contextmanager
def locked(folder):
    """Inside, no other run may work in the folder. The lock ends with the process in any case."""
    folder.mkdir(parents=True, exist_ok=True)
    if RANK > 0 or not fcntl:
        yield
        return
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"another run works in {folder}, since {file.read()}: wait until it "
                            "ends, or give this one another --out") from None
        except OSError:  # some network file systems have no locks
            pass
        file.truncate(0)
        file.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M} (process {os.getpid()})")
        file.flush()
        yield


def start(cfg, name):
    """Joins the other processes if there are any, prints the settings, returns the torch.device."""
    require(RANK < WORLD and (WORLD == 1 or "MASTER_PORT" in os.environ), "RANK and WORLD_SIZE are "
            "left over in the environment: start several processes with torchrun, or unset both")
    require(WORLD == 1 or ":" not in cfg.device, f"--device {cfg.device} would put all {WORLD} "
            "processes on one device: leave it out, and each takes its own")
    cuda = torch.cuda.is_available()
    if WORLD > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        # A process that has waited for another one for an hour gives up.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    device = cfg.device.replace("auto", "cuda" if cuda else "cpu")
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    try:
        if device.startswith("cuda"):
            own = os.environ.get("LOCAL_RANK", 0)
            torch.cuda.set_device(int(device[5:] or own))
            # fp32 on a GPU is torch's own: convolutions round their inputs to TF32, which has 10
            # bits of mantissa, as in the authors' code.
            torch.backends.cudnn.benchmark = True  # look for the fastest convolution
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {cfg.device} cannot be used ({reason}). --device cpu always "
                        "can") from error
    if getattr(cfg, "precision", "") == "auto":
        cfg.precision = "bf16" if has_bf16 else "fp32"
    torch.manual_seed(cfg.seed)  # the networks' first weights
    say(f"{name} | {device} x {WORLD}, {torch.get_num_threads()} threads | "
        f"torch {torch.__version__}")
    settings = [f"{key}={value}" for key, value in settings_of(cfg).items()]
    say(f"settings | {' '.join(settings)}")
    return device


def say(text):
    """Prints, in process 0."""
    if RANK == 0:
        print(text, flush=True)


def wait_for_all():
    """Until every process has come here."""
    if WORLD > 1:
        dist.barrier()


# ------------------------------------------------------------------------------------------- files
# An artifact (.pt) is a dict. Its "id" is a fingerprint of its content. Its "made_from" names all
# that it was made from, {file name: id}, so that nothing is mixed unnoticed.

def fingerprint(*tensors):
    """16 hexadecimal digits that change with any bit of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as file:` gives a binary file that gets its name once it is complete."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before it replaces what was there
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
        reason = error.__context__ or error
        raise UserError(f"could not write {path}, kept the old one: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path, **content):
    """Writes a dict as a .pt file, whole or not at all."""
    with writing(path) as file:
        torch.save(content, file)


def read(path, checksums=True):
    """The dict in a .pt file, its tensors memory-mapped. No code in it is run.

    Raises UserError if it is damaged.
    """
    try:
        if checksums:  # torch's files are zips: this reads every byte
            with zipfile.ZipFile(path) as archive:
                require(archive.testzip() is None, "a checksum is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # a damaged zip can fail in a dozen ways
        reason = str(error)[:50]
        raise UserError(f"{path} is damaged or not one of ours ({reason!r}): redo it") from error


def load(cfg, name):
    """The artifact <out>/<preset>/<name>, and its "lineage": its made_from and itself.

    What is made from this artifact keeps the lineage as its own made_from. Raises UserError if the
    artifact is missing, damaged, or was made from other files than those beside it.
    """
    path = cfg.folder / name
    run_it = f"Run stage {name[:2]} for --preset {cfg.preset} --out {cfg.out}"
    require(path.exists(), f"{path} is missing. {run_it} first")
    artifact = read(path)
    require(artifact.get("preset") == cfg.preset, f"{path} is of another --preset. {run_it} again")
    for parent, identity in artifact["made_from"].items():
        if (cfg.folder / parent).exists() and not cfg.allow_mixed:
            found = read(cfg.folder / parent, checksums=False)["id"]
            require(found == identity, f"{path} is out of date: it was made from another {parent} "
                    f"than the one beside it. {run_it} again, with --restart")
    return {**artifact, "lineage": {**artifact["made_from"], name: artifact["id"]}}


def save_artifact(cfg, name, net, made_from, tensors, **content):
    """Process 0 writes <out>/<preset>/<name>: the content, which has the id of these tensors."""
    if RANK == 0:
        save(cfg.folder / name, preset=cfg.preset, settings=settings_of(cfg), made_from=made_from,
             id=fingerprint(*tensors), network=net.args, class_names=net.class_names, **content)


def save_network(cfg, name, net, made_from):
    """Process 0 writes <out>/<preset>/<name>: the weights, and the arguments of the network."""
    weights = {key: value.cpu() for key, value in net.state_dict().items()}
    save_artifact(cfg, name, net, made_from, weights.values(), weights=weights)


def new_network(cfg, image_size, classes):
    """A UNet with random weights, as large as the settings say."""
    return UNet(
        image_size,
        base=cfg.base,
        mult=cfg.mult,
        blocks=cfg.blocks,
        attn=cfg.attn,
        classes=classes,
        dropout=cfg.dropout,
        precision=cfg.precision,
    )


def load_network(cfg, name, device):
    """(UNet in eval mode, its artifact), from what save_network wrote. UserError as in load()."""
    artifact = load(cfg, name)
    net = UNet(**artifact["network"], precision=cfg.precision)
    net.load_state_dict(artifact["weights"])
    net.class_names = artifact.get("class_names") or net.class_names
    return net.to(device).eval(), artifact


def download(url, sha256, instead):
    """The path data/<file name> of a published file, downloaded once.

    Raises UserError, which says what to do `instead`.
    """
    path = Path("data", url.split("/")[-1])
    try:
        if RANK == 0 and not path.exists():
            path.parent.mkdir(exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=sha256)
        wait_for_all()
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        require(found == sha256, f"{path} is damaged, or another file: delete it")
    except (OSError, RuntimeError, UserError) as error:
        raise UserError(f"no {url} ({error}). Put it at {path}, or {instead}") from error
    return path
