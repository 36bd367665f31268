"""Stage 05: how far are the images of teacher, flow and student from real ones?

A distance between two sets of images compares the features that a fixed network finds in them.
Each set becomes a Gaussian, with the mean m and the covariance S of its features, and two
Gaussians have a distance in closed form (the Frechet distance; Heusel et al. 2017, 1706.08500):

    d = |m1 - m2|^2 + tr( S1 + S2 - 2 (S1 S2)^(1/2) )

If that network is the Inception network of 2015 with its published weights, d is called FID. The
resize, the rounding and the number of images change it. They are printed below the table, and only
numbers with the same ones may be compared.

The network can also be a small classifier of such images, a judge: of drawings for `shapes`, of
photos for `cifar10_quick`, or one of your own (extras/train_judge.py). Then d is called FD-shapes
or FD-cifar10, and can be compared with nothing but itself. Real drawings that the judge has not
seen are not quite at 0, because their mean and covariance come from a finite number of them. A
judge also says how often an image matches the request: whether it shows the class that was asked
for, such as "red triangle".

All networks are judged by images from the same noises, which nothing was trained on.

Reads   out/<preset>/01_teacher.pt, 03_reflow.pt, 04_student.pt; the teacher's data; a judge, or
        with --metric fid Inception's weights
Writes  out/<preset>/05_results.md, 05_results.json, 05_samples.png; with --only NAME 05_NAME.*
Takes   shapes: 10 s on 2 CPU cores (AMD EPYC, torch 2.13)

To make images of your own choice: extras/sample.py. To compare any two sets: extras/fid.py.
"""
import json
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from common import (RANK, WORLD, Attention, compiled, download, fingerprint,
                    from_uint8, labels_for, load, load_data, load_network, read, require, run,
                    samples, sampling_batch, save_grid, say, start, to_uint8, writing)
from extras.drawings import draw_shapes

SETTINGS = {
    "only": dict(others="all", choices=("all", "teacher", "flow", "student"),
                 help="the networks to evaluate"),
    "reference": dict(others="", help="images to compare with, if not the teacher's data"),
    "n_samples": dict(shapes=1024, cifar10_quick=10_000, others=50_000, help="images per network"),
    # Network calls for an image. paper: RK45, an adaptive solver, for teacher and flow
    "teacher_steps": dict(shapes=12, cifar10_quick=25, others=100, help="Euler steps"),
    "flow_steps": dict(shapes=6, cifar10_quick=8, others=100, help="Euler steps"),
    "student_steps": dict(others=1, help="Euler steps"),
    "metric": dict(shapes="shapes", cifar10_quick="cifar10", others="fid",
                   help="whose features: fid (Inception's), or a judge's: shapes, cifar10, a file; "
                        "or none"),
    "resize": dict(others="tf1", choices=("tf1", "pytorch_fid"), help="for FID. paper: tf1"),
    "rounding": dict(shapes="round", others="truncate", choices=("round", "truncate"),
                     help="to uint8. paper: truncate"),
    "allow_few": dict(others=False, help="fewer images than features, too"),
    "precision": dict(shapes="fp32", others="auto", choices=("fp32", "bf16", "auto"),
                      help="of the networks that make the images"),
}
BATCH = 128  # ours: images per call of the network that measures them


