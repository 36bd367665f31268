"""The Trainer on two numbers, against the same by hand; and how a run is broken off and continued."""
import argparse
import math
import os
import signal

import pytest
import torch

import common
from common import Trainer, UserError


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.tensor(2.0))


@pytest.fixture
def cfg(tmp_path):
    return argparse.Namespace(folder=tmp_path, out="out", preset="shapes", seed=0, device="cpu", data="x",
                              restart=False, allow_mixed=False, steps=40, batch=4, lr=0.1, warmup=10,
                              cooldown=0.25, ema=0.7)


def smooth(step, net):
    """A loss whose gradient is now shorter than 1, now longer."""
    return (0.05, 30, 0.3)[step % 3] * ((net.a - 3) ** 2 + 2 * (net.b + 1) ** 2)


def noisy(step, net):
    return smooth(step, net) + torch.rand(()) * net.a


def numbers(cfg, loss=noisy, made_from="1", **changed):
    """Trains, and returns all that was computed: weights, EMA, and what Adam remembers."""
    cfg = argparse.Namespace(**{**vars(cfg), **changed})
    trainer = Trainer(cfg, "01 teacher", Two(), {"data": made_from})
    for step in trainer.steps():
        trainer.update(loss(step, trainer.net))
    values = [p.item() for net in (trainer.trained, trainer.ema) for p in net.parameters()]
    return values + [v.item() for state in trainer.optimizer.state.values() for v in state.values()]


def test_it_does_what_a_few_lines_by_hand_do(cfg, capsys):
    p, m, v, average = [1.0, 2.0], [0, 0], [0, 0], [1.0, 2.0]
    for n in range(1, 41):
        factor = (0.05, 30, 0.3)[(n - 1) % 3]
        gradient = [factor * 2 * (p[0] - 3), factor * 4 * (p[1] + 1)]
        clip = min(1, 1 / math.hypot(*gradient))
        lr = 0.1 * min(1, n / 10) * min(1, (41 - n) / 10)
        for i in range(2):
            m[i] = 0.9 * m[i] + 0.1 * clip * gradient[i]
            v[i] = 0.999 * v[i] + 0.001 * (clip * gradient[i]) ** 2
            p[i] -= lr * m[i] / (1 - 0.9**n) / (math.sqrt(v[i] / (1 - 0.999**n)) + 1e-8)
            d = min(0.7, (1 + n) / (10 + n))
            average[i] = d * average[i] + (1 - d) * p[i]
    assert numbers(cfg, smooth)[:4] == pytest.approx(p + average, rel=1e-5)
    assert "01 teacher | step     40/40 | loss" in capsys.readouterr().out


def test_each_seed_and_process_draws_numbers_of_its_own_and_always_the_same(cfg, monkeypatch):
    first = numbers(cfg)
    assert numbers(cfg, restart=True) == first != numbers(cfg, seed=1, restart=True)
    monkeypatch.setattr(common, "RANK", 1)
    assert numbers(cfg, restart=True) != first


@pytest.mark.parametrize("stop", ["exception", "SIGINT", "SIGTERM"])
def test_a_run_that_was_broken_off_continues_to_the_same_bits(cfg, monkeypatch, stop, capsys):
    def broken(step, net):
        if step == 17 and stop == "exception":
            raise KeyboardInterrupt("stopped after step 17")
        if step == 16 and stop != "exception":
            os.kill(os.getpid(), getattr(signal, stop))
        return noisy(step, net)

    whole = numbers(cfg)
    monkeypatch.setattr(common, "SAVE_SECONDS", -1 if stop == "exception" else 300)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 17"):
        numbers(cfg, broken, restart=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert numbers(cfg, out="elsewhere", data="y", device="auto") == whole  # these may change
    assert "continues after step 17 of 40" in capsys.readouterr().out


def test_another_run_is_refused_or_started_over_and_a_damaged_one_is_refused(cfg):
    whole = numbers(cfg)
    with pytest.raises(UserError, match="steps was 40, is 50; lr was 0.1, is 0.2; made from was .*--restart"):
        numbers(cfg, made_from="2", lr=0.2, steps=50)
    assert numbers(cfg, lambda step, net: 1 / 0) == whole  # it is complete: no step is made
    with pytest.raises(ZeroDivisionError):
        numbers(cfg, lambda step, net: 1 / 0, lr=0.2, restart=True)
    assert not list(cfg.folder.iterdir())  # what was given up does not come back
    assert numbers(cfg) == whole
    path, = cfg.folder.iterdir()
    good = path.read_bytes()
    for bad in (good[:-100], b"", good.replace(b"shapes", b"chapes")):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="^[^\n]*01_state.pt is damaged[^\n]*$"):
            numbers(cfg)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("seconds", [-1, 10])
def test_what_is_not_finite_is_named_with_its_step_and_not_saved(cfg, monkeypatch, what, seconds):
    def bad(step, net):
        loss = noisy(step, net)
        if step == 13 and what == "gradient":
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss * math.inf if step == 13 and what == "loss" else loss

    whole = numbers(cfg)
    monkeypatch.setattr(common, "SAVE_SECONDS", seconds)
    with pytest.raises(UserError, match=f"{what} not finite.* step 13"):
        numbers(cfg, bad, restart=True)
    assert len(list(cfg.folder.iterdir())) == (seconds < 0) and numbers(cfg) == whole
