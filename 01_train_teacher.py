"""Stage 01: train the teacher, a rectified flow, on real images.

A rectified flow is a velocity field v. It says in which direction and how fast a point x_t should
move at time t, so that noise z (t = 0) becomes an image x (t = 1). It is learned by regression.
Draw an image and, independently of it, a noise. Stand on the straight line between them. Predict
the direction of the line.

    x_t = t x + (1 - t) z      L = E | v(x_t, t) - (x - z) |^2      t ~ U[EPS, 1], or see draw_t()

For every image x there is a noise, z = (x_t - t x) / (1 - t), whose line to x passes through x_t.
Some of these noises are likely, others are not. The network sees x_t only, so it cannot tell which
line was drawn. A squared error is smallest at the mean. So the network learns the average direction
of all these lines, weighted by how likely they are. (With labels, it sees the label as well. Then
"every image" means all images of that class, here and in all that follows.)

Why do the images come out right nevertheless? Imagine a crowd in which each person walks along a
straight line. Wherever several people meet, all of them continue with the average velocity of the
group. Nobody keeps their own line any more, but as many people enter and leave each place as if
everybody had kept it. So at every t the crowd is spread out as it would have been, and at t = 1 it
is spread out like the images.

What the average does change is the path: it bends. At t = 0 every image is still possible, and the
average direction points at the average image. A single Euler step, a straight move with the
velocity at the start, therefore lands on a blur. Later fewer and fewer images remain likely, and
the path turns towards one of them. So this teacher needs many steps. The later stages make the
paths straight, in a smaller network.

The weights jitter from batch to batch. Their exponential moving average (EMA) does not, and it
makes better images, so only the average is kept: average <- d average + (1 - d) weights. After n
steps d is min(ema, (1 + n) / (10 + n)): small at first, so that the random weights of the start
are soon forgotten. (The paper's ema of 0.999999 would be reached after 9 million steps.)

At first the network answers 0, so the loss begins at E |x - z|^2. That is 1.5 for `shapes`: 1 from
the noise and 0.5 from the images. It does not fall to 0, however good the network is, because the
lines through x_t do differ from their average. About 0.06 remains.

Reads   images: --data shapes (drawn by the program), cifar10 (downloaded), or the path of a folder
        or zip; docs/images.md says what your own may look like
Writes  out/<preset>/01_teacher.pt; 01_samples.png, one row for each eighth of the training;
        01_state.pt, from which an interrupted run continues
Takes   shapes: half a minute on 2 CPU cores (AMD EPYC, torch 2.13)
"""
import torch

from common import (EPS, Trainer, fingerprint, from_uint8, load_data, new_network, require, run,
                    samples, save_grid, save_network, say, start)

SETTINGS = {
    "data": dict(shapes="shapes", ffhq64="ffhq-64x64.zip", imagenet64="imagenet-64x64.zip",
                 others="cifar10", help="shapes, cifar10, or the path of images"),
    "image_size": dict(shapes=16, ffhq64=64, imagenet64=64, others=32, help="pixels"),
    "conditional": dict(shapes=True, cifar10_quick=True, imagenet64=True, others=False,
                        help="learn the class labels"),
    "flip": dict(imagenet64=False, others=True, help="mirror half of the images"),
    # The network: 0.3M parameters for shapes, 15.8M for cifar10_quick, then 61.8M. (The paper's
    # teachers are published ones. Its ImageNet teacher has 296M parameters, the one here 114M.)
    "base": dict(shapes=20, cifar10_quick=96, imagenet64=192, others=128,
                 help="channels of the first level"),
    "mult": dict(shapes=(1, 2), cifar10_quick=(1, 2, 2), others=(1, 2, 2, 2),
                 help="channels of each level, as multiples of base"),
    "blocks": dict(shapes=1, cifar10_quick=2, imagenet64=3, others=4, help="per level"),
    "attn": dict(shapes=(8,), others=(16,), help="image sizes with attention"),
    "dropout": dict(shapes=0.0, cifar10_quick=0.0, imagenet64=0.1, others=0.15, help="probability"),
    # Training. The paper trains no teacher. The 800,000 steps are what it gives to reflow.
    "t_distribution": dict(shapes="logit_normal", cifar10_quick="logit_normal", others="uniform",
                           choices=("uniform", "logit_normal", "early"), help="see draw_t()"),
    "optimizer": dict(shapes="muon", cifar10_quick="muon", others="adam", choices=("adam", "muon"),
                      help="see Trainer"),
    "steps": dict(shapes=900, cifar10_quick=6000, others=800_000, help="optimiser steps"),
    "batch": dict(shapes=16, others=128, help="images in a step"),
    "lr": dict(shapes=4e-3, cifar10_quick=4e-3, others=2e-4, help="learning rate"),
    "warmup": dict(shapes=100, cifar10_quick=200, others=5000, help="steps while lr rises"),
    "cooldown": dict(shapes=0.6, cifar10_quick=0.6, others=0.0, help="share while lr falls"),
    "ema": dict(shapes=0.999, cifar10_quick=0.999, others=0.999999, help="decay of the average"),
    "precision": dict(shapes="fp32", others="auto", choices=("fp32", "bf16", "auto"),
                      help="auto: bf16 where the hardware has it"),
}


