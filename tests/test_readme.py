"""The README's commands, code lines and preset table are those of the code."""
import re
import shlex

import pytest
import torch

import common
from conftest import NAMES, ROOT, load_script

README = (ROOT / "README.md").read_text()


def test_quoted_code_lines_stand_in_the_scripts():
    quoted = re.findall(r"`(0\d_\w+\.py)`, `(\w+)`: `(.+?)`", README)
    assert len(quoted) == 4
    for script, function, line in quoted:
        body = (ROOT / script).read_text().split(f"def {function}(")[1].split("\ndef ")[0]
        assert line in [text.strip() for text in body.splitlines()], (script, function)


def test_the_main_command_runs_every_script_in_order_and_ci_finds_both():
    run, tests = (re.search(rf"<!-- {name} -->\n```sh\n(.*?)```", README, re.DOTALL)[1] for name in ("run", "tests"))
    assert re.findall(r"(0\d_\w+)\.py", run) == list(NAMES.values())[:5] and "pytest" in tests
    assert all((ROOT / f"{name}.py").exists() for name in NAMES.values())


def test_every_preset_is_described_with_its_sizes():
    rows = re.findall(r"^\| `(\w+)` \| [^|]*\| ([\d.]+)M \| ([\d.]+)M \|", README, re.MULTILINE)
    assert [name for name, *_ in rows] == list(load_script("01").PRESETS)
    for preset, *sizes in rows:
        data = load_script("01").Config(**load_script("01").PRESETS[preset])
        for number, size in zip(("01", "03"), sizes):
            s = load_script(number)
            cfg = s.Config(**s.PRESETS[preset])
            with torch.device("meta"):
                net = common.UNet(data.image_size, 3, cfg.base, cfg.mult, cfg.blocks, cfg.attn, 1000 if data.conditional else 0)
            assert abs(common.count_parameters(net) / 1e6 - float(size)) <= 0.5 * 10 ** -len(size.partition(".")[2]), (preset, number)


@pytest.mark.parametrize("preset", ["cifar10_quick", "cifar10"])
def test_the_costs_are_those_of_the_settings(preset):
    row = re.search(rf"^\| `{preset}` \|((?: [\d.]+ \|){{7}})", README, re.MULTILINE)[1]
    *stages, total, hours = map(float, row.strip(" |").split("|"))
    counted = [n / 1e18 for n in load_script("benchmark").costs(preset)]
    for said, n in zip([*stages, total], [*counted, sum(counted)]):
        assert said == pytest.approx(n, rel=0.06, abs=0.005)
    assert hours == pytest.approx(sum(counted) * 1e18 / 1e14 / 3600, rel=0.06)


def test_every_command_names_a_script_and_settings_that_exist():
    commands = re.findall(r"(?:python|torchrun [^`\n]*?) ((?:extras/)?\w+\.py)([^`#\n|]*)", README)
    assert len(commands) > 15
    numbers = {f"{name}.py": number for number, name in NAMES.items()}
    for script, arguments in commands:
        module = load_script(numbers[script])
        presets = getattr(module, "PRESETS", dict.fromkeys([module.Config.preset, *load_script("01").PRESETS], {}))
        words = shlex.split(arguments.replace("&&", ""))
        common.read_settings(module.Config, presets, module.__doc__, words)
