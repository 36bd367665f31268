"""Shared by the tests: the scripts as modules, small runs of the five stages, and stand-ins."""
import contextlib
import importlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared/fixtures"  # reference outputs that are not in every clone
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
import common  # noqa: E402

NAMES = {"01": "01_train_teacher", "02": "02_generate_pairs", "03": "03_annealing_reflow",
         "04": "04_flow_guided_distill", "05": "05_eval_fid", "import": "extras/import_checkpoint",
         "export": "extras/export_student", "benchmark": "extras/benchmark", "ablations": "extras/ablations",
         "toy2d": "extras/toy2d", "prepare": "extras/prepare_images", "sample": "extras/sample",
         "fid": "extras/fid"}
ARTIFACTS = {"01": "01_teacher.pt", "02": "02_pairs.pt", "03": "03_reflow.pt", "04": "04_student.pt"}
TINY = {
    "01": dict(base=8, mult="1,2", attn="8", steps=4, batch=8, dropout=0.5, precision="fp32"),
    "02": dict(n_pairs=40, sample_steps=2, precision="fp32"),
    "03": dict(base=8, mult="1,1", attn="8", steps=4, batch=8, anneal_steps=3, dropout=0.5, precision="fp32"),
    "04": dict(steps=4, batch=8, precision="fp32"),
    "05": dict(n_samples=120, teacher_steps=2, flow_steps=2, precision="fp32")}


def script(number):
    """A script as a module."""
    return importlib.import_module(NAMES[number].split("/")[-1])


def make_small():
    """500 drawings in place of the 16,384 of the stages, which take a second each time; 16 pairs per call."""
    draw = common.draw_shapes
    common.draw_shapes = lambda n, size, seed=0: draw(500 if n == 16_384 else n, size, seed)
    script("02").PART = 16


def arguments(number, out, *flags, **settings):
    """The command line for TINY, with other settings as given. On the CPU, whatever there is."""
    values = {"out": out, "device": "cpu", **TINY[number], **settings}
    return [*(f"--{name}={value}" for name, value in values.items()), *flags]


def settings_of(number, *flags, **settings):
    """The settings of a script, without TINY. On the CPU, too."""
    argv = ["--device=cpu", *flags, *(f"--{name}={value}" for name, value in settings.items())]
    return common.read_settings(script(number).SETTINGS, "", argv)


def call(number, out, *flags, **settings):
    """The script's main in this process: faster than a new one."""
    script(number).main(settings_of(number, *arguments(number, out, *flags, **settings)))


def refused(number, out, *flags, **settings):
    """The line with which the script ends early, through the same guard that a user meets."""
    s, argv = script(number), arguments(number, out, *flags, **settings)
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()) as stderr:
        common.run(s.main, s.SETTINGS, "", argv)
    by_argparse = stopped.value.code == 2
    line = stderr.getvalue().splitlines()[-1] if by_argparse else stopped.value.code
    assert re.match("(error|stopped|.*: error: ).*$", line)
    return line


def artifact(out, name):
    return common.read(out / "shapes" / name)


def same(a, b):
    """Equal content of two things that may hold tensors."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and same(list(a.values()), list(b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def save_images(folder, images, labels=None):
    """Writes uint8 (N, 3, H, W) as PNG files, with a dataset.json if there are labels; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04}.png")
    if labels is not None:
        named = [[f"{i:04}.png", int(label)] for i, label in enumerate(labels)]
        (folder / "dataset.json").write_text(json.dumps({"labels": named}))
    return folder


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


def filled(image_size, std=0.1, **arguments):
    """A network with random weights, zero nowhere. (NumPy promises that RandomState never changes.)"""
    net, rng = common.UNet(image_size, **arguments).eval(), np.random.RandomState(0)
    for name, p in sorted(net.named_parameters()):
        noise = torch.from_numpy(rng.standard_normal(tuple(p.shape)))
        p.data.copy_(std * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return net


@pytest.fixture(scope="session", autouse=True)
def small():
    make_small()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which all five stages have run, on a few images for a few steps."""
    out = tmp_path_factory.mktemp("out")
    for number in TINY:
        call(number, out)
    return out


@pytest.fixture(autouse=True)
def seed(tmp_path, monkeypatch):
    """Each test has the same random numbers, and a working directory of its own, where data/ belongs."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
