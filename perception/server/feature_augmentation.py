"""Augmentations of features at the cut: the baselines that UpCycling is compared with.

On raw points these are the bread and butter of semi-supervised detection. On features they are not: sparse convolutions are not
equivariant to flips, rotations or scales, so a transformed map holds vectors the encoder never makes (upcycling.md 3.3). The
labels move with the cells. Geometry turns about the middle of the map, so that the square stays filled. A cell lies at the centre of
its receptive field, (i * stride + 1/2) voxels from the start of the range (see ``CutSpec.position``), so the middle of the map
is not the middle of the range: turning the boxes about the latter would leave them 7/8 of a cell beside their cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.boxes import wrap_angle
from ...core.errors import InvalidInput
from ...core.features import CutFeatures, Keypoints, SparseVoxels
from ...core.structures import Boxes3D, Labels

# One scene (a batch of one) with its labels, and a generator -> the augmented scene with its labels.
SceneAugmentation = Callable[[CutFeatures, Labels, np.random.Generator], tuple[CutFeatures, Labels]]


def _changed(split: CutFeatures, features: Tensor, coords: Tensor, keypoints: Keypoints | None) -> CutFeatures:
    return replace(split, voxels=replace(split.voxels, features=features, coords=coords), keypoints=keypoints)


def _of_both(split: CutFeatures, change: Callable[[Tensor], Tensor]) -> CutFeatures:
    """``change`` applied to the features of the cells and, where there are any, of the keypoints."""
    keypoints = split.keypoints and replace(split.keypoints, features=change(split.keypoints.features))
    return _changed(split, change(split.voxels.features), split.voxels.coords, keypoints)


def add_noise(split: CutFeatures, labels: Labels, rng: np.random.Generator, *, sigma: float = 0.1) -> tuple[CutFeatures, Labels]:
    """Gaussian noise of ``sigma`` times each channel's standard deviation over the scene."""

    def noisy(f: Tensor) -> Tensor:
        if f.shape[0] < 2:
            return f
        noise = torch.from_numpy(rng.standard_normal(tuple(f.shape), dtype=np.float32)).to(f.device)
        return f + noise * (sigma * f.std(0))

    return _of_both(split, noisy), labels


def drop_channels(
    split: CutFeatures, labels: Labels, rng: np.random.Generator, *, share: float = 0.1
) -> tuple[CutFeatures, Labels]:
    """Set a random ``share`` of channels to zero and scale the others up, in the whole scene."""

    def dropped(f: Tensor) -> Tensor:
        keep = torch.from_numpy(rng.random(f.shape[1]) >= share).to(f)
        return f * keep / (1 - share)

    return _of_both(split, dropped), labels


def drop_cells(split: CutFeatures, labels: Labels, rng: np.random.Generator, *, share: float = 0.1) -> tuple[CutFeatures, Labels]:
    """Remove a random ``share`` of cells and of keypoints."""

    def keep(f: Tensor) -> Tensor:
        return torch.from_numpy(rng.random(f.shape[0]) >= share).to(f.device)

    cells = keep(split.voxels.features)
    keypoints = split.keypoints and split.keypoints.select(keep(split.keypoints.features))
    return _changed(split, split.voxels.features[cells], split.voxels.coords[cells], keypoints), labels


def _center(split: CutFeatures) -> tuple[float, float]:
    _, height, width = split.spec.shape
    return split.spec.position((height - 1) / 2, (width - 1) / 2)


def _moved(labels: Labels, split: CutFeatures, matrix: Tensor, yaw_sign: float, yaw_shift: float, scale: float = 1.0) -> Labels:
    """Labels under a linear map of the plane about the map's centre; those whose centre leaves the range are dropped."""
    b = labels.boxes.data
    center = b.new_tensor(_center(split))
    xy = (b[:, :2] - center) @ matrix.to(b).T + center
    yaw = wrap_angle(yaw_sign * b[:, 6:] + yaw_shift)
    moved = replace(labels, boxes=Boxes3D(data=torch.cat([xy, b[:, 2:3], b[:, 3:6] * scale, yaw], 1)))
    x0, y0, _, x1, y1, _ = split.spec.grid.range
    return moved.select((xy[:, 0] >= x0) & (xy[:, 0] < x1) & (xy[:, 1] >= y0) & (xy[:, 1] < y1))


def _moved_keypoints(split: CutFeatures, matrix: Tensor) -> Keypoints | None:
    """Keypoints under a linear map of the plane about the map's centre; those that leave the range are dropped."""
    if split.keypoints is None:
        return None
    xyz = split.keypoints.xyz
    center = xyz.new_tensor(_center(split))
    xy = (xyz[:, :2] - center) @ matrix.to(xyz).T + center
    moved = replace(split.keypoints, xyz=torch.cat([xy, xyz[:, 2:]], 1))
    x0, y0, _, x1, y1, _ = split.spec.grid.range
    return moved.select((xy[:, 0] >= x0) & (xy[:, 0] < x1) & (xy[:, 1] >= y0) & (xy[:, 1] < y1))


def flip_y(split: CutFeatures, labels: Labels, rng: np.random.Generator) -> tuple[CutFeatures, Labels]:
    """Left-right mirror image, half of the time."""
    if rng.random() < 0.5:
        return split, labels
    coords = split.voxels.coords.clone()
    coords[:, 2] = split.voxels.shape[1] - 1 - coords[:, 2]
    matrix = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    keypoints = _moved_keypoints(split, matrix)
    return _changed(split, split.voxels.features, coords, keypoints), _moved(labels, split, matrix, -1.0, 0.0)


