"""Reading and writing one scan: KITTI's `.bin`, numpy's `.npy` and the Point Cloud Library's `.pcd`.

A scan comes from outside, so everything is checked here, once: the byte count against the row width, every declared size against
the size of the file before memory is taken, no pickle, no NaN, no empty scan. The result is a `PointCloud`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import InvalidInput
from .field_names import find_fields
from .files import NPY_FAULTS, check_input_file, write_atomically
from .foreign_text import shown
from .ledger import Ledger
from .pcd_file import read_pcd
from .rig import RigSpec, count_intensity, scale_intensity
from .row_width import check_distances, check_number_rows, check_outer_rows, number_type, usual_columns
from .scan_options import Axis, ScanOptions
from .structures import PointCloud, column_names, scan_of_table, warn_of_intensity

XYZI = ("x", "y", "z", "intensity")
"""Columns of a `.bin` or `.npy` file that names none, those of KITTI."""

POINT_SUFFIXES = (".bin", ".npy", ".pcd")
"""Suffixes of files that `read_points` reads."""

MOST_SCAN_BYTES = 120 << 20
"""Bytes of the largest scan file that is read: 7.8 million points of four values, some thirty times those of the largest sensor."""

_USUAL = ScanOptions()


def read_scan(path: Path | str, options: ScanOptions = _USUAL, *, rig: RigSpec | None = None) -> tuple[PointCloud, Ledger]:
    """Read one scan from a `.bin` (rows of numbers), `.npy` ((N, C), no pickle) or `.pcd` file, and count what is dropped.

    Every command reads scans through this function.

    Args:
        path: The file; its suffix tells the format.
        options: Columns, number type, axes, and whether points that are not finite are left out; those of a `.pcd` file with several
            rows (HEIGHT) always are. Its rig is not used.
        rig: Applied to the scan where it is given: z is shifted, and intensity is scaled and counted; values outside 0..1 are kept,
            and `judge` of the ledger warns of them. None gives the scan in the sensor frame and intensity in the sensor's own unit,
            for a caller that applies the rig with `RigSpec.from_sensor`, which refuses such values.

    Returns:
        The scan, in the order of the file, axes turned, without the points at the sensor; and its ledger: one scan, its points, and
        how many of them were left out.

    Raises:
        InvalidInput: There is no such file, it has another format, its size or its numbers do not fit the columns, it holds
            non-finite values or no point.

    Example:
        scan, ledger = read_scan("scan.bin", ScanOptions(columns=("x", "y", "z", "intensity", "_")))
    """
    path = Path(path)
    names, values, organized = _read_table(path, options)
    values = turned_rows(values, names, options.axes)
    cloud, ledger = scan_of_rows(values, names, str(path), drop_non_finite=options.drop_non_finite or organized)
    if rig is not None:
        ledger = ledger + count_intensity(cloud, rig.intensity_scale)
        cloud = scale_intensity(cloud, rig.intensity_scale)
        if rig.z_shift:
            cloud = replace(cloud, xyz=rig.from_sensor(cloud.xyz))
    return cloud, ledger


def scan_of_rows(
    values: NDArray[Any], names: Sequence[str], where: str, *, drop_non_finite: bool = False
) -> tuple[PointCloud, Ledger]:
    """Make a scan of a table that was read from a file, and count what is dropped.

    Args:
        values: (N, C) numbers; intensity in the sensor's own unit.
        names: What the columns are, as for `PointCloud.from_array`.
        where: File, and frame where it holds several, for messages.
        drop_non_finite: Whether points with NaN or inf are left out instead of refused.

    Returns:
        The scan, in the order of the rows, without the points at the sensor; and its ledger: one scan, its points, and how many of them
        were left out.

    Raises:
        InvalidInput: The table does not fit the names, holds non-finite values or no point.
    """
    points = len(values)
    try:
        cloud = scan_of_table(torch.from_numpy(_as_float32(values)), names, drop_non_finite=drop_non_finite)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from error
    non_finite = points - len(cloud)
    zero = (cloud.xyz == 0).all(1)
    if zero.any():
        cloud = cloud.select(~zero)
    if len(cloud) == 0:
        found = f"all {points} points are NaN, infinite or at the sensor" if points else "the scan holds no point"
        raise InvalidInput(f"{where}: {found}; leave the frame out of the split")
    return cloud, Ledger(scans=1, points=points, points_non_finite=non_finite, points_zero=int(zero.sum()))


def turned_rows(values: NDArray[Any], names: Sequence[str], axes: tuple[Axis, Axis, Axis]) -> NDArray[Any]:
    """Turn a table so that its columns x, y, z point forward, left and up.

    Args:
        values: (N, C) numbers as the file has them.
        names: What the columns are.
        axes: Which axis of the file points forward, left and up.

    Returns:
        The table; the same one where there is nothing to turn.
    """
    if axes == ("x", "y", "z"):
        return values
    turned = values.copy()
    for to, source in zip("xyz", axes):
        if to in names and source[-1] in names:
            column = values[:, names.index(source[-1])]
            turned[:, names.index(to)] = -column if source.startswith("-") else column
    return turned


def read_points(
    path: Path | str,
    *,
    columns: tuple[str, ...] | None = None,
    intensity_scale: float | None = 1.0,
    drop_non_finite: bool = False,
) -> PointCloud:
    """Read one scan: `read_scan` for a program that needs no counts.

    Args:
        path: The file; its suffix tells the format.
        columns: What the values of a row are, in file order. "x", "y" and "z" in meters must be among them, "_" leaves one out, all
            others become features. None means x, y, z, intensity for `.bin` and `.npy`; for `.pcd`, whose header names its fields,
            it means x, y, z, and intensity where the file has it.
        intensity_scale: Factor that brings intensity to 0..1; 1/255 for sensors that count to 255. A warning follows where it
            exceeds 1 afterwards. None leaves intensity as it is, for a caller that scales and checks it (`RigSpec.from_sensor`).
        drop_non_finite: Leave out points with a NaN or infinite value instead of refusing the file. Organized clouds mark a missing
            return this way.

    Returns:
        The scan, in the order of the file, without the points at the sensor.

    Raises:
        InvalidInput: As for `read_scan`.

    Example:
        scan = read_points("training/velodyne/000003.bin")
        scan = read_points("scan.npy", columns=("x", "y", "z", "intensity", "_"), intensity_scale=1 / 255)
    """
    names = () if columns is None else column_names(columns, f"{path}: columns")
    cloud, _ = read_scan(path, ScanOptions(columns=names, drop_non_finite=drop_non_finite))
    if intensity_scale is not None:
        cloud = scale_intensity(cloud, intensity_scale)
        warn_of_intensity(cloud, str(path), scale=intensity_scale, stacklevel=3)  # it names the line that called `read_points`
    return cloud


def find_scans(paths: Sequence[str | Path]) -> tuple[tuple[Path, ...], Ledger]:
    """Find the scan files among paths.

    Args:
        paths: Files and folders. A folder stands for the scans in it, ordered by name. Hidden files, whose names begin with a dot, are
            no scans: macOS writes a file `._000.bin` beside `000.bin`.

    Returns:
        The files, in this order, and a ledger of the files that were skipped.

    Raises:
        InvalidInput: A path does not exist, there is no scan at all, or two scans have one name apart from folder and suffix:
            results are filed under that name.
    """
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    for path in map(Path, paths):
        if not path.exists():
            raise InvalidInput(f"there is no file or folder {path}; check its spelling")
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in inside:
            if file.name.startswith("."):
                skipped["hidden file"] += 1
            elif path.is_dir() and file.is_dir():
                skipped["folder"] += 1
            elif path.is_dir() and file.suffix not in POINT_SUFFIXES:
                skipped["not a scan"] += 1
            else:
                found.append(file)
    if not found:
        beside = f"; skipped were: {', '.join(f'{kind} ({n})' for kind, n in skipped.items())}" if skipped else ""
        raise InvalidInput(f"there is no scan ({', '.join(POINT_SUFFIXES)}) in {', '.join(map(str, paths))}{beside}")
    named: dict[str, Path] = {}
    for path in found:
        other = named.setdefault(path.stem, path)
        if other is not path:
            raise InvalidInput(f"{other} and {path} are both called {path.stem!r}; rename one, or give them in two runs")
    return tuple(found), Ledger(files_skipped=dict(skipped))


def write_bin(path: Path | str, points: PointCloud) -> None:
    """Write a scan as float32 rows of x, y, z and the features, completely or not at all.

    Args:
        path: The file, by custom with suffix `.bin`.
        points: The scan; its features follow in the order of `feature_names`.

    Raises:
        OSError: The file cannot be written.
    """
    rows = torch.cat([points.xyz, points.features], 1).float().cpu().numpy()
    write_atomically(path, rows.astype("<f4").tobytes())


def _read_table(path: Path, options: ScanOptions) -> tuple[tuple[str, ...], NDArray[np.float32], bool]:
    """Names of columns, their (N, C) values, and whether NaN marks a missing return in them."""
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise InvalidInput(
                f"{shown(path)} is not a regular file but a pipe, a socket or a device; scans are read from files, so write it to one first"
            )
        what = "a folder, not a scan" if path.is_dir() else "missing"
        raise InvalidInput(f"there is no scan at {path}: it is {what}; check the root folder and the frame id")
    check_input_file(path, "scan", most=MOST_SCAN_BYTES)
    try:
        if path.suffix == ".pcd":
            names, numbers, organized = read_pcd(path.read_bytes(), options.columns)
            return names, _as_float32(numbers), organized
        if path.suffix == ".npy":
            return *_read_npy(path, options.columns), False
        if path.suffix == ".bin":
            return *_read_bin(path, options), False
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    except OSError as error:
        raise InvalidInput(f"{path}: the file cannot be read ({error.strerror}); check its permissions and the disk") from error
    raise InvalidInput(f"{path}: scans are read from files {', '.join(POINT_SUFFIXES)}, found {path.suffix or 'no suffix'!r}")


def _as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # a number that does not fit becomes infinite, and is counted as such
        return np.array(values, dtype=np.float32)


def _read_bin(path: Path, options: ScanOptions) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    names = options.columns or XYZI
    data = np.fromfile(path, dtype=np.uint8)
    check_number_rows(data, names, options.dtype, named=bool(options.columns))
    rows = _as_float32(data.view(number_type(options.dtype)).reshape(-1, len(names)))
    check_outer_rows(rows, names)
    check_distances(rows, names)
    return names, rows


def _read_npy(path: Path, columns: tuple[str, ...]) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise InvalidInput("not a readable numpy array (another kind of file); save a plain array of shape (N, 4)")
    try:  # mapping checks the declared shape against the file's size before anything is allocated
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_FAULTS as error:
        raise InvalidInput(f"not a readable numpy array ({shown(error)}); save a plain array of shape (N, 4)") from error
    if array.dtype.names and array.ndim == 1:
        names, wanted = find_fields(array.dtype.names, columns)
        parts = [array[array.dtype.names[i]] for i in wanted]
        if all(part.ndim == 1 and part.dtype.kind in "fiu" for part in parts):
            return names, np.stack([_as_float32(part) for part in parts], 1)
    names = columns or XYZI
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InvalidInput(
            f"expected numbers of shape (N, {len(names)}) for the columns {' '.join(names)}, found {array.shape} "
            f"{shown(array.dtype)}; save a plain array"
        )
    if array.shape[1] != len(names):
        width = array.shape[1]
        hint = (
            f"give --columns {usual_columns(width)}, or your own names"
            if 3 <= width <= 64
            else "is it transposed, or another array?"
        )
        raise InvalidInput(
            f"expected numbers of shape (N, {len(names)}) for the columns {' '.join(names)}, found {array.shape}; {hint}"
        )
    return names, _as_float32(array)
