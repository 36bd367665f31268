"""Does each idea of the paper help, and by how much? Runs the stages over grids of settings.

    python extras/ablations.py --grid distillation    # one grid
    python extras/ablations.py                        # all of them: hours on 2 CPU cores

A run is one stage in a folder of its own, which links to what it is made from. The settings of the
run and of its parents give the folder its name. So grids share runs, and the same command continues
where it was interrupted. (Changed code does not cause a new run. The tables name the commits.)

Each variant is run with several seeds, and variants are compared seed by seed: runs with the same
seed share everything that the grid does not vary. Stage 05 uses the same noises for all of them.

Writes  extras/results/<grid>.json (all scores), .md (table and verdicts), .png;
        the runs, in <out>/ablations
"""
import hashlib
import json
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw

RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(RESULTS.parent.parent))
import common
from common import (EVALUATION, euler, labels_for, load, load_network, noise_for, read_settings,
                    require, run, say, settings_of, start, writing)

STAGES = {number: common.stage(number)
          for number in ("01", "02", "03", "04", "05")}
MADE = {
    "01": "01_teacher.pt",
    "02": "02_pairs.pt",
    "03": "03_reflow.pt",
    "04": "04_student.pt",
}
T_QUANTILE = {  # of Student's t distribution: for 95 % intervals from 2 to 8 seeds
    2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78,
    6: 2.57, 7: 2.45, 8: 2.36,
}
SETTINGS = {
    "grid": dict(others="all", help="the name of one grid, as in grids()"),
    "seeds": dict(others=5, help="runs of each variant, with the seeds 0, 1, ..."),
    "jobs": dict(others=0, help="runs at a time; 0: one for each CPU core"),
}


class Score(NamedTuple):
    title: str
    form: str  # the format of its numbers
    factor: int = 1  # the table shows factor * score
    sign: int = -1  # 1: more is better, -1: less is better


SCORES = {  # by their names in the rows of 05; add_errors() explains the last four
    "distance": Score("FD-shapes", ".3f"),
    "matches": Score("matches the request, %", ".1f", 100, sign=1),
    "own": Score("error, own noise", ".4f"),
    "fresh": Score("error, fresh noise", ".4f"),
    "bend": Score("bend of its paths, %", ".2f", 100),
    "unknown": Score("unknown at t = 0.5, %", ".1f", 100),
}


# -------------------------------------------------------------------------------------------- Runs

class Run(NamedTuple):
    """A stage ("01" ... "05") and the runs whose files it reads. The seed is not part of it."""
    stage: str
    settings: tuple  # (("steps", 500), ...); all others are the preset's
    parents: tuple

    def cfg(self, cfg, seed):
        """The stage's settings. The folder's name stands for all that the result depends on."""
        arguments = ["--preset", cfg.preset, "--allow_mixed"]
        own = read_settings(STAGES[self.stage].SETTINGS, "", arguments)
        vars(own).update(self.settings, device=cfg.device, seed=seed)
        if self.stage == "05":
            own.seed = 0
        parents = [parent.cfg(cfg, seed).folder.parent.name for parent in self.parents]
        text = f"{parents} {settings_of(own)}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        name = f"{self.stage}-{digest}-seed{seed}"
        own.folder = Path(cfg.out, "ablations", name, cfg.preset)
        return own


def stage(number, *parents, **settings):
    return Run(number, tuple(settings.items()), parents)


def make_all(tasks, cfg):
    """Makes runs, and all that they are made from, with every seed.

    Returns {(run, seed): what make() returns}.
    """
    require(not cfg.restart and cfg.seed == 0,
            "neither --restart (delete out/ablations instead) nor --seed (see --seeds)")
    needed = list(dict.fromkeys(tasks))
    for task in needed:  # the list grows meanwhile
        needed += [parent for parent in task.parents if parent not in needed]
    jobs = cfg.jobs or os.cpu_count()
    threads = max(1, os.cpu_count() // jobs)
    spawn = torch.multiprocessing.get_context("spawn")
    made = {}
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, [threads]) as pool:
        while needed:
            ready = [task for task in needed if not set(needed).intersection(task.parents)]
            needed = [task for task in needed if task not in ready]
            runs = list(product(ready, range(cfg.seeds)))
            results = pool.map(make, runs, [cfg] * len(runs))
            made.update(zip(runs, results))
    return made


