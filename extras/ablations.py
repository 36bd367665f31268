"""Run the five stages over a grid of settings and seeds: does each idea of the paper help, and by how much?

    python extras/ablations.py                        # every grid, 5 seeds, on `shapes`: hours on 2 CPU cores
    python extras/ablations.py --grid distillation    # one of them

A run is one command of a stage, in a folder of its own, to which the artifacts of earlier runs are linked. It
is known by all its settings and those of the runs before it: grids share runs, none is made twice, the same
command continues. (Code that changes makes no new run; the tables name the commits.) Variants are compared by
seed: the same seed shares what the grid does not vary. 05 has the same noise for all (--seed 0).

Writes  extras/results/<grid>.json (all runs), .md (table and verdicts), .png; the runs into <out>/ablations
"""
import concurrent.futures
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import read_settings, require, run, say, settings_of, start, writing

STAGES = {name[:2]: importlib.import_module(name) for name in (
    "01_train_teacher", "02_generate_pairs", "03_annealing_reflow", "04_flow_guided_distill", "05_eval_fid")}
MADE = {"01": "01_teacher.pt", "02": "02_pairs.pt", "03": "03_reflow.pt", "04": "04_student.pt"}
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, 97.5 %, n values
SETTINGS = [  # name, its value for each preset, text
    ("grid", *["all"] * 5, "calls, distillation, pairs, reflow, scarce, steps, size, precision, or all"),
    ("seeds", 5, 5, 5, 5, 5, "runs of each variant, with the seeds 0, 1, ..."),
    ("jobs", 0, 0, 0, 0, 0, "runs at a time; 0: one for each CPU core"),
    ("results", *[str(ROOT / "extras" / "results")] * 5, "folder of the tables and plots"),
]


@dataclass(frozen=True)
class Run:
    """A command of a stage, on what its parents made. The seed is not part of it."""
    stage: str  # "01" ... "05"
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

    def depends_on(self, cfg):
        """Text of all that the result depends on but the seed: every setting of this run and its parents."""
        words = ["--preset", cfg.preset, *self.arguments()]
        settings = settings_of(read_settings(STAGES[self.stage].SETTINGS, "", words))
        return "\n".join([self.stage, str(settings), *(parent.depends_on(cfg) for parent in self.parents)])

    def folder(self, cfg, seed):
        digest = hashlib.sha256(self.depends_on(cfg).encode()).hexdigest()[:10]
        return cfg.runs / f"{self.stage}-{digest}-seed{seed}" / cfg.preset


def stage(number, *parents, **settings):
    return Run(number, tuple(settings.items()), parents)


