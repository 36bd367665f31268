"""Draw how the flows get from noise to image: the teacher in a curve, the 2-rectified flow almost straight.

Left: how far x_t is from the straight line between its ends, |x_t - ((1 - t) z + t x)| / |x - z|, for some z.
Right: where a flow would end if it went on straight from x_t, that is x_t + (1 - t) v(x_t, t): the answer of
one call, of two, and so on. On a straight path the first answer is already the last.

Reads   out/<preset>/01_teacher.pt, 03_reflow.pt
Writes  out/<preset>/paths.png
Takes   shapes: 10 s on 2 CPU cores
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import EVALUATION, euler, load_network, noise_for, require, run, say, start, to_uint8, writing

SETTINGS = [  # name, its value for each preset, text
    ("steps", 25, 25, 25, 25, 25, "Euler steps of a path"),
    ("paths", 24, 24, 24, 24, 24, "paths of each network that are drawn"),
    ("strips", 3, 3, 3, 3, 3, "noises whose images are shown"),
    ("precision", *["fp32"] * 5, "fp32, bf16 or auto"),
]
COLOURS = {"teacher": "#d1495b", "2-rectified flow": "#174a7c"}
LEFT, TOP, WIDTH, HEIGHT, RIGHT, CELL = 60, 40, 330, 300, 560, 64  # pixels: the curves; the images


def follow(net, z, steps):
    """The states x_t (steps + 1, B, C, H, W) of paths, and from each the end of the straight way on."""
    states, ends = [], []

    def observed(x, t, labels):
        v = net(x, t, labels)
        states.append(x)
        ends.append(x + (1 - len(ends) / steps) * v)  # x_t + (1 - t) v(x_t, t)
        return v

    x = euler(observed, z, steps)
    return torch.stack([*states, x]), torch.stack([*ends, x])


def deviation(states):
    """|x_t - ((1 - t) z + t x)| / |x - z| for states (T + 1, B, C, H, W) of Euler paths: (T + 1, B)."""
    z, x = states[0], states[-1]
    t = torch.linspace(0, 1, len(states), device=x.device)[:, None, None, None, None]
    return (states - ((1 - t) * z + t * x)).flatten(2).norm(dim=2) / (x - z).flatten(1).norm(dim=1)


def main(cfg):
    device = start(cfg, "paths")
    require(cfg.steps > 1 and 0 < cfg.strips <= cfg.paths, "--steps: 2 or more; --strips: 1 up to --paths")

    # 1. Both flows, from the same noise.
    bends, ends = {}, {}  # of each network: deviations (T + 1, B); where the straight way on would end
    for name, file in (("teacher", "01_teacher.pt"), ("2-rectified flow", "03_reflow.pt")):
        net, _ = load_network(cfg, file, device)
        require(not net.args["classes"], f"{file} knows classes: this figure is for networks without")
        size = net.args["image_size"]
        z = noise_for(cfg.seed, range(EVALUATION, EVALUATION + cfg.paths), (3, size, size)).to(device)
        states, ends[name] = follow(net, z, cfg.steps)
        bends[name] = deviation(states).cpu()

    # 2. Left: the deviation from the straight line.
    shown = torch.linspace(0, cfg.steps, min(6, cfg.steps + 1)).round().long().tolist()  # states with images
    height = max(400, TOP + cfg.strips * (2 * (CELL + 4) + 8) + 40)
    canvas = Image.new("RGB", (RIGHT + len(shown) * (CELL + 4), height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    highest = 1.3 * max(bend.max().item() for bend in bends.values())
    draw.text((LEFT, 12), "distance from the straight line (in its lengths)", "black", font)
    draw.text((LEFT + WIDTH / 2, TOP + HEIGHT + 24), "t (0: noise, 1: image)", "black", font, "ma")
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = TOP + HEIGHT * (1 - share)
        draw.line([(LEFT, y), (LEFT + WIDTH, y)], "#dddddd")
        draw.text((LEFT - 6, y), f"{highest * share:.3f}", "black", font, "rm")
        draw.text((LEFT + WIDTH * share, TOP + HEIGHT + 6), f"{share:g}", "black", font, "ma")
    for row, (name, bend) in enumerate(bends.items()):
        x = torch.linspace(LEFT, LEFT + WIDTH, cfg.steps + 1).tolist()
        for curve in (TOP + HEIGHT * (1 - bend.T / highest)).tolist():
            draw.line(list(zip(x, curve)), COLOURS[name])
        text = f"{name}: {bend.max(dim=0).values.mean():.3f} at the widest, on average"
        draw.text((LEFT + 10, TOP + 6 + 18 * row), text, COLOURS[name], font)
        say(text)

    # 3. Right: where the straight way on would end.
    for column, i in enumerate(shown):
        x = RIGHT + column * (CELL + 4)
        draw.text((x + CELL / 2, 20), f"t = {i / cfg.steps:.1f}", "black", font, "ma")
        for strip in range(cfg.strips):
            for row, name in enumerate(ends):
                y = TOP + (2 * strip + row) * (CELL + 4) + 8 * strip
                image = Image.fromarray(to_uint8(ends[name][i, strip].cpu()).permute(1, 2, 0).numpy())
                canvas.paste(image.resize((CELL, CELL), Image.NEAREST), (x, y))
                if column == 0:
                    draw.text((RIGHT - 8, y + CELL / 2), name, COLOURS[name], font, "rm")
    with writing(cfg.folder / "paths.png") as file:
        canvas.save(file, "PNG")
    say(f"wrote {cfg.folder}/paths.png")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
