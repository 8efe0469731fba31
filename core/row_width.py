"""Whether the numbers of a headless `.bin` file fit the row and the type that they are read with.

Such a file says nothing about its rows, and a wrong width gives points that nobody measured: the size of a file with 5 values per
point often fits 4 as well. Two simple facts decide:

- Columns of a scan differ. With the right width each column keeps to its own signs and magnitudes; with a wrong one every column
  is a mixture of all. `_separation` measures this as the mutual information between a value's column and its magnitude: 0.6 to 1.4
  for the right width of real scans of KITTI, nuScenes, Lyft and Waymo, below 0.45 for every other width that is no multiple of it.
- Numbers of another type are absurd: a double read as two floats has random exponents in every second of them.

A header of text is refused, and one whose numbers are no points (`check_outer_rows`). A header of whole rows that could be points (a pose, a
time, 128 small numbers) cannot be told from points and passes, as does what is only unlikely. Read next: `point_files.py`, which asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidInput
from .foreign_text import shown
from .scan_options import NumberType

_WIDTHS = (*range(3, 17), 20, 24)  # PCL's padded points have 8, 12 (PointXYZINormal) or more
_CHUNK = 5040 * 8  # bytes; a whole number of rows of every type and of every width but 11 and 13
_CHUNKS = 4
_FIRST = 5040
"""Values of any type that lie in the first chunk."""
_EXACT: tuple[NumberType, ...] = ("float32", ">f4", "float64", ">f8")  # absurd numbers give a wrong reading with these away
_ADVANTAGE = 0.15
"""Mutual information in nats that another width needs in excess of the assumed one."""
_CLEAR = 0.25
"""Mutual information in nats from which columns differ clearly."""
_OUTER = 4
"""Rows at each end of a file that may be a header or a footer."""
_FAR_AWAY = 400.0
"""Meters that a coordinate of a header exceeds."""
_OUTLYING = 5.0
"""Times the largest coordinate of all other points that it exceeds as well."""
_TINY = 1e-25
"""A coordinate below it is a whole number that was read as a float."""
_FARTHEST = 10_000.0
"""Meters from the sensor that no LiDAR reaches."""
_FEW = 10
"""Points that may lie farther away: noise of a sensor."""
_FEW_SHARE = 0.01
_TEXT_HEAD = 16
"""Bytes at the begin of a file that are no text if they are a point."""
_LEAST_LETTERS = 4
_LEAST_ROWS = 12
"""Rows below which nothing is judged."""


def number_type(name: NumberType) -> np.dtype[Any]:
    """Give the numpy type of an option `--dtype`, whose names are little-endian unless they say otherwise.

    Args:
        name: The name.

    Returns:
        The type.
    """
    return np.dtype(name) if name.startswith(">") else np.dtype(name).newbyteorder("<")


def check_number_rows(data: NDArray[np.uint8], names: Sequence[str], dtype: NumberType, *, named: bool) -> None:
    """Refuse the numbers of a file that cannot be what they are read as.

    Args:
        data: The bytes of the file.
        names: Names of the columns that are assumed.
        dtype: Type that is assumed.
        named: Whether a person named the columns; then nothing is refused that could be meant.

    Raises:
        InvalidInput: The size does not fit, or another width or type is clearly more plausible. The message names it and the option.
    """
    width, item = len(names), number_type(dtype).itemsize
    part = _sample(data)
    if len(data) >= 16 and _is_text(part):
        raise InvalidInput("the file holds text; write the points as float32, or in a `.pcd` file with DATA ascii")
    head = data[:_TEXT_HEAD]
    if len(head) == _TEXT_HEAD and _is_text(head) and sum(chr(byte).isalpha() for byte in head.tolist()) >= _LEAST_LETTERS:
        raise InvalidInput(
            f"the file begins with text ({shown(bytes(head.tolist()).decode('ascii').strip())!r}): a header in front of the points. Cut it off, "
            "or write the points into a `.pcd` or `.npy` file"
        )
    if len(data) % (item * width):
        raise InvalidInput(
            f"{len(data)} bytes are not a whole number of rows of {width} {dtype} ({' '.join(names)}); {_hint(data, width, dtype)}"
        )
    if len(data) < _LEAST_ROWS * item * width:
        return
    xyz = [names.index(axis) for axis in "xyz" if axis in names]
    sound, odd = _look(part, dtype, width, xyz)
    if not sound or odd or dtype not in _EXACT:
        better = _best_reading(part, len(data), [t for t in _EXACT if t != dtype])
        if better is None and not sound:
            better = _integers(part, len(data))
        if better is not None:
            raise InvalidInput(
                f"the numbers make no sense as {dtype}; the file looks like {better[0]} values per point of type {better[1]}: "
                f"{_advice(part, better[0], better[1], dtype)}"
            )
        if not sound:
            raise InvalidInput(
                f"the numbers make no sense as {dtype}: they are absurdly large or small; name their type with --dtype, or the columns "
                "with --columns"
            )
    other = _better_width(part.view(number_type(dtype)), len(data) // item, width, named=named)
    if other is not None:
        raise InvalidInput(
            f"the size fits {width} values per point ({' '.join(names)}), but the file looks like {other} values per point: "
            f"{_advice(part, other, dtype, dtype)}"
        )


def check_outer_rows(rows: NDArray[np.float32], names: Sequence[str]) -> None:
    """Refuse a file whose first or last rows are no points, while all others are: a header, or a footer.

    A header of a whole number of rows fits every size, and it would become points that nobody measured.

    Args:
        rows: (N, C) the numbers of the file.
        names: Names of the columns.

    Raises:
        InvalidInput: An outer row holds numbers that are absurd beside those of the other rows.
    """
    inner = rows[_OUTER:-_OUTER]
    xyz = [names.index(axis) for axis in "xyz" if axis in names]
    if len(inner) < _LEAST_ROWS or not xyz:
        return
    known = np.abs(inner[:, xyz])
    with np.errstate(invalid="ignore"):
        if ((known > 0) & (known < _TINY)).any() or not np.isfinite(known).all():
            return  # the other rows are odd as well
        most = max(_FAR_AWAY, _OUTLYING * float(known.max()))
        for what, outer in (("first", rows[:_OUTER]), ("last", rows[-_OUTER:][::-1])):
            size = np.abs(outer[:, xyz])
            absurd = np.flatnonzero(((size > most) | ((size > 0) & (size < _TINY))).any(1))
            counts = what == "first" and _is_count(outer[0], len(rows))
            count = int(absurd.max()) + 1 if len(absurd) else int(counts)
            if not count:
                continue
            values = " ".join(f"{value:.6g}" for value in outer[0])
            kind = "a header in front of the points" if what == "first" else "something that was written after the points"
            raise InvalidInput(
                f"the {what} row ({values}) is no point: no other number of x y z exceeds {float(known.max()):.0f}; it is perhaps {kind}. Cut "
                f"off the {what} {count * len(names)} numbers"
            )


def check_distances(rows: NDArray[np.float32], names: Sequence[str]) -> None:
    """Refuse a file in which more than a few points lie farther away than any LiDAR reaches.

    Args:
        rows: (N, C) the numbers of the file.
        names: Names of the columns.

    Raises:
        InvalidInput: More than 10 points, and more than 1 % of them, have a coordinate beyond 10 km.
    """
    size = np.abs(rows[:, [names.index(axis) for axis in "xyz" if axis in names]])
    with np.errstate(invalid="ignore"):
        beyond = ((size > _FARTHEST) & np.isfinite(size)).any(1)
    count = int(beyond.sum())
    if count > max(_FEW, _FEW_SHARE * len(rows)):
        most = float(size[beyond][np.isfinite(size[beyond])].max())
        raise InvalidInput(
            f"{count:,} of {len(rows):,} points have a coordinate beyond {_FARTHEST / 1000:g} km (up to {most:.3g} m), which no LiDAR reaches. "
            "Likely causes: numbers of another type, such as float16 (--dtype), other columns (--columns), millimeters, or coordinates of a "
            "map; write the points in meters in the sensor's own frame"
        )


def _is_count(row: NDArray[np.float32], total: int) -> bool:
    """Whether a row says how many rows follow, and holds whole numbers only."""
    return bool((row == np.round(row)).all() and row[0] in (total - 1, total) and total > _LEAST_ROWS)


def usual_columns(width: int) -> str:
    """Name the usual columns of a row, as words for `--columns`.

    Args:
        width: Number of values in a row, at least 3.

    Returns:
        The names: `x y z intensity _` for 5.
    """
    return " ".join(("x", "y", "z", "intensity")[:width]) + " _" * (width - 4)


def _sample(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """At most a few pieces of the file, each beginning with a row whatever the width is."""
    if len(data) <= _CHUNKS * _CHUNK:
        return data[: len(data) // 8 * 8] if len(data) >= 512 else data
    starts = [(len(data) - _CHUNK) * i // (_CHUNKS - 1) // _CHUNK * _CHUNK for i in range(_CHUNKS)]
    return np.concatenate([data[start : start + _CHUNK] for start in starts])


def _view(data: NDArray[np.uint8], dtype: NumberType) -> NDArray[Any]:
    kind = number_type(dtype)
    return data[: len(data) // kind.itemsize * kind.itemsize].view(kind)


def _magnitudes(values: NDArray[Any]) -> NDArray[np.int64]:
    """A class of each value by sign and power of two: 0 is zero, 1 is not finite."""
    with np.errstate(all="ignore"):
        wide = values.astype(np.float64)
        power = np.clip(np.floor(np.log2(np.abs(wide))), -8, 20)
    classes = np.where(wide < 0, 40, 10) + np.where(np.isfinite(power), power, 0)
    classes = np.where(np.isfinite(wide), np.where(wide == 0, 0, classes), 1)
    found: NDArray[np.int64] = classes.astype(np.int64)
    return found


def _whole_rows(values: NDArray[Any], width: int) -> NDArray[Any]:
    """The values of a sample in rows of a width. Chunks after the first one begin in the middle of a row of 11 or 13 values."""
    if _CHUNK % width:
        values = values[:_FIRST]
    return values[: len(values) // width * width].reshape(-1, width)


def _separation(classes: NDArray[np.int64], width: int) -> tuple[float, float]:
    """Mutual information of column and magnitude in nats, freed of the excess that few values give; and that excess."""
    rows = _whole_rows(classes, width)
    if not len(rows):
        return 0.0, 1.0
    counts = np.stack([np.bincount(rows[:, j], minlength=128) for j in range(width)]).astype(np.float64)
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    used = int((joint.sum(0) > 0).sum())
    information = float((joint[seen] * np.log(joint[seen] / apart[seen])).sum())
    excess = (int(seen.sum()) - width - used + 1) / (2 * rows.size)
    return information - excess, (width - 1) * (used - 1) / (2 * rows.size)


def _clearest(classes: NDArray[np.int64], widths: Iterable[int]) -> tuple[float, int]:
    """The width whose columns differ most and their separation; a multiple of another width only for a clear gain. (0, 0) for none."""
    best = (0.0, 0)
    for width in widths:
        found, excess = _separation(classes, width)
        gain = _ADVANTAGE + 2 * excess if best[1] and width % best[1] == 0 else 0.0
        if found > best[0] + gain:
            best = (found, width)
    return best


def _look(part: NDArray[np.uint8], dtype: NumberType, width: int, xyz: Sequence[int]) -> tuple[bool, bool]:
    """Whether the coordinates are sound, and whether they are odd: x or y is nearly always 0."""
    values = _view(part, dtype)
    rows = values[: len(values) // width * width].reshape(-1, width)[:, list(xyz)]
    if dtype not in _EXACT or not len(rows):
        return True, False
    with np.errstate(invalid="ignore"):  # random bits may be signaling NaN
        size = np.abs(rows.astype(np.float64))
    known = ~np.isnan(size)
    counted = np.maximum((known & (size > 0)).sum(0), 1)
    large = (known & (size > 1e7)).sum(0) / counted
    small = (known & (size > 0) & (size < 1e-20)).sum(0) / counted
    return bool((large < 0.05).all() and (small < 0.2).all()), bool(((size == 0).mean(0)[:2] > 0.95).any())


def _best_reading(part: NDArray[np.uint8], size: int, types: Sequence[NumberType]) -> tuple[int, NumberType] | None:
    """The width and type whose columns differ most, among those with sound numbers."""
    best: tuple[float, int, NumberType] | None = None
    for dtype in types:
        item = number_type(dtype).itemsize
        classes = _magnitudes(_view(part, dtype))
        fitting = [w for w in _WIDTHS if size % (item * w) == 0 and len(classes) >= _LEAST_ROWS * w]
        separation, width = _clearest(classes, [w for w in fitting if _look(part, dtype, w, (0, 1, 2)) == (True, False)])
        if separation > _CLEAR and (best is None or separation > 1.05 * best[0]):
            best = (separation, width, dtype)
    return None if best is None else best[1:]


def _integers(part: NDArray[np.uint8], size: int) -> tuple[int, NumberType] | None:
    """The type of numbers that are no floats, by their bytes: the high bytes of coordinates vary less than the low ones."""
    quads = part[: len(part) // 4 * 4].reshape(-1, 4)
    sign = np.isin(quads, (0, 255)).mean(0)  # the upper half of a small number of 32 bits is 0 or -1
    dtype: NumberType
    if sign[2:].min() > 0.9 or sign[:2].min() > 0.9:
        dtype = "int32" if sign[3] >= sign[0] else ">i4"
    else:
        pairs = part[: len(part) // 2 * 2].reshape(-1, 2)
        varied = [int((np.bincount(pairs[:, i], minlength=256) > len(pairs) / 2048).sum()) for i in (0, 1)]
        dtype = "int16" if varied[1] <= varied[0] else ">i2"
        whole = np.abs(_view(part, "int16").astype(np.int64))
        if dtype == "int16" and ((whole > 0) & (whole < 0x2000)).mean() < 0.1:
            dtype = "float16"
    item, classes = number_type(dtype).itemsize, _magnitudes(_view(part, dtype))
    fitting = [w for w in _WIDTHS if size % (item * w) == 0 and len(classes) >= _LEAST_ROWS * w]
    separation, width = _clearest(classes, fitting)
    return (width, dtype) if separation > _CLEAR else None


def _better_width(values: NDArray[Any], total: int, width: int, *, named: bool) -> int | None:
    """Another width that is clearly right, or None."""
    rows = values[: len(values) // width * width].reshape(-1, width)
    if len(np.unique(rows, axis=0)) < max(
        _LEAST_ROWS, len(rows) // 20
    ):  # a few points, repeated: every multiple of them is a pattern
        return None
    classes = _magnitudes(values)
    assumed, _ = _separation(classes, width)
    better: list[int] = []
    for other in _WIDTHS:
        if total % other or other == width:
            continue
        found, excess = _separation(classes, other)
        if other % width == 0:
            right = _is_multiple(values, width, other) or (not named and _is_repeated(values, width, other))
        elif width % other == 0:
            right = named and found > _CLEAR and assumed - found < 0.05 and _is_stationary(values, other, width)
        else:
            right = found - assumed > _ADVANTAGE + 2 * excess and found > 2 * assumed
        if right:
            better.append(other)
    return _clearest(classes, better)[1] or None


def _is_multiple(values: NDArray[Any], width: int, other: int) -> bool:
    """Whether of the rows of the assumed width that make one row of `other`, one after the first holds no point: neither its x nor its y nor
    its direction is like the first's."""
    rows = _whole_rows(values, other)
    return any(_is_no_point(rows, start) for start in range(width, other, width))


