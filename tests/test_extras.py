"""The README and docs, whose commands all run with small settings. The extras, on a small scale."""
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

# ------------------------------------------------------------------------------- README and docs

README = (ROOT / "README.md").read_text()
DOCS = [path.read_text() for path in sorted(ROOT.glob("docs/*.md"))]
TEXTS = "\n".join([README, *DOCS])

# The scripts whose commands are run: {file: its name in conftest.py}.
RUN = (*TINY, "import", "sample", "fid", "judge", "gif")
NUMBERS = {f"{NAMES[number]}.py": number for number in RUN}
SMALL = {  # settings besides TINY
    "01": dict(blocks=1),
    "03": dict(blocks=1),
    "04": dict(n_pairs=6, pair_steps=1, distance="l2"),
    "05": dict(n_samples=16),
    "import": dict(n_pairs=6, sample_steps=1),
    "sample": dict(n=3),
    "judge": dict(steps=2, widths="4,4", convs="1,1", file="data/judge.pt"),
    "gif": dict(calls=2),
}
LOOP = r"for s in (.*?); do\n  (.*?) \|\| break\ndone"
COMMAND = r"(?:python|torchrun [^`\n]*?) ((?:extras/)?\w+\.py)([^`#\n|&]*)"


def written_out(loop):
    """The commands of a shell loop, one a line."""
    values, command = loop.groups()
    return "\n".join(command.replace("$s", value) for value in values.split())


def commands():
    """Yields (script, its arguments) for each command of the README and docs that is run."""
    text = re.sub(LOOP, written_out, TEXTS)
    for name, words in re.findall(COMMAND, text):
        if name in NUMBERS:
            yield NUMBERS[name], shlex.split(words)


def run_small(number, words):
    """Runs a command with few steps and small networks. CIFAR-10 is not downloaded."""
    small = TINY.get(number, {}) | SMALL.get(number, {})
    cifar10 = any(word.startswith("cifar10") for word in words)
    if number in ("01", "judge") and cifar10 and "--data" not in words:
        small["data"] = "my_images.zip"
    script(number).main(settings_of(number, *words, "--restart", **small))


def test_quoted_code_lines_stand_in_the_scripts():
    """The README quotes lines of the functions as they are."""
    quoted = re.findall(r"`(0\d_\w+\.py)`, `(\w+)`(?: \||:) `(.+?)`", README)
    assert len(quoted) == 4
    for name, function, line in quoted:
        source = (ROOT / name).read_text()
        body = source.split(f"def {function}(")[1].split("\ndef ")[0]
        lines = [text.strip() for text in body.splitlines()]
        assert line in lines, (name, function)


def test_sizes_and_costs_are_those_of_the_settings():
    """The tables state the sizes of the networks and what the presets cost."""
    benchmark = script("benchmark")
    pattern = r"^\| `(\w+)` \| [^|]*\| ([\d.]+)M \| ([\d.]+)M \|"
    rows = re.findall(pattern, README, re.MULTILINE)
    assert [preset for preset, _, _ in rows] == list(common.PRESETS)
    for preset, *sizes in rows:
        classes = 0
        if settings_of("01", preset=preset).conditional:
            classes = 18 if preset == "shapes" else 1000
        for number, size in zip(("01", "03"), sizes):
            with torch.device("meta"):
                net = common.UNet(**benchmark.network_of(number, preset), classes=classes)
            millions = sum(p.numel() for p in net.parameters()) / 1e6
            decimals = len(size.partition(".")[2])
            assert abs(millions - float(size)) <= 0.5 * 10**-decimals, (preset, number)

    for preset in ("cifar10_quick", "cifar10"):
        pattern = rf"^\| `{preset}` \|((?: [\d.]+ \|){{7}})"
        row = re.search(pattern, TEXTS, re.MULTILINE)[1]
        shown = [float(n) for n in row.strip(" |").split("|")]
        counted = [n / 1e18 for n in benchmark.costs(preset)]
        total = sum(counted)
        hours = total * 1e18 / 1.32e14 / 3600
        assert shown == pytest.approx([*counted, total, hours], rel=0.06, abs=0.005)


