"""All five scripts as a user runs them, on few images for few steps; broken off; and all that they refuse."""
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import ARTIFACTS, ROOT, TINY, artifact, call, refused, same, save_images, script, settings_of

RUN = ROOT / "tests/run_stages.py"


def network(out, name):
    cfg = settings_of("05", out=out, precision="fp32")
    return common.load_network(cfg, name, torch.device("cpu"))[0]


def results(out, name="05_results", preset="shapes"):
    return json.loads((out / preset / f"{name}.json").read_text())


@pytest.fixture
def copied(finished, tmp_path):
    """A folder of its own with all artifacts, but without the trainers' states."""
    shutil.copytree(finished / "shapes", tmp_path / "shapes", ignore=shutil.ignore_patterns("*_state.pt"))
    return tmp_path


def test_all_five_stages_write_their_artifacts(finished):
    names = {path.name for path in (finished / "shapes").iterdir()} - {".lock"}
    assert names == {*ARTIFACTS.values(), "02_pairs.png", "05_results.md", "05_results.json",
                     *(f"{number}_samples.png" for number in ("01", "03", "04", "05")),
                     *(f"{number}_state.pt" for number in ("01", "03", "04"))}
    rows = results(finished)["rows"]
    assert [(row["network"], row["calls"]) for row in rows] == [
        ("real", None), ("teacher", 2), ("teacher", 1), ("2-rectified flow", 2), ("2-rectified flow", 1),
        ("student", 1)]
    keys = ("network", "calls", "distance", "named", "parameters", "macs", "ms")
    assert all(tuple(row) == keys and row["distance"] >= 0 and 0 <= row["named"] <= 1 for row in rows)
    size = Image.open(finished / "shapes/05_samples.png").size
    assert size == (12 * 66 + 2, 32 + 6 * (66 + 18) + 2)  # requests above, rows with titles
    strips = artifact(finished, "01_state.pt")["strips"]  # of the averaged network
    assert list(strips) == [f"after {n} steps" for n in (1, 2, 3, 4)]
    teacher = network(finished, "01_teacher.pt")
    torch.testing.assert_close(strips["after 4 steps"], common.samples(teacher, 0, range(12), 25))


def test_artifacts_hold_the_ema_and_pairs_are_what_the_teacher_makes_of_the_stored_noise(finished):
    for number in ("01", "03", "04"):
        weights, state = (artifact(finished, name) for name in (ARTIFACTS[number], f"{number}_state.pt"))
        assert all(torch.equal(weights["weights"][key], state["ema"][key]) for key in state["ema"])
        assert not torch.equal(weights["weights"]["conv_in.weight"], state["weights"]["conv_in.weight"])
    pairs, teacher = artifact(finished, "02_pairs.pt"), network(finished, "01_teacher.pt")
    z, y = common.noise_for(0, range(40), (3, 16, 16)).half(), common.labels_for(0, 40, 18)
    x = [common.euler(teacher, z[i:i + 16].float(), 2, y[i:i + 16]).half() for i in range(0, 40, 16)]
    assert torch.equal(pairs["z"], z) and torch.equal(pairs["x"], torch.cat(x))
    assert torch.equal(pairs["labels"], y)


def test_a_student_starts_from_the_flow_or_from_scratch(copied):
    name, moved = "middle.0.conv0.weight", {}
    for first in ("flow", "scratch"):
        call("04", copied, "--restart", steps=1, lr=1e-6, start_from=first)
        flow, student = (artifact(copied, ARTIFACTS[number])["weights"][name] for number in ("03", "04"))
        moved[first] = (student - flow).abs().max()
    assert moved["flow"] < 1e-5 and moved["scratch"] > 0.01


def test_named_is_the_share_of_images_that_show_what_was_asked_for(copied, monkeypatch):
    named, (images, labels) = [], common.draw_shapes(900, 16, seed=1)
    for given in (labels, labels.roll(1)):  # of the real images
        monkeypatch.setattr(script("05"), "draw_shapes", lambda n, size, seed: (images, given))
        call("05", copied, only="student", n_samples=900)
        named += [row["named"] for row in results(copied, "05_student")["rows"]]
    real, student, shuffled, again = named
    assert real >= 0.995 and shuffled == pytest.approx(1 / 18, abs=0.03) and student == again < 0.2


def sample(out, **settings):
    script("sample").main(settings_of("sample", out=out, device="cpu", **settings))


def test_sample_writes_images_of_what_is_asked_for_and_nothing_else(copied, monkeypatch):
    def forward(net, x, t, labels):
        asked.append(labels)
        return real(net, x, t, labels)

    asked, real = [], common.UNet.forward
    before, folder = set(copied.rglob("*")), copied / "shapes/student_images"
    monkeypatch.setattr(common.UNet, "forward", forward)
    sample(copied, n=7)
    triangles = torch.full((5,), common.CLASSES.index("red triangle"))
    for flags, labels in (({}, common.labels_for(3, 5, 18)), ({"label": "red triangle"}, triangles)):
        asked.clear()
        sample(copied, n=5, seed=3, **flags)
        assert torch.equal(torch.cat(asked), labels)
        files = [folder / f"{i:06}.png" for i in range(5)]  # the other two of before are gone
        assert set(copied.rglob("*")) - before == {folder, copied / "shapes/student_images.png", *files}
        expected = common.to_uint8(common.samples(network(copied, "04_student.pt"), 3, range(5), 1, labels))
        written = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])
        assert np.abs(written - expected.int().numpy()).max() <= 1  # the batch's layout may change rounding


