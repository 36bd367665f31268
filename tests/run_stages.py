"""Runs stages in one process, to be started several times by torchrun: run_stages.py 01,02 OUT --flag=..."""
import sys

from conftest import arguments, call, common, make_small, script

make_small()
common.SAVE_SECONDS = 0.01
*first, last = sys.argv[1].split(",")
for number in first:
    call(number, *sys.argv[2:])
common.run(script(last).main, script(last).SETTINGS, "", arguments(last, *sys.argv[2:]))
