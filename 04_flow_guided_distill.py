"""Stage 04: flow-guided distillation. The 2-rectified flow becomes a network that needs one call.

The student v' starts as a copy of stage 03's flow v, and learns to jump from z to the image in one step, by two losses:

    L_distill = E D( z + v'(z, EPS), x )                  on pairs (z, x)                           (paper, Eq. 8)
    L_2step   = E D( z + v'(z, EPS), target )             on fresh noise z at every step            (paper, Eqs. 11-13)
                x_t = z + t v'(z, EPS),  target = x_t + (1 - t) v(x_t, t),  t ~ U[0.2, 0.8],  no gradient

A pair's image took many calls of a network, so pairs are few. A two-step path takes one call more than the student's own, so
every step can have fresh noise: the flow guides the student where there are no pairs. D is a distance of images: squared L2,
pseudo-Huber, or LPIPS, which compares what a network trained on ImageNet sees in them.

Reads   out/<preset>/03_reflow.pt; 02_pairs.pt with --pairs_from teacher; VGG's and LPIPS' weights with --distance lpips
Writes  out/<preset>/04_student.pt, 04_samples.png, 04_loss.png; 04_state.pt, from which a run continues; 04_pairs.pt with
        --pairs_from flow
Takes   shapes: 103 s on 2 CPU cores (AMD EPYC, torch 2.13, bf16)
Next    python 05_eval_fid.py
"""
import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (EPS, OWN_PAIRS, Settings, UNet, check_ranges, command_for, count_parameters, evaluation_samples, load,
                    load_network, load_strictly, make_pairs, on_device, pair_batch, published_weights, require,
                    require_same_kind, run, save_curve, save_grid, save_network, say, start, train)

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # 528 MB
VGG_SHA256 = "397923af"  # the first digits
LPIPS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/082bb24f84c091ea94de2867d34c4544f68e0963/"
             "lpips/weights/v0.1/vgg.pth")  # 7 kB
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


@dataclass
class Config(Settings):
    # Losses
    distance: Literal["l2", "huber", "lpips"] = "l2"  # D. paper: lpips
    vgg_weights: str = ""  # for lpips: path of VGG16's weights; empty: download them into data/ (528 MB)
    lpips_weights: str = ""  # for lpips: path of its linear weights (v0.1, vgg); empty: download them into data/ (7 kB)
    any_weights: bool = False  # accept weights that are not the published files
    guidance: float = 1.0  # weight of L_2step, 0 to go without. paper: 1
    t_low: float = 0.2  # t of the two-step path is uniform from here. official code: 0.2
    t_high: float = 0.8  # ... to here. official code: 0.8
    pairs_from: Literal["teacher", "flow"] = "teacher"  # whose pairs: stage 02's, or the 2-rectified flow's own. paper: flow
    n_pairs: int = 2048  # pairs to make, with --pairs_from flow. ours; paper: 50,000 or more
    pair_steps: int = 16  # Euler steps of each of them. ours; paper: an RK45 solver
    sample_batch: int = 128  # images per network call while making them. ours
    # Training
    start_from: Literal["flow", "scratch"] = "flow"  # the student's first weights. paper: flow
    steps: int = 950  # optimiser steps. ours; paper: 400,000
    batch: int = 32  # pairs per step, and as many fresh noises. ours; paper: 128
    lr: float = 1.5e-3  # Adam's learning rate. ours; paper: 2e-4
    warmup: int = 0  # steps in which lr rises from 0; official code: none, because the weights are trained already
    cooldown: float = 1.0  # fraction of the steps, at the end, over which lr falls to 0. ours; official code: none
    ema: float = 0.995  # decay of the weights' moving average. ours; paper: 0.999999
    clip: float = 1.0  # largest gradient norm. paper: 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of convolutions and products; auto: bf16 where the hardware has it
    compile: bool = False  # torch.compile: a minute or more at the start; no gain on the CPUs that were tried
    accumulate: int = 1  # parts of a batch that are computed one after another: less memory, the same result
    log_every: int = 100  # steps between log lines
    save_every: int = 200  # steps between saved training states, from which a run that was broken off continues

    def __post_init__(self):
        check_ranges(self, guidance=(0, None), t_low=(0, 1), t_high=(0, 1), n_pairs=(1, 10**9), pair_steps=(1, None),
                     sample_batch=(1, None), steps=(1, None), batch=(1, None), lr=(0, 1), warmup=(0, None), cooldown=(0, 1),
                     ema=(0, 1), clip=(1e-6, None), accumulate=(1, None), log_every=(1, None),
                     save_every=(1, None))
        require(self.t_low <= self.t_high, f"--t_low {self.t_low} must not be larger than --t_high {self.t_high}")


