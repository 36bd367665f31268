"""Shared by the tests: the scripts as modules (their names start with a digit, so by path), and fixtures."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NAMES = {"01": "01_train_teacher", "02": "02_generate_pairs", "03": "03_annealing_reflow",
         "04": "04_flow_guided_distill", "05": "05_eval_fid", "import": "extras/import_checkpoint",
         "export": "extras/export_student", "benchmark": "extras/benchmark", "ablations": "extras/ablations",
         "paths": "extras/paths", "real_images": "extras/real_images"}


def load_script(number):
    name = NAMES[number]
    module = name.split("/")[-1]
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, ROOT / f"{name}.py")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


def draw_few_shapes():
    """500 drawings in place of the 16,384 of the stages, which take a second each time."""
    import common
    draw = common.draw_shapes

    def draw_few(n, image_size, seed=0):
        return draw(500 if n == 16_384 else n, image_size, seed)

    common.draw_shapes = draw_few


def run_script(number, *arguments, cwd):
    """Runs a script as a user would; returns the finished process with its output as text."""
    command = [sys.executable, str(ROOT / f"{NAMES[number]}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=170)


class Field(torch.nn.Module):
    """Stand-in network: a known velocity v(x, t), given as a function. It keeps its times and last labels."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.times = velocity, []
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, labels=None):
        self.times.append(t.clone())
        self.labels = labels
        return self.scale * self.velocity(x, t[:, None, None, None])


@pytest.fixture(scope="session", autouse=True)
def few_shapes():
    draw_few_shapes()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which all five stages have run, on a few images for a few steps."""
    from test_pipeline import TINY, call
    out = tmp_path_factory.mktemp("out")
    for number in TINY:
        call(number, out)
    return out


@pytest.fixture
def stage():
    return load_script


@pytest.fixture(autouse=True)
def seed(tmp_path, monkeypatch):
    """Each test has the same random numbers, and a working directory of its own, where data/ belongs."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
