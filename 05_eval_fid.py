"""Stage 05: how far are the images of teacher, 2-rectified flow and student from real ones?

A distance compares two sets of images by the features that a fixed network F finds in them. Each set becomes
a Gaussian (mean m and covariance S of its features), and two Gaussians have a distance in closed form (the
Frechet distance; Heusel et al. 2017, 1706.08500):

    d = |m1 - m2|^2 + tr( S1 + S2 - 2 (S1 S2)^(1/2) )

If F is the Inception network of 2015 with its published weights, this is FID. The resize, the rounding and
the number of images change it: they are printed below the table, and only equal ones may be compared. For
`shapes` F is a small classifier of drawings, the judge: its distance is FD-shapes, comparable with nothing
but itself. The judge also says how often it finds the class that was asked for ("red triangle"): named as
asked. All networks are judged by images made from the same noises, which nothing was trained on. --images SET
--reference SET measures any images. --png N only writes images, as files; --label "red triangle" says of what
(a class has a number where it has no name).

Reads   out/<preset>/01_teacher.pt, 03_reflow.pt, 04_student.pt; the teacher's data; Inception's weights
Writes  out/<preset>/05_results.md, 05_results.json, 05_samples.png; with --only NAME 05_NAME.*, with
        --images 05_images.*; with --png 05_NAME_images/000000.png ...
Takes   shapes: 10 s on 2 CPU cores (AMD EPYC, torch 2.13)
"""
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common import (CLASSES, EVALUATION, RANK, WORLD, Attention, UserError, download, draw_shapes,
                    fingerprint, from_uint8, labels_for, load, load_images, load_network, read, require, run,
                    samples, save_grid, say, start, to_uint8, wait_for_all, writing)

SETTINGS = [
    # name            shapes       cifar10_quick  cifar10     ffhq64      imagenet64
    ("only",          "all",       "all",         "all",      "all",      "all",
     "networks to evaluate", ("all", "teacher", "flow", "student")),
    ("images",        "",          "",            "",         "",         "",         "a folder or zip"),
    ("reference",     "",          "",            "",         "",         "",         "images, or .npz"),
    ("n_samples",     1024,        10_000,        50_000,     50_000,     50_000,     "images per network"),
    ("teacher_steps", 12,          50,            100,        100,        100,        "calls. paper: RK45"),
    ("flow_steps",    6,           25,            100,        100,        100,        "calls. paper: RK45"),
    ("student_steps", 1,           1,             1,          1,          1,          "calls"),
    ("metric",        "fd_shapes", "fid",         "fid",      "fid",      "fid",
     "distance", ("fd_shapes", "fid", "none")),
    ("resize",        "tf1",       "tf1",         "tf1",      "tf1",      "tf1", "", ("tf1", "pytorch_fid")),
    ("rounding",      "round",     "truncate",    "truncate", "truncate", "truncate",
     "to uint8. paper: truncate", ("round", "truncate")),
    ("allow_few",     False,       False,         False,      False,      False,      "few images, too"),
    ("precision",     "fp32",      "fp32",        "fp32",    "fp32",   "fp32", "", ("fp32", "bf16", "auto")),
    ("png",           0,           0,             0,          0,          0,          "images to write"),
    ("label",         "",          "",            "",         "",         "",         "--png: the class"),
]
BATCH = 128  # ours: images per call


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The Frechet distance of two Gaussians, a float >= 0, in float64. mu (D,), sigma (D, D).

    With S = L L^T for both, tr (S1 S2)^(1/2) is the sum of the singular values of L1^T L2: their squares are
    the eigenvalues of S1 S2. L comes from the eigenvectors of S without those of eigenvalue 0, which is exact
    for singular covariances too (fewer images than features), where a matrix root is not. Raises UserError.
    """
    factors = []
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).cpu().double() for a in (mu1, sigma1, mu2, sigma2))
    for mu, sigma in ((mu1, sigma1), (mu2, sigma2)):
        require(mu.shape == mu1.shape and sigma.shape == (len(mu), len(mu)), "the Gaussians differ in "
                f"dimension: means {tuple(mu1.shape)} and {tuple(mu.shape)}, covariance {tuple(sigma.shape)}")
        require(mu.isfinite().all() and sigma.isfinite().all(), "a mean or covariance is not finite")
        require((sigma - sigma.T).abs().max() <= 1e-6 * sigma.abs().max(), "a covariance is not symmetric")
        w, v = torch.linalg.eigh((sigma + sigma.T) / 2)
        keep = w > len(w) * torch.finfo(w.dtype).eps * w.max()
        factors.append(v[:, keep] * w[keep].sqrt())  # L, (D, rank)
    root_trace = torch.linalg.svdvals(factors[0].T @ factors[1]).sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace).item())


def gaussian(batches, dimensions):
    """Mean (D,) and covariance (D, D), float64, of the features (B, D) in the batches of all processes."""
    n, total = torch.zeros(1, dtype=torch.float64), torch.zeros(dimensions, dtype=torch.float64)
    outer = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    for features in batches:
        features = features.cpu().double()
        n += len(features)
        total += features.sum(0)
        outer += features.T @ features
    for tensor in (n, total, outer) if WORLD > 1 else ():
        dist.all_reduce(tensor)
    mu = total / n
    return mu, (outer - n * torch.outer(mu, mu)) / (n - 1).clamp(min=1)


def count_macs(net):
    """Multiply-adds of a call for one image, without the attention blocks, as the paper counts."""
    x, labels = torch.zeros(1, 3, net.args["image_size"], net.args["image_size"]).to(net.conv_in.weight), None
    if net.args["classes"]:
        labels = torch.zeros(1, dtype=torch.long, device=x.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x, x[:, 0, 0, 0], labels)
    macs = counter.get_total_flops() // 2
    for name, module in net.named_modules():
        if isinstance(module, Attention):
            macs -= sum(counter.get_flop_counts()[f"UNet.{name}"].values()) // 2
    return macs


def quantise(x, rounding):
    """float -1..1 -> uint8. Official code truncates, which makes images darker by half a grey level."""
    return to_uint8(x) if rounding == "round" else ((x.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)


def class_names(net):
    """The names of the network's classes, numbers if they have none. Empty for a network without classes."""
    return net.class_names or [str(i) for i in range(net.args["classes"])]


