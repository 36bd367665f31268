"""What stages 01, 03 and 04 hand to their losses, step by step, in tiny runs with labels and dropout."""
import inspect
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
from common import EPS, OWN_PAIRS, PAIRS, from_uint8, noise_for
from conftest import TINY, artifact, call, same, script
from extras.drawings import draw_shapes

LOSSES = {"01": ["flow_loss"], "03": ["reflow_loss"], "04": ["first_velocity", "distill_loss", "guided_loss"]}
DRAWS = ("rand", "randn", "randn_like")


def watch(patch, owner, name):
    """Replaces a function by one that calls it, and lists its calls: arguments, result, generator's state."""
    real, calls = getattr(owner, name), []
    names = list(inspect.signature(real).parameters) if owner is not torch else []

    def watched(*given, **more):
        call = {"state": torch.get_rng_state().numpy().tobytes(), **more}
        for key, value in zip(names, given):
            call[key] = value.clone() if torch.is_tensor(value) else value
            if isinstance(value, torch.nn.Module):
                call[f"{key} trains"] = value.training
        call["result"] = real(*given, **more)
        calls.append(call)
        return call["result"]

    patch.setattr(owner, name, watched)
    return calls


def recorded(number, finished, tmp_path, *flags, **settings):
    """Runs a stage; returns the calls of its losses and of Trainer.update, by name."""
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    watched = [(script(number), name) for name in LOSSES[number]] + [(common.Trainer, "update")]
    watched += [(torch, name) for name in DRAWS] + [(torch.nn.functional, "dropout")]
    with pytest.MonkeyPatch.context() as patch:
        calls = {name: watch(patch, owner, name) for owner, name in watched}
        call(number, tmp_path, "--restart", *flags, **settings)
    # Only what is trained drops out.
    for name in LOSSES[number]:
        assert all(call.get("net trains", True) and not call.get("flow trains") for call in calls[name])
    assert all(call["self"].trained.training and not call["self"].ema.training for call in calls["update"])
    # No random number is used twice: the generator's state differs before each draw, and each dropout.
    masks = [call["state"] for call in calls["dropout"] if call["training"] and call["p"] == 0.5]
    drawn = [call["state"] for name in DRAWS for call in calls[name]]
    assert len(masks) >= 8 * settings["steps"] and len(drawn) >= settings["steps"]
    assert len({*masks, *drawn}) == len(masks) + len(drawn)
    return calls


def joined(calls, *names):
    return (torch.cat([call[name] for call in calls]) for name in names)


def matches(given, kept):
    """(len(given), len(kept)): which are equal?"""
    return (given[:, None] == kept.float()).flatten(2).all(2)


@pytest.mark.parametrize("number, flags, flips, moments", [  # mean and deviation of the times
    ("01", ["--t_distribution=uniform"], True, (0.5, 0.289)),
    ("03", ["--t_distribution=uniform", "--schedule=linear"], True, (0.5, 0.289)),
    ("01", ["--t_distribution=logit_normal", "--no-flip"], False, (0.5, 0.208)),
    ("03", ["--t_distribution=early", "--schedule=none", "--no-flip"], False, (0.333, 0.298))])
def test_01_hands_over_images_and_03_pairs_half_of_them_mirrored_with_their_labels(
        finished, tmp_path, number, flags, flips, moments):
    calls = recorded(number, finished, tmp_path, *flags, steps=25)[LOSSES[number][0]]
    z, x, t, y = joined(calls, "z", "x", "t", "labels")
    assert (t.mean().item(), t.std().item()) == pytest.approx(moments, abs=0.05)
    assert t.min() >= EPS and len(t.unique()) > 190
    pairs, (images, labels) = artifact(finished, "02_pairs.pt"), draw_shapes(500, 16)
    kept, labels = (from_uint8(images), labels) if number == "01" else (pairs["x"], pairs["labels"])
    plain, mirrored = matches(x, kept), matches(x.flip(3), kept)
    assert ((plain | mirrored).sum(1) == 1).all() and abs(mirrored.sum() - 100 * flips) <= 40 * flips
    assert (mirrored.view(25, -1).any(1).sum() > 20) == flips  # each on its own, not all of a batch
    found = (plain | mirrored).int().argmax(1)
    assert torch.equal(y, labels[found]) and len(found.unique()) > (120 if number == "01" else 35)
    if number == "01":
        assert abs(z.std() - 1) < 0.01 and abs((z * x).mean()) < 0.02 and len(z.unique(dim=0)) == 200
    else:  # both ends are mirrored
        assert torch.equal(plain, matches(z, pairs["z"]))
        assert torch.equal(mirrored, matches(z.flip(3), pairs["z"]))
        betas = [flips * max(0, 1 - k / TINY["03"]["anneal_steps"]) for k in range(25)]
        assert [call["b"] for call in calls] == pytest.approx(betas)


