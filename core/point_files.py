"""Reading and writing one scan: KITTI's `.bin`, numpy's `.npy` and the Point Cloud Library's `.pcd`.

A scan comes from outside, so everything is checked here, once: the byte count against the row width, every declared size against
the size of the file before memory is taken, no pickle, no NaN, no empty scan. The result is a `PointCloud`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import InvalidInput
from .files import write_atomically
from .ledger import Ledger
from .rig import RigSpec, count_intensity, scale_intensity
from .row_width import check_rows, number_type
from .scan_options import ScanOptions
from .structures import PointCloud, column_names, scan_of_table, warn_of_intensity

XYZI = ("x", "y", "z", "intensity")
"""Columns of a `.bin` or `.npy` file that names none, those of KITTI."""

POINT_SUFFIXES = (".bin", ".npy", ".pcd")
"""Suffixes of files that `read_points` reads."""

_USUAL = ScanOptions()
_PCD_ALIASES = {"i": "intensity", "reflectivity": "intensity"}
_PCD_MAX_HEADER = 64 * 1024


def read_scan(path: Path | str, options: ScanOptions = _USUAL, *, rig: RigSpec | None = None) -> tuple[PointCloud, Ledger]:
    """Read one scan from a `.bin` (rows of numbers), `.npy` ((N, C), no pickle) or `.pcd` file, and count what is dropped.

    Every command reads scans through this function.

    Args:
        path: The file; its suffix tells the format.
        options: Columns, number type, axes, and whether points that are not finite are left out. Its rig is not used.
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
    names, values = _read_table(path, options)
    points = len(values)
    if options.axes != ("x", "y", "z"):
        values = _turned(values, names, options.axes)
    try:
        cloud = scan_of_table(torch.from_numpy(values), names, drop_non_finite=options.drop_non_finite)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    non_finite = points - len(cloud)
    zero = (cloud.xyz == 0).all(1)
    if zero.any():
        cloud = cloud.select(~zero)
    ledger = Ledger(scans=1, points=points, points_non_finite=non_finite, points_zero=int(zero.sum()))
    if len(cloud) == 0:
        found = f"all {points} points are NaN, infinite or at the sensor" if points else "the scan holds no point"
        raise InvalidInput(f"{path}: {found}; leave the frame out of the split")
    if rig is not None:
        ledger = ledger + count_intensity(cloud, rig.intensity_scale)
        cloud = scale_intensity(cloud, rig.intensity_scale)
        if rig.z_shift:
            cloud = replace(cloud, xyz=rig.from_sensor(cloud.xyz))
    return cloud, ledger


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


def scan_files(paths: Sequence[str | Path]) -> tuple[Path, ...]:
    """Find the scan files among paths.

    Args:
        paths: Files and folders. A folder stands for the scans in it, ordered by name.

    Returns:
        The files, in this order.

    Raises:
        InvalidInput: A path does not exist, there is no scan at all, or two scans have one name apart from folder and suffix:
            results are filed under that name.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InvalidInput(f"there is no file or folder {path}; check its spelling")
        found += sorted(p for p in path.iterdir() if p.suffix in POINT_SUFFIXES) if path.is_dir() else [path]
    if not found:
        raise InvalidInput(f"there is no scan ({', '.join(POINT_SUFFIXES)}) in {', '.join(map(str, paths))}")
    named: dict[str, Path] = {}
    for path in found:
        other = named.setdefault(path.stem, path)
        if other is not path:
            raise InvalidInput(f"{other} and {path} are both called {path.stem!r}; rename one, or give them in two runs")
    return tuple(found)


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


def _read_table(path: Path, options: ScanOptions) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Names of columns and their (N, C) values."""
    if not path.is_file():
        raise InvalidInput(f"there is no scan at {path}; check the root folder and the frame id")
    if path.suffix == ".pcd":
        return _read_pcd(path, options.columns or None)
    if path.suffix not in (".bin", ".npy"):
        raise InvalidInput(f"{path}: scans are read from files {', '.join(POINT_SUFFIXES)}, found {path.suffix or 'no suffix'!r}")
    if path.suffix == ".bin":
        return _read_bin(path, options)
    names = options.columns or XYZI
    return names, _read_npy(path, names)


def _turned(values: NDArray[np.float32], names: tuple[str, ...], axes: tuple[str, str, str]) -> NDArray[np.float32]:
    """The table with its columns x, y, z made of those of the file that `axes` names."""
    turned = values.copy()
    for to, source in zip("xyz", axes):
        if to in names and source[-1] in names:
            column = values[:, names.index(source[-1])]
            turned[:, names.index(to)] = -column if source.startswith("-") else column
    return turned


def _as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # a number that does not fit becomes infinite, and is counted as such
        return np.array(values, dtype=np.float32)


def _read_bin(path: Path, options: ScanOptions) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    names = options.columns or XYZI
    data = np.fromfile(path, dtype=np.uint8)
    try:
        check_rows(data, names, options.dtype, named=bool(options.columns))
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    return names, _as_float32(data.view(number_type(options.dtype)).reshape(-1, len(names)))


