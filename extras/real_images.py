"""CIFAR-10 on a CPU in about an hour: the five stages with small networks.

    python extras/real_images.py --data cifar10                 # downloads CIFAR-10
    python extras/real_images.py --data cifar10-jpeg.zip --named "a JPEG copy of CIFAR-10"

As in extras/ablations.py each run is a command of a stage, and the same command continues. An hour on a CPU
is a few passes over the images: what comes out has colours, skies and things with edges, and little more.
The distance is the Frechet distance of the features of a small classifier, trained here on nine tenths of the
same images: "FD-cifar-classifier". It compares the rows of one table and nothing else; it is not FID.

Reads   --data: images with labels
Writes  extras/results/cifar10_cpu.json, .md, .png (made-up images only); the runs into <out>/real_images
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ablations import ROOT, STAGES, made_with, make_all, stage  # it makes common importable
from common import fingerprint, from_uint8, load_images, require, run, save_grid, say, start, writing

SETTINGS = [  # name, its value for each preset, text
    ("data", *["cifar10"] * 5, "cifar10 (downloaded), or the path of a folder or zip with labels"),
    ("named", *[""] * 5, "what the table calls the images; empty: --data"),
    ("n_samples", *[2000] * 5, "images of each network that are measured"),
    ("scale", *[1.0] * 5, "all steps and pairs times this: 1 is an hour on 2 CPU cores"),
    ("judge_steps", *[1500] * 5, "training steps of the classifier"),
    ("jobs", *[1] * 5, "runs at a time"),
    ("results", *[str(ROOT / "extras" / "results")] * 5, "folder of table and picture"),
]


def networks(cfg):
    """{title: (the run of 05 that writes its images, its key in 05)}."""
    def times(n):
        return max(1, round(cfg.scale * n))

    small = dict(mult=(1, 2, 4), blocks=1, attn=(8,), batch=64, cooldown=0.5, ema=0.999, precision="auto")
    teacher = stage("01", data=cfg.data, base=32, dropout=0.0, lr=1e-3, steps=times(1900), warmup=times(200),
                    **small)
    pairs = stage("02", teacher, n_pairs=max(64, times(8192)), sample_steps=16, precision="auto")
    flow = stage("03", pairs, base=16, lr=2e-3, steps=times(1500), anneal_steps=times(550), warmup=times(100),
                 **small)
    distill = dict(distance="l2", pairs_from="teacher", lr=5e-4, steps=times(700), batch=32, cooldown=1.0,
                   ema=0.995, precision="auto")
    made = {}
    for title, trained, key, calls in (
            ("teacher", teacher, "teacher", 25), ("teacher", teacher, "teacher", 1),
            ("2-rectified flow", flow, "flow", 8), ("2-rectified flow", flow, "flow", 1),
            ("student, pairs only", stage("04", pairs, flow, guidance=0, **distill), "student", 1),
            ("student, guided", stage("04", pairs, flow, **distill), "student", 1)):
        more = {f"{key}_steps": calls, "png": cfg.n_samples, "precision": "auto", "rounding": "round"}
        made[f"{title}, {calls} call{'s' * (calls > 1)}"] = (stage("05", trained, only=key, **more), key)
    return made


def classifier(classes):
    """From images (B, 3, H, W) in [-1, 1] to classes; all but the last layer: to features (B, 128)."""
    layers, c = [], 3
    for width in (32, 64, 128):
        layers += [STAGES["05"].Conv(c, width, 3), STAGES["05"].Conv(width, width, 3), nn.MaxPool2d(2)]
        c = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


def train_classifier(net, images, labels, steps, device):
    """Trains it; returns the share that it names rightly of a tenth of the images, which it does not see."""
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
    net.eval()
    with torch.no_grad():
        named = [net(from_uint8(images[i].to(device))).argmax(1).cpu() for i in unseen.split(256)]
    return (torch.cat(named) == labels[unseen]).float().mean().item()


def main(cfg):
    cfg.preset, cfg.seeds, cfg.precision = "cifar10_quick", 1, "fp32"  # the last: of the classifier
    device = start(cfg, "real images")

    # 1. The stages, and their images.
    images, labels = load_images(cfg.data, 32)
    require(labels is not None, f"{cfg.data} has no labels, which the classifier needs")
    require(len(images) >= 2 * cfg.n_samples > 0, f"{cfg.data} has fewer images than twice --n_samples")
    cfg.runs = Path(cfg.out, "real_images", fingerprint(images))  # other images of the same name: other runs
    made = make_all([task for task, _ in networks(cfg).values()], cfg)

    # 2. The classifier whose features are compared.
    net = classifier(int(labels.max()) + 1).to(device)
    accuracy = train_classifier(net, images, labels, cfg.judge_steps, device)

    def gaussian_of(images):
        with torch.no_grad():
            features = (net[:-1](from_uint8(part.to(device))) for part in images.split(256))
            return STAGES["05"].gaussian(features, 128)

    # 3. Distances to the images; and of some of the real ones to all others.
    real, distance = gaussian_of(images), STAGES["05"].frechet_distance
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    some, others = images[order[:cfg.n_samples]], images[order[cfg.n_samples:]]
    rows, pictures = {"real (other images)": distance(*gaussian_of(some), *gaussian_of(others))}, {}
    for title, (task, key) in networks(cfg).items():
        found, _ = load_images(task.folder(cfg, 0) / f"05_{key}_images", 32)
        rows[title], pictures[title] = distance(*gaussian_of(found), *real), from_uint8(found[:12])

    # 4. The table and the picture.
    name = cfg.named or cfg.data
    lines = [f"{name}, {cfg.n_samples:,} images of each network, {cfg.scale:g} of the steps and pairs; the "
             f"classifier names {accuracy:.1%} of unseen images rightly.", "",
             "| network | FD-cifar-classifier |", "|---|---:|"]
    lines += [f"| {title} | {value:.3f} |" for title, value in rows.items()]
    lines += ["", made_with(made.values()), ""]
    facts = {"images": name, "scale": cfg.scale, "distances": rows, "runs": list(made.values())}
    for suffix, text in (("md", "\n".join(lines)), ("json", json.dumps(facts, indent=1))):
        with writing(Path(cfg.results, f"cifar10_cpu.{suffix}")) as file:
            file.write(text.encode())
    save_grid(Path(cfg.results, "cifar10_cpu.png"), list(pictures.values()), list(pictures))
    say("\n".join(["", *lines, f"wrote {cfg.results}/cifar10_cpu.json, .md, .png"]))


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
