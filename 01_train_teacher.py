"""Stage 01: train the teacher, a rectified flow, on real images.

A rectified flow is a velocity field v that carries noise z (t = 0) to images x (t = 1). It is learned by
regression: draw an image and, independently, a noise; stand on the straight line between them; predict the
line's direction.

    x_t = t x + (1 - t) z        L = E || v(x_t, t) - (x - z) ||^2        t ~ U[EPS, 1], or see draw_t()

Many such lines, from other noises to other images, pass through the same x_t. The network cannot tell which
of them was drawn, so the best it can learn is the average of their directions. Why are the images right all
the same? Think of a crowd in which everybody walks along a line of his own. Now let all who meet at a place
go on with the average of their velocities. Nobody follows his own line any more, but as many as before enter
and leave each place. So the crowd is spread as before at every t, and at t = 1 it is spread like the images.

What the average bends is the path. At t = 0 all lines are possible still, and their average points at the
average image: one Euler step gives a blur. On the way fewer and fewer lines remain, and the path turns
towards one image. So this teacher needs many steps. The later stages make the paths straight, in a smaller
network.

The weights jitter from batch to batch. Their moving average (EMA) does not, and makes better images: only it
is kept. It forgets the first weights: in step n d = min(ema, (1 + n) / (10 + n)) of the average stays. The
paper's 0.999999 would be reached after 9 million steps.

At first the network answers 0, so the loss begins at E |x - z|^2, which is 1.5 for `shapes`. It does not go
to 0, however good the network is: the lines through x_t do differ from their average. About 0.06 remains.

Reads   images: --data shapes (drawn by the program), cifar10 (downloaded), or the path of a folder or zip;
        for your own take the preset of the nearest size, such as cifar10_quick for 32x32
Writes  out/<preset>/01_teacher.pt; 01_samples.png, a row for each eighth of the training; 01_state.pt, from
        which a run continues
Takes   shapes: half a minute on 2 CPU cores (AMD EPYC, torch 2.13)
"""
import torch

from common import (EPS, Trainer, UNet, fingerprint, from_uint8, load_data, require, run, samples, save_grid,
                    save_network, say, start)

SETTINGS = [
    # name          shapes     cifar10_quick  cifar10       ffhq64        imagenet64
    ("data",        "shapes",  "cifar10",     "cifar10",    "ffhq-64x64.zip",
     "imagenet-64x64.zip", "shapes, cifar10, or the path of images"),
    ("image_size",  16,        32,            32,           64,           64,           "pixels"),
    ("conditional", True,      False,         False,        False,        True,         "with class labels"),
    ("flip",        True,      True,          True,         True,         False,        "mirror half"),
    # The network. (The paper's teachers are published; ImageNet's has 296M parameters, the one here 114M.)
    ("base",        20,        128,           128,          128,          192,          "channels, level 1"),
    ("mult",        (1, 2),    (1, 2, 2),     (1, 2, 2, 2), (1, 2, 2, 2), (1, 2, 2, 2), "levels, x base"),
    ("blocks",      1,         2,             4,            4,            3,            "blocks per level"),
    ("attn",        (8,),      (16,),         (16,),        (16,),        (16,),        "attention sizes"),
    ("dropout",     0.0,       0.1,           0.15,         0.15,         0.1,          "probability"),
    # Training. (The paper trains no teacher. These are the steps that it gives stage 03.) With Muon the judge
    # of 05 names 99.6 % of the teacher's `shapes` as asked, with Adam 97.9 % (one seed).
    ("t_distribution", "logit_normal", "uniform", "uniform", "uniform", "uniform",
     "of t, see draw_t()", ("uniform", "logit_normal", "early")),
    ("optimizer",   "muon",    "adam",        "adam",      "adam",    "adam", "optimiser", ("adam", "muon")),
    ("steps",       900,       30_000,        800_000,      800_000,      800_000,      "optimiser steps"),
    ("batch",       16,        128,           128,          128,          128,          "images per step"),
    ("lr",          4e-3,      2e-4,          2e-4,         2e-4,         2e-4,         "learning rate"),
    ("warmup",      100,       1000,          5000,         5000,         5000,         "while lr rises"),
    ("cooldown",    0.6,       0.3,           0.0,          0.0,          0.0,          "share: lr falls"),
    ("ema",         0.999,     0.9995,        0.999999,     0.999999,     0.999999,     "of the weights"),
    ("precision",   "fp32",    "auto",        "auto",       "auto",    "auto", "", ("fp32", "bf16", "auto")),
]


