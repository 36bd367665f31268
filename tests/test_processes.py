"""Several processes compute what one computes; when one dies all end; kills and restarts change nothing."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common

FLAGS = ["--base=8", "--mult=1,2", "--attn=8", "--batch=8", "--lr=1e-3", "--warmup=5", "--precision=fp32", "--log_every=10",
         "--sample_batch=16", "--n_samples=100", "--teacher_steps=2", "--flow_steps=2", "--feature_steps=5", "--allow_few"]


def start(processes, *arguments, out, cwd):
    script = Path(__file__).with_name("run_stages.py")
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                        f"--nproc_per_node={processes}"]
    return subprocess.Popen([*launcher, str(script), *arguments, f"--out={out}"], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes."""
    return finished(1, "01,02,03,04,05", tmp_path_factory.mktemp("one"))


def finished(processes, stages, out, *more):
    run = start(processes, stages, *FLAGS, "--n_pairs=50", "--steps=50", "--sample_steps=2", *more, out=out, cwd=out)
    output, _ = run.communicate(timeout=170)
    assert run.returncode == 0, output
    assert output.count("step     50/50") == len({"01", "03", "04"} & set(stages.split(",")))  # only process 0 prints
    assert not list(out.rglob("*.tmp")) + list(out.rglob("*.parts"))
    return out / "shapes"


def relative_difference(a, b):
    """Of all weights as one vector. (Tensor by tensor it is as small, but for the bias of the attention's keys: it has no effect,
    its gradient is nothing but rounding, and Adam makes whole steps of that.)"""
    a, b = (torch.cat([w.flatten() for w in common.read(path)["weights"].values()]) for path in (a, b))
    return ((a - b).norm() / a.norm()).item()


def test_two_processes_train_what_one_trains(one, tmp_path):
    shutil.copytree(one, tmp_path / "shapes")
    two = finished(2, "01,03,04", tmp_path, "--restart")
    for name in ("01_teacher.pt", "03_reflow.pt", "04_student.pt"):
        assert 0 < relative_difference(one / name, two / name) < 1e-5, name


def test_three_processes_make_the_same_pairs_and_distances_and_share_a_batch_of_eight(one, tmp_path):
    shutil.copytree(one, tmp_path / "shapes")
    three = finished(3, "02,05,01", tmp_path, "--restart")
    assert torch.equal(common.read(three / "02_pairs.pt")["images"], common.read(one / "02_pairs.pt")["images"])
    rows, expected = (json.loads((folder / "05_results.json").read_text())["rows"] for folder in (three, one))
    assert [row["distance"] for row in rows] == pytest.approx([row["distance"] for row in expected], rel=1e-6)
    assert 0 < relative_difference(one / "01_teacher.pt", three / "01_teacher.pt") < 1e-5


def children_of(process):
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc to find the processes")
def test_when_one_of_three_processes_is_killed_all_end_and_two_resume(tmp_path):
    flags = [*FLAGS, "--steps=60", "--save_every=5", "--sample_steps=1", "--timeout=1"]
    run = start(3, "01", *flags, out=tmp_path, cwd=tmp_path)
    state = tmp_path / "shapes/01_state.pt"
    while not state.exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    workers = children_of(run.pid)
    assert len(workers) == 3
    os.kill(workers[1], signal.SIGKILL)
    run.communicate(timeout=90)
    assert run.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not (tmp_path / "shapes/01_teacher.pt").exists()
    again = start(2, "01", *flags, out=tmp_path, cwd=tmp_path)
    output, _ = again.communicate(timeout=170)
    assert again.returncode == 0 and "continues after step" in output, output
    assert common.read(state)["step"] == 60


def test_killed_and_restarted_stages_end_with_the_same_bits():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("kill_and_resume.py")), "--kills", "1"], text=True,
                          capture_output=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same, bit for bit") == 4