def make(run, cfg):
    """Makes a run (Run, seed). Returns the content of its done.json, written when it is finished.

    A run that has this file already is not made again.
    """
    task, seed = run
    own = task.cfg(cfg, seed)
    done = own.folder / "done.json"
    if done.exists():
        return json.loads(done.read_text())
    began = time.time()
    own.folder.mkdir(parents=True, exist_ok=True)
    for parent in task.parents:
        name = MADE[parent.stage]
        link = own.folder / name
        if task.stage == "02":  # it makes the pairs of a flow in the same way
            link = own.folder / MADE["01"]
        link.unlink(missing_ok=True)  # the parent may have been made again
        os.link(parent.cfg(cfg, seed).folder / name, link)
    found = {"origin": origin()}
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


def origin():
    """On which machine, with which torch and commit (a + says that files had changed), and when."""
    capability = torch.backends.cpu.get_cpu_capability()
    git = f"git -C '{RESULTS}' describe --always --dirty=+ 2>/dev/null"
    commit = os.popen(git).read().strip()
    return (f"{os.cpu_count()} cores {capability}, torch {torch.__version__}, "
            f"{time.strftime('%Y-%m-%d')}, commit {commit}")


def made_with(made):
    """A line on runs: how many there are, how long they took, and their origins."""
    hours = sum(one["seconds"] for one in made) / 3600
    origins = "; ".join(sorted({one["origin"] for one in made}))
    return f"{len(made)} runs, one after the other {hours:.1f} hours: {origins}."


def mean_square(difference):
    return difference.square().mean().item()


@torch.no_grad()
def add_errors(cfg, rows):
    """Adds four scores to the rows of a teacher or flow: what its images and paths are like.

    own: the mean squared difference between its images and the teacher's, from the noises of the
        pairs that it was trained on. Learning by heart makes it smaller.
    fresh: the same, from other noises.
    bend: E |v(x_t, t) - (x - z)|^2 / E |x - z|^2 on its own paths from z to x. It is 0 if they are
        straight.
    unknown: the same ratio at t = 0.5 on new lines of the kind that it was trained on: random
        couples for the teacher, the teacher's pairs for a flow. This is what remains unknown to a
        network that has learned perfectly.
    """
    device = start(cfg, "errors")
    pairs = load(cfg, MADE["02"])
    z = pairs["z"].to(device).float()
    x = pairs["x"].to(device)
    y = pairs["labels"].to(device)
    teacher, _ = load_network(cfg, MADE["01"], device)
    n = 256
    numbers = range(EVALUATION, EVALUATION + n)
    z_fresh = noise_for(cfg.seed, numbers, teacher.shape).to(device)
    y_fresh = labels_for(cfg.seed, n, teacher.args["classes"]).to(device)
    x_fresh = euler(teacher, z_fresh, pairs["recipe"]["steps"], y_fresh)
    half = torch.full((n,), 0.5, device=device)
    for row in rows[1:]:  # the first is that of real drawings
        calls = row["calls"]
        if row["network"] == "teacher":
            net = teacher
            ends = z_fresh.roll(1, 0)  # another noise: a random couple
        else:
            net, _ = load_network(cfg, MADE["03"], device)
            ends = z_fresh
        row["own"] = mean_square(euler(net, z, calls, y) - x)
        row["fresh"] = mean_square(euler(net, z_fresh, calls, y_fresh) - x_fresh)
        row["bend"] = bend(net, z_fresh, y_fresh)
        line = x_fresh - ends
        velocity = net((x_fresh + ends) / 2, half, y_fresh)
        row["unknown"] = mean_square(velocity - line) / mean_square(line)


def bend(net, z, labels):
    """The score of this name, see add_errors()."""
    velocities = []

    def observed(x, t, labels):
        velocities.append(net(x, t, labels))
        return velocities[-1]

    line = euler(observed, z, 25, labels) - z
    return mean_square(torch.stack(velocities) - line) / mean_square(line)


# ------------------------------------------------------------------------------------------- Grids

