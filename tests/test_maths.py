"""Known answers for Euler, beta, noise, times, losses, distances, EMA and learning rate, and the Trainer."""
import math
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import common
from common import EPS, Trainer, UserError, euler, labels_for, noise_for
from conftest import Field, filled, same, script

LABELS = torch.arange(64)
ZERO = Field(lambda x, t: 0 * x)


def test_euler_is_exact_on_a_constant_velocity_and_equals_the_recurrence_on_linear_ones():
    z, v, labels = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.tensor([4, 2, 0])
    for steps in (1, 2, 7):
        net = Field(lambda x, t: v)
        torch.testing.assert_close(euler(net, z, steps, labels), z + v)
        times = torch.tensor([EPS + (1 - EPS) * i / steps for i in range(steps)])
        torch.testing.assert_close(torch.stack(net.times), times[:, None].expand(-1, 3))
        assert net.labels is labels and EPS == 0.001  # the official code's
    # v = x gives x <- x (1 + 1/N); v = t gives the sum of the times.
    torch.testing.assert_close(euler(Field(lambda x, t: x), z, 10), z * 1.1**10)
    expected = z + EPS + (1 - EPS) * (0 + 1 + 2 + 3) / 16
    torch.testing.assert_close(euler(Field(lambda x, t: t + 0 * x), z, 4), expected)


def test_noise_and_labels_follow_from_seed_and_index_alone():
    a = noise_for(3, range(10), (3, 8, 8))
    assert torch.equal(a[[7, 2]], noise_for(3, torch.tensor([7, 2]), (3, 8, 8)))
    assert not torch.equal(a, noise_for(4, range(10), (3, 8, 8))) and not torch.equal(a[0], a[1])
    many, labels = noise_for(0, range(500), (3, 8, 8)), labels_for(1, 3000, 3)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert labels.bincount().tolist() == pytest.approx([1000] * 3, abs=90) and labels_for(1, 9, 0) is None
    assert not torch.equal(labels, labels_for(2, 3000, 3))
    # No use of noise reaches the numbers of another, and the samples are those of the evaluation.
    for number, first, last in (("02", common.PAIRS, common.OWN_PAIRS),
                                ("04", common.OWN_PAIRS, common.EVALUATION)):
        row = script(number).SETTINGS["n_pairs"]
        n_pairs = max(value for name, value in row.items() if name != "help")
        assert 0 <= first and first + 1000 * n_pairs <= last
    net, given = filled(8, base=8, mult=(1,), blocks=1, classes=3), torch.arange(5) % 3
    z = noise_for(7, range(common.EVALUATION + 2, common.EVALUATION + 5), (3, 8, 8))
    for more, y in ([], labels_for(7, 5, 3)), ([given], given):
        assert torch.equal(common.samples(net, 7, range(2, 5), 2, *more), euler(net, z, 2, y[2:]))


def test_draw_t_follows_its_distribution_from_its_bound_on(monkeypatch):
    # Uniform u, or u^2: E u^2 = 1/3, E u^4 = 1/5. The logit of the third is N(0, 1).
    uniform, early, normal = (script("01").draw_t(20_000, name, "cpu")
                              for name in ("uniform", "early", "logit_normal"))
    for t, mean, deviation in ((uniform, 1 / 2, 12**-0.5), (early, 1 / 3, (1 / 5 - 1 / 9) ** 0.5),
                               (((normal - EPS) / (1 - EPS)).logit(), 0, 1)):
        assert (t.mean().item(), t.std().item()) == pytest.approx((mean, deviation), abs=0.02)
    assert all(t.shape == (20_000,) and EPS <= t.min() < t.max() <= 1 for t in (uniform, early, normal))
    assert (normal > 0.7311).float().mean().item() == pytest.approx(0.1587, abs=0.01)  # beyond 1 deviation
    monkeypatch.setattr(torch, "rand", lambda *shape, **more: torch.zeros(*shape))
    assert script("01").draw_t(3, "uniform", "cpu").tolist() == pytest.approx([EPS] * 3)


def test_flow_loss_is_zero_for_the_true_velocity_and_right_for_wrong_ones():
    # For data that is a fixed c, the velocity (c - x_t) / (1 - t) is x - z exactly.
    loss, z, c, t = script("01").flow_loss, torch.randn(64, 3, 4, 4), 0.7, torch.linspace(0.1, 0.9, 64)
    net = Field(lambda x, t: (c - x) / (1 - t))
    assert loss(net, z, torch.full_like(z, c), t, LABELS) < 1e-6 and net.labels is LABELS
    assert torch.equal(net.times[0], t)
    # For v = 0 it is the mean of (x - z)^2; for v = x_t / 2 and x = 0 that of (1 + (1 - t) / 2)^2 z^2.
    torch.testing.assert_close(loss(ZERO, z, torch.full_like(z, c), t), (c - z).square().mean())
    expected = ((1 + (1 - t) / 2).view(-1, 1, 1, 1) * z).square().mean()
    torch.testing.assert_close(loss(Field(lambda x, t: 0.5 * x), z, 0 * z, t), expected)


