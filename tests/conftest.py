"""What the tests share: the scripts as modules, small runs of the five stages, and stand-ins."""
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
from extras import drawings  # noqa: E402

NAMES = {
    "01": "01_train_teacher",
    "02": "02_generate_pairs",
    "03": "03_annealing_reflow",
    "04": "04_flow_guided_distill",
    "05": "05_eval_fid",
    "import": "extras/import_checkpoint",
    "export": "extras/export_student",
    "benchmark": "extras/benchmark",
    "ablations": "extras/ablations",
    "toy2d": "extras/toy2d",
    "prepare": "extras/prepare_images",
    "sample": "extras/sample",
    "fid": "extras/fid",
    "judge": "extras/train_judge",
    "gif": "extras/calls_gif",
}
ARTIFACTS = {
    "01": "01_teacher.pt",
    "02": "02_pairs.pt",
    "03": "03_reflow.pt",
    "04": "04_student.pt",
}

# Settings with which a stage takes a second or so.
SMALL_NET = dict(base=8, attn="8", dropout=0.5)
FEW_STEPS = dict(steps=4, batch=8, precision="fp32")
TINY = {
    "01": dict(mult="1,2", **SMALL_NET, **FEW_STEPS),
    "02": dict(n_pairs=40, sample_steps=2, precision="fp32"),
    "03": dict(mult="1,1", anneal_steps=3, **SMALL_NET, **FEW_STEPS),
    "04": FEW_STEPS,
    "05": dict(n_samples=120, teacher_steps=2, flow_steps=2, precision="fp32"),
}


def script(number):
    """A script as a module."""
    return importlib.import_module(NAMES[number].split("/")[-1])


def make_small():
    """Makes the stages faster: they draw fewer images, and make 16 pairs per call."""
    draw = drawings.draw_shapes

    def draw_few(n, size, seed=0):
        if n == 16_384:  # what the stages draw; it takes a second each time
            n = 500
        return draw(n, size, seed)

    drawings.draw_shapes = draw_few
    script("02").sampling_batch = lambda net: 16


def flags_of(settings):
    """Settings as a command line has them."""
    return [f"--{name}={value}" for name, value in settings.items()]


def arguments(number, out, *flags, **settings):
    """The command line for TINY, with other settings as given. It always runs on the CPU."""
    values = {"out": out, "device": "cpu", **TINY[number], **settings}
    return [*flags_of(values), *flags]


def settings_of(number, *flags, **settings):
    """The settings of a script, without TINY. It always runs on the CPU, too."""
    argv = ["--device=cpu", *flags, *flags_of(settings)]
    return common.read_settings(script(number).SETTINGS, "", argv)


def call(number, out, *flags, **settings):
    """Runs a script's main in this process, which is faster than starting a new one."""
    argv = arguments(number, out, *flags, **settings)
    script(number).main(settings_of(number, *argv))


def run(number, argv):
    """Runs a script as its command line does: errors end it with one line."""
    common.run(script(number).main, script(number).SETTINGS, "", argv)


def refused(number, out, *flags, **settings):
    """The line with which a script ends early: what a user would see."""
    argv = arguments(number, out, *flags, **settings)
    stderr = io.StringIO()
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(stderr):
        run(number, argv)
    line = stopped.value.code
    if line == 2:  # argparse has printed its message
        line = stderr.getvalue().splitlines()[-1]
    assert re.match("(error|stopped|.*: error: ).*$", line)
    return line


def artifact(out, name):
    return common.read(out / "shapes" / name)


def same(a, b):
    """Whether two things, which may hold tensors, have equal content."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def save_images(folder, images, labels=None):
    """Writes uint8 (N, 3, H, W) as PNG files, and labels as a dataset.json. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:04}.png")
    if labels is not None:
        rows = [[f"{i:04}.png", int(label)] for i, label in enumerate(labels)]
        (folder / "dataset.json").write_text(json.dumps({"labels": rows}))
    return folder


class Field(torch.nn.Module):
    """A stand-in for a network: the velocity v(x, t) is a given function.

    It remembers all times that it was called with, and the last labels.
    """

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity
        self.times = []
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, labels=None):
        self.times.append(t.clone())
        self.labels = labels
        return self.scale * self.velocity(x, t[:, None, None, None])


def filled(image_size, std=0.1, **arguments):
    """A network with random weights, none of them zero.

    They are the same in every version of NumPy, which promises that for RandomState.
    """
    net = common.UNet(image_size, **arguments).eval()
    rng = np.random.RandomState(0)
    for name, p in sorted(net.named_parameters()):
        noise = rng.standard_normal(tuple(p.shape))
        values = std * torch.from_numpy(noise)
        if "norm" in name and name.endswith("weight"):
            values += 1
        p.data.copy_(values)
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
    """Each test has the same random numbers, and an empty working directory for its data/."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
