"""Kills the stages at random moments, restarts them, and compares what they end with to an unbroken run.

    python tests/kill_and_resume.py --kills 20

Each stage runs once without a break. Then, in another folder, its process is killed (SIGKILL) again and again
after a random time, and each time the same command is given again; the last run is left to end. States are
saved all the time, so that many kills fall into a save.
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import draw_few_shapes  # noqa: E402  (makes common importable)
import common  # noqa: E402
from test_pipeline import arguments, script  # noqa: E402


def start(number, out, kills):
    """A child that runs the stage. This process has not computed anything, so it can be forked."""
    child = os.fork()
    if child == 0:
        size = {"02": {"n_pairs": 80 * kills, "sample_steps": 10}, "05": {"n_samples": 100 * kills}}
        s, settings = script(number), size.get(number, {"steps": 10 * kills})
        with open(os.devnull, "w") as sys.stdout:
            try:
                common.run(s.main, s.SETTINGS, s.__doc__, arguments(number, out, **settings))
            except SystemExit as error:
                print(error, file=sys.stderr)
                os._exit(1)
        os._exit(0)
    return child


def finish(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the stage failed"


def same(a, b):
    """Equal content of two things that may hold tensors."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and same(list(a.values()), list(b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def content(path):
    """Of a state its content, of results all but the times, of other files the bytes."""
    if path.suffix == ".json":
        results = json.loads(path.read_text())
        return [results["protocol"], [{**row, "ms": None} for row in results["rows"]]]
    return common.read(path) if path.name.endswith("_state.pt") else path.read_bytes()


def kill_and_resume(number, whole, broken, kills, moments):
    """Raises AssertionError if anything differs in the end."""
    began, hits = time.time(), 0
    finish(start(number, whole, kills))
    seconds = time.time() - began
    for _ in range(kills):
        child = start(number, broken, kills)
        while not list(Path(broken).glob(f"*/{number}_*")):  # wait until there is something to keep
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 2 * seconds / max(8, kills)))
        if os.waitpid(child, os.WNOHANG)[0] == 0:  # it still runs
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            hits += 1
    finish(start(number, broken, kills))
    names = [{path.name for path in Path(out, "shapes").iterdir()} for out in (whole, broken)]
    assert names[0] == names[1], f"stray files: {names[0] ^ names[1]}"
    for name in names[0] - {"05_results.md"}:
        assert same(*(content(Path(out, "shapes", name)) for out in (whole, broken))), f"{name} differs"
    print(f"{number} | {hits} of {kills} kills hit a run of {seconds:.1f} s | everything is the same")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills per stage [20]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    draw_few_shapes()
    common.SAVE_SECONDS = 0.02
    with tempfile.TemporaryDirectory() as out:
        for stage in ("01", "02", "03", "04", "05"):
            kill_and_resume(stage, f"{out}/whole", f"{out}/broken", given.kills, rng)