def test_reflow_loss_mixes_fresh_noise_of_the_right_share():
    loss, z, t = script("03").reflow_loss, torch.randn(20_000, 1, 2, 2), torch.full((20_000,), 0.3)
    # v = 0 and x = 0: the loss is E z_beta^2 = 1. x = z: E (z - z_beta)^2 = 2 - 2 sqrt(1 - beta^2).
    for b in (0.0, 0.6, 1.0):
        assert loss(ZERO, z, 0 * z, t, b).item() == pytest.approx(1, abs=0.02)
        assert loss(ZERO, z, z, t, b).item() == pytest.approx(2 - 2 * math.sqrt(1 - b**2), abs=0.02)
    # Pairs x = z + 2: the straight flow is v = 2. At beta > 0 it is not right any more.
    z, t, straight = torch.randn(64, 3, 4, 4), torch.linspace(0.1, 0.9, 64), Field(lambda x, t: 2 + 0 * x)
    assert loss(straight, z, z + 2, t, 0.0, LABELS) < 1e-10 and straight.labels is LABELS
    assert torch.equal(straight.times[0], t)
    assert 0.1 < loss(straight, z, z + 2, t, 0.5) != loss(straight, z, z + 2, t, 0.5)  # z' is new each time
    # ... and for x = 3 x_t runs on the mixed pair's own line: 3 - z_beta = 3 - (x_t - 3 t) / (1 - t).
    own = Field(lambda x, t: 3 - (x - t * 3) / (1 - t))
    assert loss(own, z, torch.full_like(z, 3.0), t, 0.7) < 1e-5


def test_distill_loss_is_the_distance_of_one_step_at_eps():
    s, z, x = script("04"), torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    student = Field(lambda x, t: 0.5 * x + t)
    loss = s.distill_loss(s.first_velocity(student, z, LABELS), z, x, s.squared_l2)
    torch.testing.assert_close(loss, (1.5 * z + EPS - x).square().mean())
    loss.backward()
    assert student.scale.grad.abs() > 0 and student.labels is LABELS
    # The distances: of differences 0 and 2 everywhere, and of one as long as c.
    x, c = torch.stack([0 * x[0], 0 * x[0] + 2]), 0.00054 * 48**0.5
    for name, y, expected in (("squared_l2", 0 * x, [0, 4]), ("pseudo_huber", 0 * x, [0, 2 * 48**0.5 - c]),
                              ("pseudo_huber", x + c / 48**0.5, [c * (2**0.5 - 1)] * 2)):
        assert getattr(s, name)(x, y).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_guided_loss_follows_the_students_own_first_step_then_the_flow():
    # v' = a z, v = b x: x_t = (1 + t a) z, target = x_t (1 + (1 - t) b); the student's jump is (1 + a) z.
    s, z, a, b, t = script("04"), torch.randn(8, 3, 4, 4), 0.5, -0.8, torch.linspace(0.2, 0.8, 8)
    student, flow = Field(lambda x, t: a * x), Field(lambda x, t: b * x)
    loss = s.guided_loss(s.first_velocity(student, z), flow, z, t, s.squared_l2, LABELS)
    difference = ((1 + a) - (1 + t * a) * (1 + (1 - t) * b)).view(-1, 1, 1, 1)
    torch.testing.assert_close(loss, (difference * z).square().mean())
    assert torch.equal(flow.times[0], t) and len(student.times) == 1 and flow.labels is LABELS
    loss.backward()
    assert flow.scale.grad is None  # nothing flows into the target
    torch.testing.assert_close(student.scale.grad, (2 * difference * a * z**2).mean())  # nor through x_t


def test_beta_falls_as_its_schedule_says():
    for schedule, expected in (("linear", {0: 1, 25: 0.75, 100: 0, 1000: 0}), ("none", {0: 0, 50: 0, 500: 0}),
                               ("cosine", {0: 1, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 100: 0, 1000: 0}),
                               ("exponential", {0: 1, 100: math.exp(-1), 300: math.exp(-3)})):
        cfg = SimpleNamespace(anneal_steps=100, schedule=schedule)
        assert {k: script("03").beta(k, cfg) for k in expected} == pytest.approx(expected, abs=1e-9)


