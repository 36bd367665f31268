"""Kills stages 01 to 04 at random moments, restarts them, and compares what they end with to an unbroken run, bit for bit.

    python tests/kill_and_resume.py --kills 20

Every stage is run once without a break. Then, in another folder, its process is killed (SIGKILL) again and again after a
random time, and each time the same command is given again; the last run is left to end. States are saved every third step,
so that many kills fall into a save. Stages that read 02's pairs read the same ones in both folders.
"""
import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import draw_few_shapes, load_script  # noqa: E402  (makes common importable)
import common  # noqa: E402

def settings(kills):
    """Of each stage: long enough for that many kills."""
    training = dict(batch=8, steps=12 * kills, save_every=3, log_every=50)
    return {
        "01": dict(base=8, mult="1,2", attn="8", sample_steps=2, **training),
        "02": dict(n_pairs=100 * kills, sample_steps=10, sample_batch=20),
        "03": dict(base=8, mult="1,1", attn="8", sample_steps=2, anneal_steps=6 * kills, **training),
        "04": training,
    }


ARTIFACTS = {"01": "01_teacher.pt", "02": "02_pairs.pt", "03": "03_reflow.pt", "04": "04_student.pt"}


def start(number, out, flags):
    """The process number of a child that runs the stage. This process has not computed anything, so it can be forked safely."""
    child = os.fork()
    if child == 0:
        sys.argv = [number, f"--out={out}", *(f"--{k}={v}" for k, v in flags.items())]
        with open(os.devnull, "w") as sys.stdout:
            script = load_script(number)
            try:
                common.run(script.main, script.Config, script.PRESETS, script.__doc__)
            except SystemExit as error:
                print(error, file=sys.stderr)
                os._exit(1)
        os._exit(0)
    return child


def finish(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the stage failed"


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key != "digest")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def kill_and_resume(number, whole, broken, kills, rng):
    """Returns how many of the kills hit a running process. Raises AssertionError if anything differs in the end."""
    began, flags = time.time(), settings(kills)[number]
    finish(start(number, whole, flags))
    seconds = time.time() - began
    hits = 0
    for _ in range(kills):
        child = start(number, broken, flags)
        time.sleep(rng.uniform(0, 2 * seconds / max(4, kills)))
        if os.waitpid(child, os.WNOHANG)[0] == 0:  # it still runs
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            hits += 1
    finish(start(number, broken, flags))
    names = [{p.name for p in (out / "shapes").iterdir()} for out in (whole, broken)]
    assert names[0] == names[1], f"stray files: {names[0] ^ names[1]}"
    for name in names[0]:
        a, b = (out / "shapes" / name for out in (whole, broken))
        # A state's bytes depend on how it came about (its numbers may share memory); its content must not.
        same = equal(common.read(a), common.read(b)) if name.endswith("_state.pt") else a.read_bytes() == b.read_bytes()
        assert same, f"{name} differs from the unbroken run's"
    print(f"{ARTIFACTS[number]} | {hits} of {kills} kills hit a run of {seconds:.0f} s | all files are the same, bit for bit", flush=True)
    return hits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills per stage [20]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    draw_few_shapes()
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        for stage in ARTIFACTS:
            kill_and_resume(stage, whole, broken, arguments.kills, rng)
