"""The README's commands, code lines and preset table are those of the code."""
import re

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