@pytest.mark.parametrize("source, first, guidance", [("teacher", PAIRS, 0.5), ("flow", OWN_PAIRS, 1)])
def test_stage_04_hands_over_pairs_and_fresh_noise_and_weighs(finished, tmp_path, source, first, guidance):
    calls = recorded("04", finished, tmp_path, pairs_from=source, n_pairs=40, pair_steps=2, t_low=0.3,
                     t_high=0.4, guidance=guidance, steps=6, lr=0.05)
    pairs = artifact(tmp_path, f"0{2 if source == 'teacher' else 4}_pairs.pt")
    assert torch.equal(pairs["z"], noise_for(0, range(first, first + 40), (3, 16, 16)).half())
    (z, x), (fresh, t, y) = (joined(calls[name], *parts) for name, *parts in (
        ("distill_loss", "z", "x"), ("guided_loss", "z", "t", "labels")))
    pair = matches(z, pairs["z"])
    assert (pair.sum(1) == 1).all() and torch.equal(pair, matches(x, pairs["x"]))
    assert torch.equal(y, pairs["labels"][pair.int().argmax(1)])
    assert abs(fresh.std() - 1) < 0.02 and len(fresh.unique(dim=0)) == len(t.unique()) == 48
    assert not matches(fresh, pairs["z"]).any() and 0.3 <= t.min() < 0.31 < 0.39 < t.max() <= 0.4
    weights = artifact(tmp_path, "03_reflow.pt")["weights"]
    for asked, one, two, update in zip(*(calls[name] for name in [*LOSSES["04"], "update"])):
        torch.testing.assert_close(update["loss"], one["result"] + guidance * two["result"])
        assert torch.equal(asked["labels"], torch.cat([two["labels"]] * 2))
        # Each loss gets the student's answer to its own noise.
        assert torch.equal(asked["z"], torch.cat([one["z"], two["z"]]))
        assert torch.equal(asked["result"], torch.cat([one["velocity"], two["velocity"]]))
        assert all(torch.equal(value, weights[key]) for key, value in two["flow"].state_dict().items())


class Device(TorchDispatchMode):
    """A device without float64, such as Apple's. It counts how often a number is read from it."""
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not any(torch.is_tensor(a) and a.dtype == torch.float64 for a in tree_leaves(out)), "float64"
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return out


@pytest.mark.parametrize("number", ["01", "02", "03", "04"])
def test_the_stages_need_no_float64_and_no_step_waits_for_the_device(finished, tmp_path, monkeypatch, number):
    # On a CPU it looks at its labels, on a GPU not.
    monkeypatch.setattr(torch.nn.functional, "one_hot", lambda y, n: (y[:, None] == torch.arange(n)).long())
    monkeypatch.setattr(common, "LOG_SECONDS", 1e9)  # a log line reads the losses
    reads, setting = [], "sample_steps" if number == "02" else "steps"
    for steps in (4, 24):
        shutil.copytree(finished / "shapes", tmp_path / str(steps) / "shapes")
        with Device() as device:
            call(number, tmp_path / str(steps), "--restart", **{setting: steps})
        reads.append(device.reads)
    assert reads[0] == reads[1] > 0
    with Device(), pytest.raises(AssertionError, match="float64"):
        torch.zeros(1).double()


def test_03_may_start_from_the_teacher_and_04_guide_from_the_noise_of_the_pairs(finished, tmp_path):
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    call("03", tmp_path, "--restart", start_from="teacher", lr=0)
    flow, teacher = artifact(tmp_path, "03_reflow.pt"), artifact(finished, "01_teacher.pt")
    assert same(flow["weights"], teacher["weights"]) and flow["network"] == teacher["network"]
    calls = recorded("04", finished, tmp_path / "04", guide_from="pairs", steps=4)
    assert same(*([call["z"] for call in calls[name]] for name in ("distill_loss", "guided_loss")))
