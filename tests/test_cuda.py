"""On a GPU: precision, CUDA graphs, all five stages. Skipped where there is none."""
import itertools
import shutil
from warnings import catch_warnings

import pytest
import torch

import common
from conftest import artifact, call, filled, refused, script, settings_of
from test_metrics import weights_for
from test_network import in_double

DEVICE = "cuda"  # "cpu", and no pytestmark: tries what a CPU can, with torch's compiler for CPUs
mode = torch.cuda.set_sync_debug_mode if DEVICE == "cuda" else str  # "error": nothing may wait
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = dict(device=DEVICE, precision="bf16")
TRAINING = dict(steps=20, optimizer="adam", lr=1e-3, warmup=0)
NET = dict(TRAINING, base=8, mult="1", attn="8", dropout=0, batch=8)
PAIRS, STUDENT = dict(n_pairs=24, sample_steps=3), dict(TRAINING, batch=4)
SMALL = {"01": NET, "02": PAIRS, "03": NET, "04": STUDENT, "05": {}}  # each size compiles anew


def run(number, out, *flags, **settings):
    call(number, out, *flags, **GPU, **SMALL[number], **settings)


def error_of(found, expected):
    expected = expected.cpu().double()
    return ((found.cpu() - expected).norm() / expected.norm()).item()


def test_the_network_and_inception_are_as_exact_as_their_precision():
    """Each precision is as exact as its bits allow, and Inception always has those of float32."""
    args = dict(image_size=16, base=32, mult=(1, 2), attn=(8,))
    net, exact = filled(**args).to(DEVICE).requires_grad_(False), in_double(filled(**args))
    x, t = torch.randn(8, 3, 16, 16), torch.rand(8)
    expected, given = exact(x.double(), t), (x.to(DEVICE), t.to(DEVICE))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert error_of(net(*given), expected) < 1e-5
    assert error_of(net(*given), expected) < 2e-3  # torch's fp32: TF32
    net.precision = "bf16"
    assert error_of(net(*given), expected) < 3e-2
    s, images = script("05"), torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    inception = s.Inception().eval()
    state = inception.state_dict()
    inception.load_state_dict({**state, **weights_for(state)})
    found = s.inception_features(inception.to(DEVICE), images.to(DEVICE))
    inception.cpu().double().register_forward_pre_hook(lambda net, given: given[0].double())
    assert error_of(found, s.inception_features(inception, images)) < 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(stage, --compile): (losses, how far the weights moved, folder)}, from the same files."""
    def watched_draw(trainer, *tensors):
        weights.append(torch.nn.utils.parameters_to_vector(trainer.weights).detach())
        mode("error" if trainer.done else "default")  # to the end of the step nothing may wait
        return draw(trainer, *tensors)

    def watched_update(trainer, loss, **more):
        update(trainer, loss, **more)
        mode("default")
        losses.append(loss.detach().clone())
    found, plain = {}, tmp_path_factory.mktemp("plain")
    draw, update = common.Trainer.draw, common.Trainer.update
    with pytest.MonkeyPatch.context() as patch, catch_warnings(record=True, action="always") as log:
        patch.setattr(common.Trainer, "draw", watched_draw)
        patch.setattr(common.Trainer, "update", watched_update)
        patch.setattr(script("02"), "sampling_batch", lambda net: 4)
        for number, compile in itertools.product(("01", "02", "03", "04"), ("off", "on")):
            losses, weights, out = [], [], plain
            if compile == "on":
                out = shutil.copytree(plain, tmp_path_factory.mktemp("compiled") / "out")
            run(number, out, "--restart", compile=compile)
            found[number, compile] = losses, weights and weights[-1] - weights[0], out
    assert not any("uninvoked backward" in str(warning.message) for warning in log)
    assert DEVICE == "cpu" or torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    return found


@pytest.mark.parametrize("number", ["01", "03", "04"])
def test_compiled_steps_are_those_that_are_not_compiled(runs, number):
    """Compiling changes losses and weights by rounding only."""
    (losses, moved, _), (same_losses, same_moved, _) = runs[number, "off"], runs[number, "on"]
    torch.testing.assert_close(same_losses, losses, rtol=2e-2, atol=0)
    assert error_of(same_moved, moved) < 0.2  # on a CPU 0.03 at most


def test_a_compiled_run_continues_where_it_stopped(runs, tmp_path, monkeypatch):
    """A compiled run that was stopped ends as the unbroken one did."""
    steps = common.Trainer.steps
    monkeypatch.setattr(common, "SAVE_SECONDS", -1)
    with monkeypatch.context() as patch:  # the last state is that of the eleventh step
        patch.setattr(common.Trainer, "steps", lambda self: itertools.islice(steps(self), 12))
        run("01", tmp_path, compile="on")
    run("01", tmp_path, compile="on")
    whole, found = (artifact(out, "01_state.pt") for out in (runs["01", "on"][2], tmp_path))
    torch.testing.assert_close(found["weights"], whole["weights"], rtol=1e-2, atol=1e-3)


def test_a_compiled_network_has_other_masks_for_another_seed():
    """A recorded step draws its dropout anew. (In training each step has a seed of its own.)"""
    net = filled(16, 0.1, base=8, mult=(1,), blocks=1, classes=18, dropout=0.5, precision="bf16")
    net, answers = net.to(DEVICE).train(), []
    fast = common.compiled(settings_of("01", "--compile=on"), net, 1, 8, training=True)
    x, t, labels = torch.randn(8, 3, 16, 16), torch.rand(8), torch.arange(8)
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        velocity = fast(x.to(DEVICE), t.to(DEVICE), labels.to(DEVICE))
        velocity.square().mean().backward()
        net.zero_grad()
        answers.append(velocity.detach().clone())
    assert torch.equal(answers[0], answers[2]) and error_of(answers[1], answers[0]) > 0.1


def test_sampling_compiled_05_and_refusals_in_one_line(runs, monkeypatch):
    """A GPU makes the same pairs when compiled, evaluates, samples, and refuses in one line."""
    out, again = runs["02", "off"][2], runs["02", "on"][2]
    assert error_of(artifact(again, "02_pairs.pt")["x"], artifact(out, "02_pairs.pt")["x"]) < 3e-2
    monkeypatch.setattr(script("05"), "sampling_batch", lambda net: 4)
    run("05", out)
    run("05", out, only="student", compile="on")
    script("sample").main(settings_of("sample", out=out, n=5, label="red triangle", **GPU))
    assert len(list((out / "shapes/student_images").glob("*.png"))) == 5
    (out / "shapes/01_teacher.pt").write_bytes(b"damaged")
    assert "01_teacher.pt is damaged" in refused("02", out, "--restart", device=DEVICE)
    if DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(1e-4)
        assert "out of GPU memory" in refused("01", out, "--restart", device=DEVICE, batch=4096)
        torch.cuda.set_per_process_memory_fraction(1.0)
