"""Train a judge: a small classifier, in whose features stage 05 compares images (--metric).

    python extras/train_judge.py                                          # of drawings
    python extras/train_judge.py --preset cifar10_quick                   # of CIFAR-10
    python extras/train_judge.py --preset cifar10_quick --data mine.zip --file data/mine_judge.pt

Then `05_eval_fid.py --metric data/mine_judge.pt` prints "FD-mine", and how many images match the
request. A tenth of the images is kept apart. On it the judge is tested: how many it names rightly,
and whether its distance sees what a person sees. Unseen images must be near. The same images with
a blur, with their colours exchanged, or of two classes only must be far.

Reads   --data: images with labels
Writes  --file
Takes   drawings: a minute and a half on one CPU core; CIFAR-10: 71 minutes on two (AMD EPYC,
        torch 2.13), not tried on a GPU
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (fingerprint, from_uint8, load_data, require, run, save, say, stage, start,
                    to_uint8)
from extras.drawings import draw_shapes

SETTINGS = {
    "data": dict(shapes="shapes", others="cifar10", help="shapes, cifar10, or a path of images"),
    "image_size": dict(shapes=16, ffhq64=64, imagenet64=64, others=32, help="pixels"),
    "file": dict(shapes="extras/shapes_judge.pt", others="extras/cifar10_judge.pt",
                 help="the judge"),
    "widths": dict(shapes=(16, 32, 64), others=(32, 96, 100, 100), help="channels of each level"),
    "convs": dict(shapes=(1, 1, 1), others=(1, 3, 3, 3), help="convolutions of each level"),
    "steps": dict(shapes=3000, others=7500, help="optimiser steps"),
    "batch": dict(shapes=128, others=512, help="images in a step"),
    "optimizer": dict(shapes="adam", others="sgd", choices=("adam", "sgd"), help="which one"),
    "lr": dict(shapes=3e-3, others=0.4, help="highest learning rate"),
    "weight_decay": dict(shapes=0.0, others=5e-4, help="pulls the weights towards 0"),
    "smoothing": dict(shapes=0.0, others=0.2, help="of the labels"),
    "noise": dict(shapes=0.1, others=0.0, help="most noise, in half of the images"),
    "shift": dict(shapes=0, others=4, help="pixels; photos are also mirrored"),
    "hidden": dict(shapes=0, others=10, help="pixels: the side of a square that is not seen"),
    "accuracy": dict(shapes=0.995, others=0.0, help="refuse a judge that is worse"),
    "precision": dict(shapes="fp32", others="auto", choices=("fp32", "bf16", "auto"),
                      help="of the training"),
}


def shifted(x, most):
    """Each image mirrored or not, and moved by up to `most` pixels: crops of a padded image."""
    n, size = len(x), x.shape[-1]
    mirrored = torch.rand(n, 1, 1, 1, device=x.device) < 0.5
    x = torch.where(mirrored, x.flip(3), x)
    padded = F.pad(x, (most, most, most, most), mode="reflect")
    image = torch.arange(n, device=x.device)
    pixel = torch.arange(size, device=x.device)
    down, right = torch.randint(2 * most + 1, (2, n, 1), device=x.device)
    rows, columns = pixel + down, pixel + right  # (N, H), (N, W)
    crops = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2)  # (N, C, H, W)


def partly_hidden(x, side):
    """A square of each image, anywhere, is grey, so that the judge looks at all the rest, too."""
    n, size = len(x), x.shape[-1]
    pixel = torch.arange(size, device=x.device)
    top, left = torch.randint(1 - side, size, (2, n, 1), device=x.device)
    rows = (pixel >= top) & (pixel < top + side)  # (N, H)
    columns = (pixel >= left) & (pixel < left + side)  # (N, W)
    square = rows[:, None, :, None] & columns[:, None, None, :]
    return x.masked_fill(square, 0)


def noisy(x, most):
    """Half of the images with noise, so that what the eye hardly sees does not count."""
    amount = 2 * torch.rand(len(x), 1, 1, 1, device=x.device) - 1
    return x + most * amount.clamp(min=0) * torch.randn_like(x)


def changed(images, labels):
    """{what was done: images} that look worse than these uint8 (N, 3, H, W) do."""
    x = F.pad(from_uint8(images), (0, 1, 0, 1), mode="replicate")
    blurred = F.avg_pool2d(x, 2, stride=1)  # each pixel and its three neighbours
    return {
        "unseen images": images,
        "blurred by half a pixel": to_uint8(blurred),
        "colours exchanged": images.roll(1, dims=1),
        "two classes only": images[labels < 2],
    }


def main(cfg):
    device, evaluation = start(cfg, "judge"), stage("05")

    # 1. The images. A tenth of them is not seen; there are always new drawings.
    images, labels, names = load_data(cfg.data, cfg.image_size)
    require(labels is not None, f"{cfg.data} has no labels, which a judge needs")
    names = names or [str(i) for i in range(int(labels.max()) + 1)]
    if cfg.data == "shapes":
        unseen, unseen_labels = draw_shapes(2000, cfg.image_size, seed=10**6)
    else:
        order = torch.randperm(len(images))
        apart, seen = order.tensor_split([len(images) // 10])
        unseen, unseen_labels = images[apart], labels[apart]
        images, labels = images[seen], labels[seen]

    # 2. Training.
    mirrored = cfg.shift > 0
    network = dict(classes=len(names), widths=cfg.widths, convs=cfg.convs, mirrored=mirrored)
    net = evaluation.Judge(**network).to(device)
    common = dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "adam":
        optimizer = torch.optim.Adam(net.parameters(), **common)
    else:
        optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, **common)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, total_steps=cfg.steps)
    for step in range(cfg.steps):
        if cfg.data == "shapes" and step % 200 == 0:
            images, labels = draw_shapes(100 * cfg.batch, cfg.image_size, seed=1000 + step)
        i = torch.randint(len(images), (cfg.batch,))
        x = from_uint8(images[i].to(device))
        y = labels[i].to(device)
        if cfg.noise:
            x = noisy(x, cfg.noise)
        if cfg.shift:
            x = shifted(x, cfg.shift)
        if cfg.hidden:
            x = partly_hidden(x, cfg.hidden)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            scores = net.fc(net(x))
        loss = F.cross_entropy(scores.float(), y, label_smoothing=cfg.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            say(f"judge | step {step + 1}/{cfg.steps} | loss {loss.item():.4f}")

    # 3. How good it is, with the weights as they are stored.
    net.eval()
    if cfg.data != "shapes":
        net.half()  # a file of half the size
    weights = {key: value.cpu() for key, value in net.state_dict().items()}
    net.float()

    @torch.no_grad()
    def features_of(images):
        return [net.features(part.to(device)) for part in images.split(500)]

    seen = net.fc(torch.cat(features_of(unseen))).argmax(1).cpu()
    accuracy = (seen == unseen_labels).float().mean().item()
    real = evaluation.gaussian(features_of(images), net.fc.in_features)
    for what, others in changed(unseen, unseen_labels).items():
        found = evaluation.gaussian(features_of(others), net.fc.in_features)
        distance = evaluation.frechet_distance(*found, *real)
        say(f"judge | distance {distance:.3f} | {what}")
    require(accuracy >= cfg.accuracy, f"the judge names only {accuracy:.2%} of the images that it "
            "has not seen")
    source = Path(cfg.data).name
    save(cfg.file, weights=weights, id=fingerprint(*weights.values()), accuracy=accuracy,
         classes=names, network=network,
         made_with=f"extras/train_judge.py --data {source}, {cfg.steps} steps, seed {cfg.seed}")
    say(f"wrote {cfg.file} | {accuracy:.2%} of {len(unseen):,} unseen images are named rightly")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
