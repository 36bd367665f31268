"""What stages 01, 03 and 04 hand to their losses, step by step, in tiny runs with labels and dropout."""
import inspect
import shutil

import pytest
import torch

import common
from common import OWN_PAIRS, PAIRS, draw_shapes, from_uint8, noise_for
from conftest import load_script
from test_pipeline import call

LOSSES = {"01": ["flow_loss"], "03": ["reflow_loss"], "04": ["first_step", "distill_loss", "guided_loss"]}


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A folder with a teacher that knows the 18 classes, 40 pairs, and a flow with dropout."""
    out = tmp_path_factory.mktemp("ready")
    call("01", out, "--conditional")
    call("02", out)
    call("03", out, dropout=0.5)
    return out


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


def recorded(number, ready, tmp_path, *flags, **settings):
    """Runs a stage. Returns the calls of its losses, of Trainer.update and of all that draws, by name."""
    shutil.copytree(ready / "shapes", tmp_path / "shapes", dirs_exist_ok=True)
    watched = [(load_script(number), name) for name in LOSSES[number]] + [(common.Trainer, "update")]
    watched += [(torch, "rand"), (torch, "randn_like"), (torch, "randint"), (torch.nn.functional, "dropout")]
    with pytest.MonkeyPatch.context() as patch:
        calls = {name: watch(patch, owner, name) for owner, name in watched}
        call(number, tmp_path, "--restart", *flags, **settings)
    return calls


def joined(calls, *names):
    return (torch.cat([call[name] for call in calls]) for name in names)


def matches(given, kept):
    """(len(given), len(kept)): which are equal?"""
    return (given[:, None] == kept.float()).flatten(2).all(2)


@pytest.mark.parametrize("flags, low, high", [([], 60, 140), (["--no-flip"], 0, 0)])
def test_stage_01_hands_over_images_half_of_them_mirrored_and_their_labels(ready, tmp_path, flags, low, high):
    images, kinds = draw_shapes(500, 16)
    calls = recorded("01", ready, tmp_path, "--conditional", *flags, steps=25)["flow_loss"]
    z, x, y = joined(calls, "z", "x", "labels")
    assert z.shape == x.shape == (200, 3, 16, 16) and x.min() >= -1 and 0.5 < x.max() <= 1
    plain, mirrored = matches(x, from_uint8(images)), matches(x.flip(3), from_uint8(images))
    assert ((plain | mirrored).sum(1) == 1).all() and low <= mirrored.sum() <= high
    assert (mirrored.view(25, -1).any(1).sum() > 20) == (high > 0)  # each on its own, not all of a batch
    found = (plain | mirrored).int().argmax(1)
    assert torch.equal(y, (kinds[:, 0] * 6 + kinds[:, 1]).long()[found]) and len(found.unique()) > 120
    assert abs(z.std() - 1) < 0.01 and abs((z * x).mean()) < 0.02 and len(z.unique(dim=0)) == 200


@pytest.mark.parametrize("flags, low, high", [([], 60, 140), (["--no-flip"], 0, 0)])
@pytest.mark.parametrize("schedule", ["linear", "none"])
def test_stage_03_hands_over_pairs_both_ends_mirrored_and_beta(ready, tmp_path, schedule, flags, low, high):
    calls = recorded("03", ready, tmp_path, *flags, steps=25, anneal_steps=10, schedule=schedule)
    calls = calls["reflow_loss"]
    linear = [max(0, 1 - k / 10) for k in range(25)]
    assert [call["b"] for call in calls] == pytest.approx(linear if schedule == "linear" else [0] * 25)
    pairs, (z, x, y) = common.read(ready / "shapes/02_pairs.pt"), joined(calls, "z", "x", "labels")
    plain, mirrored = matches(z, pairs["z"]), matches(z.flip(3), pairs["z"])
    assert torch.equal(plain, matches(x, pairs["x"]))
    assert torch.equal(mirrored, matches(x.flip(3), pairs["x"]))
    assert ((plain | mirrored).sum(1) == 1).all() and low <= mirrored.sum() <= high
    assert (mirrored.view(25, -1).any(1).sum() > 20) == (high > 0)  # each on its own, not all of a batch
    found = (plain | mirrored).int().argmax(1)
    assert torch.equal(y, pairs["labels"][found]) and len(found.unique()) > 35


@pytest.mark.parametrize("source, first, guidance", [("teacher", PAIRS, 0.5), ("flow", OWN_PAIRS, 1)])
def test_stage_04_hands_over_pairs_and_fresh_noise_and_weighs(ready, tmp_path, source, first, guidance):
    calls = recorded("04", ready, tmp_path, pairs_from=source, n_pairs=40, pair_steps=2, t_low=0.3,
                     t_high=0.4, guidance=guidance, steps=6, lr=0.05)
    pairs = common.read(tmp_path / f"shapes/0{2 if source == 'teacher' else 4}_pairs.pt")
    assert torch.equal(pairs["z"], noise_for(0, range(first, first + 40), (3, 16, 16)).half())
    (z, x), (fresh, y) = joined(calls["distill_loss"], "z", "x"), joined(calls["guided_loss"], "z", "labels")
    pair = matches(z, pairs["z"])
    assert (pair.sum(1) == 1).all() and torch.equal(pair, matches(x, pairs["x"]))
    assert torch.equal(y, pairs["labels"][pair.int().argmax(1)])
    assert abs(fresh.std() - 1) < 0.02 and len(fresh.unique(dim=0)) == 48
    assert not matches(fresh, pairs["z"]).any()
    weights = common.read(tmp_path / "shapes/03_reflow.pt")["weights"]
    for asked, one, two, update in zip(*(calls[name] for name in [*LOSSES["04"], "update"])):
        assert (two["t_low"], two["t_high"]) == (0.3, 0.4)
        torch.testing.assert_close(update["loss"], one["result"] + guidance * two["result"])
        assert torch.equal(asked["labels"], torch.cat([two["labels"]] * 2))
        # Each loss gets the student's answer to its own noise.
        assert torch.equal(asked["z"], torch.cat([one["z"], two["z"]]))
        assert torch.equal(asked["result"], torch.cat([one["velocity"], two["velocity"]]))
        assert all(torch.equal(value, weights[key]) for key, value in two["flow"].state_dict().items())


@pytest.mark.parametrize("number", LOSSES)
def test_only_training_drops_out_and_no_random_number_is_used_twice(ready, tmp_path, number):
    more = {"01": (["--conditional"], {"dropout": 0.5}), "03": ([], {"dropout": 0.5}), "04": ([], {})}[number]
    calls = recorded(number, ready, tmp_path, *more[0], **more[1])
    for name in LOSSES[number]:
        assert all(call.get("net trains", True) and not call.get("flow trains") for call in calls[name])
    assert all(call["self"].trained.training and not call["self"].ema.training for call in calls["update"])
    # The generator's state before each draw of the 4 steps: images, flips, noise, times, masks of dropout.
    masks = [call["state"] for call in calls["dropout"] if call["training"] and call["p"] == 0.5]
    drawn = masks + [call["state"] for name in ("rand", "randn_like", "randint") for call in calls[name]]
    assert len(masks) >= 4 * 8 and len(drawn) - len(masks) == (12 if number == "04" else 16)
    assert len(set(drawn)) == len(drawn)
