"""Stage 05: compare real images, teacher, 2-rectified flow and one-call student, made from the same noise.

A distance compares two sets of images by the features that a fixed network F finds in them. Each set becomes a Gaussian
(mean m, covariance S of its features), and the two Gaussians are compared (Frechet distance; Heusel et al. 2017):

    d = |m1 - m2|^2 + tr( S1 + S2 - 2 (S1 S2)^(1/2) )

With F the Inception network of 2015 and its published weights this is FID. For `shapes`, F is a small classifier of what was
drawn, trained here in seconds: its distance is called FD-shapes, and is comparable with nothing but itself.

Reads   out/<preset>/01_teacher.pt, 03_reflow.pt, 04_student.pt; the teacher's data; Inception's weights for FID
Writes  out/<preset>/05_results.md, 05_results.json, 05_samples.png
Takes   shapes: 50 s on 2 CPU cores (AMD EPYC, torch 2.13, fp32)
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from common import (COLOURS, EVALUATION, SHAPES, Attention, Settings, UserError, check_ranges, count_parameters, download,
                    draw_shapes, file_digest, from_uint8, generate, labels_for, load_images, load_network, require,
                    require_same_kind, run, save_grid, start, to_uint8, writing)

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"  # the first digits


@dataclass
class Config(Settings):
    metric: Literal["fd_shapes", "fid", "none"] = "fd_shapes"  # the distance; none: pictures, sizes and times only
    n_samples: int = 1024  # images of each network that are measured. ours; paper: 50,000
    teacher_steps: int = 25  # Euler steps, each one network call, of the teacher's good samples. ours
    flow_steps: int = 8  # the same for the 2-rectified flow. ours
    sample_batch: int = 128  # images per network call. ours
    inception_weights: str = ""  # path of the Inception weights; empty: download them into data/ (91 MB)
    feature_batch: int = 64  # images per call of Inception. ours
    feature_steps: int = 200  # training steps of FD-shapes' classifier. ours
    data: str = ""  # images to compare with; empty: those that the teacher was trained on
    memory_gb: float = 4.0  # GB; a larger folder or zip is memory-mapped from a file. ours
    skip_bad: bool = False  # leave out files that are not readable images, instead of stopping

    def __post_init__(self):
        check_ranges(self, n_samples=(2, 10**9), teacher_steps=(1, None), flow_steps=(1, None), sample_batch=(1, None),
                     feature_batch=(1, None), feature_steps=(1, None), memory_gb=(0, None))


PAPER = dict(metric="fid", n_samples=50_000, teacher_steps=100, flow_steps=100)  # ours: Euler steps; paper: RK45

PRESETS = {
    "shapes": {},
    "cifar10_quick": {**PAPER, "n_samples": 10_000, "teacher_steps": 50, "flow_steps": 25},
    "cifar10": PAPER,
    "ffhq64": PAPER,
    "imagenet64": PAPER,
}


# ------------------------------------------------------------------------------------------------- the distance

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The Frechet distance of two Gaussians, a float >= 0. mu (D,), sigma (D, D) symmetric; computed in float64.

    tr (S1 S2)^(1/2) is the sum of the singular values of L1^T L2 where S = L L^T. Each L comes from eigenvectors, without
    those of eigenvalue 0: exact for singular covariances too (fewer images than features), where a matrix root is not.
    """
    def factor(sigma):
        w, v = torch.linalg.eigh(sigma)
        keep = w > len(w) * torch.finfo(w.dtype).eps * w.max()
        return v[:, keep] * w[keep].sqrt()  # (D, rank)

    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).to("cpu", torch.float64) for a in (mu1, sigma1, mu2, sigma2))
    root_trace = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace).item())


def gaussian(features_of, images, batch, device):
    """Mean (D,) and covariance (D, D) of the features of uint8 images: sums in float64, so memory does not grow with N."""
    total, outer = 0.0, 0.0
    for part in images.split(batch):
        f = features_of(part.to(device)).cpu().double()  # (B, D)
        total, outer = total + f.sum(0), outer + f.T @ f
    n = len(images)
    mu = total / n
    return mu, (outer - n * torch.outer(mu, mu)) / (n - 1)


# ------------------------------------------------------------------------------------------------- Inception