# paper, but for the solver of the flow's own pairs (RK45 there)
PAPER = dict(distance="lpips", pairs_from="flow", n_pairs=50_000, pair_steps=100, steps=400_000, batch=128, lr=2e-4,
             cooldown=0.0, ema=0.999999, log_every=1000, save_every=5000)

PRESETS = {
    "shapes": {},
    "cifar10_quick": {**PAPER, "pair_steps": 25, "steps": 15_000, "cooldown": 0.5, "ema": 0.9995, "log_every": 200},  # ours
    "cifar10": PAPER,
    "ffhq64": PAPER,
    "imagenet64": {**PAPER, "n_pairs": 200_000},
}


def squared_l2(x, y):
    """D(x, y) = mean over pixels of (x - y)^2: (B,)."""
    return (x - y).square().mean(dim=(1, 2, 3))


def pseudo_huber(x, y):
    """D(x, y) = sqrt( |x - y|^2 + c^2 ) - c, c = 0.00054 sqrt(pixels): (B,). Song & Dhariwal 2023 (arXiv 2310.14189)."""
    c = 0.00054 * math.sqrt(x[0].numel())
    return ((x - y).square().sum(dim=(1, 2, 3)) + c**2).sqrt() - c


class LPIPS(nn.Module):
    """D(x, y), a learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924): VGG16, version 0.1. Not trained here.

    Maps x, y (B, 3, H, W) in [-1, 1] to (B,). VGG's features are made unit vectors at every position, and their squared
    differences weighted by channel. The names of the weights are those of the two published files.
    """
    WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # of VGG16; 0: halve the size
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
        self.requires_grad_(False).eval()

    def unit_features(self, x):
        """Yields (B, C, h, w), of length 1 along C, for each of the five layers. Official code: 64x64 pixels, this scaling."""
        x = F.interpolate(x, (64, 64), mode="bilinear", align_corners=True)
        shift, scale = x.new_tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1)
        h = (x - shift) / scale
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.TAPS:
                # Where all channels are 0, the root alone would have no gradient (0/0).
                yield h / (h.square().sum(1, keepdim=True) + 1e-20).sqrt()

    def per_layer(self, x, y):
        """The distance in each of the five layers: (B, 5)."""
        distances = []
        with torch.autocast(x.device.type, enabled=False):  # float32, also where the networks are bf16
            for i, (a, b) in enumerate(zip(self.unit_features(x.float()), self.unit_features(y.float()))):
                weight = self.get_submodule(f"lin{i}.model.1").weight[0]  # (C, 1, 1), positive
                distances.append(((a - b).square() * weight).sum(1).mean(dim=(1, 2)))
        return torch.stack(distances, dim=1)

    def forward(self, x, y):
        return self.per_layer(x, y).sum(1)


def load_lpips(cfg, device):
    """LPIPS with the published weights. Raises UserError where they cannot be had."""
    otherwise = "--distance l2 or huber goes without"
    vgg, _ = published_weights(cfg.vgg_weights, VGG_URL, VGG_SHA256, "vgg_weights", otherwise, cfg.any_weights)
    lin, _ = published_weights(cfg.lpips_weights, LPIPS_URL, LPIPS_SHA256, "lpips_weights", otherwise, cfg.any_weights)
    lpips, trunk = LPIPS(), {key: value for key, value in vgg.items() if key.startswith("features.")}
    load_strictly(lpips, {**trunk, **lin}, "the LPIPS weights")
    return lpips.to(device)


def first_step(net, noise, labels=None):
    """v(z, EPS), the velocity at the start: (B, C, H, W). The student's one call."""
    return net(noise, torch.full(noise.shape[:1], EPS, device=noise.device), labels)


