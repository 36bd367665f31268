"""Files that were cut off or changed, full disks, signals, NaN, files that mean harm: noticed, named, and nothing lost."""
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
import zlib

import pytest
import torch
from PIL import Image

import common
from common import UserError
from conftest import ROOT, load_script
from test_pipeline import arguments, call, refused


def test_every_flipped_bit_and_every_truncation_is_noticed(finished, tmp_path):
    """150 flips and 50 truncations of each kind of artifact: teacher, pairs, state, row of 05's table, its reference."""
    rng, counts = random.Random(0), {}
    kinds = ["01_teacher.pt", "02_pairs.pt", "03_reflow.pt", "04_student.pt", "01_state.pt",
             next((finished / "shapes").glob("05_row_*")).name, next((finished / "shapes").glob("05_reference_*")).name]
    for name in kinds:
        good, path = (finished / "shapes" / name).read_bytes(), tmp_path / name
        path.write_bytes(good)
        assert common.read(path)
        counts[name] = 0
        for i in range(200):
            bad = bytearray(good[:rng.randrange(len(good))] if i >= 150 else good)
            if i < 150:
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(ValueError):
                common.read(path)
            counts[name] += 1
    assert set(counts.values()) == {200}, counts


def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path, capsys):
    call("01", tmp_path, steps=4, save_every=2)
    path, previous = tmp_path / "shapes/01_state.pt", tmp_path / "shapes/01_state_previous.pt"
    shutil.copy(path, previous)
    path.write_bytes(path.read_bytes()[:-100])
    call("01", tmp_path, steps=6, save_every=2)
    output = capsys.readouterr().out
    assert "01_state.pt is damaged" in output and "continues after step 4 of 6" in output
    assert common.read(path)["step"] == 6 and not previous.exists()
    path.write_bytes(b"")
    assert "is damaged, and there is no other; start over with --restart" in refused("01", tmp_path)