class Grid:
    """Variants of a stage, and claims about them.

    variants: {name: (run of 05, network in its table, calls)}
    claims: [(text, name of the better variant, name of the worse one)]
    """

    def __init__(self, title, variants=None):
        self.title = title
        self.variants = variants or {}
        self.claims = []

    def add_student(self, name, pairs, flow, **settings):
        """A variant: the student of these pairs and this flow. Returns its name.

        settings: those of stage 04 that are not the preset's.
        """
        student = stage("04", pairs, flow, **settings)
        task = stage("05", student, only="student", reference="shapes")
        self.variants[name] = task, "student", 1
        return name

    def add_flow(self, name, flow, *others):
        """Two variants: a flow with 6 calls, and with one.

        others: the teacher and its pairs, for add_errors().
        """
        task = stage("05", flow, *others, only="flow", reference="shapes")
        self.variants[f"{name}, 6 calls"] = task, "2-rectified flow", 6
        self.variants[f"{name}, 1 call"] = task, "2-rectified flow", 1

    def claim(self, text, better, worse):
        """Claims that a variant is better than another: of flows, with 6 calls and with one.

        Does nothing if one of the two is not in the grid.
        """
        for end in ("", ", 6 calls", ", 1 call"):
            if {better + end, worse + end} <= self.variants.keys():
                self.claims.append((text + end, better + end, worse + end))


def chain(**settings):
    """Stage 05 after all others, with the preset's settings but for these."""
    teacher = stage("01", **settings)
    pairs = stage("02", teacher, **settings)
    flow = stage("03", pairs, **settings)
    student = stage("04", pairs, flow, **settings)
    return stage("05", teacher, flow, student, **settings)


TEACHER, FLOW, STUDENT = chain().parents  # the preset's
PAIRS = stage("02", TEACHER)


def pairs_of(n):
    """n pairs of the teacher."""
    return stage("02", TEACHER, n_pairs=n)


# `shapes` had more pairs before, and repeated each one less often. Most grids still do.
MORE_PAIRS = pairs_of(1024)
PLAIN = dict(schedule="none")  # reflow without annealing
ALONE = dict(guidance=0.0)  # distillation on pairs alone


def short_flow(*teacher, **settings):
    """A flow of those pairs, in fewer steps than the preset's: a grid has to end."""
    training = dict(steps=800, anneal_steps=300, batch=16)
    return stage("03", *teacher, MORE_PAIRS, **training, **settings)


def both_ideas(title, pairs):
    """The paper's two ideas, each on and off. A guided step takes as long as two on pairs alone."""
    grid = Grid(f"Annealing and guidance, each on and off, {title}")
    flows = {
        "annealed": stage("03", pairs),
        "not annealed": stage("03", pairs, **PLAIN),
    }
    students = {
        "guided": {},
        "pairs alone": ALONE,
        "pairs alone, 1000 steps": dict(ALONE, steps=1000),
    }
    for name, flow in flows.items():
        for way, settings in students.items():
            grid.add_student(f"student, {name}, {way}", pairs, flow, **settings)
        guided = f"student, {name}, guided"
        alone = f"student, {name}, pairs alone"
        grid.claim(f"guidance helps, equal steps, {name}", guided, alone)
        grid.claim(f"guidance helps, equal time, {name}", guided, f"{alone}, 1000 steps")
    for way in students:
        grid.claim(f"annealing helps the student, {way}",
                   f"student, annealed, {way}", f"student, not annealed, {way}")
    for name, flow in flows.items():
        grid.add_flow(f"flow, {name}", flow, TEACHER, pairs)
    grid.claim("annealing helps the flow", "flow, annealed", "flow, not annealed")
    return grid


def ideas_grid():
    grid = both_ideas("with the preset's settings", PAIRS)
    # Is stage 03 needed at all? Its time goes into distillation on the teacher's pairs.
    skipped = "stage 03 skipped: student from random weights, 3,500 steps on pairs"
    grid.add_student(skipped, PAIRS, FLOW, start_from="scratch", steps=3500, **ALONE)
    grid.claim("stage 03 helps, equal time", "student, annealed, guided", skipped)
    return grid


def paths_grid():
    """How straight are the paths, and how much of a line's direction can be known on it?"""
    grid = Grid("Paths and lines, with the preset's settings")
    task = stage("05", TEACHER, PAIRS, only="teacher", reference="shapes")
    for calls in (12, 1):
        grid.variants[f"teacher, calls: {calls}"] = task, "teacher", calls
    grid.add_flow("flow, annealed", FLOW, TEACHER, PAIRS)
    grid.add_flow("flow, not annealed", stage("03", PAIRS, **PLAIN), TEACHER, PAIRS)
    own_pairs = stage("02", FLOW)  # the flow in the teacher's place
    grid.add_flow("flow of the flow's own pairs", stage("03", own_pairs), TEACHER, PAIRS)
    return grid


