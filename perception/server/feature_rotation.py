"""F-RoT, in our reading: objects pasted by F-GT, each turned about its own center.

Of F-RoT we know only the name, and that the first version of UpCycling's paper called it safe. This is an ablation and not a part of
the method. Features are not equivariant to rotation, so a turned object holds vectors that the encoder would not make; a small angle
changes little.

Read next: `feature_gt.py`, which cuts and pastes the objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.boxes import rotate_z, wrap_angle
from ...core.cut import CutSpec
from ...ops.iou3d import iou_bev
from ..models.footprint import footprint
from .feature_gt import FeatureObject
from .upcycle_config import FeatureGtConfig


def rotate_object(item: FeatureObject, angle: float, spec: CutSpec, config: FeatureGtConfig) -> FeatureObject:
    """Turn an object about its center: box and keypoints exactly, cells by bilinear interpolation.

    Args:
        item: The object.
        angle: Angle in rad, counter-clockwise in BEV.
        spec: The cut at which it was made.
        config: `margin_cells` decides which cells belong to the turned box.

    Returns:
        The turned object. Near the border of the map it may have lost all its cells.
    """
    box = torch.cat([item.box[:6], wrap_angle(item.box[6:] + angle)])
    low = item.coords[:, 1:].amin(0) if len(item.coords) else torch.zeros(2)
    high = item.coords[:, 1:].amax(0) if len(item.coords) else torch.zeros(2)
    reach = math.ceil(float((high - low).float().norm())) + 2  # cells; whatever the angle, the object stays in this window
    y0, x0 = (int(v) - reach for v in low)
    size = [int(h) - int(v) + 2 * reach + 1 for h, v in zip(high, low, strict=True)]
    window = torch.zeros(spec.shape[0], *size, item.features.shape[1])
    c = item.coords.long()
    window[c[:, 0], c[:, 1] - y0, c[:, 2] - x0] = item.features.float()

    # Each cell of the turned object takes its value from where it came from, computed in meters about the center of the box.
    rows, columns = torch.meshgrid(torch.arange(size[0]) + y0, torch.arange(size[1]) + x0, indexing="ij")
    x, y = spec.position(rows, columns)
    offset = torch.stack([x - box[0], y - box[1], torch.zeros_like(x)], -1)
    source = rotate_z(offset, torch.tensor(-angle)) + box[:3]
    cell_x, cell_y = spec.cell_size()
    first_x, first_y = spec.position(float(y0), float(x0))
    place = torch.stack([(source[..., 0] - first_x) / cell_x, (source[..., 1] - first_y) / cell_y], -1)  # in cells of the window
    grid = 2 * place / torch.tensor([size[1] - 1, size[0] - 1]) - 1
    flat = window.permute(0, 3, 1, 2).flatten(0, 1)[None]
    turned = F.grid_sample(flat, grid[None], align_corners=True)[0].view(spec.shape[0], -1, *size)

    cells = (turned != 0).any(1).nonzero()
    coords = cells + torch.tensor([0, y0, x0])
    inside = ((coords >= 0) & (coords < torch.tensor(spec.shape))).all(1)
    cells, coords = cells[inside], coords[inside]
    own = footprint(box[None], spec, config.margin_cells)[0][coords[:, 1], coords[:, 2]]
    cells, coords = cells[own], coords[own]
    keypoints = item.keypoints
    if keypoints is not None:
        keypoints = replace(keypoints, xyz=rotate_z(keypoints.xyz - box[:3], torch.tensor(angle)) + box[:3])
    features = turned[cells[:, 0], :, cells[:, 1], cells[:, 2]]
    return replace(item, box=box, coords=coords.int(), features=features, keypoints=keypoints)


def rotate_objects(
    objects: Sequence[FeatureObject],
    blocked: Tensor,
    spec: CutSpec,
    config: FeatureGtConfig,
    *,
    limit: float,
    rng: np.random.Generator,
) -> list[FeatureObject]:
    """Turn each object by a random angle, unless it would then overlap something.

    Args:
        objects: Objects that do not overlap.
        blocked: (N, 7) boxes to keep clear of, on any device.
        spec: The cut at which the objects were made.
        config: `margin_cells` decides which cells belong to a turned box.
        limit: Largest angle in rad, either way.
        rng: Draws one angle per object.

    Returns:
        The objects in the same order, turned or as they were.
    """
    result = list(objects)
    for k, item in enumerate(objects):
        turned = rotate_object(item, float(rng.uniform(-limit, limit)), spec, config)
        others = [o.box for j, o in enumerate(result) if j != k]
        around = torch.cat([blocked.cpu(), *(b[None] for b in others)])
        if len(turned.coords) and (len(around) == 0 or float(iou_bev(turned.box[None], around).sum()) == 0):
            result[k] = turned
    return result
