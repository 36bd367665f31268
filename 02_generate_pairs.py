"""Stage 02: let the teacher pair every noise with an image.

The teacher's flow is an ordinary differential equation. Its velocity v(x, t) has a single value at each
place and time. So two paths cannot cross: from a point there is only one way on, and only one way back. Each
noise z leads to exactly one image x. Euler's method follows it in N small steps, which are N network calls:

    dx/dt = v(x, t),  x = z at the start:        x <- x + v(x, t_i) / N,  t_i = EPS + (1 - EPS) i / N

Such a couple (z, x) is a pair. In stage 01 noise and image were drawn independently of each other; here they
belong together, and this is what stages 03 and 04 learn from. The straight lines between the ends of paths
cross far less often than lines between random ends.

Pair i has the noise noise_for(seed, i). It is rounded to float16, as it is stored, before it is followed: so
the stored noise leads to the stored image.

Reads   out/<preset>/01_teacher.pt
Writes  out/<preset>/02_pairs.pt, 02_pairs.png; until all are there, 02_pairs.pt.parts, from which a run
        continues
Takes   shapes: 5 s on 2 CPU cores (AMD EPYC, torch 2.13)
"""
import datetime
import math
import shutil
import time

import torch

from common import (PAIRS, RANK, WORLD, euler, fingerprint, labels_for, load, load_network, noise_for, read,
                    require, require_same_run, run, save, save_grid, say, settings_of, start, wait_for_all)

SETTINGS = [
    # name           shapes  cifar10_quick  cifar10  ffhq64  imagenet64
    ("n_pairs",      1024,   50_000,        50_000,  50_000, 200_000, "pairs to make. paper: 50,000 or more"),
    ("sample_steps", 10,     50,            100,     100,    100,     "Euler steps. paper: RK45, adaptive"),
    ("precision",    "fp32", "auto",        "fp32",  "fp32", "fp32",  "network's", ("fp32", "bf16", "auto")),
]
BATCH = 128  # ours: pairs per network call


def make_pairs(cfg, name, net, made_from, n, steps, first_index, sampler=euler):
    """Writes n pairs (z, x = sampler(net, z, steps, labels)) as <out>/<preset>/<name>, float16 (n, 3, H, W).

    Their noises are numbered from first_index; labels are uniform over the classes. Each batch is saved when
    it is made, so a run that was broken off continues; several processes share them. Raises UserError if what
    is there was made with other settings.
    """
    require(n and steps, f"{n} pairs of {steps} steps: both must be at least 1")
    path, parts = cfg.folder / name, cfg.folder / f"{name}.parts"
    made = {"made from": made_from, "pairs": n, "steps": steps, "seed": cfg.seed, "precision": net.precision}
    if path.exists() and not cfg.restart:
        require_same_run(path, load(cfg, name)["made"], made)
        say(f"{path} is complete")
        return
    if cfg.restart and RANK == 0:
        path.unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
    wait_for_all()

    # 1. Follow the noises, batch by batch.
    device, shape = net.conv_in.weight.device, (3, net.args["image_size"], net.args["image_size"])
    labels = labels_for(cfg.seed, n, net.args["classes"])
    files = {first: parts / f"{first:09}.pt" for first in range(0, n, BATCH)}
    there = [part for part in files.values() if part.exists()]
    if there:
        require_same_run(parts, read(there[0])["made"], made)
    todo = [first for first in list(files)[RANK::WORLD] if not files[first].exists()]
    say(f"{n:,} pairs x {steps} steps | {len(files)} batches")
    began = said = time.time()
    for done, first in enumerate(todo, 1):
        last = min(first + BATCH, n)
        z = noise_for(cfg.seed, range(first_index + first, first_index + last), shape).half()
        y = None if labels is None else labels[first:last].to(device)
        x = sampler(net, z.to(device).float(), steps, y)
        require(x.isfinite().all(), f"images of pairs {first} to {last - 1} are not finite")
        save(files[first], z=z, x=x.half().cpu(), made=made)
        if time.time() - said > 10:
            said = time.time()
            left = datetime.timedelta(seconds=round((time.time() - began) / done * (len(todo) - done)))
            say(f"{name} | batch {done} of {len(todo)} | left {left}")
    wait_for_all()

    # 2. Join them. The large arrays are mapped files: memory never has to hold them.
    if RANK == 0:
        arrays = {}
        for key in ("z", "x"):
            with open(parts / key, "wb") as file:
                for part in files.values():
                    content = read(part)
                    require_same_run(parts, content["made"], made)
                    file.write(content[key].numpy().tobytes())
            mapped = torch.from_file(str(parts / key), size=n * math.prod(shape), dtype=torch.half)
            arrays[key] = mapped.view(n, *shape)
        save(path, preset=cfg.preset, settings=settings_of(cfg), id=fingerprint(arrays["z"], arrays["x"]),
             made_from=made_from, made=made, **arrays, labels=labels, network=net.args,
             class_names=net.class_names)
        shutil.rmtree(parts)
    wait_for_all()


def main(cfg):
    device = start(cfg, "02 pairs")

    # 1. The teacher (stage 01 saved its averaged weights).
    teacher, artifact = load_network(cfg, "01_teacher.pt", device)

    # 2. Noise -> image.
    make_pairs(cfg, "02_pairs.pt", teacher, artifact["lineage"], cfg.n_pairs, cfg.sample_steps, PAIRS)

    # 3. Look at the first.
    save_grid(cfg.folder / "02_pairs.png", load(cfg, "02_pairs.pt")["x"][:64].split(8))
    say(f"wrote {cfg.folder}/02_pairs.pt, 02_pairs.png | next: 03_annealing_reflow.py")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