def _read_npy(path: Path, names: tuple[str, ...]) -> NDArray[np.float32]:
    try:  # mapping checks the declared shape against the file's size before anything is allocated
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise InvalidInput(f"{path}: not a readable numpy array ({error}); save a plain float (N, {len(names)}) array") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.shape[1] != len(names) or array.dtype.kind not in "fiu":
        found = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InvalidInput(f"{path}: expected numbers of shape (N, {len(names)}) for the columns {names}, found {found}")
    return _as_float32(array)


def _read_pcd(path: Path, columns: tuple[str, ...] | None) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """The wanted fields of a `.pcd` file. Format: pointclouds.org, "The PCD file format", version 0.7."""
    data = path.read_bytes()
    header, start = _pcd_header(path, data)

    def integers(key: str, default: list[str] | None = None) -> list[int]:
        words = header.get(key, default)
        if words is None or not all(w.isdigit() for w in words):
            raise InvalidInput(f"{path}: the PCD header needs a line {key} with whole numbers, found {words}")
        return [int(w) for w in words]

    fields = header.get("FIELDS") or header.get("COLUMNS") or []
    sizes, counts = integers("SIZE"), integers("COUNT", ["1"] * len(fields))
    kinds = header.get("TYPE", [])
    if not fields or not len(fields) == len(sizes) == len(counts) == len(kinds):
        raise InvalidInput(
            f"{path}: the PCD header must give FIELDS, SIZE, TYPE and COUNT of equal length, found "
            f"{len(fields)}, {len(sizes)}, {len(kinds)} and {len(counts)} entries"
        )
    if any(k not in "FIU" or s not in (1, 2, 4, 8) or c < 1 for k, s, c in zip(kinds, sizes, counts)):
        raise InvalidInput(
            f"{path}: the PCD header asks for TYPE {kinds} SIZE {sizes} COUNT {counts}; known are F I U of 1, 2, 4, 8 bytes"
        )
    declared = integers("POINTS", [str(int(np.prod(integers("WIDTH") + integers("HEIGHT", ["1"]), dtype=object)))])[0]

    known = [_PCD_ALIASES.get(f.lower(), f.lower()) for f in fields]
    names = columns or tuple(n for n in XYZI if n != "intensity" or n in known)
    names = tuple(n for n in names if n != "_")
    missing = [n for n in names if n not in known]
    if missing:
        raise InvalidInput(
            f"{path}: there is no field {', '.join(missing)}; the file has {' '.join(fields)}; name the wanted ones in columns  (option --columns)"
        )

    encoding = " ".join(header["DATA"])
    if encoding == "ascii":
        table = _pcd_ascii(path, data[start:], declared, sum(counts))
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        return names, table[:, [first[known.index(n)] for n in names]]
    if encoding == "binary":
        try:
            dtype = np.dtype([(f"{i}", f"<{k.lower()}{s}", (c,)) for i, (k, s, c) in enumerate(zip(kinds, sizes, counts))])
        except TypeError as error:
            raise InvalidInput(f"{path}: there is no number of TYPE {kinds} with SIZE {sizes} ({error})") from error
        if declared * dtype.itemsize > len(data) - start:
            raise InvalidInput(
                f"{path}: the header declares {declared} points of {dtype.itemsize} bytes, but only {len(data) - start} bytes follow; is the file cut off?"
            )
        rows = np.frombuffer(data, dtype=dtype, count=declared, offset=start)
        columns_ = [rows[f"{known.index(n)}"][:, 0].astype(np.float32) for n in names]
        return names, np.stack(columns_, axis=1)
    raise InvalidInput(
        f"{path}: files with DATA {encoding} are not read; convert it with `pcl_convert_pcd_ascii_binary IN.pcd OUT.pcd 1` (binary)"
    )


def _pcd_header(path: Path, data: bytes) -> tuple[dict[str, list[str]], int]:
    """The header's lines by keyword, and where the points start."""
    header: dict[str, list[str]] = {}
    position = 0
    while "DATA" not in header:
        end = data.find(b"\n", position, _PCD_MAX_HEADER)
        if end < 0:
            raise InvalidInput(f"{path}: the PCD header has no line DATA in the first {_PCD_MAX_HEADER} bytes")
        words = data[position:end].decode("ascii", errors="replace").split()
        position = end + 1
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
    return header, position


def _pcd_ascii(path: Path, body: bytes, declared: int, width: int) -> NDArray[np.float32]:
    words = body.split()
    if len(words) != declared * width:
        raise InvalidInput(f"{path}: the header declares {declared} points of {width} values, but {len(words)} values follow")
    try:
        return np.array(words, dtype=np.float64).astype(np.float32).reshape(declared, width)
    except ValueError as error:
        raise InvalidInput(f"{path}: the points hold a word that is not a number ({error})") from error