def make_images(net, cfg, n, steps, labels):
    """This process's images of the n that the network makes, uint8 (N, 3, H, W). labels (n,) or None."""
    made = [torch.empty(0, 3, net.args["image_size"], net.args["image_size"], dtype=torch.uint8)]
    for first in range(RANK, n, WORLD * BATCH):
        numbers = range(n)[first:first + WORLD * BATCH:WORLD]
        made.append(quantise(samples(net, cfg.seed, numbers, steps, labels), cfg.rounding))
    return torch.cat(made)


def write_png(cfg, key, net, steps):
    """Writes cfg.png images as 05_<key>_images/000000.png ..., and the first of them as a grid."""
    folder, names = cfg.folder / f"05_{key}_images", class_names(net)
    labels = labels_for(cfg.seed, cfg.png, len(names))
    if cfg.label:
        known = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        require(cfg.label in names, f"--label {cfg.label}: the {key} knows {known or 'no labels'}")
        labels = torch.full((cfg.png,), names.index(cfg.label))
    if RANK == 0:
        for old in folder.glob("[0-9]*.png"):  # of an earlier run
            old.unlink()
    wait_for_all()
    images = make_images(net, cfg, cfg.png, steps, labels)
    for i, image in zip(range(RANK, cfg.png, WORLD), images):
        with writing(folder / f"{i:06d}.png") as file:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    save_grid(f"{folder}.png", from_uint8(images[:64]).split(8))
    say(f"wrote {cfg.png} images into {folder}, and {folder}.png")


def feature_network(cfg, device):
    """(F, fc, name, id of its weights): F maps uint8 (B, 3, H, W) to features (B, D), fc these to scores."""
    if cfg.metric == "fid":
        net = load_inception(device)
        return lambda images: inception_features(net, images, cfg.resize), net.fc, "FID", INCEPTION_SHA256
    judge = read(Path(__file__).parent / "extras" / "shapes_judge.pt")
    net = ShapeNet().to(device).eval()
    net.load_state_dict(judge["weights"])
    say(f"judge | names shape and colour of {judge['accuracy']:.2%} of unseen drawings; {judge['made_with']}")
    return lambda images: net(from_uint8(images)), net.fc, "FD-shapes", judge["id"]


