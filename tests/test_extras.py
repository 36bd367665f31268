"""The benchmark's measures, and the ablations' runs, tables and verdicts, without the hours that they take."""
import io
import json
import re
import shutil
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

import common
from conftest import Field, load_script

TINY = dict(image_size=16, base=8, mult=(1, 2), blocks=1, attn=(8,))


# ------------------------------------------------------------------------------------------------- benchmark

def test_medians_take_turns_and_leave_out_the_first_round():
    calls = []
    a, b = load_script("benchmark").medians([lambda: calls.append("a"), lambda: calls.append("b")], "cpu", at_least=3, seconds=0)
    assert calls == ["a", "b"] * 4 and 0 < a < 1e-3 and 0 < b < 1e-3


def test_a_training_step_is_measured_with_the_part_outside_of_the_network(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compile_(net, backend="eager"))
    for compiled in (False, True):
        found = load_script("benchmark").measure_network(TINY, "fp32", 4, torch.device("cpu"), compiled, 5)
        assert 0 < found["forward"] < found["step"] and 0 < found["outside"] < 1


def test_the_plain_network_is_the_same_function(monkeypatch):
    monkeypatch.setattr(common.Attention, "forward", common.Attention.forward)  # to be restored at the end
    net, x = common.UNet(**TINY), torch.randn(2, 3, 16, 16)
    torch.nn.init.normal_(net.middle[0].attention.proj.weight)
    before = net(x, torch.rand(2).fill_(0.5))
    found = load_script("benchmark").measure_plain(TINY, 4, torch.device("cpu"), 2)
    torch.testing.assert_close(net(x, torch.rand(2).fill_(0.5)), before)
    assert 0 < found["forward"] < found["step"] and "plain" in common.Attention.forward.__qualname__


def test_pairs_are_mapped_and_not_read_into_memory(tmp_path):
    found = load_script("benchmark").measure_pairs(TINY, 20_000, 4, "fp32", torch.device("cpu"), 3, str(tmp_path))
    assert found["megabytes"] == pytest.approx(20_000 * 3 * 16 * 16 * 2 / 1e6, rel=0.01) and not found["own"] > 15  # not a number where there is no /proc


def test_bare_layers_are_those_of_the_network():
    net = common.UNet(**TINY)
    layers = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    outputs = load_script("benchmark").bare_layers(net, (torch.randn(1, 3, 16, 16), torch.zeros(1)))()
    assert len(outputs) == len(layers) and outputs[-1].shape == (1, 3, 16, 16)


# ------------------------------------------------------------------------------------------------- ablations

def entry(variant, seed, distance):
    rows = [dict(network="student", calls=1, distance=distance, parameters=10), dict(network="student", calls=2, distance=99.0, parameters=10)]
    return {"variant": variant, "seed": seed, "results": [{"protocol": {"classifier": "c"}, "rows": rows}]}


MADE = [dict(run="04", command="04", seed=seed, commit="abc", machine="a machine", date="2026-01-01", seconds=30) for seed in range(3)]


@pytest.mark.parametrize("gains, expected", [((0.3, 0.4, 0.5), "shown"), ((0.4, -0.5, 0.3), "not shown"), ((-0.3, -0.4, -0.5), "opposite")])
def test_a_verdict_needs_an_interval_on_one_side_of_zero(tmp_path, gains, expected):
    ablations = load_script("ablations")
    runs = [entry(("", name), seed, 2.0 + seed - gain * (name == "b")) for seed, gain in enumerate(gains) for name in "ab"]
    grid = ablations.Grid("Title", "x", {("", "a"): (), ("", "b"): ()}, {"student": ("student", 1)},
                          {"b is better": ablations.lower(("", "b"), ("", "a"), "student")}, {"parameters": "parameters"})
    values = ablations.values_of(grid, runs)
    text = "\n".join(ablations.table(grid, runs, MADE, values))
    mean = sum(gains) / 3
    assert "| a | 3.000 ± 1.000 | 10 |" in text and "3 commands took 0:01:30 hours" in text
    assert re.search(rf"\| b is better \| {mean:+.3f} \(.* to .*\) \| {expected} \|".replace("+0", r"\+0"), text)
    ablations.plot(tmp_path / "plot.png", grid, values)
    assert colours_of(tmp_path / "plot.png") >= {"#174a7c", "#222222"}


