"""Stage 04: flow-guided distillation. The 2-rectified flow becomes a network that needs one call.

The student v' starts as a copy of stage 03's flow v. It learns to jump from the noise to the image, by two
losses:

    L_distill = E D( z + v'(z, EPS), x )          on pairs (z, x)                     (paper, Eq. 8)
    L_2step   = E D( z + v'(z, EPS), target )     on fresh noise z in every step      (paper, Eqs. 11-13)
                x_t = z + t v'(z, EPS),   target = x_t + (1 - t) v(x_t, t),   t ~ U[0.2, 0.8],  no gradient

A pair's image took many network calls, so pairs are few. A two-step target costs one call more than the
student's own, so every step can have new noise: the flow guides the student where there are no pairs. The
guide is no better than two steps of the flow. So it helps where a student would learn its few pairs by heart;
on `shapes`, with 1,024 pairs, as much time on pairs alone does as well or better (docs/results.md).

Why is the target better than the jump that is compared with it? The jump must guess the whole image from
noise. The target goes only part of the way on that guess; then the flow looks at x_t, where the image
already shows, and corrects the rest of the way. So the student is pulled towards what its own first step
becomes after a second look. No gradient goes through the target: otherwise the loss could fall by making the
target as bad as the jump. (Consistency models use the same trick, with one network for both jumps: the one
from later, when more of the image shows, is the target.)

D is a distance of images: squared L2; pseudo-Huber; or LPIPS, which compares what a network for photographs
sees in them. (`shapes` has pseudo-Huber, about the length of x - y: squares would blur what is in doubt. Its
loss begins near 5 and ends near 3: two terms, each the length of 768 errors of about 0.05.)

Reads   out/<preset>/03_reflow.pt; 02_pairs.pt with --pairs_from teacher; published weights with --distance
        lpips
Writes  out/<preset>/04_student.pt, 04_samples.png; 04_state.pt, from which a run continues; 04_pairs.pt with
        --pairs_from flow
Takes   shapes: 20 s on 2 CPU cores (AMD EPYC, torch 2.13)
"""
import copy
import importlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (EPS, OWN_PAIRS, Trainer, UNet, download, load, load_network, require, run, samples,
                    save_grid, save_network, say, start)

SETTINGS = [
    # name         shapes     cifar10_quick  cifar10   ffhq64    imagenet64
    ("distance",   "huber",   "lpips",       "lpips",  "lpips",  "lpips",    "D", ("l2", "huber", "lpips")),
    ("guidance",   1.0,       1.0,           1.0,      1.0,      1.0,        "weight of L_2step; 0: off"),
    ("guide_from", "noise",   "noise",       "noise",  "noise",  "noise", "L_2step: z", ("noise", "pairs")),
    ("t_low",      0.2,       0.2,           0.2,      0.2,      0.2,        "official code: t from 0.2"),
    ("t_high",     0.8,       0.8,           0.8,      0.8,      0.8,        "official code: t to 0.8"),
    # `shapes` learns from the pairs that are there already; the paper's best students from the flow's own.
    ("pairs_from", "teacher", "flow",        "flow",   "flow",   "flow", "whose pairs", ("teacher", "flow")),
    ("n_pairs",    1024,      50_000,        50_000,   50_000,   200_000,    "own pairs to make"),
    ("pair_steps", 10,        25,            100,      100,      100,        "Euler steps. paper: RK45"),
    # Training.
    ("start_from", "flow",    "flow",        "flow",   "flow",   "flow",     "weights", ("flow", "scratch")),
    ("optimizer",  "muon",    "adam",        "adam",   "adam",   "adam",     "optimiser", ("adam", "muon")),
    ("steps",      500,       15_000,        400_000,  400_000,  400_000,    "optimiser steps"),
    ("batch",      16,        128,           128,      128,      128,        "pairs, and new noises"),
    ("lr",         5e-3,      2e-4,          2e-4,     2e-4,     2e-4,       "learning rate"),
    ("warmup",     50,        0,             0,        0,        0,          "steps while lr rises"),
    ("cooldown",   1.0,       0.5,           0.0,      0.0,      0.0,        "share while lr falls"),
    ("ema",        0.995,     0.9995,        0.999999, 0.999999, 0.999999,   "decay of the averaged weights"),
    ("precision",  "fp32",    "auto",        "auto",   "auto",   "auto",     "", ("fp32", "bf16", "auto")),
]


def squared_l2(x, y):
    """D(x, y) = mean over pixels of (x - y)^2: (B,)."""
    return (x - y).square().mean(dim=(1, 2, 3))


def pseudo_huber(x, y):
    """D(x, y) = sqrt( |x - y|^2 + c^2 ) - c, c = 0.00054 sqrt(pixels): (B,). Song & Dhariwal, 2310.14189."""
    c = 0.00054 * math.sqrt(x[0].numel())
    return ((x - y).square().sum(dim=(1, 2, 3)) + c**2).sqrt() - c


def first_step(net, z, labels=None):
    """v(z, EPS), the velocity at the start: (B, C, H, W). The student's one call."""
    return net(z, torch.full(z.shape[:1], EPS, device=z.device), labels)


def distill_loss(velocity, z, x, distance):
    """E D( z + v'(z, EPS), x ) on pairs: a scalar. Paper, Eq. 8.

    velocity = v'(z, EPS), the student's first step; z, x: the pairs; all (B, C, H, W). distance(x, y): (B,)
    """
    # D( z + v'(z, EPS), x )
    return distance(z + velocity, x).mean()


