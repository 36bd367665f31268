"""Known answers for sampling, noise, times, losses, distances and beta; then the Trainer."""
import contextlib
import copy
import math
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from torch import nn
from torch.testing import assert_close

import common
from common import EPS, Trainer, UserError, euler, labels_for, noise_for
from conftest import Field, filled, same, script

LABELS = torch.arange(64)
TIMES = torch.linspace(0.1, 0.9, 64)
SHAPE = (3, 8, 8)
ZERO = Field(lambda x, t: 0 * x)


def gauss(n):
    """n noises, (n, 3, 4, 4)."""
    return torch.randn(n, 3, 4, 4)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_is_exact_on_a_constant_velocity(steps):
    """N steps of 1/N add up to 1, and their times begin at EPS."""
    z, v = gauss(3), gauss(3)
    labels = torch.tensor([4, 2, 0])
    net = Field(lambda x, t: v)
    assert_close(euler(net, z, steps, labels), z + v)
    assert net.labels is labels
    assert EPS == 0.001  # the official code's
    assert len(net.times) == steps
    for i in range(steps):
        time = EPS + (1 - EPS) * i / steps
        assert_close(net.times[i], torch.full((3,), time))


def test_euler_equals_the_recurrence_on_linear_velocities():
    """Each step starts where the last one ended, and asks for the velocity at its own time."""
    z = gauss(3)
    # v = x: every step is x <- x (1 + 1/10).
    net = Field(lambda x, t: x)
    assert_close(euler(net, z, 10), z * 1.1**10)
    # v = t: the steps add up the times.
    net = Field(lambda x, t: t + 0 * x)
    expected = z + EPS + (1 - EPS) * (0 + 1 + 2 + 3) / 16
    assert_close(euler(net, z, 4), expected)


def test_noise_and_labels_follow_from_seed_and_index_alone():
    """A noise depends on its seed and its index only, and a label on its seed."""
    noise = noise_for(3, range(10), SHAPE)
    two = torch.tensor([7, 2])
    assert torch.equal(noise_for(3, two, SHAPE), noise[two])
    assert not torch.equal(noise, noise_for(4, range(10), SHAPE))
    assert not torch.equal(noise[0], noise[1])
    many = noise_for(0, range(500), SHAPE)
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01

    labels = labels_for(1, 3000, 3)
    assert labels.bincount().tolist() == approx([1000] * 3, abs=90)
    assert not torch.equal(labels, labels_for(2, 3000, 3))
    assert labels_for(1, 9, 0) is None


@pytest.mark.parametrize("number, first, last", [
    ("02", common.PAIRS, common.OWN_PAIRS),
    ("04", common.OWN_PAIRS, common.EVALUATION),
])
def test_noise_of_one_use_never_reaches_the_next(number, first, last):
    """No noise is used twice, even if a preset made 1000 times as many pairs."""
    row = dict(script(number).SETTINGS["n_pairs"])
    del row["help"]
    n_pairs = max(row.values())
    assert 0 <= first
    assert first + 1000 * n_pairs <= last


def test_noise_of_samples_is_that_of_the_evaluation():
    """samples() takes the noises of stage 05, and the given labels or those of the seed."""
    net = filled(8, base=8, mult=(1,), blocks=1, classes=3)
    numbers = range(2, 5)
    z = noise_for(7, [common.EVALUATION + i for i in numbers], SHAPE)
    labels = labels_for(7, 5, 3)
    expected = euler(net, z, 2, labels[2:])
    assert torch.equal(common.samples(net, 7, numbers, 2), expected)
    labels = torch.arange(5) % 3
    expected = euler(net, z, 2, labels[2:])
    assert torch.equal(common.samples(net, 7, numbers, 2, labels), expected)


@pytest.mark.parametrize("distribution, mean, deviation", [
    ("uniform", 1 / 2, 12**-0.5),
    ("early", 1 / 3, (1 / 5 - 1 / 9) ** 0.5),  # of u^2: E u^2 = 1/3, E u^4 = 1/5
    ("logit_normal", 0, 1),  # of its logit
])
def test_draw_t_follows_its_distribution(distribution, mean, deviation):
    """Each distribution has its own mean and deviation, between EPS and 1."""
    t = script("01").draw_t(20_000, distribution, "cpu")
    assert t.shape == (20_000,)
    assert EPS <= t.min() < t.max() <= 1
    if distribution == "logit_normal":
        share = (t > 0.7311).float().mean()  # more than one deviation above the mean
        assert share.item() == approx(0.1587, abs=0.01)
        t = ((t - EPS) / (1 - EPS)).logit()
    assert t.mean().item() == approx(mean, abs=0.02)
    assert t.std().item() == approx(deviation, abs=0.02)