def test_every_command_runs(tmp_path, monkeypatch):
    """Each command of the README and docs runs."""
    # What a user would have: images, their statistics, and a published checkpoint.
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    save_images(tmp_path / "theirs/cat", images)
    folder = save_images(tmp_path / "theirs/dog", images).parent
    for name in ("my_images", "mine", "cifar10-jpeg"):
        shutil.make_archive(name, "zip", folder)
    np.savez("cifar10-32x32.npz", mu=np.zeros(3), sigma=np.eye(3))
    net = filled(32, base=8, mult=(1, 1, 2), blocks=1)
    layout = script("import").songunet_layout(net)
    torch.save(script("import").export(net, layout), "edm.pt")

    # Three features take the place of Inception's, which test_metrics.py has.
    def mean_colour(images):
        return images.double().mean((2, 3))

    facts = {"metric": "FID", "judge": "stand-in"}
    stand_in = mean_colour, torch.nn.Linear(3, 18), [], facts
    monkeypatch.setattr(script("05"), "feature_network", lambda cfg, device: stand_in)

    found = list(commands())
    assert {number for number, _ in found} == set(NUMBERS.values())
    assert len(found) > 20
    for preset in ("shapes", "cifar10"):  # their artifacts are read by some commands
        for number in TINY:
            run_small(number, ["--preset", preset])
    for number, words in found:
        run_small(number, words)


# ------------------------------------------------------------------------------------ The extras

def test_a_judge_of_ones_own_names_images_and_its_features_measure_them(tmp_path):
    """A judge learns the classes of a folder. Stage 05 compares in its features, under its name."""
    for name, grey in (("black", 0), ("white", 250)):
        noise = torch.randint(6, (30, 3, 8, 8), dtype=torch.uint8)
        save_images(tmp_path / "own" / name, noise + grey)
    small = dict(image_size=8, widths="4,8", convs="1,2", steps=40, batch=16, shift=1, hidden=2,
                 precision="fp32")
    script("judge").main(settings_of("judge", preset="cifar10_quick", data=tmp_path / "own",
                                     file="mine_judge.pt", **small))
    cfg = settings_of("05", out=tmp_path, metric="mine_judge.pt")
    features_of, fc, classes, facts = script("05").feature_network(cfg, torch.device("cpu"))
    assert classes == ["black", "white"]
    assert facts["metric"] == "FD-mine"
    judge = common.read("mine_judge.pt")
    assert judge["accuracy"] == 1
    assert judge["weights"]["fc.weight"].dtype == torch.float16
    images, labels, _ = common.load_data(tmp_path / "own", 8)
    with torch.no_grad():
        features = features_of(images)
        assert torch.equal(fc(features).argmax(1), labels)
        # It was trained on mirrored images, so an image and its mirror image are the same to it.
        assert torch.allclose(features_of(images.flip(3)), features, atol=1e-5)
        features_of, *_ = script("05").feature_network(settings_of("05"), torch.device("cpu"))
        assert not torch.allclose(features_of(images.flip(3)), features_of(images), atol=1e-5)

    # The distance means nothing for images of other classes.
    settings = {"data": "shapes"}
    common.save(cfg.folder / "01_teacher.pt", preset="shapes", id="", made_from={},
                settings=settings)
    with pytest.raises(common.UserError, match="knows other classes than shapes has"):
        script("05").reference_images(cfg, 16, classes)
    with pytest.raises(common.UserError, match="--metric none2: choose fid"):
        script("05").feature_network(settings_of("05", metric="none2"), torch.device("cpu"))


def test_judges_see_shifted_and_mirrored_images():
    """Crops move each image by its own number of pixels; about half of them are mirrored."""
    x = torch.arange(10.0).expand(200, 3, 10, 10)  # columns 0 to 9
    moved = script("judge").shifted(x, 2)[:, :, :, 2:8]
    steps = moved[0].new_tensor([row[0, 0, 1] - row[0, 0, 0] for row in moved])
    mirrored = (steps == -1).float().mean()
    assert 0.35 < mirrored < 0.65
    firsts = {int(row[0, 0, 0]) for row in moved[steps == 1]}
    assert {0, 1, 2, 3, 4} >= firsts
    assert len(firsts) == 5
    assert torch.equal(moved[:, 0], moved[:, 2])


