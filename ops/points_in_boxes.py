"""Which points lie in which rotated box: to count an object's points, to cut an object out of a scan, to label points.

Boxes are (x, y, z of the center, dx, dy, dz, yaw) in meters and radians (see `core/boxes.py`). A point is inside when in the box's
own frame |coordinate| <= half size on all three axes, faces included, computed in float64. A non-finite point is in no box.
Source: OpenPCDet, `roiaware_pool3d_kernel.cu` (there in float32, with the side faces excluded).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.tensor_value import shape_of
from .checks import check_boxes
from .cpu.points_in_boxes import count, first_box, membership
from .dispatch import dispatch


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Find the first box that each point lies in.

    Args:
        points: (N, 3) x, y, z in meters.
        boxes: (M, 7) boxes in the same frame as the points.

    Returns:
        (N,) int64, the lowest row of `boxes` that holds the point, -1 where there is none.

    Raises:
        InvalidInput: A tensor has another shape, or a box is not finite.

    Example:
        >>> car = torch.tensor([[10.0, 0, 1, 4, 2, 1.5, 0]])
        >>> points_in_boxes(torch.tensor([[11.0, 0.5, 1.2], [0, 0, 0]]), car)
        tensor([ 0, -1])
    """
    return dispatch((points, boxes), points_in_boxes_reference, cpu=_points_in_boxes_on_cpu)(points, boxes)


def points_in_boxes_mask(points: Tensor, boxes: Tensor) -> Tensor:
    """Find which points lie in which box.

    Args:
        points: (N, 3) x, y, z in meters.
        boxes: (M, 7) boxes in the same frame as the points.

    Returns:
        (M, N) bool.

    Raises:
        InvalidInput: A tensor has another shape, or a box is not finite.
    """
    return dispatch((points, boxes), points_in_boxes_mask_reference, cpu=_mask_on_cpu)(points, boxes)


def count_points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Count the points in each box. A point in several boxes counts in each.

    Args:
        points: (N, 3) x, y, z in meters.
        boxes: (M, 7) boxes in the same frame as the points.

    Returns:
        (M,) int64.

    Raises:
        InvalidInput: A tensor has another shape, or a box is not finite.
    """
    return dispatch((points, boxes), count_points_in_boxes_reference, cpu=_count_on_cpu)(points, boxes)


class BoxSearch:
    """Finds the points of one box at a time, on the CPU, in buffers that every scan uses again.

    A mask of all boxes and all points has megabytes, of another size for each scan; a program that cuts objects out of thousands of
    scans would leave holes in its memory.

    Example:
        >>> search = BoxSearch()
        >>> search.load(torch.tensor([[11.0, 0.5, 1.2], [0, 0, 0]]), torch.tensor([[10.0, 0, 1, 4, 2, 1.5, 0]]))
        >>> search.rows(0)
        array([0])
    """

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.float64)
        self._mask = np.empty(0, np.bool_)
        self._points = np.empty((3, 0), np.float64)
        self._boxes = np.empty((8, 0), np.float64)

    def load(self, points: Tensor, boxes: Tensor) -> None:
        """Take another scan.

        Args:
            points: (N, 3) x, y, z in meters.
            boxes: (M, 7) boxes in the same frame as the points.

        Raises:
            InvalidInput: A tensor has another shape, or a box is not finite.
        """
        _check(points, boxes)
        count = len(points)
        if count > len(self._mask):
            room = count + count // 4
            self._buffer, self._mask = np.empty(3 * room, np.float64), np.empty(room, np.bool_)
        self._points = self._buffer[: 3 * count].reshape(3, count)
        np.copyto(self._points, points.detach().numpy().T)
        self._boxes = _box_columns(boxes).numpy()

    def rows(self, box: int) -> NDArray[np.int64]:
        """Find the points in a box of the loaded scan; the same ones as in a row of `points_in_boxes_mask`.

        Args:
            box: Row of the box.

        Returns:
            (K,) rows of the points, ascending.
        """
        mask = self._mask[: self._points.shape[1]]
        membership(self._points, np.ascontiguousarray(self._boxes[:, box : box + 1]), mask.reshape(1, -1))
        return np.flatnonzero(mask)


def points_in_boxes_reference(points: Tensor, boxes: Tensor) -> Tensor:
    """Compute `points_in_boxes` in plain torch, on any device.

    Args:
        points: (N, 3) points.
        boxes: (M, 7) boxes.

    Returns:
        (N,) int64 rows of `boxes`, -1 for none.
    """
    mask = points_in_boxes_mask_reference(points, boxes)
    rows = torch.arange(len(boxes), device=mask.device)[:, None]
    nowhere = mask.new_full((1, len(points)), len(boxes), dtype=torch.int64)
    first = torch.cat([torch.where(mask, rows, len(boxes)), nowhere]).amin(0)
    return torch.where(first == len(boxes), -1, first)


def points_in_boxes_mask_reference(points: Tensor, boxes: Tensor) -> Tensor:
    """Compute `points_in_boxes_mask` in plain torch, on any device.

    Args:
        points: (N, 3) points.
        boxes: (M, 7) boxes.

    Returns:
        (M, N) bool.
    """
    _check(points, boxes)
    x, y, z, half_x, half_y, half_z, cos, sin = _box_columns(boxes)[..., None]  # (M, 1) each
    px, py, pz = _point_columns(points)
    dx, dy = px - x, py - y
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    return (along.abs() <= half_x) & (across.abs() <= half_y) & ((pz - z).abs() <= half_z)


def count_points_in_boxes_reference(points: Tensor, boxes: Tensor) -> Tensor:
    """Compute `count_points_in_boxes` in plain torch, on any device.

    Args:
        points: (N, 3) points.
        boxes: (M, 7) boxes.

    Returns:
        (M,) int64.
    """
    return points_in_boxes_mask_reference(points, boxes).sum(1)


def _points_in_boxes_on_cpu(points: Tensor, boxes: Tensor) -> Tensor:
    _check(points, boxes)
    first = np.full(len(points), -1, np.int64)
    first_box(_point_columns(points).numpy(), _box_columns(boxes).numpy(), first)
    return torch.from_numpy(first)


def _mask_on_cpu(points: Tensor, boxes: Tensor) -> Tensor:
    _check(points, boxes)
    mask = np.empty((len(boxes), len(points)), np.bool_)
    membership(_point_columns(points).numpy(), _box_columns(boxes).numpy(), mask)
    return torch.from_numpy(mask)


def _count_on_cpu(points: Tensor, boxes: Tensor) -> Tensor:
    _check(points, boxes)
    counts = np.zeros(len(boxes), np.int64)
    count(_point_columns(points).numpy(), _box_columns(boxes).numpy(), counts)
    return torch.from_numpy(counts)


def _check(points: Tensor, boxes: Tensor) -> None:
    if points.ndim != 2 or points.shape[1] != 3:
        raise InvalidInput(f"points_in_boxes expects points as a tensor (N, 3) of x, y, z, found {shape_of(points)}")
    check_boxes("points_in_boxes", boxes)


def _point_columns(points: Tensor) -> Tensor:
    """(N, 3) -> (3, N) float64, contiguous."""
    return points.detach().T.double().contiguous()


def _box_columns(boxes: Tensor) -> Tensor:
    """(M, 7) -> (8, M) float64: center, half sizes, cosine and sine of the heading, one per row."""
    b = boxes.detach().double()
    return torch.cat([b[:, :3].T, b[:, 3:6].T / 2, b[:, 6].cos()[None], b[:, 6].sin()[None]])
