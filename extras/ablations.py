"""Does each idea of the paper help, and by how much? The stages, over grids of settings and seeds.

    python extras/ablations.py --grid distillation    # or, without --grid, all: hours on 2 CPU cores

A run is one stage in a folder of its own, which links to what it is made from. Its settings and those of its
parents name the folder: grids share runs, none is made twice, the same command continues. (Code that changes
makes no new run; the tables name the commits.) Variants are compared by seed: the same seed shares what the
grid does not vary. 05 has the same noise for all (--seed 0).

Writes  extras/results/<grid>.json (all scores), .md (table and verdicts), .png; runs into <out>/ablations
"""
import hashlib
import json
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw

RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(RESULTS.parent.parent))
import common
from common import (EPS, EVALUATION, euler, labels_for, load, load_network, noise_for, read_settings, require,
                    run, say, settings_of, start, writing)

STAGES = {number: common.stage(number) for number in ("01", "02", "03", "04", "05")}
MADE = {"01": "01_teacher.pt", "02": "02_pairs.pt", "03": "03_reflow.pt", "04": "04_student.pt"}
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, 97.5 %, n values
# Name in a row of 05: (title, factor, sign of what is better, format). own, fresh: see add_errors().
SCORES = {"distance": ("FD-shapes", 1, -1, ".3f"), "named": ("matches the request, %", 100, 1, ".1f"),
          "own": ("error, own noise", 1, -1, ".4f"), "fresh": ("error, fresh noise", 1, -1, ".4f"),
          "bend": ("bend of its paths, %", 100, -1, ".2f"),
          "unknown": ("unknown at t = 0.5, %", 100, -1, ".1f")}
SETTINGS = {
    "grid": dict(others="all", help="one of those in grids()"),
    "seeds": dict(others=5, help="runs of each variant, with the seeds 0, 1, ..."),
    "jobs": dict(others=0, help="runs at a time; 0: one for each CPU core"),
}


class Run(NamedTuple):
    """A stage ("01" ... "05") on what its parents made. The seed is not part of it."""
    stage: str
    settings: tuple  # (("steps", 500), ...); what is not named is the preset's
    parents: tuple

    def cfg(self, cfg, seed):
        """The stage's own settings. All that the result depends on, parents too, is in the folder's name."""
        own = read_settings(STAGES[self.stage].SETTINGS, "", ["--preset", cfg.preset, "--allow_mixed"])
        vars(own).update(self.settings, device=cfg.device, seed=0 if self.stage == "05" else seed)
        parents = [parent.cfg(cfg, seed).folder.parent.name for parent in self.parents]
        digest = hashlib.sha256(f"{parents} {settings_of(own)}".encode()).hexdigest()[:10]
        own.folder = Path(cfg.out, "ablations", f"{self.stage}-{digest}-seed{seed}", cfg.preset)
        return own


def stage(number, *parents, **settings):
    return Run(number, tuple(settings.items()), parents)


def make_all(tasks, cfg):
    """{(run, seed): what make() returns} of the runs and all that they are made from, with every seed."""
    require(not cfg.restart and cfg.seed == 0, "no --restart (delete out/ablations), no --seed (see --seeds)")
    needed, made, jobs = list(dict.fromkeys(tasks)), {}, cfg.jobs or os.cpu_count()
    for task in needed:  # the list grows meanwhile
        needed += [parent for parent in task.parents if parent not in needed]
    spawn, threads = torch.multiprocessing.get_context("spawn"), max(1, os.cpu_count() // jobs)
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, [threads]) as pool:
        for number in sorted({task.stage for task in needed}):  # a run is made from those of earlier stages
            runs = [(task, seed) for task in needed if task.stage == number for seed in range(cfg.seeds)]
            made.update(zip(runs, pool.map(make, *zip(*runs), [cfg] * len(runs))))
    return made


