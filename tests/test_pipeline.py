"""All five stages as a user runs them, small and short: what they write, continue and refuse."""
import json
import os
import pickle
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
from conftest import (ARTIFACTS, ROOT, artifact, call, refused, same, save_images, script,
                      settings_of)
from extras.drawings import CLASSES, draw_shapes

RUN = ROOT / "tests/run_stages.py"


def network(out, name):
    """The network of an artifact, in eval mode."""
    cfg = settings_of("05", out=out, precision="fp32")
    net, _ = common.load_network(cfg, name, torch.device("cpu"))
    return net


def rows_of(out, name="05_results", preset="shapes"):
    """The rows of stage 05's table."""
    return json.loads((out / preset / f"{name}.json").read_text())["rows"]


def files_in(out):
    return {path.name for path in (out / "shapes").iterdir()}


@pytest.fixture
def copied(finished, tmp_path):
    """A folder of its own with all artifacts, but without the trainers' states."""
    without_states = shutil.ignore_patterns("*_state.pt")
    shutil.copytree(finished / "shapes", tmp_path / "shapes", ignore=without_states)
    return tmp_path


def test_all_five_stages_write_their_artifacts(finished):
    """A run of all stages leaves the promised files, table and pictures, and nothing else."""
    files = {*ARTIFACTS.values(), "02_pairs.png", "05_results.md", "05_results.json",
             "05_samples.png"}
    for number in ("01", "03", "04"):
        files |= {f"{number}_samples.png", f"{number}_state.pt"}
    assert files_in(finished) - {".lock"} == files

    rows = rows_of(finished)
    assert [(row["network"], row.get("calls")) for row in rows] == [
        ("real", None),
        ("teacher", 2),
        ("teacher", 1),
        ("2-rectified flow", 2),
        ("2-rectified flow", 1),
        ("student", 1)]
    for row in rows[1:]:
        assert " ".join(row) == "network calls distance matches parameters macs ms"
    for row in rows:
        assert row["distance"] >= 0
        assert 0 <= row["matches"] <= 1

    width, height = Image.open(finished / "shapes/05_samples.png").size
    assert width == 12 * 66 + 2
    assert height == 32 + 6 * (66 + 18) + 2  # the requests, then rows with titles

    strips = artifact(finished, "01_state.pt")["strips"]
    assert list(strips) == [f"after {n} steps" for n in (1, 2, 3, 4)]
    averaged = network(finished, "01_teacher.pt")
    last = common.samples(averaged, 0, range(12), 25)
    torch.testing.assert_close(strips["after 4 steps"], last)


def test_artifacts_hold_the_ema_and_pairs_are_what_the_teacher_makes_of_the_stored_noise(finished):
    """What is kept is the average of the weights. A stored noise leads to the stored image."""
    for number in ("01", "03", "04"):
        kept = artifact(finished, ARTIFACTS[number])["weights"]
        state = artifact(finished, f"{number}_state.pt")
        for name, average in state["ema"].items():
            assert torch.equal(kept[name], average)
        name = "conv_in.weight"
        assert not torch.equal(kept[name], state["weights"][name])

    pairs = artifact(finished, "02_pairs.pt")
    z = common.noise_for(0, range(40), (3, 16, 16)).half()
    labels = common.labels_for(0, 40, 18)
    assert torch.equal(pairs["z"], z)
    assert torch.equal(pairs["labels"], labels)
    teacher = network(finished, "01_teacher.pt")
    x = []
    for noise, y in zip(z.split(16), labels.split(16)):  # the size of the calls changes the bits
        x.append(common.euler(teacher, noise.float(), 2, y).half())
    assert torch.equal(pairs["x"], torch.cat(x))


def test_a_student_starts_from_the_flow_or_from_scratch(copied):
    """The student begins as a copy of the flow, unless --start_from says otherwise."""
    def weight(file):
        return artifact(copied, file)["weights"]["middle.0.conv0.weight"]

    moved = {}
    for first in ("flow", "scratch"):
        call("04", copied, "--restart", steps=1, lr=1e-6, start_from=first)
        moved[first] = (weight("04_student.pt") - weight("03_reflow.pt")).abs().max()
    assert moved["flow"] < 1e-5
    assert moved["scratch"] > 0.01


def test_named_is_the_share_of_images_that_show_what_was_asked_for(copied, monkeypatch):
    """Real drawings match their own labels, and match other drawings' labels by chance only."""
    images, labels = draw_shapes(900, 16, seed=1)
    named = []
    for given in (labels, labels.roll(1)):
        monkeypatch.setattr(script("05"), "draw_shapes", lambda n, size, seed: (images, given))
        call("05", copied, only="student", n_samples=900)
        named += [row["matches"] for row in rows_of(copied, "05_student")]
    real, student, shuffled, again = named
    assert real >= 0.995
    assert shuffled == pytest.approx(1 / 18, abs=0.03)
    assert student == again < 0.2


