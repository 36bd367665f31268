"""CIFAR-10 on a CPU in about an hour: the five stages with small networks, by class.

    python extras/real_images.py --data cifar10                 # downloads CIFAR-10
    python extras/real_images.py --data cifar10-jpeg.zip --named "a JPEG copy of CIFAR-10" --seeds 3

The recipe is that of `shapes`: labels, small batches, Muon, t from the middle. An hour is a few passes over
the images. A small classifier, trained here on nine tenths of them, judges: "FD-cifar-classifier" is the
Frechet distance of its features (not FID), "named as asked" the share of images in which it sees their class.

Reads   --data: images with labels
Writes  extras/results/cifar10_cpu.json, .md, .png (made-up images only); the runs into <out>/ablations
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ablations import MADE, RESULTS, STAGES, made_with, make_all, stage  # it makes common importable
from common import (from_uint8, labels_for, load_images, load_network, require, run, samples, save_grid, say,
                    start)

SETTINGS = {
    "data": dict(others="cifar10", help="cifar10 (downloaded), or the path of images with labels"),
    "named": dict(others="", help="what the table calls the images; empty: --data"),
    "n_samples": dict(others=2000, help="images of each network that are measured"),
    "scale": dict(others=1.0, help="of all steps and pairs: 1 is about an hour on 2 CPU cores"),
    "judge_steps": dict(others=1500, help="training steps of the classifier"),
    "seeds": dict(others=1, help="runs of everything, with the seeds 0, 1, ..."),
    "jobs": dict(others=1, help="runs at a time"),
}
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def networks(cfg):
    """{title: (the run that trained the network, its calls)}."""
    def times(n):
        return max(1, round(cfg.scale * n))

    common = dict(optimizer="muon", batch=32, ema=0.999, precision="auto")
    small = dict(mult=(1, 2, 4), blocks=1, attn=(8,), cooldown=0.6, **common)
    teacher = stage("01", data=cfg.data, conditional=True, base=32, dropout=0.0, lr=4e-3, steps=times(4500),
                    t_distribution="logit_normal", warmup=times(200), **small)
    pairs = stage("02", teacher, n_pairs=max(64, times(6144)), sample_steps=12, precision="auto")
    flow = stage("03", pairs, base=16, t_distribution="early", lr=8e-3, steps=times(4500),
                 anneal_steps=times(1500), warmup=times(100), **small)
    distill = dict(distance="huber", pairs_from="teacher", lr=4e-3, warmup=times(50), cooldown=1.0, **common)
    alone = stage("04", pairs, flow, guidance=0.0, steps=times(2400), **distill)
    guided = stage("04", pairs, flow, steps=times(1200), **distill)
    return {"teacher, 25 calls": (teacher, 25), "teacher, 1 call": (teacher, 1),
            "2-rectified flow, 8 calls": (flow, 8), "2-rectified flow, 1 call": (flow, 1),
            "student, pairs only, twice the steps": (alone, 1), "student, guided": (guided, 1)}


def train_classifier(images, labels, classes, steps, device):
    """A classifier, whose last layer takes features (B, 128); numbers of a tenth of the images, not seen."""
    conv, layers = STAGES["05"].Conv, []
    for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
        layers += [conv(c_in, c_out, 3), conv(c_out, c_out, 3), nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes)]
    net = nn.Sequential(*layers).to(device)
    unseen, seen = torch.randperm(len(images)).tensor_split([len(images) // 10])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        i = seen[torch.randint(len(seen), (128,))]
        x = from_uint8(images[i].to(device))
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels[i].to(device)).backward()
        optimizer.step()
        schedule.step()
    return net.eval(), unseen


def main(cfg):
    vars(cfg).update(preset="cifar10_quick", allow_mixed=True, precision="auto", rounding="round")
    device = start(cfg, "real images")

    # 1. The stages.
    images, labels = load_images(cfg.data, 32)
    require(labels is not None, f"{cfg.data} has no labels, which the recipe needs")
    require(len(images) >= 2 * cfg.n_samples > 0, f"{cfg.data} has fewer images than twice --n_samples")
    made = make_all([task for task, _ in networks(cfg).values()], cfg)

    # 2. The classifier.
    classes = int(labels.max()) + 1
    net, unseen = train_classifier(images, labels, classes, cfg.judge_steps, device)

    @torch.no_grad()
    def judged(images, labels):
        """(mean and covariance of the features, share that is named by its label, in %)."""
        features = [net[:-1](from_uint8(part.to(device))) for part in images.split(256)]
        named = torch.cat([net[-1](part).argmax(1).cpu() for part in features]) == labels
        return STAGES["05"].gaussian(features, 128), 100 * named.float().mean().item()

    accuracy = judged(images[unseen], labels[unseen])[1]

    # 3. Some of the real images against all others; the networks' images against all.
    distance, rows, pictures = STAGES["05"].frechet_distance, {}, {}
    some, others = torch.randperm(len(images)).tensor_split([cfg.n_samples])
    real, rest = judged(images, labels)[0], judged(images[others], labels[others])[0]
    found = judged(images[some], labels[some])
    rows["real (other images)"] = [(distance(*found[0], *rest), found[1])]
    asked, requests = labels_for(0, cfg.n_samples, classes), torch.arange(12) % classes
    for title, (task, calls) in networks(cfg).items():
        for seed in range(cfg.seeds):
            cfg.folder = task.cfg(cfg, seed).folder
            trained, _ = load_network(cfg, MADE[task.stage], device)
            found = judged(STAGES["05"].make_images(trained, cfg, cfg.n_samples, calls, asked), asked)
            rows.setdefault(title, []).append((distance(*found[0], *real), found[1]))
            pictures.setdefault(title, samples(trained, 0, range(12), calls, requests))

    # 4. The table and the picture.
    name = cfg.named or cfg.data
    lines = [f"{name}, {cfg.n_samples:,} images of each network, seeds: {cfg.seeds}, {cfg.scale:g} of the "
             f"steps and pairs; the classifier names {accuracy:.1f}% of unseen images rightly.", "",
             "| network | FD-cifar-classifier | named as asked, % |", "|---|---:|---:|"]
    for title, scores in rows.items():
        cells = [f"{mean(v):.2f}" + (f" ± {stdev(v):.2f}" if len(v) > 1 else "") for v in zip(*scores)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", made_with(made.values()), ""]
    facts = {"images": name, "scale": cfg.scale, "made": made_with(made.values()), "scores": rows}
    (RESULTS / "cifar10_cpu.md").write_text("\n".join(lines))
    (RESULTS / "cifar10_cpu.json").write_text(json.dumps(facts, indent=0))
    columns = [NAMES[y] for y in requests] if classes == 10 else ()
    save_grid(RESULTS / "cifar10_cpu.png", list(pictures.values()), list(pictures), columns)
    say("\n".join(["", *lines, f"wrote {RESULTS}/cifar10_cpu.json, .md, .png"]))


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
