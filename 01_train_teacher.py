"""Stage 01: train the teacher, a 1-rectified flow, on real images.

A rectified flow is a velocity field v that carries noise z (t = 0) to images x (t = 1). It is learnt by regression: draw
an image and, independently, a noise; walk along the straight line between them; predict the line's direction.

    x_t = t x + (1 - t) z        L = E || v(x_t, t) - (x - z) ||^2        t ~ U[EPS, 1]

Every image is met with many noises, so many lines pass through one x_t in different directions. The network can only learn
their average, and following that average bends the path: this teacher needs many Euler steps. The later stages make the paths
straight, in a smaller network. (A 2-rectified flow is one that learned from the noise-image pairs of a 1-rectified flow.)

Reads   images: --data shapes (drawn by the program), cifar10 (downloaded), or the path of a folder or zip
Writes  out/<preset>/01_teacher.pt, 01_samples.png, 01_loss.png; 01_state.pt, from which a run continues
Takes   shapes: 60 s on 2 CPU cores (AMD EPYC, torch 2.13, bf16)
Next    python 02_generate_pairs.py
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import (EPS, Settings, UNet, check_ranges, command_for, count_parameters, evaluation_samples, from_uint8,
                    load_images, move, on_device, random_flip, require, run, save_curve, save_grid, save_network, say, start, train)


@dataclass
class Config(Settings):
    # Data
    data: str = "shapes"  # shapes, cifar10, or the path of CIFAR-10 (binary), or of a folder or zip of images
    image_size: int = 16  # pixels; other sizes are cropped to the centre square and resized
    conditional: bool = False  # give the network the class labels
    flip: bool = True  # mirror each image with probability 1/2; official code: yes
    memory_gb: float = 4.0  # GB; a larger folder or zip is memory-mapped from a file. ours
    skip_bad: bool = False  # leave out files that are not readable images, instead of stopping
    # Network
    base: int = 32  # channels of the first level. ours; paper: 128
    mult: tuple[int, ...] = (1, 1, 2)  # channels of each level, in multiples of base. ours; paper: 1,2,2,2
    blocks: int = 1  # residual blocks per level. ours; paper: 4
    attn: tuple[int, ...] = (8,)  # image sizes at which attention is used. ours; paper: 16
    dropout: float = 0.0  # probability. ours; official code: 0.15
    # Training
    steps: int = 375  # optimiser steps. ours
    batch: int = 64  # images per step. ours; paper: 128
    lr: float = 8e-3  # Adam's learning rate. ours; paper: 2e-4
    warmup: int = 100  # steps in which lr rises from 0. ours; paper: 5000
    cooldown: float = 0.6  # fraction of the steps, at the end, over which lr falls to 0. ours; official code: none
    ema: float = 0.999  # decay of the weights' moving average. ours; paper: 0.999999
    clip: float = 1.0  # largest gradient norm. paper: 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of convolutions and products; auto: bf16 where the hardware has it
    compile: bool = False  # torch.compile: a minute or more at the start; no gain on the CPUs that were tried
    accumulate: int = 1  # parts of a batch that are computed one after another: less memory, the same result
    log_every: int = 100  # steps between log lines
    save_every: int = 200  # steps between saved training states, from which a run that was broken off continues
    sample_steps: int = 25  # Euler steps of the sample picture. ours

    def __post_init__(self):
        check_ranges(self, image_size=(4, 1024), memory_gb=(0, None), dropout=(0, 0.99), steps=(1, None), batch=(1, None),
                     lr=(0, 1), warmup=(0, None), cooldown=(0, 1), ema=(0, 1), clip=(1e-6, None), accumulate=(1, None),
                     log_every=(1, None), save_every=(1, None), sample_steps=(1, None))


# The paper's recipe, but for the steps: its teachers were published networks; ours trains as long as the paper's stage 03.
PAPER = dict(image_size=32, base=128, mult=(1, 2, 2, 2), blocks=4, attn=(16,), dropout=0.15, steps=800_000, batch=128, lr=2e-4,
             warmup=5000, cooldown=0.0, ema=0.999999, log_every=1000, save_every=5000, sample_steps=100)

PRESETS = {
    "shapes": {},
    "cifar10_quick": {**PAPER, "data": "cifar10", "mult": (1, 2, 2), "blocks": 2, "dropout": 0.1, "steps": 30_000,
                      "warmup": 1000, "cooldown": 0.3, "ema": 0.9995, "log_every": 200},  # ours
    "cifar10": {**PAPER, "data": "cifar10"},
    "ffhq64": {**PAPER, "data": "ffhq-64x64.zip", "image_size": 64},
    # ours: 114.0M (paper: EDM's 296M ADM network), one class label per image
    "imagenet64": {**PAPER, "data": "imagenet-64x64.zip", "image_size": 64, "base": 192, "blocks": 3, "dropout": 0.1,
                   "conditional": True, "flip": False},
}


def flow_loss(net, noise, data, labels=None, u=None):
    """E || v(x_t, t) - (x - z) ||^2 with t ~ U[EPS, 1]: the mean over pixels and batch, a scalar.

    noise, data (B, C, H, W); labels int64 (B,) or None; u (B,) uniform in [0, 1), from which t is made, drawn if None.
    """
    u = torch.rand(len(data), device=data.device) if u is None else u
    t = EPS + (1 - EPS) * u  # (B,)
    # x_t = t x + (1 - t) z
    s = t[:, None, None, None]
    x_t = s * data + (1 - s) * noise
    # || v(x_t, t) - (x - z) ||^2
    return (net(x_t, t, labels) - (data - noise)).square().mean()


def main(cfg):
    device = start(cfg, "01 teacher")

    # 1. Data: all images as uint8, in memory or memory-mapped.
    images, labels = load_images(cfg.data, cfg.image_size, cfg.memory_gb, cfg.skip_bad, Path(cfg.out) / "cache")
    require(cfg.batch <= len(images), f"--batch {cfg.batch} is larger than the data: {cfg.data} has {len(images)} images")
    require(labels is not None or not cfg.conditional, f"--conditional needs labels, and {cfg.data} has none")
    classes = int(labels.max()) + 1 if cfg.conditional else 0
    say(f"data | {len(images)} images of {cfg.image_size}x{cfg.image_size} from {cfg.data} | {classes} classes used")

    # 2. Network.
    net = UNet(cfg.image_size, 3, cfg.base, cfg.mult, cfg.blocks, cfg.attn, classes, cfg.dropout)
    net = on_device(net, device, cfg.precision)
    say(f"teacher | {count_parameters(net):,} parameters")

    # 3. Training.
    def loss_at(net, step, part):
        i = part.randint(len(images))
        data = from_uint8(move(images[i], device))
        if cfg.flip:
            data, = random_flip(part.rand(device), data)
        noise = part.randn(*data.shape[1:], device=device)
        return flow_loss(net, noise, data, move(labels[i], device) if classes else None, part.rand(device))

    ema, losses = train("01 teacher", cfg, net, loss_at)

    # 4. Save the EMA weights, and look at them.
    save_network(cfg.folder / "01_teacher.pt", cfg, ema)
    save_grid(cfg.folder / "01_samples.png", evaluation_samples(ema, cfg.seed, 64, cfg.sample_steps).split(8))
    save_curve(cfg.folder / "01_loss.png", losses, "01 teacher: loss")
    say(f"wrote {cfg.folder}/01_teacher.pt, 01_samples.png, 01_loss.png | "
          f"next: {command_for('02_generate_pairs.py', cfg)}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
