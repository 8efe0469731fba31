"""Products of rows that lie anywhere with a matrix, added to rows that lie anywhere: the inner loop of a sparse convolution.

A library's matrix product wants its rows side by side, so rows must be copied together first, and the products added one by one afterwards.
Here a few rows at a time are multiplied where they lie, and their sums stay in the processor's registers meanwhile:

    to[rows_to[p + i], column + j] += sum over c of source[rows_from[p + i], c] * matrix[c, column + j]     i < rows, j < vectors * lanes

numba's compiler would not keep these sums in registers by itself, so the loop over c is written in vector instructions of LLVM. They serve
every processor; only the number and the size of its registers are looked up. Every sum runs over c in ascending order, whatever the
processor, the rows at a time and the number of threads are. Read next: `sparse_conv.py`, the kernels made of these.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numpy.typing import NDArray

from ...core.compiled import compiled

_INDEX = ir.IntType(64)


@dataclass(frozen=True, kw_only=True)
class Registers:
    """The vector registers of a processor, as far as they can be used here."""

    bytes: int
    """Size of a register."""
    sums: int
    """Registers that hold sums. The others hold a part of the matrix and a number of the source."""


def registers_here() -> Registers:
    """Look up the registers of this machine's processor.

    Returns:
        The registers; where they are not known, the few that every processor has.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return Registers(bytes=16, sums=16)
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this system
        features = {}
    if features.get("avx512f"):
        return Registers(bytes=64, sums=16)
    return Registers(bytes=32 if features.get("avx") else 16, sums=8)


