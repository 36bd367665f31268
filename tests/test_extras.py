"""README and docs, whose commands all run (small and short); the extras, without the hours that some take."""
import copy
import re
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import NAMES, ROOT, TINY, filled, save_images, script, settings_of

README = (ROOT / "README.md").read_text()
TEXTS = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
NUMBERS = {f"{name}.py": number for number, name in NAMES.items() if number in (*TINY, "import", "sample", "fid")}
SMALL = {"01": {"blocks": 1}, "03": {"blocks": 1}, "04": dict(n_pairs=6, pair_steps=1, distance="l2"),
         "import": dict(n_pairs=6, sample_steps=1), "sample": dict(n=3)}  # besides TINY


def test_quoted_code_lines_stand_in_the_scripts():
    quoted = re.findall(r"`(0\d_\w+\.py)`, `(\w+)`(?: \||:) `(.+?)`", README)
    assert len(quoted) == 4
    for name, function, line in quoted:
        body = (ROOT / name).read_text().split(f"def {function}(")[1].split("\ndef ")[0]
        assert line in [text.strip() for text in body.splitlines()], (name, function)


def test_sizes_and_costs_are_those_of_the_settings():
    rows = re.findall(r"^\| `(\w+)` \| [^|]*\| ([\d.]+)M \| ([\d.]+)M \|", README, re.MULTILINE)
    assert [name for name, *_ in rows] == list(common.PRESETS)
    for preset, *sizes in rows:
        data = settings_of("01", preset=preset)
        classes = (18 if preset == "shapes" else 1000) if data.conditional else 0
        for number, size in zip(("01", "03"), sizes):
            cfg = settings_of(number, preset=preset)
            with torch.device("meta"):
                net = common.UNet(data.image_size, 3, cfg.base, cfg.mult, cfg.blocks, cfg.attn, classes)
            millions = sum(p.numel() for p in net.parameters()) / 1e6
            assert abs(millions - float(size)) <= 0.5 * 10 ** -len(size.partition(".")[2]), (preset, number)
    for preset in ("cifar10_quick", "cifar10"):
        row = re.search(rf"^\| `{preset}` \|((?: [\d.]+ \|){{7}})", TEXTS, re.MULTILINE)[1]
        counted = [n / 1e18 for n in script("benchmark").costs(preset)]
        expected = [*counted, sum(counted), sum(counted) * 1e18 / 1.32e14 / 3600]  # the last: hours
        assert [float(n) for n in row.strip(" |").split("|")] == pytest.approx(expected, rel=0.06, abs=0.005)


def test_every_command_runs(tmp_path, monkeypatch):
    # What a user would have: images, their statistics, a published checkpoint. (CIFAR-10 is not downloaded.)
    save_images(tmp_path / "theirs", torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8))
    for name in ("my_images", "mine"):
        shutil.make_archive(str(tmp_path / name), "zip", tmp_path / "theirs")
    np.savez(tmp_path / "cifar10-32x32.npz", mu=np.zeros(3), sigma=np.eye(3))
    net = filled(32, base=8, mult=(1, 1, 2), blocks=1)
    torch.save(script("import").export(net, script("import").songunet_layout(net)), tmp_path / "edm.pt")
    # Three features in place of Inception's, which test_metrics.py has.
    stand_in = lambda images: images.double().mean((2, 3)), torch.nn.Linear(3, 18), "FID", "stand-in"
    monkeypatch.setattr(script("05"), "feature_network", lambda cfg, device: stand_in)
    text = re.sub(r"for s in (.*?); do\n  (.*?) \|\| break\ndone",  # loops are written out
                  lambda loop: "\n".join(loop[2].replace("$s", s) for s in loop[1].split()), TEXTS)
    found = re.findall(r"(?:python|torchrun [^`\n]*?) ((?:extras/)?\w+\.py)([^`#\n|&]*)", text)
    found = [(NUMBERS[name], shlex.split(words)) for name, words in found if name in NUMBERS]
    assert {number for number, _ in found} == set(NUMBERS.values()) and len(found) > 20
    made = [(number, ["--preset", preset]) for preset in ("shapes", "cifar10") for number in TINY]  # is read
    for number, words in made + found:
        small = {**TINY.get(number, {}), **SMALL.get(number, {})}
        if number == "01" and "--data" not in words and any(word.startswith("cifar10") for word in words):
            small["data"] = "my_images.zip"
        script(number).main(settings_of(number, *words, "--restart", **small))


# ------------------------------------------------------------------------------------------------ The extras

TINY_NET = dict(image_size=16, base=8, mult=(1, 2), blocks=1, attn=(8,))


