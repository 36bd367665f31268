"""All five scripts as a user runs them, on few images for few steps; and all that they must refuse."""
import contextlib
import io
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import load_script, run_script

TINY = {
    "01": dict(base=8, mult="1,2", attn="8", steps=4, batch=8, precision="fp32"),
    "02": dict(n_pairs=40, sample_steps=2, precision="fp32"),
    "03": dict(base=8, mult="1,1", attn="8", steps=4, batch=8, anneal_steps=2, precision="fp32"),
    "04": dict(steps=4, batch=8, precision="fp32"),
    "05": dict(n_samples=24, teacher_steps=2, flow_steps=2, precision="fp32"),
}
ARTIFACTS = {"01": "01_teacher.pt", "02": "02_pairs.pt", "03": "03_reflow.pt", "04": "04_student.pt"}


def script(number):
    """The script's module, with small batches of pairs."""
    load_script("02").BATCH = 16
    return load_script(number)


def arguments(number, out, *flags, **settings):
    """The command line for TINY, with other settings as given."""
    options = [f"--{name}={value}" for name, value in {"out": out, **TINY[number], **settings}.items()]
    return [*options, *(["--allow_few"] if number == "05" else []), *flags]


def call(number, out, *flags, **settings):
    """The script's main in this process: faster than a new one."""
    s = script(number)
    s.main(common.read_settings(s.SETTINGS, s.__doc__, arguments(number, out, *flags, **settings)))


def refused(number, out, *flags, **settings):
    """The line with which the script ends early, through the same guard that a user meets."""
    s, stderr = script(number), io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as stopped:
        common.run(s.main, s.SETTINGS, s.__doc__, arguments(number, out, *flags, **settings))
    message = stopped.value.code
    if message == 2:  # argparse's own, after the usage
        message = stderr.getvalue().splitlines()[-1]
    assert re.search("error: |^stopped", message) and "\n" not in message
    return message


def artifact(out, name):
    return common.read(out / "shapes" / name)


def network(out, name):
    cfg = common.read_settings(load_script("05").SETTINGS, "", [f"--out={out}", "--precision=fp32"])
    return common.load_network(cfg, name, torch.device("cpu"))[0]


@pytest.fixture
def copied(finished, tmp_path):
    """A folder of its own with all artifacts, but without the trainers' states."""
    shutil.copytree(finished / "shapes", tmp_path / "shapes", ignore=shutil.ignore_patterns("*_state.pt"))
    return tmp_path


def test_all_five_stages_write_their_artifacts(finished):
    names = {re.sub("reference_.*", "reference", path.name) for path in (finished / "shapes").iterdir()}
    pictures, states = (f"{name}_samples.png" for name in ("01", "03", "04", "05")), ("01", "03", "04")
    assert names == {*ARTIFACTS.values(), *pictures, *(f"{name}_state.pt" for name in states), "02_pairs.png",
                     "05_results.md", "05_results.json"}
    results = json.loads((finished / "shapes/05_results.json").read_text())
    assert [(row["network"], row["calls"]) for row in results["rows"]] == [
        ("real", None), ("teacher", 2), ("teacher", 1), ("2-rectified flow", 2), ("2-rectified flow", 1),
        ("student", 1)]
    assert all(row["distance"] >= 0 and {"parameters", "macs", "ms"} < set(row) for row in results["rows"])
    assert results["protocol"]["metric"] == "FD-shapes" and results["protocol"]["n_samples"] == 24


def test_artifacts_hold_the_ema_and_pairs_are_what_the_teachers_makes_of_the_stored_noise(finished):
    for number in ("01", "03", "04"):
        weights, state = (artifact(finished, name) for name in (ARTIFACTS[number], f"{number}_state.pt"))
        for key in state["ema"]:
            assert torch.equal(weights["weights"][key], state["ema"][key])
        assert not torch.equal(weights["weights"]["conv_in.weight"], state["weights"]["conv_in.weight"])
    pairs, teacher = artifact(finished, "02_pairs.pt"), network(finished, "01_teacher.pt")
    z = common.noise_for(0, range(40), (3, 16, 16)).half()
    x = torch.cat([common.euler(teacher, batch.float(), 2).half() for batch in z.split(16)])
    assert torch.equal(pairs["z"], z) and torch.equal(pairs["x"], x)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(finished, tmp_path):
    for number in TINY:
        call(number, tmp_path)
    for name in (*ARTIFACTS.values(), "05_samples.png"):
        assert (tmp_path / "shapes" / name).read_bytes() == (finished / "shapes" / name).read_bytes(), name
    for number in ("01", "02"):
        call(number, tmp_path / "other", seed=1)
        ids = [artifact(out, ARTIFACTS[number])["id"] for out in (finished, tmp_path / "other")]
        assert ids[0] != ids[1]


