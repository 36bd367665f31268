"""Stage 04: flow-guided distillation. The flow becomes a student that needs one network call.

The student v' starts as a copy of stage 03's flow v. It learns to jump from the noise to the
image, by two losses. (D is a distance between images; see below.)

    L_distill = E D( z + v'(z, EPS), x )         on pairs (z, x)                 (paper, Eq. 8)
    L_2step   = E D( z + v'(z, EPS), target )    on fresh noise z in every step  (Eqs. 11-13)
                x_t = z + t v'(z, EPS),   target = x_t + (1 - t) v(x_t, t),   t ~ U[0.2, 0.8]

Why is this target better than the student's own jump? The jump must guess the whole image from
noise. The target goes only part of the way on that guess; then the flow looks at x_t, where the
image already shows, and corrects the rest of the way. So the student is pulled towards what its own
first step becomes after a second look. No gradient goes through the target: otherwise the loss
could fall by making the target as bad as the jump.

Why two losses? A pair's image took many network calls, so pairs are few, and a student that sees
nothing else learns them by heart. A target takes one call of the flow, so every step can have new
noise: the flow guides the student where there are no pairs. (This has nothing to do with
classifier-free guidance.) The price is that call, and the student's own on a second batch: a step
takes about twice as long. It is worth it where pairs are few. 1,000 steps on pairs alone end at a
distance (stage 05) of 5.6 with the 160 pairs of `shapes`; 500 steps with guidance take as long, and
end at 3.7. With 64 pairs: 13.7 alone, and 9.7 with guidance. With 1,024 pairs, the 1,000 steps on
pairs alone were better.

Why not stop at the flow, if its paths are straight? They are only nearly straight: with one call,
90 % of its images match the request, and 97 % of the student's. Both get the same input in that one
call, pure noise. But the flow must be right at every t, and it learns a mean of velocities. The
student has only its jump to learn, and a loss that looks at the image at its end. Why not distil
the teacher at once, without stage 03? A student from random weights that learns from the teacher's
pairs, for as long as both stages take, reaches 57 %. (All these numbers are means of five seeds:
docs/results.md.)

t avoids both ends (official code: 0.2 to 0.8). Near 0 the flow's second look sees only noise; near
1 nothing is left to correct.

D is a distance between images: squared L2, pseudo-Huber, or LPIPS, which compares the features
that a network for photographs finds in them. `shapes` uses pseudo-Huber, which is about the length
of the difference. A small network cannot tell similar noises apart, so it must answer with one
image for several. Squared lengths are smallest at the mean of these images, which is a blur.
Lengths are smallest at a kind of median, which stays close to most of them. The loss begins near 3
and ends near 2. It is the sum of two lengths, each of a vector of 768 values.

Reads   out/<preset>/03_reflow.pt; 02_pairs.pt with --pairs_from teacher; published weights with
        --distance lpips
Writes  out/<preset>/04_student.pt, 04_samples.png; 04_state.pt, from which an interrupted run
        continues; 04_pairs.pt with --pairs_from flow
Takes   shapes: 20 seconds on 2 CPU cores (AMD EPYC, torch 2.13)
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (EPS, OWN_PAIRS, WORLD, Trainer, UNet, compiled, download, load, load_network,
                    require, run, samples, save_grid, save_network, say, stage, start)

SETTINGS = {
    "distance": dict(shapes="huber", cifar10_quick="huber", others="lpips",
                     choices=("l2", "huber", "lpips"), help="D, between images"),
    "guidance": dict(others=1.0, help="weight of L_2step; 0: pairs alone"),
    "guide_from": dict(others="noise", choices=("noise", "pairs"), help="the z of L_2step"),
    "t_low": dict(others=0.2, help="of t in L_2step. official code: 0.2"),
    "t_high": dict(others=0.8, help="of t in L_2step. official code: 0.8"),
    # `shapes` and `cifar10_quick` learn from the teacher's pairs, which are there already. The
    # paper's best students learn from pairs that the flow makes; it gives no reason.
    "pairs_from": dict(shapes="teacher", cifar10_quick="teacher", others="flow",
                       choices=("teacher", "flow"), help="whose pairs"),
    "n_pairs": dict(shapes=1024, imagenet64=200_000, others=50_000,
                    help="made by the flow, with --pairs_from flow"),
    "pair_steps": dict(shapes=10, cifar10_quick=16, others=100,
                       help="Euler steps, with --pairs_from flow"),
    # Training.
    "start_from": dict(others="flow", choices=("flow", "scratch"), help="the first weights"),
    "optimizer": dict(shapes="muon", cifar10_quick="muon", others="adam", choices=("adam", "muon"),
                      help="see Trainer"),
    "steps": dict(shapes=500, cifar10_quick=2500, others=400_000, help="optimiser steps"),
    "batch": dict(shapes=16, others=128, help="pairs in a step, and as many new noises"),
    "lr": dict(shapes=5e-3, cifar10_quick=2.5e-3, others=2e-4, help="learning rate"),
    "warmup": dict(shapes=50, cifar10_quick=100, others=0, help="steps while lr rises"),
    "cooldown": dict(shapes=1.0, cifar10_quick=1.0, others=0.0, help="share while lr falls"),
    "ema": dict(shapes=0.995, cifar10_quick=0.999, others=0.999999, help="decay of the average"),
    "precision": dict(shapes="fp32", others="auto", choices=("fp32", "bf16", "auto"),
                      help="auto: bf16 where the hardware has it"),
}


def squared_l2(a, b):
    """D(a, b) = mean over all values of (a - b)^2: (B,)."""
    return (a - b).square().mean(dim=(1, 2, 3))


def pseudo_huber(a, b):
    """D(a, b) = sqrt( |a - b|^2 + c^2 ) - c: (B,), with the sum over all values in |a - b|^2.

    c = 0.00054 sqrt(number of values). Song & Dhariwal, 2310.14189.
    """
    c = 0.00054 * math.sqrt(a[0].numel())
    squares = (a - b).square().sum(dim=(1, 2, 3))
    return (squares + c**2).sqrt() - c


def first_velocity(net, z, labels=None):
    """v(z, EPS), the velocity at the start: (B, C, H, W). The student's one call."""
    t = torch.full(z.shape[:1], EPS, device=z.device)
    return net(z, t, labels)


