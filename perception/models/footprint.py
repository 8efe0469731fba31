"""Which cells of the BEV map at the cut a box covers."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.cut import CutSpec


def footprint(boxes: Tensor, spec: CutSpec, margin_cells: float = 1.0) -> Tensor:
    """Find the cells that belong to each box in BEV.

    Args:
        boxes: (N, 7) boxes.
        spec: The cut, whose `position` says where the center of a cell lies.
        margin_cells: Cells by which each box is widened on each side.

    Returns:
        (N, H, W) bool, True where the center of a cell lies in the widened box.
    """
    _, height, width = spec.shape
    x, y = spec.position(torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device))
    dx = x[None, None, :] - boxes[:, 0, None, None]
    dy = y[None, :, None] - boxes[:, 1, None, None]
    cos, sin = torch.cos(boxes[:, 6])[:, None, None], torch.sin(boxes[:, 6])[:, None, None]
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    cell_x, cell_y = spec.cell_size()
    half = boxes[:, 3:5, None, None] / 2 + margin_cells * max(cell_x, cell_y)
    return (along.abs() <= half[:, 0]) & (across.abs() <= half[:, 1])