def table(rows, metric):
    """The rows as lines of Markdown."""
    lines = [f"| network | calls | {metric} | named as asked | parameters | MACs | ms per image |",
             "|---|" + "---:|" * 6]
    for row in rows:
        cells = [row["network"]]
        for key, form in (("calls", ""), ("distance", ".3f"), ("named", ".1%"), ("parameters", ","),
                          ("macs", ","), ("ms", ".2f")):
            cells.append("-" if row[key] is None else format(row[key], form))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@torch.no_grad()
def main(cfg):
    device = start(cfg, "05 evaluation")
    require(min(cfg.n_samples - 1, cfg.teacher_steps, cfg.flow_steps, cfg.student_steps) >= 1,
            "--n_samples must be at least 2, and the steps at least 1")
    require(not cfg.images or cfg.reference and not cfg.png, "--images needs --reference, and takes no --png")
    require(cfg.png or not cfg.label, "--label needs --png N, the number of images to write")

    # 1. The networks. With --png they write images, and that is all.
    networks, size = [], None  # (name, net, calls)
    for key, file in (("teacher", "01_teacher.pt"), ("flow", "03_reflow.pt"), ("student", "04_student.pt")):
        if cfg.only in ("all", key) and not cfg.images:
            net, _ = load_network(cfg, file, device)
            size, steps = net.args["image_size"], getattr(cfg, f"{key}_steps")
            name = "2-rectified flow" if key == "flow" else key
            networks += [(name, net, calls) for calls in sorted({1, steps}, reverse=True)]
            if cfg.png:
                write_png(cfg, key, net, steps)
    if cfg.png:
        return

    # 2. What they are compared with, and images that no network made: the given ones, or new drawings.
    source = cfg.reference or load(cfg, "01_teacher.pt")["settings"]["data"]
    require(cfg.metric != "fd_shapes" or source == "shapes",
            f"FD-shapes measures drawings, not {source}: set --metric fid or none")
    given, given_labels, real = None, None, None
    if cfg.images:
        given = load_images(cfg.images, None)[0]
    elif cfg.metric == "fd_shapes":
        given, given_labels = draw_shapes(cfg.n_samples, size, seed=1)
    if cfg.metric != "none" and not source.endswith(".npz"):
        real = load_images(source, given.shape[-1] if cfg.images and source == "shapes" else size)[0]
        require(given is None or given.shape[1:] == real.shape[1:],
                f"{cfg.images} holds images of another size than {source}: bring them to one size first")

    # 3. The Gaussian of the reference's features.
    n_samples = len(given) if cfg.images else cfg.n_samples
    protocol = {"metric": "none", "reference": source, "n_samples": n_samples, "precision": cfg.precision,
                "rounding": cfg.rounding, "seed": cfg.seed, "first_noise": EVALUATION}
    if cfg.metric != "none":
        features_of, fc, metric, judge = feature_network(cfg, device)
        n_fewest = n_samples if real is None else min(n_samples, len(real))
        require(n_fewest >= fc.in_features or cfg.allow_few, f"{n_fewest} images are fewer than the "
                f"{fc.in_features} features of {metric}, which makes the distance too large. Take more, or "
                "--allow_few")
        protocol |= {"metric": metric, "judge": judge, "resize": cfg.resize if metric == "FID" else None}
        if real is None:
            mu, sigma = read_statistics(source)
            require(len(mu) == fc.in_features, f"{source} does not have {fc.in_features} features")
        else:
            features = (features_of(part.to(device)) for part in real[RANK::WORLD].split(BATCH))
            mu, sigma = gaussian(features, fc.in_features)
            protocol["n_reference"] = len(real)
        protocol["reference_id"] = fingerprint(mu, sigma)

    # 4. A row of the table for each set of images. In the picture a column has one noise and one request.
    rows, pictures, names = [], {}, class_names(networks[0][1]) if networks else []
    requests = torch.tensor([7 * i % len(names) for i in range(12)]) if names else None
    if given is not None:
        networks.insert(0, (cfg.images or "real", None, None))
    for name, net, calls in networks:
        row = dict.fromkeys(("network", "calls", "distance", "named", "parameters", "macs", "ms"))
        row |= {"network": name, "calls": calls}
        if net is None:
            images, labels, shown = given[RANK::WORLD], given_labels, given[:12]
            if names:  # drawings of what is requested
                drawings, kinds = draw_shapes(500, size, seed=1)
                shown = torch.stack([drawings[kinds == y][0] for y in requests])
            pictures[name] = from_uint8(shown)
        else:
            labels, began = labels_for(cfg.seed, cfg.n_samples, len(names)), time.time()
            images = make_images(net, cfg, cfg.n_samples, calls, labels)
            row |= {"ms": 1000 * (time.time() - began) / max(1, len(images)), "macs": count_macs(net),
                    "parameters": sum(p.numel() for p in net.parameters())}
            pictures[f"{name}, calls: {calls}"] = samples(net, cfg.seed, range(12), calls, requests)
        if cfg.metric != "none":
            parts = [part.to(device) for part in images.split(BATCH)]
            row["distance"] = frechet_distance(*gaussian(map(features_of, parts), fc.in_features), mu, sigma)
            if metric == "FD-shapes" and labels is not None:
                found = torch.cat([fc(features_of(part)).argmax(1) for part in parts]).cpu()
                right = found == labels[RANK::WORLD]
                row["named"] = gaussian([right[:, None]], 1)[0].item()  # the mean of all processes
            say(f"measured | {name}, calls: {calls} | {metric} {row['distance']:.3f}")
        rows.append(row)

    # 5. The table and the picture.
    if RANK == 0:
        stem = cfg.folder / f"05_{'images' if cfg.images else 'results' if cfg.only == 'all' else cfg.only}"
        lines = [*table(rows, protocol["metric"]), "", ", ".join(f"{k} {protocol[k]}" for k in protocol)]
        with writing(f"{stem}.md") as file:
            file.write("\n".join([*lines, ""]).encode())
        with writing(f"{stem}.json") as file:
            file.write(json.dumps({"protocol": protocol, "rows": rows}, indent=1).encode())
        picture = cfg.folder / "05_samples.png" if stem.name == "05_results" else f"{stem}.png"
        save_grid(picture, list(pictures.values()), list(pictures), names and [names[y] for y in requests])
        say("\n".join(["", *lines, "", f"wrote {stem}.md, {stem}.json, {picture}"]))