def add_products_of(rows: int, vectors: int, registers: Registers) -> Any:
    """Make the function that multiplies the rows of a group of pairs with some columns of the matrix.

    Args:
        rows: Rows at a time; those that are left over go one by one.
        vectors: Registers side by side that hold a row's sums.
        registers: Registers of the processor. Those of another one are slower and give the same sums.

    Returns:
        A function for compiled code: `(source (N, C), rows_from (P,), rows_to (P,), first, last, matrix (C, D), to (M, D), column)` does what
        the top of this file says for the pairs p from `first` up to `last`. All arrays are in C order, and `source`, `matrix` and `to` of one
        floating type. No bound is checked.
    """

    def write(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, rows_from, rows_to, matrix, to = (_Array(context, builder, signature.args[i], args[i]) for i in (0, 1, 2, 5, 6))
        first, last, column = args[3], args[4], args[7]

        def some(p: Any, count: int) -> None:
            pairs = [builder.add(p, _number(i)) for i in range(count)]
            starts_from = [builder.mul(rows_from.row_number(pair), source.width) for pair in pairs]
            starts_to = [builder.add(builder.mul(rows_to.row_number(pair), to.width), column) for pair in pairs]
            sums = _Sums(builder, to, starts_to, vectors, registers)
            with cgutils.for_range(builder, source.width, intp=_INDEX) as loop:
                values = [builder.load(source.at(builder.add(start, loop.index))) for start in starts_from]
                sums.add(values, matrix, builder.add(builder.mul(loop.index, matrix.width), column))
            sums.store()

        _in_groups(builder, first, last, rows, some)
        return context.get_dummy_value()

    def typed(
        context: Any, source: Any, rows_from: Any, rows_to: Any, first: Any, last: Any, matrix: Any, to: Any, column: Any
    ) -> Any:
        _check_arrays(source, rows_from, rows_to, matrix, to)
        return types.void(source, rows_from, rows_to, types.int64, types.int64, matrix, to, types.int64), write

    return intrinsic(typed)


def add_outer_products_of(rows: int, vectors: int, registers: Registers) -> Any:
    """Make the function that adds some columns of the outer products of pairs of rows.

    Args:
        rows: Rows of the result at a time; those that are left over go one by one.
        vectors: Registers side by side that hold a row's sums.
        registers: Registers of the processor.

    Returns:
        A function for compiled code: `(left (N, C), right (M, D), rows_left (P,), rows_right (P,), first, last, to (C, D), column)` adds
        `left[rows_left[p], row] * right[rows_right[p], column + j]` to `to[row, column + j]`, for every row and the pairs p from `first` up
        to `last`. The conditions are those of `add_products_of`.
    """

    def write(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, right, rows_left, rows_right, to = (_Array(context, builder, signature.args[i], args[i]) for i in (0, 1, 2, 3, 6))
        first, last, column = args[4], args[5], args[7]

        def some(row: Any, count: int) -> None:
            numbers = [builder.add(row, _number(i)) for i in range(count)]
            sums = _Sums(builder, to, [builder.add(builder.mul(n, to.width), column) for n in numbers], vectors, registers)
            with cgutils.for_range_slice(builder, first, last, _number(1), _INDEX) as (pair, _):
                start = builder.mul(rows_left.row_number(pair), left.width)
                values = [builder.load(left.at(builder.add(start, n))) for n in numbers]
                sums.add(values, right, builder.add(builder.mul(rows_right.row_number(pair), right.width), column))
            sums.store()

        _in_groups(builder, _number(0), left.width, rows, some)
        return context.get_dummy_value()

    def typed(
        context: Any, left: Any, right: Any, rows_left: Any, rows_right: Any, first: Any, last: Any, to: Any, column: Any
    ) -> Any:
        _check_arrays(left, rows_left, rows_right, right, to)
        return types.void(left, right, rows_left, rows_right, types.int64, types.int64, to, types.int64), write

    return intrinsic(typed)


def _check_arrays(first: Any, rows: Any, other_rows: Any, second: Any, to: Any) -> None:
    """Refuse, at compile time, what the instructions would read wrongly: they count places from the start of an array in C order."""
    if any(array.layout != "C" for array in (first, rows, other_rows, second, to)) or not first.dtype == second.dtype == to.dtype:
        raise TypingError("products of rows need arrays in C order (contiguous), the numbers of one floating type")


def _in_groups(builder: Any, first: Any, last: Any, size: int, some: Callable[[Any, int], None]) -> None:
    """Write a loop from `first` up to `last` in groups of `size`, and one over those that are left: `some(index, count)` writes a group."""
    whole = builder.sub(last, builder.srem(builder.sub(last, first), _number(size)))
    for start, stop, step in ((first, whole, size), (whole, last, 1)):
        with cgutils.for_range_slice(builder, start, stop, _number(step), _INDEX) as (index, _):
            some(index, step)


class _Sums:
    """Some rows of sums in registers, while the instructions of a kernel are written."""

    def __init__(self, builder: Any, to: _Array, starts: Sequence[Any], vectors: int, registers: Registers) -> None:
        """Write the loads of the sums that are there: `vectors` registers from each of the places `starts`."""
        self.builder, self.size = builder, to.bytes
        self.lanes, self.vectors = registers.bytes // to.bytes, vectors
        self.vector = ir.VectorType(to.element, self.lanes)
        self.places = [self._vector_at(to, start, v) for start in starts for v in range(vectors)]
        self.totals = [cgutils.alloca_once(builder, self.vector) for _ in self.places]
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        name = f"llvm.fmuladd.v{self.lanes}f{8 * to.bytes}"
        self.multiply_add = cgutils.get_or_insert_function(builder.module, kind, name)
        for place, total in zip(self.places, self.totals, strict=True):
            builder.store(builder.load(place, align=self.size), total)

    def add(self, values: Sequence[Any], array: _Array, start: Any) -> None:
        """Write: each row of sums += its value times the numbers of `array` from `start` on."""
        builder, nothing = self.builder, ir.Constant(self.vector, ir.Undefined)
        to_first = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        parts = [builder.load(self._vector_at(array, start, v), align=self.size) for v in range(self.vectors)]
        for i, value in enumerate(values):
            one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
            everywhere = builder.shuffle_vector(one, nothing, to_first)
            for v, part in enumerate(parts):
                total = self.totals[i * self.vectors + v]
                builder.store(builder.call(self.multiply_add, [everywhere, part, builder.load(total)]), total)

    def store(self) -> None:
        """Write the stores of the sums."""
        for place, total in zip(self.places, self.totals, strict=True):
            self.builder.store(self.builder.load(total), place, align=self.size)

    def _vector_at(self, array: _Array, start: Any, v: int) -> Any:
        return self.builder.bitcast(array.at(self.builder.add(start, _number(v * self.lanes))), self.vector.as_pointer())


class _Array:
    """An array in C order, as the instructions of a kernel see it."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        array = context.make_array(kind)(context, builder, value)
        self.builder, self.data = builder, array.data
        self.element, self.bytes = context.get_data_type(kind.dtype), kind.dtype.bitwidth // 8
        self.width = cgutils.unpack_tuple(builder, array.shape)[-1]

    def at(self, index: Any) -> Any:
        """Where the number with this index lies, counted over all rows."""
        return self.builder.gep(self.data, [index])

    def row_number(self, index: Any) -> Any:
        """The number with this index, as an index."""
        found = self.builder.load(self.at(index))
        return found if found.type == _INDEX else self.builder.sext(found, _INDEX)


def _number(value: int) -> Any:
    return ir.Constant(_INDEX, value)


# ---- the products of a whole group of pairs

REGISTERS = registers_here()
_SHAPES = ((REGISTERS.sums // 4, 4), (REGISTERS.sums // 2, 2), (REGISTERS.sums * 3 // 4, 1))  # rows at a time, registers of each
_wide, _middle, _narrow = (add_products_of(rows, vectors, REGISTERS) for rows, vectors in _SHAPES)
_outer_wide, _outer_middle, _outer_narrow = (add_outer_products_of(rows, vectors, REGISTERS) for rows, vectors in _SHAPES)
_BYTES = REGISTERS.bytes


def padded_width(width: int, itemsize: int) -> int:
    """The next number of columns that fills registers.

    Args:
        width: Number of columns.
        itemsize: Bytes of a number.

    Returns:
        The smallest multiple of a register's lanes that is not below `width`.
    """
    lanes = REGISTERS.bytes // itemsize
    return -(-width // lanes) * lanes


@compiled()
def add_products(
    source: NDArray[Any],
    rows_from: NDArray[Any],
    rows_to: NDArray[Any],
    first: int,
    last: int,
    matrix: NDArray[Any],
    to: NDArray[Any],
) -> None:
    """Add the products of a group of pairs: `to[rows_to[p]] += source[rows_from[p]] @ matrix`.

    Args:
        source: (N, C) rows.
        rows_from: (P,) row of `source` of each pair.
        rows_to: (P,) row of `to` of each pair. None stands twice in the group.
        first: First pair of the group.
        last: The pair behind its last one.
        matrix: (C, D); D is a `padded_width`.
        to: (M, D) sums so far, changed in place.
    """
    lanes, column = _BYTES // matrix.itemsize, 0
    while column < matrix.shape[1]:
        left = (matrix.shape[1] - column) // lanes
        if left >= 4:
            _wide(source, rows_from, rows_to, first, last, matrix, to, column)
            column += 4 * lanes
        elif left >= 2:
            _middle(source, rows_from, rows_to, first, last, matrix, to, column)
            column += 2 * lanes
        else:
            _narrow(source, rows_from, rows_to, first, last, matrix, to, column)
            column += lanes


@compiled()
def add_outer_products(
    left: NDArray[Any],
    right: NDArray[Any],
    rows_left: NDArray[Any],
    rows_right: NDArray[Any],
    first: int,
    last: int,
    to: NDArray[Any],
) -> None:
    """Add the outer products of a group of pairs: `to += left[rows_left[p]].T @ right[rows_right[p]]`, summed over p.

    Args:
        left: (N, C) rows.
        right: (M, D) rows; D is a `padded_width`.
        rows_left: (P,) row of `left` of each pair.
        rows_right: (P,) row of `right` of each pair.
        first: First pair of the group.
        last: The pair behind its last one.
        to: (C, D) sums so far, changed in place.
    """
    lanes, column = _BYTES // to.itemsize, 0
    while column < to.shape[1]:
        free = (to.shape[1] - column) // lanes
        if free >= 4:
            _outer_wide(left, right, rows_left, rows_right, first, last, to, column)
            column += 4 * lanes
        elif free >= 2:
            _outer_middle(left, right, rows_left, rows_right, first, last, to, column)
            column += 2 * lanes
        else:
            _outer_narrow(left, right, rows_left, rows_right, first, last, to, column)
            column += lanes
