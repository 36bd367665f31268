"""README and docs: code lines and sizes are those of the code, and every command runs (small and short).

Left to others: the commands of .ci/run (all five stages, the tests, only sampling), and programs of extras
that take minutes (test_extras.py).
"""
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import NAMES, ROOT, load_script
from test_import import NETWORKS, random_network

README = (ROOT / "README.md").read_text()
TEXTS = README + (ROOT / "docs/recipes.md").read_text()
NUMBERS = {f"{name}.py": number for number, name in NAMES.items()}
SMALL = {  # the values that are laid over a command's own, so that it takes a moment
    "01": "--base=8 --mult=1,2 --blocks=1 --steps=2 --batch=4 --precision=fp32",
    "02": "--n_pairs=6 --sample_steps=1",
    "03": "--base=8 --mult=1,1 --blocks=1 --steps=2 --batch=4 --precision=fp32 --anneal_steps=1",
    "04": "--steps=2 --batch=4 --n_pairs=6 --pair_steps=1 --distance=l2 --precision=fp32",
    "05": "--n_samples=8 --teacher_steps=1 --flow_steps=1",
    "import": "--n_pairs=6 --sample_steps=1",
}


def settings(number, preset):
    script = load_script(number)
    return common.read_settings(script.SETTINGS, script.__doc__, ["--preset", preset])


def test_quoted_code_lines_stand_in_the_scripts():
    quoted = re.findall(r"`(0\d_\w+\.py)`, `(\w+)`: `(.+?)`", README)
    assert len(quoted) == 4
    for script, function, line in quoted:
        body = (ROOT / script).read_text().split(f"def {function}(")[1].split("\ndef ")[0]
        assert line in [text.strip() for text in body.splitlines()], (script, function)


def test_the_main_command_runs_every_script_in_order_and_ci_finds_both():
    block = r"<!-- {} -->\n```sh\n(.*?)```"
    run, tests = (re.search(block.format(name), README, re.DOTALL)[1] for name in ("run", "tests"))
    assert re.findall(r"(0\d_\w+)\.py", run) == list(NAMES.values())[:5] and "pytest" in tests


def test_every_preset_is_described_with_its_sizes():
    rows = re.findall(r"^\| `(\w+)` \| [^|]*\| ([\d.]+)M \| ([\d.]+)M \|", README, re.MULTILINE)
    assert [name for name, *_ in rows] == list(common.PRESETS)
    for preset, *sizes in rows:
        data = settings("01", preset)
        for number, size in zip(("01", "03"), sizes):
            cfg, classes = settings(number, preset), 1000 if data.conditional else 0
            with torch.device("meta"):
                net = common.UNet(data.image_size, 3, cfg.base, cfg.mult, cfg.blocks, cfg.attn, classes)
            millions = sum(p.numel() for p in net.parameters()) / 1e6
            assert abs(millions - float(size)) <= 0.5 * 10 ** -len(size.partition(".")[2]), (preset, number)


@pytest.mark.parametrize("preset", ["cifar10_quick", "cifar10"])
def test_the_costs_are_those_of_the_settings(preset):
    row = re.search(rf"^\| `{preset}` \|((?: [\d.]+ \|){{7}})", TEXTS, re.MULTILINE)[1]
    *stages, total, hours = map(float, row.strip(" |").split("|"))
    counted = [n / 1e18 for n in load_script("benchmark").costs(preset)]
    for said, n in zip([*stages, total], [*counted, sum(counted)]):
        assert said == pytest.approx(n, rel=0.06, abs=0.005)
    assert hours == pytest.approx(sum(counted) * 1e18 / 1e14 / 3600, rel=0.06)


def commands():
    """(script, its arguments) of every command in a block or in a line of text; loops are written out."""
    text = re.sub(r"for s in (.*?); do\n  (.*?) \|\| break\ndone",
                  lambda loop: "\n".join(loop[2].replace("$s", s) for s in loop[1].split()), TEXTS)
    return [(script, shlex.split(words)) for script, words in
            re.findall(r"(?:python|torchrun [^`\n]*?) ((?:extras/)?\w+\.py)([^`#\n|&]*)", text)]


def test_every_command_runs(tmp_path, monkeypatch):
    # What a user would have: images, their statistics, a published checkpoint. (CIFAR-10 is not downloaded.)
    (tmp_path / "theirs").mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"theirs/{i}.png")
    for name in ("my_images", "mine"):
        shutil.make_archive(str(tmp_path / name), "zip", tmp_path / "theirs")
    np.savez(tmp_path / "cifar10-32x32.npz", mu=np.zeros(3), sigma=np.eye(3))
    importer, net = load_script("import"), random_network(**NETWORKS[1])
    torch.save(importer.export(net, importer.songunet_layout(net)), tmp_path / "edm.pt")
    # Three features in place of Inception's, which test_metrics.py has.
    stand_in = (lambda images: images.double().mean((2, 3)), 3, "FID", "stand-in")
    monkeypatch.setattr(load_script("05"), "feature_network", lambda cfg, device: stand_in)
    monkeypatch.chdir(tmp_path)
    found = [(script, words) for script, words in commands() if NUMBERS.get(script) in SMALL]
    assert {NUMBERS[script] for script, _ in found} == set(SMALL) and len(found) > 25
    made = [(f"{NAMES[number]}.py", ["--preset", preset]) for preset in ("shapes", "cifar10") for number in
            ("01", "02", "03", "04", "05")]  # what the commands read
    for script, words in made + found:
        number, small = NUMBERS[script], SMALL[NUMBERS[script]].split()
        if number == "01" and "--data" not in words and any(word.startswith("cifar10") for word in words):
            words = [*words, "--data", "my_images.zip"]
        if "--png" in words:
            words[words.index("--png") + 1] = "3"
        if number == "import":  # cifar10 has pairs from the lines before
            shutil.rmtree("out/cifar10")
        s = load_script(number)
        known = {f"--{row[0]}" for row in s.SETTINGS}
        argv = [*words, *(word for word in small if word.split("=")[0] in known)]
        if "--n_pairs" in words:
            argv = [word for word in argv if not word.startswith("--n_pairs=")] + ["--n_pairs=6"]
        s.main(common.read_settings(s.SETTINGS, s.__doc__, [*argv, "--restart"]))