def calls_grid():
    grid = Grid("Calls, with the preset's training")
    for network in ("teacher", "2-rectified flow", "student"):
        for n in (12, 4, 2, 1):
            task = stage("05", TEACHER, FLOW, STUDENT,
                         teacher_steps=n, flow_steps=n, student_steps=n)
            grid.variants[f"{network}, calls: {n}"] = task, network, n
    flow = "2-rectified flow, calls: 1"
    grid.claim("reflow makes one call better", flow, "teacher, calls: 1")
    grid.claim("distillation makes one call better", "student, calls: 1", flow)
    return grid


def precision_grid():
    grid = Grid("All stages in fp32 and in bf16")
    for network, n in {"teacher": 12, "2-rectified flow": 6, "student": 1}.items():
        for name in ("fp32", "bf16"):
            grid.variants[f"{network}, {name}"] = chain(precision=name), network, n
        grid.claim(f"{network}: fp32 is better", f"{network}, fp32", f"{network}, bf16")
    return grid


# Annealing reflow: paper, Tables 3 and 4.
ABLATED = {
    "neither": dict(PLAIN, flip=False),
    "flips": PLAIN,
    "annealing": dict(flip=False),
    "both": {},
}


def claim_ablated(grid, start=""):
    """Claims that annealing and flips help, for the variants ABLATED, whose names begin so."""
    for text, better, worse in (
        ("annealing helps, with flips", "both", "flips"),
        ("annealing helps", "annealing", "neither"),
        ("flips help, with annealing", "both", "annealing"),
        ("flips help", "flips", "neither"),
    ):
        grid.claim(start + text, start + better, start + worse)


def reflow_grid():
    """Each pair is seen 12 times."""
    grid = Grid("Annealing reflow, 800 steps; cosine and exponential have flips")
    for name, settings in ABLATED.items():
        grid.add_flow(name, short_flow(**settings))
    claim_ablated(grid)
    for schedule in ("cosine", "exponential"):
        grid.add_flow(schedule, short_flow(schedule=schedule))
        grid.claim(f"linear is better than {schedule}", "both", schedule)
    return grid


def start_grid():
    """A flow as large as the teacher can start from its weights. Can annealing replace them?"""
    grid = Grid("Where a flow as large as the teacher starts, 800 steps")
    large = dict(base=20, mult=(1, 2), blocks=1,
                 attn=(8,))  # as in stage 01
    usual = short_flow(TEACHER, **large, **PLAIN, start_from="teacher")
    grid.add_flow("the teacher's weights", usual)
    grid.add_flow("random weights", short_flow(**large, **PLAIN))
    grid.add_flow("random weights, annealing", short_flow(**large))
    grid.claim("the teacher's weights help", "the teacher's weights", "random weights")
    grid.claim("annealing helps from random weights", "random weights, annealing", "random weights")
    return grid


def passes_grid():
    """Few pairs, and many passes over them.

    The paper measured its gain after 2,000 passes, which is enough to learn pairs by heart. It
    explains the gain so: fixed pairs are hard to learn from random weights. If that is right, the
    error on the pairs' own noises is smaller with annealing.
    """
    grid = Grid("Few pairs, passed over often, by a network of base 8")
    for n, passes in (
        (64, 100),
        (64, 1000),
        (64, 4000),
        (256, 100),
        (256, 500),
    ):
        start = f"{n} pairs, {passes:,} passes: "
        pairs = pairs_of(n)
        steps = passes * n // 64
        annealed = steps * 3 // 8  # the paper's share
        training = dict(steps=steps, anneal_steps=annealed, base=8, batch=64)
        for name, settings in ABLATED.items():
            if steps <= 1000 or "flip" in settings:  # the others would take too long
                flow = stage("03", pairs, **training, **settings)
                grid.add_flow(start + name, flow, TEACHER, pairs)
        claim_ablated(grid, start)
    return grid