def sample(out, **settings):
    """Runs extras/sample.py."""
    script("sample").main(settings_of("sample", out=out, device="cpu", **settings))


@pytest.mark.parametrize("label, labels", [
    ("", common.labels_for(3, 5, 18)),
    ("red triangle", torch.full((5,), CLASSES.index("red triangle")))])
def test_sample_writes_images_of_what_is_asked_for_and_nothing_else(
        copied, monkeypatch, label, labels):
    """The network is asked for the label, and its images replace those of an earlier run."""
    asked = []
    forward = common.UNet.forward

    def listed(net, x, t, labels):
        asked.append(labels)
        return forward(net, x, t, labels)

    monkeypatch.setattr(common.UNet, "forward", listed)
    folder = copied / "shapes/student_images"
    before = set(copied.rglob("*"))
    sample(copied, n=7)
    asked.clear()
    sample(copied, n=5, seed=3, label=label)
    assert torch.equal(torch.cat(asked), labels)
    files = [folder / f"{i:06}.png" for i in range(5)]
    new = set(copied.rglob("*")) - before
    assert new == {folder, copied / "shapes/student_images.png", *files}
    student = network(copied, "04_student.pt")
    expected = common.to_uint8(common.samples(student, 3, range(5), 1, labels))
    for file, image in zip(files, expected.int().numpy()):
        written = np.asarray(Image.open(file)).transpose(2, 0, 1)
        assert np.abs(written - image).max() <= 1  # the batch's layout may change the rounding


def test_without_classes_and_with_classes_of_ones_own(tmp_path):
    """Labels and the names of the classes go from stage to stage, or are absent in all of them."""
    # 1. Without classes.
    call("01", tmp_path, "--no-conditional")
    for number in ("02", "03", "04", "05"):
        call(number, tmp_path)
    assert artifact(tmp_path, "02_pairs.pt")["labels"] is None
    real, *made = rows_of(tmp_path)
    assert not any("matches" in row for row in made)
    with pytest.raises(common.UserError, match="--label red square: the student knows no classes"):
        sample(tmp_path, n=2, label="red square")

    # 2. With classes of one's own: the names of the folders.
    own, names = dict(preset="imagenet64"), ["cat", "horse", "sea lion"]
    for name in names:
        images = torch.randint(256, (4, 3, 16, 20), dtype=torch.uint8)
        save_images(tmp_path / "own" / name, images)
    call("01", tmp_path, **own, data=tmp_path / "own", image_size=16, blocks=1)
    call("02", tmp_path, **own, n_pairs=30)
    call("03", tmp_path, **own, blocks=1)
    call("04", tmp_path, **own, n_pairs=20, pair_steps=1, distance="huber", pairs_from="flow",
         start_from="scratch")
    folder = tmp_path / "imagenet64"
    labels = common.read(folder / "02_pairs.pt")["labels"]
    assert labels.unique().tolist() == [0, 1, 2]
    for file in (*ARTIFACTS.values(), "04_pairs.pt"):
        assert common.read(folder / file)["class_names"] == names

    # 3. Stage 05 writes the names above its picture, and sample.py knows them.
    with pytest.MonkeyPatch.context() as patch:
        pictures = []
        patch.setattr(script("05"), "save_grid", lambda *given: pictures.append(given))
        call("05", tmp_path, **own, metric="none", n_samples=12)
    columns = pictures[0][-1]
    assert columns[:4] == [*names, "cat"]
    rows = rows_of(tmp_path, preset="imagenet64")
    assert not any("distance" in row for row in rows)
    sample(tmp_path, **own, n=2, label="sea lion")
    with pytest.raises(common.UserError, match="--label mouse: .* knows cat, horse, sea lion"):
        sample(tmp_path, **own, n=2, label="mouse")


# --------------------------------------------------------------- interrupted, and several processes

def start(*command, processes=1):
    """A Python program as a process of its own."""
    threads = torch.get_num_threads() // processes  # as many as here, for the same bits
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads))}
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def output_of(run):
    """What the process prints, once it has ended well."""
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    return output


def test_two_processes_make_the_same_pairs_and_distances_and_train_to_the_end(finished, tmp_path):
    """Two processes share the work, and no result depends on how it was shared."""
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", RUN)
    output = output_of(start(*two, "02,05,03", tmp_path, "--restart", processes=2))
    assert same(artifact(finished, "02_pairs.pt"), artifact(tmp_path, "02_pairs.pt"))
    for ours, expected in zip(rows_of(tmp_path), rows_of(finished)):
        assert ours["distance"] == pytest.approx(expected["distance"], rel=1e-6)
        assert ours["matches"] == pytest.approx(expected["matches"], rel=1e-6)
    ends = re.findall("step      4/4 [|] loss [0-9.]+", output)
    assert len(ends) == 1  # only process 0 prints