def root(sigma):
    """L (D, rank) with sigma = L L^T (D, D), from the eigenvectors with an eigenvalue above 0."""
    w, v = torch.linalg.eigh(sigma)
    keep = w > len(w) * torch.finfo(w.dtype).eps * w.max()
    return v[:, keep] * w[keep].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The Frechet distance of two Gaussians, a float >= 0. mu (D,), sigma (D, D), all float64.

    With S = L L^T for both, tr (S1 S2)^(1/2) is the sum of the singular values of A = L1^T L2. The
    squares of these are the eigenvalues of A A^T = L1^T (L2 L2^T L1). XY and YX share all
    eigenvalues that are not 0, so they are those of L2 L2^T L1 L1^T = S2 S1, and so of S1 S2. This
    is exact for singular covariances, too (fewer images than features), where the root of a matrix
    is not.
    """
    root_trace = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    # d = |m1 - m2|^2 + tr( S1 + S2 - 2 (S1 S2)^(1/2) )
    distance = (mu1 - mu2).square().sum()
    distance = distance + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return max(0.0, distance.item())


def add_up(*tensors):
    """Each tensor becomes the sum of those that all processes have."""
    if WORLD > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def gaussian(batches, dimensions):
    """Mean (D,) and covariance (D, D), float64, of the features (B, D) of all processes."""
    n = torch.zeros(1, dtype=torch.float64)
    total = torch.zeros(dimensions, dtype=torch.float64)
    outer = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    for features in batches:
        features = features.cpu().double()
        n += len(features)
        total += features.sum(0)
        outer += features.T @ features
    add_up(n, total, outer)
    mu = total / n
    outer = outer - n * torch.outer(mu, mu)
    return mu, outer / (n - 1).clamp(min=1)


def count_macs(net):
    """Multiply-adds of a call for one image, without the attention blocks, as the paper counts."""
    with FlopCounterMode(display=False) as counter:
        samples(net, 0, range(1), 1)  # one image in one call
    operations = counter.get_total_flops()
    for name, module in net.named_modules():
        if isinstance(module, Attention):
            operations -= sum(counter.get_flop_counts()[f"UNet.{name}"].values())
    return operations // 2


def quantise(x, rounding):
    """float -1..1 -> uint8. Official code truncates: images get darker by half a grey level."""
    if rounding == "round":
        return to_uint8(x)
    x = (x.clamp(-1, 1) + 1) / 2
    return (255 * x).to(torch.uint8)


def make_images(net, fast, cfg, n, steps, labels):
    """The network makes n images; this process its share of them: uint8 (N, 3, H, W).

    labels: (n,) or None. fast: the same network, compiled for batches of sampling_batch(net).
    """
    batch, mine, made = sampling_batch(net), range(RANK, n, WORLD), []
    for first in range(0, len(mine), batch):
        numbers = mine[first:first + batch]
        network = fast if len(numbers) == batch else net
        x = samples(network, cfg.seed, numbers, steps, labels)
        made.append(quantise(x, cfg.rounding))
    return torch.cat(made)


def feature_network(cfg, device):
    """(features_of, fc, classes, facts) of the network that measures images.

    features_of: uint8 (B, 3, H, W) -> features (B, D); fc: features -> scores of classes. classes:
    the names that a judge knows, or []. facts, for the line below the table: what the distance is
    called, and which weights the network has.
    """
    if cfg.metric == "fid":
        net = load_inception(device)
        facts = {"metric": "FID", "judge": INCEPTION_SHA256, "resize": cfg.resize}
        return partial(inception_features, net, resize=cfg.resize), net.fc, [], facts
    path = Path(cfg.metric)
    if not path.suffix:
        path = Path(__file__).parent / "extras" / f"{cfg.metric}_judge.pt"
    require(path.exists(), f"--metric {cfg.metric}: choose fid, none, shapes, cifar10, or the file "
            "of a judge that extras/train_judge.py made")
    judge = read(path)
    net = Judge(**judge["network"])
    net.load_state_dict(judge["weights"])
    net = net.to(device).eval()
    say(f"judge | right on {judge['accuracy']:.2%} of unseen images; {judge['made_with']}")
    name = path.stem.removesuffix("_judge")
    facts = {"metric": f"FD-{name}", "judge": judge["id"]}
    return net.features, net.fc, judge["classes"], facts


COLUMNS = {"network": "", "calls": "", "distance": ".3f", "matches": ".1%", "parameters": ",",
           "macs": ",", "ms": ".2f"}  # of a row, with their formats


def table(rows, metric):
    """The rows, as lines of Markdown."""
    lines = [f"| network | calls | {metric} | matches the request | parameters | MACs | ms/image |",
             "|---|" + "---:|" * 6]
    for row in rows:
        line = "|"
        for key, form in COLUMNS.items():
            cell = format(row[key], form) if key in row else "-"
            line += f" {cell} |"
        lines.append(line)
    return lines


@torch.no_grad()
def main(cfg):
    device = start(cfg, "05 evaluation")
    require(cfg.n_samples >= max(2, WORLD), "--n_samples must be at least 2, and as many as there "
            "are processes")

    # 1. The networks, each with its usual number of calls and with a single one.
    networks = []  # (name, network, calls)
    for key, file, name, steps in (("teacher", "01_teacher.pt", "teacher", cfg.teacher_steps),
                                   ("flow", "03_reflow.pt", "2-rectified flow", cfg.flow_steps),
                                   ("student", "04_student.pt", "student", cfg.student_steps)):
        if cfg.only in ("all", key):
            net, _ = load_network(cfg, file, device)
            networks.append((name, net, steps))
            if steps > 1:
                networks.append((name, net, 1))
    size, names = net.args["image_size"], net.class_names  # the same for all of them

    # 2. The real images, and the Gaussian of their features.
    protocol = {"metric": "none", "n_samples": cfg.n_samples, "precision": cfg.precision,
                "rounding": cfg.rounding, "seed": cfg.seed}
    if cfg.metric != "none":
        features_of, fc, judge_classes, facts = feature_network(cfg, device)
        protocol.update(facts)
        source, real = reference_images(cfg, size, judge_classes)
        dimensions = fc.in_features
        fewest = min(cfg.n_samples, len(real))
        require(fewest >= dimensions or cfg.allow_few,
                f"{fewest} images are fewer than the {dimensions} features of {facts['metric']}, "
                "which makes the distance too large. Take more, or --allow_few")
        parts = real[RANK::WORLD].split(BATCH)
        mu, sigma = gaussian((features_of(part.to(device)) for part in parts), dimensions)
        protocol.update(reference=source, n_reference=len(real),
                        reference_id=fingerprint(mu, sigma))

    # 3. Distance and share of matches of any images. images: this process's share of them, uint8
    # (N, 3, H, W), every one in WORLD; labels: those of all images, or None.
    def measure(images, labels):
        if cfg.metric == "none":
            return {}
        features = [features_of(part.to(device)) for part in images.split(BATCH)]
        found = gaussian(features, dimensions)
        scores = {"distance": frechet_distance(*found, mu, sigma)}
        if labels is not None and names == judge_classes:
            seen = fc(torch.cat(features)).argmax(1).cpu()
            right = (seen == labels[RANK::WORLD]).sum()
            add_up(right)
            scores["matches"] = right.item() / cfg.n_samples
        return scores

    # 4. A row of the table for each set of images. In the picture, a column has one request and
    # one noise: only the row of real drawings has none.
    rows, pictures, requests, columns = [], {}, None, []
    if names:
        requests = torch.arange(12) * 7 % len(names)  # neighbours are similar: mix them
        columns = [names[request] for request in requests]
    if cfg.metric == "shapes":  # a program can draw more real images
        drawings, labels = draw_shapes(cfg.n_samples, size, seed=1)
        rows.append({"network": "real", **measure(drawings[RANK::WORLD], labels)})
        shown, labels = draw_shapes(1024, size, seed=1)  # enough to have all classes
        if names:
            shown = torch.stack([shown[labels == request][0] for request in requests])
        pictures["real"] = from_uint8(shown[:12])
    for name, net, calls in networks:
        labels, batch = labels_for(cfg.seed, cfg.n_samples, len(names)), sampling_batch(net)
        fast = compiled(cfg, net, cfg.n_samples // WORLD // batch * calls, batch)
        samples(net, cfg.seed, range(min(batch, cfg.n_samples)), 1, labels)  # a warm-up: not timed
        began = time.monotonic()
        images = make_images(net, fast, cfg, cfg.n_samples, calls, labels)
        seconds = time.monotonic() - began
        row = {"network": name, "calls": calls, **measure(images, labels)}
        row["parameters"] = sum(p.numel() for p in net.parameters())
        row["macs"] = count_macs(net)
        row["ms"] = 1000 * seconds / len(images)
        rows.append(row)
        pictures[f"{name}, calls: {calls}"] = samples(net, cfg.seed, range(12), calls, requests)
        say(f"measured | {name}, calls: {calls}")

    # 5. The table and the picture.
    if RANK == 0:
        results, picture = "05_results", "05_samples.png"
        if cfg.only != "all":
            results, picture = f"05_{cfg.only}", f"05_{cfg.only}.png"
        conditions = [f"{key} {value}" for key, value in protocol.items()]
        lines = [*table(rows, protocol["metric"]), "", ", ".join(conditions), ""]
        with writing(cfg.folder / f"{results}.md") as file:
            file.write("\n".join(lines).encode())
        content = json.dumps({"protocol": protocol, "rows": rows}, indent=1)
        with writing(cfg.folder / f"{results}.json") as file:
            file.write(content.encode())
        save_grid(cfg.folder / picture, pictures.values(), pictures, columns)
        say("\n".join(["", *lines, f"wrote {cfg.folder}/{results}.md, .json, {picture}"]))


def reference_images(cfg, size, judge_classes):
    """(Their source, uint8 (N, 3, H, W)): --reference, or what the teacher was trained on.

    judge_classes: the names of the classes that the judge knows, or []. Raises UserError if the
    teacher was trained on other images, or on other classes.
    """
    if cfg.reference:
        return cfg.reference, load_data(cfg.reference, size)[0]
    teacher = load(cfg, "01_teacher.pt")
    source = teacher["settings"]["data"]
    images, labels, names = load_data(source, size)
    unnamed = labels is not None and not names
    require(not judge_classes or names == judge_classes or unnamed, f"the judge {cfg.metric} knows "
            f"other classes than {source} has: --metric fid or none, or make a judge with "
            "extras/train_judge.py")
    known = teacher["made_from"].get("data")  # an imported teacher does not know
    require(known in (None, fingerprint(images)), f"{source} does not hold the images that the "
            "teacher was trained on any more: give them with --reference")
    return source, images


# ------------------------------------------------------------------------------------------- judges

class Conv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Judge(nn.Module):
    """A small classifier of images, trained by extras/train_judge.py.

    Maps images (B, 3, H, W) to features (B, D): the means of all channels of each level, so that
    edges and colours count as well as what is shown. fc(features): the scores of the classes.
    Each level has half the size of the one before. Its first convolution changes the number of
    channels; the others add to what is there.
    """

    def __init__(self, classes, widths, convs, mirrored):
        super().__init__()
        self.mirrored = mirrored
        self.levels = nn.ModuleList()
        c = 3
        for width, n in zip(widths, convs):
            level = nn.ModuleList()
            for _ in range(n):
                level.append(Conv(c, width, 3, padding=1))
                c = width
            self.levels.append(level)
        self.fc = nn.Linear(sum(widths), classes)

    def forward(self, x):
        features = []
        for level in self.levels:
            if features:
                x = F.max_pool2d(x, 2)
            x = level[0](x)  # (B, width, H, W), then half of H and W, and so on
            for conv in level[1:]:
                x = x + conv(x)
            features.append(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return torch.cat(features, dim=1)

    def features(self, images_uint8):
        """If mirrored: the means of an image's features and those of its mirror image."""
        x = from_uint8(images_uint8)
        if not self.mirrored:
            return self(x)
        return (self(x) + self(x.flip(3))) / 2


