"""Stage 02: let the teacher pair every noise with an image.

The teacher's flow is an ordinary differential equation: each noise z leads to exactly one image x. Following it for many
noises gives pairs that belong together, unlike stage 01's random couples. They are what stages 03 and 04 learn from.

    dx/dt = v(x, t) from x = z at t = 0:        x <- x + v(x, t_i) / N,  t_i = EPS + (1 - EPS) i / N

An EDM network (extras/import_checkpoint.py), whose students are the paper's best, has its own equation and solver: edm_heun.

The file holds the images (float16) and one seed: pair i's noise is noise_for(seed, i), drawn again when it is needed.

Reads   out/<preset>/01_teacher.pt
Writes  out/<preset>/02_pairs.pt, 02_pairs.png; until all pairs are there, 02_pairs.pt.parts, from which a run continues
Takes   shapes: 24 s on 2 CPU cores (AMD EPYC, torch 2.13, bf16)
Next    python 03_annealing_reflow.py
"""
from dataclasses import dataclass
from typing import Literal

from common import (PAIRS, Settings, check_ranges, command_for, count_parameters, load, load_network, make_pairs, run, save_grid,
                    say, start)


@dataclass
class Config(Settings):
    n_pairs: int = 2048  # pairs to make. ours; paper: 50,000 or more
    sample_steps: int = 16  # Euler steps, each one network call per image. ours; an EDM teacher: 18 steps, 35 calls
    sample_batch: int = 128  # images per network call: speed and memory only, the pairs are the same. ours
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of convolutions and products; auto: bf16 where the hardware has it

    def __post_init__(self):
        check_ranges(self, n_pairs=(1, 10**9), sample_steps=(1, None), sample_batch=(1, None))


PAPER = dict(n_pairs=50_000, sample_steps=100, precision="fp32")  # ours: 100 Euler steps; the paper's solver is RK45 with about 127 calls

PRESETS = {
    "shapes": {},
    "cifar10_quick": {**PAPER, "sample_steps": 50, "precision": "auto"},  # ours
    "cifar10": PAPER,
    "ffhq64": PAPER,
    "imagenet64": {**PAPER, "n_pairs": 200_000},  # ours: 200 for each class
}


def main(cfg):
    device = start(cfg, "02 pairs")

    # 1. The teacher (its EMA weights are all that stage 01 saved).
    teacher, artifact = load_network(cfg.folder / "01_teacher.pt", cfg, device, cfg.precision)
    say(f"teacher | {count_parameters(teacher):,} parameters | from {cfg.folder}/01_teacher.pt")

    # 2. Noise -> image, with labels drawn uniformly where the teacher knows classes; saved in one file.
    path = cfg.folder / "02_pairs.pt"
    make_pairs(path, cfg, teacher, artifact, cfg.n_pairs, cfg.sample_steps, PAIRS)

    # 3. Look at the first.
    save_grid(cfg.folder / "02_pairs.png", load(path, cfg)["images"][:64].split(8))
    say(f"wrote {path}, 02_pairs.png | next: {command_for('03_annealing_reflow.py', cfg)}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