def test_without_classes_and_with_classes_of_ones_own(tmp_path):
    for number in TINY:
        call(number, tmp_path, *(["--no-conditional"] if number == "01" else []))
    rows = results(tmp_path)["rows"]
    assert artifact(tmp_path, "02_pairs.pt")["labels"] is None and len(rows) == 6
    assert {row["named"] for row in rows[1:]} == {None}
    with pytest.raises(common.UserError, match="--label red square: the student knows no classes"):
        sample(tmp_path, n=2, label="red square")
    own, names = dict(preset="imagenet64"), ["cat", "horse", "sea lion"]
    for name in names:
        save_images(tmp_path / "own" / name, torch.randint(256, (4, 3, 16, 20), dtype=torch.uint8))
    call("01", tmp_path, **own, data=tmp_path / "own", image_size=16, blocks=1)
    call("02", tmp_path, **own, n_pairs=30)
    assert set(common.read(tmp_path / "imagenet64/02_pairs.pt")["labels"].tolist()) == {0, 1, 2}
    call("03", tmp_path, **own, blocks=1)
    call("04", tmp_path, **own, n_pairs=20, pair_steps=1, distance="huber", pairs_from="flow",
         start_from="scratch")
    for name in ("01_teacher.pt", "02_pairs.pt", "03_reflow.pt", "04_pairs.pt", "04_student.pt"):
        assert common.read(tmp_path / "imagenet64" / name)["class_names"] == names
    columns = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script("05"), "save_grid", lambda *given: columns.append(given[-1]))
        call("05", tmp_path, **own, metric="none", n_samples=12)
    assert [columns[0][i] for i in (0, 1, 2, 3)] == [*names, "cat"]  # above the picture
    assert {row["distance"] for row in results(tmp_path, preset="imagenet64")["rows"]} == {None}
    sample(tmp_path, **own, n=2, label="sea lion")
    with pytest.raises(common.UserError, match="--label mouse: .* knows cat, horse, sea lion"):
        sample(tmp_path, **own, n=2, label="mouse")


# ------------------------------------------------------------------------- broken off, and several processes

def start(*command, processes=1):
    threads = torch.get_num_threads() // processes  # as many as here, for the same bits
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads))}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def output_of(run):
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    return output


def test_two_processes_make_the_same_pairs_and_distances_and_train_to_the_end(finished, tmp_path):
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", RUN)
    output = output_of(start(*two, "02,05,03", tmp_path, "--restart", processes=2))
    assert same(*(artifact(out, "02_pairs.pt") for out in (finished, tmp_path)))
    for one, two in zip(*(results(out)["rows"] for out in (finished, tmp_path))):
        assert (two["distance"], two["named"]) == pytest.approx((one["distance"], one["named"]), rel=1e-6)
    assert len(re.findall("step      4/4 [|] loss [0-9.]+", output)) == 1  # only process 0 prints


def test_signals_and_kills_at_any_moment_change_nothing(finished, tmp_path):
    command = RUN, "01,02,03,04,05", tmp_path
    for kept in ("01_state.pt", "02_pairs.pt.parts", "03_state.pt", "04_state.pt"):
        run = start(*command)
        while not (tmp_path / "shapes" / kept).exists():
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        run.terminate() if kept == "03_state.pt" else run.kill()
        run.wait()
    output_of(start(*command))
    names = [{path.name for path in (out / "shapes").iterdir()} for out in (tmp_path, finished)]
    assert names[0] - {".lock"} == names[1]  # main alone, as in `finished`, takes no lock
    for name in (*ARTIFACTS.values(), "01_samples.png", "05_samples.png"):
        assert (tmp_path / "shapes" / name).read_bytes() == (finished / "shapes" / name).read_bytes(), name


# ----------------------------------------------------------------------------------------------- refusals

def test_a_user_sees_one_line_and_a_failing_exit_code():
    assert "out/shapes/03_reflow.pt is missing. Run stage 03" in refused("04", "out")
    command = sys.executable, ROOT / "02_generate_pairs.py", "--device=cpu"
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 1 and re.fullmatch("error: .*01_teacher.pt is missing.*\n", done.stderr)