# --------------------------------------------------------------------------------------- Inception
# A transcription of a published network; nothing from here on is needed to follow the method.

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")  # 91 MB
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Inception(nn.Module):
    """Inception-v3 as FID uses it (the TensorFlow network of 2015-12-05), with pytorch-fid's names.

    Maps images (B, 3, 299, 299), scaled as in inception_features, to features (B, 2048). A layer is
    made when forward first comes to it, so that all about it stands in one place.
    """

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2048, 1008)  # in the published file; FID needs only its width
        self(torch.zeros(1, 3, 75, 75))  # makes the layers

    def conv(self, x, name, c_out, kernel, stride=1, padding="same"):
        """The convolution of this name, applied to x."""
        if name not in self._modules:
            layer = Conv(x.shape[1], c_out, kernel, stride, padding)
            self.add_module(name, layer.eval())
        return self._modules[name](x)

    def chain(self, x, name, channels, kernels):
        """Convolutions one after the other: name_1, name_2, ..."""
        for i, c_out in enumerate(channels):
            x = self.conv(x, f"{name}_{i + 1}", c_out, kernels[i])
        return x

    def forward(self, x):
        conv, chain = self.conv, self.chain
        average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        row, column = (1, 7), (7, 1)
        x = conv(x, "Conv2d_1a_3x3", 32, 3, stride=2, padding=0)
        x = conv(x, "Conv2d_2a_3x3", 32, 3, padding=0)
        x = conv(x, "Conv2d_2b_3x3", 64, 3)  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)
        x = conv(x, "Conv2d_3b_1x1", 80, 1)
        x = conv(x, "Conv2d_4a_3x3", 192, 3, padding=0)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        for letter, c_pool in zip("bcd", (32, 64, 64)):
            name = f"Mixed_5{letter}/branch"
            a = conv(x, name + "1x1", 64, 1)
            b = chain(x, name + "5x5", [48, 64], [1, 5])
            c = chain(x, name + "3x3dbl", [64, 96, 96], [1, 3, 3])
            d = conv(average(x), name + "_pool", c_pool, 1)
            x = torch.cat([a, b, c, d], dim=1)
        name = "Mixed_6a/branch"
        a = conv(x, name + "3x3", 384, 3, stride=2, padding=0)
        b = chain(x, name + "3x3dbl", [64, 96], [1, 3])
        b = conv(b, name + "3x3dbl_3", 96, 3, stride=2, padding=0)
        x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], dim=1)  # (B, 768, 17, 17)
        for letter, n in zip("bcde", (128, 160, 160, 192)):
            name = f"Mixed_6{letter}/branch"
            a = conv(x, name + "1x1", 192, 1)
            b = chain(x, name + "7x7", [n, n, 192], [1, row, column])
            c = chain(x, name + "7x7dbl", [n, n, n, n, 192], [1, column, row, column, row])
            d = conv(average(x), name + "_pool", 192, 1)
            x = torch.cat([a, b, c, d], dim=1)
        name = "Mixed_7a/branch"
        a = conv(x, name + "3x3_1", 192, 1)
        a = conv(a, name + "3x3_2", 320, 3, stride=2, padding=0)
        b = chain(x, name + "7x7x3", [192, 192, 192], [1, row, column])
        b = conv(b, name + "7x7x3_4", 192, 3, stride=2, padding=0)
        x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], dim=1)  # (B, 1280, 8, 8)
        row, column = (1, 3), (3, 1)
        for letter, pool in zip("bc", (average, nn.MaxPool2d(3, 1, 1))):
            name = f"Mixed_7{letter}/branch"
            a = conv(x, name + "1x1", 320, 1)
            b = conv(x, name + "3x3_1", 384, 1)
            b_row = conv(b, name + "3x3_2a", 384, row)
            b_column = conv(b, name + "3x3_2b", 384, column)
            c = chain(x, name + "3x3dbl", [448, 384], [1, 3])
            c_row = conv(c, name + "3x3dbl_3a", 384, row)
            c_column = conv(c, name + "3x3dbl_3b", 384, column)
            d = conv(pool(x), name + "_pool", 192, 1)
            x = torch.cat([a, b_row, b_column, c_row, c_column, d], dim=1)  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))


