"""The inner loops of the sparse convolution against numpy, for the registers of every kind of processor, and with the same bits for all."""

import numba
import numpy as np
import pytest
from numba.core.errors import TypingError

from upcycle3d.ops.cpu.row_products import (
    REGISTERS,
    Registers,
    add_outer_products,
    add_outer_products_of,
    add_products,
    add_products_of,
    padded_width,
)

PROCESSORS = {
    "AVX-512": Registers(bytes=64, sums=16),
    "AVX": Registers(bytes=32, sums=8),
    "SSE": Registers(bytes=16, sums=8),
    "ARM": Registers(bytes=16, sums=16),
}
each_type = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_processor = pytest.mark.parametrize("registers", PROCESSORS.values(), ids=PROCESSORS.keys())


def rows(count, width, dtype, seed):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(dtype)


def close(found, wanted):
    return np.allclose(found, wanted, rtol=0, atol=1e-5 if found.dtype == np.float32 else 1e-13)


@each_type
@each_processor
def test_a_few_rows_at_a_time_equal_numpys_product(registers, dtype):
    width = 3 * registers.bytes // np.dtype(dtype).itemsize
    kernel = add_products_of(2, 1, registers)
    source, matrix, to = rows(5, 7, dtype, 0), rows(7, width, dtype, 1), rows(6, width, dtype, 2)
    rows_from, rows_to = np.array([4, 0, 3, 0], np.int32), np.array([5, 1, 2, 4], np.int32)

    @numba.njit
    def run(source, rows_from, rows_to, matrix, to, column):
        kernel(source, rows_from, rows_to, 1, 4, matrix, to, column)

    wanted, middle = to.copy(), slice(width // 3, 2 * width // 3)
    for pair in (1, 2, 3):
        wanted[rows_to[pair], middle] += (source[rows_from[pair]] @ matrix)[middle]
    run(source, rows_from, rows_to, matrix, to, width // 3)
    assert close(to, wanted)


@each_type
@each_processor
def test_the_outer_products_equal_numpys(registers, dtype):
    width = 2 * registers.bytes // np.dtype(dtype).itemsize
    kernel = add_outer_products_of(3, 2, registers)
    left, right, to = rows(4, 5, dtype, 0), rows(6, width, dtype, 1), rows(5, width, dtype, 2)
    rows_left, rows_right = np.array([0, 3, 3, 1], np.int32), np.array([5, 0, 4, 1], np.int32)

    @numba.njit
    def run(left, right, rows_left, rows_right, to):
        kernel(left, right, rows_left, rows_right, 1, 4, to, 0)

    wanted = to.copy()
    wanted += left[rows_left[1:]].T @ right[rows_right[1:]]
    run(left, right, rows_left, rows_right, to)
    assert close(to, wanted)


@each_type
@pytest.mark.parametrize("registers_wide", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("pairs", [0, 1, 5, 50])
def test_groups_of_any_size_and_width(registers_wide, pairs, dtype):
    width = padded_width(registers_wide * REGISTERS.bytes // np.dtype(dtype).itemsize, np.dtype(dtype).itemsize)
    draw = np.random.default_rng(pairs)
    rows_from, rows_to = draw.integers(0, 9, pairs).astype(np.int32), draw.permutation(60)[:pairs].astype(np.int32)
    source, matrix, to = rows(9, 13, dtype, 0), rows(13, width, dtype, 1), rows(60, width, dtype, 2)
    wanted = to.copy()
    wanted[rows_to] += source[rows_from] @ matrix
    add_products(source, rows_from, rows_to, 0, pairs, matrix, to)
    assert close(to, wanted)
    total, other = rows(13, width, dtype, 3), rows(60, width, dtype, 4)
    wanted = total + source[rows_from].T @ other[rows_to]
    add_outer_products(source, other, rows_from, rows_to, 0, pairs, total)
    assert close(total, wanted)


def test_the_sums_do_not_depend_on_how_many_rows_go_together():
    """Threads cut the pairs anywhere, so a group and its single pairs must give the same bits."""
    source, matrix = rows(20, 33, np.float32, 0), rows(33, padded_width(80, 4), np.float32, 1)
    rows_from, rows_to = np.arange(20, dtype=np.int32), np.arange(20, dtype=np.int32)[::-1].copy()
    together, alone = (np.zeros((20, matrix.shape[1]), np.float32) for _ in range(2))
    add_products(source, rows_from, rows_to, 0, 20, matrix, together)
    for pair in range(20):
        add_products(source, rows_from, rows_to, pair, pair + 1, matrix, alone)
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("wrong", ["order", "type"])
def test_arrays_that_would_be_read_wrongly_are_refused(wrong):
    """The instructions count places in memory: a transposed matrix would give numbers, and the wrong ones."""
    lanes = REGISTERS.bytes // 4
    matrix = rows(lanes, lanes, np.float32, 0).T if wrong == "order" else rows(lanes, 2 * lanes, np.float64, 0)
    one = np.zeros(1, np.int32)
    with pytest.raises(TypingError, match="arrays in C order"):
        add_products(rows(1, lanes, np.float32, 1), one, one, 0, 1, matrix, np.zeros((1, lanes), np.float32))


@pytest.mark.parametrize("itemsize", [4, 8])
def test_widths_are_filled_up_to_whole_registers(itemsize):
    lanes = REGISTERS.bytes // itemsize
    assert [padded_width(n, itemsize) for n in (1, lanes, lanes + 1)] == [lanes, lanes, 2 * lanes]