def distill_loss(velocity, z, x, distance):
    """E D( z + v'(z, EPS), x ) on pairs: a scalar. Paper, Eq. 8.

    velocity = v'(z, EPS), computed once for both losses; z, x: the pairs; all (B, C, H, W).
    distance: D, of two batches of images: (B,)
    """
    # D( z + v'(z, EPS), x )
    return distance(z + velocity, x).mean()


def guided_loss(velocity, flow, z, t, distance, labels=None):
    """E D( z + v'(z, EPS), x_t + (1 - t) v(x_t, t) ) on fresh noise: a scalar. Paper, Eqs. 11-13.

    velocity = v'(z, EPS) and z: (B, C, H, W); t (B,); flow: v, which is not trained here. The
    paper's Eq. 12 makes x_t with v, but its experiments did better with v', which we use. (It has
    also been computed already.)
    """
    with torch.no_grad():
        # x_t = z + t v'(z, EPS)
        s = t.view(-1, 1, 1, 1)
        x_t = z + s * velocity
        # target = x_t + (1 - t) v(x_t, t)
        target = x_t + (1 - s) * flow(x_t, t, labels)
    # D( z + v'(z, EPS), target )
    return distance(z + velocity, target).mean()


def main(cfg):
    device = start(cfg, "04 student")
    require(cfg.t_low <= cfg.t_high <= 1, f"--t_low {cfg.t_low} --t_high {cfg.t_high}: the first "
            "must not be above the second, nor the second above 1")

    # 1. The flow v, and the student v' that starts as its copy, with its dropout.
    flow, artifact = load_network(cfg, "03_reflow.pt", device)
    student = copy.deepcopy(flow)
    if cfg.start_from == "scratch":
        student = UNet(**flow.args, precision=cfg.precision).to(device)
        student.class_names = flow.class_names
    flow.requires_grad_(False)
    say(f"student | {sum(p.numel() for p in student.parameters()):,} parameters, "
        f"from {cfg.start_from}")

    # 2. The distance D.
    if cfg.distance == "lpips":
        distance = load_lpips(device)
    elif cfg.distance == "huber":
        distance = pseudo_huber
    else:
        distance = squared_l2

    # 3. Pairs: the teacher's, or the flow's own, made as in stage 02.
    file = "02_pairs.pt"
    if cfg.pairs_from == "flow":
        file = "04_pairs.pt"
        stage("02").make_pairs(cfg, file, flow, artifact["lineage"], cfg.n_pairs, cfg.pair_steps,
                               OWN_PAIRS)
    pairs = load(cfg, file)
    made_from = {**artifact["lineage"], **pairs["lineage"]}
    say(f"pairs | {len(pairs['x']):,} of the {cfg.pairs_from}'s")

    # 4. Training: L_distill + guidance L_2step. The student answers for the pairs and for the fresh
    # noise in one call, (2B, 3, H, W); the flow is called once. Pairs are not flipped here, nor are
    # they in the official code.
    in_a_call = 2 * cfg.batch if cfg.guidance else cfg.batch
    trainer = Trainer(cfg, "04 student", student, made_from, in_a_call)
    if cfg.guidance:
        flow = compiled(cfg, flow, cfg.steps - trainer.done, cfg.batch // WORLD)
    for step in trainer.steps():
        z, x, y = trainer.draw(pairs["z"], pairs["x"], pairs["labels"])
        z, x = z.float(), x.float()  # (B, 3, H, W)
        if cfg.guidance:
            z_2step = torch.randn_like(z) if cfg.guide_from == "noise" else z
            # The fresh noises get the labels of the pairs.
            y_both = None if y is None else torch.cat([y, y])
            both = first_velocity(trainer.net, torch.cat([z, z_2step]), y_both)
            v_pairs, v_2step = both.chunk(2)
        else:
            v_pairs = first_velocity(trainer.net, z, y)
        loss = distill_loss(v_pairs, z, x, distance)
        if cfg.guidance:
            t = torch.rand(len(z), device=device)
            t = cfg.t_low + (cfg.t_high - cfg.t_low) * t
            loss = loss + cfg.guidance * guided_loss(v_2step, flow, z_2step, t, distance, y)
        trainer.update(loss)  # a loss of your own is added before this line

    # 5. Keep the averaged weights, and look at them: one call each.
    save_network(cfg, "04_student.pt", trainer.ema, made_from)
    images = samples(trainer.ema, cfg.seed, range(64), 1)
    save_grid(cfg.folder / "04_samples.png", images.split(8))
    say(f"wrote {cfg.folder}/04_student.pt, 04_samples.png | next: 05_eval_fid.py")


# ------------------------------------------------------------------------------------------- LPIPS
# A transcription of a published network; nothing in it is needed to follow the method.

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # 528 MB
VGG_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
LPIPS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
             "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth")  # 7 kB
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