def test_draw_t_begins_at_eps(monkeypatch):
    """The smallest random number becomes EPS, not 0."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **more: torch.zeros(*shape))
    t = script("01").draw_t(3, "uniform", "cpu")
    assert t.tolist() == approx([EPS] * 3)


def test_flow_loss_is_zero_for_the_true_velocity_and_right_for_wrong_ones():
    """The network is asked at x_t, and its target is x - z."""
    loss, z, t = script("01").flow_loss, gauss(64), TIMES
    x = torch.full_like(z, 0.7)
    # All images are 0.7: the velocity (0.7 - x_t) / (1 - t) is exactly x - z.
    net = Field(lambda x, t: (0.7 - x) / (1 - t))
    assert loss(net, z, x, t, LABELS) < 1e-6
    assert net.labels is LABELS
    assert torch.equal(net.times[0], t)
    # v = 0: the loss is the mean of (x - z)^2.
    expected = (x - z).square().mean()
    assert_close(loss(ZERO, z, x, t), expected)
    # v = x_t / 2 and x = 0: the loss is the mean of ((1 + (1 - t) / 2) z)^2.
    net = Field(lambda x, t: 0.5 * x)
    s = t.view(-1, 1, 1, 1)
    expected = ((1 + (1 - s) / 2) * z).square().mean()
    assert_close(loss(net, z, 0 * z, t), expected)


@pytest.mark.parametrize("b", [0.0, 0.6, 1.0])
def test_reflow_loss_mixes_fresh_noise_of_the_right_share(b):
    """z_beta has variance 1 for every beta, and its covariance with z is sqrt(1 - beta^2)."""
    loss = script("03").reflow_loss
    z = torch.randn(20_000, 1, 2, 2)
    t = torch.full((20_000,), 0.3)
    # v = 0 and x = 0: the loss is E z_beta^2.
    found = loss(ZERO, z, 0 * z, t, b)
    assert found.item() == approx(1, abs=0.02)
    # v = 0 and x = z: the loss is E (z - z_beta)^2.
    found = loss(ZERO, z, z, t, b)
    expected = 2 - 2 * math.sqrt(1 - b**2)
    assert found.item() == approx(expected, abs=0.02)


def test_reflow_loss_follows_the_line_of_the_mixed_pair():
    """At beta = 0 the line starts at z, above that at z_beta, which is new in every step."""
    loss, z, t = script("03").reflow_loss, gauss(64), TIMES
    # Pairs with x = z + 2: v = 2 is right at beta = 0 only.
    net = Field(lambda x, t: 2 + 0 * x)
    assert loss(net, z, z + 2, t, 0.0, LABELS) < 1e-10
    assert net.labels is LABELS
    assert torch.equal(net.times[0], t)
    mixed = loss(net, z, z + 2, t, 0.5)
    again = loss(net, z, z + 2, t, 0.5)
    assert 0.1 < mixed != again
    # All images are 3: the mixed pair's line leads from z_beta = (x_t - 3 t) / (1 - t) to 3.
    net = Field(lambda x, t: 3 - (x - 3 * t) / (1 - t))
    assert loss(net, z, torch.full_like(z, 3.0), t, 0.7) < 1e-5


def test_distill_loss_is_the_distance_of_one_step_at_eps():
    """The student jumps once, from z at EPS, and its loss is the distance to x."""
    s, z, x = script("04"), gauss(8), gauss(8)
    student = Field(lambda x, t: 0.5 * x + t)
    velocity = s.first_velocity(student, z, LABELS)
    loss = s.distill_loss(velocity, z, x, s.squared_l2)
    assert_close(loss, (1.5 * z + EPS - x).square().mean())
    assert student.labels is LABELS
    loss.backward()
    assert student.scale.grad.abs() > 0


def test_distill_loss_has_distances_of_known_values():
    """Squared L2 and pseudo-Huber give one number for each image, as their formulas say."""
    s, root = script("04"), math.sqrt(48)  # of the number of pixels
    c = 0.00054 * root
    short = c * (math.sqrt(2) - 1)  # of a difference as long as c
    x = torch.zeros(2, 3, 4, 4)
    x[1] = 2
    for distance, y, expected in (
        (s.squared_l2, 0 * x, [0, 4]),
        (s.pseudo_huber, 0 * x, [0, 2 * root - c]),
        (s.pseudo_huber, x + c / root, [short, short]),
    ):
        assert distance(x, y).tolist() == approx(expected, rel=1e-3, abs=1e-9)


def test_guided_loss_follows_the_students_own_first_step_then_the_flow():
    """The target is the student's step up to t, then the flow's, and has no gradient."""
    s, z = script("04"), gauss(8)
    a, b = 0.5, -0.8
    t = torch.linspace(0.2, 0.8, 8)
    student = Field(lambda x, t: a * x)
    flow = Field(lambda x, t: b * x)
    velocity = s.first_velocity(student, z)
    loss = s.guided_loss(velocity, flow, z, t, s.squared_l2, LABELS)
    # The jump arrives at (1 + a) z; x_t = (1 + t a) z, and the target is (1 + (1 - t) b) x_t.
    target = (1 + t * a) * (1 + (1 - t) * b)
    difference = (1 + a - target).view(-1, 1, 1, 1)
    assert_close(loss, (difference * z).square().mean())
    assert torch.equal(flow.times[0], t)
    assert len(student.times) == 1
    assert flow.labels is LABELS
    loss.backward()
    assert flow.scale.grad is None  # nothing flows into the target
    assert_close(student.scale.grad, (2 * difference * a * z**2).mean())  # nor through x_t


@pytest.mark.parametrize("schedule, step, expected", [
    ("linear", 0, 1),
    ("linear", 25, 0.75),
    ("linear", 100, 0),
    ("linear", 1000, 0),
    ("none", 0, 0),
    ("none", 50, 0),
    ("none", 500, 0),
    ("cosine", 0, 1),
    ("cosine", 25, (1 + math.sqrt(0.5)) / 2),
    ("cosine", 50, 0.5),
    ("cosine", 100, 0),
    ("cosine", 1000, 0),
    ("exponential", 0, 1),
    ("exponential", 100, math.exp(-1)),
    ("exponential", 300, math.exp(-3)),
])
def test_beta_falls_as_its_schedule_says(schedule, step, expected):
    """Each schedule has its formula: all but the exponential one are 0 after anneal_steps."""
    cfg = SimpleNamespace(anneal_steps=100, schedule=schedule)
    assert script("03").beta(step, cfg) == approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------------- The Trainer

HIDDEN = ("0.weight", "1.weight", "2.weight")  # Muon's: 3x3, and neither from nor to an image
FACTORS = (0.01, 30, 0.3)  # of the loss: now its gradient is shorter than 1, now longer
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(params=["adam", "muon"])
def cfg(tmp_path, request):
    return SimpleNamespace(
        folder=tmp_path,
        out="out",
        preset="shapes",
        seed=0,
        device="cpu",
        data="x",
        restart=False,
        allow_mixed=False,
        compile="off",
        steps=40,
        batch=4,
        lr=0.1,
        warmup=10,
        cooldown=0.25,
        ema=0.7,
        optimizer=request.param,
    )


def small_network():
    """Some layers. (Nothing runs through them: the losses are functions of the weights.)"""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 5, 3),
        nn.Conv2d(4, 5, 3),
        nn.Conv2d(6, 4, 3),
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 3, 3),
        nn.Conv2d(4, 4, 1),
        nn.Linear(2, 2),
    ).double()


def smooth(step, trainer):
    """A loss without random numbers."""
    loss = 0
    for i, p in enumerate(trainer.net.parameters(), 1):
        loss = loss + i * (p - 0.3).square().sum()
    return FACTORS[step % 3] * loss


def noisy(step, trainer):
    """A loss that depends on random numbers, and on the rows that are drawn."""
    rows, nothing = trainer.draw(torch.arange(1000.0), None)
    assert len(rows) == 4
    assert nothing is None
    noise = torch.rand(()) + rows.mean() / 1000
    return smooth(step, trainer) + noise * trainer.net[0].weight.sum()


def impossible(step, trainer):
    """A loss that cannot be computed."""
    raise ZeroDivisionError


def trained(cfg, loss=noisy, made_from="1", **changed):
    """Trains, and returns all that was computed.

    These are the weights, the EMA, what the optimisers remember, and the samples.
    """
    cfg = SimpleNamespace(**{**vars(cfg), **changed})
    trainer = Trainer(cfg, "01 teacher", small_network(), {"data": made_from}, cfg.batch)
    for step in trainer.steps():
        trainer.update(loss(step, trainer))
        if step == 5:
            trainer.strips["5"] = torch.ones(2)
    parts = trainer.trained, trainer.ema, trainer.adam
    states = [part.state_dict() for part in parts]
    return [*states, trainer.momenta, trainer.strips]


@pytest.mark.parametrize("warmup, cooldown", [(10, 0.25), (0, 0.0)])
def test_it_does_what_a_few_lines_by_hand_do(cfg, warmup, cooldown):
    """Clipping, learning rate, Adam, Muon and EMA are what their formulas say."""
    weights = small_network().state_dict()
    average = copy.deepcopy(weights)
    m = {name: torch.zeros_like(p) for name, p in weights.items()}
    v = copy.deepcopy(m)
    for n in range(1, 41):
        lr = 0.1
        if warmup:
            lr *= min(1, n / 10) * min(1, (41 - n) / 10)
        d = min(0.7, (1 + n) / (10 + n))
        # 1. The gradient, and the factor that clips it to length 1.
        gradient, squares = {}, 0
        for i, (name, p) in enumerate(weights.items(), 1):
            gradient[name] = FACTORS[(n - 1) % 3] * 2 * i * (p - 0.3)
            squares += gradient[name].square().sum()
        clip = min(1, 1 / (math.sqrt(squares) + 1e-6))
        for name, p in weights.items():
            g = gradient[name] * clip
            if cfg.optimizer == "muon" and name in HIDDEN:
                # 2. Muon, with Nesterov's look ahead and five Newton-Schulz steps.
                m[name] = 0.95 * m[name] + 0.05 * g
                x = (0.95 * m[name] + 0.05 * g).flatten(1)
                x = x / x.norm()
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
                step = 0.2 * math.sqrt(max(x.shape)) * x.view_as(p)
            else:
                # 3. Adam.
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g**2
                mean = m[name] / (1 - 0.9**n)
                square = v[name] / (1 - 0.999**n)
                step = mean / (square.sqrt() + 1e-8)
            # 4. The weights, and their average.
            p -= lr * step
            average[name] = d * average[name] + (1 - d) * p
    ours, ema, *_ = trained(cfg, smooth, warmup=warmup, cooldown=cooldown)
    assert_close(ours, weights, rtol=1e-5, atol=1e-6)
    assert_close(ema, average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seconds", [-1, 300])  # between two saved states
def test_a_run_continues_to_the_same_bits_and_each_seed_and_process_draws_others(
        cfg, monkeypatch, seconds):
    """An interrupted run ends as a whole one does, whether or not a signal ended it."""
    def ended(step, trainer):
        if step == 16 and seconds > 0:
            os.kill(os.getpid(), signal.SIGINT)
        if step == 17:  # without a signal
            raise KeyboardInterrupt("stopped after step 17")
        return noisy(step, trainer)

    whole = trained(cfg)
    monkeypatch.setattr(common, "SAVE_SECONDS", seconds)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 17"):
        trained(cfg, ended, restart=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    continued = trained(cfg, out="elsewhere", data="y", device="auto")  # these may change
    assert same(continued, whole)
    assert not same(trained(cfg, seed=1, restart=True), whole)
    monkeypatch.setattr(common, "RANK", 1)  # another process
    assert not same(trained(cfg, restart=True), whole)


def test_each_step_seed_and_process_draws_other_rows(cfg, monkeypatch):
    """No row is drawn twice by different steps, seeds or processes, and rows stay together."""
    found, numbers = set(), torch.arange(10**6)

    def drawing(step, trainer):
        rows, twice = trainer.draw(numbers, 2 * numbers)
        assert torch.equal(2 * rows, twice)
        found.update(rows.tolist())
        return smooth(step, trainer)

    for rank, seed in ((0, 0), (0, 1), (1, 0)):
        monkeypatch.setattr(common, "RANK", rank)
        trained(cfg, drawing, seed=seed, steps=3, restart=True)
    assert len(found) == 9 * 4


def test_another_run_is_refused_or_started_over_and_a_damaged_one_is_refused(cfg):
    """A saved state continues only the run that it is of, and only if it is whole."""
    whole = trained(cfg)
    differences = "steps was 40, is 50; lr was 0.1, is 0.2; made from was .*--restart"
    with pytest.raises(UserError, match=differences):
        trained(cfg, made_from="2", lr=0.2, steps=50)
    assert same(trained(cfg, impossible), whole)  # it is complete: no step is made
    path, = cfg.folder.iterdir()
    damaged = path.read_bytes().replace(b"shapes", b"chapes")
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="^[^\n]*01_state.pt is damaged[^\n]*$"):
        trained(cfg)
    with pytest.raises(ZeroDivisionError):
        trained(cfg, impossible, restart=True)
    assert not list(cfg.folder.iterdir())  # what was given up is gone
    assert same(trained(cfg), whole)


@pytest.mark.parametrize("seconds, steps, files", [
    (-1, "13 to 13", 1),
    (10, "1 to 39", 0),
])
def test_what_is_not_finite_is_named_with_its_step_and_not_saved(
        cfg, monkeypatch, seconds, steps, files):
    """NaN ends the run, and what was saved before it can be continued."""
    def bad(step, trainer):
        loss = noisy(step, trainer)
        if step == 13:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(common, "SAVE_SECONDS", seconds)
    with pytest.raises(UserError, match=f"loss or gradient of steps {steps} was not finite"):
        trained(cfg, bad)
    assert len(list(cfg.folder.iterdir())) == files
    assert same(trained(cfg), trained(cfg, restart=True))


def lines_of(cfg, monkeypatch, capsys, end=None):
    """The log of a run whose first step takes 100 seconds and every other one a second."""
    clock = SimpleNamespace(now=0.0, step=100)

    def slow(step, trainer):
        clock.now += clock.step
        clock.step = 1
        if step == end:
            raise KeyboardInterrupt
        return smooth(step, trainer)

    fake = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(common, "time", fake)
    capsys.readouterr()
    with contextlib.suppress(KeyboardInterrupt):
        trained(cfg, slow)
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if "loss" in line]


def test_speed_and_time_left_do_not_count_the_first_step_of_any_run(cfg, monkeypatch, capsys):
    """The first step also sets up the device, so that it says nothing about the speed."""
    lines = lines_of(cfg, monkeypatch, capsys)
    assert "step      1/40" in lines[0]
    assert "img/s" not in lines[0]
    assert "step     12/40" in lines[1]
    assert lines[1].endswith("| 4 img/s | left 0:00:28")
    assert lines[-1].endswith("| 4 img/s | left 0:00:00")
    # The same in a run that continues after step 5.
    cfg.restart = True
    monkeypatch.setattr(common, "SAVE_SECONDS", -1)
    lines_of(cfg, monkeypatch, capsys, end=5)
    cfg.restart = False
    monkeypatch.setattr(common, "SAVE_SECONDS", 300)
    lines = lines_of(cfg, monkeypatch, capsys)
    assert "step      6/40" in lines[0]
    assert "img/s" not in lines[0]
    assert lines[1].endswith("| 4 img/s | left 0:00:23")


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def test_a_second_signal_ends_at_once_and_the_handlers_are_restored_after_that_and_after_a_refusal(
        cfg):
    """The Trainer waits once for the end of a step, and leaves the handlers as they were."""
    def asked_twice(step, trainer):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        assert step < 5, "the second signal was ignored"
        return smooth(step, trainer)

    def refused(step, trainer):
        raise UserError("a refusal")

    own = [signal.signal(number, lambda *_: None) for number in SIGNALS]
    before = handlers()
    try:
        for loss, error in ((asked_twice, KeyboardInterrupt), (refused, UserError)):
            with pytest.raises(error):
                trained(cfg, loss, restart=True)
            assert handlers() == before
    finally:
        for number, handler in zip(SIGNALS, own):
            signal.signal(number, handler)


def test_it_trains_in_a_thread_where_no_signal_can_be_caught(cfg):
    """A notebook or a server may train outside the main thread."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(trained(cfg)))
    thread.start()
    thread.join()
    assert same(found, trained(cfg, restart=True))
