"""Stage 03: annealing reflow. A small network, from scratch, learns a straight flow from the teacher's pairs.

The paths of a flow never cross. So the straight lines between the ends of its paths, the teacher's pairs, cross far less than
those between random noises and images did; there is less to average, and what is learned from them is nearly straight: "reflow",
a 2-rectified flow. Usually it starts from the teacher's weights; a smaller network cannot. From random weights fixed pairs are
hard, so it begins with an easier problem that is changed little by little into the right one. The noise of each pair is

    z_beta = sqrt(1 - beta^2) z + beta z'        z' fresh noise at every step; z_beta is N(0, I) for any beta
    L = E || v(x_t, t) - (x - z_beta) ||^2       x_t = t x + (1 - t) z_beta                              (paper, Eq. 9)

beta = 1 is stage 01's problem with the teacher's images as data; beta = 0 is reflow. beta falls from 1 to 0.

Reads   out/<preset>/02_pairs.pt
Writes  out/<preset>/03_reflow.pt, 03_samples.png, 03_loss.png; 03_state.pt, from which a run continues
Takes   shapes: 102 s on 2 CPU cores (AMD EPYC, torch 2.13, bf16)
Next    python 04_flow_guided_distill.py
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch

from common import (EPS, Settings, UNet, check_ranges, command_for, count_parameters, evaluation_samples, load, on_device, pair_batch,
                    random_flip, require, run, save_curve, save_grid, save_network, say, start, train)


@dataclass
class Config(Settings):
    # Annealing
    schedule: Literal["linear", "cosine", "exponential", "fixed"] = "linear"  # how beta falls. paper: linear is best
    anneal_steps: int = 400  # K, steps until beta is 0 (exponential: until it is 1/e). ours; paper: 300,000
    beta_fixed: float = 0.0  # beta of the fixed schedule; 0 is plain reflow, the paper's baseline
    flip: bool = True  # mirror noise and image of a pair together, with probability 1/2. paper: yes
    # Network: the small student
    base: int = 16  # channels of the first level. ours; paper: 96 (15.7M)
    mult: tuple[int, ...] = (1, 2, 2)  # channels of each level, in multiples of base. paper: 1,2,2
    blocks: int = 1  # residual blocks per level. ours; paper: 2
    attn: tuple[int, ...] = (8,)  # image sizes at which attention is used. ours; paper: 16
    dropout: float = 0.0  # probability. ours; paper: 0.15
    # Training
    steps: int = 1100  # optimiser steps. ours; paper: 800,000
    batch: int = 64  # pairs per step. ours; paper: 128
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
    sample_steps: int = 25  # Euler steps of the lower half of the sample picture; the upper half is one call. ours

    def __post_init__(self):
        check_ranges(self, anneal_steps=(1, None), beta_fixed=(0, 1), dropout=(0, 0.99), steps=(1, None), batch=(1, None),
                     lr=(0, 1), warmup=(0, None), cooldown=(0, 1), ema=(0, 1), clip=(1e-6, None), accumulate=(1, None),
                     log_every=(1, None), save_every=(1, None), sample_steps=(1, None))


PAPER = dict(anneal_steps=300_000, base=96, mult=(1, 2, 2), blocks=2, attn=(16,), dropout=0.15, steps=800_000, batch=128,
             lr=2e-4, warmup=5000, cooldown=0.0, ema=0.999999, log_every=1000, save_every=5000)

PRESETS = {
    "shapes": {},
    "cifar10_quick": {**PAPER, "base": 64, "dropout": 0.0, "steps": 40_000, "anneal_steps": 15_000, "warmup": 1000,
                      "cooldown": 0.3, "ema": 0.9995, "log_every": 200},  # ours: the paper's 7.0M network
    "cifar10": PAPER,
    "ffhq64": PAPER,
    # ours: 80.6M in this U-Net (paper: 80.7M, an ADM network)
    "imagenet64": {**PAPER, "base": 192, "blocks": 3, "dropout": 0.13, "flip": False},
}


def beta(step, cfg):
    """The share of fresh noise at a step (0, 1, ...): 1 at the start, then towards 0; in [0, 1]. Paper, Table 4."""
    k = step / cfg.anneal_steps
    return {"linear": max(0.0, 1 - k),
            "cosine": (1 + math.cos(math.pi * min(1.0, k))) / 2,
            "exponential": math.exp(-k),
            "fixed": cfg.beta_fixed}[cfg.schedule]


def reflow_loss(net, noise, data, beta, labels=None, fresh=None, u=None):
    """E || v(x_t, t) - (x - z_beta) ||^2 on pairs, with t ~ U[EPS, 1]: the mean over pixels and batch, a scalar. Eq. 9.

    noise, data (B, C, H, W), where data = ODE[teacher](noise); beta in [0, 1]; labels int64 (B,) or None; fresh = z' ~ N(0, I)
    and u (B,) uniform in [0, 1), from which t is made: drawn if None.
    """
    fresh = torch.randn_like(noise) if fresh is None else fresh
    u = torch.rand(len(data), device=data.device) if u is None else u
    # z_beta = sqrt(1 - beta^2) z + beta z'
    z_beta = math.sqrt(1 - beta**2) * noise + beta * fresh
    t = EPS + (1 - EPS) * u  # (B,)
    # x_t = t x + (1 - t) z_beta
    s = t[:, None, None, None]
    x_t = s * data + (1 - s) * z_beta
    # || v(x_t, t) - (x - z_beta) ||^2
    return (net(x_t, t, labels) - (data - z_beta)).square().mean()


def main(cfg):
    device = start(cfg, "03 reflow")

    # 1. Pairs.
    path = cfg.folder / "02_pairs.pt"
    pairs = load(path, cfg)
    n, classes, image_size = len(pairs["images"]), pairs["network"]["classes"], pairs["network"]["image_size"]
    require(cfg.batch <= n, f"--batch {cfg.batch} is larger than the data: {path} has {n} pairs")
    say(f"pairs | {n} of {image_size}x{image_size} from {path}")

    # 2. The small network, from scratch: what stage 04 makes a student of.
    net = UNet(image_size, 3, cfg.base, cfg.mult, cfg.blocks, cfg.attn, classes, cfg.dropout)
    net = on_device(net, device, cfg.precision)
    say(f"small network | {count_parameters(net):,} parameters")

    # 3. Training, while beta falls.
    def loss_at(net, step, part):
        noise, data, labels = pair_batch(pairs, part, device)
        if cfg.flip:  # a mirrored noise leads to the mirrored image: twice the pairs for nothing
            noise, data = random_flip(part.rand(device), noise, data)
        fresh = part.randn(*noise.shape[1:], device=device)
        return reflow_loss(net, noise, data, beta(step, cfg), labels, fresh, part.rand(device))

    ema, losses = train("03 reflow", cfg, net, loss_at, [pairs], note=lambda step: f"beta {beta(step, cfg):.3f}")

    # 4. Save the EMA weights, and look at them: one call above, many calls below, from the same noise.
    save_network(cfg.folder / "03_reflow.pt", cfg, ema)
    one, many = (evaluation_samples(ema, cfg.seed, 32, steps) for steps in (1, cfg.sample_steps))
    save_grid(cfg.folder / "03_samples.png", [*one.split(8), *many.split(8)])
    save_curve(cfg.folder / "03_loss.png", losses, "03 reflow: loss")
    say(f"wrote {cfg.folder}/03_reflow.pt, 03_samples.png, 03_loss.png | "
          f"next: {command_for('04_flow_guided_distill.py', cfg)}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