def resize_tf1(x, size=299):
    """Bilinear resize of (B, C, H, W) as in TensorFlow 1: source = target * in / out."""
    for dim in (3, 2):
        n = x.shape[dim]
        source = torch.arange(size, device=x.device) * (n / size)
        low = source.long()
        high = (low + 1).clamp(max=n - 1)
        share = source - low  # of the higher one
        if dim == 2:
            share = share[:, None]
        x, x_high = x.index_select(dim, low), x.index_select(dim, high)
        x = x + (x_high - x) * share
    return x


@torch.no_grad()
def inception_features(net, images_uint8, resize="tf1"):
    """uint8 (N, 3, H, W) -> features (N, 2048). resize: "tf1" (paper) or "pytorch_fid"."""
    x = images_uint8.float()
    if resize == "tf1":
        x = (resize_tf1(x) - 128) / 128
    else:
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        x = x / 127.5 - 1
    # All bits of float32 on a GPU, too: TF32 could change an FID by 0.05.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        return net(x)


def load_inception(device):
    """Inception with the published weights, in eval mode. UserError where they cannot be had."""
    path = download(INCEPTION_URL, INCEPTION_SHA256, "go without: --metric none")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = {key.replace(".branch", "/branch"): weights[key] for key in weights}
    net = Inception()
    net.load_state_dict(weights)
    return net.to(device).eval()


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
