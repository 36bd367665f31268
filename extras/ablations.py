"""Run the five stages over a grid of settings and seeds: does each idea of the paper help, and by how much?

    python extras/ablations.py                                   # every grid, 5 seeds, on `shapes`: hours on 2 CPU cores
    python extras/ablations.py --grid distillation               # one of them
    python extras/ablations.py --grid distillation --tables_only # its table and plot again, from its .json

Nothing is trained here. A run is one command of a stage, in a folder of its own to which the artifacts of earlier runs are
linked. Runs that grids share are made once, and runs that are done are not made again, so the same command continues. (A run is
known by all its settings and those of the runs before it. Code that changes makes no new run: the tables name the commits.)
Variants are compared seed by seed: those with the same seed share what the grid does not vary, such as the teacher and its
pairs. All networks are measured with the same noise and the same feature network (05 with --seed 0).

Reads   nothing
Writes  extras/results/<grid>.json (all runs), <grid>.md (mean, standard deviation, verdicts), <grid>.png; the runs into <out>/ablations
Takes   2 CPU cores (AMD EPYC, torch 2.13, bf16): see the time in each table; a teacher and its pairs 2 minutes for each seed
"""
import concurrent.futures
import functools
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (Settings, UserError, best_precision, check_ranges, clock, load_network, read_settings, require, run, say, start,
                    writing)

STAGES = {name[:2]: importlib.import_module(name) for name in ("01_train_teacher", "02_generate_pairs", "03_annealing_reflow",
                                                               "04_flow_guided_distill", "05_eval_fid")}
MADE = {"01": "01_teacher.pt", "02": "02_pairs.pt", "03": "03_reflow.pt", "04": "04_student.pt"}
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, 97.5 %, of n values


def refuse_what_runs_do_not_use(cfg):
    """Raises UserError for settings of all scripts that have no meaning for many runs."""
    require(not cfg.restart, f"--restart: delete the folder of the runs under {cfg.out} instead, or choose another --out")
    require(cfg.seed == 0, "--seed: every variant is run with the seeds 0, 1, ...; their number is --seeds")


@dataclass
class Config(Settings):
    preset: Literal["shapes"] = "shapes"  # the grids' budgets are made for it
    grid: Literal["all", "calls", "distillation", "pairs", "reflow", "scarce", "steps", "size", "precision"] = "all"  # which
    seeds: int = 5  # runs of each variant, with seeds 0, 1, ...
    jobs: int = 0  # runs at a time; 0: one for each CPU core, or one on a GPU
    results: str = str(ROOT / "extras" / "results")  # folder of the tables and plots
    tables_only: bool = False  # run nothing: only tables and plots, from the .json

    runs = "ablations"  # their folder in --out

    def __post_init__(self):
        check_ranges(self, seeds=(2, 10), jobs=(0, None))
        refuse_what_runs_do_not_use(self)


# ------------------------------------------------------------------------------------------------------------ grids

@dataclass(frozen=True)
class Run:
    """A command of a stage, on what its parents made. The seed is not part of it."""
    stage: str  # "01" ... "05"
    settings: tuple = ()  # (("steps", 500), ...); what is not named is the preset's
    parents: tuple = ()

    @property
    def label(self):
        """'04 guidance=0'"""
        return " ".join([self.stage, *(f"{key}={value}" for key, value in self.settings)])

    @property
    def name(self):
        """'04 guidance=0 of [02 of [01], 03 ...]'"""
        return self.label + (f" of [{', '.join(parent.name for parent in self.parents)}]" if self.parents else "")

    def arguments(self):
        """The settings as on the command line."""
        return [word for key, value in self.settings for word in
                ([f"--{'' if value else 'no-'}{key}"] if isinstance(value, bool) else [f"--{key}", str(value)])]

    @functools.cache
    def depends_on(self, preset):
        """Text of all that the result depends on, but for the seed: every setting, the preset's too, of this run and its parents."""
        script = STAGES[self.stage]
        settings = read_settings(script.Config, script.PRESETS, script.__doc__, ["--preset", preset, *self.arguments()])
        return "\n".join([self.stage, str(settings), *(parent.depends_on(preset) for parent in self.parents)])

    def folder(self, cfg, seed):
        digest = hashlib.sha256(self.depends_on(cfg.preset).encode()).hexdigest()[:10]
        return Path(cfg.out, cfg.runs, f"{self.stage}-{digest}-seed{seed}")