def make(task, seed, cfg):
    """Makes a run, unless done.json in its folder says that it is done; returns that file's content."""
    folder, script, began = task.folder(cfg, seed), ROOT / f"{STAGES[task.stage].__name__}.py", time.time()
    if (folder / "done.json").exists():
        return json.loads((folder / "done.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for parent in task.parents:
        link = folder / MADE[parent.stage]
        link.unlink(missing_ok=True)  # the parent may have been made again
        os.link(parent.folder(cfg, seed) / link.name, link)
    words = ["--preset", cfg.preset, "--seed", str(0 if task.stage == "05" else seed), *task.arguments()]
    found = {"run": str(task), "command": " ".join([script.name, *words]), "seed": seed, **origin(cfg)}
    with open(folder / "log.txt", "a") as log:
        words += ["--out", folder.parent, "--device", cfg.device]
        code = subprocess.run([sys.executable, script, *words], stdout=log, stderr=log,
                              env={**os.environ, "OMP_NUM_THREADS": str(cfg.threads)}).returncode
    require(code == 0, f"{found['command']} failed; see {folder}/log.txt")
    found["seconds"] = round(time.time() - began, 1)
    for results in folder.glob("05_*.json"):
        found |= json.loads(results.read_text())
    with writing(folder / "done.json") as file:
        file.write(json.dumps(found).encode())
    say(f"{found['seconds']:.0f} s | seed {seed} | {found['command']}")
    return found


def origin(cfg):
    """{"commit", "machine", "date"} of a run that begins. A + after the commit: the code differs from it."""
    commit, git, cpu = "unknown", ["git", "-C", str(ROOT)], Path("/proc/cpuinfo")
    if shutil.which("git"):
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True)
        commit = head.stdout.strip() + "+" * (changed.returncode == 1)
    models = re.findall(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else [platform.processor()]
    name = f"{os.cpu_count()} cores {models[0]}"
    if torch.cuda.is_available() and cfg.device.startswith(("auto", "cuda")):
        name = torch.cuda.get_device_name()
    date = time.strftime("%Y-%m-%d")
    return {"commit": commit, "machine": f"{name}, torch {torch.__version__}", "date": date}


def make_all(tasks, cfg):
    """{(run, seed): what make() says} of the runs and all that they are made from, each with every seed.

    cfg.runs is their folder, cfg.preset the preset of all. Raises UserError if one fails.
    """
    require(not cfg.restart, f"--restart: delete {cfg.runs} instead, or choose another --out")
    require(cfg.seed == 0, "--seed: every variant is run with the seeds 0, 1, ...; their number is --seeds")
    jobs, made = cfg.jobs or os.cpu_count(), {}
    cfg.threads = max(1, os.cpu_count() // jobs)
    needed = sorted(set().union(*(task.ancestors() for task in tasks)), key=str)
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        for number in STAGES:  # what a run is made from is of earlier stages
            keys = [(task, seed) for task in needed if task.stage == number for seed in range(cfg.seeds)]
            say(f"stage {number} | {len(keys)} runs")
            made |= {key: found for key, found in zip(keys, pool.map(lambda key: make(*key, cfg), keys))}
    finally:  # Ctrl-C: the commands that run hear it too, and save their state; the others are not begun
        pool.shutdown(cancel_futures=True)
    return made


def made_with(made):
    """A line that tells where, when, with which commits and in which time the runs were made."""
    where, dates, commits = (", ".join(sorted({one[key] for one in made}))
                             for key in ("machine", "date", "commit"))
    hours = sum(one["seconds"] for one in made) / 3600
    return f"{where}; {dates}; commit {commits}; {len(made)} commands, one after the other {hours:.1f} hours."


@dataclass
class Grid:
    title: str
    x_label: str
    columns: dict  # {title: (network in 05's table, its calls; None: the most)}
    facts: tuple = ()  # further columns of 05's table
    variants: dict = field(default_factory=dict)  # {(line, place in the plot): the runs of 05 for it}
    claims: dict = field(default_factory=dict)  # {text: ((sign, variant, column), ...)}: the sum is above 0

    def claim(self, text, better, worse):
        """That a variant's distances are smaller than another's."""
        for column in self.columns:
            terms = (1, worse, column), (-1, better, column)
            self.claims[text + f", {column}" * (len(self.columns) > 1)] = terms


def evaluated(trained, **settings):
    """05 for the network that a run trained."""
    only = {"01": "teacher", "03": "flow", "04": "student"}[trained.stage]
    return (stage("05", trained, only=only, reference="shapes", **settings),)


TEACHER = stage("01")
PAIRS = stage("02", TEACHER)


# Shorter than the preset's: differences show earlier, and a grid has to end.
def reflow_of(pairs=PAIRS, **settings):
    return stage("03", pairs, **{"steps": 500, "anneal_steps": 180, **settings})


def distilled(flow=reflow_of(), pairs=PAIRS, **settings):
    return stage("04", pairs, flow, **{"steps": 300, **settings})


def default_evaluation(networks, **settings):
    """05 for networks that were all made with the preset's settings, but for `settings`."""
    teacher = stage("01", **settings)
    pairs = stage("02", teacher, **settings)
    flow = stage("03", pairs, **settings)
    return (stage("05", teacher, flow, stage("04", pairs, flow, **settings), **settings, **networks),)


def grids():
    """{name: Grid} of all experiments."""
    flow = {"8 calls": ("2-rectified flow", 8), "1 call": ("2-rectified flow", 1)}
    student, twice = {"student": ("student", 1)}, "a guided step takes about twice as long"

    # Paper, Tables 3 and 4. Each pair is seen 16 times, in `scarce` 500 and 125 times. (Paper: 2,000 times.)
    reflow = Grid("Annealing reflow, 500 steps", "variant of stage 03; cosine, exponential: with flips", flow)
    scarce = Grid("Annealing reflow with few pairs, 500 steps", "pairs", flow)
    for grid, n, both in ((reflow, "", "both (linear)"), (scarce, "64", "both"), (scarce, "256", "both")):
        variants = {}  # {name: its key in the grid}
        for name, settings in (("neither", dict(schedule="none", flip=False)), (both, {}),
                               ("flip only", dict(schedule="none")), ("annealing only", dict(flip=False))):
            variants[name] = (name, n) if n else ("", name)
            pairs = stage("02", TEACHER, n_pairs=int(n)) if n else PAIRS
            grid.variants[variants[name]] = evaluated(reflow_of(pairs, **settings))
        for text, better, worse in (("annealing helps (with flips)", both, "flip only"),
                                    ("annealing helps (without flips)", "annealing only", "neither"),
                                    ("flips help (with annealing)", both, "annealing only"),
                                    ("flips help (without annealing)", "flip only", "neither")):
            grid.claim(text + f", {n} pairs" * bool(n), variants[better], variants[worse])
    for other in ("cosine", "exponential"):
        reflow.variants["", other] = evaluated(reflow_of(schedule=other))
        reflow.claim(f"linear is better than {other}", ("", "both (linear)"), ("", other))

    steps = Grid("Annealing reflow by training steps (each point is a training of its own)",
                 "training steps of stage 03", flow)
    for n in (125, 250, 500, 1000):
        with_, without = ("annealing", str(n)), ("no annealing", str(n))
        steps.variants[with_] = evaluated(reflow_of(steps=n, anneal_steps=round(0.36 * n)))
        steps.variants[without] = evaluated(reflow_of(steps=n, schedule="none"))
        steps.claim(f"annealing helps at {n} steps", with_, without)

    # Paper, Table 5.
    distillation = Grid(f"Distillation, 300 steps each ({twice})",
                        "variant of stage 04; 'scratch' has the teacher's pairs", student)
    for what, settings in (("scratch", dict(start_from="scratch")), ("teacher's pairs", {}),
                           ("own pairs", dict(pairs_from="flow"))):
        distillation.variants["pairs only", what] = evaluated(distilled(**settings, guidance=0))
        distillation.variants["guided", what] = evaluated(distilled(**settings))
        distillation.claim(f"guidance helps: {what}", ("guided", what), ("pairs only", what))
    for text, better, worse in (
            ("starting from the 2-rectified flow helps", "teacher's pairs", "scratch"),
            ("the flow's own pairs are better than the teacher's", "own pairs", "teacher's pairs")):
        for kind in ("pairs only", "guided"):
            distillation.claim(f"{text}: {kind}", (kind, better), (kind, worse))

    by_pairs = Grid(f"Distillation by the number of pairs, 300 steps ({twice})",
                    "pairs in stage 04 (stage 03: 2,048)", student)
    for n in (64, 256, 1024, 2048, 8192):
        pairs = PAIRS if n == 2048 else stage("02", TEACHER, n_pairs=n)  # those of stage 03: not twice
        by_pairs.variants["pairs only", str(n)] = evaluated(distilled(pairs=pairs, guidance=0))
        by_pairs.variants["guided", str(n)] = evaluated(distilled(pairs=pairs))
        by_pairs.claim(f"guidance helps with {n} pairs", ("guided", str(n)), ("pairs only", str(n)))
    few, many = (by_pairs.claims[f"guidance helps with {n} pairs"] for n in (64, 8192))
    less = tuple((-sign, *what) for sign, *what in many)
    by_pairs.claims["guidance helps more with 64 pairs than with 8192"] = few + less

    size = Grid("Size of the student", "channels of its first level",
                {**student, "flow, 8 calls": flow["8 calls"]}, ("parameters", "macs", "ms"))
    for base in (8, 16, 24):
        small = reflow_of(base=base)
        size.variants["", f"base {base}"] = evaluated(distilled(small)) + evaluated(small)
    size.claim("base 16 is better than base 8", ("", "base 16"), ("", "base 8"))
    size.claim("base 24 is better than base 16", ("", "base 24"), ("", "base 16"))

    names, one = ("teacher", "2-rectified flow", "student"), ("", "1")
    calls = Grid("Calls, with the preset's training", "network calls (Euler steps)",
                 {name: (name, None) for name in names})
    for n in (1, 2, 4, 8, 25):
        calls.variants["", str(n)] = default_evaluation(dict(teacher_steps=n, flow_steps=n, student_steps=n))
    calls.claims = {"reflow makes one call better": ((1, one, names[0]), (-1, one, names[1])),
                    "distillation makes one call better": ((1, one, names[1]), (-1, one, names[2])),
                    "the student's one call is within 1.6 times the teacher's 25":
                    ((1.6, ("", "25"), names[0]), (-1, one, names[2]))}

    precision = Grid("All stages in fp32, and in what the machine is best at (auto)", "precision",
                     {"teacher, 25 calls": ("teacher", 25), "flow, 8 calls": flow["8 calls"], **student})
    for name in ("fp32", "auto"):
        precision.variants["", name] = default_evaluation({}, precision=name)
    precision.claim("fp32 is better", ("", "fp32"), ("", "auto"))
    return {"calls": calls, "distillation": distillation, "pairs": by_pairs, "reflow": reflow,
            "scarce": scarce, "steps": steps, "size": size, "precision": precision}


def row_of(results, network, calls):
    """The row of a network in the tables of 05, with so many calls (None: the most)."""
    rows = [row for result in results for row in result["rows"] if row["network"] == network]
    return max((row for row in rows if calls in (None, row["calls"])), key=lambda row: row["calls"])


def values_of(grid, measured):
    """{(variant, column): [distance for each seed]} from the list of measurements in the .json."""
    found = {}
    for entry in measured:
        for column, which in grid.columns.items():
            row = row_of(entry["results"], *which)
            found.setdefault((tuple(entry["variant"]), column), []).append(row["distance"])
    return found


def table(grid, measured, made):
    """The lines of <grid>.md, from the two lists in the .json."""
    values, seeds = values_of(grid, measured), len({entry["seed"] for entry in measured})
    judges = {result["protocol"].get("judge") for entry in measured for result in entry["results"]}
    require(len(judges) == 1, f"the runs had different judges ({judges}): delete their folders 05-*")
    lines = [f"**{grid.title}**: FD-shapes, mean ± standard deviation of {seeds} seeds.", "",
             f"| variant | {' | '.join([*grid.columns, *grid.facts])} |",
             "|---|" + "---:|" * len([*grid.columns, *grid.facts])]
    for variant in grid.variants:
        found = [values[variant, column] for column in grid.columns]
        cells = [f"{mean(column):.3f} ± {stdev(column):.3f}" for column in found]
        entries = [entry["results"] for entry in measured if tuple(entry["variant"]) == variant]
        for fact in grid.facts:  # of the first network that has it
            rows = [[row_of(results, *which)[fact] for which in grid.columns.values()] for results in entries]
            average = mean(next(value for value in row if value is not None) for row in rows)
            cells.append(f"{average:,.0f}" if average >= 1000 else f"{average:.3g}")
        lines.append(f"| {', '.join(filter(None, variant))} | {' | '.join(cells)} |")
    n, t = len(grid.claims), T_QUANTILE[seeds]
    lines += ["", "Seeds are compared in pairs. Each interval stands for itself: of "
              f"{n} claims without any truth in them, {0.05 * n:.2f} would on average be called shown or "
              "opposite.", "", "| claim | margin in FD-shapes (above 0: it holds), 95 % interval | verdict |",
              "|---|---:|---|"]
    for text, terms in grid.claims.items():
        signed = [[sign * value for value in values[variant, column]] for sign, variant, column in terms]
        margins = [sum(one) for one in zip(*signed)]  # of each seed
        middle, half = mean(margins), t * stdev(margins) / math.sqrt(seeds)
        verdict = "shown" if middle > half else "opposite" if middle < -half else "not shown"
        lines.append(f"| {text} | {middle:+.3f} ({middle - half:+.3f} to {middle + half:+.3f}) | {verdict} |")
    return [*lines, "", made_with(made), ""]


def plot(path, grid, values):
    """Draws the mean of every variant, and a dot for each seed, on a logarithmic scale."""
    places = list(dict.fromkeys(place for _, place in grid.variants))
    names = list(dict.fromkeys((line, column) for line, _ in grid.variants for column in grid.columns))
    colours = ("#174a7c", "#d1495b", "#2e8b57", "#e08e0b", "#6a4c93", "#555555", "#3fb8d3", "#8c564b")
    left, right, top, bottom, ink, font = 70, 800, 40, 380, "#222222", ImageFont.load_default(13)
    canvas = Image.new("RGB", (820, bottom + 60 + 20 * math.ceil(len(names) / 3)), "white")
    draw = ImageDraw.Draw(canvas)
    low, high = 0.93 * min(map(min, values.values())), 1.07 * max(map(max, values.values()))

    def at(i, value, line):
        """Where on the canvas a value stands, at the i-th place. Lines stand beside each other."""
        x = left + (i + 0.5) * (right - left) / len(places) + (line - (len(names) - 1) / 2) * 9
        return x, bottom - math.log(value / low) / math.log(high / low) * (bottom - top)

    draw.text((left, 2), grid.title, ink, ImageFont.load_default(15))
    draw.text((left, 21), "FD-shapes (smaller is better); small dots: seeds", ink, font)
    draw.text(((left + right) / 2, bottom + 26), grid.x_label, ink, font, "ma")
    draw.rectangle([left, top, right, bottom], outline="#999999")
    for value in (0.1, 0.2, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100):
        if low < value < high:
            draw.line([(left, at(0, value, 0)[1]), (right, at(0, value, 0)[1])], "#dddddd")
            draw.text((left - 8, at(0, value, 0)[1]), f"{value:g}", ink, font, "rm")
    for i, place in enumerate(places):
        draw.text((at(i, low, (len(names) - 1) / 2)[0], bottom + 6), place, ink, font, "ma")
    for line, (name, column) in enumerate(names):
        colour, means = colours[line], []
        for i, found in enumerate(values.get(((name, place), column), []) for place in places):
            means += [at(i, mean(found), line)] if found else []
            for x, y in (at(i, value, line) for value in found):
                draw.ellipse([x - 2, y - 2, x + 2, y + 2], outline=colour)
        if all(place.isdigit() for place in places):
            draw.line(means, colour, 2)
        for x, y in [*means, (left + 5 + 240 * (line % 3), bottom + 58 + 20 * (line // 3))]:  # and the legend
            draw.rectangle([x - 4, y - 4, x + 4, y + 4], colour)
        draw.text((x + 11, y), ", ".join(filter(None, (name, column))), ink, font, "lm")
    with writing(path) as file:
        canvas.save(file, "PNG")


def main(cfg):
    start(cfg, "ablations")
    require(cfg.preset == "shapes", f"--preset {cfg.preset}: the grids' budgets are made for shapes")
    require(cfg.seeds in T_QUANTILE, f"--seeds {cfg.seeds}: choose from 2 to 8")
    require(cfg.grid in ("all", *grids()), f"--grid {cfg.grid}: choose from all, {', '.join(grids())}")
    cfg.runs = Path(cfg.out, "ablations")
    for name in grids() if cfg.grid == "all" else [cfg.grid]:
        grid, parts, measured = grids()[name], ("protocol", "rows"), []
        made = make_all([task for tasks in grid.variants.values() for task in tasks], cfg)
        for variant, tasks in grid.variants.items():
            for seed in range(cfg.seeds):
                results = [{part: made[task, seed][part] for part in parts} for task in tasks]
                measured.append({"variant": variant, "seed": seed, "results": results})
        commands = [{key: one[key] for key in one if key not in parts} for one in made.values()]
        lines = table(grid, measured, commands)
        facts = json.dumps({"grid": name, "measured": measured, "made": commands}, indent=1)
        for suffix, text in (("json", facts), ("md", "\n".join(lines))):
            with writing(Path(cfg.results, f"{name}.{suffix}")) as file:
                file.write(text.encode())
        plot(Path(cfg.results, f"{name}.png"), grid, values_of(grid, measured))
        say("\n".join(["", *lines, f"wrote {cfg.results}/{name}.json, .md, .png"]))


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