def test_a_student_starts_from_the_flow_or_from_scratch(copied):
    name, moved = "middle.0.conv0.weight", {}
    for first in ("flow", "scratch"):
        call("04", copied, "--restart", steps=1, lr=1e-6, start_from=first)
        flow, student = (artifact(copied, ARTIFACTS[number])["weights"][name] for number in ("03", "04"))
        moved[first] = (student - flow).abs().max()
    assert moved["flow"] < 1e-5 and moved["scratch"] > 0.01


def test_png_writes_images_and_nothing_else(copied):
    before, folder = set(copied.rglob("*")), copied / "shapes/05_student_images"
    call("05", copied, only="student", png=7)
    call("05", copied, only="student", png=5, seed=3)
    files = [folder / f"{i:06}.png" for i in range(5)]  # the other two of before are gone
    assert set(copied.rglob("*")) - before == {folder, copied / "shapes/05_student_images.png", *files}
    z = common.noise_for(3, range(common.EVALUATION, common.EVALUATION + 5), (3, 16, 16))
    expected = common.to_uint8(common.euler(network(copied, "04_student.pt"), z, 1)).int()
    written = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])
    assert np.abs(written - expected.numpy()).max() <= 1  # the batch's layout may change the rounding


def test_own_images_class_conditional_end_to_end(tmp_path):
    with zipfile.ZipFile("own.zip", "w") as archive:
        for i in range(12):
            Image.new("RGB", (20, 16), (i * 20, 0, 99)).save("i.png")
            archive.write("i.png", f"class{i % 3}/{i}.png")
    own = dict(preset="imagenet64", precision="auto")  # its teacher is conditional
    call("01", tmp_path, **own, data="own.zip", image_size=16, blocks=1)
    call("02", tmp_path, **own, n_pairs=30)
    pairs = common.read(tmp_path / "imagenet64/02_pairs.pt")
    assert set(pairs["labels"].tolist()) == {0, 1, 2} and pairs["network"]["classes"] == 3
    call("03", tmp_path, **own, blocks=1)
    call("04", tmp_path, **own, n_pairs=20, pair_steps=1, distance="huber", pairs_from="flow")
    call("05", tmp_path, **own, metric="none", n_samples=12)
    results = json.loads((tmp_path / "imagenet64/05_results.json").read_text())
    assert len(results["rows"]) >= 5 and {row["distance"] for row in results["rows"]} == {None}


# ----------------------------------------------------------------------------------------------- refusals