def distillation_grid():
    """Paper, Table 5."""
    grid = Grid("Distillation, 300 steps")
    given = MORE_PAIRS, short_flow()
    students = {
        "teacher's pairs": {},
        "own pairs": dict(pairs_from="flow"),
        "from random weights": dict(start_from="scratch"),
    }
    for name, settings in students.items():
        guided = grid.add_student(f"{name}: guided", *given, steps=300, **settings)
        alone = f"{name}: pairs only"
        grid.add_student(alone, *given, steps=300, **settings, **ALONE)
        grid.add_student(f"{alone}, 600 steps", *given, steps=600, **settings, **ALONE)
        grid.claim(f"{name}: guidance helps", guided, alone)
        grid.claim("... at equal time", guided, f"{alone}, 600 steps")
    same_noise = grid.add_student("teacher's pairs: two steps from the pairs' noise", *given,
                                  steps=300, guide_from="pairs")
    guided = "teacher's pairs: guided"
    grid.claim("the start from the 2-rectified flow helps", guided, "from random weights: guided")
    grid.claim("own pairs are better than the teacher's", "own pairs: guided", guided)
    grid.claim("two steps help without fresh noise", same_noise, "teacher's pairs: pairs only")
    grid.claim("fresh noise helps", guided, same_noise)
    return grid


def time_grid():
    grid = Grid("Guidance by training time, with a flow of 1,300 steps")
    flow = stage("03", MORE_PAIRS, steps=1300, anneal_steps=300, batch=16)
    for n in (500, 1000, 2000):
        alone = grid.add_student(f"{n} steps alone", MORE_PAIRS, flow, steps=n, **ALONE)
        if n < 2000:
            guided = grid.add_student(f"{n} steps guided", MORE_PAIRS, flow, steps=n)
            grid.claim(f"guidance helps at {n} steps", guided, alone)
    grid.claim("... at the time of 1000 steps alone", "500 steps guided", "1000 steps alone")
    grid.claim("... at the time of 2000 steps alone", "1000 steps guided", "2000 steps alone")
    few = pairs_of(64), flow
    alone = grid.add_student("64 pairs: 2000 steps alone", *few, steps=2000, **ALONE)
    guided = grid.add_student("64 pairs: 1000 steps guided", *few, steps=1000)
    same_noise = grid.add_student("64 pairs: 1000 steps from their noise", *few,
                                  steps=1000, guide_from="pairs")
    grid.claim("64 pairs: guidance helps at the time of 2000 steps alone", guided, alone)
    grid.claim("64 pairs: fresh noise helps", guided, same_noise)
    return grid


def pairs_grid():
    grid = Grid("Distillation by the number of pairs, 300 steps (stage 03: 1,024 pairs)")
    for n in (64, 256, 1024, 4096):
        given = pairs_of(n), short_flow()
        guided = grid.add_student(f"{n} pairs: guided", *given, steps=300)
        alone = grid.add_student(f"{n} pairs: pairs only", *given, steps=300, **ALONE)
        grid.claim(f"guidance helps with {n} pairs", guided, alone)
    return grid


def size_grid():
    grid = Grid("Students by the channels of their first level, 300 steps")
    for base in (8, 12, 16):
        grid.add_student(f"base {base}", MORE_PAIRS, short_flow(base=base), steps=300)
    grid.claim("base 12 is better than base 8", "base 12", "base 8")
    grid.claim("base 16 is better than base 12", "base 16", "base 12")
    return grid


def grids():
    """{name: Grid} of all experiments."""
    return {
        "ideas": ideas_grid(),
        "few": both_ideas("with 64 pairs", pairs_of(64)),
        "paths": paths_grid(),
        "calls": calls_grid(),
        "precision": precision_grid(),
        "reflow": reflow_grid(),
        "start": start_grid(),
        "passes": passes_grid(),
        "distillation": distillation_grid(),
        "time": time_grid(),
        "pairs": pairs_grid(),
        "size": size_grid(),
    }


# ----------------------------------------------------------------------------------------- Results

def values_of(grid, made, seeds):
    """{variant: {score: [value for each seed]}} from what make_all() returned."""
    values = {}
    for variant, (task, network, calls) in grid.variants.items():
        rows = []
        for seed in range(seeds):
            for row in made[task, seed]["rows"]:
                if row["network"] == network and row["calls"] == calls:
                    rows.append(row)
        values[variant] = {}
        for name, score in SCORES.items():
            if name in rows[0]:
                values[variant][name] = [score.factor * row[name] for row in rows]
    return values