def test_damaged_batches_of_pairs_are_made_again(finished, tmp_path):
    for name in ("01_teacher.pt", "02_pairs.pt"):
        (tmp_path / "shapes").mkdir(exist_ok=True)
        shutil.copy(finished / "shapes" / name, tmp_path / "shapes")
    pairs = (tmp_path / "shapes/02_pairs.pt").read_bytes()
    (tmp_path / "shapes/02_pairs.pt").unlink()
    saved, save = [], common.save

    def full_disk(path, *rest, **more):
        if len(saved) == 2:
            raise UserError("could not write: no space left")
        saved.append(path)
        save(path, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save", full_disk)
        assert "no space left" in refused("02", tmp_path)
    folder = tmp_path / "shapes/02_pairs.pt.parts"
    assert sorted(folder.iterdir()) == saved and len(saved) == 2
    saved[0].write_bytes(saved[0].read_bytes()[:-1])
    assert "belongs to a run with other settings (steps was 2, is 3)" in refused("02", tmp_path, sample_steps=3)
    call("02", tmp_path)
    assert (tmp_path / "shapes/02_pairs.pt").read_bytes() == pairs and not folder.exists()
    assert "(pairs was 40, is 41)" in refused("02", tmp_path, n_pairs=41)


def test_a_disk_that_fills_up_in_a_save_leaves_the_state_and_the_run_continues(tmp_path):
    call("01", tmp_path, steps=2, save_every=1, cooldown=0)  # without cooldown, more steps are a mere continuation
    size = (tmp_path / "shapes/01_state.pt").stat().st_size
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))
        assert "could not write" in refused("01", tmp_path, steps=4, save_every=1, cooldown=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    state, = (tmp_path / "shapes").glob("01_state*")
    assert common.read(state)["step"] == 2
    call("01", tmp_path, steps=4, save_every=1, cooldown=0)
    call("01", tmp_path / "whole", steps=4, save_every=1, cooldown=0)
    same = [(folder / "shapes/01_teacher.pt").read_bytes() for folder in (tmp_path, tmp_path / "whole")]
    assert same[0] == same[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_after_the_step_and_the_same_command_continues(tmp_path, number):
    flags = arguments("01", tmp_path, steps=100_000, save_every=50_000, log_every=10, sample_steps=1, cooldown=0)
    run = subprocess.Popen([sys.executable, str(ROOT / "tests/run_stages.py"), "01", *flags], text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    for line in run.stdout:
        if "| step " in line:
            break
    os.kill(run.pid, number)
    _, message = run.communicate(timeout=60)
    assert run.returncode == 1 and message.startswith("stopped after step") and "the same command continues" in message
    done = common.read(tmp_path / "shapes/01_state.pt")["step"]
    assert 10 <= done < 100_000
    more = dict(steps=done + 2, save_every=50_000, log_every=10, sample_steps=1, cooldown=0)
    call("01", tmp_path, **more)
    call("01", tmp_path / "whole", **more)
    same = [(folder / "shapes/01_teacher.pt").read_bytes() for folder in (tmp_path, tmp_path / "whole")]
    assert same[0] == same[1]


def test_changed_settings_are_listed_and_harmless_ones_are_not(tmp_path):
    call("01", tmp_path)
    before = (tmp_path / "shapes/01_teacher.pt").read_bytes()
    message = refused("01", tmp_path, lr=0.5, ema=0.9)
    assert "lr was 0.008, is 0.5; ema was 0.999, is 0.9" in message and "--restart" in message and "another --out" in message
    assert "is at step 4 already: --steps 3 is less" in refused("01", tmp_path, steps=3)
    call("01", tmp_path, log_every=1, save_every=1)
    assert (tmp_path / "shapes/01_teacher.pt").read_bytes() == before
    call("01", tmp_path, steps=5)
    call("01", tmp_path, "--restart", lr=0.5)
    call("02", tmp_path)
    call("03", tmp_path)
    call("02", tmp_path, "--restart", seed=1)
    assert "input 1 was" in refused("03", tmp_path)


def test_each_part_of_a_batch_has_its_share_of_the_same_randomness_and_dropout_masks_of_its_own():
    whole, halves = common.Part(6, 0, 6), [common.Part(6, 0, 3), common.Part(6, 3, 6)]

    def draw(part, step):
        part.begin(0, step)
        return part.rand("cpu"), part.randn(2, 2, device="cpu"), part.randint(100), torch.rand(3)

    for both, *parts in list(zip(draw(whole, 7), *(draw(half, 7) for half in halves)))[:3]:
        assert torch.equal(torch.cat(parts), both)
    masks = [draw(half, 7)[3] for half in halves]
    assert not torch.equal(*masks) and not torch.equal(draw(whole, 8)[0], draw(whole, 7)[0])


def test_a_restarted_run_that_is_broken_off_does_not_come_back_to_the_old_one(tmp_path, monkeypatch):
    call("01", tmp_path)
    monkeypatch.setattr(load_script("01"), "flow_loss", lambda *a: (_ for _ in ()).throw(UserError("broken off")))
    assert "broken off" in refused("01", tmp_path, "--restart")
    assert not list((tmp_path / "shapes").glob("01_state*"))


def test_damaged_pairs_are_made_again(finished, tmp_path):
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    path = tmp_path / "shapes/02_pairs.pt"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    assert "make it again with: python 02_generate_pairs.py" in refused("03", tmp_path)
    call("02", tmp_path)
    assert path.read_bytes() == good


def test_accumulating_parts_of_a_batch_gives_the_same_weights(tmp_path):
    for parts in (1, 3):
        call("01", tmp_path / str(parts), accumulate=parts, precision="fp32", steps=20)
    a, b = (torch.cat([w.flatten() for w in common.read(tmp_path / n / "shapes/01_teacher.pt")["weights"].values()]) for n in "13")
    assert 0 < (a - b).norm() / a.norm() < 1e-5
    assert "cannot be divided into 1 processes x --accumulate 9" in refused("01", tmp_path / "9", accumulate=9)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    s, calls = load_script("01"), []
    loss = s.flow_loss

    def with_bad_gradient(*a):
        calls.append(0)
        value = loss(*a)
        if len(calls) == 4:
            value.register_hook(lambda gradient: gradient * float("nan"))
        return value

    monkeypatch.setattr(s, "flow_loss", with_bad_gradient)
    assert "gradient not finite at step 3: nothing was saved since step 2" in refused("01", tmp_path, steps=20, log_every=2, save_every=2)
    assert common.read(tmp_path / "shapes/01_state.pt")["step"] == 2


def test_out_of_memory_names_the_settings_to_change(tmp_path, monkeypatch):
    monkeypatch.setattr(load_script("01"), "flow_loss", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    assert "--accumulate" in refused("01", tmp_path)


def test_05_does_not_measure_again_what_it_has(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    before = (tmp_path / "shapes/05_results.json").read_bytes()
    monkeypatch.setattr(load_script("05"), "generate", None)  # it cannot sample
    call("05", tmp_path)
    assert (tmp_path / "shapes/05_results.json").read_bytes() == before
    with pytest.raises(TypeError):
        call("05", tmp_path, "--restart")


def test_archives_and_images_that_mean_harm_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("../evil.png", "/evil.png"):
        with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo(name), (tmp_path / "a.png").read_bytes())
        with pytest.raises(UserError, match="evil.zip: .*evil.png lies outside"):
            common.load_images(str(tmp_path / "evil.zip"), 8)

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (50_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb/b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
                                          + chunk(b"IEND", b""))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="b.png is not .* that can be read"):
        common.load_images(str(tmp_path / "bomb"), 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "bomb", "evil.zip"]