def draw_t(n, distribution, device):
    """n times t in [EPS, 1]: (n,).

    "uniform" is the paper's. "logit_normal" (the sigmoid of a normal number) draws more t near the
    middle. There it is decided what the image shows, and the teacher has most to learn (Esser et
    al., 2403.03206). "early" draws more t near the noise: stage 03 uses it, because sampling in one
    call asks for v(z, EPS) alone.
    """
    t = torch.rand(n, device=device)
    if distribution == "early":
        t = t**2
    if distribution == "logit_normal":
        t = torch.randn(n, device=device).sigmoid()
    return EPS + (1 - EPS) * t


def flow_loss(net, z, x, t, labels=None):
    """E | v(x_t, t) - (x - z) |^2, a scalar. Liu et al., 2209.03003, Eq. 1.

    z, x (B, C, H, W): noise and images, independent of each other; t (B,); labels int64 (B,), or
    None.
    """
    # x_t = t x + (1 - t) z
    s = t.view(-1, 1, 1, 1)
    x_t = s * x + (1 - s) * z
    # | v(x_t, t) - (x - z) |^2
    return (net(x_t, t, labels) - (x - z)).square().mean()


def main(cfg):
    device = start(cfg, "01 teacher")

    # 1. All images, uint8 (N, 3, H, W), their labels (N,), and the names of the classes.
    images, labels, names = load_data(cfg.data, cfg.image_size)
    made_from = {"data": fingerprint(images)}
    classes = 0
    if cfg.conditional:
        require(labels is not None, f"--conditional needs labels, and {cfg.data} has none. "
                "--no-conditional trains without them")
        made_from["labels"] = fingerprint(labels)
        classes = len(labels.unique())
        require(labels.min() == 0 and labels.max() == classes - 1, f"{cfg.data} has {classes} "
                f"classes, but labels from {labels.min()} to {labels.max()}. Number them 0, 1, 2, "
                "...: a class without images cannot be learned")
    else:
        labels = None

    # 2. The network.
    net = new_network(cfg, cfg.image_size, classes).to(device)
    if names:
        net.class_names = names[:classes]
    say(f"teacher | {sum(p.numel() for p in net.parameters()):,} parameters, {classes} classes")

    # 3. Training.
    trainer = Trainer(cfg, "01 teacher", net, made_from, cfg.batch)
    for step in trainer.steps():
        x, y = trainer.draw(images, labels)
        x = from_uint8(x)  # (B, 3, H, W)
        if cfg.flip:  # a mirrored photo is as good a photo: twice the images
            mirrored = torch.rand(len(x), 1, 1, 1, device=device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        z = torch.randn_like(x)
        t = draw_t(len(x), cfg.t_distribution, device)
        trainer.update(flow_loss(trainer.net, z, x, t, y))
        if trainer.done % max(1, cfg.steps // 8) == 0:  # watch it learn, from the same noises
            title = f"after {trainer.done} steps"
            trainer.strips[title] = samples(trainer.ema, cfg.seed, range(12), steps=12)
            save_grid(cfg.folder / "01_samples.png", trainer.strips.values(), trainer.strips)

    # 4. Keep the averaged weights.
    save_network(cfg, "01_teacher.pt", trainer.ema, made_from)
    say(f"wrote {cfg.folder}/01_teacher.pt, 01_samples.png | next: 02_generate_pairs.py")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
