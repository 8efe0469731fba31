"""Maximum over segments: against a loop, and its gradient against autograd through the plain torch version."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops.segment_max import segment_max, segment_max_reference

both = pytest.mark.parametrize("function", [segment_max, segment_max_reference])


def segments(counts: list[int], channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values with many ties, some of them negative only, and the bounds of segments of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-5, 0, (sum(counts), channels), generator=generator).float()
    return values, torch.tensor([0, *counts]).cumsum(0)


def by_loop(values: Tensor, starts: Tensor) -> Tensor:
    bounds = starts.tolist()
    rows = [values[a:b].amax(0) if b > a else values.new_zeros(values.shape[1]) for a, b in pairwise(bounds)]
    return torch.stack(rows) if rows else values.new_zeros(0, values.shape[1])


COUNTS = [[3, 0, 1, 32, 0, 5], [0], [0, 0, 4], [1], [7, 0, 0]]


@both
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("channels", [1, 13, 64])
def test_agrees_with_a_loop(function, counts, channels):
    values, starts = segments(counts, channels)
    assert torch.equal(function(values, starts), by_loop(values, starts))
    assert torch.equal(function(values.double(), starts), by_loop(values, starts).double())


@both
def test_gradient_goes_to_the_first_row_that_holds_the_maximum(function):
    values = torch.tensor([[1.0, 5], [3, 5], [3, 2], [9, 9]], requires_grad=True)
    function(values, torch.tensor([0, 3, 3, 4])).backward(torch.tensor([[10.0, 20], [30, 40], [50, 60]]))
    assert values.grad.tolist() == [[0, 20], [10, 0], [0, 0], [50, 60]]


@pytest.mark.parametrize("counts", COUNTS)
def test_gradient_agrees_with_the_reference_in_float64(counts):
    values, starts = segments(counts, 13)
    grad = torch.randn(len(counts), 13, generator=torch.Generator().manual_seed(1))
    one, two = values.clone().requires_grad_(), values.double().requires_grad_()
    segment_max(one, starts).backward(grad)
    reference = segment_max_reference(two, starts)
    if reference.requires_grad:
        reference.backward(grad.double())
        assert torch.equal(one.grad.double(), two.grad)
    else:
        assert one.grad.shape == (0, 13)


def test_gradcheck_of_the_reference():
    values = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: segment_max(v, torch.tensor([0, 4, 4, 11, 20])), values)


@both
def test_columns_of_a_larger_tensor_and_a_gradient_that_is_expanded(function):
    values, starts = segments([4, 6], 8)
    part = values.requires_grad_()[:, ::2]
    out = function(part, starts)
    assert torch.equal(out, by_loop(part, starts))
    out.sum().backward()
    assert values.grad.sum() == 8
    assert (values.grad[:, 1::2] == 0).all()


@both
def test_nan_and_infinity_are_kept(function):
    values = torch.tensor(
        [[1.0, torch.nan], [torch.nan, 2], [3, 3], [-torch.inf, torch.inf], [-torch.inf, 0]], requires_grad=True
    )
    out = function(values, torch.tensor([0, 3, 5]))
    assert out[0].isnan().all()
    assert out[1].tolist() == [-torch.inf, torch.inf]
    out.backward(torch.ones_like(out))
    assert values.grad.tolist() == [[0, 1], [1, 0], [0, 0], [1, 1], [0, 0]]


def test_one_and_two_threads_give_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, 4, (3000,), generator=generator).cumsum(0)])
    values, grad = torch.randn(int(starts[-1]), 5, generator=generator), torch.randn(3000, 5, generator=generator)

    def forward_and_gradient() -> tuple[Tensor, Tensor]:
        leaf = values.clone().requires_grad_()
        out = segment_max(leaf, starts)
        out.backward(grad)
        return out.detach(), leaf.grad

    results = tiny.for_thread_counts(forward_and_gradient)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert torch.equal(results[0][0], segment_max_reference(values, starts))


@both
def test_bad_input_is_refused(function):
    starts = torch.tensor([0, 2, 5])
    for values, bounds in [
        (torch.zeros(5), starts),
        (torch.zeros(5, 2, dtype=torch.int64), starts),
        (torch.zeros(5, 2), starts.int()),
        (torch.zeros(5, 2), starts[None]),
        (torch.zeros(5, 2), starts[:0]),
    ]:
        with pytest.raises(InvalidInput, match="expects values"):
            function(values, bounds)
    for bounds in [[0, 4], [1, 5], [0, 4, 3, 5], [0, 6]]:
        with pytest.raises(InvalidInput, match="ascend"):
            function(torch.zeros(5, 2), torch.tensor(bounds))