def distill_loss(velocity, noise, data, distance):
    """E D( z + v'(z, EPS), x ) on pairs, a scalar. Eq. 8.

    velocity = v'(z, EPS), the student's first step; noise, data, all (B, C, H, W), where data = ODE(noise);
    distance(x, y) -> (B,).
    """
    # D( z + v'(z, EPS), x )
    return distance(noise + velocity, data).mean()


def guided_loss(velocity, flow, noise, distance, labels=None, t_low=0.2, t_high=0.8, u=None):
    """E D( z + v'(z, EPS), x_t + (1 - t) v(x_t, t) ) on fresh noise, a scalar. Eqs. 11-13.

    velocity = v'(z, EPS), the student's first step; flow is v (not trained); noise, velocity (B, C, H, W); labels int64 (B,)
    or None; distance(x, y) -> (B,); u (B,) uniform in [0, 1), from which t is made, drawn if None. Eq. 12 takes v for the first
    step too; the student's own v' costs no further call and, says the paper, is better.
    """
    u = torch.rand(len(noise), device=noise.device) if u is None else u
    with torch.no_grad():
        t = t_low + (t_high - t_low) * u  # (B,)
        s = t[:, None, None, None]
        # x_t = z + t v'(z, EPS)
        x_t = noise + s * velocity
        # target = x_t + (1 - t) v(x_t, t)
        target = x_t + (1 - s) * flow(x_t, t, labels)
    # D( z + v'(z, EPS), target )
    return distance(noise + velocity, target).mean()


def main(cfg):
    device = start(cfg, "04 student")

    # 1. The 2-rectified flow v, the distance D, and the student v' that starts as its copy.
    flow_path = cfg.folder / "03_reflow.pt"
    flow, artifact = load_network(flow_path, cfg, device, cfg.precision)
    distance = {"l2": squared_l2, "huber": pseudo_huber}.get(cfg.distance) or load_lpips(cfg, device)
    student = copy.deepcopy(flow) if cfg.start_from == "flow" else on_device(UNet(**flow.args), device, cfg.precision)
    flow.requires_grad_(False)
    say(f"student | {count_parameters(student):,} parameters | starts from {flow_path if cfg.start_from == 'flow' else 'scratch'}")

    # 2. Pairs: the teacher's, or the flow's own.
    if cfg.pairs_from == "flow":
        pairs_path = cfg.folder / "04_pairs.pt"
        make_pairs(pairs_path, cfg, flow, artifact, cfg.n_pairs, cfg.pair_steps, OWN_PAIRS)
    else:
        pairs_path = cfg.folder / "02_pairs.pt"
    pairs = load(pairs_path, cfg)
    require_same_kind(flow_path, flow.args, pairs_path, pairs["network"])
    n = len(pairs["images"])
    require(cfg.batch <= n, f"--batch {cfg.batch} is larger than the data: {pairs_path} has {n} pairs")
    say(f"pairs | {n} from {pairs_path}")

    # 3. Training: L_distill + guidance * L_2step.
    def loss_at(student, step, part):
        noise, data, labels = pair_batch(pairs, part, device)
        if not cfg.guidance:
            return distill_loss(first_step(student, noise, labels), noise, data, distance)
        # One call of the student on both noises, the pairs' and fresh ones, serves both losses.
        fresh = part.randn(*noise.shape[1:], device=device)
        both_labels = None if labels is None else labels.repeat(2)
        v_pair, v_fresh = first_step(student, torch.cat([noise, fresh]), both_labels).chunk(2)
        return (distill_loss(v_pair, noise, data, distance)
                + cfg.guidance * guided_loss(v_fresh, flow, fresh, distance, labels, cfg.t_low, cfg.t_high, part.rand(device)))

    ema, losses = train("04 student", cfg, student, loss_at, [artifact, pairs])

    # 4. Save the EMA weights, and look at them: one call each.
    save_network(cfg.folder / "04_student.pt", cfg, ema)
    save_grid(cfg.folder / "04_samples.png", evaluation_samples(ema, cfg.seed, 64, 1).split(8))
    save_curve(cfg.folder / "04_loss.png", losses, "04 student: loss")
    say(f"wrote {cfg.folder}/04_student.pt, 04_samples.png, 04_loss.png | "
          f"next: {command_for('05_eval_fid.py', cfg)}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
