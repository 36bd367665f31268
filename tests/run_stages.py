"""Runs stages one after another in this process, so that several start together under torchrun: run_stages.py 01,02 --flag=..."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import draw_few_shapes, load_script  # noqa: E402  (makes common importable)
import common  # noqa: E402

if __name__ == "__main__":
    draw_few_shapes()
    for number in sys.argv[1].split(","):
        script = load_script(number)
        script.seconds_per_call = lambda net, batch, precision: 0.0  # 05's: processes that share cores would time each other
        known = {f"--{name}" for name in script.Config.__dataclass_fields__}
        flags = [flag for flag in sys.argv[2:] if flag.split("=")[0].replace("--no-", "--") in known]
        common.run(script.main, script.Config, script.PRESETS, script.__doc__, flags)
