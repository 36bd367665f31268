"""CIFAR-10 on a CPU in about an hour: the five stages with small networks, and the student with and without guidance.

    python extras/real_images.py --data cifar10                 # downloads CIFAR-10
    python extras/real_images.py --data cifar10-jpeg.zip --named "a JPEG copy of CIFAR-10"

As in extras/ablations.py each run is a command of a stage, and the same command continues. An hour on a CPU is a few passes over
the images: what comes out has colours, skies and things with edges, and little more. It shows that nothing in the stages is
made for drawings, and how teacher, 2-rectified flow and students compare after equally many steps.

The distance is the Frechet distance of the features of a small classifier, trained here on nine tenths of the same images:
"FD-cifar-classifier". It compares the rows of one table and nothing else; it is not FID.

Reads   --data: images with labels
Writes  extras/results/cifar10_cpu.json, .md, .png (made-up images only); the runs and the classifier into <out>/real_images
"""
import hashlib
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ablations import ROOT, STAGES, made_with, make_all, refuse_what_runs_do_not_use, stage  # makes common importable
from common import (Settings, autocast, best_precision, check_ranges, clock, from_uint8, load_images, load_strictly, random_flip,
                    read, require, run, save, save_grid, say, start, writing)

evaluation = STAGES["05"]


@dataclass
class Config(Settings):
    preset: str = "cifar10_quick"  # whose settings hold where nothing else is said below
    data: str = "cifar10"  # cifar10 (downloaded), or the path of CIFAR-10 (binary), or of a folder or zip with labels
    named: str = ""  # what the tables call the images; empty: --data
    n_samples: int = 2000  # images of each network that are measured
    scale: float = 1.0  # all steps and pairs times this: 1 is an hour on 2 CPU cores
    classifier_steps: int = 1500  # training steps of the distance's classifier
    jobs: int = 1  # runs at a time
    seeds: int = 1  # runs of everything, with seeds 0, 1, ...
    results: str = str(ROOT / "extras" / "results")  # folder of table and picture

    runs = "real_images"  # their folder in --out

    def __post_init__(self):
        refuse_what_runs_do_not_use(self)
        self.named = self.named or self.data
        check_ranges(self, n_samples=(129, 10**6), scale=(0, None), classifier_steps=(1, None), jobs=(1, None), seeds=(1, 10))


def networks(cfg):
    """{title: (the run of 05 that writes its images, key in 05, calls)}."""
    def times(n):
        return max(1, round(cfg.scale * n))

    small = dict(mult=(1, 2, 4), blocks=1, attn=(8,), batch=64, precision="auto", log_every=100, save_every=250)
    teacher = stage("01", data=cfg.data, base=32, lr=1e-3, steps=times(1900), warmup=times(200), cooldown=0.5, ema=0.999, dropout=0.0, **small)
    pairs = stage("02", teacher, n_pairs=max(64, times(8192)), sample_steps=16, precision="auto")
    flow = stage("03", pairs, base=16, lr=2e-3, steps=times(1500), anneal_steps=times(550), warmup=times(100), cooldown=0.5, ema=0.999, **small)
    distill = dict(distance="l2", pairs_from="teacher", lr=5e-4, steps=times(700), batch=32, cooldown=1.0, ema=0.995, precision="auto",
                   log_every=100, save_every=250)
    sample = dict(png=cfg.n_samples, precision="auto", rounding="round")
    made = {}
    for title, trained, key, calls in (("teacher", teacher, "teacher", 25), ("teacher", teacher, "teacher", 1),
                                       ("2-rectified flow", flow, "flow", 8), ("2-rectified flow", flow, "flow", 1),
                                       ("student, pairs only", stage("04", pairs, flow, guidance=0, **distill), "student", 1),
                                       ("student, guided", stage("04", pairs, flow, **distill), "student", 1)):
        made[f"{title}, {calls} call{'s' * (calls > 1)}"] = (
            stage("05", trained, only=key, **{f"{key}_steps": calls}, **sample), key, calls)
    return made


class Classifier(nn.Module):
    """A small convolutional network; its 128 pooled channels are the features. Maps (B, 3, H, W) in [-1, 1] to (B, 128)."""

    def __init__(self, classes):
        super().__init__()
        layers, c = [], 3
        for width in (32, 64, 128):
            layers += [evaluation.Conv(c, width, 3), evaluation.Conv(width, width, 3), nn.MaxPool2d(2)]
            c = width
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(c, classes)

    def forward(self, x):
        return self.layers(x).mean(dim=(2, 3))