def colours_of(path):
    """The colours of at least 20 pixels of a picture."""
    return {f"#{r:02x}{g:02x}{b:02x}" for n, (r, g, b) in Image.open(path).convert("RGB").getcolors(1 << 20) if n >= 20}


def test_numbered_places_stand_on_a_logarithmic_axis(tmp_path, monkeypatch):
    ablations, lines = load_script("ablations"), []
    grid = ablations.Grid("Title", "x", {("", n): () for n in ("1", "2", "8")}, {"student": ("student", 1)})
    monkeypatch.setattr(ablations.ImageDraw, "Draw", lambda canvas: Recorder(ImageDraw.ImageDraw(canvas), lines))
    ablations.plot(tmp_path / "plot.png", grid, {(("", n), "student"): [2.0, 2.0] for n in ("1", "2", "8")})
    (curve,) = [points for points, fill in lines if fill == "#174a7c" and len(points) == 3]
    (a, _), (b, _), (c, _) = curve
    assert c - b == pytest.approx(2 * (b - a))  # 2 to 8 is twice as far as 1 to 2


class Recorder:
    """An ImageDraw that notes its lines."""

    def __init__(self, draw, lines):
        self.draw, self.lines = draw, lines

    def line(self, points, fill, **more):
        self.lines.append((points, fill))
        self.draw.line(points, fill=fill, **more)

    def __getattr__(self, name):
        return getattr(self.draw, name)


def test_the_interval_is_students():
    mean, half = load_script("ablations").interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.78 * (2.5 / 5) ** 0.5)  # standard deviation sqrt(2.5), of 5


@pytest.mark.parametrize("name", ["benchmark", "ablations", "paths", "real_images"])
def test_the_extras_can_be_started_as_they_are(name):
    script = load_script(name)
    presets = {"paths": load_script("01").PRESETS, "real_images": {"cifar10_quick": {}}}.get(name, {"shapes": {}})
    assert common.read_settings(script.Config, presets, script.__doc__, []).preset in presets


def test_measurements_with_different_feature_networks_are_not_compared():
    ablations = load_script("ablations")
    runs = [entry(("", "a"), seed, 1.0) for seed in range(2)]
    runs[1]["results"][0]["protocol"] = {"classifier": "another"}
    grid = ablations.Grid("Title", "x", {("", "a"): ()}, {"student": ("student", 1)})
    with pytest.raises(common.UserError, match="different feature networks"):
        ablations.table(grid, runs, MADE, ablations.values_of(grid, runs))


def test_a_straight_path_has_no_deviation_and_a_bent_one_has():
    paths = load_script("paths")
    noise, ends = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    states, answers = paths.follow(Field(lambda x, t: ends - noise), noise, 4)
    assert states.shape == answers.shape == (5, 2, 3, 4, 4)
    torch.testing.assert_close(answers, ends.expand(5, -1, -1, -1, -1))
    assert paths.deviation(states).max() < 1e-6
    bent, _ = paths.follow(Field(lambda x, t: (ends - noise) * 2 * t), noise, 50)
    assert paths.deviation(bent).max() == pytest.approx(0.25, abs=0.01)  # t - t^2 of its length, at t = 1/2


def test_the_path_figure_is_drawn(finished, tmp_path):
    paths = load_script("paths")
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    paths.main(paths.Config(out=str(tmp_path), steps=3, paths=9, strips=9))
    picture = Image.open(tmp_path / "shapes/paths.png")
    assert colours_of(tmp_path / "shapes/paths.png") >= set(paths.COLOURS.values())  # both curves
    last_row = picture.crop((560, picture.height - 100, picture.width, picture.height - 1)).convert("L")
    assert last_row.crop((0, 90, last_row.width, 99)).getextrema() == (255, 255) and last_row.getextrema()[0] < 128  # whole, above the edge