def test_a_judges_later_convolutions_add_to_what_is_there():
    """If the second convolution of a level gives 0, the features are those of the first."""
    Judge = script("05").Judge
    judge, first = Judge(2, (4, 6), (1, 2), False).eval(), Judge(2, (4, 6), (1, 1), False).eval()
    first.load_state_dict({key: judge.state_dict()[key] for key in first.state_dict()})
    x = torch.randn(5, 3, 8, 8)
    assert not torch.allclose(judge(x), first(x))
    judge.levels[1][1].conv.weight.data.zero_()
    assert torch.equal(judge(x), first(x))


def test_a_judge_does_not_see_a_square_of_each_image():
    """The square has the same place in all channels, another one in each image."""
    seen = script("judge").partly_hidden(torch.ones(200, 3, 10, 10), 3)
    assert torch.equal(seen[:, 0], seen[:, 2])
    sizes, places = set(), set()
    for hidden in seen[:, 0] == 0:
        rows, columns = hidden.any(1), hidden.any(0)
        assert torch.equal(hidden, rows[:, None] & columns)
        sizes.add((int(rows.sum()), int(columns.sum())))
        places.add((int(rows.int().argmax()), int(columns.int().argmax())))
    assert max(sizes) == (3, 3)
    assert min(sizes) == (1, 1)  # the others end at the border
    assert len(places) > 50


def test_the_animation_shows_what_euler_sees(tmp_path):
    """Its frames are the states of the sampler: the noise, one more call each, the image."""
    gif, net = script("gif"), filled(16, base=8, mult=(1,), blocks=1, attn=())
    z = torch.randn(12, *net.shape)
    found = gif.states(net, z, 3, None)
    assert len(found) == 4
    assert torch.equal(found[0], z)
    assert torch.equal(found[3], common.euler(net, z, 3))
    gif.animate(tmp_path / "calls.gif", found, gif.states(net, z, 1, None))
    with Image.open(tmp_path / "calls.gif") as image:
        assert image.n_frames == 4


TINY_NET = dict(
    image_size=16,
    base=8,
    mult=(1, 2),
    blocks=1,
    attn=(8,),
)


def test_on_two_coordinates_reflow_straightens_paths_and_guidance_helps_where_pairs_are_few(
        monkeypatch):
    """Reflow straightens paths, and with few pairs guidance makes a student better."""
    toy, distill = script("toy2d"), script("04")
    monkeypatch.setattr(toy, "STEPS", 600)
    monkeypatch.setattr(toy.ANNEALING, "anneal_steps", 200)
    teacher, (z, x), flow, _ = toy.chain()
    z, x = z[:4], x[:4]  # few pairs
    fresh = torch.randn(1000, 2, 1, 1)

    def student_of(guidance):
        student = copy.deepcopy(flow)

        def loss(step):
            z_new = torch.randn(256, 2, 1, 1)
            t = 0.2 + 0.6 * torch.rand(256)
            v_new = distill.first_velocity(student, z_new)
            guided = distill.guided_loss(v_new, flow, z_new, t, distill.squared_l2)
            v = distill.first_velocity(student, z)
            return distill.distill_loss(v, z, x, distill.squared_l2) + guidance * guided

        return toy.train(student, loss)

    @torch.no_grad()
    def bend(net):
        """How far paths are from the line between their ends, as a share of its length."""
        places = toy.path(net, fresh, 20)
        line = places[-1] - places[0]
        t = torch.linspace(0, 1, 21).view(21, 1, 1, 1, 1)
        away = places - places[0] - t * line
        farthest = away.norm(dim=2).amax(0)
        return (farthest / line.norm(dim=1)).mean().item()

    @torch.no_grad()
    def error(net):
        """How far the images of one call are from those of the teacher."""
        made = toy.path(net, fresh, 1)[-1]
        target = toy.path(teacher, fresh)[-1]
        return (made - target).square().mean().item()

    # In 5 seeds the flow had errors of 0.10 to 0.15, students 0.07 to 0.19, guided 0.02 to 0.03.
    guided = error(student_of(1))
    alone = error(student_of(0))
    assert guided < 0.6 * alone
    assert guided < 0.5 * error(flow)
    assert error(flow) < 0.5 * error(teacher)
    assert bend(flow) < 0.6 * bend(teacher)  # 0.016 and 0.05

    # Without annealing, reflow is stage 01's regression, on pairs.
    t = torch.rand(4)
    b = script("03").beta(0, SimpleNamespace(schedule="none"))
    reflow_loss = script("03").reflow_loss(flow, z, x, t, b)
    assert torch.equal(reflow_loss, script("01").flow_loss(flow, z, x, t))

    monkeypatch.setattr(toy, "STEPS", 5)
    toy.main("toy.png")
    assert Image.open("toy.png").width > 1000


