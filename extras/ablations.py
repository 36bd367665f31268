"""Run the five stages over a grid of settings and seeds: does each idea of the paper help, and by how much?

    python extras/ablations.py                        # every grid, 5 seeds, on `shapes`: hours on 2 CPU cores
    python extras/ablations.py --grid distillation    # one of them; --tables_only: its table and plot again

A run is one command of a stage, in a folder of its own, to which the artifacts of earlier runs are linked. It is
known by all its settings and those of the runs before it: grids share runs, none is made twice, and the same
command continues. (Code that changes makes no new run; the tables name the commits.) Variants are compared seed
by seed: those with the same seed share what the grid does not vary, such as the teacher and its pairs. All
networks are measured with the same noise (05 with --seed 0).

Reads   nothing
Writes  extras/results/<grid>.json (all runs), .md (table and verdicts), .png; the runs into <out>/ablations
"""
import concurrent.futures
import datetime
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import UserError, read_settings, require, run, say, settings_of, start, writing

STAGES = {name[:2]: importlib.import_module(name) for name in (
    "01_train_teacher", "02_generate_pairs", "03_annealing_reflow", "04_flow_guided_distill", "05_eval_fid")}
MADE = {"01": "01_teacher.pt", "02": "02_pairs.pt", "03": "03_reflow.pt", "04": "04_student.pt"}
# Student's t, 97.5 %, of n values.
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
SETTINGS = [
    # name, its value for shapes, cifar10_quick, cifar10, ffhq64 and imagenet64, text
    ("grid", *["all"] * 5, "calls, distillation, pairs, reflow, scarce, steps, size, precision, or all"),
    ("seeds", 5, 5, 5, 5, 5, "runs of each variant, with the seeds 0, 1, ..."),
    ("jobs", 0, 0, 0, 0, 0, "runs at a time; 0: one for each CPU core, or one on a GPU"),
    ("results", *[str(ROOT / "extras" / "results")] * 5, "folder of the tables and plots"),
    ("tables_only", *[False] * 5, "run nothing: only tables and plots, from the .json"),
]


# ------------------------------------------------------------------------------------------------------- runs

@dataclass(frozen=True)
class Run:
    """A command of a stage, on what its parents made. The seed is not part of it."""
    stage: str  # "01" ... "05"
    settings: tuple = ()  # (("steps", 500), ...); what is not named is the preset's
    parents: tuple = ()

    def ancestors(self):
        """The run itself and all that it was made from."""
        return {self}.union(*(parent.ancestors() for parent in self.parents))

    def arguments(self):
        """The settings as on the command line."""
        words = []
        for key, value in self.settings:
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            words += [f"--{key}={value}"] if not isinstance(value, bool) else [f"--{'' if value else 'no-'}{key}"]
        if len(self.ancestors()) > len({task.stage for task in self.ancestors()}):
            words.append("--allow_mixed")  # such as other pairs than those that the flow was made from
        return words

    def depends_on(self, preset):
        """Text of all that the result depends on but the seed: every setting of this run and its parents."""
        cfg = read_settings(STAGES[self.stage].SETTINGS, "", ["--preset", preset, *self.arguments()])
        return "\n".join([self.stage, str(settings_of(cfg)), *(p.depends_on(preset) for p in self.parents)])

    def folder(self, runs, preset, seed):
        digest = hashlib.sha256(self.depends_on(preset).encode()).hexdigest()[:10]
        return Path(runs, f"{self.stage}-{digest}-seed{seed}")


def stage(number, *parents, **settings):
    return Run(number, tuple(settings.items()), parents)