def read_statistics(path):
    """mu (D,) and sigma (D, D) from an .npz, as EDM publishes them. Raises UserError."""
    try:
        content = np.load(path, allow_pickle=False)
        return torch.from_numpy(content["mu"]).double(), torch.from_numpy(content["sigma"]).double()
    except Exception as error:  # a damaged file can fail in many ways
        raise UserError(f"{path} is no .npz with mu and sigma that can be read: {error}") from error


# ------------------------------------------------------------------------------------------------- Inception
# A transcription of a published network; nothing from here on is needed to follow the method.

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")  # 91 MB
INCEPTION_SHA256 = "6726825d"  # the first digits


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


class Inception(nn.Module):
    """Inception-v3 as FID uses it (the TensorFlow network of 2015-12-05), with pytorch-fid's names.

    Maps images (B, 3, 299, 299), scaled as in inception_features, to features (B, 2048). A layer is made when
    forward first comes to it, so that all about it stands in one place.
    """

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2048, 1008)  # in the published file; FID needs only its width
        self(torch.zeros(1, 3, 75, 75))  # makes the layers

    def chain(self, x, name, *layers, **more):
        """Convolutions (channels, kernel) one after the other, `more` for the last: name_1, name_2, ..."""
        for i, (c_out, kernel) in enumerate(layers, 1):
            full = f"{name}_{i}" if len(layers) > 1 else name
            if full not in self._modules:
                conv = Conv(x.shape[1], c_out, kernel, **(more if i == len(layers) else {}))
                self.add_module(full, conv.eval())
            x = self._modules[full](x)
        return x

    def forward(self, x):
        chain, row, column = self.chain, (1, 7), (7, 1)
        x = chain(x, "Conv2d_1a_3x3", (32, 3), stride=2)
        x = chain(x, "Conv2d_2a_3x3", (32, 3), padding=0)
        x = chain(x, "Conv2d_2b_3x3", (64, 3))  # (B, 64, 147, 147)
        x = chain(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1", (80, 1))
        x = chain(x, "Conv2d_4a_3x3", (192, 3), padding=0)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        for name, c_pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            name += "/branch"
            x = torch.cat([chain(x, name + "1x1", (64, 1)), chain(x, name + "5x5", (48, 1), (64, 5)),
                           chain(x, name + "3x3dbl", (64, 1), (96, 3), (96, 3)),
                           chain(average(x), name + "_pool", (c_pool, 1))], dim=1)
        name = "Mixed_6a/branch"
        x = torch.cat([chain(x, name + "3x3", (384, 3), stride=2),
                       chain(x, name + "3x3dbl", (64, 1), (96, 3), (96, 3), stride=2),
                       F.max_pool2d(x, 3, 2)], dim=1)  # (B, 768, 17, 17)
        for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            name += "/branch"
            x = torch.cat([chain(x, name + "1x1", (192, 1)),
                           chain(x, name + "7x7", (c, 1), (c, row), (192, column)),
                           chain(x, name + "7x7dbl", (c, 1), (c, column), (c, row), (c, column), (192, row)),
                           chain(average(x), name + "_pool", (192, 1))], dim=1)
        name = "Mixed_7a/branch"
        x = torch.cat([chain(x, name + "3x3", (192, 1), (320, 3), stride=2),
                       chain(x, name + "7x7x3", (192, 1), (192, row), (192, column), (192, 3), stride=2),
                       F.max_pool2d(x, 3, 2)], dim=1)  # (B, 1280, 8, 8)
        row, column = (1, 3), (3, 1)
        for name, pool in (("Mixed_7b", average), ("Mixed_7c", nn.MaxPool2d(3, 1, 1))):
            name += "/branch"
            h = chain(x, name + "3x3_1", (384, 1))
            g = chain(chain(x, name + "3x3dbl_1", (448, 1)), name + "3x3dbl_2", (384, 3))
            x = torch.cat([chain(x, name + "1x1", (320, 1)),
                           chain(h, name + "3x3_2a", (384, row)), chain(h, name + "3x3_2b", (384, column)),
                           chain(g, name + "3x3dbl_3a", (384, row)),
                           chain(g, name + "3x3dbl_3b", (384, column)),
                           chain(pool(x), name + "_pool", (192, 1))], dim=1)  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def resize_tf1(x, size=299):
    """Bilinear resize of (B, C, H, W) as in TensorFlow 1: source = target * in / out, no half pixels."""
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
    """uint8 (N, 3, H, W) -> features (N, 2048). resize: "tf1" (paper) or "pytorch_fid"."""
    x = images_uint8.float()
    if resize == "tf1":
        return net((resize_tf1(x) - 128) / 128)
    return net(F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) / 127.5 - 1)


