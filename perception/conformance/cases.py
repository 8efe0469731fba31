"""Scans on which two exporters differ first: empty ones, broken points, borders of cells and of the range, full voxels, too many voxels.

Every scan follows from the grid of the encoder, so the cases lie where its borders are. They are made in the shifted frame and then taken
back to the frame of the sensor, where an exporter reads them.

Read next: `golden.py`, which computes what an exporter must make of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...core.cut import VoxelGrid
from ...core.rig import RigSpec

ScanRows = NDArray[np.float32]
"""(N, 4) x, y, z in meters and intensity, in the shifted frame."""

MOST_CROWDED = 100_000
"""Largest voxel limit for which a scan with more voxels is made; a larger one would be a file of many megabytes."""


@dataclass(frozen=True, kw_only=True)
class EdgeCase:
    """A scan that is made for one rule."""

    name: str
    """Name of the case and of its files."""
    rule: str
    """What an exporter must do, as a sentence."""
    rows: ScanRows
    """(N, 4) x, y, z and intensity as the sensor gives them; they may hold NaN and infinity."""
    may_refuse: bool = False
    """Whether an exporter may also refuse the whole scan."""


def edge_cases(grid: VoxelGrid, rig: RigSpec, *, max_points: int, max_voxels: int) -> list[EdgeCase]:
    """Make the scans for one encoder.

    Args:
        grid: Its input grid.
        rig: What is done to a scan first.
        max_points: Points of a voxel that are averaged.
        max_voxels: Most voxels of a scan.

    Returns:
        The cases. That of too many voxels is left out where the limit is above `MOST_CROWDED`, or above the voxels of the grid.
    """
    street = _street(grid)
    made: list[tuple[str, str, Callable[[], ScanRows]]] = [
        ("street", "an ordinary scan", lambda: street),
        ("one_point", "a single point is a voxel of its own", lambda: _at(grid, np.array([[0.5, 0.5, 0.5]]))),
        (
            "borders",
            "cell = floor((point - start of the range) / voxel size) in float32: a point on a border belongs to the upper cell",
            lambda: _borders(grid),
        ),
        (
            "range_ends",
            "the start of the range is inside, its end is outside; points beyond any side are dropped",
            lambda: np.concatenate([_range_ends(grid), street[:500]]),
        ),
        ("all_outside", "a scan without a point in the range gives no scene", lambda: _beyond(grid)),
        (
            "full_voxels",
            f"a voxel averages its first {max_points} points in the order of the scan, and leaves out the others",
            lambda: _repeated(grid, max_points),
        ),
        ("no_points", "a scan without points gives no scene", lambda: np.zeros((0, 4), np.float32)),
    ]
    nz, ny, nx = grid.shape
    if max_voxels <= MOST_CROWDED and 3 * max_voxels <= nz * ny * nx:
        made.append(
            (
                "crowded",
                f"of more than {max_voxels} occupied voxels those with the smallest priority stay (ops/voxelize.py, step 2)",
                lambda: _crowded(grid, max_voxels),
            )
        )
    cases = [EdgeCase(name=name, rule=rule, rows=_to_sensor(make(), rig)) for name, rule, make in made]
    return [*cases, *_broken(_to_sensor(street, rig))]


def _to_sensor(rows: ScanRows, rig: RigSpec) -> ScanRows:
    sensor = rows.copy()
    sensor[:, 2] -= np.float32(rig.z_shift)
    sensor[:, 3] /= np.float32(rig.intensity_scale)
    return sensor


def _at(grid: VoxelGrid, shares: NDArray[np.float64]) -> ScanRows:
    """Rows at shares (N, 3) of the range, with intensities that all differ."""
    low, high = np.array(grid.range[:3]), np.array(grid.range[3:])
    intensity = (np.arange(len(shares)) * 0.618) % 1
    return np.column_stack([low + shares * (high - low), intensity]).astype(np.float32)


def _street(grid: VoxelGrid) -> ScanRows:
    """A flat ground with a few walls."""
    rng = np.random.default_rng(1)
    ground = rng.uniform(0.001, 0.999, (2500, 3))
    ground[:, 2] = rng.normal(0.3, 0.004, len(ground))
    walls = [ground]
    for _ in range(6):
        corner, size = rng.uniform(0.1, 0.8, 3), rng.uniform(0.01, 0.06, 3)
        wall = corner + rng.uniform(0, 1, (250, 3)) * size
        wall[:, 2] = 0.3 + rng.uniform(0, 0.4, len(wall))
        walls.append(wall)
    shares = np.clip(np.concatenate(walls), 0.001, 0.999)
    return _at(grid, shares[rng.permutation(len(shares))])


def _borders(grid: VoxelGrid) -> ScanRows:
    """Points on the borders of random cells and one step of float32 to each side, along every axis in turn."""
    rng = np.random.default_rng(2)
    low, size = np.array(grid.range[:3], np.float32), np.array(grid.voxel_size, np.float32)
    counts = np.array(grid.shape[::-1])
    rows = []
    for axis in range(3):
        cells = rng.integers(1, counts, (200, 3))
        center = (low + (cells + np.float32(0.5)) * size).astype(np.float32)
        border = (low[axis] + cells[:, axis].astype(np.float32) * size[axis]).astype(np.float32)
        for value in (border, border - _step(border), border + _step(border)):
            point = center.copy()
            point[:, axis] = value
            rows.append(point)
    points = np.concatenate(rows)
    intensity = ((np.arange(len(points)) * 0.618) % 1).astype(np.float32)
    return np.column_stack([points, intensity]).astype(np.float32)


def _step(values: ScanRows) -> ScanRows:
    """The step of float32 at these values; near 0 that at a centimeter, because smaller numbers are taken for no coordinates."""
    return np.spacing(np.maximum(np.abs(values), np.float32(0.01)))


def _range_ends(grid: VoxelGrid) -> ScanRows:
    """Points at both ends of the range along each axis, and just within and beyond them; each in a place of its own."""
    ends = np.array(grid.range, np.float32).reshape(2, 3)
    values = [
        (axis, value)
        for axis in range(3)
        for end in ends[:, axis]
        for value in (end, end - _step(end), end + _step(end), end - 3, end + 3)
    ]
    rows = _at(grid, np.random.default_rng(5).uniform(0.1, 0.9, (len(values), 3)))
    for row, (axis, value) in zip(rows, values, strict=True):
        row[axis] = value
    return rows


def _beyond(grid: VoxelGrid) -> ScanRows:
    rows = _street(grid)[:400]
    rows[:, 0] += np.float32(grid.range[3] - grid.range[0] + 5)
    return rows


def _repeated(grid: VoxelGrid, max_points: int) -> ScanRows:
    """Places with one to three times as many points as a voxel keeps, all equal but for their intensity, in turns."""
    rng = np.random.default_rng(3)
    places = _at(grid, rng.uniform(0.2, 0.8, (120, 3)))
    rows = np.repeat(places, rng.integers(1, 3 * max_points + 1, len(places)), axis=0)
    rows[:, 3] = rng.uniform(0, 1, len(rows))
    return rows[rng.permutation(len(rows))]


def _crowded(grid: VoxelGrid, max_voxels: int) -> ScanRows:
    """One point in each of 5 % more voxels than the limit, in a compact block, so that deeper layers stay small."""
    rng = np.random.default_rng(4)
    nz, ny, nx = grid.shape
    wanted = max_voxels + max(1, max_voxels // 20)
    side = min(nx, ny, int(np.ceil(np.sqrt(wanted * 1.3))))
    layers = int(np.ceil(wanted * 1.3 / side**2))
    block = (min(nx, max(side, -(-wanted // (side * nz)))), side, min(nz, layers))
    total = block[0] * block[1] * block[2]
    chosen = rng.permutation(total)[: min(wanted, total)]
    cells = np.column_stack([chosen % block[0], chosen // block[0] % block[1], chosen // (block[0] * block[1])])
    return _at(grid, (cells + 0.5) / np.array([nx, ny, nz]))


def _broken(street: ScanRows) -> list[EdgeCase]:
    """Points that sensors write where there was no return."""
    nan, zero = street.copy(), street.copy()
    for start, (column, value) in enumerate([(0, np.nan), (2, np.inf), (1, -np.inf), (3, np.nan)]):
        nan[start::40, column] = value
    zero[::3, :3] = 0
    return [
        EdgeCase(
            name="not_finite",
            rule="points with NaN or infinity are dropped and the others make the scene, or the whole scan is refused",
            rows=nan,
            may_refuse=True,
        ),
        EdgeCase(name="missing_returns", rule="points at exactly 0, 0, 0 of the sensor are no points and are dropped", rows=zero),
    ]