def _is_no_point(rows: NDArray[Any], start: int) -> bool:
    """Whether the columns from `start` on hold no second point beside the one of the first columns."""
    places = [0, 1, start, start + 1]
    rows = rows[np.isfinite(rows[:, places]).all(1)]  # a missing return in every third row says nothing about rows
    if len(rows) < 40:
        return False
    for j in (0, 1):
        pair = np.stack([rows[:, j], rows[:, j + start]], 1).ravel()
        with np.errstate(invalid="ignore"):
            whole = pair == np.floor(pair)
        if _separation(_magnitudes(pair) * 2 + whole, 2)[0] < 0.3:
            return False
    # Two lasers that fire alternately, one up and one down, see near and far: but in one direction.
    wide = rows.astype(np.float64)
    sines = [np.sin(np.arctan2(wide[:, j + 1], wide[:, j])) for j in (0, start)]
    with np.errstate(all="ignore"):
        alike = float(np.corrcoef(np.stack(sines))[0, 1])
    return not alike > 0.5  # NaN where a column is constant


def _is_repeated(values: NDArray[Any], width: int, other: int) -> bool:
    """Whether the second row of the assumed width in each row of `other` is the first one again, moved by a constant."""
    rows = _whole_rows(values, other).astype(np.float64)
    if len(rows) < 20 or not np.isfinite(rows).all() or rows[:, :2].std(0).min() < 0.5:
        return False
    moved = rows[:, width : width + 3] - rows[:, :3]
    return bool((np.abs(moved - np.median(moved, 0)) < 1e-4).all(1).mean() > 0.995)