class Conv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU. A stride of 2 goes without padding."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = tuple(k // 2 for k in kernel) if padding is None and stride == 1 else padding or 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Several chains of convolutions side by side, and a pooling branch, concatenated.

    chains  {name: [(channels, kernel), ...]}; a list as the last entry forks there, and both ends are concatenated
    pool    "avg" or "max", followed by a 1x1 convolution to c_pool channels; with stride 2: the pooling alone
    """

    def __init__(self, c_in, chains, pool, c_pool=0, stride=1):
        super().__init__()
        self.pool, self.stride, self.names = pool, stride, []
        self.c_out = c_pool or c_in
        for name, chain in chains.items():
            c, steps = c_in, []
            for i, entry in enumerate(chain, 1):
                step_stride = stride if i == len(chain) else 1
                fork = entry if isinstance(entry, list) else [entry]
                ends = [f"{name}_{i}{'ab'[j] if len(fork) > 1 else ''}" for j in range(len(fork))]
                ends = [name] if len(chain) == 1 else ends
                for end, (c_out, kernel) in zip(ends, fork):
                    self.add_module(end, Conv(c, c_out, kernel, step_stride))
                c = sum(c_out for c_out, _ in fork) if i == len(chain) else fork[0][0]
                steps.append(ends)
            self.names.append(steps)
            self.c_out += c
        if c_pool:
            self.branch_pool = Conv(c_in, c_pool, 1)

    def forward(self, x):
        outputs = []
        for steps in self.names:
            h = x
            for ends in steps:
                h = torch.cat([getattr(self, end)(h) for end in ends], dim=1)
            outputs.append(h)
        if self.stride == 2:
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self.pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(outputs, dim=1)


class Inception(nn.Module):
    """Inception-v3 as FID uses it (the TensorFlow network of 2015-12-05), with pytorch-fid's key names.

    Maps images (B, 3, 299, 299), scaled as in inception_features, to features (B, 2048).
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        c = 192  # 35x35
        for name, c_pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            block = Mixed(c, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
                              "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "avg", c_pool)
            self.add_module(name, block)
            c = block.c_out
        self.Mixed_6a = Mixed(c, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "max", stride=2)
        c = self.Mixed_6a.c_out  # 768, 17x17
        row, column = (1, 7), (7, 1)
        for name, c7 in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            self.add_module(name, Mixed(c, {
                "branch1x1": [(192, 1)], "branch7x7": [(c7, 1), (c7, row), (192, column)],
                "branch7x7dbl": [(c7, 1), (c7, column), (c7, row), (c7, column), (192, row)]}, "avg", 192))
        self.Mixed_7a = Mixed(c, {"branch3x3": [(192, 1), (320, 3)],
                                  "branch7x7x3": [(192, 1), (192, row), (192, column), (192, 3)]}, "max", stride=2)
        c = self.Mixed_7a.c_out  # 1280, 8x8
        fork = [(384, (1, 3)), (384, (3, 1))]
        for name, pool in (("Mixed_7b", "avg"), ("Mixed_7c", "max")):
            block = Mixed(c, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork],
                              "branch3x3dbl": [(448, 1), (384, 3), fork]}, pool, 192)
            self.add_module(name, block)
            c = block.c_out  # 2048
        self.fc = nn.Linear(c, 1008)  # in the published file; FID does not use it

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        return x.mean(dim=(2, 3))


def resize_tf1(x, size=299):
    """Bilinear resize as TensorFlow 1 does it: source = target * in / out, without half-pixel centres. (B, C, H, W) float."""
    def mix(x, dim):
        n = x.shape[dim]
        source = torch.arange(size, device=x.device) * (n / size)
        low = source.long()
        shape = [-1 if d == dim else 1 for d in range(4)]
        low_part, high_part = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        return low_part + (high_part - low_part) * (source - low).view(shape)

    return mix(mix(x, 3), 2)


@torch.no_grad()
def inception_features(net, images_uint8, resize="tf1"):
    """uint8 (N, 3, H, W) -> features (N, 2048). resize "tf1": what the paper's evaluation does; or "pytorch_fid"."""
    x = images_uint8.float()
    if resize == "tf1":
        return net((resize_tf1(x) - 128) / 128)
    return net(F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) / 127.5 - 1)


