"""Does each idea of the paper help, and by how much? The stages, over grids of settings and seeds.

    python extras/ablations.py                        # every grid, 5 seeds, on `shapes`: hours on 2 CPU cores
    python extras/ablations.py --grid distillation    # one of them

A run is one stage in a folder of its own, which links to the artifacts of the runs that it is made from. Its
settings and theirs name the folder: grids share runs, none is made twice, the same command continues. (Code
that changes makes no new run; the tables name the commits.) Variants are compared by seed: the same seed
shares what the grid does not vary. 05 has the same noise for all (--seed 0).

Writes  extras/results/<grid>.json (all scores), .md (table and verdicts), .png; runs into <out>/ablations
"""
import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "extras" / "results"
sys.path.insert(0, str(ROOT))
from common import (EVALUATION, euler, labels_for, load, load_network, noise_for, read_settings, require, run,
                    say, settings_of, start, writing)

STAGES = {name[:2]: importlib.import_module(name) for name in (
    "01_train_teacher", "02_generate_pairs", "03_annealing_reflow", "04_flow_guided_distill", "05_eval_fid")}
MADE = {"01": "01_teacher.pt", "02": "02_pairs.pt", "03": "03_reflow.pt", "04": "04_student.pt"}
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, 97.5 %, n values
# Name in a row of 05: (title, sign of what is better, factor, digits). own, fresh: see errors().
SCORES = {"distance": ("FD-shapes", -1, 1, 3), "named": ("named as asked, %", 1, 100, 1),
          "own": ("error, own noise", -1, 1, 4), "fresh": ("error, fresh noise", -1, 1, 4)}
SETTINGS = [  # name, its value for each preset, text
    ("grid", *["all"] * 5, "calls, reflow, distillation, time, pairs, start, size, precision, passes; all"),
    ("seeds", *[5] * 5, "runs of each variant, with the seeds 0, 1, ..."),
    ("jobs", *[0] * 5, "runs at a time; 0: one for each CPU core"),
]


# --------------------------------------------------------------------------------------------------- The runs

@dataclass(frozen=True)
class Run:
    """A stage ("01" ... "05") on what its parents made. The seed is not part of it."""
    stage: str
    settings: tuple  # (("steps", 500), ...); what is not named is the preset's
    parents: tuple

    def ancestors(self):
        """The run itself and all that it was made from."""
        return {self}.union(*(parent.ancestors() for parent in self.parents))

    def cfg(self, preset, *words):
        """The stage's settings. Pairs may be others than those that a flow was made from."""
        cfg = read_settings(STAGES[self.stage].SETTINGS, "", ["--preset", preset, "--allow_mixed", *words])
        return argparse.Namespace(**{**vars(cfg), **dict(self.settings)})

    def depends_on(self, preset):
        """Text of all that the result depends on but the seed: every setting of this run and its parents."""
        parents = (parent.depends_on(preset) for parent in self.parents)
        return "\n".join([self.stage, str(settings_of(self.cfg(preset))), *parents])

    def folder(self, cfg, seed):
        digest = hashlib.sha256(self.depends_on(cfg.preset).encode()).hexdigest()[:10]
        return Path(cfg.out, "ablations", f"{self.stage}-{digest}-seed{seed}", cfg.preset)


def stage(number, *parents, **settings):
    return Run(number, tuple(settings.items()), parents)