def spread(values, form):
    """A cell: mean ± standard deviation."""
    return f"{mean(values):{form}} ± {stdev(values):{form}}"


def verdict(gains, form):
    """Two cells: the mean gain with its 95 % interval, and what it says about the claim."""
    middle = mean(gains)
    half = T_QUANTILE[len(gains)] * stdev(gains) / math.sqrt(len(gains))
    word = "not shown"
    if middle > half:
        word = "shown"
    if middle < -half:
        word = "opposite"
    return f"{middle:+{form}} ± {half:{form}} | {word}"


def table(grid, values, made):
    """The lines of <grid>.md. made: what make() returned, of each run."""
    def line(text, cells):
        return f"| {text} | {' | '.join(cells)} |"

    first = next(iter(values.values()))
    scores = {name: SCORES[name] for name in first}
    titles = [score.title for score in scores.values()]
    headings = [f"gain in {title} | verdict" for title in titles]
    seeds = len(first["distance"])
    lines = [f"**{grid.title}**: mean ± standard deviation of {seeds} seeds.", "",
             line("variant", titles), "|---|" + "---:|" * len(titles)]
    for variant, found in values.items():
        cells = [spread(found[name], score.form) for name, score in scores.items()]
        lines.append(line(variant, cells))
    lines += ["", line("claim", headings), "|---|" + "---:|---|" * len(titles)]
    for text, better, worse in grid.claims:
        cells = []
        for name, score in scores.items():
            couples = zip(values[better][name], values[worse][name])
            gains = [score.sign * (a - b) for a, b in couples]
            cells.append(verdict(gains, score.form))
        lines.append(line(text, cells))
    n = len(grid.claims) * len(scores)
    note = ("Gains are above 0 where the claim holds. Their intervals are 95 % intervals of the "
            "differences seed by seed, not corrected for the number of claims: if variants never "
            f"differed, {0.05 * n:.1f} of these {n} gains would on average still be called shown "
            "or opposite.")
    return lines + ["", note, "", made_with(made), ""]


def plot(path, grid, values):
    """A line for each variant, with a dot for each seed and a bar at the mean."""
    found = [scores["distance"] for scores in values.values()]
    low = 0.93 * min(map(min, found))
    high = 1.07 * max(map(max, found))

    def at(value):
        return 310 + 490 * math.log(value / low) / math.log(high / low)

    canvas = Image.new("RGB", (820, 60 + 19 * len(found)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), f"{grid.title}: FD-shapes, logarithmic", "black", font_size=13)
    for tick in (1, 1.5, 2, 3, 4, 6,
                 8, 10, 15, 20, 30, 40, 60):
        if low < tick < high:
            x = at(tick)
            draw.line((x, 50, x, canvas.height), "#dddddd")
            draw.text((x, 34), f"{tick:g}", "black", font_size=11, anchor="ma")
    rows = range(60, canvas.height, 19)
    for y, variant, seeds in zip(rows, values, found):
        draw.text((8, y), variant, "black", font_size=12, anchor="lm")
        x = at(mean(seeds))
        draw.line((x, y - 7, x, y + 7), "#d1495b", 3)
        for value in seeds:
            draw.circle((at(value), y), 3, outline="#174a7c")
    canvas.save(path)


def main(cfg):
    found = grids()
    require(cfg.preset == "shapes", f"--preset {cfg.preset}: the grids are made for shapes")
    require(cfg.seeds in T_QUANTILE, f"--seeds {cfg.seeds}: choose from 2 to 8")
    require(cfg.grid in ("all", *found), f"--grid {cfg.grid}: all, or one of {', '.join(found)}")
    for name, grid in found.items():
        if cfg.grid in ("all", name):
            made = make_all([task for task, _, _ in grid.variants.values()], cfg)
            values = values_of(grid, made, cfg.seeds)
            text = "\n".join(table(grid, values, made.values()))
            content = json.dumps({"grid": name, "values": values}, indent=0)
            (RESULTS / f"{name}.md").write_text(text)
            (RESULTS / f"{name}.json").write_text(content)
            plot(RESULTS / f"{name}.png", grid, values)
            say(f"\n{text}\nwrote {RESULTS}/{name}.json, .md, .png")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