def load_inception(path, device):
    """(Inception in eval mode, the first digits of its file's sha256). Downloads and checks the weights if path is empty."""
    try:
        path = Path(path or download(INCEPTION_URL, Path("data", INCEPTION_URL.split("/")[-1]), "sha256", INCEPTION_SHA256))
    except UserError as error:
        raise UserError(f"{error}. --inception_weights PATH takes it from elsewhere; --metric none goes without") from error
    require(path.exists(), f"--inception_weights {path} does not exist")
    net = Inception()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        counters = {key: value for key, value in net.state_dict().items() if key.endswith("num_batches_tracked")}
        net.load_state_dict({**counters, **weights})  # the published file has no such counters
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold the FID Inception weights: {reason}") from error
    return net.to(device).eval(), file_digest(path, "sha256")[:8]


# ------------------------------------------------------------------------------------------------- FD-shapes

class ShapeNet(nn.Module):
    """A small Inception-style classifier of drawings; its 72 pooled channels are the features of FD-shapes.

    Maps images (B, 3, H, W) in [-1, 1] to features (B, 72). It is also given the pixels' coordinates, so that the features
    know where the shape is.
    """

    def __init__(self):
        super().__init__()
        chains = {"branch1x1": [(16, 1)], "branch3x3": [(16, 1), (24, 3)], "branch3x3dbl": [(16, 1), (24, 3), (24, 3)]}
        self.stem = Conv(5, 32, 3)
        self.mixed0 = Mixed(32, chains, "avg", 8)
        self.mixed1 = Mixed(72, chains, "max", 8)
        self.head = nn.Linear(72, len(SHAPES) + len(COLOURS) + 3)

    def forward(self, x):
        b, _, height, width = x.shape
        row = torch.linspace(-1, 1, height, device=x.device).view(1, 1, -1, 1).expand(b, 1, height, width)
        column = torch.linspace(-1, 1, width, device=x.device).view(1, 1, 1, -1).expand(b, 1, height, width)
        h = F.max_pool2d(self.stem(torch.cat([x, row, column], dim=1)), 2)  # (B, 32, H/2, W/2)
        return self.mixed1(self.mixed0(h)).mean(dim=(2, 3))


