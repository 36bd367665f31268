"""Train the judge of FD-shapes, once: extras/shapes_judge.pt, which stage 05 loads.

A small classifier learns to name shape and colour of a drawing, until it is right on at least 99.5 % of 2,000
drawings that it has not seen. The features that it has found are what stage 05 compares. Half of its training
drawings have a little noise, so that what the eye hardly sees does not count.

Takes   a minute and a half on one CPU core
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from importlib import import_module

from common import SHAPES, draw_shapes, fingerprint, from_uint8, require, save, say

IMAGE_SIZE, STEPS, BATCH, LR, SEED = 16, 3000, 128, 3e-3, 0  # ours
UNSEEN = 10**6  # the seed of the drawings that are only looked at


def named(net, images):
    """What the judge sees in uint8 images (N, 3, H, W): shape and colour, int64 (N,) each."""
    with torch.no_grad():
        scores = net.head(net(from_uint8(images)))
    return scores[:, :len(SHAPES)].argmax(1), scores[:, len(SHAPES):].argmax(1)


def main():
    torch.manual_seed(SEED)
    net = import_module("05_eval_fid").ShapeNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    for step in range(STEPS):
        if step % 200 == 0:
            images, attributes = draw_shapes(100 * BATCH, IMAGE_SIZE, seed=1000 + step)
        i = torch.randint(len(images), (BATCH,))
        x = from_uint8(images[i])
        # Half of the drawings with up to 0.1 of noise (13 grey levels).
        x = x + 0.1 * (2 * torch.rand(len(x), 1, 1, 1) - 1).clamp(min=0) * torch.randn_like(x)
        shape, colour = net.head(net(x)).split([len(SHAPES), 6], dim=1)
        a = attributes[i].long()
        loss = F.cross_entropy(shape, a[:, 0]) + F.cross_entropy(colour, a[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            say(f"judge | step {step + 1}/{STEPS} | loss {loss.item():.4f}")
    net.eval()
    images, attributes = draw_shapes(2000, IMAGE_SIZE, seed=UNSEEN)
    shape, colour = named(net, images)
    accuracy = ((shape == attributes[:, 0]) & (colour == attributes[:, 1])).float().mean().item()
    require(accuracy >= 0.995, f"the judge names only {accuracy:.2%} of 2,000 unseen drawings")
    path = Path(__file__).parent / "shapes_judge.pt"
    save(path, weights=net.state_dict(), id=fingerprint(*net.state_dict().values()), accuracy=accuracy,
         made_with=f"python extras/train_judge.py, {STEPS} steps, seed {SEED}")
    say(f"wrote {path} | {accuracy:.2%} of 2,000 unseen drawings are named rightly")


if __name__ == "__main__":
    main()
