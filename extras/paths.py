"""Draw how the flows get from noise to image: the teacher in a curve, the 2-rectified flow almost straight.

Left: how far x_t is from the straight line between its two ends, |x_t - ((1 - t) z + t x)| / |x - z|, for some noises z.
Right: where a flow would end if it went on straight from x_t, that is x_t + (1 - t) v(x_t, t): the answer of one call, of
two, and so on. On a straight path the first answer is already the last.

Reads   out/<preset>/01_teacher.pt, 03_reflow.pt
Writes  out/<preset>/paths.png
Takes   shapes: 10 s on 2 CPU cores
"""
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (EVALUATION, Settings, check_ranges, euler, load_network, noise_for, require, require_same_kind, run, say, start,
                    to_uint8, writing)

COLOURS = {"teacher": "#d1495b", "2-rectified flow": "#174a7c"}


@dataclass
class Config(Settings):
    steps: int = 25  # Euler steps of a path
    paths: int = 24  # paths of each network that are drawn
    strips: int = 3  # noises whose images are shown

    def __post_init__(self):
        check_ranges(self, steps=(2, None), paths=(1, 1000), strips=(1, 100))
        require(self.strips <= self.paths, f"--strips {self.strips} of only --paths {self.paths}")


def follow(net, noise, steps):
    """The states x_t of a path (steps + 1, B, C, H, W), and from each the end of a straight path, x_t + (1 - t) v(x_t, t)."""
    states, ends = [], []

    def observed(x, t, labels):
        v = net(x, t, labels)
        states.append(x)
        ends.append(x + (1 - len(ends) / steps) * v)
        return v

    x = euler(observed, noise, steps)
    return torch.stack([*states, x]), torch.stack([*ends, x])


def deviation(states):
    """|x_t - ((1 - t) z + t x)| / |x - z| for the states (T + 1, B, C, H, W) of Euler paths: (T + 1, B), 0 at both ends."""
    z, x = states[0], states[-1]
    t = torch.linspace(0, 1, len(states), device=x.device)[:, None, None, None, None]
    line = (1 - t) * z + t * x
    return (states - line).flatten(2).norm(dim=2) / (x - z).flatten(1).norm(dim=1)


def main(cfg):
    device = start(cfg, "paths")

    # 1. Both flows, from the same noise.
    networks = {}
    for name, file in (("teacher", "01_teacher.pt"), ("2-rectified flow", "03_reflow.pt")):
        networks[name], artifact = load_network(cfg.folder / file, cfg, device)
        require(not artifact.get("edm"), f"{file} is an EDM network, whose paths are not those of a velocity")
        require(not networks[name].args["classes"], f"{file} knows classes; this figure is for networks without")
        require_same_kind("01_teacher.pt", networks["teacher"].args, file, networks[name].args)
    size = networks["teacher"].args["image_size"]
    noise = noise_for(cfg.seed, range(EVALUATION, EVALUATION + cfg.paths), (3, size, size)).to(device)
    paths = {name: follow(net, noise, cfg.steps) for name, net in networks.items()}
    bends = {name: deviation(states).cpu() for name, (states, _) in paths.items()}

    # 2. Left: the deviation from the straight line.
    shown = torch.linspace(0, cfg.steps, min(6, cfg.steps + 1)).round().long().tolist()  # which of the states are shown as images
    cell = size * max(1, 64 // size)
    left, top, width, height, right = 60, 40, 330, 300, 560
    canvas = Image.new("RGB", (right + len(shown) * (cell + 4), max(400, top + cfg.strips * (2 * (cell + 4) + 8) + 40)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    highest = 1.3 * max(bend.max().item() for bend in bends.values())
    draw.text((left, 12), "distance from the straight line (in its lengths)", fill="black", font=font)
    for i in range(5):
        y = top + height * (1 - i / 4)
        draw.line([(left, y), (left + width, y)], fill="#dddddd")
        draw.text((left - 6, y), f"{highest * i / 4:.3f}", fill="black", font=font, anchor="rm")
        draw.text((left + width * i / 4, top + height + 6), f"{i / 4:g}", fill="black", font=font, anchor="ma")
    draw.text((left + width / 2, top + height + 24), "t (0: noise, 1: image)", fill="black", font=font, anchor="ma")
    for row, (name, bend) in enumerate(bends.items()):
        for curve in bend.T.tolist():
            draw.line([(left + width * i / cfg.steps, top + height * (1 - value / highest)) for i, value in enumerate(curve)],
                      fill=COLOURS[name], width=1)
        draw.text((left + 10, top + 6 + 18 * row), f"{name}: {bend.max(dim=0).values.mean():.3f} at the widest, on average",
                  fill=COLOURS[name], font=font)

    # 3. Right: where the straight way on would end.
    for column, i in enumerate(shown):
        draw.text((right + column * (cell + 4) + cell / 2, 20), f"t = {i / cfg.steps:.1f}", fill="black", font=font, anchor="ma")
        for strip in range(cfg.strips):
            for row, name in enumerate(paths):
                image = to_uint8(paths[name][1][i, strip].cpu()).permute(1, 2, 0).numpy()
                tile = Image.fromarray(image).resize((cell, cell), Image.NEAREST)
                y = top + (2 * strip + row) * (cell + 4) + 8 * strip
                canvas.paste(tile, (right + column * (cell + 4), y))
                if column == 0:
                    draw.text((right - 8, y + cell / 2), name, fill=COLOURS[name], font=font, anchor="rm")
    with writing(cfg.folder / "paths.png") as file:
        canvas.save(file, "PNG")
    say(" | ".join(f"{name}: {bend.max(dim=0).values.mean():.4f}" for name, bend in bends.items()))
    say(f"wrote {cfg.folder}/paths.png")


if __name__ == "__main__":
    run(main, Config, dict.fromkeys(importlib.import_module("01_train_teacher").PRESETS, {}), __doc__)