def train_shape_net(images, attributes, steps, seed, device):
    """ShapeNet that has learnt to name shape and colour and to measure centre and radius: attributes as in draw_shapes."""
    torch.manual_seed(seed)
    net = ShapeNet().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        i = torch.randint(len(images), (64,))
        a = attributes[i].to(device)
        x = from_uint8(images[i].to(device))
        # ours: up to 0.1 of noise (13 grey levels), so that what the eye hardly sees does not count for more than a wrong shape
        x = x + 0.1 * torch.rand(len(x), 1, 1, 1, device=device) * torch.randn_like(x)
        out = net.head(net(x))
        shape, colour, place = out.split([len(SHAPES), len(COLOURS), 3], dim=1)
        loss = (F.cross_entropy(shape, a[:, 0].long()) + F.cross_entropy(colour, a[:, 1].long())
                + 10 * F.mse_loss(place, a[:, 2:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    return net


# ------------------------------------------------------------------------------------------------- the table

def count_macs(net):
    """Multiply-adds of one call for one image, as the paper counts: convolutions and linear layers, without attention."""
    device = next(net.parameters()).device
    x = torch.zeros(1, net.args["channels"], net.args["image_size"], net.args["image_size"], device=device)
    labels = torch.zeros(1, dtype=torch.long, device=device) if net.args["classes"] else None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x, torch.zeros(1, device=device), labels)
    counts = counter.get_flop_counts()
    attention = [f"{type(net).__name__}.{name}" for name, module in net.named_modules() if isinstance(module, Attention)]
    return (counter.get_total_flops() - sum(sum(counts[name].values()) for name in attention)) // 2


def main(cfg):
    device = start(cfg, "05 evaluation")
    out = cfg.folder

    # 1. Networks: they must belong together.
    teacher, artifact = load_network(out / "01_teacher.pt", cfg, device)
    flow, _ = load_network(out / "03_reflow.pt", cfg, device)
    student, _ = load_network(out / "04_student.pt", cfg, device)
    require_same_kind(out / "01_teacher.pt", teacher.args, out / "03_reflow.pt", flow.args)
    require_same_kind(out / "01_teacher.pt", teacher.args, out / "04_student.pt", student.args)
    size, data = teacher.args["image_size"], cfg.data or artifact["settings"]["data"]
    require(cfg.metric != "fd_shapes" or data == "shapes", f"FD-shapes measures drawings, not {data}: set --metric fid or none")

    # 2. The distance: a feature network, and the real images' Gaussian.
    features_of, protocol = None, {"metric": "none"}
    if cfg.metric == "fid":
        inception, digest = load_inception(cfg.inception_weights, device)
        features_of = lambda images: inception_features(inception, images)
        name = "FID" if digest == INCEPTION_SHA256 else f"FD-inception-{digest}"  # FID only with the published weights
        protocol = {"metric": name, "resize": "tf1", "rounding": "round", "inception_sha256": digest}
    if cfg.metric == "fd_shapes":
        real, attributes = draw_shapes(16_384, size)
        shape_net = train_shape_net(real, attributes, cfg.feature_steps, cfg.seed, device)
        features_of = torch.no_grad()(lambda images: shape_net(from_uint8(images)))
        protocol = {"metric": "FD-shapes", "classifier_steps": cfg.feature_steps}
    else:
        real, _ = load_images(data, size, cfg.memory_gb, cfg.skip_bad, Path(cfg.out) / "cache")
    if features_of:
        reference = gaussian(features_of, real, cfg.feature_batch, device)
    protocol |= {"n_samples": cfg.n_samples, "n_reference": len(real), "reference": data, "noise_seed": cfg.seed,
                 "first_index": EVALUATION}
    print(f"distance | {protocol}", flush=True)

    # 3. Every network, from the same noise and labels.
    indices = torch.arange(EVALUATION, EVALUATION + cfg.n_samples)
    labels = labels_for(cfg.seed, cfg.n_samples, teacher.args["classes"])
    rows, pictures = [], {}

    def measure(name, images, net=None, calls=0, seconds=0.0):
        distance = None
        if features_of:
            distance = frechet_distance(*gaussian(features_of, images, cfg.feature_batch, device), *reference)
        rows.append({"network": name, "parameters": net and count_parameters(net), "macs": net and count_macs(net),
                     "calls": calls, "ms_per_image": net and 1000 * seconds / len(images), "distance": distance})
        pictures[f"{name}, {calls} call{'s' * (calls != 1)}" if calls else name] = from_uint8(images[:12])
        print(f"measured | {name} | {calls} calls | {'' if distance is None else f'{distance:.3f}'}", flush=True)

    if cfg.metric == "fd_shapes":  # the floor: other drawings by the same hand
        measure("real (other drawings)", draw_shapes(cfg.n_samples, size, seed=1)[0])
    else:
        pictures["real"] = from_uint8(real[torch.linspace(0, len(real) - 1, 12).long()])
    for name, net, calls in (("teacher", teacher, cfg.teacher_steps), ("teacher", teacher, 1),
                             ("2-rectified flow", flow, cfg.flow_steps), ("2-rectified flow", flow, 1),
                             ("student", student, 1)):
        images = torch.empty(cfg.n_samples, 3, size, size, dtype=torch.uint8)
        started = time.time()
        for part, x in generate(net, cfg.seed, indices, calls, labels, cfg.sample_batch):
            images[part] = to_uint8(x)
        measure(name, images, net, calls, time.time() - started)

    # 4. The table and the picture.
    def cell(value, form):
        return "-" if value is None else form.format(value)

    table = [f"| network | parameters | MACs | calls | ms per image | {protocol['metric']} |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        macs = None if row["macs"] is None else row["macs"] / 1e6
        cells = [row["network"], cell(row["parameters"], "{:,}"), cell(macs, "{:.1f} M"), row["calls"] or "-",
                 cell(row["ms_per_image"], "{:.2f}"), cell(row["distance"], "{:.3f}")]
        table.append(f"| {' | '.join(map(str, cells))} |")
    with writing(out / "05_results.json") as file:
        file.write(json.dumps({"preset": cfg.preset, "protocol": protocol, "rows": rows}, indent=1).encode())
    with writing(out / "05_results.md") as file:
        file.write("\n".join([*table, "", f"{protocol}", ""]).encode())
    save_grid(out / "05_samples.png", list(pictures.values()), list(pictures))
    print("\n".join(["", *table, ""]))
    print(f"wrote {out}/05_results.md, 05_results.json, 05_samples.png")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
