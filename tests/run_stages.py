"""Runs stages in one process, to be started several times by torchrun: run_stages.py 01,02 OUT --flag=..."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import draw_few_shapes  # noqa: E402  (makes common importable)
import common  # noqa: E402
from test_pipeline import arguments, call, script  # noqa: E402

draw_few_shapes()
common.SAVE_SECONDS = 0.2
*first, last = sys.argv[1].split(",")
for number in first:
    call(number, *sys.argv[2:])
s = script(last)
common.run(s.main, s.SETTINGS, s.__doc__, arguments(last, *sys.argv[2:]))
