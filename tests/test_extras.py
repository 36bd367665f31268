"""The extras, without the hours that some of them take."""
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import common
from conftest import Field, load_script

TINY, CPU = dict(image_size=16, base=8, mult=(1, 2), blocks=1, attn=(8,)), torch.device("cpu")
MADE = [dict(commit="abc", machine="a machine", date="2026-01-01", seconds=1200) for _ in range(3)]


def settings(name, **more):
    s = load_script(name)
    return common.read_settings(s.SETTINGS, s.__doc__, [f"--{key}={value}" for key, value in more.items()])


def colours_of(path):
    found = Image.open(path).convert("RGB").getcolors(1 << 20)
    return {"#{:02x}{:02x}{:02x}".format(*colour) for n, colour in found if n >= 20}  # pixels


def test_plain_and_other_networks_are_the_same_function_and_measured(monkeypatch):
    benchmark, calls = load_script("benchmark"), []
    assert 0 < benchmark.median_seconds(lambda: calls.append(1), CPU, 3, 0) < 1e-3 and len(calls) == 4
    for owner, name in ((common.Attention, "forward"), (common, "ema_update")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be restored at the end
    net, ema, x, t = common.UNet(**TINY), common.UNet(**TINY), torch.randn(2, 3, 16, 16), torch.rand(2)
    torch.nn.init.normal_(net.middle[0].attention.proj.weight)
    expected = net(x, t), [(p + q).detach() / 2 for p, q in zip(net.parameters(), ema.parameters())]
    good = benchmark.measure(TINY, "fp32", CPU, 4, 4, 20_000, "out")
    assert 0 < good["forward"] < good["step"] and 0 < good["passes"]
    assert not good["own"] > 15  # MB: pairs are mapped. (Not a number where there is no /proc.)
    assert benchmark.measure(TINY, "plain fp32", CPU, 4, 4, 64, "out")["step"] > 0
    assert common.Attention.forward is benchmark.plain_attention
    common.ema_update(ema, net, 0.5, 100)
    torch.testing.assert_close((net(x, t), list(ema.parameters())), expected)


def entry(name, seed, distance, judge="j"):
    rows = [dict(network="student", calls=n, distance=distance + 97 * (n - 1), macs=10) for n in (1, 2)]
    return {"variant": ("", name), "seed": seed, "results": [{"protocol": {"judge": judge}, "rows": rows}]}


@pytest.mark.parametrize("gains, expected", [
    ((0.3, 0.4, 0.5), "+0.400 (+0.152 to +0.648) | shown"),  # 0.4 -+ 4.30 x 0.1 / sqrt 3
    ((0.4, -0.5, 0.3), "not shown"), ((-0.3, -0.4, -0.5), "opposite")])
def test_a_verdict_needs_an_interval_on_one_side_of_zero(tmp_path, gains, expected):
    ablations = load_script("ablations")
    runs = [entry(name, i, 2.0 + i - gain * (name == "b")) for i, gain in enumerate(gains) for name in "ab"]
    grid = ablations.Grid("Title", "x", {"student": ("student", 1)}, ("macs",))
    grid.variants = {("", "a"): (), ("", "b"): ()}
    grid.claim("b is better", ("", "b"), ("", "a"))
    text = "\n".join(ablations.table(grid, runs, MADE))
    assert "| a | 3.000 ± 1.000 | 10 |" in text and "3 commands, one after the other 1.0 hours" in text
    assert re.search(rf"\| b is better \|.*{re.escape(expected)} \|", text)
    ablations.plot(tmp_path / "plot.png", grid, ablations.values_of(grid, runs))
    assert colours_of(tmp_path / "plot.png") >= {"#174a7c", "#222222"}
    with pytest.raises(common.UserError, match="different judges"):
        ablations.table(grid, [*runs, entry("a", 3, 1.0, "another")], MADE)


def test_every_claim_names_a_variant_and_every_run_is_known_by_all_its_settings(monkeypatch):
    ablations, cfg = load_script("ablations"), settings("ablations")
    for name, grid in ablations.grids().items():
        assert name in ablations.SETTINGS[0][-1] and grid.claims  # the help text
        for terms in grid.claims.values():
            assert all(variant in grid.variants and column in grid.columns for _, variant, column in terms)
        tasks = {task for runs in grid.variants.values() for run in runs for task in run.ancestors()}
        assert len({task.depends_on(cfg) for task in tasks}) == len(tasks)
        for task in tasks:  # what was not made from one another is mixed in one grid only
            mixed = sum(run.stage == "02" for run in task.ancestors()) > 1
            assert ("--allow_mixed" in task.arguments()) == mixed and (name == "pairs" or not mixed)
    cfg.runs, reflow = cfg.folder, ablations.reflow_of()
    before = reflow.folder(cfg, 0)
    assert before == ablations.reflow_of(anneal_steps=180, base=16).folder(cfg, 0)  # as the preset has it
    rows = [("lr", *[1e-3] * 5, "") if row[0] == "lr" else row for row in load_script("01").SETTINGS]
    monkeypatch.setattr(ablations.STAGES["01"], "SETTINGS", rows)  # of the run before the run before
    assert reflow.folder(cfg, 0) != before
    assert ablations.stage("01", mult=(1, 2), flip=False).arguments() == ["--mult=1,2", "--no-flip"]


def test_runs_that_are_done_are_not_made_again_and_parents_come_first(tmp_path, monkeypatch):
    ablations, results, ran, really_run = load_script("ablations"), tmp_path / "results", [], subprocess.run

    def pretend(command, **more):
        if command[0] == "git":
            return really_run(command, **more)
        number, seed, out = command[1].name[:2], command[command.index("--seed") + 1], command[-3]
        ran.append((number, seed))
        for parent in {"02": ("01",), "03": ("02",), "04": ("02", "03")}.get(number, ()):
            assert (out / "shapes" / ablations.MADE[parent]).read_text().endswith(f"seed{seed}")
        rows = [dict(network="student", calls=1, distance=1.0 + len(ran) / 10)]
        text = json.dumps({"protocol": {}, "rows": rows}) if number == "05" else str(out)
        (out / "shapes" / {**ablations.MADE, "05": "05_student.json"}[number]).write_text(text)
        return SimpleNamespace(returncode=int(number == fail))

    monkeypatch.setattr(ablations.subprocess, "run", pretend)
    cfg = settings("ablations", grid="distillation", seeds=2, jobs=2, out=tmp_path, results=results)
    fail = "04"
    with pytest.raises(common.UserError, match="04_flow_guided_distill.py .* failed; see"):
        ablations.main(cfg)
    assert [number for number, _ in ran][:7] == ["01", "01", "02", "02", "03", "03", "04"]
    ran.clear()
    fail = None
    for _ in range(2):  # the second time all is done
        ablations.main(cfg)
        assert len(ran) == 12 + 12 and {seed for number, seed in ran if number == "05"} == {"0"}
    saved = json.loads((results / "distillation.json").read_text())
    assert len(saved["measured"]) == 12 and len(saved["made"]) == 2 * (3 + 6 + 6)


def test_a_straight_path_has_no_deviation_and_a_bent_one_has():
    paths, z, x = load_script("paths"), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    states, ends = paths.follow(Field(lambda x_t, t: x - z), z, 4)
    torch.testing.assert_close(ends, x.expand_as(states))
    assert len(states) == 5 and paths.deviation(states).max() < 1e-6
    bent, _ = paths.follow(Field(lambda x_t, t: (x - z) * 2 * t), z, 50)
    assert paths.deviation(bent).max() == pytest.approx(0.25, abs=0.01)  # t - t^2 of its length, at t = 1/2


def test_the_path_figure_is_drawn_whole(finished, tmp_path):
    paths, path = load_script("paths"), tmp_path / "shapes/paths.png"
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    paths.main(settings("paths", out=tmp_path, steps=3, paths=9, strips=9))
    assert colours_of(path) >= set(paths.COLOURS.values())  # both curves
    figure = Image.open(path).convert("L")
    last = figure.crop((560, figure.height - 100, figure.width, figure.height - 1))
    assert last.getextrema()[0] < 128 and last.crop((0, 90, last.width, 99)).getextrema() == (255, 255)


@pytest.mark.parametrize("classes", [0, 4])
def test_the_exported_student_is_eulers_method(tmp_path, classes):
    cfg, net = settings("export", out=tmp_path, steps=2), common.UNet(**TINY, classes=classes)
    torch.nn.init.normal_(net.conv_out.weight)
    common.save_network(cfg, "04_student.pt", net, {})
    load_script("export").main(cfg)
    z, labels = torch.randn(5, 3, 16, 16), [torch.arange(5) % 4] if classes else []
    made = torch.export.load(tmp_path / "shapes/05_student.pt2").module()(z, *labels)
    torch.testing.assert_close(made, common.euler(net.eval(), z, 2, *labels), atol=1e-4, rtol=1e-4)


def test_real_images_are_compared_by_their_own_classifier(tmp_path, monkeypatch):
    real, (images, attributes) = load_script("real_images"), common.draw_shapes(400, 32)

    def write(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)

    def pretend(runs, cfg):  # the teacher makes some images of the set, the others noise
        for run, key in real.networks(cfg).values():
            assert "'preset': 'cifar10_quick'" in run.depends_on(cfg)  # read_settings takes its arguments
            for i in range(cfg.n_samples):
                noise = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
                image = images[i] if "--teacher_steps=25" in run.arguments() else noise
                write(run.folder(cfg, 0) / f"05_{key}_images/{i}.png", image)
        return {(run, 0): MADE[0] for run in runs}

    for i, image in enumerate(images):
        write(tmp_path / f"set/{int(attributes[i, 0])}/{i}.png", image)
    monkeypatch.setattr(real, "make_all", pretend)
    more = dict(data=tmp_path / "set", out=tmp_path / "out", results=tmp_path / "results")
    real.main(settings("real_images", named="drawings", n_samples=150, judge_steps=3, scale=0.5, **more))
    text = (tmp_path / "results/cifar10_cpu.md").read_text()
    found = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) \|$", text, re.MULTILINE))
    assert text.startswith("drawings, 150 images of each network, 0.5 of the steps") and "commit abc" in text
    assert len(found) == 7 and Image.open(tmp_path / "results/cifar10_cpu.png").width > 500
    assert float(found["teacher, 25 calls"]) < 0.2 * float(found["student, guided, 1 call"])
    with pytest.raises(common.UserError, match="fewer images than twice"):
        real.main(settings("real_images", n_samples=201, **more))
