"""Runs stages in one process: run_stages.py 01,02 OUT --flag ... (Torchrun starts several.)"""
import sys

from conftest import arguments, call, common, make_small, run

make_small()
common.SAVE_SECONDS = 0.01
_, numbers, *given = sys.argv
*first, last = numbers.split(",")
for number in first:
    call(number, *given)
run(last, arguments(last, *given))
