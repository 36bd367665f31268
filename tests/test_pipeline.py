"""All five scripts as a user runs them, on a few images for a few steps; and every way in which they must refuse to run."""
import json
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import noise_for
from conftest import NAMES, load_script, run_script

TINY = {
    "01": dict(base=8, mult="1,2", attn="8", steps=4, batch=8, log_every=2, sample_steps=2),
    "02": dict(n_pairs=40, sample_steps=2, sample_batch=16),
    "03": dict(base=8, mult="1,1", attn="8", steps=4, batch=8, log_every=2, sample_steps=2, anneal_steps=2),
    "04": dict(steps=4, batch=8, log_every=2),
    "05": dict(n_samples=24, teacher_steps=2, flow_steps=2, feature_steps=3),
}


def arguments(number, out, **more):
    flags = ["--allow_few"] if number == "05" else []
    return flags + [f"--{k}={v}" for k, v in {"out": out, **TINY[number], **more}.items()]


def call(number, out, *flags, **more):
    """The script's main in this process: faster than a new one."""
    s = load_script(number)
    s.main(common.read_settings(s.Config, s.PRESETS, s.__doc__, arguments(number, out, **more) + list(flags)))


def test_all_five_stages_write_their_artifacts(finished):
    names = {p.name for p in (finished / "shapes").iterdir() if not p.name.startswith(("05_row_", "05_reference_"))}
    assert names == {"01_teacher.pt", "01_samples.png", "01_loss.png", "02_pairs.pt", "02_pairs.png", "03_reflow.pt",
                     "03_samples.png", "03_loss.png", "04_student.pt", "04_samples.png", "04_loss.png", "05_results.md",
                     "05_results.json", "05_samples.png", "01_state.pt", "03_state.pt", "04_state.pt"}
    results = json.loads((finished / "shapes/05_results.json").read_text())
    assert [(row["network"], row["calls"]) for row in results["rows"]] == [
        ("real (other drawings)", None), ("teacher", 2), ("teacher", 1), ("2-rectified flow", 2), ("2-rectified flow", 1), ("student", 1)]
    assert all(row["distance"] >= 0 for row in results["rows"]) and results["protocol"]["metric"] == "FD-shapes"
    for name in names:
        if name.endswith(".png"):
            assert Image.open(finished / "shapes" / name).size[0] > 100


def test_pairs_are_what_the_teachers_ema_makes_of_the_noise_that_is_drawn_again(finished):
    cfg = common.Settings(out=str(finished))
    teacher, _ = common.load_network(finished / "shapes/01_teacher.pt", cfg, "cpu")
    pairs = common.load(finished / "shapes/02_pairs.pt", cfg)
    assert pairs["images"].dtype == torch.float16 and pairs["images"].shape == (40, 3, 16, 16)
    i = torch.tensor([3, 29])
    expected = common.euler(teacher, noise_for(pairs["noise_seed"], i + pairs["first_index"], (3, 16, 16)), 2)
    torch.testing.assert_close(pairs["images"][i].float(), expected, atol=4e-3, rtol=1e-3)
    noise, data, labels = common.pair_batch(pairs, common.Part(8, 0, 8).begin(0, 0), "cpu")
    torch.testing.assert_close(data, common.euler(teacher, noise, 2), atol=4e-3, rtol=1e-3)


def test_artifacts_hold_the_ema_and_not_the_trained_weights(tmp_path, monkeypatch):
    kept = []
    train = common.train
    monkeypatch.setattr(load_script("01"), "train",
                        lambda name, cfg, net, *rest: kept.append((net, train(name, cfg, net, *rest))) or kept[0][1])
    call("01", tmp_path)
    weights = torch.load(tmp_path / "shapes/01_teacher.pt", weights_only=True)["weights"]["conv_in.weight"]
    net, (ema, _) = kept[0]
    assert torch.equal(weights, ema.conv_in.weight) and not torch.equal(weights, net.conv_in.weight)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(finished, tmp_path):
    for number in TINY:
        call(number, tmp_path)
    for name in ("01_teacher.pt", "02_pairs.pt", "03_reflow.pt", "04_student.pt", "05_samples.png", "01_loss.png"):
        assert (tmp_path / "shapes" / name).read_bytes() == (finished / "shapes" / name).read_bytes(), name
    call("01", tmp_path, "--restart", seed=1)
    assert (tmp_path / "shapes/01_teacher.pt").read_bytes() != (finished / "shapes/01_teacher.pt").read_bytes()


