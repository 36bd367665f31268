"""Damaged files, full disks, signals, no memory: noticed, named in one line, and nothing lost."""
import json
import os
import random
import resource
import shutil
import signal
from collections import Counter

import pytest
import torch

import common
from kill_and_resume import same
from test_pipeline import ARTIFACTS, artifact, call, refused, script


@pytest.mark.parametrize("name", [*ARTIFACTS.values(), "01_state.pt"])
def test_flipped_bits_and_truncations_are_noticed_or_change_nothing(finished, tmp_path, name):
    """Half of the flips hit the last 3 kB: the zip's list of entries, which no checksum covers."""
    rng, path, outcomes = random.Random(0), tmp_path / name, Counter()
    good, expected = (finished / "shapes" / name).read_bytes(), artifact(finished, name)
    for i in range(200):
        bad = bytearray(good[:rng.randrange(len(good))] if i >= 150 else good)
        if i < 150:
            bad[rng.randrange(0 if i % 2 else len(bad) - 3000, len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            assert same(common.read(path), expected), f"wrong content after change {i}"
            outcomes["harmless"] += 1
        except common.UserError:
            outcomes["noticed"] += 1
        path.unlink()
    assert outcomes["noticed"] >= 125 and outcomes.total() == 200, outcomes


def stopped(number, name, out, signal_number):
    """The last line of the script when a signal comes in the second call of one of its functions."""
    function, calls = getattr(script(number), name), []

    def signalling(*given):
        calls.append(given)
        if len(calls) == 2:
            os.kill(os.getpid(), signal_number)
        return function(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script(number), name, signalling)
        return refused(number, out)


def refused_by_a_full_disk(number, out, size):
    """The last line of the script while files cannot grow beyond `size` bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        return refused(number, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_01_ends_after_its_step_survives_a_full_disk_and_ends_with_the_same_bits(finished, tmp_path, number):
    assert stopped("01", "flow_loss", tmp_path, number).startswith("stopped after step 2")
    assert "could not write" in refused_by_a_full_disk("01", tmp_path, 100_000)
    assert [path.name for path in (tmp_path / "shapes").iterdir()] == ["01_state.pt"]
    call("01", tmp_path)
    assert same(artifact(tmp_path, "01_teacher.pt"), artifact(finished, "01_teacher.pt"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_02_keeps_what_it_has_when_it_is_stopped_or_the_disk_is_full(finished, tmp_path, number):
    (tmp_path / "shapes").mkdir()
    shutil.copy(finished / "shapes/01_teacher.pt", tmp_path / "shapes")
    assert stopped("02", "noise_for", tmp_path, number).startswith("stopped: ")
    first, = (tmp_path / "shapes/02_pairs.pt.parts").iterdir()
    assert "steps was 2, is 3" in refused("02", tmp_path, sample_steps=3)
    whole = first.read_bytes()
    assert "File too large" in refused_by_a_full_disk("02", tmp_path, len(whole) + 1000)  # when it joins them
    first.write_bytes(whole[:-1000])
    assert f"{first.name} is damaged" in refused("02", tmp_path)
    first.with_suffix(".pt.tmp").write_bytes(whole[:-1000])
    first.unlink()
    call("02", tmp_path)
    assert same(artifact(tmp_path, "02_pairs.pt"), artifact(finished, "02_pairs.pt"))
    assert not first.parent.exists()


def test_out_of_memory_is_one_line_with_a_remedy(tmp_path, monkeypatch):
    def no_memory(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(script("01"), "flow_loss", no_memory)
    assert "smaller --batch" in refused("01", tmp_path)