def test_a_user_sees_one_line_and_a_failing_exit_code(tmp_path):
    for number, missing in (("02", "01"), ("03", "02"), ("04", "03"), ("05", "01")):
        assert f"out/shapes/{ARTIFACTS[missing]} is missing" in refused(number, "out")
    done = run_script("02", cwd=tmp_path)
    assert done.returncode == 1 and re.fullmatch("error: .*01_teacher.pt is missing.*\n", done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, flags, message", [
    ("01", "--preset=nope", "invalid choice: 'nope'"), ("01", "--steps=many", "--steps: invalid int.*many"),
    ("01", "--stepz=3", "unrecognized.*--stepz=3"), ("01", "--step=3", "unrecognized.*--step=3"),
    ("01", "--mult=a", "--mult"), ("01", "--lr=nan", "--lr nan"), ("01", "--seed=-1", "--seed -1"),
    ("01", "--steps=0", "at least 1"), ("01", "--batch=0", "at least 1"), ("01", "--device=gpu9", "gpu9"),
    ("01", "--image_size=15", "15.*multiple of 2"), ("01", "--base=6", "channels"),
    ("01", "--base=2", "base >= 4"), ("01", "--dropout=1", "dropout < 1"), ("01", "--data=no", "no does not"),
    ("02", "--restart --n_pairs=0", "at least 1"), ("02", "--restart --sample_steps=0", "at least 1"),
    ("03", "--schedule=square", "--schedule square.*cosine"), ("03", "--anneal_steps=0", "--anneal_steps"),
    ("04", "--distance=l3", "--distance l3.*huber"), ("04", "--start_from=zero", "--start_from zero"),
    ("04", "--pairs_from=pool", "--pairs_from pool"), ("04", "--t_low=0.9", "--t_low 0.9"),
    ("04", "--t_high=2", "--t_high 2"), ("04", "--guidance=-1", "--guidance -1"),
    ("04", "--distance=lpips", "9/vgg.pth.* at data/vgg.pth, or .*--distance l2 or huber"),
    ("05", "--only=judge", "--only judge"), ("05", "--n_samples=1", "at least 2"),
    ("05", "--resize=s", "--resize s"), ("05", "--flow_steps=0", "at least 1"),
    ("05", "--rounding=up", "--rounding up"), ("05", "--reference=no", "no"),
    ("05", "--images=a.zip", "needs --reference"), ("05", "--images=a --reference=b --png=3", "--png"),
    ("05", "--no-allow_few", "24 images are fewer than the .* features"),
    ("05", "--metric=fid", "9/inception.pth.* at data/inception.pth, or .*--metric none")])
def test_bad_settings_are_refused(copied, monkeypatch, number, flags, message):
    before = {path: path.read_bytes() for path in (copied / "shapes").iterdir()}
    monkeypatch.setattr(script("05"), "INCEPTION_URL", "http://127.0.0.1:9/inception.pth")
    monkeypatch.setattr(script("04"), "VGG_URL", "http://127.0.0.1:9/vgg.pth")
    assert re.search(message, refused(number, copied, *flags.split()))
    assert {path: path.read_bytes() for path in (copied / "shapes").iterdir()} == before


def test_artifacts_that_are_damaged_or_would_run_code_or_are_of_another_preset_are_refused(copied):
    class Malicious:
        def __reduce__(self):
            return open, (str(copied / "created"), "w")

    path = copied / "shapes/01_teacher.pt"
    shutil.copytree(copied / "shapes", copied / "cifar10")
    assert "was made with --preset shapes" in refused("02", copied, preset="cifar10")
    path.write_bytes(path.read_bytes()[:2000])
    assert "01_teacher.pt is damaged or not one of ours" in refused("02", copied)
    for as_zip in (True, False):
        torch.save({"network": Malicious()}, path, _use_new_zipfile_serialization=as_zip)
        assert "not one of ours" in refused("02", copied) and not (copied / "created").exists()


def test_files_that_were_not_made_from_one_another_are_refused_unless_mixed_on_purpose(copied):
    call("01", copied, seed=1)
    for number, name in (("03", "02_pairs.pt"), ("04", "03_reflow.pt"), ("05", "03_reflow.pt")):
        message = refused(number, copied, "--restart")
        assert f"{name} is out of date: it was made from another 01_teacher.pt" in message
        call(number, copied, "--restart", "--allow_mixed")


def test_a_run_continues_only_with_the_same_settings_and_images_which_need_labels_without_gaps(tmp_path):
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), colour).save(tmp_path / name / "1.png")
    assert "has none" in refused("01", tmp_path, "--conditional", data="a")
    call("01", tmp_path, data="a")
    before = artifact(tmp_path, "01_teacher.pt")["id"]
    message = refused("01", tmp_path, data="a", steps=9, ema=0.9)
    assert "steps was 4, is 9; ema was 0.999, is 0.9" in message and "--restart" in message
    call("01", tmp_path, data="b")  # the same images at another place
    (tmp_path / "c/1.png").rename(tmp_path / "a/1.png")
    assert "made from was" in refused("01", tmp_path, data="a")  # others at the same place
    assert artifact(tmp_path, "01_teacher.pt")["id"] == before
    (tmp_path / "a/dataset.json").write_text('{"labels": [["1.png", 2]]}')
    assert "class [0, 1]" in refused("01", tmp_path, "--conditional", data="a")
    call("02", tmp_path)
    assert "pairs was 40, is 41; seed was 0, is 1" in refused("02", tmp_path, n_pairs=41, seed=1)
