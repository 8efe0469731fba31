"""Sparse convolution against torch's dense `conv3d` in float64, and the two ways of building a rulebook against each other."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops.rulebook import (
    strided_rulebook,
    strided_rulebook_reference,
    submanifold_rulebook,
    submanifold_rulebook_reference,
)
from upcycle3d.ops.sparse_conv import StridedConv3d, SubmanifoldConv3d, sparse_conv, sparse_conv_reference

SHAPE, BATCH = (5, 7, 6), 3
STRIDED = [  # kernel, stride, padding: those of SECOND, and one of unequal sizes
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (0, 1, 1)),
    ((3, 1, 1), (2, 1, 1), (0, 0, 0)),
    ((2, 3, 4), (1, 2, 3), (1, 0, 2)),
]
SUBMANIFOLD = [(3, 3, 3), (1, 1, 1), (3, 1, 5)]


def voxels(fraction: float = 0.3, seed: int = 0, shuffled: bool = False) -> Tensor:
    """Coordinates in a batch whose last scene is empty."""
    generator = torch.Generator().manual_seed(seed)
    occupied = torch.rand(BATCH, *SHAPE, generator=generator) < fraction
    occupied[-1] = False
    coords = occupied.nonzero().int()
    return coords[torch.randperm(len(coords), generator=generator)] if shuffled else coords


def one_voxel(z: int = 2, y: int = 3, x: int = 4) -> Tensor:
    return torch.tensor([[0, z, y, x]], dtype=torch.int32)


NO_VOXEL = torch.empty(0, 4, dtype=torch.int32)
CLOUDS = {
    "in order": voxels(),
    "shuffled": voxels(seed=1, shuffled=True),
    "full": voxels(fraction=1.0),
    "one": one_voxel(),
    "corner": one_voxel(4, 6, 5),
    "none": NO_VOXEL,
}


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(features: Tensor, coords: Tensor) -> Tensor:
    """(B, C, z, y, x), zero where there is no voxel."""
    grid = features.new_zeros(BATCH, *SHAPE, features.shape[1])
    return grid.index_put(tuple(coords.long().T), features).permute(0, 4, 1, 2, 3)


def assert_equals_dense(coords: Tensor, weight: Tensor, rulebook, stride, padding) -> Tensor:
    """Forward and both gradients, in float64; returns the dense output (B, z, y, x, C)."""
    features = double(len(coords), weight.shape[-1], seed=1).requires_grad_()
    weight = weight.requires_grad_()
    out = sparse_conv(features, weight, rulebook)
    grid = F.conv3d(dense(features, coords), weight.permute(0, 4, 1, 2, 3), stride=stride, padding=padding).permute(0, 2, 3, 4, 1)
    assert grid.shape[1:4] == rulebook.out_shape
    expected = grid[tuple(rulebook.out_coords.long().T)]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = double(*out.shape, seed=2)
    for ours, theirs in zip(
        torch.autograd.grad(out, (features, weight), grad), torch.autograd.grad(expected, (features, weight), grad)
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    return grid.detach()


@pytest.mark.parametrize("kernel", SUBMANIFOLD)
@pytest.mark.parametrize("cloud", CLOUDS)
def test_submanifold_equals_dense_conv_masked_to_its_sites(cloud, kernel):
    coords = CLOUDS[cloud]
    rulebook = submanifold_rulebook(coords, SHAPE, BATCH, kernel)
    assert torch.equal(rulebook.out_coords, coords)
    assert_equals_dense(coords, double(5, *kernel, 4), rulebook, 1, tuple(k // 2 for k in kernel))


@pytest.mark.parametrize("geometry", STRIDED)
@pytest.mark.parametrize("cloud", CLOUDS)
def test_strided_equals_dense_conv_and_has_a_site_wherever_a_window_holds_a_voxel(cloud, geometry):
    coords = CLOUDS[cloud]
    kernel, stride, padding = geometry
    rulebook = strided_rulebook(coords, SHAPE, BATCH, kernel, stride, padding)
    grid = assert_equals_dense(coords, double(5, *kernel, 4), rulebook, stride, padding)
    assert torch.equal(rulebook.out_coords, grid.any(dim=-1).nonzero().int())  # also: ascending in (batch, z, y, x)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_compiled_and_plain_rulebooks_are_equal(cloud):
    coords = CLOUDS[cloud]
    built = [(f(coords, SHAPE, BATCH, k) for f in (submanifold_rulebook, submanifold_rulebook_reference)) for k in SUBMANIFOLD]
    built += [(f(coords, SHAPE, BATCH, *g) for f in (strided_rulebook, strided_rulebook_reference)) for g in STRIDED]
    for fast, plain in built:
        assert fast.starts == plain.starts
        for name in ("pairs_in", "pairs_out", "out_coords"):
            ours, theirs = getattr(fast, name), getattr(plain, name)
            assert ours.dtype == theirs.dtype == torch.int32
            assert torch.equal(ours, theirs)


def test_pairs_ascend_in_output_rows_within_an_offset():
    coords = CLOUDS["shuffled"]
    for rulebook in (submanifold_rulebook(coords, SHAPE, BATCH), strided_rulebook(coords, SHAPE, BATCH, *STRIDED[0])):
        assert len(rulebook.starts) == 28
        for begin, end in zip(rulebook.starts, rulebook.starts[1:]):
            assert (rulebook.pairs_out[begin:end].diff() > 0).all()


@pytest.mark.parametrize("cloud", ["shuffled", "none"])
def test_plain_convolution_equals_the_compiled_one(cloud):
    coords = CLOUDS[cloud]
    for rulebook in (submanifold_rulebook(coords, SHAPE, BATCH), strided_rulebook(coords, SHAPE, BATCH, *STRIDED[1])):
        features, weight = double(len(coords), 4).requires_grad_(), double(5, 3, 3, 3, 4).requires_grad_()
        fast, plain = (f(features, weight, rulebook) for f in (sparse_conv, sparse_conv_reference))
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(out.square().sum(), (features, weight)) for out in (fast, plain)]
        for ours, theirs in zip(*grads):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_gradcheck():
    coords = voxels(0.1)
    for rulebook in (submanifold_rulebook(coords, SHAPE, BATCH), strided_rulebook(coords, SHAPE, BATCH, *STRIDED[0])):
        inputs = double(len(coords), 2).requires_grad_(), double(2, 3, 3, 3, 2).requires_grad_()
        assert torch.autograd.gradcheck(lambda f, w, r=rulebook: sparse_conv(f, w, r), inputs)


def test_frozen_weight_and_frozen_features_get_no_gradient():
    coords = CLOUDS["in order"]
    rulebook = submanifold_rulebook(coords, SHAPE, BATCH)
    for train_features, train_weight in ((True, False), (False, True)):
        features, weight = (
            double(len(coords), 4).requires_grad_(train_features),
            double(5, 3, 3, 3, 4).requires_grad_(train_weight),
        )
        sparse_conv(features, weight, rulebook).sum().backward()
        assert (features.grad is not None, weight.grad is not None) == (train_features, train_weight)


@pytest.mark.parametrize("shuffled", [False, True])
def test_results_are_bit_equal_for_any_number_of_threads_and_equal_the_reference(shuffled):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randperm(10 * 40 * 40, generator=generator)[:5000]  # several row ranges, and offsets of many tiles
    keys = keys if shuffled else keys.sort().values
    coords = torch.stack([torch.zeros_like(keys), keys // 1600, keys // 40 % 40, keys % 40], dim=1).int()
    features = torch.randn(5000, 32, generator=generator).requires_grad_()
    weight = (torch.randn(32, 3, 3, 3, 32, generator=generator) / 30).requires_grad_()

    def forward_and_gradients(conv=sparse_conv) -> tuple[Tensor, ...]:
        out = conv(features, weight, submanifold_rulebook(coords, (10, 40, 40), 1))
        return out, *torch.autograd.grad(out.square().sum(), (features, weight))

    results = tiny.for_thread_counts(forward_and_gradients, (1, 2, 3))
    for one, two, three, plain in zip(*results, forward_and_gradients(sparse_conv_reference)):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-4 * float(plain.detach().abs().max()))


def test_layers_that_share_a_rulebook_equal_layers_with_their_own():
    torch.manual_seed(0)
    coords = CLOUDS["shuffled"]
    first, second = SubmanifoldConv3d(4, 6), SubmanifoldConv3d(6, 3)
    features = torch.randn(len(coords), 4)
    shared = first.rulebook(coords, SHAPE, BATCH)
    own = [layer.rulebook(coords, SHAPE, BATCH) for layer in (first, second)]
    assert torch.equal(second(first(features, shared), shared), second(first(features, own[0]), own[1]))


def test_modules_hold_one_weight_in_the_layout_of_spconv():
    assert {k: tuple(v.shape) for k, v in SubmanifoldConv3d(4, 16).state_dict().items()} == {"weight": (16, 3, 3, 3, 4)}
    strided = StridedConv3d(8, 16, (3, 1, 1), (2, 1, 1), (0, 0, 0))
    assert {k: tuple(v.shape) for k, v in strided.state_dict().items()} == {"weight": (16, 3, 1, 1, 8)}
    rulebook = strided.rulebook(CLOUDS["in order"], SHAPE, BATCH)
    assert strided(torch.randn(rulebook.num_in, 8), rulebook).shape == (rulebook.num_out, 16)


def test_repeated_voxels_are_refused_and_named():
    coords = torch.cat([voxels(), voxels()[3:5]])
    for build in (
        lambda: submanifold_rulebook(coords, SHAPE, BATCH),
        lambda: submanifold_rulebook_reference(coords, SHAPE, BATCH),
        lambda: strided_rulebook(coords, SHAPE, BATCH, *STRIDED[0]),
    ):
        with pytest.raises(InvalidInput, match=rf"rows 3 and {len(coords) - 2} .*{str(tuple(coords[3].tolist()))[1:-1]}"):
            build()


@pytest.mark.parametrize("bad", [(0, 5, 0, 0), (0, 0, 7, 0), (0, 0, 0, 6), (3, 0, 0, 0), (0, 0, -1, 0)])
def test_voxels_outside_the_grid_are_refused_and_named(bad):
    coords = torch.cat([one_voxel(), torch.tensor([bad], dtype=torch.int32)])
    with pytest.raises(InvalidInput, match="row 1"):
        submanifold_rulebook(coords, SHAPE, BATCH)
    with pytest.raises(InvalidInput, match="row 1"):
        strided_rulebook(coords, SHAPE, BATCH, *STRIDED[0])


def test_unusable_geometry_and_types_are_refused():
    with pytest.raises(InvalidInput, match="odd"):
        submanifold_rulebook(one_voxel(), SHAPE, BATCH, (2, 3, 3))
    with pytest.raises(InvalidInput, match="larger than the grid"):
        strided_rulebook(one_voxel(), SHAPE, BATCH, (7, 3, 3), (1, 1, 1), (0, 0, 0))
    with pytest.raises(InvalidInput, match="int32"):
        submanifold_rulebook(one_voxel().long(), SHAPE, BATCH)
    with pytest.raises(InvalidInput, match="64 bits"):
        submanifold_rulebook(one_voxel(), (2**30, 2**30, 2**30), BATCH)
    rulebook = submanifold_rulebook(one_voxel(), SHAPE, BATCH)
    weight = torch.zeros(5, 3, 3, 3, 4)
    for features, other in ((torch.zeros(2, 4), weight), (torch.zeros(1, 3), weight), (torch.zeros(1, 4), weight[:, :1])):
        with pytest.raises(InvalidInput, match="must be"):
            sparse_conv(features, other, rulebook)
    with pytest.raises(InvalidInput, match="float64"):
        sparse_conv(torch.zeros(1, 4), weight.double(), rulebook)


AGAINST_SPCONV = """
import torch
from spconv.pytorch import ops
from upcycle3d.ops.rulebook import strided_rulebook, submanifold_rulebook
from upcycle3d.ops.sparse_conv import sparse_conv
from upcycle3d.ops.spconv_backend import sparse_conv_spconv, spconv_runs_on_cuda