def test_the_student_can_learn_from_the_flows_own_pairs_without_guidance(finished, tmp_path):
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    call("04", tmp_path, "--restart", pairs_from="flow", n_pairs=20, pair_steps=2, guidance=0)
    pairs = torch.load(tmp_path / "shapes/04_pairs.pt", weights_only=True)
    flow, _ = common.load_network(tmp_path / "shapes/03_reflow.pt", common.Settings(out=str(tmp_path)), "cpu")
    expected = common.euler(flow, noise_for(0, range(common.OWN_PAIRS, common.OWN_PAIRS + 20), (3, 16, 16)), 2)
    torch.testing.assert_close(pairs["images"].float(), expected, atol=4e-3, rtol=1e-3)
    noise, data, _ = common.pair_batch(pairs, common.Part(8, 0, 8).begin(0, 0), "cpu")
    torch.testing.assert_close(data, common.euler(flow, noise, 2), atol=4e-3, rtol=1e-3)


def test_each_loss_of_stage_04_gets_the_students_answer_to_its_own_noise(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    s, seen = load_script("04"), []
    distill, guided = s.distill_loss, s.guided_loss
    monkeypatch.setattr(s, "distill_loss", lambda v, z, *rest: seen.append((v, z)) or distill(v, z, *rest))
    monkeypatch.setattr(s, "guided_loss", lambda v, flow, z, *rest: seen.append((v, z)) or guided(v, flow, z, *rest))
    call("04", tmp_path, "--restart", steps=1, precision="fp32")
    start, _ = common.load_network(tmp_path / "shapes/03_reflow.pt", common.Settings(out=str(tmp_path)), "cpu")
    assert len(seen) == 2 and not torch.equal(seen[0][1], seen[1][1])
    for velocity, noise in seen:  # at the first step the student is still the flow
        torch.testing.assert_close(velocity, s.first_step(start, noise))


def test_a_student_can_start_from_scratch(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    s, first = load_script("04"), []
    monkeypatch.setattr(s, "train", lambda name, cfg, net, *rest: first.append(net.conv_in.weight.clone()) or common.train(name, cfg, net, *rest))
    for start in ("flow", "scratch"):
        call("04", tmp_path, "--restart", steps=1, start_from=start)
    flow, _ = common.load_network(tmp_path / "shapes/03_reflow.pt", common.Settings(out=str(tmp_path)), "cpu")
    assert torch.equal(first[0], flow.conv_in.weight) and not torch.equal(first[1], flow.conv_in.weight)


def test_compiling_trains_the_same_network_and_where_it_fails_training_goes_on_without(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "shapes").mkdir()
    shutil.copy(finished / "shapes/02_pairs.pt", tmp_path / "shapes")
    compile_, weights = torch.compile, []

    def fails(net):
        raise RuntimeError("no compiler here")

    for fast in (None, lambda net: compile_(net, backend="eager"), fails):
        monkeypatch.setattr(torch, "compile", fast)
        call("03", tmp_path, "--restart", *["--compile"][:fast is not None], precision="fp32")
        weights.append(torch.load(tmp_path / "shapes/03_reflow.pt", weights_only=True)["weights"])
    assert "the run goes on without: no compiler here" in capsys.readouterr().out
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])


ELSEWHERE = """
import sys, torch
try:
    import common
except ImportError:
    noise, labels = torch.load(sys.argv[1], weights_only=True)
    student = torch.export.load(sys.argv[2] + "/05_student.pt2").module()
    conditional = torch.export.load(sys.argv[2] + "/conditional.pt2").module()
    torch.save([student(noise), student(noise[:1]), conditional(noise, labels)], sys.argv[3])
"""


