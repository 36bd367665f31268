"""Train the judge of FD-shapes, once: extras/shapes_judge.pt, which stage 05 loads.

A small classifier learns to name the class of a drawing ("red triangle"), until it is right on 99.5 %
of 2,000 drawings that it has not seen. The features that it has found are what stage 05 compares. Half of its
training drawings have a little noise, so that what the eye hardly sees does not count.

Takes   a minute and a half on one CPU core
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import draw_shapes, fingerprint, from_uint8, require, save, say, stage

IMAGE_SIZE, STEPS, BATCH, LR, SEED = 16, 3000, 128, 3e-3, 0  # ours
UNSEEN = 10**6  # the seed of the drawings that are only looked at


def main():
    torch.manual_seed(SEED)
    net = stage("05").ShapeNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    for step in range(STEPS):
        if step % 200 == 0:
            images, labels = draw_shapes(100 * BATCH, IMAGE_SIZE, seed=1000 + step)
        i = torch.randint(len(images), (BATCH,))
        x = from_uint8(images[i])
        # Half of the drawings with up to 0.1 of noise (13 grey levels).
        x = x + 0.1 * (2 * torch.rand(len(x), 1, 1, 1) - 1).clamp(min=0) * torch.randn_like(x)
        loss = F.cross_entropy(net.fc(net(x)), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            say(f"judge | step {step + 1}/{STEPS} | loss {loss.item():.4f}")
    net.eval()
    images, labels = draw_shapes(2000, IMAGE_SIZE, seed=UNSEEN)
    with torch.no_grad():
        accuracy = (net.fc(net(from_uint8(images))).argmax(1) == labels).float().mean().item()
    require(accuracy >= 0.995, f"the judge names only {accuracy:.2%} of 2,000 unseen drawings")
    path = Path(__file__).parent / "shapes_judge.pt"
    save(path, weights=net.state_dict(), id=fingerprint(*net.state_dict().values()), accuracy=accuracy,
         made_with=f"python extras/train_judge.py, {STEPS} steps, seed {SEED}")
    say(f"wrote {path} | {accuracy:.2%} of 2,000 unseen drawings are named rightly")


if __name__ == "__main__":
    main()
