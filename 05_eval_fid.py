"""Stage 05: how far are the images of teacher, 2-rectified flow and one-call student, made from the same noise, from real ones?

A distance compares two sets of images by the features that a fixed network F finds in them. Each set becomes a Gaussian
(mean m, covariance S of its features), and the two Gaussians are compared (Frechet distance; Heusel et al. 2017):

    d = |m1 - m2|^2 + tr( S1 + S2 - 2 (S1 S2)^(1/2) )

With F the Inception network of 2015 and its published weights this is FID. For `shapes`, F is a small classifier of what was
drawn, trained here in seconds: its distance is called FD-shapes, and is comparable with nothing but itself.

With --images SET --reference SET it measures any images, without a network of ours. With --png N it only writes images, and
with --export the student as one file that runs without this project.

Reads   out/<preset>/01_teacher.pt, 03_reflow.pt, 04_student.pt; the teacher's data; Inception's weights for FID
Writes  out/<preset>/05_results.md, 05_results.json, 05_samples.png, with --images 05_images.*, with --only NAME 05_NAME.*;
        05_NAME_images/000000.png ... with --png; 05_student.pt2 with --export; and what need not be computed again:
        05_reference_<key>.pt, 05_row_<key>.pt
Takes   shapes: 33 s on 2 CPU cores (AMD EPYC, torch 2.13, bf16)
"""
import copy
import hashlib
import itertools
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from common import (COLOURS, EVALUATION, SHAPES, Attention, Settings, UserError, autocast, check_ranges, count_parameters, draw_shapes,
                    euler, file_digest, from_uint8, generate, labels_for, load, load_images, load_network, load_strictly,
                    noise_for, published_weights, rank, read, require, require_same_kind, run, same_in_all_processes, sampler_of,
                    save, save_grid, say, share, start, sum_over_processes, to_uint8, wait_for_all, world, writing)

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"  # the first digits


@dataclass
class Config(Settings):
    # What is measured, against what
    only: Literal["all", "teacher", "flow", "student"] = "all"  # which networks
    images: str = ""  # measure these instead of networks: a folder or zip of images, or an array in .npy or .npz
    reference: str = ""  # images to compare with, or an .npz with mu and sigma; empty: what the teacher was trained on
    n_samples: int = 1024  # images of each network that are measured. ours; paper: 50,000
    teacher_steps: int = 25  # Euler steps, each one network call, of the teacher's good samples (EDM: 18). ours
    flow_steps: int = 8  # the same for the 2-rectified flow. ours
    student_steps: int = 1  # the same for the student, which is trained for one
    sample_batch: int = 128  # images per network call. ours
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the networks' convolutions and products. paper: fp32
    # Instead of measuring
    png: int = 0  # only write so many images of each network as PNG files
    export: bool = False  # only write the student as one file, which makes images from noise without this project
    # The distance
    metric: Literal["fd_shapes", "fid", "none"] = "fd_shapes"  # the distance; none: pictures, sizes and times only
    resize: Literal["tf1", "pytorch_fid"] = "tf1"  # to Inception's 299x299. paper: tf1
    rounding: Literal["round", "truncate"] = "round"  # of a network's images to uint8. paper: truncate
    allow_few: bool = False  # measure fewer images than there are features (FID: 2048), although that biases the distance
    inception_weights: str = ""  # path of the Inception weights; empty: download them into data/ (91 MB)
    any_weights: bool = False  # accept Inception weights that are not the published file; the distance is then not called FID
    feature_batch: int = 64  # images per call of the feature network. ours
    feature_steps: int = 200  # training steps of FD-shapes' classifier. ours
    memory_gb: float = 4.0  # GB; a larger folder or zip is memory-mapped from a file. ours
    skip_bad: bool = False  # leave out files that are not readable images, instead of stopping

    def __post_init__(self):
        check_ranges(self, n_samples=(2, 10**9), teacher_steps=(1, None), flow_steps=(1, None), student_steps=(1, None),
                     sample_batch=(1, None), png=(0, 10**9),
                     feature_batch=(1, None), feature_steps=(1, None), memory_gb=(0, None))
        require(not self.images or not (self.png or self.export), "--png and --export are for networks, and --images has none")
        require(not self.export or self.only in ("all", "student"), f"--export writes the student, and --only {self.only} leaves it out")
        if self.export and not self.png:
            self.only = "student"