def make(task, runs, preset, seed, device, threads):
    """What done.json in a run's folder says of it. If there is none, the run is made. UserError if it fails."""
    folder = task.folder(runs, preset, seed)
    if (folder / "done.json").exists():
        return json.loads((folder / "done.json").read_text())
    (folder / preset).mkdir(parents=True, exist_ok=True)
    for parent in task.parents:
        link = folder / preset / MADE[parent.stage]
        link.unlink(missing_ok=True)  # the parent may have been made again
        os.link(parent.folder(runs, preset, seed) / preset / link.name, link)
    arguments = [f"{STAGES[task.stage].__name__}.py", "--preset", preset, "--seed",
                 str(0 if task.stage == "05" else seed), *task.arguments()]
    found = {"run": str(task), "command": " ".join(arguments), "seed": seed, **origin(device)}
    command, began = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]], time.time()
    with open(folder / "log.txt", "a") as log:
        code = subprocess.run([*command, "--out", str(folder), "--device", device], stdout=log, stderr=log,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    require(code == 0, f"{' '.join(arguments)} failed; see {folder}/log.txt")
    found["seconds"] = round(time.time() - began, 1)
    for results in (folder / preset).glob("05_*.json"):
        found |= json.loads(results.read_text())
    with writing(folder / "done.json") as file:
        file.write(json.dumps(found).encode())
    return found


def origin(device):
    """{"commit", "machine", "date"} of a run that begins. A + after the commit: the code differs from it."""
    commit, name, cpu = "unknown", platform.processor(), Path("/proc/cpuinfo")
    if shutil.which("git"):
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True)
        commit = head.stdout.strip() + "+" * (changed.returncode == 1) or commit
    if cpu.exists() and (model := re.search(r"model name\s*: (.+)", cpu.read_text())):
        name = model[1]
    name = f"{os.cpu_count()} cores {name}" if not on_gpu(device) else torch.cuda.get_device_name()
    machine = f"{name}, torch {torch.__version__}"
    return {"commit": commit, "machine": machine, "date": time.strftime("%Y-%m-%d")}


def on_gpu(device):
    return torch.cuda.is_available() and device.startswith(("auto", "cuda"))