class LPIPS(nn.Module):
    """D(x, y), a learned perceptual distance (Zhang et al. 2018, 1801.03924): VGG16, version 0.1.

    Maps x, y (B, 3, H, W) in [-1, 1] to (B,). VGG's features are made unit vectors at every
    position, and their squared differences are weighted by channel. The names of the weights are
    those of the published files.
    """
    GROUPS = (  # VGG16: channels, convolutions
        (64, 2),
        (128, 2),
        (256, 3),
        (512, 3),
        (512, 3),
    )

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        self.compared = []  # the layer at the end of each group
        for i, (width, convs) in enumerate(self.GROUPS):
            if i > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convs):
                layers.append(nn.Conv2d(c, width, 3, padding=1))
                layers.append(nn.ReLU())
                c = width
            self.compared.append(len(layers) - 1)
            weight = nn.Conv2d(c, 1, 1, bias=False)
            model = nn.Sequential(nn.Dropout(), weight)
            self.add_module(f"lin{i}", nn.ModuleDict({"model": model}))
        self.features = nn.Sequential(*layers)
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.requires_grad_(False).eval()

    def unit_features(self, x):
        """Yields (B, C, h, w), of length 1 along C, for each group. Official code: at 64x64."""
        x = F.interpolate(x, (64, 64), mode="bilinear", align_corners=True)
        h = (x - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.compared:
                # Where all channels are 0, the root alone would have no gradient (0/0).
                squares = h.square().sum(1, keepdim=True)
                yield h / (squares + 1e-20).sqrt()

    def forward(self, x, y):
        distance, features_of_y = 0, self.unit_features(y)
        for i, a in enumerate(self.unit_features(x)):
            b = next(features_of_y)
            weight = self.get_submodule(f"lin{i}.model.1").weight[0]  # (C, 1, 1), positive
            squares = (a - b).square() * weight  # (B, C, h, w)
            distance = distance + squares.sum(1).mean(dim=(1, 2))
        return distance


def load_lpips(device):
    """LPIPS with the published weights. Raises UserError where they cannot be had."""
    weights, instead = {}, "go without: --distance l2 or huber"
    for url, sha256 in ((VGG_URL, VGG_SHA256), (LPIPS_URL, LPIPS_SHA256)):
        file = download(url, sha256, instead)
        weights.update(torch.load(file, map_location="cpu", weights_only=True))
    lpips = LPIPS()
    # VGG's file also holds the layers that name ImageNet's classes.
    lpips.load_state_dict({key: weights[key] for key in lpips.state_dict()})
    return lpips.to(device)


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
