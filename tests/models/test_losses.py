"""Losses against the formulas written out for one number at a time, in float64, and their gradients."""

import math
from collections.abc import Callable

import pytest
import torch

from upcycle3d.perception.models.losses import box_code_loss, sigmoid_focal_loss, smooth_l1


def focal_of_one(logit: float, target: float, alpha: float = 0.25, gamma: float = 2.0) -> float:
    p = 1 / (1 + math.exp(-logit))
    if target == 1:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p**gamma * math.log(1 - p)


def smooth_l1_of_one(x: float, beta: float = 1 / 9) -> float:
    return 0.5 * x * x / beta if abs(x) < beta else abs(x) - 0.5 * beta


def check_gradient(loss: Callable[[torch.Tensor], torch.Tensor], slow: Callable[[float], float]) -> None:
    """Backward in float32 equals the central difference of the slow formula in float64 (the losses compute in float32)."""
    x = torch.linspace(-2.03, 1.97, 15, requires_grad=True)
    loss(x).sum().backward()
    assert x.grad is not None
    step = 1e-6
    expected = torch.tensor([(slow(v + step) - slow(v - step)) / (2 * step) for v in x.tolist()])
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_focal_loss_is_the_formula():
    logits = torch.linspace(-8, 8, 33)
    for target in (0.0, 1.0):
        found = sigmoid_focal_loss(logits, torch.full_like(logits, target))
        expected = torch.tensor([focal_of_one(x, target) for x in logits.tolist()], dtype=torch.float64)
        assert torch.allclose(found.double(), expected, rtol=2e-5, atol=1e-7)


def test_focal_loss_stays_finite_for_huge_logits_and_half_precision():
    logits = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0.0, 0, 1, 1]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()
    assert sigmoid_focal_loss(torch.zeros(2, dtype=torch.float16), torch.zeros(2)).dtype == torch.float32


def test_smooth_l1_is_the_formula_and_smooth_where_the_pieces_meet():
    x = torch.tensor([-3.0, -1 / 9, -0.11, -1e-4, 0.0, 0.05, 1 / 9, 0.112, 2.0])
    expected = torch.tensor([smooth_l1_of_one(v) for v in x.tolist()], dtype=torch.float64)
    assert torch.allclose(smooth_l1(x).double(), expected, rtol=1e-6, atol=1e-9)
    near = torch.tensor([1 / 9 - 1e-5, 1 / 9 + 1e-5], requires_grad=True)
    value = smooth_l1(near)
    value.sum().backward()
    assert abs(value[1] - value[0]) < 3e-5
    assert torch.allclose(near.grad, torch.ones(2), atol=2e-4)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_gradient_of_the_focal_loss(target):
    check_gradient(lambda x: sigmoid_focal_loss(x, torch.full_like(x, target)), lambda x: focal_of_one(x, target))


def test_gradient_of_smooth_l1_and_of_the_yaw_term():
    check_gradient(smooth_l1, smooth_l1_of_one)
    turned = torch.zeros(1, 7)

    def yaw_term(x: torch.Tensor) -> torch.Tensor:
        return box_code_loss(torch.cat([turned.expand(len(x), -1)[:, :6], x[:, None]], 1), turned.expand(len(x), -1))

    check_gradient(yaw_term, lambda x: smooth_l1_of_one(math.sin(x)))


def test_opposite_headings_cost_nothing_and_a_quarter_turn_most():
    codes, targets = torch.zeros(3, 7), torch.zeros(3, 7)
    codes[:, 6] = torch.tensor([0.4, 0.4 + math.pi, 0.4 + math.pi / 2])
    targets[:, 6] = 0.4
    loss = box_code_loss(codes, targets)
    assert loss[0] == 0
    assert loss[1] < 1e-12
    assert loss[2].item() == pytest.approx(1 - 1 / 18)


def test_box_code_loss_is_a_sum_over_the_seven_numbers():
    generator = torch.Generator().manual_seed(0)
    codes, targets = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    for found, a, b in zip(box_code_loss(codes, targets).tolist(), codes.tolist(), targets.tolist(), strict=True):
        expected = sum(smooth_l1_of_one(p - q) for p, q in zip(a[:6], b[:6], strict=True)) + smooth_l1_of_one(
            math.sin(a[6] - b[6])
        )
        assert found == pytest.approx(expected, rel=1e-5)
    assert box_code_loss(torch.zeros(0, 7), torch.zeros(0, 7)).shape == (0,)
