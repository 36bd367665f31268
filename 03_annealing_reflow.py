"""Stage 03: annealing reflow. A small network learns a straight flow from the teacher's pairs.

"Reflow" is stage 01's regression on pairs instead of random couples. The lines between the ends of a pair
hardly cross, so there is little left to average, and the paths that are learned are nearly straight: a
2-rectified flow (the teacher is the 1-rectified one). On a straight path the velocity is constant, and one
Euler step arrives: where the teacher gave a blur, it gives an image.

Usually such a flow starts from the teacher's weights. Those do not fit into a smaller network, and from
random weights fixed pairs are hard to learn, says the paper (it gives no reason). So begin with an easier
problem and change it little by little into the right one. Each pair's noise is mixed with fresh noise:

    z_beta = sqrt(1 - beta^2) z + beta z'        z' ~ N(0, I), new in every step
    L = E || v(x_t, t) - (x - z_beta) ||^2       x_t = t x + (1 - t) z_beta           (paper, Eq. 9)

At beta = 1 the noise has nothing to do with the image. This is stage 01 with the teacher's images as data:
easy, but its paths are bent. At beta = 0 it is reflow: straight, but hard from random weights. beta falls
from 1 to 0. The squares of the two weights add up to 1, so z_beta has variance 1 for every beta (z and z'
are independent), and the network always meets N(0, I) at t = 0, as it will when it makes images.

The loss begins as in stage 01, near 1.5, and ends at about 0.02 for `shapes`: far lower than the teacher's,
although most t are early, where the teacher's is highest. With pairs far fewer lines meet.

When does annealing pay? Here it gained nothing in 12 passes over 1,024 pairs, and much where few pairs are
passed over hundreds of times, as in the paper. The network learns those by heart in any case;
annealed, it still makes good images of other noises (docs/results.md).

Reads   out/<preset>/02_pairs.pt
Writes  out/<preset>/03_reflow.pt, 03_samples.png; 03_state.pt, from which a run continues
Takes   shapes: half a minute on 2 CPU cores (AMD EPYC, torch 2.13)
"""
import importlib
import math

import torch

from common import (Trainer, UNet, load, load_network, require, run, samples, save_grid, save_network, say,
                    start)

draw_t = importlib.import_module("01_train_teacher").draw_t  # a name that starts with a digit needs this

SETTINGS = [
    # name           shapes     cifar10_quick  cifar10    ffhq64     imagenet64
    ("schedule",     "linear",  "linear",      "linear",  "linear",  "linear",
     "of beta, see beta()", ("linear", "cosine", "exponential", "none")),
    ("anneal_steps", 300,       15_000,        300_000,   300_000,   300_000,    "K, steps of annealing"),
    ("flip",         True,      True,          True,      True,      False,      "mirror half of the pairs"),
    # The small network: 0.1M, 7.0M, 15.7M, 15.7M, 80.6M parameters. (Paper, ImageNet: an ADM U-Net, 80.7M.)
    ("base",         12,        64,            96,        96,        192,        "channels of level 1"),
    ("mult",         (1, 2),    (1, 2, 2),     (1, 2, 2), (1, 2, 2), (1, 2, 2),  "of each level, times base"),
    ("blocks",       1,         2,             2,         2,         3,          "residual blocks per level"),
    ("attn",         (8,),      (16,),         (16,),     (16,),     (16,),      "sizes with attention"),
    ("dropout",      0.0,       0.0,           0.15,      0.15,      0.13,       "probability"),
    ("start_from",   "scratch", "scratch",   "scratch", "scratch", "scratch", "from", ("scratch", "teacher")),
    # Training.
    ("t_distribution", "early", "uniform",     "uniform", "uniform", "uniform",
     "of t, see draw_t() in 01", ("uniform", "logit_normal", "early")),
    ("optimizer",    "muon",    "adam",        "adam",    "adam",    "adam",  "optimiser", ("adam", "muon")),
    ("steps",        1300,      40_000,        800_000,   800_000,   800_000,    "optimiser steps"),
    ("batch",        16,        128,           128,       128,       128,        "pairs per step"),
    ("lr",           8e-3,      2e-4,          2e-4,      2e-4,      2e-4,       "learning rate"),
    ("warmup",       100,       1000,          5000,      5000,      5000,       "steps while lr rises"),
    ("cooldown",     0.6,       0.3,           0.0,       0.0,       0.0,        "share while lr falls"),
    ("ema",          0.999,     0.9995,        0.999999,  0.999999,  0.999999,   "decay of averaged weights"),
    ("precision",    "fp32",    "auto",        "auto",    "auto",    "auto",  "", ("fp32", "bf16", "auto")),
]