def guided_loss(velocity, flow, z, t, distance, labels=None):
    """E D( z + v'(z, EPS), x_t + (1 - t) v(x_t, t) ) on fresh noise: a scalar. Paper, Eqs. 11-13.

    velocity = v'(z, EPS), the student's first step, and z: (B, C, H, W); t (B,); flow: v, not trained here.
    Eq. 12 has v in x_t, too. We use v', which is there already and, says the paper, better.
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
    require(cfg.t_low <= cfg.t_high <= 1, f"--t_low {cfg.t_low} --t_high {cfg.t_high}: the first must not be "
            "above the second, nor the second above 1")

    # 1. The 2-rectified flow v, and the student v' that starts as its copy.
    flow, artifact = load_network(cfg, "03_reflow.pt", device)
    student = copy.deepcopy(flow)
    if cfg.start_from == "scratch":
        student = UNet(**flow.args, precision=cfg.precision).to(device)
        student.class_names = flow.class_names
    say(f"student | {sum(p.numel() for p in student.parameters()):,} parameters, from {cfg.start_from}")

    # 2. The distance D.
    if cfg.distance == "lpips":
        distance = load_lpips(device)
    else:
        distance = squared_l2 if cfg.distance == "l2" else pseudo_huber

    # 3. Pairs: the teacher's, or the flow's own, made as in stage 02.
    if cfg.pairs_from == "flow":
        make_pairs = importlib.import_module("02_generate_pairs").make_pairs
        make_pairs(cfg, "04_pairs.pt", flow, artifact["lineage"], cfg.n_pairs, cfg.pair_steps, OWN_PAIRS)
    pairs = load(cfg, "04_pairs.pt" if cfg.pairs_from == "flow" else "02_pairs.pt")
    made_from = {**artifact["lineage"], **pairs["lineage"]}
    flow.requires_grad_(False)
    if device.type == "cuda" and cfg.steps >= 5000:  # as in Trainer
        flow.compile(dynamic=False)
    say(f"pairs | {len(pairs['x']):,} of the {cfg.pairs_from}'s")

    # 4. Training: L_distill + guidance L_2step.
    trainer = Trainer(cfg, "04 student", student, made_from)
    for step in trainer.steps():
        z, x, y = trainer.draw(pairs["z"], pairs["x"], pairs["labels"])
        z, x = z.float(), x.float()  # (B, 3, H, W)
        if cfg.guidance == 0:
            trainer.update(distill_loss(first_step(trainer.net, z, y), z, x, distance))
            continue
        # The student answers for both noises in one call, (2B, 3, H, W); the flow is called once.
        z_new = torch.randn_like(z) if cfg.guide_from == "noise" else z
        y_both = None if y is None else torch.cat([y, y])
        v_pairs, v_new = first_step(trainer.net, torch.cat([z, z_new]), y_both).chunk(2)
        t = cfg.t_low + (cfg.t_high - cfg.t_low) * torch.rand(len(z), device=device)
        loss = distill_loss(v_pairs, z, x, distance)
        trainer.update(loss + cfg.guidance * guided_loss(v_new, flow, z_new, t, distance, y))

    # 5. Keep the averaged weights, and look at them: one call each.
    save_network(cfg, "04_student.pt", trainer.ema, made_from)
    save_grid(cfg.folder / "04_samples.png", samples(trainer.ema, cfg.seed, range(64), 1).split(8))
    say(f"wrote {cfg.folder}/04_student.pt, 04_samples.png | next: 05_eval_fid.py")


# ----------------------------------------------------------------------------------------------------- LPIPS
# A transcription of a published network; nothing in it is needed to follow the method.

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # 528 MB
VGG_SHA256 = "397923af"  # the first digits
LPIPS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
             "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth")  # 7 kB
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


class LPIPS(nn.Module):
    """D(x, y), a learned perceptual distance (Zhang et al. 2018, 1801.03924): VGG16, version 0.1.

    Maps x, y (B, 3, H, W) in [-1, 1] to (B,). VGG's features are made unit vectors at every position, and
    their squared differences weighted by channel. The names of the weights are those of the published files.
    """
    WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # of VGG16; 0: halve
    TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # the layers that are compared, and their widths

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for width in self.WIDTHS:
            layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            c = width or c
        self.features = nn.Sequential(*layers)
        for i, width in enumerate(self.TAPS.values()):
            weight = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{i}", nn.ModuleDict({"model": nn.Sequential(nn.Dropout(), weight)}))
        for name, values in (("shift", [-0.030, -0.088, -0.188]), ("scale", [0.458, 0.448, 0.450])):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def unit_features(self, x):
        """Yields (B, C, h, w), of length 1 along C, for each of the five layers. Official code: at 64x64."""
        h = (F.interpolate(x, (64, 64), mode="bilinear", align_corners=True) - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.TAPS:
                # Where all channels are 0, the root alone would have no gradient (0/0).
                yield h / (h.square().sum(1, keepdim=True) + 1e-20).sqrt()

    def forward(self, x, y):
        distance = 0
        for i, (a, b) in enumerate(zip(self.unit_features(x), self.unit_features(y))):
            weight = self.get_submodule(f"lin{i}.model.1").weight[0]  # (C, 1, 1), positive
            distance = distance + ((a - b).square() * weight).sum(1).mean(dim=(1, 2))
        return distance


def load_lpips(device):
    """LPIPS with the published weights. Raises UserError where they cannot be had."""
    files = [download(url, sha256, "go without: --distance l2 or huber")
             for url, sha256 in ((VGG_URL, VGG_SHA256), (LPIPS_URL, LPIPS_SHA256))]
    vgg, linear = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
    lpips = LPIPS()
    lpips.load_state_dict({**{key: vgg[key] for key in vgg if key.startswith("features.")}, **linear})
    return lpips.to(device)


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