# ----------------------------------------------------------------------------------------------- The Trainer

HIDDEN = ("0.weight", "1.weight", "2.weight")  # what Muon trains: 3x3, and neither from nor to an image


@pytest.fixture(params=["adam", "muon"])
def cfg(tmp_path, request):
    return SimpleNamespace(folder=tmp_path, out="out", preset="shapes", seed=0, device="cpu", data="x",
                           restart=False, allow_mixed=False, compile="off", steps=40, batch=4, lr=0.1, warmup=10,
                           cooldown=0.25, ema=0.7, optimizer=request.param)


def small_network():
    """Some layers. (Nothing runs through them: the losses are functions of the weights.)"""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 5, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(3, 4, 3),
                         nn.Conv2d(4, 3, 3), nn.Conv2d(4, 4, 1), nn.Linear(2, 2)).double()


def smooth(step, trainer):
    """A loss whose gradient is now shorter than 1, now longer."""
    factor = (0.01, 30, 0.3)[step % 3]
    return factor * sum(i * (p - 0.3).square().sum() for i, p in enumerate(trainer.net.parameters(), 1))


def noisy(step, trainer):
    rows, nothing = trainer.draw(torch.arange(1000.0), None)
    assert len(rows) == 4 and nothing is None
    return smooth(step, trainer) + (torch.rand(()) + rows.mean() / 1000) * trainer.net[0].weight.sum()


def broken(step, trainer):
    if step == 17:  # without a signal
        raise KeyboardInterrupt("stopped after step 17")
    return noisy(step, trainer)


def trained(cfg, loss=noisy, made_from="1", **changed):
    """Trains, and returns all that was computed: weights, EMA, what the optimisers remember, and samples."""
    cfg = SimpleNamespace(**{**vars(cfg), **changed})
    trainer = Trainer(cfg, "01 teacher", small_network(), {"data": made_from})
    for step in trainer.steps():
        trainer.update(loss(step, trainer))
        if step == 5:
            trainer.strips["5"] = torch.ones(2)
    return [part.state_dict() for part in (trainer.trained, trainer.ema, trainer.adam)] + [
        trainer.momenta, trainer.strips]