def beta(step, cfg):
    """The weight of fresh noise at a step (0, 1, ...): falls from 1 to 0 at K (exponential: 1/e at K)."""
    if cfg.schedule == "none":  # plain reflow, the paper's baseline
        return 0.0
    require(cfg.anneal_steps, "--anneal_steps must be at least 1; --schedule none goes without annealing")
    k = step / cfg.anneal_steps
    if cfg.schedule == "linear":  # paper, Table 4: the best
        return max(0.0, 1 - k)
    if cfg.schedule == "cosine":
        return (1 + math.cos(math.pi * min(1.0, k))) / 2
    return math.exp(-k)  # exponential


def reflow_loss(net, z, x, t, b, labels=None):
    """E || v(x_t, t) - (x - z_beta) ||^2 on pairs, the mean over pixels and batch: a scalar. Paper, Eq. 9.

    z, x (B, C, H, W): the pairs, x is where the teacher takes z; t (B,); b: beta, in [0, 1]; labels (B,) or
    None.
    """
    # z_beta = sqrt(1 - beta^2) z + beta z'
    z_beta = math.sqrt(1 - b**2) * z + b * torch.randn_like(z)
    # x_t = t x + (1 - t) z_beta
    s = t.view(-1, 1, 1, 1)
    x_t = s * x + (1 - s) * z_beta
    # || v(x_t, t) - (x - z_beta) ||^2
    return (net(x_t, t, labels) - (x - z_beta)).square().mean()


def main(cfg):
    device = start(cfg, "03 reflow")

    # 1. The pairs. They are mapped into memory, and read from the disk as they are drawn.
    pairs = load(cfg, "02_pairs.pt")
    size, classes = pairs["network"]["image_size"], pairs["network"]["classes"]
    say(f"pairs | {len(pairs['x']):,} of {size}x{size}")

    # 2. The small network, from random weights. In stage 04 it becomes the student.
    if cfg.start_from == "teacher":  # the usual reflow: its weights, and so its size
        net, _ = load_network(cfg, "01_teacher.pt", device)
    else:
        net = UNet(size, 3, cfg.base, cfg.mult, cfg.blocks, cfg.attn, classes, cfg.dropout, cfg.precision)
        net.to(device)
        net.class_names = pairs.get("class_names", [])
    say(f"small network | {sum(p.numel() for p in net.parameters()):,} parameters")

    # 3. Training, while beta falls.
    trainer = Trainer(cfg, "03 reflow", net, pairs["lineage"])
    for step in trainer.steps():
        z, x, y = trainer.draw(pairs["z"], pairs["x"], pairs["labels"])
        z, x = z.float(), x.float()  # (B, 3, H, W)
        if cfg.flip:
            # Mirror both ends: the mirrored noise leads to the mirrored image, if the teacher treats left and
            # right alike. It does so as far as --flip in stage 01 has taught it; nothing built in ensures it.
            # So a teacher that was trained without flips, such as imagenet64's, allows none here.
            mirrored = torch.rand(len(x), 1, 1, 1, device=device) < 0.5
            z, x = torch.where(mirrored, z.flip(3), z), torch.where(mirrored, x.flip(3), x)
        t, b = draw_t(len(x), cfg.t_distribution, device), beta(step, cfg)
        trainer.update(reflow_loss(trainer.net, z, x, t, b, y), note=f"beta {b:.3f}")

    # 4. Keep the averaged weights, and look: one call above, 25 calls below, from the same noise.
    save_network(cfg, "03_reflow.pt", trainer.ema, pairs["lineage"])
    rows = [row for calls in (1, 25) for row in samples(trainer.ema, cfg.seed, range(32), calls).split(8)]
    save_grid(cfg.folder / "03_samples.png", rows)
    say(f"wrote {cfg.folder}/03_reflow.pt, 03_samples.png | next: 04_flow_guided_distill.py")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