def make(task, seed, cfg):
    """Makes a run, unless done.json in its folder says that it is done; returns that file's content."""
    own, began = task.cfg(cfg, seed), time.time()
    done = own.folder / "done.json"
    if done.exists():
        return json.loads(done.read_text())
    own.folder.mkdir(parents=True, exist_ok=True)
    for parent in task.parents:
        link = own.folder / MADE[parent.stage]
        if task.stage == "02":  # a flow may make pairs, too
            link = own.folder / MADE["01"]
        link.unlink(missing_ok=True)  # the parent may have been made again
        os.link(parent.cfg(cfg, seed).folder / MADE[parent.stage], link)
    machine = f"{os.cpu_count()} cores {torch.backends.cpu.get_cpu_capability()}"
    commit = os.popen(f"git -C '{RESULTS}' describe --always --dirty=+ 2>/dev/null").read().strip()
    found = {"origin": f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, commit {commit}"}
    with open(own.folder / "log.txt", "a") as log, redirect_stdout(log):
        STAGES[task.stage].main(own)
        for results in own.folder.glob("05_*.json"):
            found |= json.loads(results.read_text())
            if (own.folder / MADE["02"]).exists():
                add_errors(own, found["rows"])
    found["seconds"] = round(time.time() - began, 1)
    with writing(done) as file:
        file.write(json.dumps(found).encode())
    say(f"{found['seconds']:.0f} s | stage {task.stage}, seed {seed}, {dict(task.settings)}")
    return found


@torch.no_grad()
def add_errors(cfg, rows):
    """Adds to the rows of a teacher or flow what its images and its paths are like.

    own, fresh: the mean squared difference of its images and the teacher's from the same noises, those of the
    pairs that it learned from, and others. (Learning by heart makes own smaller.)
    bend: E |v(x_t, t) - (x - z)|^2 / E |x - z|^2 on its own paths from z to x; 0 if they are straight.
    unknown: the same at t = 0.5 on the lines that it learned from, but new ones: random couples for the
    teacher, the teacher's pairs for a flow. No network can do without that part, if it has learned well.
    """
    device, pairs = start(cfg, "errors"), load(cfg, MADE["02"])
    teacher, _ = load_network(cfg, MADE["01"], device)
    z, x, y = (pairs[key].to(device) for key in ("z", "x", "labels"))
    z_fresh = noise_for(cfg.seed, [EVALUATION + i for i in range(256)], teacher.shape).to(device)
    y_fresh = labels_for(cfg.seed, 256, teacher.args["classes"]).to(device)
    x_fresh = euler(teacher, z_fresh, pairs["made"]["steps"], y_fresh)
    for row in rows[1:]:  # the first is that of real drawings
        net, ends = teacher, z_fresh.roll(1, 0)  # another noise: a random couple
        if row["network"] != "teacher":
            (net, _), ends = load_network(cfg, MADE["03"], device), z_fresh
        made = euler(net, z_fresh, row["calls"], y_fresh)
        row["own"] = (euler(net, z.float(), row["calls"], y) - x).square().mean().item()
        row["fresh"] = (made - x_fresh).square().mean().item()
        half = torch.full((256,), 0.5, device=device)
        line = x_fresh - ends
        error = net((x_fresh + ends) / 2, half, y_fresh) - line
        row["unknown"] = (error.square().mean() / line.square().mean()).item()
        place, line, errors = z_fresh, euler(net, z_fresh, 25, y_fresh) - z_fresh, []
        for i in range(25):
            velocity = net(place, torch.full((256,), EPS + (1 - EPS) * i / 25, device=device), y_fresh)
            errors.append((velocity - line).square().mean())
            place = place + velocity / 25
        row["bend"] = (torch.stack(errors).mean() / line.square().mean()).item()


def made_with(made):
    """A line: how many runs, in which time, on what, when, with which commits (a +: files differed)."""
    hours, origins = sum(one["seconds"] for one in made) / 3600, sorted({one["origin"] for one in made})
    return f"{len(made)} runs, one after the other {hours:.1f} hours: {'; '.join(origins)}."


class Grid:
    """Variants {name: (run of 05, network in its table, calls)}; claims (text, better variant, worse one)."""

    def __init__(self, title, variants=None):
        self.title, self.variants, self.claims = title, variants or {}, []

    def add(self, name, trained, *others):
        """A variant for a trained student; for a flow two, with 6 calls and with one."""
        if trained.stage == "04":
            self.variants[name] = stage("05", trained, only="student", reference="shapes"), "student", 1
        else:
            task = stage("05", trained, *others, only="flow", reference="shapes")
            self.variants[f"{name}, 6 calls"] = task, "2-rectified flow", 6
            self.variants[f"{name}, 1 call"] = task, "2-rectified flow", 1

    def claim(self, text, better, worse):
        """That a variant is better than another (flows: with 6 calls, and with one), if both are there."""
        for end in ("", ", 6 calls", ", 1 call"):
            if better + end in self.variants and worse + end in self.variants:
                self.claims.append((text + end, better + end, worse + end))


def grids():
    """{name: Grid} of all experiments."""
    def chain(number, **settings):
        """A stage after those before it, all with the preset's settings but for these."""
        before = {"01": (), "02": ("01",), "03": ("02",), "04": ("02", "03"), "05": ("01", "03", "04")}
        return stage(number, *(chain(parent, **settings) for parent in before[number]), **settings)

    found, teacher, few, preset_flow = {}, chain("01"), chain("02"), chain("03")
    plain, alone = dict(schedule="none"), dict(guidance=0.0)

    # The paper's two ideas, each on and off: with the preset's own settings, and with fewer pairs.
    students = {"guided": {}, "pairs alone": alone, "pairs alone, 1000 steps": dict(alone, steps=1000)}
    for key, title, some in (("ideas", "with the preset's settings", few),
                             ("few", "with 64 pairs", stage("02", teacher, n_pairs=64))):
        grid = found[key] = Grid(f"Annealing and guidance, each on and off, {title}")
        flows = {"annealed": stage("03", some), "not annealed": stage("03", some, **plain)}
        for name, flow in flows.items():
            for way, settings in students.items():
                grid.add(f"student, {name}, {way}", stage("04", some, flow, **settings))
            guided, on_pairs = f"student, {name}, guided", f"student, {name}, pairs alone"
            grid.claim(f"guidance helps, equal steps, {name}", guided, on_pairs)
            grid.claim(f"guidance helps, equal time, {name}", guided, f"{on_pairs}, 1000 steps")
        for way in students:
            grid.claim(f"annealing helps the student, {way}", f"student, annealed, {way}",
                       f"student, not annealed, {way}")
        for name, flow in flows.items():
            grid.add(f"flow, {name}", flow, teacher, some)
        grid.claim("annealing helps the flow", "flow, annealed", "flow, not annealed")
    # What a reader asks next: is stage 03 needed? The same time, on the teacher's pairs at once.
    grid = found["ideas"]
    skipped = "stage 03 skipped: student from random weights, 3,500 steps on pairs"
    grid.add(skipped, stage("04", few, preset_flow, start_from="scratch", steps=3500, **alone))
    grid.claim("stage 03 helps, equal time", "student, annealed, guided", skipped)

    # How straight are the paths, and how much of a line's direction can be known on it?
    grid = found["paths"] = Grid("Paths and lines, with the preset's settings")
    task = stage("05", teacher, few, only="teacher", reference="shapes")
    for calls in (12, 1):
        grid.variants[f"teacher, calls: {calls}"] = task, "teacher", calls
    for name, settings in (("annealed", {}), ("not annealed", plain)):
        grid.add(f"flow, {name}", stage("03", few, **settings), teacher, few)
    own = stage("02", preset_flow)  # the flow in the teacher's place
    grid.add("flow of the flow's own pairs", stage("03", own), teacher, few)

    # From here on more pairs, each passed over less often: what `shapes` was before.
    pairs = stage("02", teacher, n_pairs=1024)
    first_flow = stage("03", pairs, steps=1300, anneal_steps=300, batch=16)
    grid = found["calls"] = Grid("Calls, with the preset's training")
    for network in ("teacher", "2-rectified flow", "student"):
        for n in (12, 4, 2, 1):
            task = stage("05", *chain("05").parents, teacher_steps=n, flow_steps=n, student_steps=n)
            grid.variants[f"{network}, calls: {n}"] = task, network, n
    grid.claim("reflow makes one call better", "2-rectified flow, calls: 1", "teacher, calls: 1")
    grid.claim("distillation makes one call better", "student, calls: 1", "2-rectified flow, calls: 1")
    grid = found["precision"] = Grid("All stages in fp32 and in bf16")
    for network, n in (("teacher", 12), ("2-rectified flow", 6), ("student", 1)):
        for name in ("fp32", "bf16"):
            grid.variants[f"{network}, {name}"] = chain("05", precision=name), network, n
        grid.claim(f"{network}: fp32 is better", f"{network}, fp32", f"{network}, bf16")

    # Annealing reflow: paper, Tables 3 and 4. Each pair is seen 12 times, but in the last grid.
    short = dict(steps=800, anneal_steps=300, batch=16)  # a grid has to end
    ablated = {"neither": dict(plain, flip=False), "flips": plain, "annealing": dict(flip=False), "both": {}}
    helps = (("annealing helps, with flips", "both", "flips"), ("annealing helps", "annealing", "neither"),
             ("flips help, with annealing", "both", "annealing"), ("flips help", "flips", "neither"))
    grid = found["reflow"] = Grid("Annealing reflow, 800 steps; cosine and exponential have flips")
    for name, settings in ablated.items():
        grid.add(name, stage("03", pairs, **short, **settings))
    for text, better, worse in helps:
        grid.claim(text, better, worse)
    for schedule in ("cosine", "exponential"):
        grid.add(schedule, stage("03", pairs, **short, schedule=schedule))
        grid.claim(f"linear is better than {schedule}", "both", schedule)
    # A flow of the teacher's size can start from the teacher's weights: what annealing is to make up for.
    grid = found["start"] = Grid("Where a flow as large as the teacher starts, 800 steps")
    large = dict(**short, base=20, mult=(1, 2), blocks=1, attn=(8,))  # stage 01's, for shapes
    grid.add("the teacher's weights", stage("03", teacher, pairs, **large, **plain, start_from="teacher"))
    grid.add("random weights", stage("03", pairs, **large, **plain))
    grid.add("random weights, annealing", stage("03", pairs, **large))
    grid.claim("the teacher's weights help", "the teacher's weights", "random weights")
    grid.claim("annealing helps from random weights", "random weights, annealing", "random weights")
    # The paper's gain was measured after 2,000 passes, enough to learn pairs by heart. Its explanation, that
    # fixed pairs are hard to learn from random weights, predicts a smaller error on the pairs' own noise.
    grid = found["passes"] = Grid("Few pairs, passed over often, by a network of base 8")
    for n, times in ((64, 100), (64, 1000), (64, 4000), (256, 100), (256, 500)):
        what, some, steps = f"{n} pairs, {times:,} passes", stage("02", teacher, n_pairs=n), times * n // 64
        training = dict(steps=steps, anneal_steps=steps * 3 // 8, base=8, batch=64)  # 3/8 as in the paper
        for name in ablated if steps <= 1000 else ("neither", "annealing"):  # flips would take too long
            grid.add(f"{what}: {name}", stage("03", some, **training, **ablated[name]), teacher, some)
        for text, better, worse in helps:
            grid.claim(f"{what}: {text}", f"{what}: {better}", f"{what}: {worse}")

    # Distillation: paper, Table 5. A guided step takes as long as two on pairs alone.
    flow = stage("03", pairs, **short)
    grid = found["distillation"] = Grid("Distillation, 300 steps")
    for what, settings in (("teacher's pairs", {}), ("own pairs", dict(pairs_from="flow")),
                           ("from random weights", dict(start_from="scratch"))):
        grid.add(f"{what}: guided", stage("04", pairs, flow, steps=300, **settings))
        grid.add(f"{what}: pairs only", stage("04", pairs, flow, steps=300, **settings, **alone))
        grid.add(f"{what}: pairs only, 600 steps", stage("04", pairs, flow, steps=600, **settings, **alone))
        grid.claim(f"{what}: guidance helps", f"{what}: guided", f"{what}: pairs only")
        grid.claim("... at equal time", f"{what}: guided", f"{what}: pairs only, 600 steps")
    guided, on_pairs = "teacher's pairs: guided", "teacher's pairs: two steps from the pairs' noise"
    grid.add(on_pairs, stage("04", pairs, flow, steps=300, guide_from="pairs"))
    grid.claim("the start from the 2-rectified flow helps", guided, "from random weights: guided")
    grid.claim("own pairs are better than the teacher's", "own pairs: guided", guided)
    grid.claim("two steps help without fresh noise", on_pairs, "teacher's pairs: pairs only")
    grid.claim("fresh noise helps", guided, on_pairs)
    grid = found["time"] = Grid("Guidance by training time, with a flow of 1,300 steps")
    for n in (500, 1000, 2000):
        grid.add(f"{n} steps alone", stage("04", pairs, first_flow, steps=n, **alone))
        if n < 2000:
            grid.add(f"{n} steps guided", stage("04", pairs, first_flow, steps=n))
    grid.claim("guidance helps at 500 steps", "500 steps guided", "500 steps alone")
    grid.claim("guidance helps at 1000 steps", "1000 steps guided", "1000 steps alone")
    grid.claim("... at the time of 1000 steps alone", "500 steps guided", "1000 steps alone")
    grid.claim("... at the time of 2000 steps alone", "1000 steps guided", "2000 steps alone")
    guided, on_pairs = "64 pairs: 1000 steps guided", "64 pairs: 1000 steps from their noise"
    longer, few = "64 pairs: 2000 steps alone", stage("02", teacher, n_pairs=64)
    grid.add(longer, stage("04", few, first_flow, steps=2000, **alone))
    grid.add(guided, stage("04", few, first_flow, steps=1000))
    grid.add(on_pairs, stage("04", few, first_flow, steps=1000, guide_from="pairs"))
    grid.claim("64 pairs: guidance helps at the time of 2000 steps alone", guided, longer)
    grid.claim("64 pairs: fresh noise helps", guided, on_pairs)
    grid = found["pairs"] = Grid("Distillation by the number of pairs, 300 steps (stage 03: 1,024 pairs)")
    for n in (64, 256, 1024, 4096):
        some = pairs if n == 1024 else stage("02", teacher, n_pairs=n)
        grid.add(f"{n} pairs: guided", stage("04", some, flow, steps=300))
        grid.add(f"{n} pairs: pairs only", stage("04", some, flow, steps=300, **alone))
        grid.claim(f"guidance helps with {n} pairs", f"{n} pairs: guided", f"{n} pairs: pairs only")
    grid = found["size"] = Grid("Students by the channels of their first level, 300 steps")
    for base in (8, 12, 16):
        grid.add(f"base {base}", stage("04", pairs, stage("03", pairs, **short, base=base), steps=300))
    grid.claim("base 12 is better than base 8", "base 12", "base 8")
    grid.claim("base 16 is better than base 12", "base 16", "base 12")
    return found


def values_of(grid, made, seeds):
    """{variant: {score: [value for each seed]}} from what make_all() returned."""
    values = {}
    for variant, (task, network, calls) in grid.variants.items():
        rows = [row for seed in range(seeds) for row in made[task, seed]["rows"]
                if row["network"] == network and row["calls"] == calls]
        values[variant] = {score: [factor * row[score] for row in rows]
                           for score, (_, factor, _, _) in SCORES.items() if score in rows[0]}
    return values


def table(grid, values, made):
    """The lines of <grid>.md. made: what make() returned, of each run."""
    first = next(iter(values.values()))
    scores, n_seeds = {score: SCORES[score] for score in first}, len(first["distance"])
    titles = [title for title, *_ in scores.values()]
    lines = [f"**{grid.title}**: mean ± standard deviation of {n_seeds} seeds.", "",
             f"| variant | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for variant, found in values.items():
        cells = [f"{mean(found[s]):{form}} ± {stdev(found[s]):{form}}" for s, (*_, form) in scores.items()]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines += ["", f"| claim |{''.join(f' gain in {title} | verdict |' for title in titles)}",
              "|---|" + "---:|---|" * len(titles)]
    for text, better, worse in grid.claims:
        line = f"| {text} |"
        for score, (_, _, sign, form) in scores.items():
            gains = [sign * (a - b) for a, b in zip(values[better][score], values[worse][score])]
            middle, half = mean(gains), T_QUANTILE[n_seeds] * stdev(gains) / math.sqrt(n_seeds)
            verdict = "shown" if middle > half else "opposite" if middle < -half else "not shown"
            line += f" {middle:+{form}} ± {half:{form}} | {verdict} |"
        lines.append(line)
    n = len(grid.claims) * len(titles)
    return [*lines, "", "Gains are above 0 where the claim holds, with 95 % intervals; seeds are compared in "
            f"pairs. Each interval stands for itself: of {n} gains without any truth in them, {0.05 * n:.1f} "
            "would on average be called shown or opposite.", "", made_with(made), ""]


def plot(path, grid, values):
    """A line for each variant, with a dot for each seed and a bar at the mean."""
    def at(value):
        return 310 + 490 * math.log(value / low) / math.log(high / low)

    found = [scores["distance"] for scores in values.values()]
    low, high = 0.93 * min(map(min, found)), 1.07 * max(map(max, found))
    canvas = Image.new("RGB", (820, 60 + 19 * len(found)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), f"{grid.title}: FD-shapes, logarithmic", "black", font_size=13)
    for tick in [n for n in (1, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 60) if low < n < high]:
        draw.line((at(tick), 50, at(tick), canvas.height), "#dddddd")
        draw.text((at(tick), 34), f"{tick:g}", "black", font_size=11, anchor="ma")
    for y, variant, seeds in zip(range(60, canvas.height, 19), values, found):
        draw.text((8, y), variant, "black", font_size=12, anchor="lm")
        draw.line((at(mean(seeds)), y - 7, at(mean(seeds)), y + 7), "#d1495b", 3)
        for value in seeds:
            draw.circle((at(value), y), 3, outline="#174a7c")
    canvas.save(path)


def main(cfg):
    require(cfg.preset == "shapes", f"--preset {cfg.preset}: the grids' budgets are made for shapes")
    require(cfg.seeds in T_QUANTILE, f"--seeds {cfg.seeds}: choose from 2 to 8")
    require(cfg.grid in ("all", *grids()), f"--grid {cfg.grid}: choose from all, {', '.join(grids())}")
    for name, grid in grids().items():
        if cfg.grid in ("all", name):
            made = make_all([task for task, _, _ in grid.variants.values()], cfg)
            values = values_of(grid, made, cfg.seeds)
            lines = table(grid, values, made.values())
            (RESULTS / f"{name}.md").write_text("\n".join(lines))
            (RESULTS / f"{name}.json").write_text(json.dumps({"grid": name, "values": values}, indent=0))
            plot(RESULTS / f"{name}.png", grid, values)
            say("\n".join(["", *lines, f"wrote {RESULTS}/{name}.json, .md, .png"]))


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
