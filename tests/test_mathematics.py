"""Known answers for Euler, beta, flips, noise, the four losses and EMA."""
import math

import pytest
import torch

import common
from common import EPS, UNet, ema_update, euler, noise_for, random_flip
from conftest import Field


def test_euler_is_exact_on_a_constant_velocity_and_makes_exactly_steps_calls():
    z, v = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    for steps in (1, 2, 7):
        net = Field(lambda x, t: v)
        torch.testing.assert_close(euler(net, z, steps), z + v)
        assert len(net.times) == steps
        expected = [EPS + (1 - EPS) * i / steps for i in range(steps)]
        torch.testing.assert_close(torch.stack(net.times)[:, 0], torch.tensor(expected))


def test_euler_on_a_linear_velocity_equals_the_recurrence():
    z = torch.randn(2, 3, 4, 4)
    # v = x gives x <- x (1 + 1/N); v = t gives the sum of the times.
    torch.testing.assert_close(euler(Field(lambda x, t: x), z, 10), z * 1.1**10)
    torch.testing.assert_close(euler(Field(lambda x, t: t + 0 * x), z, 4), z + EPS + (1 - EPS) * (0 + 1 + 2 + 3) / 16)


def test_euler_passes_the_labels_on():
    net, labels = Field(lambda x, t: x), torch.tensor([4, 2])
    euler(net, torch.randn(2, 3, 4, 4), 2, labels)
    assert net.labels is labels


def test_beta_end_points_and_shapes(stage):
    s = stage("03")
    cfg = s.Config(anneal_steps=100, schedule="linear")
    assert [s.beta(k, cfg) for k in (0, 25, 100, 1000)] == [1, 0.75, 0, 0]
    cfg.schedule = "cosine"
    assert [round(s.beta(k, cfg), 6) for k in (0, 25, 50, 100, 1000)] == [1, round((1 + math.sqrt(0.5)) / 2, 6), 0.5, 0, 0]
    cfg.schedule = "exponential"
    assert [s.beta(k, cfg) for k in (0, 100, 300)] == [1, math.exp(-1), math.exp(-3)]
    cfg.schedule, cfg.beta_fixed = "fixed", 0.3
    assert [s.beta(k, cfg) for k in (0, 500)] == [0.3, 0.3]


def test_flips_move_both_ends_of_a_pair_and_choose_per_sample():
    a, b = torch.randn(200, 3, 4, 4), torch.randn(200, 3, 4, 4)
    fa, fb = random_flip(torch.rand(len(a)), a, b)
    mirrored = [torch.equal(fa[i], a[i].flip(2)) for i in range(200)]
    for i, m in enumerate(mirrored):
        assert torch.equal(fa[i], a[i].flip(2) if m else a[i]) and torch.equal(fb[i], b[i].flip(2) if m else b[i])
    assert 60 < sum(mirrored) < 140


def test_noise_is_a_function_of_seed_and_index():
    a = noise_for(3, range(10), (3, 8, 8))
    assert torch.equal(a[[7, 2]], noise_for(3, torch.tensor([7, 2]), (3, 8, 8)))
    assert not torch.equal(a, noise_for(4, range(10), (3, 8, 8))) and not torch.equal(a[0], a[1])
    many = noise_for(0, range(500), (3, 8, 8))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


def test_flow_loss_is_zero_for_the_true_velocity_and_right_for_a_wrong_one(stage):
    # For data that is a fixed c, the velocity (c - x_t) / (1 - t) is x - z exactly.
    loss, z, c = stage("01").flow_loss, torch.randn(64, 3, 4, 4), 0.7
    net = Field(lambda x, t: (c - x) / (1 - t))
    assert loss(net, z, torch.full_like(z, c)) < 1e-6
    # For v = 0 it is the mean of (x - z)^2.
    zero = Field(lambda x, t: 0 * x)
    torch.testing.assert_close(loss(zero, z, torch.full_like(z, c)), (c - z).square().mean())
    t = zero.times[0]
    assert t.min() >= EPS and t.max() <= 1 and t.std() > 0.2  # U[EPS, 1] has 0.29


def test_flow_loss_of_a_linear_field_has_its_closed_form(stage):
    # With x = 0, x_t = (1 - t) z, v = a x_t: E (a (1 - t) z + z)^2 = E (1 + a (1 - t))^2 = 1 + a + a^2 / 3.
    z = torch.randn(20_000, 1, 2, 2)
    loss = stage("01").flow_loss(Field(lambda x, t: 0.5 * x), z, torch.zeros_like(z))
    assert abs(loss.item() - (1 + 0.5 + 0.25 / 3)) < 0.02


@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
def test_reflow_loss_mixes_fresh_noise_of_the_right_share(stage, beta):
    # v = 0 and x = 0: the loss is E z_beta^2 = 1 for any beta. x = z: E (z - z_beta)^2 = 2 - 2 sqrt(1 - beta^2).
    loss, z = stage("03").reflow_loss, torch.randn(20_000, 1, 2, 2)
    zero = Field(lambda x, t: 0 * x)
    assert abs(loss(zero, z, torch.zeros_like(z), beta).item() - 1) < 0.02
    assert abs(loss(zero, z, z, beta).item() - (2 - 2 * math.sqrt(1 - beta**2))) < 0.02


