"""An animation: the teacher's calls, step by step, beside the student's single call.

    python extras/calls_gif.py  # after the five stages

Both start from the same noises and draw the same requests.

Reads   out/<preset>/01_teacher.pt, 04_student.pt
Writes  out/<preset>/calls.gif
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import EVALUATION, euler, load_network, noise_for, run, say, start, to_uint8, writing

SETTINGS = {
    "calls": dict(others=12, help="of the teacher"),
    "precision": dict(others="fp32", choices=("fp32", "bf16", "auto"), help="of the networks"),
}


@torch.no_grad()
def states(net, z, calls, labels):
    """What euler() sees on its way: the noise, the state after each call, the image."""
    seen = []

    def watched(x, t, labels):
        seen.append(x)
        return net(x, t, labels)

    x = euler(watched, z, calls, labels)
    return [*seen, x]


def animate(path, teacher, student):
    """Writes the states (12, 3, H, W) of both as a GIF, a frame for each call of the teacher."""
    frames = []
    for call in range(len(teacher)):
        now = min(call, len(student) - 1)
        sides = []
        for x in (teacher[call], student[now]):
            x = to_uint8(x).repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
            x = F.pad(x, (1, 1, 1, 1), value=255)
            rows = [torch.cat(list(row), dim=2) for row in x.split(4)]
            side = torch.cat(rows, dim=1)  # 4 images wide, 3 high
            sides.append(F.pad(side, (8, 8, 26, 8), value=255))
        pixels = torch.cat(sides, dim=2).permute(1, 2, 0)
        frame = Image.fromarray(pixels.numpy())
        draw = ImageDraw.Draw(frame)
        draw.text((9, 6), f"teacher: call {call} of {len(teacher) - 1}", "black", font_size=14)
        draw.text((frame.width // 2 + 9, 6), f"student: call {now} of 1", "black", font_size=14)
        frames.append(frame.quantize(256, Image.Quantize.FASTOCTREE))
    waits = [900, *[350] * (len(frames) - 2), 2500]  # milliseconds
    first, *others = frames
    with writing(path) as file:
        first.save(file, "GIF", save_all=True, append_images=others, duration=waits, loop=0)


def main(cfg):
    device = start(cfg, "animation")
    teacher, _ = load_network(cfg, "01_teacher.pt", device)
    student, _ = load_network(cfg, "04_student.pt", device)
    labels = None
    if teacher.class_names:
        labels = torch.arange(12, device=device) * 7 % len(teacher.class_names)
    numbers = range(EVALUATION, EVALUATION + 12)
    z = noise_for(cfg.seed, numbers, teacher.shape).to(device)
    path = cfg.folder / "calls.gif"
    long_way = states(teacher, z, cfg.calls, labels)
    animate(path, long_way, states(student, z, 1, labels))
    say(f"wrote {path}")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
