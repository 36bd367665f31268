"""What stages 01, 03 and 04 hand to their losses, step by step, in tiny runs with dropout."""
import inspect
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
from common import EPS, OWN_PAIRS, PAIRS, from_uint8, noise_for
from conftest import artifact, call, same, script
from extras.drawings import draw_shapes

LOSSES = {
    "01": ["flow_loss"],
    "03": ["reflow_loss"],
    "04": ["first_velocity", "distill_loss", "guided_loss"]}


def watch(patch, owner, name):
    """Replaces a function by one that calls it, and returns the list of its calls.

    A call is a dict: the arguments, the result, and the state of the random generator before it.
    """
    function = getattr(owner, name)
    names = []
    if owner is not torch:
        names = list(inspect.signature(function).parameters)
    calls = []

    def watched(*given, **more):
        call = {"state": torch.get_rng_state().numpy().tobytes(), **more}
        for key, value in zip(names, given):
            call[key] = value
            if torch.is_tensor(value):
                call[key] = value.clone()
            if isinstance(value, torch.nn.Module):
                call[f"{key} trains"] = value.training
        call["result"] = function(*given, **more)
        calls.append(call)
        return call["result"]

    patch.setattr(owner, name, watched)
    return calls


def copy_of(finished, folder):
    """A folder with all artifacts and states of the finished run."""
    shutil.copytree(finished / "shapes", folder / "shapes")
    return folder


def recorded(number, finished, tmp_path, *flags, **settings):
    """Runs a stage, and returns the calls of its losses and of Trainer.update, by name."""
    copy_of(finished, tmp_path)
    watched = [
        (common.Trainer, "update"),
        (torch.nn.functional, "dropout"),
        (torch, "rand"),
        (torch, "randn"),
        (torch, "randn_like")]
    watched += [(script(number), name) for name in LOSSES[number]]
    with pytest.MonkeyPatch.context() as patch:
        calls = {name: watch(patch, owner, name) for owner, name in watched}
        call(number, tmp_path, "--restart", *flags, **settings)
    # Only what is trained drops out.
    for name in LOSSES[number]:
        for step in calls[name]:
            assert step.get("net trains", True)
            assert not step.get("flow trains")
    for step in calls["update"]:
        assert step["self"].trained.training
        assert not step["self"].ema.training
    no_random_number_is_used_twice(calls, settings["steps"])
    return calls


def no_random_number_is_used_twice(calls, steps):
    """The generator has another state before each draw and each dropout."""
    masks = [call for call in calls["dropout"] if call["training"] and call["p"] == 0.5]
    drawn = [*calls["rand"], *calls["randn"], *calls["randn_like"]]
    assert len(masks) >= 8 * steps
    assert len(drawn) >= steps
    states = {call["state"] for call in masks + drawn}
    assert len(states) == len(masks) + len(drawn)


def joined(calls, *names):
    """The arguments of these names, each as one tensor of all calls."""
    tensors = []
    for name in names:
        tensors.append(torch.cat([call[name] for call in calls]))
    return tensors


def matches(given, kept):
    """Which are equal, bit by bit: bool (len(given), len(kept))."""
    return (given[:, None] == kept.float()).flatten(2).all(2)


@pytest.mark.parametrize("number, flags, flips, moments", [  # mean and deviation of t
    ("01", ["--t_distribution=uniform"], True, (0.5, 0.289)),
    ("03", ["--t_distribution=uniform", "--schedule=linear"], True, (0.5, 0.289)),
    ("01", ["--t_distribution=logit_normal", "--no-flip"], False, (0.5, 0.208)),
    ("03", ["--t_distribution=early", "--schedule=none", "--no-flip"], False, (0.333, 0.298))])
def test_01_hands_over_images_and_03_pairs_half_of_them_mirrored_with_their_labels(
        finished, tmp_path, number, flags, flips, moments):
    """Each loss gets what its equation names, in rows that belong together, at fresh times t."""
    loss, = LOSSES[number]
    calls = recorded(number, finished, tmp_path, *flags, steps=25)[loss]
    z, x, t, y = joined(calls, "z", "x", "t", "labels")

    # 1. The times.
    found = t.mean().item(), t.std().item()
    assert found == pytest.approx(moments, abs=0.05)
    assert t.min() >= EPS
    assert len(t.unique()) > 190

    # 2. Each x is one of the images, or the mirror image of one.
    pairs = artifact(finished, "02_pairs.pt")
    if number == "01":
        images, labels = draw_shapes(500, 16)
        kept, seen = from_uint8(images), 120
    else:
        kept, labels, seen = pairs["x"], pairs["labels"], 35
    plain, mirrored = matches(x, kept), matches(x.flip(3), kept)
    either = plain | mirrored
    assert (either.sum(1) == 1).all()
    found = either.int().argmax(1)
    assert len(found.unique()) > seen
    assert torch.equal(y, labels[found])

    # 3. Half of them are mirrored, each on its own and not a whole batch.
    if flips:
        assert abs(mirrored.sum() - 100) <= 40
        assert mirrored.view(25, -1).any(1).sum() > 20
    else:
        assert mirrored.sum() == 0

    # 4. The noise: fresh in 01, that of the pair in 03, where it is mirrored with the image.
    if number == "01":
        assert abs(z.std() - 1) < 0.01
        assert abs((z * x).mean()) < 0.02
        assert len(z.unique(dim=0)) == 200
        return
    assert torch.equal(plain, matches(z, pairs["z"]))
    assert torch.equal(mirrored, matches(z.flip(3), pairs["z"]))
    annealed = [0, 0, 0]
    if flips:  # then the schedule is linear
        annealed = [1, 2 / 3, 1 / 3]
    assert [call["b"] for call in calls] == pytest.approx(annealed + [0] * 22)