def test_a_row_of_the_benchmark_shows_what_was_measured_and_ends_with_what_failed(
        monkeypatch, capsys):
    """A row has a cell for each measurement. A failure is its last cell."""
    def once(call, device):
        call()
        return 1.0

    def broken(net, **how):
        raise ValueError("no compiler\nand more")

    benchmark = script("benchmark")
    monkeypatch.setattr(benchmark, "seconds", once)
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(common, "SAVE_SECONDS", common.SAVE_SECONDS)  # a row changes it
    for kind in ("fp32", "bf16", "bf16 compiled"):
        benchmark.row("tiny", TINY_NET, kind, 4, "cpu", 1e12, ".")
    lines = capsys.readouterr().out.splitlines()
    fp32, bf16, compiled = [line.strip("| ").split(" | ") for line in lines]
    assert len(fp32) == len(bf16) == len(benchmark.CELLS)
    assert fp32[:2] == ["tiny", "fp32"]
    assert fp32[3:5] == ["1000.0", "4"]
    assert fp32[8:12] == ["1000.0", "39,062", "1000.0", "1.00"]
    assert bf16[:2] == ["tiny", "bf16"]
    assert bf16[10:] == ["-"] * 3
    assert compiled == ["tiny", "bf16 compiled", "no compiler"]


def run_of(distance):
    """What is kept of a run of stage 05. The row of one call is the one that is compared."""
    rows = [
        dict(network="student", calls=2, distance=distance + 97),
        dict(network="student", calls=1, distance=distance),
    ]
    return dict(origin="here", seconds=600, rows=rows, protocol={"judge": "j"})


GAINS = {  # verdict: (the gains of three seeds, what the table says)
    "shown": ((0.3, 0.4, 0.5), "+0.400 ± 0.248 | shown"),  # 0.4 -+ 4.30 x 0.1 / sqrt 3
    "not shown": ((0.4, -0.5, 0.3), "not shown"),
    "opposite": ((-0.3, -0.4, -0.5), "opposite"),
}


@pytest.mark.parametrize("gains, expected", GAINS.values(), ids=GAINS)
def test_a_verdict_needs_an_interval_on_one_side_of_zero(gains, expected):
    """A claim counts as shown only if the whole confidence interval supports it."""
    ablations = script("ablations")
    variants = {name: (name, "student", 1) for name in "ab"}
    grid = ablations.Grid("Title", variants)
    grid.claim("b is better", "b", "a")
    made = {}
    for seed, gain in enumerate(gains):
        made["a", seed] = run_of(2.0 + seed)
        made["b", seed] = run_of(2.0 + seed - gain)
    values = ablations.values_of(grid, made, 3)
    text = "\n".join(ablations.table(grid, values, made.values()))
    assert "| a | 3.000 ± 1.000 |" in text
    assert "6 runs, one after the other 1.0 hours" in text
    assert re.search(rf"\| b is better \|.*{re.escape(expected)} \|", text)


def test_the_exported_student_is_eulers_method(tmp_path):
    """The exported file makes the images that Euler's method makes, with any batch size."""
    cfg = settings_of("export", out=tmp_path, steps=2)
    net = filled(**TINY_NET, classes=4)
    common.save_network(cfg, "04_student.pt", net, {})
    script("export").main(cfg)
    z = torch.randn(5, 3, 16, 16)
    labels = torch.arange(5) % 4
    exported = torch.export.load(tmp_path / "shapes/05_student.pt2").module()
    images = common.euler(net, z, 2, labels)
    torch.testing.assert_close(exported(z, labels), images, atol=1e-4, rtol=1e-4)