def load_inception(device):
    """Inception with the published weights, in eval mode. Raises UserError where they cannot be had."""
    path, net = download(INCEPTION_URL, INCEPTION_SHA256, "go without: --metric none"), Inception()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    net.load_state_dict({key.replace(".branch", "/branch"): value for key, value in weights.items()})
    return net.to(device).eval()


# ------------------------------------------------------------------------------------------------ FD-shapes

class ShapeNet(nn.Module):
    """The judge of FD-shapes: a small classifier of drawings, which extras/train_judge.py has trained.

    Maps images (B, 3, H, W) to features (B, 112), the means of all channels of three layers, so that edges
    count as well as shapes. fc(features) (B, 18): the scores of the classes.
    """

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.layer3 = Conv(3, 16, 3), Conv(16, 32, 3), Conv(32, 64, 3)
        self.fc = nn.Linear(112, len(CLASSES))

    def forward(self, x):
        h1 = self.layer1(x)  # (B, 16, H, W)
        h2 = self.layer2(F.max_pool2d(h1, 2))  # (B, 32, H/2, W/2)
        h3 = self.layer3(F.max_pool2d(h2, 2))  # (B, 64, H/4, W/4)
        return torch.cat([h.mean(dim=(2, 3)) for h in (h1, h2, h3)], dim=1)


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