def test_signals_and_kills_at_any_moment_change_nothing(finished, tmp_path):
    """A run that is stopped or killed, and started again, ends with the same bits."""
    command = RUN, "01,02,03,04,05", tmp_path
    for kept in ("01_state.pt", "02_pairs.pt.parts", "03_state.pt", "04_state.pt"):
        run = start(*command)
        while not (tmp_path / "shapes" / kept).exists():
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        if kept == "03_state.pt":
            run.terminate()
        else:
            run.kill()
        run.wait()
    output_of(start(*command))
    assert files_in(tmp_path) - {".lock"} == files_in(finished)
    for name in (*ARTIFACTS.values(), "01_samples.png", "05_samples.png"):
        ours, expected = (out / "shapes" / name for out in (tmp_path, finished))
        assert ours.read_bytes() == expected.read_bytes(), name


# ---------------------------------------------------------------------------------------- refusals

def test_a_user_sees_one_line_and_a_failing_exit_code():
    """What the user can put right ends in one line, without a traceback."""
    assert "out/shapes/03_reflow.pt is missing. Run stage 03" in refused("04", "out")
    command = sys.executable, ROOT / "02_generate_pairs.py", "--device=cpu"
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 1
    assert re.fullmatch("error: .*01_teacher.pt is missing.*\n", done.stderr)


@pytest.mark.parametrize("number, flags, message", [
    ("01", "--lr=nan", "--lr nan"),
    ("01", "--seed=-1", "--seed -1"),
    ("01", "--steps=0", "at least 1"),
    ("01", "--image_size=15", "15 cannot be halved"),
    ("01", "--base=6", "channels"),
    ("02", "--restart --n_pairs=0", "at least 1"),
    ("03", "--schedule=square", "--schedule: .*square"),
    ("03", "--anneal_steps=0", "--anneal_steps"),
    ("04", "--distance=l3", "--distance: .*l3.*huber"),
    ("04", "--pairs_from=pool", "--pairs_from: .*pool"),
    ("04", "--t_low=0.9", "--t_low 0.9"),
    ("04", "--t_high=2", "--t_high 2"),
    ("05", "--only=judge", "--only: .*judge"),
    ("05", "--n_samples=1", "at least 2"),
    ("05", "--rounding=up", "--rounding: .*up"),
    ("05", "--n_samples=99", "99 images are fewer than the 112 features")])
def test_bad_settings_are_refused(copied, number, flags, message):
    """A setting that cannot work is named, and no file changes."""
    def content():
        paths = set((copied / "shapes").iterdir()) - {copied / "shapes/.lock"}
        return {path: path.read_bytes() for path in paths}

    before = content()
    assert re.search(message, refused(number, copied, *flags.split()))
    assert content() == before


def test_what_is_damaged_or_of_another_preset_or_not_made_from_one_another_is_refused_unless_mixed(
        copied):
    """Files that do not belong together are never mixed unnoticed."""
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


def test_a_run_continues_only_with_the_same_settings_and_images_which_need_labels_without_gaps(
        tmp_path):
    """An interrupted run goes on only as what it was: with its settings, and with its images."""
    red = torch.full((1, 3, 16, 16), 99, dtype=torch.uint8)
    plain = "--no-conditional"
    one = save_images(tmp_path / "one", red)
    assert "has none" in refused("01", tmp_path, data=one)
    call("01", tmp_path, plain, data=one)
    message = refused("01", tmp_path, plain, data=one, steps=9, ema=0.9)
    assert re.search(r"steps was 4, is 9; ema was .*, is 0.9\..*--restart", message)
    call("01", tmp_path, plain, data=save_images(tmp_path / "same", red))  # at another place
    save_images(one, red + 1)  # other images at the same place
    assert "made from was" in refused("01", tmp_path, plain, data=one)
    save_images(one, red, [2])
    assert "labels from 2 to 2" in refused("01", tmp_path, data=one)
    call("02", tmp_path)
    message = refused("02", tmp_path, n_pairs=41, sample_steps=3, seed=1, precision="bf16")
    assert "pairs was 40, is 41; steps was 2, is 3; seed was 0, is 1; precision was" in message


# ---------------------------------------------------------------------------------- around the runs