def test_every_claim_names_a_variant_and_every_run_a_setting():
    ablations = load_script("ablations")
    for name, make in ablations.GRIDS.items():
        grid = make()
        for text, terms in grid.claims.items():
            assert all(variant in grid.variants and column in grid.columns for _, variant, column in terms), (name, text)
        tasks = {task for runs in grid.variants.values() for run in runs for task in ablations.ancestors(run)}
        assert len({task.name for task in tasks}) == len(tasks)
        for task in tasks:
            assert "preset='shapes'" in task.depends_on("shapes")  # read_settings takes its arguments


def test_a_run_is_known_by_all_its_settings(monkeypatch):
    ablations = load_script("ablations")
    cfg, reflow = ablations.Config(), ablations.reflow_of()
    same = ablations.reflow_of(anneal_steps=180, steps=500, base=16)  # in another order, and as the preset has it
    assert reflow.folder(cfg, 0) == same.folder(cfg, 0) != ablations.reflow_of(base=24).folder(cfg, 0)
    before = reflow.folder(cfg, 0)
    ablations.Run.depends_on.cache_clear()
    monkeypatch.setitem(load_script("01").PRESETS, "shapes", {"lr": 1e-3})  # of the run before the run before
    assert reflow.folder(cfg, 0) != before
    ablations.Run.depends_on.cache_clear()


def test_runs_that_are_done_are_not_made_again_and_parents_come_first(tmp_path, monkeypatch):
    ablations, ran = load_script("ablations"), []
    subprocess_run = subprocess.run

    inputs = {"01": (), "02": ("01",), "03": ("02",), "04": ("02", "03")}

    def pretend(command, **more):
        if command[0] == "git":
            return subprocess_run(command, **more)
        seed = command[command.index("--seed") + 1]
        number, out = command[1].rsplit("/", 1)[1][:2], command[command.index("--out") + 1]
        ran.append((number, seed))
        if number == "05":
            with open(f"{out}/shapes/05_student.json", "w") as file:
                rows = [dict(network="student", calls=1, distance=1.0 + len(ran) / 10)]
                json.dump({"protocol": {}, "rows": rows}, file)
        else:
            for parent in inputs[number]:
                with open(f"{out}/shapes/{ablations.MADE[parent]}") as file:
                    assert file.read().endswith(f"seed{seed}"), "the artifact of another seed"
            with open(f"{out}/shapes/{ablations.MADE[number]}", "w") as file:
                file.write(out)
        return SimpleNamespace(returncode=int(fail == number))

    monkeypatch.setattr(ablations.subprocess, "run", pretend)
    cfg = ablations.Config(grid="distillation", seeds=2, jobs=2, out=str(tmp_path), results=str(tmp_path / "results"))
    fail = "04"
    with pytest.raises(common.UserError, match="04_flow_guided_distill.py .* failed; see"):
        ablations.main(cfg)
    for seed in "01":  # parents before what is made from them
        order = [number for number, of in ran if of == seed]
        assert order == sorted(order) and set(order) == {"01", "02", "03", "04"}
    before, fail = len(ran), None
    ablations.main(cfg)
    assert before == 2 * 3 + 2 * 6 and len(ran) == before + 2 * 6 + 2 * 6  # the failed ones again, and the measurements
    ablations.main(cfg)
    assert len(ran) == before + 2 * 12 and {seed for number, seed in ran if number == "05"} == {"0"}
    saved = json.loads((tmp_path / "results/distillation.json").read_text())
    assert len(saved["measured"]) == 12 and len(saved["made"]) == 2 * (3 + 6 + 6)
    text = (tmp_path / "results/distillation.md").read_text()
    (tmp_path / "results/distillation.md").unlink()
    ablations.main(ablations.Config(grid="distillation", seeds=2, tables_only=True, out=str(tmp_path), results=str(tmp_path / "results")))
    assert (tmp_path / "results/distillation.md").read_text() == text
    with pytest.raises(common.UserError, match="is missing; make it without --tables_only"):
        ablations.main(ablations.Config(grid="reflow", tables_only=True, results=str(tmp_path / "results")))
    (tmp_path / "results/distillation.json").rename(tmp_path / "results/reflow.json")
    with pytest.raises(common.UserError, match="holds other variants"):
        ablations.main(ablations.Config(grid="reflow", tables_only=True, results=str(tmp_path / "results")))