@pytest.mark.parametrize("source, file, first, guidance", [
    ("teacher", "02_pairs.pt", PAIRS, 0.5),
    ("flow", "04_pairs.pt", OWN_PAIRS, 1)])
def test_stage_04_hands_over_pairs_and_fresh_noise_and_weighs(
        finished, tmp_path, source, file, first, guidance):
    """L_distill gets pairs, L_2step gets fresh noise, and guidance is the weight of L_2step."""
    calls = recorded("04", finished, tmp_path, pairs_from=source, n_pairs=40, pair_steps=2,
                     t_low=0.3, t_high=0.4, guidance=guidance, steps=6, lr=0.05)

    # 1. The pairs are those of the source, with noises of their own.
    pairs = artifact(tmp_path, file)
    noise = noise_for(0, range(first, first + 40), (3, 16, 16))
    assert torch.equal(pairs["z"], noise.half())

    # 2. The noise and the image of a pair stay together.
    z, x = joined(calls["distill_loss"], "z", "x")
    pair = matches(z, pairs["z"])
    assert (pair.sum(1) == 1).all()
    assert torch.equal(pair, matches(x, pairs["x"]))

    # 3. L_2step has the labels of the pairs, but noises and times that never come again.
    fresh, t, y = joined(calls["guided_loss"], "z", "t", "labels")
    assert torch.equal(y, pairs["labels"][pair.int().argmax(1)])
    assert abs(fresh.std() - 1) < 0.02
    assert len(fresh.unique(dim=0)) == len(t.unique()) == 48
    assert not matches(fresh, pairs["z"]).any()
    assert 0.3 <= t.min() < 0.31
    assert 0.39 < t.max() <= 0.4

    # 4. In each step: one call of the student for both losses, and the flow as it was.
    weights = artifact(tmp_path, "03_reflow.pt")["weights"]
    names = [*LOSSES["04"], "update"]
    for asked, distill, guided, update in zip(*map(calls.get, names)):
        loss = distill["result"] + guidance * guided["result"]
        torch.testing.assert_close(update["loss"], loss)
        # Each loss gets the student's answer to its own noise, and both have the same labels.
        z_both = torch.cat([distill["z"], guided["z"]])
        assert torch.equal(asked["z"], z_both)
        assert torch.equal(asked["labels"], guided["labels"].repeat(2))
        velocities = torch.cat([distill["velocity"], guided["velocity"]])
        assert torch.equal(asked["result"], velocities)
        for key, value in guided["flow"].state_dict().items():
            assert torch.equal(value, weights[key])


class Device(TorchDispatchMode):
    """A device without float64, such as Apple's. It counts how often a number is read from it."""
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            assert getattr(leaf, "dtype", None) != torch.float64, "float64"
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        return out


def one_hot(labels, classes):
    """F.one_hot as on a GPU. On a CPU torch's own reads the labels, to check them."""
    return (labels[:, None] == torch.arange(classes)).long()


@pytest.mark.parametrize("number, setting", [
    ("01", "steps"),
    ("02", "sample_steps"),
    ("03", "steps"),
    ("04", "steps")])
def test_the_stages_need_no_float64_and_no_step_waits_for_the_device(
        finished, tmp_path, monkeypatch, number, setting):
    """More steps read no more numbers from the device, so Python never waits for a GPU."""
    monkeypatch.setattr(torch.nn.functional, "one_hot", one_hot)
    monkeypatch.setattr(common, "LOG_SECONDS", 1e9)  # a log line reads the losses
    reads = []
    for steps in (4, 24):
        out = copy_of(finished, tmp_path / str(steps))
        with Device() as device:
            call(number, out, "--restart", **{setting: steps})
        reads.append(device.reads)
    assert reads[0] == reads[1] > 0
    with Device(), pytest.raises(AssertionError, match="float64"):
        torch.zeros(1).double()


def test_03_may_start_from_the_teacher_and_04_guide_from_the_noise_of_the_pairs(finished, tmp_path):
    """The two alternatives to the usual start and the usual noise do what they say."""
    copy_of(finished, tmp_path)
    call("03", tmp_path, "--restart", start_from="teacher", lr=0)
    flow = artifact(tmp_path, "03_reflow.pt")
    teacher = artifact(finished, "01_teacher.pt")
    assert same(flow["weights"], teacher["weights"])
    assert flow["network"] == teacher["network"]

    calls = recorded("04", finished, tmp_path / "04", guide_from="pairs", steps=4)
    for distill, guided in zip(calls["distill_loss"], calls["guided_loss"], strict=True):
        assert torch.equal(distill["z"], guided["z"])