def test_one_run_at_a_time_works_in_a_folder_and_a_killed_one_leaves_it_free(tmp_path):
    """Two runs in one folder would spoil each other's files. The lock ends with its process."""
    folder = tmp_path / "shapes"
    program = """
import common, pathlib, sys, time
with common.locked(pathlib.Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)"""
    command = sys.executable, "-c", program, folder
    other = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "in\n"
    line = refused("01", tmp_path)
    expected = rf"another run works in {folder}, since 20.*process {other.pid}.*--out"
    assert re.search(expected, line)
    other.kill()
    other.wait()
    with common.locked(folder):
        pass


@pytest.mark.parametrize("rank, world, port, device, message", [
    (1, 1, None, "cpu", "left over in the environment"),
    (0, 2, None, "cpu", "left over in the environment"),
    (0, 2, "1", "cuda:1", "--device cuda:1 would put all 2 processes on one device")])
def test_half_of_torchruns_variables_and_one_device_for_all_are_refused(
        tmp_path, monkeypatch, rank, world, port, device, message):
    """Processes that do not find each other, or are all on one GPU, are refused at once."""
    monkeypatch.delenv("MASTER_PORT", raising=False)
    if port:
        monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setattr(common, "RANK", rank)
    monkeypatch.setattr(common, "WORLD", world)
    assert message in refused("02", tmp_path, device=device)


def test_05_compares_with_the_images_that_the_teacher_saw(tmp_path):
    """The reference of a distance is the training data, and not what took its place later."""
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    data = save_images(tmp_path / "own", images)
    call("01", tmp_path, "--no-conditional", data=data)
    cfg = settings_of("05", out=tmp_path, metric="fid")
    source, reference = script("05").reference_images(cfg, 16, [])
    assert torch.equal(reference, images)
    save_images(data, images.flip(3))
    message = "does not hold the images that the teacher was trained on"
    with pytest.raises(common.UserError, match=message):
        script("05").reference_images(cfg, 16, [])


def test_an_attention_size_that_no_level_has_is_said(capsys):
    """A wrong --attn would silently leave out attention, so it is mentioned."""
    settings = dict(base=8, mult=(1, 1), blocks=1)
    common.UNet(16, **settings, attn=(16, 7))
    said = capsys.readouterr().out
    assert "attn (16, 7) names a size that no level has; they have [16, 8]" in said
    common.UNet(16, **settings, attn=(16, 8))
    assert not capsys.readouterr().out


def test_to_compare_a_parent_does_not_read_all_of_it(copied):
    """Whether a parent is the right one is seen from its id. Its weights may be large."""
    path = copied / "shapes/01_teacher.pt"
    weights = artifact(copied, path.name)["weights"]["time0.weight"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weights, weights[::-1]))  # a wrong checksum
    common.load(settings_of("03", out=copied), "02_pairs.pt")
    assert "01_teacher.pt is damaged" in refused("02", copied, "--restart")


def test_images_are_decoded_again_whenever_something_about_their_files_changes(tmp_path):
    """Decoded images are kept for one place, size, list of names, and size and date of files."""
    def put(name, grey, n_bytes=1000, date=0):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16), grey).save(path)
        path.write_bytes(path.read_bytes().ljust(n_bytes))
        os.utime(path, (date, date))

    def greys(folder, image_size=16):
        images = common.load_data(tmp_path / folder, image_size)[0]
        assert images.shape[2:] == (image_size, image_size)
        return images[:, 0, 0, 0].tolist()

    put("one/a.png", 10)
    put("one/b.png", 20)
    assert greys("one") == [10, 20]
    assert greys("one", image_size=8) == [10, 20]
    put("two/a.png", 30)
    put("two/b.png", 40)
    assert greys("two") == [30, 40]
    (tmp_path / "one/a.png").rename(tmp_path / "one/c.png")
    assert greys("one") == [20, 10]
    put("one/c.png", 50, n_bytes=1001)
    assert greys("one") == [20, 50]
    put("one/c.png", 60, n_bytes=1001, date=1)
    assert greys("one") == [20, 60]


class Program:
    """What a malicious file may hold: code that creates a file when it is unpickled."""

    def __reduce__(self):
        return open, ("created", "w")


def test_no_code_in_a_file_is_run(monkeypatch):
    """Files may come from strangers, so they are read as data only."""
    torch.save({"weights": Program()}, "x.pt")
    np.savez("x.npz", mu=np.array([Program()]))
    for number in ("04", "05"):
        monkeypatch.setattr(script(number), "download", lambda *given: "x.pt")
    with pytest.raises(common.UserError, match="x.pt is damaged or not one of ours"):
        common.read("x.pt")
    with pytest.raises(common.UserError, match="x.npz is no .npz"):
        script("fid").read_statistics("x.npz", 3)
    with pytest.raises(pickle.UnpicklingError):
        script("04").load_lpips("cpu")
    with pytest.raises(pickle.UnpicklingError):
        script("05").load_inception("cpu")
    assert not os.path.exists("created")
