"""Two processes make the pairs and distances that one makes, and end together; kills change nothing."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from test_pipeline import artifact, call


def start(program, *arguments, launcher=(), cwd=ROOT):
    command = [sys.executable, *launcher, str(ROOT / "tests" / program), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def start_two(stages, out, *flags):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return start("run_stages.py", stages, out, *flags, launcher=launcher, cwd=out)


def output_of(run):
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    return output


def test_two_processes_make_the_same_pairs_and_distances_and_train_to_the_end(finished, tmp_path):
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    output = output_of(start_two("02,05,03", tmp_path, "--restart"))
    one, two = (artifact(out, "02_pairs.pt") for out in (finished, tmp_path))
    assert torch.equal(one["z"], two["z"]) and torch.equal(one["x"], two["x"]) and one["id"] == two["id"]
    files = [out / "shapes/05_results.json" for out in (finished, tmp_path)]
    one, two = ([row["distance"] for row in json.loads(file.read_text())["rows"]] for file in files)
    assert two == pytest.approx(one, rel=1e-6)
    loss, = re.findall("step      4/4 [|] loss ([0-9.]+)", output)  # only process 0 prints
    assert 0 < float(loss) < 2
    assert artifact(tmp_path, "03_reflow.pt")["id"] != artifact(finished, "03_reflow.pt")["id"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc to find the processes")
def test_when_one_process_is_killed_both_end_and_one_or_two_continue(tmp_path):
    run, state = start_two("01", tmp_path, "--steps=60"), tmp_path / "shapes/01_state.pt"
    while not state.exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode != 0 and not any(Path("/proc", worker).exists() for worker in workers)
    assert not (tmp_path / "shapes/01_teacher.pt").exists()
    shutil.copytree(tmp_path / "shapes", tmp_path / "one/shapes")
    assert "continues after step" in output_of(start_two("01", tmp_path, "--steps=60"))
    call("01", tmp_path / "one", steps=60)
    for out in (tmp_path, tmp_path / "one"):
        assert all(weight.isfinite().all() for weight in artifact(out, "01_teacher.pt")["weights"].values())


def test_killed_and_restarted_stages_end_with_the_same_bits():
    assert output_of(start("kill_and_resume.py", "--kills=1")).count("everything is the same") == 5