def make_all(tasks, cfg, runs, preset):
    """{(run, seed): what make() found} of the runs and all that they are made from, each with every seed.

    Raises UserError for what failed, after all that does not depend on it is done.
    """
    require(not cfg.restart, f"--restart: delete the runs' folder in {cfg.out}, or choose another --out")
    require(cfg.seed == 0, "--seed: every variant is run with the seeds 0, 1, ...; their number is --seeds")
    jobs = cfg.jobs or (1 if on_gpu(cfg.device) else os.cpu_count())
    threads = max(1, os.cpu_count() // jobs)
    needed = set().union(*(task.ancestors() for task in tasks))
    futures, began = {}, time.time()

    def job(task, seed):
        for parent in task.parents:
            futures[parent, seed].result()
        found = make(task, runs, preset, seed, cfg.device, threads)
        left = sum(not future.done() for future in list(futures.values())) - 1
        passed = datetime.timedelta(seconds=round(time.time() - began))
        say(f"{passed} | {left} left | seed {seed} | {found['command']}")
        return found

    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        for task in sorted(needed, key=str):  # in the order of the stages: parents first
            for seed in range(cfg.seeds):
                futures[task, seed] = pool.submit(job, task, seed)
        concurrent.futures.wait(futures.values())
    finally:  # Ctrl-C: the commands that run hear it too, and save their state; the others are not begun
        pool.shutdown(cancel_futures=True)
    return {key: future.result() for key, future in futures.items()}


def made_with(made):
    """A line that tells where, when, with which commits and in which time the runs were made."""
    where, commits, dates = (sorted({one[key] for one in made}) for key in ("machine", "commit", "date"))
    dates = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    spent = datetime.timedelta(seconds=round(sum(one["seconds"] for one in made)))
    return (f"{', '.join(where)}; {dates}; commit {', '.join(commits)}; the {len(made)} commands took {spent} "
            "hours, those that ran side by side added up.")


# ------------------------------------------------------------------------------------------------------ grids

@dataclass
class Grid:
    title: str
    x_label: str
    variants: dict  # {(line in the plot, place on the x axis): the runs of 05 that measure it}
    columns: dict  # {title: (network in 05's table, its calls; None: the most)}
    claims: dict  # {text: ((sign, variant, column), ...)}: if it holds, the sum of these distances is above 0
    facts: dict = field(default_factory=dict)  # {further column of 05's table: its title}


def lower(ideas, columns):
    """The claims of ideas (text, better variant, worse variant): that the better's distance is smaller."""
    return {text + f", {column}" * (len(columns) > 1): ((1, worse, column), (-1, better, column))
            for text, better, worse in ideas for column in columns}


def evaluated(trained, **settings):
    """05 for the network that a run trained."""
    only = {"01": "teacher", "03": "flow", "04": "student"}[trained.stage]
    return (stage("05", trained, only=only, reference="shapes", **settings),)


TEACHER = stage("01")
TEACHERS_PAIRS = stage("02", TEACHER)


# Shorter than the preset's: differences show earlier, and a grid has to end.
def reflow_of(pairs=TEACHERS_PAIRS, **settings):
    return stage("03", pairs, **{"steps": 500, "anneal_steps": 180, **settings})


def distilled(flow=reflow_of(), pairs=TEACHERS_PAIRS, **settings):
    return stage("04", pairs, flow, **{"steps": 300, **settings})


def default_evaluation(networks, **settings):
    """05 for networks that were all made with the preset's settings, but for `settings`."""
    teacher = stage("01", **settings)
    pairs = stage("02", teacher, **settings)
    flow = stage("03", pairs, **settings)
    return (stage("05", teacher, flow, stage("04", pairs, flow, **settings), **settings, **networks),)


def table_3(both):
    """Paper, Table 3: {variant: its settings}, and the ideas (text, better, worse)."""
    variants = {"neither": dict(schedule="none", flip=False), "flip only": dict(schedule="none"),
                "annealing only": dict(flip=False), both: {}}
    return variants, [("annealing helps (with flips)", both, "flip only"),
                      ("annealing helps (without flips)", "annealing only", "neither"),
                      ("flips help (with annealing)", both, "annealing only"),
                      ("flips help (without annealing)", "flip only", "neither")]


def grids():
    """{name: Grid} of all experiments."""
    found, twice = {}, "a guided step takes about twice as long"
    flow = {"8 calls": ("2-rectified flow", 8), "1 call": ("2-rectified flow", 1)}
    student = {"student": ("student", 1)}

    # Paper, Tables 3 and 4. Each pair is seen 16 times, in `scarce` 500 and 125 times. (Paper: 2,000 times.)
    settings, ideas = table_3("both (linear)")
    for other in ("cosine", "exponential"):
        settings[other] = dict(schedule=other)
        ideas.append((f"linear is better than {other}", "both (linear)", other))
    variants = {("", name): evaluated(reflow_of(**more)) for name, more in settings.items()}
    ideas = [(text, ("", better), ("", worse)) for text, better, worse in ideas]
    found["reflow"] = Grid("Annealing reflow, 500 steps", "variant of stage 03; cosine and exponential have flips "
                           "too", variants, flow, lower(ideas, flow))

    variants, ideas = {}, []
    for n in ("64", "256"):
        settings, three = table_3("both")
        for name, more in settings.items():
            variants[name, n] = evaluated(reflow_of(stage("02", TEACHER, n_pairs=int(n)), **more))
        ideas += [(f"{text}, {n} pairs", (better, n), (worse, n)) for text, better, worse in three]
    found["scarce"] = Grid("Annealing reflow with few pairs, 500 steps", "pairs", variants, flow,
                           lower(ideas, flow))

    variants, ideas = {}, []
    for n in (125, 250, 500, 1000):
        variants["annealing", str(n)] = evaluated(reflow_of(steps=n, anneal_steps=round(0.36 * n)))
        variants["no annealing", str(n)] = evaluated(reflow_of(steps=n, schedule="none"))
        ideas.append((f"annealing helps at {n} steps", ("annealing", str(n)), ("no annealing", str(n))))
    found["steps"] = Grid("Annealing reflow by training steps (each point is a training of its own)",
                          "training steps of stage 03", variants, flow, lower(ideas, flow))

    # Paper, Table 5.
    variants, ideas, kinds = {}, [], ("pairs only", "guided")
    for what, more in (("scratch", dict(start_from="scratch")), ("teacher's pairs", {}),
                       ("own pairs", dict(pairs_from="flow"))):
        variants["pairs only", what] = evaluated(distilled(**more, guidance=0))
        variants["guided", what] = evaluated(distilled(**more))
        ideas.append((f"guidance helps: {what}", ("guided", what), ("pairs only", what)))
    for text, better, worse in (
            ("starting from the 2-rectified flow helps", "teacher's pairs", "scratch"),
            ("the flow's own pairs are better than the teacher's", "own pairs", "teacher's pairs")):
        ideas += [(f"{text}: {kind}", (kind, better), (kind, worse)) for kind in kinds]
    found["distillation"] = Grid(f"Distillation, 300 steps each ({twice})", "variant of stage 04; 'scratch' has "
                                 "the teacher's pairs", variants, student, lower(ideas, student))

    variants, ideas = {}, []
    for n in (64, 256, 1024, 2048, 8192):
        pairs = TEACHERS_PAIRS if n == 2048 else stage("02", TEACHER, n_pairs=n)  # stage 03's: not twice
        variants["pairs only", str(n)] = evaluated(distilled(pairs=pairs, guidance=0))
        variants["guided", str(n)] = evaluated(distilled(pairs=pairs))
        ideas.append((f"guidance helps with {n} pairs", ("guided", str(n)), ("pairs only", str(n))))
    claims = lower(ideas, student)
    less = tuple((-sign, *what) for sign, *what in claims["guidance helps with 8192 pairs"])
    claims["guidance helps more with 64 pairs than with 8192"] = claims["guidance helps with 64 pairs"] + less
    found["pairs"] = Grid(f"Distillation by the number of pairs, 300 steps ({twice})",
                          "pairs in stage 04 (stage 03: 2,048)", variants, student, claims)

    variants, columns = {}, {**student, "flow, 8 calls": flow["8 calls"]}
    for base in (8, 16, 24):
        small = reflow_of(base=base)
        variants["", f"base {base}"] = evaluated(distilled(small)) + evaluated(small)
    ideas = [(f"{a} is better than {b}", ("", a), ("", b)) for a, b in (("base 16", "base 8"), ("base 24", "base 16"))]
    facts = {"parameters": "parameters", "macs": "MACs", "ms": "ms per image, beside other runs",
             "straightness": "straightness of the flow"}
    found["size"] = Grid("Size of the student", "channels of its first level", variants, columns,
                         lower(ideas, student), facts)

    variants = {("", str(n)): default_evaluation(dict(teacher_steps=n, flow_steps=n, student_steps=n))
                for n in (1, 2, 4, 8, 25)}
    columns, one = {name: (name, None) for name in ("teacher", "2-rectified flow", "student")}, ("", "1")
    claims = {"reflow makes one call better": ((1, one, "teacher"), (-1, one, "2-rectified flow")),
              "distillation makes one call better": ((1, one, "2-rectified flow"), (-1, one, "student")),
              "the student's one call is within 1.6 times the teacher's 25":
              ((1.6, ("", "25"), "teacher"), (-1, one, "student"))}
    found["calls"] = Grid("Calls, with the preset's training", "network calls (Euler steps)", variants, columns,
                          claims)

    variants = {("", name): default_evaluation({}, precision=name) for name in ("fp32", "auto")}
    columns = {"teacher, 25 calls": ("teacher", 25), "flow, 8 calls": flow["8 calls"], **student}
    found["precision"] = Grid("All stages in fp32, and in what the machine is best at (auto: bf16 where it has it)",
                              "precision", variants, columns,
                              lower([("fp32 is better", ("", "fp32"), ("", "auto"))], columns))
    return found


# ------------------------------------------------------------------------------------------- tables and plots

def row_of(results, network, calls):
    """The row of a network in the tables of 05, with so many calls (None: the most)."""
    rows = [row for result in results for row in result["rows"] if row["network"] == network]
    return max((row for row in rows if calls in (None, row["calls"])), key=lambda row: row["calls"])


def values_of(grid, measured):
    """{(variant, column): [distance for each seed]} from the list of measurements in the .json."""
    found = {}
    for entry in sorted(measured, key=lambda entry: entry["seed"]):
        for column, (network, calls) in grid.columns.items():
            distance = row_of(entry["results"], network, calls)["distance"]
            found.setdefault((tuple(entry["variant"]), column), []).append(distance)
    return found


def interval(values):
    """(mean, half the width of its 95 % interval) by Student's t."""
    half = T_QUANTILE[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def table(grid, measured, made, values):
    """The lines of <grid>.md, from the two lists in the .json."""
    judges = {result["protocol"].get("judge") for entry in measured for result in entry["results"]}
    require(len(judges) == 1, f"the runs have different judges ({judges}): delete their folders 05-*")
    titles, seeds = [*grid.columns, *grid.facts.values()], len({entry["seed"] for entry in measured})
    lines = [f"**{grid.title}**: FD-shapes, mean ± standard deviation of {seeds} seeds.", "",
             f"| variant | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]
    for variant in grid.variants:
        columns = [values[variant, column] for column in grid.columns]
        cells = [f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}" for found in columns]
        entries = [entry["results"] for entry in measured if tuple(entry["variant"]) == variant]
        for fact in grid.facts:  # of the first network that has it
            rows = [[row_of(results, *column) for column in grid.columns.values()] for results in entries]
            mean = statistics.mean(next(row[fact] for row in some if row[fact] is not None) for some in rows)
            cells.append(f"{mean:,.0f}" if mean >= 1000 else f"{mean:.3g}")
        lines.append(f"| {', '.join(filter(None, variant))} | {' | '.join(cells)} |")
    lines += ["", f"Seeds are compared in pairs. Each interval stands for itself: of {len(grid.claims)} claims "
              f"without any truth in them, {0.05 * len(grid.claims):.2f} would on average be called shown or "
              "opposite.", "", "| claim | margin in FD-shapes (above 0: it holds), 95 % interval | verdict |",
              "|---|---:|---|"]
    for text, terms in grid.claims.items():
        signed = [[sign * value for value in values[variant, column]] for sign, variant, column in terms]
        mean, half = interval([sum(one) for one in zip(*signed)])
        verdict = "shown" if mean - half > 0 else "opposite" if mean + half < 0 else "not shown"
        lines.append(f"| {text} | {mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f}) | {verdict} |")
    return [*lines, "", made_with(made), ""]


def plot(path, grid, values):
    """Draws every variant: mean and standard deviation, and a dot for each seed, on a logarithmic scale."""
    places = list(dict.fromkeys(place for _, place in grid.variants))
    names = list(dict.fromkeys((line, column) for line, _ in grid.variants for column in grid.columns))
    colours = ("#174a7c", "#d1495b", "#2e8b57", "#e08e0b", "#6a4c93", "#555555", "#3fb8d3", "#8c564b")
    left, right, top, bottom, ink, font = 70, 800, 40, 380, "#222222", ImageFont.load_default(13)
    canvas = Image.new("RGB", (820, bottom + 60 + 20 * math.ceil(len(names) / 3)), "white")
    draw, everything = ImageDraw.Draw(canvas), [value for found in values.values() for value in found]
    low, high = 0.93 * min(everything), 1.07 * max(everything)
    numbered = all(place.isdigit() for place in places)  # then a logarithmic axis, and lines between places
    position = [math.log(int(place)) if numbered else i for i, place in enumerate(places)]

    def at(i, value, line):
        """Where on the canvas a value stands, at the i-th place. Lines stand beside each other."""
        share = (position[i] - position[0]) / ((position[-1] - position[0]) or 1)
        x = left + (0.5 + share * (len(places) - 1)) * (right - left) / len(places)
        y = bottom - math.log(max(value, low) / low) / math.log(high / low) * (bottom - top)
        return x + (line - (len(names) - 1) / 2) * 9, y

    draw.text((left, 2), grid.title, ink, ImageFont.load_default(15))
    draw.text((left, 21), "FD-shapes (smaller is better); dots: seeds, bars: standard deviation", ink, font)
    for step in (1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8):
        for value in (step * 10**power for power in range(-3, 4) if low < step * 10**power < high):
            y = at(0, value, 0)[1]
            draw.line([(left, y), (right, y)], "#dddddd")
            draw.text((left - 8, y), f"{value:g}", ink, font, "rm")
    draw.rectangle([left, top, right, bottom], outline="#999999")
    draw.text(((left + right) / 2, bottom + 26), grid.x_label, ink, font, "ma")
    for i, place in enumerate(places):
        draw.text((at(i, low, (len(names) - 1) / 2)[0], bottom + 6), place, ink, font, "ma")
    for line, (name, column) in enumerate(names):
        colour, means = colours[line], []
        for i, found in ((i, values.get(((name, place), column))) for i, place in enumerate(places)):
            for x, y in (at(i, value, line) for value in found or ()):
                draw.ellipse([x - 2, y - 2, x + 2, y + 2], outline=colour)
            if found:
                mean, spread = statistics.mean(found), statistics.stdev(found)
                draw.line([at(i, mean - spread, line), at(i, mean + spread, line)], colour, 2)
                means.append(at(i, mean, line))
        draw.line(means if numbered else means[:1] * 2, colour, 2)
        for x, y in [*means, (left + 5 + 240 * (line % 3), bottom + 58 + 20 * (line // 3))]:  # and the legend
            draw.rectangle([x - 4, y - 4, x + 4, y + 4], colour)
        draw.text((x + 11, y), ", ".join(filter(None, (name, column))), ink, font, "lm")
    with writing(path) as file:
        canvas.save(file, "PNG")


def main(cfg):
    start(cfg, "ablations")
    require(cfg.preset == "shapes", f"--preset {cfg.preset}: the grids' budgets are made for shapes")
    require(cfg.seeds in T_QUANTILE, f"--seeds {cfg.seeds}: choose from 2 to 10")
    require(cfg.grid in ("all", *grids()), f"--grid {cfg.grid}: choose from all, {', '.join(grids())}")
    for name in grids() if cfg.grid == "all" else [cfg.grid]:
        # 1. The runs.
        grid, path = grids()[name], Path(cfg.results, f"{name}.json")
        if not cfg.tables_only:
            tasks = [task for tasks in grid.variants.values() for task in tasks]
            made = make_all(tasks, cfg, Path(cfg.out, "ablations"), "shapes")
            content = {"grid": name, "measured": [], "made": []}
            for variant, tasks in grid.variants.items():
                for seed in range(cfg.seeds):
                    results = [{part: made[task, seed][part] for part in ("protocol", "rows")} for task in tasks]
                    content["measured"].append({"variant": variant, "seed": seed, "results": results})
            for one in made.values():
                content["made"].append({key: one[key] for key in one if key not in ("protocol", "rows")})
            with writing(path) as file:
                file.write(json.dumps(content, indent=1).encode())

        # 2. The table, with a verdict for every claim, and the plot.
        require(path.exists(), f"{path} is missing; make it without --tables_only")
        saved = json.loads(path.read_text())
        require({tuple(entry["variant"]) for entry in saved["measured"]} == set(grid.variants),
                f"{path} holds other variants than this grid has now: make it again without --tables_only")
        values = values_of(grid, saved["measured"])
        lines = table(grid, saved["measured"], saved["made"], values)
        with writing(path.with_suffix(".md")) as file:
            file.write("\n".join(lines).encode())
        plot(path.with_suffix(".png"), grid, values)
        say("\n".join(["", *lines, f"wrote {path}, .md, .png"]))


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
