"""The README's commands, code lines and preset table are those of the code."""
import re

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


def test_every_preset_is_described():
    assert re.findall(r"^\| `(\w+)` \| [^|]*\| [\d.]+M", README, re.MULTILINE) == list(load_script("01").PRESETS)


def test_every_command_names_a_script_and_settings_that_exist():
    commands = re.findall(r"(?:python|torchrun [^`\n]*?) ((?:extras/)?\w+\.py)([^`#\n|]*)", README)
    assert len(commands) > 15
    numbers = {f"{name}.py": number for number, name in NAMES.items()}
    for script, arguments in commands:
        if "03_..." in arguments or script == "conftest.py":
            continue
        module = load_script(numbers[script])
        presets = getattr(module, "PRESETS", dict.fromkeys([module.Config.preset, *load_script("01").PRESETS], {}))
        words = arguments.replace("&&", "").replace("|| break", "").replace('"', "").split()
        common.read_settings(module.Config, presets, module.__doc__, words)