@pytest.mark.parametrize("warmup, cooldown", [(10, 0.25), (0, 0.0)])
def test_it_does_what_a_few_lines_by_hand_do(cfg, warmup, cooldown):
    weights = {name: p.detach().clone() for name, p in small_network().named_parameters()}
    average = {name: p.clone() for name, p in weights.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    for n in range(1, 41):
        factor, lr = (0.01, 30, 0.3)[(n - 1) % 3], 0.1
        lr *= min(1, n / 10) * min(1, (41 - n) / 10) if warmup else 1
        gradient = {name: factor * 2 * i * (p - 0.3) for i, (name, p) in enumerate(weights.items(), 1)}
        length = math.sqrt(sum(g.square().sum() for g in gradient.values()))
        d = min(0.7, (1 + n) / (10 + n))
        for name, p in weights.items():
            g = gradient[name] * min(1, 1 / (length + 1e-6))
            if cfg.optimizer == "muon" and name in HIDDEN:
                m[name] = 0.95 * m[name] + 0.05 * g
                x = (0.95 * m[name] + 0.05 * g).flatten(1)  # Nesterov's
                x = x / x.norm()
                for _ in range(5):
                    x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
                p -= 0.2 * math.sqrt(max(x.shape)) * lr * x.view_as(p)
            else:
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g**2
                p -= lr * m[name] / (1 - 0.9**n) / ((v[name] / (1 - 0.999**n)).sqrt() + 1e-8)
            average[name] = d * average[name] + (1 - d) * p
    ours, ema, *_ = trained(cfg, smooth, warmup=warmup, cooldown=cooldown)
    torch.testing.assert_close((dict(ours), dict(ema)), (weights, average), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seconds", [-1, 300])  # between two saved states
def test_a_run_continues_to_the_same_bits_and_each_seed_and_process_draws_others(cfg, monkeypatch, seconds):
    def ended(step, trainer):
        if step == 16 and seconds > 0:
            os.kill(os.getpid(), signal.SIGINT)
        return broken(step, trainer)

    whole = trained(cfg)
    monkeypatch.setattr(common, "SAVE_SECONDS", seconds)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 17"):
        trained(cfg, ended, restart=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert same(trained(cfg, out="elsewhere", data="y", device="auto"), whole)  # these may change
    assert not same(trained(cfg, seed=1, restart=True), whole)
    monkeypatch.setattr(common, "RANK", 1)  # another process
    assert not same(trained(cfg, restart=True), whole)


def test_each_step_seed_and_process_draws_other_rows(cfg, monkeypatch):
    def drawing(step, trainer):
        rows, twice = trainer.draw(torch.arange(10**6), torch.arange(10**6) * 2)
        assert torch.equal(2 * rows, twice)
        drawn.update(rows.tolist())
        return smooth(step, trainer)

    drawn = set()
    for rank, seed in ((0, 0), (0, 1), (1, 0)):
        monkeypatch.setattr(common, "RANK", rank)
        trained(cfg, drawing, seed=seed, steps=3, restart=True)
    assert len(drawn) == 9 * 4


def test_another_run_is_refused_or_started_over_and_a_damaged_one_is_refused(cfg):
    whole = trained(cfg)
    with pytest.raises(UserError, match="steps was 40, is 50; lr was 0.1, is 0.2; made from was .*--restart"):
        trained(cfg, made_from="2", lr=0.2, steps=50)
    assert same(trained(cfg, lambda *_: 1 / 0), whole)  # it is complete: no step is made
    path, = cfg.folder.iterdir()
    path.write_bytes(path.read_bytes().replace(b"shapes", b"chapes"))
    with pytest.raises(UserError, match="^[^\n]*01_state.pt is damaged[^\n]*$"):
        trained(cfg)
    with pytest.raises(ZeroDivisionError):
        trained(cfg, lambda *_: 1 / 0, restart=True)
    assert not list(cfg.folder.iterdir()) and same(trained(cfg), whole)  # what was given up is gone


@pytest.mark.parametrize("seconds, steps", [(-1, "13 to 13"), (10, "1 to 39")])
def test_what_is_not_finite_is_named_with_its_step_and_not_saved(cfg, monkeypatch, seconds, steps):
    def bad(step, trainer):
        loss = noisy(step, trainer)
        loss.register_hook(lambda gradient: gradient * (math.nan if step == 13 else 1))
        return loss

    monkeypatch.setattr(common, "SAVE_SECONDS", seconds)
    with pytest.raises(UserError, match=f"loss or gradient of steps {steps} was not finite"):
        trained(cfg, bad)
    assert len(list(cfg.folder.iterdir())) == (seconds < 0)
    assert same(trained(cfg), trained(cfg, restart=True))


def lines_of(cfg, monkeypatch, capsys, end=None):
    """The log of a run whose first step takes 100 seconds and every other one a second."""
    def slow(step, trainer):
        clock[0] += 1 if started else 100
        started.append(step)
        if step == end:
            raise KeyboardInterrupt
        return smooth(step, trainer)

    clock, started = [0.0], []
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    capsys.readouterr()
    try:
        trained(cfg, slow)
    except KeyboardInterrupt:
        pass
    return [line for line in capsys.readouterr().out.splitlines() if "loss" in line]


def test_speed_and_time_left_do_not_count_the_first_step_of_any_run(cfg, monkeypatch, capsys):
    lines = lines_of(cfg, monkeypatch, capsys)
    assert "step      1/40" in lines[0] and "img/s" not in lines[0]
    assert "step     12/40" in lines[1] and lines[1].endswith("| 4 img/s | left 0:00:28")
    assert lines[-1].endswith("| 4 img/s | left 0:00:00")
    cfg.restart = True
    monkeypatch.setattr(common, "SAVE_SECONDS", -1)
    lines_of(cfg, monkeypatch, capsys, end=5)
    cfg.restart = False
    monkeypatch.setattr(common, "SAVE_SECONDS", 300)
    lines = lines_of(cfg, monkeypatch, capsys)
    assert "step      6/40" in lines[0] and "img/s" not in lines[0]
    assert lines[1].endswith("| 4 img/s | left 0:00:23")


def test_a_second_signal_ends_at_once_and_the_handlers_are_restored_after_that_and_after_a_refusal(cfg):
    def asked(step, trainer):
        for _ in range(2 if step == 5 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        assert step < 5, "the second signal was ignored"
        return smooth(step, trainer)

    def refused(step, trainer):
        raise UserError("a refusal")

    own = [signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)]
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        for loss, error in ((asked, KeyboardInterrupt), (refused, UserError)):
            with pytest.raises(error):
                trained(cfg, loss, restart=True)
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), own):
            signal.signal(number, handler)


def test_it_trains_in_a_thread_where_no_signal_can_be_caught(cfg):
    found = []
    thread = threading.Thread(target=lambda: found.extend(trained(cfg)))
    thread.start()
    thread.join()
    assert same(found, trained(cfg, restart=True))