def test_reflow_loss_without_annealing_is_zero_for_the_straight_flow_of_the_pairs(stage):
    # Pairs x = z + 2: the straight flow is v = 2. At beta > 0 it is not right any more.
    loss, z = stage("03").reflow_loss, torch.randn(64, 3, 4, 4)
    assert loss(Field(lambda x, t: 2 + 0 * x), z, z + 2, 0.0) < 1e-10
    assert loss(Field(lambda x, t: 2 + 0 * x), z, z + 2, 0.5) > 0.1
    # ... and at beta = 0 x_t runs on the pair's own line: (x_t - z) / t = 2 for v = (x_t - t x) / (1 - t).
    net = Field(lambda x, t: 3 - (x - t * 3) / (1 - t))  # for x = 3: x - z from x_t
    assert loss(net, z, torch.full_like(z, 3.0), 0.7) < 1e-5


def test_distill_loss_is_one_step_at_eps(stage):
    s, z = stage("04"), torch.randn(8, 3, 4, 4)
    student = Field(lambda x, t: 0.5 * x + t)
    data = torch.randn_like(z)
    loss = s.distill_loss(s.first_step(student, z), z, data, s.squared_l2)
    torch.testing.assert_close(loss, (1.5 * z + EPS - data).square().mean())
    assert s.squared_l2(z, data).shape == (8,)
    loss.backward()
    assert student.scale.grad.abs() > 0


def test_guided_loss_follows_the_students_own_first_step_then_the_flow(stage):
    # v' = a z, v = b x: x_t = (1 + t a) z, target = x_t (1 + (1 - t) b); the student's jump is (1 + a) z.
    s, z, a, b, t = stage("04"), torch.randn(8, 3, 4, 4), 0.5, -0.8, 0.4
    student, flow = Field(lambda x, t: a * x), Field(lambda x, t: b * x)
    loss = s.guided_loss(s.first_step(student, z), flow, z, s.squared_l2, t_low=t, t_high=t)
    expected = ((1 + a) - (1 + t * a) * (1 + (1 - t) * b)) ** 2 * z.square().mean()
    torch.testing.assert_close(loss, expected)
    assert len(student.times) == len(flow.times) == 1
    loss.backward()
    assert flow.scale.grad is None  # nothing flows into the target
    gradient = 2 * ((1 + a) - (1 + t * a) * (1 + (1 - t) * b)) * a * z.square().mean()
    torch.testing.assert_close(student.scale.grad, gradient)  # nor through the student's part of it


def test_guided_loss_draws_t_between_its_bounds(stage):
    s = stage("04")
    flow = Field(lambda x, t: x)
    z = torch.randn(500, 1, 2, 2)
    s.guided_loss(z, flow, z, s.squared_l2, t_low=0.2, t_high=0.8)
    assert flow.times[0].min() >= 0.2 and flow.times[0].max() <= 0.8 and abs(flow.times[0].std() - 0.173) < 0.02


def test_losses_pass_the_labels_on(stage):
    z, labels = torch.randn(2, 3, 4, 4), torch.tensor([1, 0])
    for loss in (lambda net: stage("01").flow_loss(net, z, z, labels),
                 lambda net: stage("03").reflow_loss(net, z, z, 0.5, labels),
                 lambda net: stage("04").first_step(net, z, labels),
                 lambda net: stage("04").guided_loss(z, net, z, stage("04").squared_l2, labels)):
        net = Field(lambda x, t: x)
        loss(net)
        assert net.labels is labels


def test_ema_ramp():
    net, ema = UNet(8, base=8, mult=(1,), blocks=1), UNet(8, base=8, mult=(1,), blocks=1)
    before, now = ema.conv_in.weight.clone(), net.conv_in.weight
    ema_update(ema, net, 0.9, 1)  # d = min(0.9, 2 / 11)
    torch.testing.assert_close(ema.conv_in.weight.data, 2 / 11 * before + 9 / 11 * now)
    before = ema.conv_in.weight.clone()
    ema_update(ema, net, 0.9, 1000)  # d = 0.9
    torch.testing.assert_close(ema.conv_in.weight.data, 0.9 * before + 0.1 * now)


def test_training_returns_the_ema_and_learns(stage, capsys, tmp_path):
    cfg = stage("01").Config(out=str(tmp_path), steps=30, batch=4, ema=0.5, lr=0.05, warmup=0, cooldown=0.0, log_every=10)
    net = Field(lambda x, t: x)
    ema, losses = common.train("test", cfg, net, lambda net, *_: (net(torch.ones(1, 1, 1, 1), torch.ones(1)) - 3).square().mean())
    assert len(losses) == 30 and losses[-1] < losses[0]
    assert ema.scale < net.scale and not ema.scale.requires_grad  # the average lags behind the rising weight
    assert "step     30/30" in capsys.readouterr().out


def test_learning_rate_rises_and_falls(stage):
    cfg = stage("01").Config(steps=100, warmup=10, cooldown=0.2, lr=1.0)
    assert [round(common.learning_rate(k, cfg), 3) for k in (0, 9, 50, 80, 90, 99)] == [0.1, 1, 1, 1, 0.5, 0.05]