# paper, but for the Euler steps (RK45 there)
PAPER = dict(metric="fid", n_samples=50_000, teacher_steps=100, flow_steps=100, precision="fp32", rounding="truncate")

PRESETS = {
    "shapes": {},
    "cifar10_quick": {**PAPER, "n_samples": 10_000, "teacher_steps": 50, "flow_steps": 25},
    "cifar10": PAPER,
    "ffhq64": PAPER,
    "imagenet64": PAPER,
}


# ------------------------------------------------------------------------------------------------- the distance

def check_gaussian(mu, sigma, source):
    """Raises UserError unless mu (D,) and sigma (D, D) can be a mean and a covariance: finite, and sigma symmetric."""
    require(mu.ndim == 1 and tuple(sigma.shape) == (len(mu), len(mu)), f"{source}: the mean must have shape (D,) and the "
            f"covariance (D, D), not {tuple(mu.shape)} and {tuple(sigma.shape)}")
    require(mu.isfinite().all() and sigma.isfinite().all(), f"{source}: mean or covariance has entries that are not finite")
    require((sigma - sigma.T).abs().max() <= 1e-6 * sigma.abs().max(), f"{source}: the covariance is not symmetric")


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The Frechet distance of two Gaussians, a float >= 0. mu (D,), sigma (D, D) symmetric; computed in float64.

    tr (S1 S2)^(1/2) is the sum of the singular values of L1^T L2 where S = L L^T. Each L comes from eigenvectors, without
    those of eigenvalue 0: exact for singular covariances too (fewer images than features), where a matrix root is not.
    Raises UserError if a covariance is not symmetric or finite, or the two Gaussians differ in dimension.
    """
    def factor(sigma):
        w, v = torch.linalg.eigh((sigma + sigma.T) / 2)
        keep = w > len(w) * torch.finfo(w.dtype).eps * w.max()
        return v[:, keep] * w[keep].sqrt()  # (D, rank)

    device = mu1.device if torch.is_tensor(mu1) and mu1.is_cuda else "cpu"
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).to(device, torch.float64) for a in (mu1, sigma1, mu2, sigma2))
    check_gaussian(mu1, sigma1, "the first Gaussian")
    check_gaussian(mu2, sigma2, "the second Gaussian")
    require(len(mu1) == len(mu2), f"the Gaussians have {len(mu1)} and {len(mu2)} dimensions: they are not of the same features")
    root_trace = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace).item())


def gaussian(batches, dimensions, device="cpu"):
    """Mean (D,) and covariance (D, D), in float64, of the features (B, D) that come in the batches of all processes.

    Only sums are kept, so memory does not grow with the number of images.
    """
    n = torch.zeros((), dtype=torch.float64, device=device)
    total, outer = n.new_zeros(dimensions), n.new_zeros(dimensions, dimensions)
    for f in batches:
        f = f.to(device, torch.float64)
        n += len(f)
        total += f.sum(0)
        outer += f.T @ f
    sum_over_processes(n, total, outer)
    mu = total / n
    return mu, (outer - n * torch.outer(mu, mu)) / (n - 1).clamp(min=1)


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


def load_inception(cfg, device):
    """(Inception in eval mode, sha256 of its file). Raises UserError where the weights cannot be had or do not fit."""
    weights, digest = published_weights(cfg.inception_weights, INCEPTION_URL, INCEPTION_SHA256, "inception_weights",
                                        "--metric none goes without", cfg.any_weights)
    net = Inception()
    counters = {key: value for key, value in net.state_dict().items() if key.endswith("num_batches_tracked")}
    load_strictly(net, {**counters, **weights}, "the Inception weights file")  # the published one has no such counters
    return net.to(device).eval(), digest


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


# ------------------------------------------------------------------------------------------------- images and references

def read_set(source, size, cfg):
    """Images uint8 (N, 3, H, W) from whatever load_images takes, or an array in .npy or .npz; size None: as large as they are.

    An array is (N, H, W, 3) or (N, 3, H, W), uint8 or float in [-1, 1]; an .npz holds one, or one called arr_0.
    Raises UserError for anything else.
    """
    if not source.endswith((".npy", ".npz")):
        return load_images(source, size, cfg.memory_gb, cfg.skip_bad, Path(cfg.out) / "cache")[0]
    array = read_arrays(source)
    array = array.get("arr_0", next(iter(array.values()), np.empty(0)))
    if array.ndim == 4 and array.shape[3] == 3:
        array = array.transpose(0, 3, 1, 2)
    require(array.ndim == 4 and array.shape[1] == 3 and array.size, f"{source} must hold RGB images, (N, H, W, 3) or "
            f"(N, 3, H, W), not an array of shape {array.shape}; make three equal channels of grayscale")
    require(size in (None, array.shape[2]) and size in (None, array.shape[3]), f"{source} holds images of "
            f"{array.shape[3]}x{array.shape[2]} pixels, and the networks make {size}x{size}")
    require(array.dtype == np.uint8 or array.dtype.kind == "f" and -1.01 <= array.min() and array.max() <= 1.01,
            f"{source} must hold uint8, or float in [-1, 1], not {array.dtype} from {array.min()} to {array.max()}")
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images if array.dtype == np.uint8 else quantise(images, cfg.rounding)


def read_arrays(path):
    """{name: array} of an .npz or .npy file; nothing is unpickled."""
    try:
        content = np.load(path, allow_pickle=False)
        return {"arr_0": content} if isinstance(content, np.ndarray) else dict(content)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an array file that can be read: {error}") from error


def quantise(images, rounding):
    """float -1..1 -> uint8 0..255. Official code truncates, which makes images darker by half a grey level."""
    return to_uint8(images) if rounding == "round" else ((images.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)


def read_statistics(source):
    """(mean, covariance) from an .npz with `mu` and `sigma`, as EDM publishes them; None if source is anything else."""
    arrays = read_arrays(source) if source.endswith(".npz") else {}
    if not {"mu", "sigma"} <= set(arrays):
        return None
    mu, sigma = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    check_gaussian(mu, sigma, source)
    return mu, sigma


def kept(name, made_from, cfg, compute):
    """compute() -> dict, or what it returned for the same `made_from` before: kept in 05_<name>_<hash of made_from>.pt."""
    path = cfg.folder / f"05_{name}_{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}.pt"
    try:
        content = None if cfg.restart else read(path)
    except (FileNotFoundError, ValueError):  # not there yet, or damaged
        content = None
    wait_for_all()  # all have looked before one of them writes
    if content is None:
        content = compute()
        save(path, cfg, **content, made_from=repr(made_from))
    return content


# ------------------------------------------------------------------------------------------------- the table

def count_macs(net):
    """Multiply-adds of one call for one image, as the paper counts: convolutions and linear layers, without attention."""
    inputs = example_input(net, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*inputs)
    counts = counter.get_flop_counts()
    attention = [f"{type(net).__name__}.{name}" for name, module in net.named_modules() if isinstance(module, Attention)]
    return (counter.get_total_flops() - sum(sum(counts[name].values()) for name in attention)) // 2


def example_input(net, batch):
    """Noise, time and labels with which the network can be called."""
    device = next(net.parameters()).device
    noise = torch.randn(batch, net.args["channels"], net.args["image_size"], net.args["image_size"], device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device) if net.args["classes"] else None
    return noise, torch.zeros(batch, device=device), labels


def seconds_per_call(net, batch, precision):
    """Median time of one call for a batch of images; waits for the GPU, and warms up first."""
    inputs = example_input(net, batch)

    def call():
        with torch.no_grad(), autocast(precision, inputs[0].device):  # in every call: autocast makes the weights bf16 anew
            net(*inputs)

    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=0.2).median


def straightness(net, noise, steps, labels=None):
    """S(v) = E || (x - z) - v(x_t, t) ||^2 along the flow's own path, per pixel: 0 if it is straight. Paper, Section 4.

    An Euler path ends at x = z + mean v, so this is the variance of v along the path: mean |v|^2 - |x - z|^2.
    """
    energy = []

    def observed(x, t, labels):
        v = net(x, t, labels)
        energy.append(v.square().mean())
        return v

    x = euler(observed, noise, steps, labels)
    return (torch.stack(energy).mean() - (x - noise).square().mean()).item()


COLUMNS = ("parameters", "macs", "calls", "ms_one", "ms_bulk", "straightness")


def table(rows, metric):
    """The rows as lines of Markdown."""
    def cell(value, form):
        return "-" if value is None else form.format(value)

    lines = [f"| network | parameters | MACs | calls | ms per image, one by one | ... in bulk | straightness | {metric} |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row["network"], cell(row["parameters"], "{:,}"), cell(row["macs"] and row["macs"] / 1e6, "{:,.1f} M"),
                 cell(row["calls"], "{}"), cell(row["ms_one"], "{:.2f}"), cell(row["ms_bulk"], "{:.2f}"),
                 cell(row["straightness"], "{:.3f}"), cell(row["distance"], "{:.3f}")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


class Exported(nn.Module):
    """A network with its sampler: noise z (B, C, H, W), and labels where it knows classes -> images, in about [-1, 1]."""

    def __init__(self, net, sampler, steps):
        super().__init__()
        self.net, self.sampler, self.steps = net, sampler, steps

    def forward(self, noise, labels=None):
        return self.sampler(self.net, noise, self.steps, labels)


def export(path, net, artifact, steps):
    """Writes a network as one file for torch.export.load(path).module()(noise), for any batch size, in float32 on a CPU."""
    net = copy.deepcopy(net).cpu().to(memory_format=torch.contiguous_format)
    noise, _, labels = example_input(net, 2)
    inputs, batch = (noise,) if labels is None else (noise, labels), torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(Exported(net, sampler_of(artifact)[0], steps).eval(), inputs,
                                      dynamic_shapes=tuple({0: batch} for _ in inputs))
    with writing(path) as file:
        torch.export.save(program, file)


def write_images(cfg, name, net, artifact, steps):
    """Writes cfg.png images (of the noise that is measured too) as 05_<name>_images/000000.png ..., and the first as a grid."""
    require(cfg.png >= world(), f"--png {cfg.png} images cannot be shared out to {world()} processes")
    folder = cfg.folder / f"05_{name}_images"
    if rank() == 0:  # nobody should take those of another run for ours
        for old in folder.glob("[0-9]*.png"):
            old.unlink()
    wait_for_all()
    sampler, _ = sampler_of(artifact)
    mine, labels = share(cfg.png), labels_for(cfg.seed, cfg.png, net.args["classes"])
    indices, my_labels = torch.arange(cfg.png)[mine], None if labels is None else labels[mine]
    first = []
    for rows, x in generate(net, cfg.seed, EVALUATION + indices, steps, my_labels, cfg.sample_batch, sampler, cfg.precision):
        for i, image in zip(indices[rows].tolist(), quantise(x, cfg.rounding)):
            with writing(folder / f"{i:06d}.png", everywhere=True) as file:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
        first = [*first, *x][:64]
    save_grid(f"{folder}.png", torch.stack(first).split(8))
    wait_for_all()
    say(f"wrote {cfg.png} images into {folder}, and {folder}.png")


def feature_network(cfg, size, device):
    """(F, D, protocol): F maps uint8 (B, 3, H, W) to features (B, D). For metric none, F is None and D is 0."""
    if cfg.metric == "none":
        return None, 0, {"metric": "none"}
    if cfg.metric == "fd_shapes":
        net = train_shape_net(*draw_shapes(16_384, size), cfg.feature_steps, cfg.seed, device)
        same_in_all_processes(*net.state_dict().values())
        digest = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in net.state_dict().values())).hexdigest()[:16]
        features_of = torch.no_grad()(lambda images: net(from_uint8(images)))
        return features_of, net.head.in_features, {"metric": "FD-shapes", "classifier_steps": cfg.feature_steps, "classifier": digest}
    net, digest = load_inception(cfg, device)
    name = "FID" if digest.startswith(INCEPTION_SHA256) else f"FD-inception-{digest[:8]}"  # only those are FID's
    protocol = {"metric": name, "resize": cfg.resize, "inception_sha256": digest}
    return lambda images: inception_features(net, images, cfg.resize), net.fc.in_features, protocol


def main(cfg):
    device = start(cfg, "05 evaluation")
    out = cfg.folder
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # a distance is float32 on every GPU

    # 1. What is measured: networks, which must belong together, or the given images.
    loaded = []  # (key, name, network, artifact, steps)
    for key, file, name, steps in (("teacher", "01_teacher.pt", "teacher", cfg.teacher_steps),
                                   ("flow", "03_reflow.pt", "2-rectified flow", cfg.flow_steps),
                                   ("student", "04_student.pt", "student", cfg.student_steps)):
        if not cfg.images and cfg.only in ("all", key):
            loaded.append((key, name, *load_network(out / file, cfg, device, cfg.precision), steps))
            require_same_kind(loaded[0][1], loaded[0][2].args, out / file, loaded[-1][2].args)
    for key, _, net, artifact, steps in loaded:
        if cfg.png:
            write_images(cfg, key, net, artifact, steps)
        if cfg.export and key == "student":
            export(out / "05_student.pt2", net, artifact, steps)
            say(f"wrote {out}/05_student.pt2 | use: images = torch.export.load(PATH).module()(noise{', labels' * bool(net.label)})")
    if cfg.png or cfg.export:
        return
    networks = [(name, net, artifact, n) for _, name, net, artifact, steps in loaded for n in dict.fromkeys([steps, 1])]
    given = read_set(cfg.images, None, cfg) if cfg.images else None

    # 2. What it is compared with: images, or their statistics.
    require(not cfg.images or cfg.reference or cfg.metric == "fd_shapes",
            "--images needs --reference: a set of images, or an .npz with mu and sigma")
    trained_on = [artifact["settings"]["data"] for *_, artifact, _ in networks if "data" in artifact["settings"]]
    source = cfg.reference or ("shapes" if cfg.images else [*trained_on, None][0])
    source = source or load(out / "01_teacher.pt", cfg)["settings"]["data"]
    require(cfg.metric != "fd_shapes" or source == "shapes",
            f"FD-shapes measures drawings, not {source}: set --metric fid or none")
    size = networks[0][1].args["image_size"] if networks else given.shape[-1] if source == "shapes" else None
    statistics = read_statistics(source)  # (mean, covariance) or None
    real = None if statistics else read_set(source, size, cfg)
    if given is not None and real is not None:
        require(given.shape[2:] == real.shape[2:], f"{cfg.images} holds images of {given.shape[3]}x{given.shape[2]} pixels, and "
                f"{source} of {real.shape[3]}x{real.shape[2]}: bring them to one size first")

    # 3. The features of both, and the reference's Gaussian.
    features_of, n_features, protocol = feature_network(cfg, size, device)
    n_samples, n_reference = len(given) if cfg.images else cfg.n_samples, len(real) if real is not None else None
    for n, what in ((n_samples, cfg.images or "--n_samples"), (n_reference, source)):
        require(n is None or n >= n_features or cfg.allow_few, f"{what}: {n} images are fewer than the {n_features} features of "
                f"{protocol['metric']}, and the distance would come out too large. Give it more, or accept that with --allow_few")

    def gaussian_of(batches):
        sums_on = device if device.type == "cuda" else "cpu"
        parts = (part.to(device) for batch in batches for part in batch.split(cfg.feature_batch))
        return gaussian(map(features_of, parts), n_features, sums_on)

    def reference():
        mu, sigma = gaussian_of([real[share(len(real))]])
        return {"mu": mu.cpu(), "sigma": sigma.cpu()}

    if features_of:
        if statistics is None:
            made_from = (hashlib.sha256(real.numpy()).hexdigest(), real.shape, protocol, cfg.seed)
            statistics = [kept("reference", made_from, cfg, reference)[name] for name in ("mu", "sigma")]
        require(len(statistics[0]) == n_features, f"{source} has statistics of {len(statistics[0])} features, and "
                f"{protocol['metric']} has {n_features}")
    protocol |= {"n_samples": n_samples, "reference": source, "n_reference": n_reference}
    if real is None:
        protocol["reference_sha256"] = file_digest(source, "sha256")
    if networks:
        protocol |= {"precision": cfg.precision, "rounding": cfg.rounding, "noise_seed": cfg.seed, "first_index": EVALUATION}
    protocol_line = ", ".join(f"{key} {value}" for key, value in protocol.items())

    # 4. Every network from the same noise and labels, or the given images; each process makes a share of them.
    rows, pictures = [], {}
    if real is not None and cfg.metric != "fd_shapes":
        pictures["real"] = from_uint8(real[torch.linspace(0, len(real) - 1, 12).long()])
    require(n_samples >= world(), f"{n_samples} images cannot be shared out to {world()} processes")
    reference_key = hashlib.sha256(b"".join(a.numpy().tobytes() for a in statistics or [])).hexdigest()

    def measure(title, made_from, batches, facts):
        """Adds a row to the table: facts(), and the distance of this process's share of uint8 images, batches()."""
        def compute():
            images = iter(batches())
            first = next(images)
            distance = None
            if features_of:
                distance = frechet_distance(*gaussian_of(itertools.chain([first], images)), *statistics)
            row = {"network": title.split(",")[0], **dict.fromkeys(COLUMNS), **facts(), "distance": distance}
            return {"row": row, "picture": first[:12].clone()}

        found = kept("row", (made_from, reference_key, protocol_line, device.type, cfg.sample_batch), cfg, compute)
        rows.append(found["row"])
        pictures[title] = from_uint8(found["picture"])
        if features_of:
            say(f"measured | {title} | {found['row']['distance']:.3f} | {protocol_line}")

    mine = share(n_samples)
    if given is not None:
        measure(cfg.images, hashlib.sha256(given.numpy()).hexdigest(), lambda: given[mine].split(cfg.feature_batch), dict)
    elif cfg.metric == "fd_shapes":  # the floor: other drawings by the same hand
        drawings = draw_shapes(n_samples, size, seed=1)[0]
        measure("real (other drawings)", "drawings", lambda: drawings[mine].split(cfg.feature_batch), dict)
    indices = torch.arange(EVALUATION, EVALUATION + n_samples)
    for name, net, artifact, steps in networks:
        sampler, n_calls = sampler_of(artifact)
        calls, batch = n_calls(steps), min(cfg.sample_batch, n_samples)
        labels = labels_for(cfg.seed, n_samples, net.args["classes"])
        my_labels, few_labels = (None, None) if labels is None else (labels[mine], labels[:128].to(device))

        def samples():
            made = generate(net, cfg.seed, indices[mine], steps, my_labels, cfg.sample_batch, sampler, cfg.precision)
            return (quantise(x, cfg.rounding) for _, x in made)

        def facts():
            noise = noise_for(cfg.seed, indices[:128], (3, size, size)).to(device)
            with autocast(cfg.precision, device):
                curved = straightness(net, noise, steps, few_labels) if sampler is euler and steps > 1 else None
            ms_one, ms_bulk = (1000 * calls * seconds_per_call(net, n, cfg.precision) / n for n in (1, batch))
            return {"calls": calls, "parameters": count_parameters(net), "macs": count_macs(net), "ms_one": ms_one,
                    "ms_bulk": ms_bulk, "straightness": curved}

        measure(f"{name}, {calls} call{'s' * (calls != 1)}", (artifact["digest"], steps), samples, facts)

    # 5. The table and the picture.
    stem = "05_images" if cfg.images else "05_results" if cfg.only == "all" else f"05_{cfg.only}"
    picture = "05_samples.png" if stem == "05_results" else f"{stem}.png"
    lines = table(rows, protocol["metric"])
    with writing(out / f"{stem}.json") as file:
        file.write(json.dumps({"preset": cfg.preset, "protocol": protocol, "rows": rows}, indent=1).encode())
    with writing(out / f"{stem}.md") as file:
        file.write("\n".join([*lines, "", protocol_line, ""]).encode())
    save_grid(out / picture, list(pictures.values()), list(pictures))
    say("\n".join(["", *lines, "", protocol_line, ""]))
    say(f"wrote {out}/{stem}.md, {stem}.json, {picture}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
