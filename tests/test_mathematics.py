"""Known answers for Euler, beta, noise, the four losses, EMA and learning rate."""
import argparse
import math

import pytest
import torch

import common
from common import EPS, UNet, ema_update, euler, labels_for, noise_for
from conftest import Field

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


def test_beta_end_points_and_shapes(stage):
    def betas(schedule, *steps):
        cfg = argparse.Namespace(anneal_steps=100, schedule=schedule)
        return [round(stage("03").beta(step, cfg), 6) for step in steps]

    assert betas("linear", 0, 25, 100, 1000) == [1, 0.75, 0, 0]
    assert betas("cosine", 0, 25, 50, 100, 1000) == [1, round((1 + math.sqrt(0.5)) / 2, 6), 0.5, 0, 0]
    assert betas("exponential", 0, 100, 300) == [1, round(math.exp(-1), 6), round(math.exp(-3), 6)]
    assert betas("none", 0, 50, 500) == [0, 0, 0]


def test_noise_and_labels_follow_from_seed_and_index_alone(stage):
    a = noise_for(3, range(10), (3, 8, 8))
    assert torch.equal(a[[7, 2]], noise_for(3, torch.tensor([7, 2]), (3, 8, 8)))
    assert not torch.equal(a, noise_for(4, range(10), (3, 8, 8))) and not torch.equal(a[0], a[1])
    many, labels = noise_for(0, range(500), (3, 8, 8)), labels_for(1, 3000, 3)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert torch.equal(labels, labels_for(1, 3000, 3)) and not torch.equal(labels, labels_for(2, 3000, 3))
    assert labels.bincount().tolist() == pytest.approx([1000] * 3, abs=90) and labels_for(1, 9, 0) is None
    # No use of noise reaches the numbers of another, and the samples are those of the evaluation.
    tables = stage("02").SETTINGS + stage("04").SETTINGS
    counts = [max(row[1:6]) for row in tables if row[0] == "n_pairs"]
    assert 0 <= common.PAIRS and common.PAIRS + 1000 * counts[0] <= common.OWN_PAIRS
    assert common.OWN_PAIRS + 1000 * counts[1] <= common.EVALUATION
    net = UNet(8, base=8, mult=(1,), blocks=1, classes=3).eval()
    net.conv_out.weight.data.fill_(0.1)
    z = noise_for(7, range(common.EVALUATION, common.EVALUATION + 5), (3, 8, 8))
    assert torch.equal(common.samples(net, 7, 5, 2), euler(net, z, 2, labels_for(7, 5, 3)))


def test_flow_loss_is_zero_for_the_true_velocity_and_right_for_wrong_ones(stage):
    # For data that is a fixed c, the velocity (c - x_t) / (1 - t) is x - z exactly.
    loss, z, c = stage("01").flow_loss, torch.randn(64, 3, 4, 4), 0.7
    net = Field(lambda x, t: (c - x) / (1 - t))
    assert loss(net, z, torch.full_like(z, c), LABELS) < 1e-6 and net.labels is LABELS
    # For v = 0 it is the mean of (x - z)^2.
    torch.testing.assert_close(loss(ZERO, z, torch.full_like(z, c)), (c - z).square().mean())
    # With x = 0, x_t = (1 - t) z, v = a x_t: E (a (1 - t) z + z)^2 = E (1 + a (1 - t))^2 = 1 + a + a^2 / 3.
    z = torch.randn(20_000, 1, 2, 2)
    assert loss(Field(lambda x, t: 0.5 * x), z, 0 * z).item() == pytest.approx(1 + 0.5 + 0.25 / 3, abs=0.02)