def test_on_two_coordinates_reflow_straightens_paths_and_guidance_helps_where_pairs_are_few(monkeypatch):
    toy, s = script("toy2d"), script("04")
    monkeypatch.setattr(toy, "STEPS", 600)
    monkeypatch.setattr(toy, "ANNEALING", SimpleNamespace(schedule="linear", anneal_steps=200))
    teacher, (z, x), flow, _ = toy.chain()
    z, x, fresh = z[:4], x[:4], torch.randn(1000, 2, 1, 1)  # few pairs

    def student_of(guidance):
        student = copy.deepcopy(flow)

        def loss(step):
            z_new, t = torch.randn(256, 2, 1, 1), 0.2 + 0.6 * torch.rand(256)
            guided = s.guided_loss(s.first_velocity(student, z_new), flow, z_new, t, s.squared_l2)
            return s.distill_loss(s.first_velocity(student, z), z, x, s.squared_l2) + guidance * guided
        return toy.train(student, loss)

    @torch.no_grad()
    def bend(net):
        """How far paths are from the line between their ends, as a share of its length."""
        places, t = toy.path(net, fresh, 20), torch.linspace(0, 1, 21).view(-1, 1, 1, 1, 1)
        line = places[-1] - places[0]
        return ((places - places[0] - t * line).norm(dim=2).amax(0) / line.norm(dim=1)).mean().item()

    @torch.no_grad()
    def error(net):
        return (toy.path(net, fresh, 1)[-1] - toy.path(teacher, fresh)[-1]).square().mean().item()

    # Of 5 seeds: errors of the flow 0.10 to 0.15, of students 0.07 to 0.19, guided 0.02 to 0.03.
    guided, alone = error(student_of(1)), error(student_of(0))
    assert guided < 0.6 * alone and guided < 0.5 * error(flow) and error(flow) < 0.5 * error(teacher)
    assert bend(flow) < 0.6 * bend(teacher)  # 0.016 and 0.05
    # Without annealing, reflow is stage 01's regression, on pairs.
    t, none = torch.rand(4), script("03").beta(0, SimpleNamespace(schedule="none"))
    assert torch.equal(script("03").reflow_loss(flow, z, x, t, none), script("01").flow_loss(flow, z, x, t))
    monkeypatch.setattr(toy, "STEPS", 5)
    toy.main("toy.png")
    assert Image.open("toy.png").width > 1000


def test_a_row_of_the_benchmark_shows_what_was_measured_and_ends_with_what_failed(monkeypatch, capsys):
    def broken(net, **how):
        raise ValueError("no compiler\nand more")

    benchmark = script("benchmark")
    monkeypatch.setattr(benchmark, "seconds", lambda call, device: (call(), 1.0)[1])
    monkeypatch.setattr(common, "SAVE_SECONDS", common.SAVE_SECONDS)  # a row changes these two
    monkeypatch.setattr(torch, "compile", broken)
    for kind in ("fp32", "bf16", "bf16 compiled"):
        benchmark.row("tiny", TINY_NET, kind, 4, "cpu", 1e12, ".")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [len(row) for row in rows] == [len(benchmark.CELLS)] * 2 + [3]
    assert [row[:2] for row in rows[:2]] == [["tiny", "fp32"], ["tiny", "bf16"]]
    assert rows[0][3:5] == ["1000.0", "4"] and rows[0][8:12] == ["1000.0", "39,062", "1000.0", "1.00"]
    assert rows[1][10:] == ["-"] * 3 and rows[2] == ["tiny", "bf16 compiled", "no compiler"]


@pytest.mark.parametrize("gains, expected", [
    ((0.3, 0.4, 0.5), "+0.400 ± 0.248 | shown"),  # 0.4 -+ 4.30 x 0.1 / sqrt 3
    ((0.4, -0.5, 0.3), "not shown"), ((-0.3, -0.4, -0.5), "opposite")])
def test_a_verdict_needs_an_interval_on_one_side_of_zero(gains, expected):
    ablations, made = script("ablations"), {}
    grid = ablations.Grid("Title", {name: (name, "student", 1) for name in "ab"})
    for seed, gain in enumerate(gains):
        for name, distance in (("a", 2.0 + seed), ("b", 2.0 + seed - gain)):
            rows = [dict(network="student", calls=n, distance=distance + 97 * (n - 1)) for n in (2, 1)]
            made[name, seed] = dict(origin="here", seconds=600, rows=rows, protocol={"judge": "j"})
    grid.claim("b is better", "b", "a")
    text = "\n".join(ablations.table(grid, ablations.values_of(grid, made, 3), made.values()))
    assert "| a | 3.000 ± 1.000 |" in text and "6 runs, one after the other 1.0 hours" in text
    assert re.search(rf"\| b is better \|.*{re.escape(expected)} \|", text)


def test_the_exported_student_is_eulers_method(tmp_path):
    cfg, net = settings_of("export", out=tmp_path, steps=2), filled(**TINY_NET, classes=4)
    common.save_network(cfg, "04_student.pt", net, {})
    script("export").main(cfg)
    z, labels = torch.randn(5, 3, 16, 16), torch.arange(5) % 4
    made = torch.export.load(tmp_path / "shapes/05_student.pt2").module()(z, labels)
    torch.testing.assert_close(made, common.euler(net, z, 2, labels), atol=1e-4, rtol=1e-4)
