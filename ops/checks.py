"""What several operators check of their arguments: boxes, points, and the bounds of the scenes of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.tensor_value import shape_of


def check_boxes(operator: str, *boxes: Tensor) -> None:
    """Refuse tensors that are not boxes.

    Args:
        operator: Name of the operator, for the message.
        boxes: Tensors that should be (N, 7), floating point and finite.

    Raises:
        InvalidInput: One of them has another shape or type, or a NaN or infinite value.
    """
    for b in boxes:
        if b.ndim != 2 or b.shape[1] != 7 or not b.is_floating_point():
            raise InvalidInput(
                f"{operator} expects boxes as a floating-point tensor (N, 7) of x, y, z, dx, dy, dz, yaw, found {shape_of(b)}"
            )
        finite = torch.isfinite(b)
        if not finite.all():
            bad = int((~finite.all(1)).sum())
            raise InvalidInput(f"{operator}: {bad} of {len(b)} boxes have a NaN or infinite value; remove them first")


def check_points(operator: str, points: Tensor) -> None:
    """Refuse a tensor that does not hold points.

    Args:
        operator: Name of the operator and the argument, for the message.
        points: Tensor that should be (N, 3), floating point and finite when rounded to float32.

    Raises:
        InvalidInput: It has another shape or type, or a value that is NaN or infinite in float32.
    """
    if points.ndim != 2 or points.shape[1] != 3 or not points.is_floating_point():
        raise InvalidInput(f"{operator} must be a floating-point tensor (N, 3) of x, y, z, found {shape_of(points)}")
    if points.device.type == "cpu" and np.isfinite(float32_array(points)).all():
        return
    finite = torch.isfinite(points.detach().to(torch.float32)).all(1)
    if not finite.all():
        bad = int((~finite).sum())
        raise InvalidInput(f"{operator}: {bad} of {len(points)} points have a NaN or infinite value; remove them first")


def check_row_bounds(operator: str, starts: Sequence[int], rows: int) -> None:
    """Refuse bounds that do not divide the rows of a table into scenes.

    Args:
        operator: Name of the operator and the argument, for the message.
        starts: B + 1 bounds that should ascend from 0 to `rows`; equal neighbors are an empty scene.
        rows: Number of rows of the table.

    Raises:
        InvalidInput: The bounds do not ascend from 0 to `rows`.
    """
    if len(starts) < 1 or starts[0] != 0 or starts[-1] != rows or any(end < start for start, end in pairwise(starts)):
        raise InvalidInput(
            f"{operator}: the bounds of the scenes must ascend from 0 to the number of rows, {rows}, found {tuple(starts)}"
        )


def float32_array(points: Tensor) -> NDArray[np.float32]:
    """Give a tensor of the CPU as a contiguous float32 array.

    Args:
        points: Tensor of any shape and numeric type.

    Returns:
        An array of the same shape, without a copy where the tensor is float32 and contiguous already. numpy makes the copy,
        because torch's threads cost more than they save here.
    """
    return np.ascontiguousarray(points.detach().to(torch.float32).numpy())