def _is_stationary(values: NDArray[Any], width: int, wide: int) -> bool:
    """Whether rows of `width` go on alike across the borders of rows of `wide`, so that these borders mean nothing."""
    rows = _whole_rows(values, wide).reshape(-1, width)[:, :3].astype(np.float64)
    if len(rows) < 100 or not np.isfinite(rows).all():
        return False
    borders = np.arange(1, len(rows)) % (wide // width) == 0
    for steps in (np.abs(np.diff(rows, axis=0)).sum(1), np.abs(np.diff(np.linalg.norm(rows, axis=1)))):
        inside, across = float(np.median(steps[~borders])), float(np.median(steps[borders]))
        if not 0.7 < (inside + 1e-9) / (across + 1e-9) < 1.4:
            return False
    return True


def _hint(data: NDArray[np.uint8], width: int, dtype: NumberType) -> str:
    """What to do about a size that does not fit."""
    item, part = number_type(dtype).itemsize, _sample(data)
    fitting = [w for w in _WIDTHS if len(data) % (item * w) == 0]
    if len(part) >= _LEAST_ROWS * item * width and _look(part, dtype, 3, (0, 1, 2))[0]:
        classes = _magnitudes(_view(part, dtype))
        separation, best = _clearest(classes, _WIDTHS)
        if separation > _CLEAR and best == width:
            return f"it looks like {width} values per point and is cut off; write or download it again"
        if separation > _CLEAR and best in fitting:
            return f"it looks like {best} values per point: {_advice(part, best, dtype, dtype)}"
    better = _best_reading(part, len(data), [t for t in _EXACT if t != dtype])
    if better is not None:
        return f"it looks like {better[0]} values per point of type {better[1]}: {_advice(part, better[0], better[1], dtype)}"
    if fitting:
        return f"the size fits {' or '.join(map(str, fitting))} values per point: name them with --columns"
    return f"no row of {_WIDTHS[0]} to {_WIDTHS[-1]} {dtype} fits; the file is cut off, or of another type (--dtype)"


def _advice(part: NDArray[np.uint8], width: int, dtype: NumberType, assumed: NumberType) -> str:
    values = _view(part, dtype)
    rows = values[: len(values) // width * width].reshape(-1, width).astype(np.float64)
    with np.errstate(all="ignore"):
        ranges = ", ".join(f"{np.nanmin(c):.4g}..{np.nanmax(c):.4g}" for c in rows.T)
    options = ([] if dtype == assumed else [f"--dtype '{dtype}'" if dtype.startswith(">") else f"--dtype {dtype}"]) + [
        f"--columns {usual_columns(width)}"
    ]
    return f"give {' '.join(options)}, or your own names (the columns hold {ranges})"


def _is_text(part: NDArray[np.uint8]) -> bool:
    return bool((((part >= 32) & (part < 127)) | np.isin(part, (9, 10, 13))).all())