@dataclass
class Grid:
    title: str
    x_label: str
    variants: dict  # {(line in the plot, place on the x axis): the runs of 05 that measure it}
    columns: dict  # {title: (network in 05's table, its calls; None: the most)}
    claims: dict = field(default_factory=dict)  # {text: ((sign, variant, column), ...)}: the signed sum should be above 0
    facts: dict = field(default_factory=dict)  # {further column of 05's table: its title}


def stage(number, *parents, **settings):
    return Run(number, tuple(settings.items()), parents)


def evaluated(trained, **settings):
    """05 for the network that a run trained."""
    only = {"01": "teacher", "03": "flow", "04": "student"}[trained.stage]
    return (stage("05", trained, only=only, reference="shapes", **settings),)


def lower(better, worse, column):
    """The claim that `better` has the smaller distance."""
    return (1, worse, column), (-1, better, column)


TEACHER = stage("01")
TEACHERS_PAIRS = stage("02", TEACHER)
# Shorter than the preset's: differences show earlier, and a grid has to end.
REFLOW = dict(steps=500, anneal_steps=180)
DISTILL = dict(steps=300)
FLOW = {"8 calls": ("2-rectified flow", 8), "1 call": ("2-rectified flow", 1)}


def reflow_of(pairs=TEACHERS_PAIRS, **settings):
    return stage("03", pairs, **{**REFLOW, **settings})


def distilled(flow=None, pairs=TEACHERS_PAIRS, **settings):
    return stage("04", pairs, flow or reflow_of(), **{**DISTILL, **settings})


def table_3(both):
    """Paper, Table 3: {variant: its settings}, and (claim, the better variant, the worse) of each; `both` has annealing and flips."""
    return ({"neither": dict(schedule="fixed", flip=False), "flip only": dict(schedule="fixed"), "annealing only": dict(flip=False), both: {}},
            (("annealing helps (with flips)", both, "flip only"), ("annealing helps (without flips)", "annealing only", "neither"),
             ("flips help (with annealing)", both, "annealing only"), ("flips help (without annealing)", "flip only", "neither")))


def reflow_grid():
    """Paper, Tables 3 and 4."""
    variants, ideas = table_3("both (linear)")
    variants |= {"cosine": dict(schedule="cosine"), "exponential": dict(schedule="exponential")}
    claims = {f"{what}, {column}": lower(("", better), ("", worse), column) for column in FLOW for what, better, worse in (
        *ideas,
        ("linear is better than cosine", "both (linear)", "cosine"),
        ("linear is better than exponential", "both (linear)", "exponential"))}
    return Grid(f"Annealing reflow, {REFLOW['steps']} steps", "variant of stage 03; cosine and exponential have flips too",
                {("", name): evaluated(reflow_of(**settings)) for name, settings in variants.items()}, FLOW, claims)


def scarce_grid():
    """Paper, Table 3, where few pairs are passed over often: 500 and 125 times. (Paper: 2,000 times; the grid `reflow`: 16 times.)"""
    (made, ideas), counts = table_3("both"), ("64", "256")
    variants = {(name, n): evaluated(reflow_of(stage("02", TEACHER, n_pairs=int(n)), **settings))
                for n in counts for name, settings in made.items()}
    claims = {f"{what}, {n} pairs, {column}": lower((better, n), (worse, n), column)
              for n in counts for column in FLOW for what, better, worse in ideas}
    return Grid(f"Annealing reflow with few pairs, {REFLOW['steps']} steps", "pairs", variants, FLOW, claims)


def steps_grid():
    variants = {}
    for steps in (125, 250, 500, 1000):
        for name, settings in (("annealing", dict(anneal_steps=round(0.36 * steps))), ("no annealing", dict(schedule="fixed"))):
            variants[name, str(steps)] = evaluated(reflow_of(**{"steps": steps, **settings}))
    claims = {f"annealing helps at {x} steps, {column}": lower(("annealing", x), ("no annealing", x), column)
              for name, x in variants if name == "annealing" for column in FLOW}
    return Grid("Annealing reflow by training steps (each point is a training of its own)", "training steps of stage 03",
                variants, FLOW, claims)


