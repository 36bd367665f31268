"""The whole method on two coordinates: draws docs/method.png, or the path given, the figure that explains it.

An "image" is a point (2, 1, 1). Noise is a cloud on the left, the data are three clusters on the right, and a
small MLP takes the place of the U-Net. Losses, beta and Euler's method are the stages'. 15 s on a CPU.
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
WIDTH, HEIGHT, GAP, SCALE = 380, 240, 16, 2  # pixels of a panel; drawn at twice the size, for smooth lines
TEACHER, FLOW, STUDENT, NOISE = "#d1495b", "#174a7c", "#2a8a57", "#8d99a6"


class MLP(nn.Module):
    """A velocity v(x_t, t) for points (B, 2, 1, 1), with the same calls as the U-Net."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, t, labels=None):
        t = t[:, None]
        waves = torch.cat([t, (3 * t).sin(), (3 * t).cos(), (9 * t).sin()], dim=1)
        return self.layers(torch.cat([x.flatten(1), waves], dim=1)).view(x.shape)


def data(n):
    """n points (n, 2, 1, 1) of the three clusters."""
    centres = torch.tensor([[5.0, -2.4], [5.6, 0.0], [5.0, 2.4]])
    return (centres[torch.randint(3, (n,))] + 0.22 * torch.randn(n, 2)).view(n, 2, 1, 1)


def train(net, loss_at):
    """Adam with a falling learning rate on loss_at(step); returns the averaged network, as in the stages."""
    ema, optimizer = copy.deepcopy(net), torch.optim.Adam(net.parameters(), LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        optimizer.step()
        for average, p in zip(ema.parameters(), net.parameters()):
            average.data.lerp_(p.data, 1 - min(0.995, (1 + step) / (10 + step)))
    return ema


def chain():
    """Stages 01 to 04: (teacher, (z, x), flow, student)."""
    teacher, flow = MLP(64), MLP(48)  # of other widths, so the flow cannot start from the teacher's weights

    def loss_01(step):
        x = data(BATCH)
        t = teaching.draw_t(BATCH, "uniform", x.device)
        return teaching.flow_loss(teacher, torch.randn_like(x), x, t)

    teacher_ema = train(teacher, loss_01)
    z = torch.randn(PAIRS, 2, 1, 1)
    x = euler(teacher_ema, z, TEACHER_STEPS)  # 02

    def loss_03(step):
        i = torch.randint(PAIRS, (BATCH,))
        b = reflow.beta(step, ANNEALING)
        return reflow.reflow_loss(flow, z[i], x[i], teaching.draw_t(BATCH, "uniform", x.device), b)

    flow_ema = train(flow, loss_03)
    student = copy.deepcopy(flow_ema)

    def loss_04(step):
        i, z_new = torch.randint(PAIRS, (BATCH,)), torch.randn(BATCH, 2, 1, 1)
        t = 0.2 + 0.6 * torch.rand(BATCH)
        v, v_new = distill.first_velocity(student, z[i]), distill.first_velocity(student, z_new)
        return (distill.distill_loss(v, z[i], x[i], distill.squared_l2)
                + distill.guided_loss(v_new, flow_ema, z_new, t, distill.squared_l2))

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
    """Draws panel `number`, three in a row: lines (T, B, 2, 1, 1) from noise to data."""
    left, top = GAP + number % 3 * (WIDTH + GAP), number // 3 * (HEIGHT + 44) + 34

    def pixel(place):
        x, y = place.flatten().tolist()
        return SCALE * (left + (x + 2.6) / 9 * WIDTH), SCALE * (top + (0.5 - y / 7) * HEIGHT)

    def dot(place, fill, radius):
        (x, y), r = pixel(place), SCALE * radius
        draw.ellipse((x - r, y - r, x + r, y + r), fill)

    draw.text((SCALE * left, SCALE * (top - 26)), title, "black", font_size=15 * SCALE)
    draw.rectangle([SCALE * v for v in (left, top, left + WIDTH, top + HEIGHT)], "#fafbfc", "#dde2e7", SCALE)
    for place in data(300):
        dot(place, "#d9dee3", 2)
    for line in lines.transpose(0, 1):
        draw.line([pixel(place) for place in line], colour, 2 * SCALE)
        dot(line[0], NOISE, 2.5)
        dot(line[-1], colour, 3.5)


def main(target):
    torch.manual_seed(0)
    teacher, (z, x), flow, student = chain()
    z, x, fresh = z[:24], x[:24], torch.randn(24, 2, 1, 1).clamp(-2, 2)

    def couples(b, x):
        return torch.stack([(1 - b * b) ** 0.5 * z + b * fresh, x])  # z_beta and x

    canvas = Image.new("RGB", (SCALE * (3 * WIDTH + 4 * GAP), SCALE * (3 * (HEIGHT + 44) + GAP)), "white")
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
    canvas.resize((canvas.width // SCALE, canvas.height // SCALE), Image.LANCZOS).save(target)
    say(f"wrote {target}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/method.png")
