"""Calibration files of KITTI: object, tracking, odometry and raw recordings, checked before anything is projected.

    object      <id>.txt                     P2: R0_rect: Tr_velo_to_cam:
    tracking    <id>.txt                     P2: R_rect Tr_velo_cam          (no colon after the last two)
    odometry    calib.txt                    P2: Tr:                         (Tr leads to the rectified camera already)
    raw         calib_cam_to_cam.txt         P_rect_02: R_rect_00:
                calib_velo_to_cam.txt        R: T:

A calibration that cannot be one is refused with file and row: a value that is not finite, a rotation that is none, a focal length that
is not positive, a camera that does not look ahead or lies meters away. Otherwise detections would vanish without a word.

Read next: `kitti.py`, which crops scans with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.foreign_text import shown
from ..core.frame import Calibration
from ..core.text_files import read_text
from .picture_size import find_picture, read_picture_size

DEFAULT_IMAGE_SIZE = (1242, 375)
"""Width and height in pixels of most KITTI pictures; assumed where the picture itself is missing."""
_RAW_FILES = ("calib_cam_to_cam.txt", "calib_velo_to_cam.txt")
_PROJECTION = ("P2", "P_rect_02")
_RECTIFY = ("R0_rect", "R_rect", "R_rect_00")
_MOUNTING = ("Tr_velo_to_cam", "Tr_velo_cam")
_ROTATION_TOLERANCE = 0.02  # KITTI's own matrices are rounded to about 1e-6; cameras of others to two digits
_FARTHEST = 10.0  # m between LiDAR and camera of one vehicle
_OFF_CENTER = 0.15  # share of the width, and twice that of the height, by which a principal point may miss the picture's center


def calibration_files(folder: Path, name: str) -> tuple[Path, ...]:
    """Name every file that the calibration of a frame may be read from, whether it is there or not.

    Args:
        folder: Folder of the calibrations.
        name: Name of the frame.

    Returns:
        The frame's own file and those of the whole recording.
    """
    return (folder / f"{name}.txt", *(folder / file for file in (*_RAW_FILES, "calib.txt")))


def find_calibration(folder: Path, name: str) -> Path:
    """Find the calibration of a frame: its own file, or the one of the whole recording.

    Args:
        folder: Folder of the calibrations.
        name: Name of the frame.

    Returns:
        `NAME.txt`, else `calib_cam_to_cam.txt` (raw recordings; `calib_velo_to_cam.txt` lies beside it), else `calib.txt` (odometry). The
        first where there is none.
    """
    own = folder / f"{name}.txt"
    whole = [folder / _RAW_FILES[0], folder / "calib.txt"]
    return next((path for path in (own, *whole) if path.is_file()), own)


def read_calibration(path: Path | str, *, image_size: tuple[int, int] | None = None) -> Calibration:
    """Read a KITTI calibration file: P2 (camera to pixels) and R0_rect @ Tr_velo_to_cam (LiDAR to the rectified camera frame).

    The rows of the tracking, odometry and raw layouts are understood too.

    Args:
        path: The file; of a raw recording `calib_cam_to_cam.txt`.
        image_size: Width and height of the picture in pixels. None assumes `DEFAULT_IMAGE_SIZE`, and refuses it where the principal point
            of P2 says that the picture has another size.

    Returns:
        The calibration of the LiDAR frame without a z shift.

    Raises:
        InvalidInput: The file cannot be read, a row is missing or has another number of values, or the values are no calibration.
    """
    path = Path(path)
    rows = _read_rows(path)
    beside = path.with_name(_RAW_FILES[1])
    if path.name == _RAW_FILES[0] and beside.is_file():
        rows |= {name: row for name, row in _read_rows(beside).items() if name in ("R", "T")}
    projection = _projection(path, rows)
    mounting = torch.eye(4, dtype=torch.float64)
    name = next((n for n in _MOUNTING if n in rows), None)
    rectified = False
    if name is not None:
        mounting[:3] = _matrix(path, rows, name, (3, 4))
    elif "Tr" in rows and not any(n in rows for n in _RECTIFY):
        name, rectified = "Tr", True
        mounting[:3] = _matrix(path, rows, name, (3, 4))
    elif "R" in rows and "T" in rows:
        name = "R"
        mounting[:3, :3], mounting[:3, 3] = _matrix(path, rows, "R", (3, 3)), _matrix(path, rows, "T", (3, 1))[:, 0]
    else:
        raise _missing(path, rows, "Tr_velo_to_cam (or Tr_velo_cam, or Tr, or R and T of calib_velo_to_cam.txt)")
    rectify = torch.eye(4, dtype=torch.float64)
    if not rectified:
        rectify_name = next((n for n in _RECTIFY if n in rows), None)
        if rectify_name is None:
            raise _missing(path, rows, "R0_rect (or R_rect, or R_rect_00)")
        rectify[:3, :3] = _matrix(path, rows, rectify_name, (3, 3))
        _check_rotation(path, rectify_name, rectify[:3, :3])
    _check_rotation(path, name, mounting[:3, :3])
    _check_mounting(path, name, rectify @ mounting)
    if image_size is None:
        image_size = DEFAULT_IMAGE_SIZE
        _check_assumed_size(path, projection, image_size)
    return Calibration(lidar_to_camera=rectify @ mounting, projection=projection, image_size=image_size)


def is_off_center(calibration: Calibration) -> bool:
    """Say whether the principal point of a camera lies so far from the center of its picture that both hardly belong together.

    Args:
        calibration: The calibration.

    Returns:
        True where it misses the center by more than 15 % of the width or 30 % of the height.
    """
    return _misses(_principal_point(calibration.projection), calibration.image_size)


def calibration_of_scan(folder: Path, name: str, image_size: tuple[int, int] | None = None) -> Calibration:
    """Read the calibration of a scan that is not part of a dataset (`--calib FOLDER`).

    Args:
        folder: Folder of the calibrations; see `find_calibration`.
        name: Name of the scan.
        image_size: Width and height of the picture in pixels. None takes those of the picture in `image_2` beside the folder, as in
            KITTI's layout; where there is none, see `read_calibration`.

    Returns:
        The calibration of the LiDAR frame without a z shift.

    Raises:
        InvalidInput: As for `read_calibration` and `read_picture_size`.
    """
    picture = find_picture(folder.parent / "image_2", name) if image_size is None else None
    size = image_size if picture is None else read_picture_size(picture)
    return read_calibration(find_calibration(folder, name), image_size=size)


def shift_calibration(calibration: Calibration, z_shift: float) -> Calibration:
    """Adapt a calibration to points whose z was raised.

    Args:
        calibration: Calibration of the sensor frame.
        z_shift: Meters that were added to z.

    Returns:
        Calibration of the shifted frame.
    """
    back = torch.eye(4, dtype=torch.float64)
    back[2, 3] = -z_shift
    return replace(calibration, lidar_to_camera=calibration.lidar_to_camera @ back)


def _read_rows(path: Path) -> dict[str, list[str]]:
    """Rows by name. The name ends at a colon or at the first blank."""
    rows: dict[str, list[str]] = {}
    for line in read_text(path, "calibration").splitlines():
        words = line.replace(":", " ", 1).split() if ":" in line else line.split()
        if words:
            rows[words[0]] = words[1:]
    return rows


def _missing(path: Path, rows: Mapping[str, list[str]], name: str) -> InvalidInput:
    first = name.split(" ")[0]
    hint = ""
    if set(rows) >= {"R", "T"} and "P_rect_02" not in rows:
        hint = f"; this looks like a raw recording's {_RAW_FILES[1]}: put {_RAW_FILES[0]} beside it, in the folder of the calibrations"
    elif "P_rect_02" in rows:
        hint = f"; put the raw recording's {_RAW_FILES[1]} beside it"
    found = ", ".join(shown(row, most=30) for row in list(rows)[:20]) or "none"
    needed = f"KITTI's calibration needs P2, R0_rect and Tr_velo_to_cam, found {found}"
    return InvalidInput(f"{path}: there is no row {first}{name.removeprefix(first)}; {needed}{hint}")


def _matrix(path: Path, rows: Mapping[str, list[str]], name: str, shape: tuple[int, int]) -> Tensor:
    count = shape[0] * shape[1]
    try:
        values = torch.tensor([float(n) for n in rows[name]], dtype=torch.float64).reshape(shape)
    except (ValueError, RuntimeError) as error:
        found = shown(" ".join(rows[name]), most=120)
        raise InvalidInput(f"{path}: row {name} must hold {count} numbers, found {len(rows[name])}: {found!r}") from error
    if not bool(torch.isfinite(values).all()):
        raise InvalidInput(f"{path}: row {name} holds NaN or inf; repair the calibration, or leave the frame out")
    return values


def _projection(path: Path, rows: Mapping[str, list[str]]) -> Tensor:
    name = next((n for n in _PROJECTION if n in rows), None)
    if name is None:
        raise _missing(path, rows, "P2 (or P_rect_02)")
    matrix = _matrix(path, rows, name, (3, 4))
    focal = (float(matrix[0, 0]), float(matrix[1, 1]))
    if min(focal) <= 0:
        raise InvalidInput(f"{path}: row {name} has the focal lengths {focal[0]:g} and {focal[1]:g}; both must be positive")
    last = matrix[2, :3]
    if float(last[2]) <= 0 or float(last[:2].abs().max()) > 1e-3 * float(last[2]) or float(torch.linalg.det(matrix[:, :3])) <= 0:
        raise InvalidInput(
            f"{path}: row {name} is no camera matrix: its last row must be 0 0 1, and it must not be singular, found "
            f"{' '.join(f'{v:g}' for v in last.tolist())}"
        )
    return matrix


def _check_rotation(path: Path, name: str, rotation: Tensor) -> None:
    off = float((rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max())
    if not off <= _ROTATION_TOLERANCE or float(torch.linalg.det(rotation)) <= 0:
        what = "is singular" if abs(float(torch.linalg.det(rotation))) < 1e-6 else "is no rotation"
        raise InvalidInput(
            f"{path}: the matrix in row {name} {what} (its rows must be perpendicular, of length 1, and right-handed; they miss that by "
            f"{off:.3g}); repair the calibration, or leave the frame out"
        )


def _check_mounting(path: Path, name: str, lidar_to_camera: Tensor) -> None:
    """The camera's y axis points down, and LiDAR's z up. An identity or an inverted matrix breaks that."""
    down = -float(lidar_to_camera[1, 2])
    if down < 0.5:
        near_identity = float((lidar_to_camera[:3, :3] - torch.eye(3, dtype=torch.float64)).abs().max()) < 0.1
        what = "is the identity" if near_identity else "does not lead from a LiDAR with z up to a camera with y down"
        raise InvalidInput(
            f"{path}: row {name} {what}; it must lead from the LiDAR (x forward, y left, z up) to the camera (x right, y down, z forward) and "
            "may be inverted. Data without a camera belong into a folder of your own (upcycle3d prepare folder)"
        )
    away = float(lidar_to_camera[:3, 3].norm())
    if away > _FARTHEST:
        raise InvalidInput(
            f"{path}: row {name} puts the camera {away:.1f} m away from the LiDAR; it must be in meters, and is perhaps in millimeters"
        )


def _check_assumed_size(path: Path, projection: Tensor, size: tuple[int, int]) -> None:
    center = _principal_point(projection)
    if _misses(center, size):
        raise InvalidInput(
            f"{path}: there is no picture whose size could be read, and row P2 has its principal point at {center[0]:.0f}, {center[1]:.0f}, "
            f"which does not belong to a picture of {size[0]} x {size[1]} pixels; put the pictures (.png or .jpg) into image_2, or give their "
            f"size (--image-size WIDTH HEIGHT, perhaps {2 * center[0]:.0f} {2 * center[1]:.0f})"
        )


def _principal_point(projection: Tensor) -> tuple[float, float]:
    scale = float(projection[2, 2])
    return float(projection[0, 2]) / scale, float(projection[1, 2]) / scale


def _misses(center: tuple[float, float], size: tuple[int, int]) -> bool:
    return abs(center[0] - size[0] / 2) > _OFF_CENTER * size[0] or abs(center[1] - size[1] / 2) > 2 * _OFF_CENTER * size[1]