def make(task, seed, cfg):
    """Makes a run, unless done.json in its folder says that it is done; returns that file's content."""
    folder, module, began = task.folder(cfg, seed), STAGES[task.stage], time.time()
    if (folder / "done.json").exists():
        return json.loads((folder / "done.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for parent in task.parents:
        link = folder / MADE[parent.stage]
        link.unlink(missing_ok=True)  # the parent may have been made again
        os.link(parent.folder(cfg, seed) / link.name, link)
    stage_cfg = task.cfg(cfg.preset, "--out", str(folder.parent), "--device", cfg.device,
                         "--seed", str(0 if task.stage == "05" else seed))
    changes = [f"{key}={value}" for key, value in task.settings]
    found = {"run": " ".join([module.__name__, f"seed={stage_cfg.seed}", *changes]), "origin": origin(cfg)}
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        module.main(stage_cfg)
        for results in folder.glob("05_*.json"):
            found |= json.loads(results.read_text())
        if task.stage == "05" and {"01", "02"} <= {parent.stage for parent in task.parents}:
            errors(stage_cfg, found["rows"])
    found["seconds"] = round(time.time() - began, 1)
    with writing(folder / "done.json") as file:
        file.write(json.dumps(found).encode())
    say(f"{found['seconds']:.0f} s | {found['run']}")
    return found


@torch.no_grad()
def errors(cfg, rows):
    """Adds to a flow's rows the mean squared difference of its images and the teacher's from the same noises:
    own, those of the pairs that it learned from, and fresh ones. Learning by heart makes own smaller."""
    device, pairs = start(cfg, "errors"), load(cfg, MADE["02"])
    (flow, _), (teacher, _) = (load_network(cfg, MADE[number], device) for number in ("03", "01"))
    z, x, y = (pairs[key].to(device) for key in ("z", "x", "labels"))
    z_fresh = noise_for(cfg.seed, range(EVALUATION, EVALUATION + 256), z.shape[1:]).to(device)
    y_fresh = labels_for(cfg.seed, 256, flow.args["classes"]).to(device)
    x_fresh = euler(teacher, z_fresh, pairs["made"]["steps"], y_fresh)
    for row in rows:
        if row["network"] == "2-rectified flow":
            row["own"] = (euler(flow, z.float(), row["calls"], y) - x).square().mean().item()
            row["fresh"] = (euler(flow, z_fresh, row["calls"], y_fresh) - x_fresh).square().mean().item()


def origin(cfg):
    """On what a run is made, when, and with which commit. A + after the commit: files differ from it."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    git = subprocess.run(words, capture_output=True, text=True).stdout if shutil.which("git") else ""
    machine = f"{os.cpu_count()} cores {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available() and cfg.device.startswith(("auto", "cuda")):
        machine = torch.cuda.get_device_name()
    today, commit = time.strftime("%Y-%m-%d"), git.strip() or "unknown"
    return f"{machine}, torch {torch.__version__}, {today}, commit {commit}"


def made_with(made):
    """A line that tells where, when, with which commits and in which time the runs were made."""
    hours, origins = sum(one["seconds"] for one in made) / 3600, sorted({one["origin"] for one in made})
    return f"{len(made)} runs, one after the other {hours:.1f} hours: {'; '.join(origins)}."


def make_all(tasks, cfg):
    """{(run, seed): what make() returns} of the runs and all that they are made from, with every seed."""
    require(not cfg.restart, f"--restart: delete {cfg.out}/ablations instead, or choose another --out")
    require(cfg.seed == 0, "--seed: every variant is run with the seeds 0, 1, ...; their number is --seeds")
    jobs, made = cfg.jobs or os.cpu_count(), {}
    needed = sorted(set().union(*(task.ancestors() for task in tasks)), key=str)
    spawn, threads = multiprocessing.get_context("spawn"), (max(1, os.cpu_count() // jobs),)
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, threads) as pool:
        for number in STAGES:  # what a run is made from is of earlier stages
            keys = [(task, seed) for task in needed if task.stage == number for seed in range(cfg.seeds)]
            say(f"stage {number} | {len(keys)} runs")
            made |= zip(keys, pool.map(make, *zip(*keys), [cfg] * len(keys)) if keys else [])
    return made


# -------------------------------------------------------------------------------------------------- The grids

@dataclass
class Grid:
    title: str
    variants: dict = field(default_factory=dict)  # {name: (run of 05, network in its table, calls)}
    claims: list = field(default_factory=list)  # (text, the better variant, the worse one)

    def add(self, name, trained, *others):
        """A variant for a trained student; for a flow two, with 6 calls and with one."""
        kind, network = {"03": ("flow", "2-rectified flow"), "04": ("student", "student")}[trained.stage]
        task = stage("05", trained, *others, only=kind, reference="shapes")
        for calls in (6, 1) if kind == "flow" else (1,):
            end = {6: ", 6 calls", 1: ", 1 call"}[calls] if kind == "flow" else ""
            self.variants[name + end] = task, network, calls

    def claim(self, text, better, worse):
        """That a variant is better than another (flows: with 6 calls, and with one), if both are there."""
        for end in ("", ", 6 calls", ", 1 call"):
            if better + end in self.variants and worse + end in self.variants:
                self.claims.append((text + end, better + end, worse + end))


TEACHER = stage("01")
PAIRS = stage("02", TEACHER)
ABLATED = {"neither": dict(schedule="none", flip=False), "flips": dict(schedule="none"),
           "annealing": dict(flip=False), "both": {}}  # settings of 03
HELPS = (("annealing helps, with flips", "both", "flips"), ("annealing helps", "annealing", "neither"),
         ("flips help, with annealing", "both", "annealing"), ("flips help", "flips", "neither"))


# Shorter than the preset's: differences show earlier, and a grid has to end.
def reflow_of(*parents, **settings):
    return stage("03", *parents or [PAIRS], **{"steps": 800, "anneal_steps": 300, **settings})


def distilled(flow=reflow_of(), pairs=PAIRS, **settings):
    return stage("04", pairs, flow, **{"steps": 300, **settings})


def whole_chain(calls, **settings):
    """05 for networks that were all made with the preset's settings, but for `settings`."""
    teacher = stage("01", **settings)
    pairs = stage("02", teacher, **settings)
    flow = stage("03", pairs, **settings)
    return stage("05", teacher, flow, stage("04", pairs, flow, **settings), **settings, **calls)


def grids():
    """{name: Grid} of all experiments."""
    calls = Grid("Calls, with the preset's training")
    for network in ("teacher", "2-rectified flow", "student"):
        for n in (12, 4, 2, 1):
            chain = whole_chain(dict(teacher_steps=n, flow_steps=n, student_steps=n))
            calls.variants[f"{network}, calls: {n}"] = chain, network, n
    calls.claim("reflow makes one call better", "2-rectified flow, calls: 1", "teacher, calls: 1")
    calls.claim("distillation makes one call better", "student, calls: 1", "2-rectified flow, calls: 1")

    # Paper, Tables 3 and 4. Each pair is seen 12 times.
    reflow = Grid("Annealing reflow, 800 steps; cosine and exponential have flips")
    for name, settings in {**ABLATED, **{s: dict(schedule=s) for s in ("cosine", "exponential")}}.items():
        reflow.add(name, reflow_of(**settings))
    for claim in (*HELPS, ("linear is better than cosine", "both", "cosine"),
                  ("linear is better than exponential", "both", "exponential")):
        reflow.claim(*claim)

    # Paper, Table 5. A guided step takes twice as long: 600 steps without guidance take the time of 300.
    distillation, alone = Grid("Distillation, 300 steps"), dict(guidance=0.0)
    for what, settings in (("teacher's pairs", {}), ("own pairs", dict(pairs_from="flow")),
                           ("from random weights", dict(start_from="scratch"))):
        distillation.add(f"{what}: guided", distilled(**settings))
        distillation.add(f"{what}: pairs only", distilled(**settings, **alone))
        distillation.add(f"{what}: pairs only, 600 steps", distilled(**settings, **alone, steps=600))
        distillation.claim(f"{what}: guidance helps", f"{what}: guided", f"{what}: pairs only")
        distillation.claim("... at equal time", f"{what}: guided", f"{what}: pairs only, 600 steps")
    own, teachers, random = ("own pairs: guided", "teacher's pairs: guided", "from random weights: guided")
    distillation.claim("the start from the 2-rectified flow helps", teachers, random)
    distillation.claim("own pairs are better than the teacher's", own, teachers)
    on_pairs = "teacher's pairs: two steps from the pairs' noise"
    distillation.add(on_pairs, distilled(guide_from="pairs"))
    distillation.claim("two steps help without fresh noise", on_pairs, "teacher's pairs: pairs only")
    distillation.claim("fresh noise helps", teachers, on_pairs)

    longer, flow = Grid("Guidance by training time, with the preset's flow"), stage("03", PAIRS)
    for n in (500, 1000, 2000):
        name = f"{n} steps alone"
        longer.add(name, distilled(flow, steps=n, **alone))
        if n < 2000:
            longer.add(f"{n} steps guided", distilled(flow, steps=n))
            longer.claim(f"guidance helps at {n} steps", f"{n} steps guided", name)
        if n > 500:
            longer.claim(f"... at the time of {n} steps alone", f"{n // 2} steps guided", name)
    few = stage("02", TEACHER, n_pairs=64)
    longer.add("64 pairs: 2000 steps alone", distilled(flow, few, steps=2000, **alone))
    longer.add("64 pairs: 1000 steps guided", distilled(flow, few, steps=1000))
    longer.add("64 pairs: 1000 steps from their noise", distilled(flow, few, steps=1000, guide_from="pairs"))
    for text, worse in (("guidance helps at the time of 2000 steps alone", "2000 steps alone"),
                        ("fresh noise helps", "1000 steps from their noise")):
        longer.claim(f"64 pairs: {text}", "64 pairs: 1000 steps guided", f"64 pairs: {worse}")

    by_pairs = Grid("Distillation by the number of pairs, 300 steps (stage 03: 1,024 pairs)")
    for n in (64, 256, 1024, 4096):
        pairs = PAIRS if n == 1024 else stage("02", TEACHER, n_pairs=n)
        by_pairs.add(f"{n} pairs: guided", distilled(pairs=pairs))
        by_pairs.add(f"{n} pairs: pairs only", distilled(pairs=pairs, **alone))
        by_pairs.claim(f"guidance helps with {n} pairs", f"{n} pairs: guided", f"{n} pairs: pairs only")

    # A flow of the teacher's size can start from the teacher's weights: what annealing is to make up for.
    begun = Grid("Where a flow as large as the teacher starts, 800 steps")
    cfg = read_settings(STAGES["01"].SETTINGS, "", ["--preset", "shapes"])
    large = {key: getattr(cfg, key) for key in ("base", "mult", "blocks", "attn")}
    trained = dict(schedule="none", start_from="teacher")
    begun.add("the teacher's weights", reflow_of(TEACHER, PAIRS, **large, **trained))
    begun.add("random weights", reflow_of(**large, schedule="none"))
    begun.add("random weights, annealing", reflow_of(**large))
    begun.claim("the teacher's weights help", "the teacher's weights", "random weights")
    begun.claim("annealing helps from random weights", "random weights, annealing", "random weights")

    # The paper's gain from annealing was measured after 2,000 passes over its pairs, by a network that could
    # learn them by heart. So: few pairs, in a small network, over and over. Its explanation, that fixed pairs
    # are hard to learn from random weights, predicts a smaller error on the pairs' own noise with annealing.
    passes = Grid("Few pairs, passed over often, by a network of base 8")
    for n, times in ((64, 100), (64, 1000), (64, 4000), (256, 100), (256, 500)):
        pairs, steps = stage("02", TEACHER, n_pairs=n), times * n // 64
        for name in ABLATED if steps <= 1000 else ("neither", "annealing"):  # flips would take too long
            # K: paper: 300,000 of 800,000 steps.
            settings = dict(base=8, batch=64, steps=steps, anneal_steps=steps * 3 // 8, **ABLATED[name])
            passes.add(f"{n} pairs, {times:,} passes: {name}", reflow_of(pairs, **settings), TEACHER, pairs)
        for text, *both in HELPS:
            passes.claim(f"{n} pairs, {times:,} passes: {text}",
                         *(f"{n} pairs, {times:,} passes: {name}" for name in both))

    size = Grid("Students by the channels of their first level, 300 steps")
    for base in (8, 12, 16):
        size.add(f"base {base}", distilled(reflow_of(base=base)))
    size.claim("base 12 is better than base 8", "base 12", "base 8")
    size.claim("base 16 is better than base 12", "base 16", "base 12")

    precision = Grid("All stages in fp32 and in bf16")
    for network, n in (("teacher", 12), ("2-rectified flow", 6), ("student", 1)):
        for name in ("fp32", "bf16"):
            precision.variants[f"{network}, {name}"] = whole_chain({}, precision=name), network, n
        precision.claim(f"{network}: fp32 is better", f"{network}, fp32", f"{network}, bf16")
    return {"calls": calls, "reflow": reflow, "distillation": distillation, "time": longer, "pairs": by_pairs,
            "start": begun, "size": size, "precision": precision, "passes": passes}


# ------------------------------------------------------------------------------------------------- The tables

def values_of(grid, made, seeds):
    """{variant: {score: [value for each seed]}} from what make_all() returned."""
    judges = {one["protocol"]["judge"] for one in made.values() if "protocol" in one}
    require(len(judges) == 1, f"the runs had different judges ({judges}): delete their folders 05-*")
    values = {}
    for variant, (task, network, calls) in grid.variants.items():
        rows = [row for seed in range(seeds) for row in made[task, seed]["rows"]
                if (row["network"], row["calls"]) == (network, calls)]
        values[variant] = {score: [float(f"{row[score] * factor:.6g}") for row in rows]
                           for score, (_, _, factor, _) in SCORES.items() if score in rows[0]}
    return values


def table(grid, values, made):
    """The lines of <grid>.md. made: what make() returned, of each run."""
    scores = list(next(iter(values.values())))
    seeds = len(values[next(iter(values))]["distance"])
    lines = [f"**{grid.title}**: mean ± standard deviation of {seeds} seeds.", "",
             f"| variant | {' | '.join(SCORES[score][0] for score in scores)} |",
             "|---|" + "---:|" * len(scores)]
    for variant, found in values.items():
        cells = [f"{mean(found[score]):.{SCORES[score][3]}f} ± {stdev(found[score]):.{SCORES[score][3]}f}"
                 for score in scores]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines += ["", f"| claim |{''.join(f' gain in {SCORES[score][0]} | verdict |' for score in scores)}",
              "|---|" + "---:|---|" * len(scores)]
    for text, better, worse in grid.claims:
        cells = [text]
        for score in scores:
            _, sign, _, digits = SCORES[score]
            gains = [sign * (a - b) for a, b in zip(values[better][score], values[worse][score])]
            middle, half = mean(gains), T_QUANTILE[seeds] * stdev(gains) / math.sqrt(seeds)
            verdict = "shown" if middle > half else "opposite" if middle < -half else "not shown"
            cells += [f"{middle:+.{digits}f} ± {half:.{digits}f}", verdict]
        lines.append(f"| {' | '.join(cells)} |")
    n = len(grid.claims) * len(scores)
    return [*lines, "", "Gains are above 0 where the claim holds, with 95 % intervals; seeds are compared in "
            f"pairs. Each interval stands for itself: of {n} gains without any truth in them, {0.05 * n:.1f} "
            "would on average be called shown or opposite.", "", made_with(made), ""]


def plot(path, grid, values):
    """A line for each variant, with a dot for each seed and a bar at the mean."""
    canvas = Image.new("RGB", (820, 60 + 19 * len(values)), "white")
    draw, found = ImageDraw.Draw(canvas), [scores["distance"] for scores in values.values()]
    low, high = 0.93 * min(map(min, found)), 1.07 * max(map(max, found))

    def at(value):
        return 310 + 490 * math.log(value / low) / math.log(high / low)

    draw.text((8, 6), f"{grid.title}: FD-shapes, logarithmic", "black", font_size=13)
    for tick in (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60, 80):
        if low < tick < high:
            draw.line([(at(tick), 50), (at(tick), canvas.height)], "#dddddd")
            draw.text((at(tick), 34), f"{tick:g}", "black", font_size=11, anchor="ma")
    for y, variant, seeds in zip(range(60, canvas.height, 19), values, found):
        draw.text((8, y), variant, "black", font_size=12, anchor="lm")
        draw.line([(at(mean(seeds)), y - 7), (at(mean(seeds)), y + 7)], "#d1495b", 3)
        for value in seeds:
            draw.ellipse([at(value) - 3, y - 3, at(value) + 3, y + 3], outline="#174a7c")
    with writing(path) as file:
        canvas.save(file, "PNG")


def main(cfg):
    start(cfg, "ablations")
    require(cfg.preset == "shapes", f"--preset {cfg.preset}: the grids' budgets are made for shapes")
    require(cfg.seeds in T_QUANTILE, f"--seeds {cfg.seeds}: choose from 2 to 8")
    require(cfg.grid in ("all", *grids()), f"--grid {cfg.grid}: choose from all, {', '.join(grids())}")
    for name in grids() if cfg.grid == "all" else [cfg.grid]:
        grid = grids()[name]
        made = make_all([task for task, _, _ in grid.variants.values()], cfg)
        values = values_of(grid, made, cfg.seeds)
        lines = table(grid, values, made.values())
        facts = json.dumps({"grid": name, "made": made_with(made.values()), "values": values}, indent=0)
        for suffix, text in (("json", facts), ("md", "\n".join(lines))):
            with writing(RESULTS / f"{name}.{suffix}") as file:
                file.write(text.encode())
        plot(RESULTS / f"{name}.png", grid, values)
        say("\n".join(["", *lines, f"wrote {RESULTS}/{name}.json, .md, .png"]))


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