def distillation_grid():
    """Paper, Table 5."""
    made_of = {"scratch": dict(start_from="scratch"), "teacher's pairs": {}, "own pairs": dict(pairs_from="flow")}
    variants = {(name, what): evaluated(distilled(**settings, **({} if name == "guided" else {"guidance": 0})))
                for what, settings in made_of.items() for name in ("pairs only", "guided")}
    claims = {f"guidance helps: {what}": lower(("guided", what), ("pairs only", what), "student") for what in made_of}
    claims |= {f"starting from the 2-rectified flow helps: {name}": lower((name, "teacher's pairs"), (name, "scratch"), "student")
               for name in ("pairs only", "guided")}
    claims |= {f"the flow's own pairs are better than the teacher's: {name}":
               lower((name, "own pairs"), (name, "teacher's pairs"), "student") for name in ("pairs only", "guided")}
    return Grid(f"Distillation, {DISTILL['steps']} steps each (a guided step takes about twice as long)",
                "variant of stage 04; 'scratch' has the teacher's pairs", variants, {"student": ("student", 1)}, claims)


def pairs_grid():
    counts = (64, 256, 1024, 2048, 8192)
    variants = {}
    for n in counts:
        pairs = TEACHERS_PAIRS if n == 2048 else stage("02", TEACHER, n_pairs=n)  # those of stage 03: not twice
        variants["pairs only", str(n)] = evaluated(distilled(pairs=pairs, guidance=0))
        variants["guided", str(n)] = evaluated(distilled(pairs=pairs))
    claims = {f"guidance helps with {n} pairs": lower(("guided", str(n)), ("pairs only", str(n)), "student") for n in counts}
    few, many = (lower(("guided", str(n)), ("pairs only", str(n)), "student") for n in (counts[0], counts[-1]))
    claims[f"guidance helps more with {counts[0]} pairs than with {counts[-1]}"] = few + tuple((-sign, *rest) for sign, *rest in many)
    return Grid(f"Distillation by the number of pairs, {DISTILL['steps']} steps (a guided step takes about twice as long)",
                "pairs in stage 04 (stage 03: 2,048)", variants, {"student": ("student", 1)}, claims)


def size_grid():
    variants = {}
    for base in (8, 16, 24):
        flow = reflow_of(base=base)
        variants["", f"base {base}"] = evaluated(distilled(flow)) + evaluated(flow)
    claims = {f"base {large} is better than base {small}": lower(("", f"base {large}"), ("", f"base {small}"), "student")
              for small, large in ((8, 16), (16, 24))}
    return Grid("Size of the student", "channels of its first level", variants, {"student": ("student", 1), "flow, 8 calls": FLOW["8 calls"]},
                claims, {"parameters": "parameters", "macs": "MACs", "ms_one": "ms per image, one by one",
                         "straightness": "straightness of the flow"})


def default_runs(**settings):
    """The five stages with the preset's settings: (teacher, flow, student)."""
    teacher = stage("01", **settings)
    pairs = stage("02", teacher, **settings)
    flow = stage("03", pairs, **settings)
    return teacher, flow, stage("04", pairs, flow, **settings)


def calls_grid():
    networks = {"teacher": ("teacher", None), "2-rectified flow": ("2-rectified flow", None), "student": ("student", None)}
    variants = {("", str(n)): (stage("05", *default_runs(), teacher_steps=n, flow_steps=n, student_steps=n),) for n in (1, 2, 4, 8, 25)}
    claims = {"reflow makes one call better": ((1, ("", "1"), "teacher"), (-1, ("", "1"), "2-rectified flow")),
              "distillation makes one call better": ((1, ("", "1"), "2-rectified flow"), (-1, ("", "1"), "student")),
              "the student's one call is within 1.6 times the teacher's 25":
              ((1.6, ("", "25"), "teacher"), (-1, ("", "1"), "student"))}
    return Grid("Calls, with the preset's training", "network calls (Euler steps)", variants, networks, claims)


def precision_grid():
    networks = {"teacher, 25 calls": ("teacher", 25), "flow, 8 calls": FLOW["8 calls"], "student": ("student", 1)}
    variants = {("", name): (stage("05", *default_runs(**settings), **settings),)
                for name, settings in (("fp32", dict(precision="fp32")), ("auto", {}))}
    claims = {f"fp32 is better, {column}": lower(("", "fp32"), ("", "auto"), column) for column in networks}
    return Grid("All stages in fp32, and in what the machine is best at (auto: bf16 where it has it)", "precision", variants,
                networks, claims)


GRIDS = {"calls": calls_grid, "distillation": distillation_grid, "pairs": pairs_grid, "reflow": reflow_grid, "scarce": scarce_grid,
         "steps": steps_grid, "size": size_grid, "precision": precision_grid}


# ------------------------------------------------------------------------------------------------------------- runs