@pytest.mark.parametrize("number, flags, message", [
    ("01", "--lr=nan", "--lr nan"), ("01", "--seed=-1", "--seed -1"), ("01", "--steps=0", "at least 1"),
    ("01", "--image_size=15", "15 cannot be halved"), ("01", "--base=6", "channels"),
    ("02", "--restart --n_pairs=0", "at least 1"), ("03", "--schedule=square", "--schedule: .*square"),
    ("03", "--anneal_steps=0", "--anneal_steps"), ("04", "--distance=l3", "--distance: .*l3.*huber"),
    ("04", "--pairs_from=pool", "--pairs_from: .*pool"), ("04", "--t_low=0.9", "--t_low 0.9"),
    ("04", "--t_high=2", "--t_high 2"), ("05", "--only=judge", "--only: .*judge"),
    ("05", "--n_samples=1", "at least 2"), ("05", "--rounding=up", "--rounding: .*up"),
    ("05", "--n_samples=99", "99 images are fewer than the 112 features")])
def test_bad_settings_are_refused(copied, number, flags, message):
    def content():
        return {path: path.read_bytes() for path in (copied / "shapes").iterdir() if path.name != ".lock"}

    before = content()
    assert re.search(message, refused(number, copied, *flags.split()))
    assert content() == before


def test_what_is_damaged_or_of_another_preset_or_not_made_from_one_another_is_refused_unless_mixed(copied):
    shutil.copytree(copied / "shapes", copied / "cifar10")
    assert "is of another --preset" in refused("02", copied, preset="cifar10")
    path = copied / "shapes/01_teacher.pt"
    path.write_bytes(path.read_bytes()[:2000])
    assert "01_teacher.pt is damaged or not one of ours" in refused("02", copied)
    call("01", copied, seed=1)
    for number, name in (("03", "02_pairs.pt"), ("04", "03_reflow.pt"), ("05", "03_reflow.pt")):
        message = refused(number, copied, "--restart")
        assert f"{name} is out of date: it was made from another 01_teacher.pt" in message
        call(number, copied, "--restart", "--allow_mixed")


def test_a_run_continues_only_with_the_same_settings_and_images_which_need_labels_without_gaps(tmp_path):
    red, plain = torch.full((1, 3, 16, 16), 99, dtype=torch.uint8), "--no-conditional"
    one, same = (save_images(tmp_path / name, red) for name in ("one", "same"))
    assert "has none" in refused("01", tmp_path, data=one)
    call("01", tmp_path, plain, data=one)
    message = refused("01", tmp_path, plain, data=one, steps=9, ema=0.9)
    assert re.search(r"steps was 4, is 9; ema was .*, is 0.9\..*--restart", message)
    call("01", tmp_path, plain, data=same)  # the same images at another place
    save_images(one, red + 1)
    assert "made from was" in refused("01", tmp_path, plain, data=one)  # others at the same place
    assert "class [0]" in refused("01", tmp_path, data=save_images(one, red, [2]))
    call("02", tmp_path)
    assert "pairs was 40, is 41; seed was 0, is 1" in refused("02", tmp_path, n_pairs=41, seed=1)


# --------------------------------------------------------------------------------- around the runs

def test_one_run_at_a_time_works_in_a_folder_and_a_killed_one_leaves_it_free(tmp_path):
    folder = tmp_path / "shapes"
    hold = "import common, pathlib, sys, time\n" \
           "with common.locked(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold, folder], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "in\n"
    line = refused("01", tmp_path)
    assert re.search(rf"another run works in {folder}, since 20.*process {other.pid}.*--out", line)
    other.kill()
    other.wait()
    with common.locked(folder):
        pass


@pytest.mark.parametrize("rank, world, port, device, message", [
    (1, 1, None, "cpu", "left over in the environment"), (0, 2, None, "cpu", "left over in the environment"),
    (0, 2, "1", "cuda:1", "--device cuda:1 would put all 2 processes on one device")])
def test_half_of_torchruns_variables_and_one_device_for_all_are_refused(
        tmp_path, monkeypatch, rank, world, port, device, message):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    if port:
        monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setattr(common, "RANK", rank)
    monkeypatch.setattr(common, "WORLD", world)
    assert message in refused("02", tmp_path, device=device)


def test_05_compares_with_the_images_that_the_teacher_saw(tmp_path):
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    data = save_images(tmp_path / "own", images)
    call("01", tmp_path, "--no-conditional", data=data)
    cfg = settings_of("05", out=tmp_path, metric="fid")
    assert torch.equal(script("05").reference_images(cfg, 16)[1], images)
    save_images(data, images.flip(3))
    with pytest.raises(common.UserError, match="does not hold the images that the teacher was trained on"):
        script("05").reference_images(cfg, 16)


def test_an_attention_size_that_no_level_has_is_said(capsys):
    common.UNet(16, base=8, mult=(1, 1), blocks=1, attn=(16, 7))
    assert r"attn (16, 7) names a size that no level has; they have [16, 8]" in capsys.readouterr().out
    common.UNet(16, base=8, mult=(1, 1), blocks=1, attn=(16, 8))
    assert not capsys.readouterr().out


def test_to_compare_a_parent_does_not_read_all_of_it(copied):
    path = copied / "shapes/01_teacher.pt"
    weights = artifact(copied, "01_teacher.pt")["weights"]["time0.weight"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weights, weights[::-1]))  # its checksum is wrong now
    common.load(settings_of("03", out=copied), "02_pairs.pt")
    assert "01_teacher.pt is damaged" in refused("02", copied, "--restart")
