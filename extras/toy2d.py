"""The whole method on two coordinates: draws docs/method.png, or the path given.

An "image" is a point, a tensor (2, 1, 1). The noise is a cloud on the left. The data are three
clusters on the right. A small MLP takes the place of the U-Net; the losses, beta and Euler's method
are those of the stages. Takes 15 s on a CPU.
"""
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import euler, say, stage

teaching, reflow, distill = stage("01"), stage("03"), stage("04")

STEPS, BATCH, LR = 6000, 256, 2e-3  # of each network
PAIRS, TEACHER_STEPS = 4096, 50
ANNEALING = SimpleNamespace(schedule="linear", anneal_steps=2000)
WIDTH, HEIGHT, GAP = 380, 240, 16  # of a panel, in pixels
TITLE = 44  # pixels between two rows of panels
SCALE = 2  # drawn at twice the size, then reduced: smooth lines
TEACHER, FLOW, STUDENT, NOISE = "#d1495b", "#174a7c", "#2a8a57", "#8d99a6"


class MLP(nn.Module):
    """A velocity v(x_t, t) for points (B, 2, 1, 1), called like the U-Net."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x, t, labels=None):
        t = t.view(-1, 1)
        features = [
            x.flatten(1),
            t,
            (3 * t).sin(),
            (3 * t).cos(),
            (9 * t).sin(),
        ]
        return self.layers(torch.cat(features, dim=1)).view(x.shape)


def noise(n):
    return torch.randn(n, 2, 1, 1)


def data(n):
    """n points (n, 2, 1, 1) of the three clusters."""
    centres = torch.tensor([
        [5.0, -2.4],
        [5.6, 0.0],
        [5.0, 2.4],
    ])
    clusters = torch.randint(3, (n,))
    points = centres[clusters] + 0.22 * torch.randn(n, 2)
    return points.view(n, 2, 1, 1)


def train(net, loss_at):
    """Minimises loss_at(step) by Adam with a falling learning rate.

    Returns a copy of the network with averaged weights, as the stages do.
    """
    ema = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        optimizer.step()
        decay = min(0.995, (1 + step) / (10 + step))
        for average, p in zip(ema.parameters(), net.parameters()):
            average.data.lerp_(p.data, 1 - decay)
    return ema


def chain():
    """Stages 01 to 04: (teacher, (z, x), flow, student)."""
    teacher = MLP(64)
    flow = MLP(48)  # smaller, so it cannot start from the teacher's weights

    def loss_01(step):
        x = data(BATCH)
        t = teaching.draw_t(BATCH, "uniform", x.device)
        return teaching.flow_loss(teacher, torch.randn_like(x), x, t)

    teacher_ema = train(teacher, loss_01)

    # 02
    z = noise(PAIRS)
    x = euler(teacher_ema, z, TEACHER_STEPS)

    def loss_03(step):
        i = torch.randint(PAIRS, (BATCH,))
        t = teaching.draw_t(BATCH, "uniform", x.device)
        b = reflow.beta(step, ANNEALING)
        return reflow.reflow_loss(flow, z[i], x[i], t, b)

    flow_ema = train(flow, loss_03)
    student = copy.deepcopy(flow_ema)

    def loss_04(step):
        i = torch.randint(PAIRS, (BATCH,))
        z_new = noise(BATCH)
        t = 0.2 + 0.6 * torch.rand(BATCH)
        v = distill.first_velocity(student, z[i])
        v_new = distill.first_velocity(student, z_new)
        loss = distill.distill_loss(v, z[i], x[i], distill.squared_l2)
        return loss + distill.guided_loss(v_new, flow_ema, z_new, t, distill.squared_l2)

    return teacher_ema, (z, x), flow_ema, train(student, loss_04)


def path(net, z, steps=TEACHER_STEPS):
    """The places (steps + 1, B, 2, 1, 1) on the way from z to the image, at every Euler step."""
    places = []

    def observed(x, t, labels):
        places.append(x)
        return net(x, t, labels)

    x = euler(observed, z, steps)
    return torch.stack([*places, x])


def panel(draw, number, title, lines, colour):
    """Draws panel `number`, three in a row. lines: (T, B, 2, 1, 1), from noise to data."""
    row, column = divmod(number, 3)
    left = GAP + column * (WIDTH + GAP)
    top = 34 + row * (HEIGHT + TITLE)

    def scaled(*pixels):
        return tuple(SCALE * pixel for pixel in pixels)

    def pixel(place):
        x, y = place.flatten().tolist()
        across = (x + 2.6) / 9
        down = 0.5 - y / 7
        return scaled(left + across * WIDTH, top + down * HEIGHT)

    def dot(place, fill, radius):
        draw.circle(pixel(place), SCALE * radius, fill)

    draw.text(scaled(left, top - 26), title, "black", font_size=15 * SCALE)
    frame = scaled(left, top, left + WIDTH, top + HEIGHT)
    draw.rectangle(frame, "#fafbfc", "#dde2e7", SCALE)
    for place in data(300):
        dot(place, "#d9dee3", 2)
    for line in lines.transpose(0, 1):
        draw.line([pixel(place) for place in line], colour, 2 * SCALE)
        dot(line[0], NOISE, 2.5)
        dot(line[-1], colour, 3.5)


def main(target):
    torch.manual_seed(0)
    teacher, pairs, flow, student = chain()
    z, x = (ends[:24] for ends in pairs)
    fresh = noise(24).clamp(-2, 2)

    def couples(b, x):
        z_beta = (1 - b * b) ** 0.5 * z + b * fresh
        return torch.stack([z_beta, x])

    width = 3 * WIDTH + 4 * GAP
    height = 3 * (HEIGHT + TITLE) + GAP
    canvas = Image.new("RGB", (SCALE * width, SCALE * height), "white")
    draw = ImageDraw.Draw(canvas)
    panel(draw, 0, "01  Lines between random couples cross", couples(0.0, data(24)), TEACHER)
    panel(draw, 1, "01  Teacher, 50 calls: the paths bend", path(teacher, z), TEACHER)
    panel(draw, 2, "01  Teacher, 1 call: a blur", path(teacher, z, 1), TEACHER)
    panel(draw, 3, "03  Annealing, beta = 1: again random couples", couples(1.0, x), FLOW)
    panel(draw, 4, "03  beta = 0.5", couples(0.5, x), FLOW)
    panel(draw, 5, "03  beta = 0: the pairs of 02 hardly cross", couples(0.0, x), FLOW)
    panel(draw, 6, "03  2-rectified flow: nearly straight paths", path(flow, z), FLOW)
    panel(draw, 7, "03  2-rectified flow, 1 call", path(flow, z, 1), FLOW)
    panel(draw, 8, "04  Student, 1 call: where the paths end", path(student, z, 1), STUDENT)
    canvas.resize((width, height), Image.LANCZOS).save(target)
    say(f"wrote {target}")


if __name__ == "__main__":
    target = "docs/method.png"
    if len(sys.argv) > 1:
        target = sys.argv[1]
    main(target)
