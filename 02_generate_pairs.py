"""Stage 02: let the teacher pair every noise with an image.

The teacher's flow is an ordinary differential equation. Its velocity v(x, t) has a single value at
each place and time, so two paths cannot cross: from a point there is only one way on, and only one
way back. Each noise z therefore leads to exactly one image x (with labels: to one for each label).
Euler's method follows it in N small steps, which are N network calls:

    dx/dt = v(x, t),  x = z at the start:      x <- x + v(x, t_i) / N,  t_i = EPS + (1 - EPS) i / N

Such a couple (z, x) is a pair. In stage 01 noise and image were drawn independently of each other;
here they belong together, and this is what stages 03 and 04 learn from.

That is about the paths. But the velocity changes little between neighbouring points, so two noises
close to each other mostly lead to similar images. The straight lines between the ends of pairs
therefore run side by side, and cross less often than those between random ends. (That is a
tendency, not a theorem: docs/results.md measures it.)

Pair i has the noise noise_for(seed, i). It is rounded to float16, as it is stored, before it is
followed: so the stored noise leads to the stored image.

Reads   out/<preset>/01_teacher.pt
Writes  out/<preset>/02_pairs.pt, 02_pairs.png; until all pairs are there, 02_pairs.pt.parts, from
        which an interrupted run continues
Takes   shapes: 2 s on 2 CPU cores (AMD EPYC, torch 2.13)
"""
import shutil
import time

import torch

from common import (LOG_SECONDS, PAIRS, RANK, WORLD, compiled, euler, labels_for, load,
                    load_network, noise_for, read, require, require_same_run, run, sampling_batch,
                    save, save_artifact, save_grid, say, start, wait_for_all)

SETTINGS = {
    "n_pairs": dict(shapes=160, cifar10_quick=16_384, imagenet64=200_000, others=50_000,
                    help="paper: 50,000 or more"),
    # paper: RK45, a solver that chooses its steps itself
    "sample_steps": dict(shapes=10, cifar10_quick=16, others=100, help="Euler steps"),
    "precision": dict(shapes="fp32", others="auto", choices=("fp32", "bf16", "auto"),
                      help="of the network"),
}


def follow(net, seed, indices, steps, labels, sampler):
    """The noises with these indices, and the images to which they lead: z, x (N, 3, H, W), float16.

    x = sampler(net, z, steps, labels)
    """
    z = noise_for(seed, indices, net.shape).half()
    if labels is not None:
        labels = labels.to(net.device)
    x = sampler(net, z.to(net.device).float(), steps, labels)
    return z, x.half().cpu()


def make_pairs(cfg, name, net, made_from, n, steps, first_index, sampler=euler):
    """Writes n pairs (z, x = sampler(net, z, steps, labels)) as <out>/<preset>/<name>.

    z and x are float16 (n, 3, H, W). The noises are numbered from first_index, and the labels are
    uniform over the classes. The method is in follow(); the rest is here so that a long run can be
    interrupted and shared. Each batch is saved when it is made, so an interrupted run continues;
    several processes share the batches. Stage 04 calls this too, for the flow's own pairs, and
    extras/import_checkpoint.py with another sampler. Raises UserError if what is there was made
    with other settings.
    """
    require(n, "there must be at least 1 pair")
    path, folder = cfg.folder / name, cfg.folder / f"{name}.parts"
    recipe = {"made from": made_from, "pairs": n, "steps": steps, "seed": cfg.seed,
              "precision": net.precision}

    # 1. Is there anything to do?
    if RANK == 0 and cfg.restart:
        path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    wait_for_all()
    if path.exists():
        require_same_run(path, load(cfg, name).get("recipe", {}), recipe)
        say(f"{path} is complete")
        if RANK == 0:
            shutil.rmtree(folder, ignore_errors=True)
        return

    # 2. Which batches are still to be made, by this process? Each becomes a file.
    batch = sampling_batch(net)
    batch_recipe = {**recipe, "images in a call": batch}
    files = {first: folder / f"{first:09}.pt" for first in range(0, n, batch)}
    for file in files.values():
        if file.exists():
            require_same_run(folder, read(file).get("recipe", {}), batch_recipe)
    mine = list(files)[RANK::WORLD]
    todo = [first for first in mine if not files[first].exists()]
    say(f"{n:,} pairs x {steps} steps | {len(files)} batches of {batch}")

    # 3. Follow their noises.
    labels = labels_for(cfg.seed, n, net.args["classes"])
    fast = compiled(cfg, net, len(todo) * steps, batch)
    logged = time.monotonic()
    for done, first in enumerate(todo, 1):
        last = min(first + batch, n)
        indices = range(first_index + first, first_index + last)
        y = None if labels is None else labels[first:last]
        network = fast if len(indices) == batch else net  # it was compiled for full batches
        z, x = follow(network, cfg.seed, indices, steps, y, sampler)
        require(x.isfinite().all(), f"images of pairs {first} to {last - 1} are not finite")
        save(files[first], z=z, x=x, recipe=batch_recipe)
        if time.monotonic() - logged > LOG_SECONDS:
            say(f"{name} | batch {done} of {len(todo)}")
            logged = time.monotonic()
    wait_for_all()

    # 4. Join them, in memory: 0.6 GB for 50,000 pairs of 32x32.
    if RANK == 0:
        parts = [read(file) for file in files.values()]
        z = torch.cat([part["z"] for part in parts])
        x = torch.cat([part["x"] for part in parts])
        save_artifact(cfg, name, net, made_from, (z, x),
                      z=z, x=x, labels=labels, recipe=recipe)
        shutil.rmtree(folder)
    wait_for_all()


def main(cfg):
    device = start(cfg, "02 pairs")

    # 1. The teacher (stage 01 saved its averaged weights).
    teacher, artifact = load_network(cfg, "01_teacher.pt", device)

    # 2. Noise -> image.
    make_pairs(cfg, "02_pairs.pt", teacher, artifact["lineage"], cfg.n_pairs, cfg.sample_steps,
               PAIRS)

    # 3. Look at the first ones.
    images = load(cfg, "02_pairs.pt")["x"][:64]
    save_grid(cfg.folder / "02_pairs.png", images.split(8))
    say(f"wrote {cfg.folder}/02_pairs.pt, 02_pairs.png | next: 03_annealing_reflow.py")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
