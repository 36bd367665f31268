"""On a GPU: precision, CUDA graphs, all five stages. Skipped where there is none."""
import itertools
import shutil
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

import common
from conftest import artifact, call, filled, refused, script, settings_of
from test_metrics import weights_for
from test_network import in_double

DEVICE = "cuda"  # "cpu", and no pytestmark: tries what a CPU can, with torch's compiler for CPUs
mode = torch.cuda.set_sync_debug_mode if DEVICE == "cuda" else str  # "error": waiting for the GPU is one
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
# One network and one size of a call for all: each kind of call takes its time to compile.
TRAINING = dict(steps=20, optimizer="adam", lr=1e-3, warmup=0)
NET = dict(TRAINING, base=8, mult="1", attn="8", dropout=0, batch=8)
SMALL = {"01": NET, "02": dict(n_pairs=24, sample_steps=3), "03": NET, "04": dict(TRAINING, batch=4),
         "05": dict(n_samples=120, teacher_steps=2, flow_steps=2)}


def run(number, out, *flags, **settings):
    call(number, out, *flags, **{**SMALL[number], "device": DEVICE, "precision": "bf16", **settings})


def error_of(found, expected):
    return ((found.cpu().double() - expected.cpu()).norm() / expected.cpu().double().norm()).item()


@torch.no_grad()
def test_the_network_and_inception_are_as_exact_as_their_precision():
    args = dict(image_size=16, base=32, mult=(1, 2), attn=(8,))
    x, t, net = torch.randn(8, 3, 16, 16), torch.rand(8), filled(**args).to(DEVICE)
    expected, given = in_double(filled(**args))(x.double(), t), (x.to(DEVICE), t.to(DEVICE))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert error_of(net(*given), expected) < 1e-5
    assert error_of(net(*given), expected) < 2e-3  # torch's fp32: TF32
    net.precision = "bf16"
    assert error_of(net(*given), expected) < 3e-2
    s, images = script("05"), torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    inception = s.Inception().eval()
    inception.load_state_dict(weights_for(inception.state_dict()), strict=False)
    found = s.inception_features(inception.to(DEVICE), images.to(DEVICE))
    inception.cpu().double().register_forward_pre_hook(lambda net, given: given[0].double())
    assert error_of(found, s.inception_features(inception, images)) < 1e-5  # always strict


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(stage, --compile): (losses, how far the weights moved, folder)}, from the same files."""
    def draw(trainer, *tensors):
        weights.append(torch.cat([p.detach().flatten() for p in trainer.weights]))
        mode("error" if trainer.done else "default")  # to the end of the step nothing may wait
        return real[0](trainer, *tensors)

    def update(trainer, loss, **more):
        real[1](trainer, loss, **more)
        mode("default")
        losses.append(loss.detach().clone())

    found, plain = {}, tmp_path_factory.mktemp("plain")
    real = common.Trainer.draw, common.Trainer.update
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(common.Trainer, "draw", draw)
        patch.setattr(common.Trainer, "update", update)
        patch.setattr(script("02"), "sampling_batch", lambda net: 4)
        for number, compile in itertools.product(("01", "02", "03", "04"), ("off", "on")):
            losses, weights, out = [], [], plain
            if compile == "on":
                out = tmp_path_factory.mktemp("compiled")
                shutil.copytree(plain / "shapes", out / "shapes")
            run(number, out, "--restart", compile=compile)
            found[number, compile] = losses, weights and weights[-1] - weights[0], out
    assert not [each for each in said if "uninvoked backward" in str(each.message)]
    assert DEVICE == "cpu" or counters["inductor"]["cudagraph_skips"] == 0
    return found


@pytest.mark.parametrize("number", ["01", "03", "04"])
def test_compiled_steps_are_those_that_are_not_compiled(runs, number):
    (losses, moved, _), (others, moved_too, _) = runs[number, "off"], runs[number, "on"]
    torch.testing.assert_close(torch.stack(others), torch.stack(losses), rtol=2e-2, atol=0)
    assert error_of(moved_too, moved) < 0.2  # on a CPU 0.03 at most


def test_a_compiled_run_continues_where_it_stopped(runs, tmp_path, monkeypatch):
    steps = common.Trainer.steps
    monkeypatch.setattr(common, "SAVE_SECONDS", -1)
    with monkeypatch.context() as patch:  # the last state is that of the eleventh step
        patch.setattr(common.Trainer, "steps", lambda trainer: itertools.islice(steps(trainer), 12))
        run("01", tmp_path, compile="on")
    run("01", tmp_path, compile="on")
    states = [artifact(out, "01_state.pt") for out in (runs["01", "on"][2], tmp_path)]
    torch.testing.assert_close(*(state["weights"] for state in states), rtol=1e-2, atol=1e-3)


def test_a_compiled_network_has_other_masks_for_another_seed():  # each step has one of its own
    net = filled(16, 0.1, base=8, mult=(1,), blocks=1, classes=18, dropout=0.5, precision="bf16")
    net, answers = net.to(DEVICE).train(), []
    fast = common.compiled(settings_of("01", "--compile=on"), net, 1, 8, training=True)
    x, t = torch.randn(8, 3, 16, 16, device=DEVICE), torch.rand(8, device=DEVICE)
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        velocity = fast(x, t, torch.arange(8, device=DEVICE))
        velocity.square().mean().backward()
        net.zero_grad()
        answers.append(velocity.detach().clone())
    assert torch.equal(answers[0], answers[2]) and error_of(answers[1], answers[0]) > 0.1


def test_sampling_compiled_05_and_refusals_in_one_line(runs, monkeypatch):
    out, again = (runs["02", compile][2] for compile in ("off", "on"))
    x, others = (artifact(folder, "02_pairs.pt")["x"] for folder in (out, again))
    assert error_of(others, x) < 3e-2
    monkeypatch.setattr(script("05"), "sampling_batch", lambda net: 4)
    run("05", out)
    run("05", out, only="student", compile="on")
    run("sample", out, n=5, label="red triangle")
    assert len(list((out / "shapes/student_images").glob("*.png"))) == 5
    (out / "shapes/01_teacher.pt").write_bytes(b"damaged")
    assert "01_teacher.pt is damaged" in refused("02", out, "--restart", device=DEVICE)
    if DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(1e-4)
        line = refused("01", out, "--restart", device=DEVICE, batch=4096)
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert "out of GPU memory" in line
