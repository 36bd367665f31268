"""Make images with a trained network, of what you ask for.

    python extras/sample.py --label "red triangle" --n 16

Reads   out/<preset>/04_student.pt (or --network teacher, flow)
Writes  out/<preset>/student_images/000000.png ..., and student_images.png, a grid of the first 64
"""
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (from_uint8, labels_for, load_network, read_settings, require, run, save_grid,
                    say, stage, start, writing)

SETTINGS = {
    "network": dict(others="student", choices=("teacher", "flow", "student"), help="which one"),
    "steps": dict(others=0, help="network calls for an image; 0: as many as in stage 05"),
    "n": dict(others=64, help="how many"),
    "label": dict(others="", help="a class, by name or number; otherwise one at random for each"),
    "rounding": dict(others="round", choices=("round", "truncate"), help="to uint8"),
    "precision": dict(others="fp32", choices=("fp32", "bf16", "auto"), help="of the network"),
}
FILES = {"teacher": "01_teacher.pt", "flow": "03_reflow.pt", "student": "04_student.pt"}


def main(cfg):
    device, evaluation = start(cfg, "sample"), stage("05")

    # 1. The network, and its usual number of calls.
    net, _ = load_network(cfg, FILES[cfg.network], device)
    usual = read_settings(evaluation.SETTINGS, "", ["--preset", cfg.preset])
    steps = cfg.steps or getattr(usual, f"{cfg.network}_steps")

    # 2. What it is asked for.
    require(cfg.n, "--n must be at least 1")
    names = net.class_names
    labels = labels_for(cfg.seed, cfg.n, len(names))
    if cfg.label:
        known = ", ".join(names) or "no classes"
        require(cfg.label in names, f"--label {cfg.label}: the {cfg.network} knows {known}")
        labels = torch.full((cfg.n,), names.index(cfg.label))

    # 3. The images.
    images = evaluation.make_images(net, net, cfg, cfg.n, steps, labels)
    folder = cfg.folder / f"{cfg.network}_images"
    for old in folder.glob("[0-9]*.png"):  # of an earlier run
        old.unlink()
    for i, image in enumerate(images):
        with writing(folder / f"{i:06}.png") as file:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    save_grid(f"{folder}.png", from_uint8(images[:64]).split(8))
    say(f"wrote {cfg.n} images into {folder}, and {folder}.png")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