def make(task, seed, cfg, threads):
    """Makes a run, or finds it done: what done.json in its folder says of it. Raises UserError if the command failed."""
    folder = task.folder(cfg, seed)
    done = folder / "done.json"
    if done.exists():
        return json.loads(done.read_text())
    (folder / cfg.preset).mkdir(parents=True, exist_ok=True)
    for parent in task.parents:
        link = folder / cfg.preset / MADE[parent.stage]
        link.unlink(missing_ok=True)  # the parent may have been made again
        os.link(parent.folder(cfg, seed) / cfg.preset / link.name, link)
    arguments = [f"{STAGES[task.stage].__name__}.py", "--preset", cfg.preset, "--seed", str(0 if task.stage == "05" else seed),
                 *task.arguments()]
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:], "--out", str(folder), "--device", cfg.device]
    began, version, seconds = time.time(), commit(), folder / "seconds.txt"  # a line for each time that it was begun
    with open(folder / "log.txt", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    with open(seconds, "a") as file:
        file.write(f"{time.time() - began:.1f}\n")
    require(code == 0, f"{' '.join(arguments)} failed; see {folder}/log.txt")
    found = {"run": task.name, "command": " ".join(arguments), "seed": seed, "commit": version, "machine": machine(cfg),
             "date": time.strftime("%Y-%m-%d"), "seconds": round(sum(map(float, seconds.read_text().split())), 1)}
    for results in (folder / cfg.preset).glob("05_*.json"):
        found |= json.loads(results.read_text())
    with writing(done) as file:
        file.write(json.dumps(found).encode())
    return found


def ancestors(task):
    """The run itself, and all that it was made from."""
    return [task, *(found for parent in task.parents for found in ancestors(parent))]


def commit():
    """The commit of the code, with a + if the code differs from it."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    try:
        head, changed = git("rev-parse", "--short=10", "HEAD").stdout.strip(), git("diff", "--quiet", "HEAD", "--", "*.py").returncode
    except OSError:  # no git here
        return "unknown"
    return head + "+" * bool(changed) if head else "unknown"


def on_gpu(cfg):
    return torch.cuda.is_available() and cfg.device.startswith(("auto", "cuda"))


def machine(cfg):
    cpu = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    name = torch.cuda.get_device_name() if on_gpu(cfg) else f"{os.cpu_count()} cores {models[0] if models else platform.processor()}"
    return f"{name}, torch {importlib.metadata.version('torch')}"


def make_all(runs, cfg):
    """{(run, seed): what make() found} of the runs and all that they are made from. Raises UserError after the others are done."""
    needed = dict.fromkeys(found for task in runs for found in ancestors(task))
    jobs = cfg.jobs or (1 if on_gpu(cfg) else os.cpu_count())
    threads = max(1, os.cpu_count() // jobs)
    todo = [(task, seed) for task in sorted(needed, key=lambda task: task.stage) for seed in range(cfg.seeds)]  # parents first
    futures, began = {}, time.time()

    def job(task, seed):
        for parent in task.parents:
            futures[parent, seed].result()
        waiting = not (task.folder(cfg, seed) / "done.json").exists()
        found = make(task, seed, cfg, threads)
        if waiting:
            left = sum(not future.done() for future in list(futures.values())) - 1
            say(f"{clock(time.time() - began)} | {left} left | {found['seconds']:.0f} s | seed {seed} | {task.label}")
        return found

    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        for task, seed in todo:
            futures[task, seed] = pool.submit(job, task, seed)
        concurrent.futures.wait(futures.values())
    finally:  # Ctrl-C: the commands that run have heard it too, and save their state; those that wait are not begun
        pool.shutdown(cancel_futures=True)
    errors = [future.exception() for future in futures.values() if future.exception()]
    for error in errors:
        if not isinstance(error, (UserError, OSError)):
            raise error
    require(not errors, "; ".join(dict.fromkeys(map(str, errors))))
    return {key: future.result() for key, future in futures.items()}


# ------------------------------------------------------------------------------------------------- tables and plots

def row_of(results, network, calls):
    """The row of a network in the tables of 05, with so many calls (None: the most)."""
    rows = [row for result in results for row in result["rows"] if row["network"] == network]
    return max((row for row in rows if calls in (None, row["calls"])), key=lambda row: row["calls"])


def values_of(grid, measured):
    """{(variant, column): [distance for each seed]} from the list of measurements in the .json."""
    found = {}
    for entry in sorted(measured, key=lambda entry: entry["seed"]):
        for column, (network, calls) in grid.columns.items():
            found.setdefault((tuple(entry["variant"]), column), []).append(row_of(entry["results"], network, calls)["distance"])
    return found


def interval(values):
    """(mean, half the width of its 95 % interval) by Student's t."""
    return statistics.mean(values), T_QUANTILE[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def verdict(mean, half):
    """What an interval says of the claim that the value is above 0."""
    return "shown" if mean - half > 0 else "opposite" if mean + half < 0 else "not shown"


def table(grid, measured, made, values):
    """The lines of <grid>.md, from the two lists in the .json."""
    n = len({entry["seed"] for entry in measured})
    lines = [f"**{grid.title}**: FD-shapes, mean ± standard deviation of {n} seeds.", "",
             f"| variant | {' | '.join([*grid.columns, *grid.facts.values()])} |", f"|---|{'---:|' * len((*grid.columns, *grid.facts))}"]
    classifiers = {result["protocol"].get("classifier") for entry in measured for result in entry["results"]}
    require(len(classifiers) == 1, f"the runs were measured with different feature networks ({classifiers}), and cannot be compared: "
            "delete the folders 05-* of the runs and measure all on one machine with the same --jobs")
    for variant in grid.variants:
        cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in (values[variant, c] for c in grid.columns)]
        entries = [entry["results"] for entry in measured if tuple(entry["variant"]) == variant]
        for fact in grid.facts:
            rows = [[row[fact] for column in grid.columns.values() for row in [row_of(e, *column)] if row[fact] is not None][0] for e in entries]
            mean = statistics.mean(rows)
            cells.append(f"{mean / 1e6:.1f} M" if fact == "macs" else f"{mean:,.0f}" if fact == "parameters" else f"{mean:.3g}")
        lines.append(f"| {', '.join(filter(None, variant))} | {' | '.join(cells)} |")
    if grid.claims:
        lines += ["", f"Seeds are compared in pairs. Each interval stands for itself: of {len(grid.claims)} claims without any truth in them, "
                  f"{0.05 * len(grid.claims):.2f} would on average be called shown or opposite."]
        lines += ["", "| claim | margin in FD-shapes (above 0: it holds), 95 % interval | verdict |", "|---|---:|---|"]
        for text, terms in grid.claims.items():
            mean, half = interval([sum(sign * value for (sign, *_), value in zip(terms, one))
                                   for one in zip(*(values[variant, column] for _, variant, column in terms))])
            lines.append(f"| {text} | {mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f}) | {verdict(mean, half)} |")
    return [*lines, "", made_with(made), ""]


def made_with(made):
    """A line that tells where, when, with which commits and in which time the runs were made."""
    where, versions, dates = (sorted({one[key] for one in made}) for key in ("machine", "commit", "date"))
    spent = clock(sum(one["seconds"] for one in made))
    return (f"{', '.join(where)}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}; commit {', '.join(versions)}; the {len(made)} commands took "
            f"{spent} hours, those that ran side by side added up.")


def plot(path, grid, values):
    """Draws mean and standard deviation of every variant, and each seed as a dot, on a log scale, into a PNG."""
    places = list(dict.fromkeys(place for _, place in grid.variants))
    names = list(dict.fromkeys((name, column) for name, _ in grid.variants for column in grid.columns))
    ink, colours = "#222222", ("#174a7c", "#d1495b", "#2e8b57", "#e08e0b", "#6a4c93", "#555555", "#3fb8d3", "#8c564b")
    require(len(names) <= len(colours), f"{grid.title}: {len(names)} lines, and only {len(colours)} colours")
    left, right, top, bottom = 70, 800, 40, 380
    width, height = 820, bottom + 60 + 20 * math.ceil(len(names) / 3)  # with the legend's rows
    numbered = all(place.isdigit() for place in places)  # then a logarithmic axis, and a line from place to place
    position = [math.log(int(place)) for place in places] if numbered else list(range(len(places)))
    first, last = min(position), max(position)
    everything = [math.log10(max(value, 1e-3)) for numbers in values.values() for value in numbers]
    low, high = min(everything) - 0.03, max(everything) + 0.03
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)

    def at(place, value, line=0):
        share = (position[places.index(place)] - first) / ((last - first) or 1)  # 0 at the first place, 1 at the last
        x = left + (0.5 + share * (len(places) - 1)) * (right - left) / len(places) + (line - (len(names) - 1) / 2) * 9
        return x, top + (high - math.log10(max(value, 1e-3))) / (high - low) * (bottom - top)

    draw.text((left, 2), grid.title, fill=ink, font=ImageFont.load_default(15))
    draw.text((left, 21), "FD-shapes (logarithmic; smaller is better); dots: seeds, bars: their standard deviation", fill=ink, font=font)
    steps = (1, 2, 5) if high - low > 1 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high - low > 0.3 else [n / 10 for n in range(10, 100, 2)]
    for value in (step * 10**power for power in range(-3, 4) for step in steps):
        if low <= math.log10(value) <= high:
            y = at(places[0], value)[1]
            draw.line([(left, y), (right, y)], fill="#dddddd")
            draw.text((left - 8, y), f"{value:g}", fill=ink, font=font, anchor="rm")
    draw.rectangle([left, top, right, bottom], outline="#999999")
    for place in places:
        draw.text((at(place, 1, (len(names) - 1) / 2)[0], bottom + 6), place, fill=ink, font=font, anchor="ma")
    draw.text(((left + right) / 2, bottom + 26), grid.x_label, fill=ink, font=font, anchor="ma")
    for line, (name, column) in enumerate(names):
        colour, means = colours[line % len(colours)], []
        for place in places:
            numbers = values.get(((name, place), column), [])
            for value in numbers:
                x, y = at(place, value, line)
                draw.ellipse([x - 2, y - 2, x + 2, y + 2], outline=colour)
            if numbers:
                mean, spread = statistics.mean(numbers), statistics.stdev(numbers)
                draw.line([at(place, max(mean - spread, 10**low), line), at(place, mean + spread, line)], fill=colour, width=2)
                means.append(at(place, mean, line))
        if numbered:
            draw.line(means, fill=colour, width=2)
        for x, y in means:
            draw.rectangle([x - 4, y - 4, x + 4, y + 4], fill=colour)
        x, y = left + 240 * (line % 3), bottom + 50 + 20 * (line // 3)
        draw.rectangle([x, y + 3, x + 10, y + 13], fill=colour)
        draw.text((x + 16, y), ", ".join(filter(None, (name, column))), fill=ink, font=font)
    with writing(path) as file:
        canvas.save(file, "PNG")


def time_students(grid, measured, cfg, device):
    """Puts the time of the students' one call for one image into their rows. What 05 took was disturbed by the runs beside it."""
    for entry in measured:
        for task in grid.variants[entry["variant"]]:
            path = task.folder(cfg, entry["seed"]) / cfg.preset / MADE["04"]
            if path.exists():
                net, _ = load_network(path, cfg, device, precision := best_precision(device))
                row_of(entry["results"], "student", 1)["ms_one"] = 1000 * STAGES["05"].seconds_per_call(net, 1, precision)


def main(cfg):
    device, results = start(cfg, "ablations"), Path(cfg.results)
    for name in GRIDS if cfg.grid == "all" else [cfg.grid]:
        # 1. The runs.
        grid, path = GRIDS[name](), results / f"{name}.json"
        if not cfg.tables_only:
            made = make_all([task for tasks in grid.variants.values() for task in tasks], cfg)
            measured = [{"variant": variant, "seed": seed, "results": [{key: made[task, seed][key] for key in ("protocol", "rows")} for task in tasks]}
                        for variant, tasks in grid.variants.items() for seed in range(cfg.seeds)]
            if "ms_one" in grid.facts:
                time_students(grid, measured, cfg, device)
            facts = ("run", "command", "seed", "commit", "machine", "date", "seconds")
            commands = [{key: found[key] for key in facts} for found in made.values()]
            with writing(path) as file:
                file.write(json.dumps({"grid": name, "measured": measured, "made": commands}, indent=1).encode())

        # 2. The table, with a verdict for every claim, and the plot.
        require(path.exists(), f"{path} is missing; make it without --tables_only")
        saved = json.loads(path.read_text())
        require({tuple(entry["variant"]) for entry in saved["measured"]} == set(grid.variants),
                f"{path} holds other variants than this grid has now: make it again without --tables_only")
        values = values_of(grid, saved["measured"])
        lines = table(grid, saved["measured"], saved["made"], values)
        with writing(results / f"{name}.md") as file:
            file.write("\n".join(lines).encode())
        plot(results / f"{name}.png", grid, values)
        say("\n".join(["", *lines, f"wrote {results}/{name}.json, {name}.md, {name}.png"]))


if __name__ == "__main__":
    run(main, Config, {"shapes": {}}, __doc__)
