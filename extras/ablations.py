"""Does each idea of the paper help, and by how much? The stages, over grids of settings and seeds.

    python extras/ablations.py                        # every grid, 5 seeds, on `shapes`: hours on 2 CPU cores
    python extras/ablations.py --grid distillation    # one of them

A run is one stage in a folder of its own, which links to the artifacts of the runs that it is made from. Its
settings and theirs name the folder: grids share runs, none is made twice, the same command continues. (Code
that changes makes no new run; the tables name the commits.) Variants are compared by seed: the same seed
shares what the grid does not vary. 05 has the same noise for all (--seed 0).

Writes  extras/results/<grid>.json (all scores), .md (table and verdicts), .png; runs into <out>/ablations
"""
import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
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
    ("grid", *["all"] * 5, "calls, reflow, distillation, pairs, start, passes, size, precision, or all"),
    ("seeds", *[5] * 5, "runs of each variant, with the seeds 0, 1, ..."),
    ("jobs", *[0] * 5, "runs at a time; 0: one for each CPU core"),
    ("results", *[str(ROOT / "extras" / "results")] * 5, "folder of the tables and plots"),
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

    def arguments(self):
        """The settings as on the command line."""
        words = []
        for key, value in self.settings:
            if isinstance(value, bool):
                words.append(f"--{key}" if value else f"--no-{key}")
            else:
                words.append(f"--{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
        if len(self.ancestors()) > len({task.stage for task in self.ancestors()}):
            words.append("--allow_mixed")  # such as other pairs than those that the flow was made from
        return words

    def depends_on(self, preset):
        """Text of all that the result depends on but the seed: every setting of this run and its parents."""
        cfg = read_settings(STAGES[self.stage].SETTINGS, "", ["--preset", preset, *self.arguments()])
        return "\n".join([self.stage, str(settings_of(cfg)), *(p.depends_on(preset) for p in self.parents)])

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
    words = ["--preset", cfg.preset, "--seed", str(0 if task.stage == "05" else seed), *task.arguments()]
    found = {"command": " ".join([module.__name__, *words]), "seed": seed, **origin(cfg)}
    stage_cfg = read_settings(module.SETTINGS, "", [*words, "--out", str(folder.parent), "--device", cfg.device])
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        module.main(stage_cfg)
        for results in folder.glob("05_*.json"):
            found |= json.loads(results.read_text())
        if task.stage == "05" and {"01", "02"} <= {parent.stage for parent in task.parents}:
            errors(stage_cfg, found["rows"])
    found["seconds"] = round(time.time() - began, 1)
    with writing(folder / "done.json") as file:
        file.write(json.dumps(found).encode())
    say(f"{found['seconds']:.0f} s | seed {seed} | {found['command']}")
    return found


@torch.no_grad()
def errors(cfg, rows):
    """Adds to a flow's rows how far, squared, its images are from those that the teacher has of the same noise.

    own: for the noises of the pairs that it learned from; fresh: for new ones. What is learned by heart makes
    own smaller than fresh.
    """
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
    """{"commit", "machine", "date"} of a run that begins. A + after the commit: the code differs from it."""
    words, cpu = ["git", "-C", ROOT, "describe", "--always", "--exclude=*", "--dirty=+"], Path("/proc/cpuinfo")
    try:
        commit = subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        commit = "unknown"
    models = re.findall(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else [platform.processor()]
    name = f"{os.cpu_count()} cores {models[0]}"
    if torch.cuda.is_available() and cfg.device.startswith(("auto", "cuda")):
        name = torch.cuda.get_device_name()
    return {"commit": commit, "machine": f"{name}, torch {torch.__version__}", "date": time.strftime("%Y-%m-%d")}


def make_all(tasks, cfg):
    """{(run, seed): what make() returns} of the runs and all that they are made from, each with every seed."""
    require(not cfg.restart, f"--restart: delete {cfg.out}/ablations instead, or choose another --out")
    require(cfg.seed == 0, "--seed: every variant is run with the seeds 0, 1, ...; their number is --seeds")
    jobs, made = cfg.jobs or os.cpu_count(), {}
    needed = sorted(set().union(*(task.ancestors() for task in tasks)), key=str)
    with concurrent.futures.ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), torch.set_num_threads,
            (max(1, os.cpu_count() // jobs),)) as pool:
        for number in STAGES:  # what a run is made from is of earlier stages
            keys = [(task, seed) for task in needed if task.stage == number for seed in range(cfg.seeds)]
            say(f"stage {number} | {len(keys)} runs")
            made |= zip(keys, pool.map(make, *zip(*keys), [cfg] * len(keys)) if keys else [])
    return made


# -------------------------------------------------------------------------------------------------- The grids

@dataclass
class Grid:
    title: str
    columns: dict  # {title: (network in 05's table, its calls; None: the most)}
    variants: dict = field(default_factory=dict)  # {name: the runs of 05 for it}
    claims: list = field(default_factory=list)  # (text, better, worse), each a (factor, variant, column)

    def claim(self, text, better, worse):
        """That a variant is better than another, in every column."""
        for column in self.columns:
            self.claims.append((text + f", {column}" * (len(self.columns) > 1),
                                (1, better, column), (1, worse, column)))


TEACHER = stage("01")
PAIRS = stage("02", TEACHER)
FLOW = {"6 calls": ("2-rectified flow", 6), "1 call": ("2-rectified flow", 1)}
STUDENT = {"student": ("student", 1)}
ABLATED = {"neither": dict(schedule="none", flip=False), "flips": dict(schedule="none"),
           "annealing": dict(flip=False), "both": {}}  # settings of 03
HELPS = (("annealing helps, with flips", "both", "flips"), ("annealing helps", "annealing", "neither"),
         ("flips help, with annealing", "both", "annealing"), ("flips help", "flips", "neither"))


# Shorter than the preset's: differences show earlier, and a grid has to end.
def reflow_of(*parents, **settings):
    return stage("03", *parents or [PAIRS], **{"steps": 800, "anneal_steps": 300, **settings})


def distilled(flow=reflow_of(), pairs=PAIRS, **settings):
    return stage("04", pairs, flow, **{"steps": 300, **settings})


def evaluated(trained, *others, **settings):
    """05 for the flow or student that a run trained."""
    only = {"03": "flow", "04": "student"}[trained.stage]
    return (stage("05", trained, *others, only=only, reference="shapes", **settings),)


def whole_chain(networks, **settings):
    """05 for networks that were all made with the preset's settings, but for `settings`."""
    teacher = stage("01", **settings)
    pairs = stage("02", teacher, **settings)
    flow = stage("03", pairs, **settings)
    return (stage("05", teacher, flow, stage("04", pairs, flow, **settings), **settings, **networks),)


def grids():
    """{name: Grid} of all experiments."""
    names = ("teacher", "2-rectified flow", "student")
    calls = Grid("Calls, with the preset's training", {name: (name, None) for name in names})
    for n in (1, 2, 4, 12):
        networks = dict(teacher_steps=n, flow_steps=n, student_steps=n)
        calls.variants[f"{n} calls" if n > 1 else "1 call"] = whole_chain(networks)
    one = [(1, "1 call", name) for name in names]
    calls.claims = [("reflow makes one call better", one[1], one[0]),
                    ("distillation makes one call better", one[2], one[1]),
                    ("the student's one call is at most a sixth of the teacher's", one[2],
                     (1 / 6, "1 call", "teacher"))]

    # Paper, Tables 3 and 4. Each pair is seen 12 times.
    reflow = Grid("Annealing reflow, 800 steps; cosine and exponential have flips", FLOW)
    for name, settings in {**ABLATED, **{s: dict(schedule=s) for s in ("cosine", "exponential")}}.items():
        reflow.variants[name] = evaluated(reflow_of(**settings))
    for claim in (*HELPS, ("linear is better than cosine", "both", "cosine"),
                  ("linear is better than exponential", "both", "exponential")):
        reflow.claim(*claim)

    # Paper, Table 5. A guided step takes twice as long: 600 steps without guidance take the time of 300.
    distillation = Grid("Distillation, 300 steps", STUDENT)
    for what, settings in (("teacher's pairs", {}), ("own pairs", dict(pairs_from="flow")),
                           ("from random weights", dict(start_from="scratch"))):
        for how, more in (("guided", {}), ("pairs only", dict(guidance=0.0)),
                          ("pairs only, 600 steps", dict(guidance=0.0, steps=600)),
                          ("two steps from the pairs' noise", dict(guide_from="pairs"))):
            if what == "teacher's pairs" or how != "two steps from the pairs' noise":
                distillation.variants[f"{what}: {how}"] = evaluated(distilled(**settings, **more))
        for text, how in (("", "pairs only"), (" at equal time", "pairs only, 600 steps")):
            distillation.claim(f"guidance helps{text}: {what}", f"{what}: guided", f"{what}: {how}")
    for how in ("pairs only", "guided"):
        distillation.claim(f"the start from the 2-rectified flow helps: {how}", f"teacher's pairs: {how}",
                           f"from random weights: {how}")
        distillation.claim(f"own pairs are better than the teacher's: {how}", f"own pairs: {how}",
                           f"teacher's pairs: {how}")
    own = "teacher's pairs: two steps from the pairs' noise"
    distillation.claim("two steps help without fresh noise", own, "teacher's pairs: pairs only")
    distillation.claim("fresh noise helps", "teacher's pairs: guided", own)

    by_pairs = Grid("Distillation by the number of pairs, 300 steps (stage 03: 1,024 pairs)", STUDENT)
    for n in (64, 256, 1024, 4096):
        pairs = stage("02", TEACHER, n_pairs=n)
        for how, more in (("guided", {}), ("pairs only", dict(guidance=0.0))):
            by_pairs.variants[f"{n} pairs: {how}"] = evaluated(distilled(pairs=pairs, **more))
        by_pairs.claim(f"guidance helps with {n} pairs", f"{n} pairs: guided", f"{n} pairs: pairs only")

    # A flow of the teacher's size can start from the teacher's weights: what annealing is to make up for.
    begun = Grid("Where a flow as large as the teacher starts, 800 steps", FLOW)
    cfg = read_settings(STAGES["01"].SETTINGS, "", ["--preset", "shapes"])
    large = {key: getattr(cfg, key) for key in ("base", "mult", "blocks", "attn")}
    for name, parents, settings in (
            ("the teacher's weights", [TEACHER, PAIRS], dict(schedule="none", start_from="teacher")),
            ("random weights", [PAIRS], dict(schedule="none")), ("random weights, annealing", [PAIRS], {})):
        begun.variants[name] = evaluated(reflow_of(*parents, **large, **settings))
    begun.claim("the teacher's weights are better than random ones", "the teacher's weights", "random weights")
    begun.claim("annealing helps from random weights", "random weights, annealing", "random weights")

    # The paper's gain from annealing was measured after 2,000 passes over its pairs, by a network that could
    # learn them by heart. So: few pairs, in a small network, over and over. Its explanation, that fixed pairs
    # are hard to learn from random weights, predicts a smaller error on the pairs' own noise with annealing.
    passes = Grid("Few pairs, passed over often, by a network of base 8", FLOW)
    for n, times in ((64, 100), (64, 1000), (64, 4000), (256, 100), (256, 500)):
        pairs, steps = stage("02", TEACHER, n_pairs=n), times * n // 64
        place = f"{n} pairs, {times:,} passes"
        for name in ABLATED if times < 4000 else ("neither", "annealing"):  # flips: to spare time
            # K: paper: 300,000 of 800,000 steps.
            flow = reflow_of(pairs, base=8, batch=64, steps=steps, anneal_steps=steps * 3 // 8, **ABLATED[name])
            passes.variants[f"{place}: {name}"] = evaluated(flow, TEACHER, pairs)
        for text, *both in HELPS:
            if f"{place}: {both[0]}" in passes.variants and f"{place}: {both[1]}" in passes.variants:
                passes.claim(f"{place}: {text}", *(f"{place}: {name}" for name in both))

    size = Grid("Students by the channels of their first level, 300 steps", STUDENT)
    for base in (8, 12, 16):
        size.variants[f"base {base}"] = evaluated(distilled(reflow_of(base=base)))
    size.claim("base 12 is better than base 8", "base 12", "base 8")
    size.claim("base 16 is better than base 12", "base 16", "base 12")

    precision = Grid("All stages in fp32, and in what the machine is best at (auto)",
                     {"teacher, 12 calls": ("teacher", 12), "flow, 6 calls": FLOW["6 calls"], **STUDENT})
    for name in ("fp32", "auto"):
        precision.variants[name] = whole_chain({}, precision=name)
    precision.claim("fp32 is better", "fp32", "auto")
    return {"calls": calls, "reflow": reflow, "distillation": distillation, "pairs": by_pairs, "start": begun,
            "passes": passes, "size": size, "precision": precision}


# ------------------------------------------------------------------------------------------------- The tables

def values_of(grid, made, seeds):
    """{(variant, column, score): [value for each seed]} from what make_all() returned."""
    judges = {one["protocol"].get("judge") for one in made.values() if "protocol" in one}
    require(len(judges) == 1, f"the runs had different judges ({judges}): delete their folders 05-*")
    values = {}
    for variant, tasks in grid.variants.items():
        for column, (network, calls) in grid.columns.items():
            for seed in range(seeds):
                rows = [row for task in tasks for row in made[task, seed]["rows"] if row["network"] == network]
                row = next(row for row in rows if calls in (None, row["calls"]))  # the first has most calls
                for score in SCORES:
                    if row.get(score) is not None:
                        value = float(f"{row[score] * SCORES[score][2]:.6g}")
                        values.setdefault((variant, column, score), []).append(value)
    return values


def margin(claim, values, score):
    """(mean, half of the 95 % interval) of what is gained, above 0 if the claim holds; seeds are paired."""
    _, better, worse = claim
    better, worse = ([factor * value for value in values[variant, column, score]]
                     for factor, variant, column in (better, worse))
    gains = [SCORES[score][1] * (a - b) for a, b in zip(better, worse)]
    return mean(gains), T_QUANTILE[len(gains)] * stdev(gains) / math.sqrt(len(gains))


def table(grid, values, made):
    """The lines of <grid>.md. made: what make() returned, of each run."""
    scores = [score for score in SCORES if score in {key[2] for key in values}]
    seeds, n = len(next(iter(values.values()))), 0
    heads = [f"{column}: {SCORES[score][0]}" for column in grid.columns for score in scores]
    lines = [f"**{grid.title}**: mean ± standard deviation of {seeds} seeds.", "",
             f"| variant | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for variant in grid.variants:
        cells = [variant]
        for column in grid.columns:
            for score in scores:
                found, digits = values[variant, column, score], SCORES[score][3]
                cells.append(f"{mean(found):.{digits}f} ± {stdev(found):.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| claim |{''.join(f' gain in {SCORES[score][0]} | verdict |' for score in scores)}",
              "|---|" + "---:|---|" * len(scores)]
    for claim in grid.claims:
        cells = [claim[0]]
        for score in scores:
            if score == "named" and claim[2][0] != 1:  # a sixth of a share says nothing
                cells += ["", ""]
                continue
            (middle, half), digits, n = margin(claim, values, score), SCORES[score][3], n + 1
            verdict = "shown" if middle > half else "opposite" if middle < -half else "not shown"
            cells += [f"{middle:+.{digits}f} ± {half:.{digits}f}", verdict]
        lines.append(f"| {' | '.join(cells)} |")
    where, dates, commits = (", ".join(sorted({one[key] for one in made}))
                             for key in ("machine", "date", "commit"))
    hours = sum(one["seconds"] for one in made) / 3600
    return [*lines, "", "Gains are above 0 where the claim holds, with 95 % intervals; seeds are compared in pairs."
            f" Each interval stands for itself: of {n} gains without any truth in them, {0.05 * n:.1f} would on "
            "average be called shown or opposite.", "",
            f"{where}; {dates}; commit {commits}; {len(made)} runs, together {hours:.1f} hours.", ""]


def plot(path, grid, values):
    """A line for each variant, with a dot for each seed and a bar at the mean; a panel for each column."""
    left, width, line, top = 330, 300, 20, 40
    canvas = Image.new("RGB", (left + len(grid.columns) * (width + 40), top + line * len(grid.variants) + 30), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), grid.title, "black", font_size=13)
    for c, column in enumerate(grid.columns):
        x0, found = left + c * (width + 40), [v for key in values if key[1:] == (column, "distance") for v in values[key]]
        low, high = 0.93 * min(found), 1.07 * max(found)

        def at(value):
            return x0 + width * math.log(value / low) / math.log(high / low)

        draw.text((x0, top - 16), f"{column}: FD-shapes, logarithmic", "black", font_size=12)
        for tick in (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60, 80):
            if low < tick < high:
                draw.line([(at(tick), top), (at(tick), canvas.height - 28)], "#dddddd")
                draw.text((at(tick), canvas.height - 24), f"{tick:g}", "black", font_size=11, anchor="ma")
        for i, variant in enumerate(grid.variants):
            y, seeds = top + line * (i + 0.5), values[variant, column, "distance"]
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
        made = make_all([task for tasks in grid.variants.values() for task in tasks], cfg)
        values = values_of(grid, made, cfg.seeds)
        lines = table(grid, values, made.values())
        scores = {" | ".join(key): value for key, value in values.items()}
        commands = sorted({one["command"] for one in made.values()})
        facts = json.dumps({"grid": name, "scores": scores, "commands": commands}, indent=0)
        for suffix, text in (("json", facts), ("md", "\n".join(lines))):
            with writing(Path(cfg.results, f"{name}.{suffix}")) as file:
                file.write(text.encode())
        plot(Path(cfg.results, f"{name}.png"), grid, values)
        say("\n".join(["", *lines, f"wrote {cfg.results}/{name}.json, .md, .png"]))


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