def test_reflow_loss_mixes_fresh_noise_of_the_right_share(stage):
    loss, z = stage("03").reflow_loss, torch.randn(20_000, 1, 2, 2)
    # v = 0 and x = 0: the loss is E z_beta^2 = 1. x = z: E (z - z_beta)^2 = 2 - 2 sqrt(1 - beta^2).
    for b in (0.0, 0.6, 1.0):
        assert loss(ZERO, z, 0 * z, b).item() == pytest.approx(1, abs=0.02)
        assert loss(ZERO, z, z, b).item() == pytest.approx(2 - 2 * math.sqrt(1 - b**2), abs=0.02)
    # Pairs x = z + 2: the straight flow is v = 2. At beta > 0 it is not right any more.
    z, straight = torch.randn(64, 3, 4, 4), Field(lambda x, t: 2 + 0 * x)
    assert loss(straight, z, z + 2, 0.0, LABELS) < 1e-10 and straight.labels is LABELS
    assert loss(straight, z, z + 2, 0.5) > 0.1
    # ... and for x = 3 x_t runs on the mixed pair's own line: 3 - z_beta = 3 - (x_t - 3 t) / (1 - t).
    assert loss(Field(lambda x, t: 3 - (x - t * 3) / (1 - t)), z, torch.full_like(z, 3.0), 0.7) < 1e-5


def test_times_are_uniform_between_their_bounds(stage, monkeypatch):
    z, net = torch.zeros(5000, 1, 1, 1), Field(lambda x, t: x)
    for low, high, loss in (
            (EPS, 1, lambda: stage("01").flow_loss(net, z, z)),
            (EPS, 1, lambda: stage("03").reflow_loss(net, z, z, 0.5)),
            (0.2, 0.8, lambda: stage("04").guided_loss(z, net, z, stage("04").squared_l2)),
            (0.3, 0.5, lambda: stage("04").guided_loss(z, net, z, stage("04").squared_l2, None, 0.3, 0.5))):
        loss()
        t = net.times[-1]
        assert t.min() >= low and t.max() <= high and abs(t.mean() - (low + high) / 2) < 0.02
        assert t.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.03)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, **more: torch.zeros(*shape))
            loss()
        assert net.times[-1].unique().item() == pytest.approx(low)  # the bound itself


def test_distill_loss_is_one_step_at_eps(stage):
    s, z, x = stage("04"), torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    student = Field(lambda x, t: 0.5 * x + t)
    loss = s.distill_loss(s.first_step(student, z, LABELS), z, x, s.squared_l2)
    torch.testing.assert_close(loss, (1.5 * z + EPS - x).square().mean())
    loss.backward()
    assert student.scale.grad.abs() > 0 and student.labels is LABELS


def test_guided_loss_follows_the_students_own_first_step_then_the_flow(stage):
    # v' = a z, v = b x: x_t = (1 + t a) z, target = x_t (1 + (1 - t) b); the student's jump is (1 + a) z.
    s, z, a, b, t = stage("04"), torch.randn(8, 3, 4, 4), 0.5, -0.8, 0.4
    student, flow = Field(lambda x, t: a * x), Field(lambda x, t: b * x)
    loss = s.guided_loss(s.first_step(student, z), flow, z, s.squared_l2, LABELS, t_low=t, t_high=t)
    difference = (1 + a) - (1 + t * a) * (1 + (1 - t) * b)
    torch.testing.assert_close(loss, difference**2 * z.square().mean())
    assert len(student.times) == len(flow.times) == 1 and flow.labels is LABELS
    loss.backward()
    assert flow.scale.grad is None  # nothing flows into the target
    torch.testing.assert_close(student.scale.grad, 2 * difference * a * z.square().mean())  # nor through x_t


def test_ema_ramp_and_learning_rate():
    net, ema = UNet(8, base=8, mult=(1,), blocks=1), UNet(8, base=8, mult=(1,), blocks=1)
    for n, d in ((1, 2 / 11), (1000, 0.9)):  # d = min(0.9, (1 + n) / (10 + n))
        before = ema.conv_in.weight.clone()
        ema_update(ema, net, 0.9, n)
        torch.testing.assert_close(ema.conv_in.weight.data, d * before + (1 - d) * net.conv_in.weight)
    cfg = argparse.Namespace(steps=100, warmup=10, cooldown=0.2, lr=2.0)
    rates = [round(common.learning_rate(k, cfg), 3) for k in (0, 9, 50, 80, 90, 99)]
    assert rates == [0.2, 2, 2, 2, 1, 0.1]
    cfg.warmup, cfg.cooldown = 0, 0.0
    assert {common.learning_rate(k, cfg) for k in range(100)} == {2.0}
