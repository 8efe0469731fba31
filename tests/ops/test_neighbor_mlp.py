"""Set abstraction's heart: the fused kernel against a loop in float64, its reference's gradient, and every odd size."""

import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops.neighbor_mlp import neighbor_mlp_max, neighbor_mlp_max_reference

both = pytest.mark.parametrize("function", [neighbor_mlp_max, neighbor_mlp_max_reference])


def case(
    counts: list[int], *, channels: int = 6, wide: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(9, channels, generator=generator, dtype=dtype)
    centers = torch.randn(len(counts), channels, generator=generator, dtype=dtype)
    second = torch.randn(wide, channels, generator=generator, dtype=dtype)
    index = torch.randint(9, (sum(counts),), generator=generator)
    return [points, centers, index, torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]), second]


def by_loop(points: Tensor, centers: Tensor, index: Tensor, starts: Tensor, second: Tensor) -> Tensor:
    out = torch.zeros(len(centers), len(second), dtype=torch.float64)
    for q in range(len(centers)):
        answers = [
            second.double() @ (points[j].double() - centers[q].double()).clamp_min(0)
            for j in index[starts[q] : starts[q + 1]].tolist()
        ]
        if answers:
            out[q] = torch.stack(answers).amax(0)
    return out


@both
@pytest.mark.parametrize(("channels", "wide"), [(6, 5), (1, 1), (4, 16), (67, 33)])
def test_the_formula(function, channels, wide):
    arguments = case([3, 1, 0, 2, 8, 0, 5], channels=channels, wide=wide)
    torch.testing.assert_close(function(*arguments), by_loop(*arguments).float(), atol=2e-5, rtol=1e-5)


@both
def test_a_maximum_below_zero_stays_and_no_neighbor_gives_zero(function):
    points, centers, index, starts, second = case([1, 0])
    out = function(points.abs() + 3, centers * 0, index, starts, -second.abs())
    assert bool((out[0] < 0).all())
    assert torch.equal(out[1], torch.zeros(5))


@both
@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_nothing_in_nothing_out(function, counts):
    points, centers, index, starts, second = case(counts)
    assert function(points, centers, index, starts, second).shape == (len(counts), 5)
    assert torch.equal(function(points[:0], centers, index, starts, second), torch.zeros(len(counts), 5))


def test_one_and_two_threads_agree_bit_for_bit():
    arguments = case([k % 7 for k in range(700)], channels=8, wide=8)
    assert torch.equal(*tiny.for_thread_counts(lambda: neighbor_mlp_max(*arguments)))


def test_the_gradient_reaches_points_centers_and_weights():
    points, centers, index, starts, second = case([3, 1, 0, 2], dtype=torch.float64, seed=3)
    inputs = [t.requires_grad_() for t in (points, centers, second)]
    assert torch.autograd.gradcheck(lambda p, c, s: neighbor_mlp_max(p, c, index, starts, s), inputs)


def test_in_float32_a_gradient_is_not_lost_to_the_fast_kernel():
    points, centers, index, starts, second = case([3, 1, 0, 2])
    out = neighbor_mlp_max(points, centers, index, starts, second.requires_grad_())
    out.sum().backward()
    assert bool(second.grad.abs().sum() > 0)
    with torch.no_grad():
        torch.testing.assert_close(neighbor_mlp_max(points, centers, index, starts, second), out)


@both
def test_shapes_that_do_not_fit_are_refused(function):
    points, centers, index, starts, second = case([2, 1])
    for wrong in (
        (points[:, :3], centers, index, starts, second),
        (points, centers, index, starts[:-1], second),
        (points, centers, index + 9, starts, second),
        (points, centers, index[:-1], starts, second),
        (points, centers, index.int(), starts, second),
    ):
        with pytest.raises(InvalidInput, match="neighbor_mlp_max"):
            function(*wrong)
