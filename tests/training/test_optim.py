"""The one-cycle schedule and its optimiser."""

import itertools
import math

import pytest
import torch
from torch import nn

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.training.optim import OneCycle, learning_rate, make_optimizer, momentum, set_schedule

CONFIG = OneCycle(lr=0.003, total_steps=1000)


def test_learning_rate_starts_at_a_tenth_peaks_at_40_percent_and_ends_at_1e5th():
    assert learning_rate(CONFIG, 0) == pytest.approx(0.0003)
    assert learning_rate(CONFIG, 200) == pytest.approx((0.0003 + 0.003) / 2)  # a cosine is half way after half the time
    assert learning_rate(CONFIG, 400) == pytest.approx(0.003)
    assert learning_rate(CONFIG, 700) == pytest.approx((0.003 + 3e-8) / 2)
    assert learning_rate(CONFIG, 1000) == pytest.approx(3e-8)


def test_momentum_runs_against_the_learning_rate():
    assert [momentum(CONFIG, s) for s in (0, 200, 400, 700, 1000)] == pytest.approx([0.95, 0.90, 0.85, 0.90, 0.95])


def test_schedule_has_no_jump_and_climbs_before_it_falls():
    rates = [learning_rate(CONFIG, s) for s in range(1001)]
    assert rates[:401] == sorted(rates[:401])
    assert rates[400:] == sorted(rates[400:], reverse=True)
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) < 2 * 0.003 / 400


@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_run_of_very_few_steps_has_a_schedule(total):
    config = OneCycle(lr=1.0, total_steps=total)
    assert all(0 < learning_rate(config, s) <= 1.0 for s in range(total + 1))


def test_a_step_outside_the_run_is_an_error():
    with pytest.raises(InvalidInput, match=r"covers steps 0\.\.1000, asked for 1001"):
        learning_rate(CONFIG, 1001)


def test_impossible_numbers_are_refused():
    with pytest.raises(InvalidInput, match="lr > 0"):
        OneCycle(lr=0.0, total_steps=10)
    with pytest.raises(InvalidInput, match="total_steps >= 1"):
        OneCycle(lr=0.1, total_steps=0)


def test_weight_decay_is_decoupled_and_acts_on_batch_norm_too():
    norm = nn.BatchNorm1d(3)
    optimizer = make_optimizer(norm.parameters(), OneCycle(lr=0.1, total_steps=10, weight_decay=0.5))
    set_schedule(optimizer, OneCycle(lr=0.1, total_steps=10, weight_decay=0.5), 4)
    for p in norm.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(norm.weight, torch.full((3,), 1 - 0.1 * 0.5))


def test_one_step_is_adam_with_the_scheduled_betas():
    config = OneCycle(lr=0.1, total_steps=10, weight_decay=0.0)
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = make_optimizer([weight], config)
    gradients = [torch.tensor([0.5, 3.0], dtype=torch.float64), torch.tensor([-1.0, 0.2], dtype=torch.float64)]
    expected, mean, square = weight.detach().clone(), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        set_schedule(optimizer, config, step)
        weight.grad = gradient.clone()
        optimizer.step()
        beta1, beta2 = momentum(config, step), 0.99
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        corrected = mean / (1 - beta1 ** (step + 1)), square / (1 - beta2 ** (step + 1))
        expected -= learning_rate(config, step) * corrected[0] / (corrected[1].sqrt() + 1e-8)
    assert torch.allclose(weight.detach(), expected, rtol=1e-9)
    assert math.isclose(optimizer.param_groups[0]["lr"], learning_rate(config, 1))


def test_nothing_to_train_and_frozen_parameters_are_refused():
    with pytest.raises(InvalidInput, match="no parameter"):
        make_optimizer([], CONFIG)
    with pytest.raises(InvalidInput, match="1 of 1 parameters for the optimizer are frozen"):
        make_optimizer([nn.Parameter(torch.zeros(1), requires_grad=False)], CONFIG)