def test_the_latency_of_a_student_is_that_of_its_precision(finished, tmp_path, monkeypatch):
    ablations = load_script("ablations")
    cfg, student = ablations.Config(out=str(tmp_path)), ablations.distilled()
    (student.folder(cfg, 0) / "shapes").mkdir(parents=True)
    shutil.copy(finished / "shapes/04_student.pt", student.folder(cfg, 0) / "shapes")
    monkeypatch.setattr(ablations, "best_precision", lambda device: "bf16")
    monkeypatch.setattr(load_script("05"), "seconds_per_call", lambda net, batch, precision: layouts.append(
        (precision, net.conv_in.weight.is_contiguous())) or 0.5)
    layouts, measured = [], [entry(("", "base 16"), 0, 2.0)]
    ablations.time_students(SimpleNamespace(variants={("", "base 16"): (student,)}), measured, cfg, torch.device("cpu"))
    assert layouts == [("bf16", True)] and measured[0]["results"][0]["rows"][0]["ms_one"] == 500


# ------------------------------------------------------------------------------------------------- real images

def test_real_images_are_compared_by_their_own_classifier(tmp_path, monkeypatch):
    """With generators that are known: some images of the set, or noise, in place of what the stages make."""
    real = load_script("real_images")
    images, attributes = common.draw_shapes(400, 32)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i, image in enumerate(images):
            content = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "PNG")
            archive.writestr(f"{int(attributes[i, 0])}/{i}.png", content.getvalue())

    def pretend(runs, cfg):
        for run in runs:
            _, key, calls = next(entry for entry in real.networks(cfg).values() if entry[0] == run)
            folder = run.folder(cfg, 0) / "cifar10_quick" / f"05_{key}_images"
            folder.mkdir(parents=True)
            for i in range(cfg.n_samples):
                image = images[i] if key == "teacher" and calls == 25 else torch.randint(256, images[i].shape, dtype=torch.uint8)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        return {(run, 0): MADE[0] for run in runs}

    monkeypatch.setattr(real, "make_all", pretend)
    cfg = real.Config(data=str(tmp_path / "set.zip"), named="drawings", n_samples=150, classifier_steps=3, scale=0.5,
                      out=str(tmp_path / "out"), results=str(tmp_path / "results"))
    for run in (run for run, *_ in real.networks(cfg).values()):
        assert "preset='cifar10_quick'" in run.depends_on("cifar10_quick")  # read_settings takes its arguments
    real.main(cfg)
    text = (tmp_path / "results/cifar10_cpu.md").read_text()
    distance = {name: float(value) for name, value in re.findall(r"^\| ([^|]+) \| ([\d.]+) \|$", text, re.MULTILINE)}
    assert text.startswith("drawings, 150 images of each network") and "0.5 of the steps" in text and "commit abc" in text
    assert len(distance) == 7 and distance["teacher, 25 calls"] < 0.2 * distance["student, guided, 1 call"]
    assert Image.open(tmp_path / "results/cifar10_cpu.png").width > 500
    with pytest.raises(common.UserError, match="fewer than twice"):
        real.main(real.Config(data=str(tmp_path / "set.zip"), n_samples=201, out=str(tmp_path / "out")))