def test_only_sampling_and_a_student_without_this_project(finished, tmp_path):
    shutil.copytree(finished / "shapes", tmp_path / "shapes", ignore=shutil.ignore_patterns("05_*"))
    call("05", tmp_path, only="student", png=7)
    call("05", tmp_path, "--export", only="student", png=5, precision="fp32", seed=3)
    assert len(list((tmp_path / "shapes/05_student_images").iterdir())) == 5  # those of before are gone
    assert {p.name for p in (tmp_path / "shapes").glob("05_*")} == {"05_student_images", "05_student_images.png", "05_student.pt2"}
    student, _ = common.load_network(tmp_path / "shapes/04_student.pt", common.Settings(out=str(tmp_path)), "cpu")
    noise = noise_for(3, range(common.EVALUATION, common.EVALUATION + 5), (3, 16, 16))
    expected = common.euler(student, noise, 1)
    written = [np.asarray(Image.open(tmp_path / f"shapes/05_student_images/{i:06d}.png")).transpose(2, 0, 1) for i in range(5)]
    assert (np.stack(written) == common.to_uint8(expected).numpy()).mean() > 0.999  # rounding depends on the batch's layout
    torch.manual_seed(0)
    conditional, labels = common.UNet(16, base=8, mult=(1, 2), blocks=1, attn=(8,), classes=3).eval(), torch.tensor([0, 1, 2, 1, 0])
    load_script("05").export(tmp_path / "shapes/conditional.pt2", conditional, {}, 2)
    torch.save([noise, labels], tmp_path / "noise.pt")
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, tmp_path / "noise.pt", tmp_path / "shapes", tmp_path / "made.pt"], check=True, cwd=tmp_path)
    made = torch.load(tmp_path / "made.pt", weights_only=True)
    torch.testing.assert_close(made, [expected, expected[:1], common.euler(conditional, noise, 2, labels)])


def test_own_images_class_conditional_end_to_end(tmp_path):
    source = tmp_path / "own.zip"
    with zipfile.ZipFile(source, "w") as archive:
        for i in range(12):
            Image.new("RGB" if i % 5 else "L", (20, 16), i * 20 if i % 5 == 0 else (i * 20, 0, 99)).save(tmp_path / "i.png")
            archive.write(tmp_path / "i.png", f"class{i % 3}/{i}.png")
    call("01", tmp_path, "--conditional", preset="imagenet64", data=source, image_size=16, blocks=1)
    call("02", tmp_path, preset="imagenet64", n_pairs=30)
    pairs = torch.load(tmp_path / "imagenet64/02_pairs.pt", weights_only=True)
    assert set(pairs["labels"].tolist()) == {0, 1, 2} and pairs["network"]["classes"] == 3
    call("03", tmp_path, preset="imagenet64", blocks=1)
    call("04", tmp_path, preset="imagenet64", n_pairs=20, pair_steps=1, distance="huber")
    call("05", tmp_path, preset="imagenet64", metric="none", n_samples=12)
    results = json.loads((tmp_path / "imagenet64/05_results.json").read_text())
    assert len(results["rows"]) == 5 and results["rows"][0]["distance"] is None


# ------------------------------------------------------------------------------------------------- refusals

def refused(number, out, *flags, **more):
    """The message with which the script refuses: in this process, through the same guard that a user meets."""
    s = load_script(number)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("sys.argv", [NAMES[number], *arguments(number, out, **more), *flags])
        common.run(s.main, s.Config, s.PRESETS, s.__doc__)
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_a_user_sees_one_line_and_a_failing_exit_code(tmp_path):
    for number, missing, maker in (("02", "01_teacher.pt", "01_train_teacher.py"), ("03", "02_pairs.pt", "02_generate_pairs.py"),
                                   ("04", "03_reflow.pt", "03_annealing_reflow.py"), ("05", "01_teacher.pt", "01_train_teacher.py")):
        done = run_script(number, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert f"out/shapes/{missing} is missing; make it with: python {maker} --preset shapes" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, flag, message", [
    ("01", "--preset=nope", "invalid choice: 'nope' .*shapes.*imagenet64"), ("01", "--steps=many", "--steps: invalid int"),
    ("01", "--stepz=3", "unknown setting --stepz=3; valid settings are --preset .*--steps"), ("01", "--steps=0", "--steps 0.*at least 1"),
    ("01", "--lr=nan", "--lr nan"), ("01", "--batch=20000", "larger than the data.*500"), ("01", "--seed=-1", "--seed -1"),
    ("01", "--image_size=15", "multiple of 2"), ("01", "--data=gone", "gone does not exist"), ("01", "--device=gpu9", "--device gpu9"),
    ("01", "--mult=a", "comma-separated list of integers"), ("02", "--n_pairs=0", "--n_pairs 0"), ("02", "--sample_steps=0", "--sample_steps"),
    ("03", "--beta_fixed=1.5", "--beta_fixed 1.5 is out of range: it must be between 0 and 1"), ("03", "--schedule=square", "choose from"),
    ("03", "--batch=41", "larger than the data.*40 pairs"), ("03", "--anneal_steps=0", "--anneal_steps"),
    ("04", "--distance=lpips", "could not download .*--vgg_weights PATH.*--distance l2 or huber"), ("04", "--t_low=0.9", "must not be larger"), ("04", "--guidance=-1", "--guidance"),
    ("04", "--batch=41", "larger than the data"), ("05", "--n_samples=1", "--n_samples 1"), ("05", "--reference=elsewhere", "FD-shapes measures"),
    ("05", "--images=a.zip --png=3", "--images has none"), ("05", "--export --only=flow", "--only flow leaves it out"),
    ("05", "--no-allow_few", "24 images are fewer than the 72 features"),
    ("05", "--metric=fid", "could not download .*--inception_weights PATH.*--metric none")])