def train_classifier(cfg, images, labels, device):
    """(Classifier, its accuracy on the tenth of the images that it has not seen)."""
    torch.manual_seed(0)
    net, precision = Classifier(int(labels.max()) + 1).to(device), best_precision(device)
    order = torch.randperm(len(images))
    unseen, seen = order[:len(order) // 10], order[len(order) // 10:]
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=cfg.classifier_steps)
    for step in range(cfg.classifier_steps):
        i = seen[torch.randint(len(seen), (128,))]
        x, = random_flip(torch.rand(len(i)), from_uint8(images[i]))
        with autocast(precision, device):
            loss = F.cross_entropy(net.head(net(x.to(device))).float(), labels[i].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            say(f"classifier | step {step + 1}/{cfg.classifier_steps} | loss {loss.item():.3f}")
    net.eval()
    with torch.no_grad():
        right = [(net.head(net(from_uint8(images[i]).to(device))).argmax(1).cpu() == labels[i]).float() for i in unseen.split(256)]
    return net, torch.cat(right).mean().item()


def main(cfg):
    device = start(cfg, "real images")
    cache, began = Path(cfg.out, cfg.runs, "cache"), time.time()

    # 1. The classifier whose features are compared.
    images, labels = load_images(cfg.data, 32, cache=cache)
    require(labels is not None, f"{cfg.data} has no labels, which the distance's classifier needs")
    require(len(images) >= 2 * cfg.n_samples, f"{cfg.data} has {len(images)} images, fewer than twice --n_samples {cfg.n_samples}")
    cfg.runs = f"{cfg.runs}/{hashlib.sha256(images.numpy()).hexdigest()[:10]}"  # other images under the same name: other runs
    path = Path(cfg.out, cfg.runs, f"classifier_{cfg.classifier_steps}.pt")
    if not path.exists():
        net, accuracy = train_classifier(cfg, images, labels, device)
        save(path, cfg, weights=net.state_dict(), accuracy=accuracy)
    kept = read(path)
    net = Classifier(int(labels.max()) + 1).to(device).eval()
    load_strictly(net, kept["weights"], path)
    say(f"classifier | {kept['accuracy']:.1%} of unseen images are named rightly")

    def gaussian_of(uint8):
        with torch.no_grad():
            return evaluation.gaussian((net(from_uint8(part).to(device)) for part in uint8.split(256)), 128, "cpu")

    # 2. The stages, and their images.
    chosen = networks(cfg)
    made = make_all([task for task, *_ in chosen.values()], cfg)

    # 3. Distances to the images; and of some of the real ones to all others.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    real = gaussian_of(images)
    some, others = images[order[:cfg.n_samples]], images[order[cfg.n_samples:]]
    rows = {"real (other images)": [evaluation.frechet_distance(*gaussian_of(some), *gaussian_of(others))]}
    pictures = {}
    for title, (task, key, _) in chosen.items():
        for seed in range(cfg.seeds):
            folder = task.folder(cfg, seed) / cfg.preset / f"05_{key}_images"
            found, _ = load_images(str(folder), 32, cache=cache)
            rows.setdefault(title, []).append(evaluation.frechet_distance(*gaussian_of(found), *real))
            pictures.setdefault(title, from_uint8(found[:12]))

    # 4. The table and the picture.
    runs = list(made.values())
    lines = [f"{cfg.named}, {cfg.n_samples:,} images of each network; FD-cifar-classifier (accuracy {kept['accuracy']:.1%}), {cfg.seeds} seed(s)"
             f"{'' if cfg.scale == 1 else f', {cfg.scale} of the steps and pairs'}.", "",
             "| network | FD-cifar-classifier |", "|---|---:|"]
    lines += [f"| {title} | {statistics.mean(values):.3f}{f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''} |"
              for title, values in rows.items()]
    lines += ["", made_with(runs), ""]
    facts = {"images": cfg.named, "scale": cfg.scale, "accuracy": kept["accuracy"], "distances": rows, "runs": runs}
    for suffix, text in ((".md", "\n".join(lines)), (".json", json.dumps(facts, indent=1))):
        with writing(Path(cfg.results, f"cifar10_cpu{suffix}")) as file:
            file.write(text.encode())
    save_grid(Path(cfg.results, "cifar10_cpu.png"), list(pictures.values()), list(pictures))
    say("\n".join(["", *lines, f"wrote {cfg.results}/cifar10_cpu.json, .md, .png | {clock(time.time() - began)}"]))


if __name__ == "__main__":
    run(main, Config, {"cifar10_quick": {}}, __doc__)
