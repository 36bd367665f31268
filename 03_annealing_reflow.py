"""Stage 03: annealing reflow. A small network learns a straight flow from the teacher's pairs.

"Reflow" is stage 01's regression on pairs instead of random couples. The lines between the ends of
a pair hardly cross, so there is little left to average, and the paths that are learned are nearly
straight. The result is called a 2-rectified flow (the teacher is the 1-rectified one); from here
on it is "the flow". On a straight path the velocity is constant and one Euler step arrives: where
the teacher gave a blur, the flow gives an image.

Reflow normally starts from the teacher's weights. They do not fit into a smaller network, and from
random weights, on few pairs, it does poorly. So the small network first trains on another problem,
with new noise in every step, which turns little by little into the right one. The noise of each
pair is mixed with fresh noise:

    z_beta = sqrt(1 - beta^2) z + beta n         n ~ N(0, I), fresh noise in every step
    L = E | v(x_t, t) - (x - z_beta) |^2       x_t = t x + (1 - t) z_beta           (paper, Eq. 9)

At beta = 1 the noise has nothing to do with the image. This is stage 01 with the teacher's images
as data: every draw is new, and the paths that it teaches are bent. At beta = 0 it is reflow on
fixed pairs, whose paths are straight. beta falls from 1 to 0. The squares of the two weights add up
to 1, so z_beta has variance 1 for every beta (z and n are independent), and at t = 0 the network
always meets N(0, I), as it will when it makes images.

Why should the start matter at the end? The paper says that fixed pairs are hard to learn from
random weights. What we see is another reason: a network that trains on few pairs alone learns them
by heart, and makes poor images of other noises. In the annealed steps every noise is new. So the
network becomes a generator for any noise, as in stage 01, and it keeps that while it learns the
pairs. Annealing should then help where pairs are few and each is repeated many times, as in the
paper (2,000 times). It does: with 64 pairs, 81 % of the student's images match the request, and
without annealing 52 %. With the 160 pairs of `shapes` it gains less, and not for every seed. With
1,024 it gained nothing. (All are means of five seeds: docs/results.md. extras/ideas.py shows one
seed.)

The loss begins near 1.5, as in stage 01, and ends at about 0.015 for `shapes`. That is far less
than the teacher's, because the lines of pairs meet less often.

Reads   out/<preset>/02_pairs.pt; 01_teacher.pt with --start_from teacher
Writes  out/<preset>/03_reflow.pt, 03_samples.png; 03_state.pt, from which an interrupted run
        continues
Takes   shapes: one minute on 2 CPU cores (AMD EPYC, torch 2.13)
"""
import math

import torch

from common import (Trainer, load, load_network, new_network, require, run, samples, save_grid,
                    save_network, say, stage, start)

draw_t = stage("01").draw_t  # `import` takes no name that begins with a digit

SETTINGS = {
    # beta, see beta()
    "schedule": dict(others="linear", choices=("linear", "cosine", "exponential", "none"),
                     help="of beta; none: reflow without annealing"),
    "anneal_steps": dict(shapes=675, cifar10_quick=2250, others=300_000,
                         help="K: the steps until beta is 0"),
    "flip": dict(imagenet64=False, others=True, help="mirror half of the pairs"),
    # The small network: 0.1M parameters for shapes, 7.1M for cifar10_quick, 15.7M for cifar10 and
    # ffhq64, 80.6M for imagenet64. (Paper, ImageNet: an ADM U-Net of 80.7M.)
    "base": dict(shapes=12, cifar10_quick=64, imagenet64=192, others=96,
                 help="channels of the first level"),
    "mult": dict(shapes=(1, 2), others=(1, 2, 2),
                 help="channels of each level, as multiples of base"),
    "blocks": dict(shapes=1, imagenet64=3, others=2, help="per level"),
    "attn": dict(shapes=(8,), others=(16,), help="image sizes with attention"),
    "dropout": dict(shapes=0.0, cifar10_quick=0.0, imagenet64=0.13, others=0.15,
                    help="probability, in stage 04 too"),
    "start_from": dict(others="scratch", choices=("scratch", "teacher"),
                       help="teacher: the usual reflow, with its weights and its size"),
    # Training.
    "t_distribution": dict(shapes="early", cifar10_quick="early", others="uniform",
                           choices=("uniform", "logit_normal", "early"), help="see draw_t() in 01"),
    "optimizer": dict(shapes="muon", cifar10_quick="muon", others="adam", choices=("adam", "muon"),
                      help="see Trainer"),
    "steps": dict(shapes=1800, cifar10_quick=6000, others=800_000, help="optimiser steps"),
    "batch": dict(shapes=32, others=128, help="pairs in a step"),
    "lr": dict(shapes=8e-3, cifar10_quick=4e-3, others=2e-4, help="learning rate"),
    "warmup": dict(shapes=100, cifar10_quick=200, others=5000, help="steps while lr rises"),
    "cooldown": dict(shapes=0.6, cifar10_quick=0.6, others=0.0, help="share while lr falls"),
    "ema": dict(shapes=0.999, cifar10_quick=0.999, others=0.999999, help="decay of the average"),
    "precision": dict(shapes="fp32", others="auto", choices=("fp32", "bf16", "auto"),
                      help="auto: bf16 where the hardware has it"),
}