def draw_t(n, distribution, device):
    """n times t in [EPS, 1]: (n,)."""
    t = torch.rand(n, device=device)  # "uniform" (paper)
    if distribution == "early":  # more often near the noise: sampling in one call uses v(z, EPS) alone
        t = t**2
    elif distribution == "logit_normal":  # more often in the middle. Esser et al., 2403.03206
        t = torch.randn(n, device=device).sigmoid()
    return EPS + (1 - EPS) * t


def flow_loss(net, z, x, t, labels=None):
    """E || v(x_t, t) - (x - z) ||^2, the mean over pixels and batch: a scalar. Liu et al., 2209.03003, Eq. 1.

    z, x (B, C, H, W): noise and images, independent of each other; t (B,); labels int64 (B,) or None.
    """
    # x_t = t x + (1 - t) z
    s = t.view(-1, 1, 1, 1)
    x_t = s * x + (1 - s) * z
    # || v(x_t, t) - (x - z) ||^2
    return (net(x_t, t, labels) - (x - z)).square().mean()


def main(cfg):
    device = start(cfg, "01 teacher")

    # 1. All images, uint8 (N, 3, H, W), their labels, and the names of the classes.
    images, labels, names = load_data(cfg.data, cfg.image_size)
    made_from, classes = {"data": fingerprint(images)}, 0
    if cfg.conditional:
        require(labels is not None, f"--conditional needs labels, and {cfg.data} has none")
        numbers = set(labels.tolist())
        made_from["labels"], classes = fingerprint(labels), len(numbers)
        absent = [number for number in range(classes) if number not in numbers]
        require(not absent, f"{cfg.data} has labels up to {max(numbers)}, no images of class {absent[:10]}. A "
                "class without images cannot be learned: number the classes from 0, without gaps")
        require(not names or classes <= len(names), f"{cfg.data} has {classes} classes, {len(names)} names")

    # 2. The network.
    net = UNet(cfg.image_size, 3, cfg.base, cfg.mult, cfg.blocks, cfg.attn, classes, cfg.dropout,
               cfg.precision).to(device)
    net.class_names = names[:classes]
    say(f"teacher | {sum(p.numel() for p in net.parameters()):,} parameters, {classes or 'no'} classes")

    # 3. Training.
    trainer = Trainer(cfg, "01 teacher", net, made_from)
    for step in trainer.steps():
        x, y = trainer.draw(images, labels if classes else None)
        x = from_uint8(x)  # (B, 3, H, W)
        if cfg.flip:  # a mirrored photo is as good a photo: twice the images
            mirrored = torch.rand(len(x), 1, 1, 1, device=device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        z = torch.randn_like(x)
        t = draw_t(len(x), cfg.t_distribution, device)
        trainer.update(flow_loss(trainer.net, z, x, t, y))
        if trainer.done % max(1, cfg.steps // 8) == 0:  # watch it learn: what the same noises become
            trainer.strips[f"after {trainer.done} steps"] = samples(trainer.ema, cfg.seed, range(12), 12)
            save_grid(cfg.folder / "01_samples.png", list(trainer.strips.values()), list(trainer.strips))

    # 4. Keep the averaged weights.
    save_network(cfg, "01_teacher.pt", trainer.ema, made_from)
    say(f"wrote {cfg.folder}/01_teacher.pt, 01_samples.png | next: 02_generate_pairs.py")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