def flip_x(split: CutFeatures, labels: Labels, rng: np.random.Generator) -> tuple[CutFeatures, Labels]:
    """Front-back mirror image, half of the time."""
    if rng.random() < 0.5:
        return split, labels
    coords = split.voxels.coords.clone()
    coords[:, 3] = split.voxels.shape[2] - 1 - coords[:, 3]
    matrix = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    keypoints = _moved_keypoints(split, matrix)
    return _changed(split, split.voxels.features, coords, keypoints), _moved(labels, split, matrix, -1.0, math.pi)


def rotate_quarter(split: CutFeatures, labels: Labels, rng: np.random.Generator) -> tuple[CutFeatures, Labels]:
    """A rotation by 0, 90, 180 or 270 degrees counter-clockwise: exact on a square grid of square cells."""
    _, height, width = split.voxels.shape
    cell = split.spec.cell_size()
    if height != width or not math.isclose(cell[0], cell[1]):
        raise InvalidInput(f"quarter turns need a square map of square cells, found {height} x {width} cells of {cell} m")
    turns = int(rng.integers(4))
    coords = split.voxels.coords.clone()
    for _ in range(turns):  # (x, y) -> (-y, x)
        coords[:, 2], coords[:, 3] = coords[:, 3].clone(), height - 1 - coords[:, 2].clone()
    angle = turns * math.pi / 2
    keypoints = _moved_keypoints(split, _rotation(angle))
    return _changed(split, split.voxels.features, coords, keypoints), _moved(labels, split, _rotation(angle), 1.0, angle)


def _rotation(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]])


def _resample(split: CutFeatures, matrix: Tensor) -> CutFeatures:
    """Features under a linear map of the plane: bilinear in x and y, slice by slice in z; a cell exists where any channel is not 0."""
    dense = split.voxels.dense()  # (1, C, Z, Y, X)
    _, c, z, y, x = dense.shape
    inverse = torch.linalg.inv(matrix).to(dense)
    cell_x, cell_y = split.spec.cell_size()
    # Normalised map coordinates measure half extents; convert the metric map to them.
    half = dense.new_tensor([x * cell_x / 2, y * cell_y / 2])
    theta = F.pad((inverse * half[None, :]) / half[:, None], (0, 1))[None]
    flat = dense.reshape(1, c * z, y, x)
    grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat, grid, align_corners=False).view(c, z, y, x)
    cells = (moved != 0).any(0).nonzero()  # (M, 3) z y x, ascending
    features = moved[:, cells[:, 0], cells[:, 1], cells[:, 2]].T
    coords = F.pad(cells.int(), (1, 0))
    return _changed(split, features, coords, _moved_keypoints(split, matrix))


def rotate_free(
    split: CutFeatures, labels: Labels, rng: np.random.Generator, *, limit: float = math.pi / 4
) -> tuple[CutFeatures, Labels]:
    """A rotation by an angle drawn from [-limit, limit] rad, bilinear."""
    angle = float(rng.uniform(-limit, limit))
    return _resample(split, _rotation(angle)), _moved(labels, split, _rotation(angle), 1.0, angle)


def scale_map(split: CutFeatures, labels: Labels, rng: np.random.Generator, *, limit: float = 0.05) -> tuple[CutFeatures, Labels]:
    """A scaling of the plane by a factor drawn from [1 - limit, 1 + limit], bilinear; heights of boxes scale too."""
    factor = float(rng.uniform(1 - limit, 1 + limit))
    matrix = torch.eye(2) * factor
    return _resample(split, matrix), _moved(labels, split, matrix, 1.0, 0.0, scale=factor)


def cut_mix(
    a: CutFeatures, labels_a: Labels, b: CutFeatures, labels_b: Labels, rng: np.random.Generator
) -> tuple[CutFeatures, Labels]:
    """One side of scene ``a`` beside the other side of scene ``b``, cut along x at a random row of cells."""
    _, height, _ = a.voxels.shape
    row = int(rng.integers(height // 4, height - height // 4))
    _, y = a.spec.position(row - 0.5, 0.0)
    left, right = a.voxels.coords[:, 2] < row, b.voxels.coords[:, 2] >= row
    mixed = SparseVoxels(
        features=torch.cat([a.voxels.features[left], b.voxels.features[right]]),
        coords=torch.cat([a.voxels.coords[left], b.voxels.coords[right]]),
        shape=a.voxels.shape,
        batch_size=1,
    )
    keypoints = None
    if a.keypoints is not None and b.keypoints is not None:
        sides = a.keypoints.select(a.keypoints.xyz[:, 1] < y), b.keypoints.select(b.keypoints.xyz[:, 1] >= y)
        xyz, features = torch.cat([k.xyz for k in sides]), torch.cat([k.features for k in sides])
        if a.spec.keypoints and len(xyz) > a.spec.keypoints.count:  # two crowded halves
            kept = torch.from_numpy(np.sort(rng.permutation(len(xyz))[: a.spec.keypoints.count])).to(xyz.device)
            xyz, features = xyz[kept], features[kept]
        keypoints = Keypoints(xyz=xyz, features=features, starts=(0, len(xyz)))
    parts = [labels_a.select(labels_a.boxes.data[:, 1] < y), labels_b.select(labels_b.boxes.data[:, 1] >= y)]
    return replace(a, voxels=mixed, keypoints=keypoints), Labels.concatenate(parts)
