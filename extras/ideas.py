"""See the paper's two ideas at work, where pairs are few: each is turned on and off.

    python extras/ideas.py  # after stage 01; three minutes on 2 CPU cores

64 pairs are repeated 900 times. The 2-rectified flow is made without and with annealing. From
the annealed one, the student is made on pairs alone and with guidance, in the same time. (A guided
step takes nearly twice as long, so the student on pairs alone has twice as many steps.)

Reads   out/<preset>/01_teacher.pt
Writes  out/<preset>/ideas.png: six rows of images from the same noises, of the same requests; what
        it is made from, in out/<preset>/ideas
"""
import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (from_uint8, load, load_network, read_settings, require, run, samples,
                    save_grid, say, stage, start)
from extras.drawings import draw_shapes

SETTINGS = {"n_pairs": dict(others=64, help="pairs")}


def make(cfg, folder, number, **settings):
    """Runs a stage with these settings, in out/<preset>/ideas/<folder>; returns that folder."""
    flags = ["--preset", cfg.preset, "--out", str(cfg.folder / "ideas" / folder), "--allow_mixed",
             "--seed", str(cfg.seed), "--device", cfg.device, "--compile", cfg.compile]
    own = read_settings(stage(number).SETTINGS, "", flags)
    vars(own).update(settings, restart=cfg.restart)
    stage(number).main(own)
    return own


def scores(own, name, calls):
    """FD-shapes and the share of matches, as text, from what stage 05 wrote."""
    rows = json.loads((own.folder / f"05_{name}.json").read_text())["rows"]
    row, = [row for row in rows if row.get("calls") == calls]
    return f"FD-shapes {row['distance']:.1f}, {row['matches']:.0%} match"


def prepare(cfg, folder, *files):
    """Copies artifacts into out/<preset>/ideas/<folder>."""
    target = cfg.folder / "ideas" / folder / cfg.preset
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, target)


def main(cfg):
    require(cfg.preset == "shapes", f"--preset {cfg.preset}: this is made for shapes")
    device = start(cfg, "ideas")
    load(cfg, "01_teacher.pt")
    pictures, requests = {}, torch.arange(12) * 7 % 18

    def show(own, file, calls, title):
        net, _ = load_network(own, file, device)
        pictures[title] = samples(net, cfg.seed, range(12), calls, requests)
        return net

    # 1. The flow, without and with annealing.
    for folder, schedule in (("without", "none"), ("with", "linear")):
        prepare(cfg, folder, cfg.folder / "01_teacher.pt")
        make(cfg, folder, "02", n_pairs=cfg.n_pairs)
        make(cfg, folder, "03", schedule=schedule)
        own = make(cfg, folder, "05", only="flow", flow_steps=6)
        found = scores(own, "flow", 6)
        show(own, "03_reflow.pt", 6, f"flow {folder} annealing, 6 calls: {found}")

    # 2. The student of the annealed flow, without and with guidance.
    annealed = cfg.folder / "ideas" / "with" / cfg.preset
    files = ("01_teacher.pt", "02_pairs.pt", "03_reflow.pt")
    prepare(cfg, "alone", *(annealed / file for file in files))
    make(cfg, "alone", "04", guidance=0.0, steps=1000)
    make(cfg, "with", "04")
    for folder, word in (("alone", "without"), ("with", "with")):
        own = make(cfg, folder, "05", only="student")
        found = scores(own, "student", 1)
        net = show(own, "04_student.pt", 1, f"student {word} guidance, 1 call: {found}")

    # 3. What they learn from, and the picture.
    show(own, "01_teacher.pt", 12, "teacher, 12 calls")
    drawings, labels = draw_shapes(500, net.args["image_size"], seed=1)
    real = torch.stack([drawings[labels == request][0] for request in requests])
    pictures["real drawings of what is requested"] = from_uint8(real)
    columns = [net.class_names[request] for request in requests]
    save_grid(cfg.folder / "ideas.png", list(pictures.values()), list(pictures), columns)
    say("\n".join([*pictures, f"wrote {cfg.folder}/ideas.png"]))


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