ops.get_current_stream = lambda: 0  # the backward asks for a CUDA stream even on the CPU
torch.manual_seed(0)
occupied = torch.rand(2, 5, 7, 6) < 0.3
for coords in (occupied.nonzero().int(), torch.empty(0, 4, dtype=torch.int32)):
    for rulebook in (
        submanifold_rulebook(coords, (5, 7, 6), 2),
        strided_rulebook(coords, (5, 7, 6), 2, (3, 3, 3), (2, 2, 2), (0, 1, 1)),
        strided_rulebook(coords, (5, 7, 6), 2, (3, 1, 1), (2, 1, 1), (0, 0, 0)),
    ):
        features = torch.randn(len(coords), 4).requires_grad_()
        weight = torch.randn(8, *rulebook.kernel_size, 4).requires_grad_()
        results = []
        for conv in (sparse_conv, sparse_conv_spconv):
            out = conv(features, weight, rulebook)
            results.append((out, *torch.autograd.grad(out.square().sum(), (features, weight))))
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
print("equal", spconv_runs_on_cuda())
"""


@pytest.mark.skipif(importlib.util.find_spec("spconv") is None, reason="spconv is not installed")
def test_spconv_with_our_rulebook_equals_ours():
    # A process of its own: spconv's CPU code is right with one thread only, and only the environment limits it reliably.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", AGAINST_SPCONV], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("equal")


def test_it_runs_without_the_compiler():
    """`NUMBA_DISABLE_JIT=1` is for debuggers. The kernels are no plain Python, so the reference runs."""
    code = """
import torch
from upcycle3d.ops.sparse_conv import SubmanifoldConv3d
coords = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 2]], dtype=torch.int32)
conv = SubmanifoldConv3d(2, 3)
print(tuple(conv(torch.ones(2, 2), conv.rulebook(coords, (3, 3, 4), 1)).shape))
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "(2, 3)", done.stderr
