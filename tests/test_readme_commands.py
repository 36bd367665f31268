"""Every command of README.md runs, one after the other as they stand there, but for small networks and few steps.

Left to others: the two commands that .ci/run gives (all five stages, the tests), what it gives after them (only sampling), and the programs
of extras that take minutes (test_extras.py). Several processes: test_processes.py.
"""
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import NAMES, ROOT, load_script
from test_import import NETWORKS, random_network

SMALL = {
    "01": dict(base=8, mult="1,2", blocks=1, steps=2, batch=4, sample_steps=1, precision="fp32"),
    "02": dict(n_pairs=6, sample_steps=1),
    "03": dict(base=8, mult="1,1", blocks=1, steps=2, batch=4, sample_steps=1, precision="fp32"),
    "04": dict(steps=2, batch=4, n_pairs=6, pair_steps=1, distance="l2", precision="fp32"),
    "05": dict(n_samples=8, teacher_steps=1, flow_steps=1),
    "import": {},
}
SLOW = {"steps", "anneal_steps", "n_pairs"}  # of these SMALL's are used; of all others the README's


def commands():
    """[(number, words)] of the blocks of README.md, with its loops written out; what is not Python: (None, [the line])."""
    blocks = [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
              if not kind]  # those of .ci/run are marked as sh
    text = re.sub(r"for s in (.*?); do\n  (.*?) \|\| break\ndone", lambda loop: "\n".join(loop[2].replace("$s", s) for s in loop[1].split()),
                  "\n".join(blocks))
    numbers = {f"{name}.py": number for number, name in NAMES.items()}
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(numbers[line.split()[1]], line.split("  #")[0].split()[2:]) if line.startswith("python ") else (None, [line]) for line in lines]


def test_every_command_runs(tmp_path, monkeypatch):
    # What a user would have: images, their statistics, a published checkpoint. (CIFAR-10 itself is not downloaded.)
    (tmp_path / "theirs").mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / f"theirs/{i}.png")
    for name in ("my_images", "mine"):
        shutil.make_archive(str(tmp_path / name), "zip", tmp_path / "theirs")
    np.savez(tmp_path / "cifar10-32x32.npz", mu=np.zeros(3), sigma=np.eye(3))
    s, net = load_script("import"), random_network(**NETWORKS[1])
    torch.save(s.export(net, s.songunet_layout(net)), tmp_path / "edm.pt")
    # Three features in place of Inception's, which test_metrics.py has.
    features = (lambda images: images.double().mean((2, 3)).float(), 3, {"metric": "FID"})
    monkeypatch.setattr(load_script("05"), "feature_network", lambda cfg, size, device: features)
    monkeypatch.setattr(load_script("05"), "seconds_per_call", lambda net, batch, precision: 0.0)
    monkeypatch.chdir(tmp_path)

    found = commands()
    assert {number for number, _ in found} == {None, *SMALL} and len(found) >= 15
    before = [(number, ["--preset", preset]) for preset in ("shapes", "cifar10") for number in list(SMALL)[:5]]  # what they read
    for number, words in before + found:
        if number is None:
            subprocess.run(words[0], shell=True, check=True)
            continue
        s, more = load_script(number), dict(SMALL[number])
        if number == "01" and any(word.startswith("cifar10") for word in words) and "--data" not in words:
            more |= {"data": "my_images.zip"}
        if number == "import":  # cifar10 has a teacher from the lines before
            shutil.rmtree("out/cifar10", ignore_errors=True)
        small, slow = ([f"--{k}={v}" for k, v in more.items() if (k in SLOW) == is_slow] for is_slow in (False, True))
        s.main(common.read_settings(s.Config, s.PRESETS, s.__doc__, [*small, *words, *slow]))