def beta(step, cfg):
    """The weight of fresh noise in step 0, 1, ...: it falls from 1 to 0 in K steps.

    (The exponential schedule is at 1/e after K steps, and never at 0.)
    """
    if cfg.schedule == "none":  # plain reflow, the paper's baseline
        return 0.0
    require(cfg.anneal_steps, "--anneal_steps must be at least 1; --schedule none: no annealing")
    k = step / cfg.anneal_steps
    if cfg.schedule == "linear":  # paper, Table 4: the best
        return max(0.0, 1 - k)
    if cfg.schedule == "cosine":
        return (1 + math.cos(math.pi * min(1.0, k))) / 2
    assert cfg.schedule == "exponential"
    return math.exp(-k)


def reflow_loss(net, z, x, t, b, labels=None):
    """E | v(x_t, t) - (x - z_beta) |^2 on pairs, a scalar. Paper, Eq. 9.

    z, x (B, C, H, W): the pairs, x is where the teacher takes z; t (B,); b: beta, in [0, 1]; labels
    int64 (B,) or None.
    """
    # z_beta = sqrt(1 - beta^2) z + beta n
    z_beta = math.sqrt(1 - b**2) * z + b * torch.randn_like(z)
    # x_t = t x + (1 - t) z_beta
    s = t.view(-1, 1, 1, 1)
    x_t = s * x + (1 - s) * z_beta
    # | v(x_t, t) - (x - z_beta) |^2
    return (net(x_t, t, labels) - (x - z_beta)).square().mean()


def main(cfg):
    device = start(cfg, "03 reflow")

    # 1. The pairs. They are mapped into memory, and read from the disk as they are drawn.
    pairs = load(cfg, "02_pairs.pt")
    arguments = pairs["network"]  # of the teacher
    say(f"pairs | {len(pairs['x']):,} of {arguments['classes']} classes")

    # 2. The small network, usually from random weights. Stage 04 turns it into the student.
    if cfg.start_from == "teacher":
        net, _ = load_network(cfg, "01_teacher.pt", device)
    else:
        net = new_network(cfg, arguments["image_size"], arguments["classes"]).to(device)
    net.class_names = pairs.get("class_names") or net.class_names
    say(f"small network | {sum(p.numel() for p in net.parameters()):,} parameters")

    # 3. Training, while beta falls.
    trainer = Trainer(cfg, "03 reflow", net, pairs["lineage"], cfg.batch)
    for step in trainer.steps():
        z, x, y = trainer.draw(pairs["z"], pairs["x"], pairs["labels"])
        z, x = z.float(), x.float()  # (B, 3, H, W)
        if cfg.flip:
            # Mirror both ends: the mirrored noise leads to the mirrored image if the teacher treats
            # left and right alike. It does as far as --flip in stage 01 has taught it; nothing
            # built in ensures it. A teacher trained without flips, such as imagenet64's, does not.
            mirrored = torch.rand(len(x), 1, 1, 1, device=device) < 0.5
            z = torch.where(mirrored, z.flip(3), z)
            x = torch.where(mirrored, x.flip(3), x)
        t = draw_t(len(x), cfg.t_distribution, device)
        b = beta(step, cfg)
        loss = reflow_loss(trainer.net, z, x, t, b, y)
        trainer.update(loss, note=f"beta {b:.3f} | ")

    # 4. Keep the averaged weights, and look: one call above, 25 calls below, from the same noises.
    save_network(cfg, "03_reflow.pt", trainer.ema, pairs["lineage"])
    rows = []
    for calls in (1, 25):
        rows += samples(trainer.ema, cfg.seed, range(32), calls).split(8)
    save_grid(cfg.folder / "03_samples.png", rows)
    say(f"wrote {cfg.folder}/03_reflow.pt, 03_samples.png | next: 04_flow_guided_distill.py")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