def test_bad_settings_are_refused(finished, tmp_path, monkeypatch, number, flag, message):
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    before = {p: p.read_bytes() for p in (tmp_path / "shapes").iterdir()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load_script("05"), "INCEPTION_URL", "http://127.0.0.1:9/inception.pth")
    monkeypatch.setattr(load_script("04"), "VGG_URL", "http://127.0.0.1:9/vgg.pth")
    assert re.search(message, refused(number, tmp_path, *flag.split()))
    assert {p: p.read_bytes() for p in (tmp_path / "shapes").iterdir()} == before


def test_conditional_needs_labels(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "1.png")
    assert "has none" in refused("01", tmp_path, "--conditional", data=tmp_path, batch=1)


def test_artifacts_of_another_preset_size_or_shape_and_damaged_ones_are_refused(finished, tmp_path):
    folder = tmp_path / "shapes"
    shutil.copytree(finished / "shapes", folder)
    good = (folder / "01_teacher.pt").read_bytes()
    shutil.copytree(folder, tmp_path / "cifar10")
    assert "was made with --preset shapes, not cifar10" in refused("02", tmp_path, preset="cifar10")
    for damaged in (good[:2000], b"", b"nonsense"):
        (folder / "01_teacher.pt").write_bytes(damaged)
        assert "01_teacher.pt is damaged or not one of ours" in refused("02", tmp_path)
    artifact = torch.load(finished / "shapes/01_teacher.pt", weights_only=True)
    common.save(folder / "01_teacher.pt", common.Settings(), **{k: artifact[k] for k in artifact if k not in ("preset", "settings")}
                | {"network": {**artifact["network"], "base": 16}})
    assert "misshapen, first time0.weight" in refused("02", tmp_path)
    (folder / "01_teacher.pt").write_bytes(good)
    call("01", tmp_path, "--restart", image_size=8)
    assert "image_size is 8 in the first and 16 in the second" in refused("05", tmp_path)
    call("02", tmp_path, "--restart")
    assert "image_size is 16 in the first and 8 in the second" in refused("04", tmp_path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "created"), "w"))

    path = tmp_path / "shapes/01_teacher.pt"
    common.save(path, common.Settings(), network=Malicious())  # with a right checksum
    assert "not one of ours" in refused("02", tmp_path)
    path.write_bytes(path.read_bytes()[:-len(common.SEAL) - 32])
    assert "not one of ours" in refused("02", tmp_path)
    assert not (tmp_path / "created").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    s = load_script("01")
    loss, steps = s.flow_loss, []
    monkeypatch.setattr(s, "flow_loss", lambda *a: steps.append(0) or loss(*a) * (float("nan") if len(steps) == 14 else 1))
    assert "loss not finite at step 13: nothing was saved since step 10" in refused("01", tmp_path, steps=40, log_every=5, save_every=10)
    assert len(steps) == 15 and [p.name for p in (tmp_path / "shapes").iterdir()] == ["01_state.pt"]
    assert common.read(tmp_path / "shapes/01_state.pt")["step"] == 10


def test_a_full_disk_stops_02_before_it_starts(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    (tmp_path / "shapes/02_pairs.pt").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "three times that while it is made; 0 MB are free" in refused("02", tmp_path)
    assert not (tmp_path / "shapes/02_pairs.pt").exists()
