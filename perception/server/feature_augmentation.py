"""Augmentations of features at the cut: the baselines that UpCycling is compared with.

On raw points these are the standard tools of semi-supervised detection. On features they are not: sparse convolutions are not
equivariant to flips, rotations or scales, so a transformed map holds vectors that the encoder never makes. The labels move with the
cells.

Every augmentation is a function of one scene (a batch of one), its labels and a generator; to use your own, pass it as
`Method.augmentation`. Flips, rotations and scales keep the middle of the map where it is, so that the square stays filled. A cell lies
at the center of its receptive field, (i * stride + 1/2) voxels from the start of the range (see `CutSpec.position`). The middle of the
map is therefore not the middle of the range, and boxes that were flipped about the latter would be 7/8 of a cell away from their cells.

Read next: `unlabeled_half.py`, which applies them; `feature_gt.py` for pasting, which moves nothing.
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

SceneAugmentation = Callable[[CutFeatures, Labels, np.random.Generator], tuple[CutFeatures, Labels]]
"""Scene (a batch of one), its labels and a generator to the augmented scene and its labels."""

SceneMixing = Callable[[CutFeatures, Labels, CutFeatures, Labels, np.random.Generator], tuple[CutFeatures, Labels]]
"""Two scenes (batches of one), each followed by its labels, and a generator to one mixed scene and its labels."""


def _changed(scene: CutFeatures, features: Tensor, coords: Tensor, keypoints: Keypoints | None) -> CutFeatures:
    return replace(scene, voxels=replace(scene.voxels, features=features, coords=coords), keypoints=keypoints)


def _of_both(scene: CutFeatures, change: Callable[[Tensor], Tensor]) -> CutFeatures:
    """Apply a change to the features of the keypoints, where there are any, and then to those of the cells."""
    keypoints = None if scene.keypoints is None else replace(scene.keypoints, features=change(scene.keypoints.features))
    return _changed(scene, change(scene.voxels.features), scene.voxels.coords, keypoints)


def add_noise(scene: CutFeatures, labels: Labels, rng: np.random.Generator, *, sigma: float = 0.1) -> tuple[CutFeatures, Labels]:
    """Add Gaussian noise to the features of cells and keypoints.

    Args:
        scene: A batch of one.
        labels: Labels of the scene.
        rng: Draws the noise.
        sigma: Standard deviation of the noise, in standard deviations of each channel over the scene.

    Returns:
        The noisy scene and the same labels.
    """

    def noisy(f: Tensor) -> Tensor:
        if f.shape[0] < 2:
            return f
        noise = torch.from_numpy(rng.standard_normal(tuple(f.shape), dtype=np.float32)).to(f.device)
        return f + noise * (sigma * f.std(0))

    return _of_both(scene, noisy), labels


def drop_channels(
    scene: CutFeatures, labels: Labels, rng: np.random.Generator, *, share: float = 0.1
) -> tuple[CutFeatures, Labels]:
    """Set random channels to zero in the whole scene and scale the others up.

    Args:
        scene: A batch of one.
        labels: Labels of the scene.
        rng: Draws the channels; those of keypoints separately.
        share: Probability that a channel is dropped, 0..1.

    Returns:
        The changed scene and the same labels.
    """

    def dropped(f: Tensor) -> Tensor:
        keep = torch.from_numpy(rng.random(f.shape[1]) >= share).to(f)
        return f * keep / (1 - share)

    return _of_both(scene, dropped), labels


def drop_cells(scene: CutFeatures, labels: Labels, rng: np.random.Generator, *, share: float = 0.1) -> tuple[CutFeatures, Labels]:
    """Remove random cells and keypoints.

    Args:
        scene: A batch of one.
        labels: Labels of the scene.
        rng: Draws what is removed.
        share: Probability that a cell or keypoint is removed, 0..1.

    Returns:
        The thinned scene and the same labels.
    """

    def keep(f: Tensor) -> Tensor:
        return torch.from_numpy(rng.random(f.shape[0]) >= share).to(f.device)

    cells = keep(scene.voxels.features)
    keypoints = None if scene.keypoints is None else scene.keypoints.select(keep(scene.keypoints.features))
    return _changed(scene, scene.voxels.features[cells], scene.voxels.coords[cells], keypoints), labels


def _center(scene: CutFeatures) -> tuple[float, float]:
    _, height, width = scene.spec.shape
    return scene.spec.position((height - 1) / 2, (width - 1) / 2)


def _moved(labels: Labels, scene: CutFeatures, matrix: Tensor, yaw_sign: float, yaw_shift: float, scale: float = 1.0) -> Labels:
    """Move labels by a linear map of the plane about the map's center; drop those whose center leaves the range."""
    b = labels.boxes.data
    center = b.new_tensor(_center(scene))
    xy = (b[:, :2] - center) @ matrix.to(b).T + center
    yaw = wrap_angle(yaw_sign * b[:, 6:] + yaw_shift)
    moved = replace(labels, boxes=Boxes3D(data=torch.cat([xy, b[:, 2:3], b[:, 3:6] * scale, yaw], 1)))
    x0, y0, _, x1, y1, _ = scene.spec.grid.range
    return moved.select((xy[:, 0] >= x0) & (xy[:, 0] < x1) & (xy[:, 1] >= y0) & (xy[:, 1] < y1))


def _moved_keypoints(scene: CutFeatures, matrix: Tensor) -> Keypoints | None:
    """Move keypoints by a linear map of the plane about the map's center; drop those that leave the range."""
    if scene.keypoints is None:
        return None
    xyz = scene.keypoints.xyz
    center = xyz.new_tensor(_center(scene))
    xy = (xyz[:, :2] - center) @ matrix.to(xyz).T + center
    moved = replace(scene.keypoints, xyz=torch.cat([xy, xyz[:, 2:]], 1))
    x0, y0, _, x1, y1, _ = scene.spec.grid.range
    return moved.select((xy[:, 0] >= x0) & (xy[:, 0] < x1) & (xy[:, 1] >= y0) & (xy[:, 1] < y1))


def flip_y(scene: CutFeatures, labels: Labels, rng: np.random.Generator) -> tuple[CutFeatures, Labels]:
    """Flip left and right, half of the time.

    Args:
        scene: A batch of one.
        labels: Labels of the scene.
        rng: Decides whether to flip.

    Returns:
        The flipped scene and labels, or both as they are.
    """
    if rng.random() < 0.5:
        return scene, labels
    coords = scene.voxels.coords.clone()
    coords[:, 2] = scene.voxels.shape[1] - 1 - coords[:, 2]
    matrix = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    keypoints = _moved_keypoints(scene, matrix)
    return _changed(scene, scene.voxels.features, coords, keypoints), _moved(labels, scene, matrix, -1.0, 0.0)


def flip_x(scene: CutFeatures, labels: Labels, rng: np.random.Generator) -> tuple[CutFeatures, Labels]:
    """Flip front and back, half of the time.

    Args:
        scene: A batch of one.
        labels: Labels of the scene.
        rng: Decides whether to flip.

    Returns:
        The flipped scene and labels, or both as they are.
    """
    if rng.random() < 0.5:
        return scene, labels
    coords = scene.voxels.coords.clone()
    coords[:, 3] = scene.voxels.shape[2] - 1 - coords[:, 3]
    matrix = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    keypoints = _moved_keypoints(scene, matrix)
    return _changed(scene, scene.voxels.features, coords, keypoints), _moved(labels, scene, matrix, -1.0, math.pi)


def rotate_quarter(scene: CutFeatures, labels: Labels, rng: np.random.Generator) -> tuple[CutFeatures, Labels]:
    """Rotate by 0, 90, 180 or 270 degrees counter-clockwise, which is exact on a square map of square cells.

    Args:
        scene: A batch of one.
        labels: Labels of the scene.
        rng: Draws the angle.

    Returns:
        The rotated scene and labels.

    Raises:
        InvalidInput: The map or its cells are not square.
    """
    _, height, width = scene.voxels.shape
    cell = scene.spec.cell_size()
    if height != width or not math.isclose(cell[0], cell[1]):
        raise InvalidInput(
            f"quarter turns need a square map of square cells, found {height} x {width} cells of {cell} m; use rotate_free here"
        )
    turns = int(rng.integers(4))
    coords = scene.voxels.coords.clone()
    for _ in range(turns):  # (x, y) -> (-y, x)
        coords[:, 2], coords[:, 3] = coords[:, 3].clone(), height - 1 - coords[:, 2].clone()
    angle = turns * math.pi / 2
    keypoints = _moved_keypoints(scene, _rotation(angle))
    return _changed(scene, scene.voxels.features, coords, keypoints), _moved(labels, scene, _rotation(angle), 1.0, angle)


def _rotation(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]])


def _resample(scene: CutFeatures, matrix: Tensor) -> CutFeatures:
    """Move features by a linear map of the plane: bilinear in x and y, slice by slice in z. A cell exists where a channel is not 0."""
    dense = scene.voxels.dense()  # (1, C, Z, Y, X)
    _, c, z, y, x = dense.shape
    inverse = torch.linalg.inv(matrix).to(dense)
    cell_x, cell_y = scene.spec.cell_size()
    # Normalized map coordinates measure half extents; convert the metric map to them.
    half = dense.new_tensor([x * cell_x / 2, y * cell_y / 2])
    theta = F.pad((inverse * half[None, :]) / half[:, None], (0, 1))[None]
    flat = dense.reshape(1, c * z, y, x)
    grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat, grid, align_corners=False).view(c, z, y, x)
    cells = (moved != 0).any(0).nonzero()  # (M, 3) z y x, ascending
    features = moved[:, cells[:, 0], cells[:, 1], cells[:, 2]].T
    coords = F.pad(cells.int(), (1, 0))
    return _changed(scene, features, coords, _moved_keypoints(scene, matrix))


def rotate_free(
    scene: CutFeatures, labels: Labels, rng: np.random.Generator, *, limit: float = math.pi / 4
) -> tuple[CutFeatures, Labels]:
    """Rotate by a random angle, with bilinear interpolation.

    Args:
        scene: A batch of one.
        labels: Labels of the scene.
        rng: Draws the angle.
        limit: Largest angle in rad, either way.

    Returns:
        The rotated scene and labels; what leaves the map is dropped.
    """
    angle = float(rng.uniform(-limit, limit))
    return _resample(scene, _rotation(angle)), _moved(labels, scene, _rotation(angle), 1.0, angle)


def scale_map(scene: CutFeatures, labels: Labels, rng: np.random.Generator, *, limit: float = 0.05) -> tuple[CutFeatures, Labels]:
    """Scale the map by a random factor, with bilinear interpolation. Boxes scale in all three sizes.

    Args:
        scene: A batch of one.
        labels: Labels of the scene.
        rng: Draws the factor.
        limit: Largest change of the factor from 1, either way.

    Returns:
        The scaled scene and labels; what leaves the map is dropped.
    """
    factor = float(rng.uniform(1 - limit, 1 + limit))
    matrix = torch.eye(2) * factor
    return _resample(scene, matrix), _moved(labels, scene, matrix, 1.0, 0.0, scale=factor)


def cut_mix(
    a: CutFeatures, labels_a: Labels, b: CutFeatures, labels_b: Labels, rng: np.random.Generator
) -> tuple[CutFeatures, Labels]:
    """Put one side of scene `a` next to the other side of scene `b`, cut along x at a random row of cells.

    Args:
        a: A batch of one, which gives the cells of lower y.
        labels_a: Labels of scene `a`.
        b: A batch of one of the same cut, which gives the cells of higher y.
        labels_b: Labels of scene `b`.
        rng: Draws the row, from the middle half of the map; and which keypoints stay when both sides hold too many.

    Returns:
        The mixed scene with the labels whose centers lie on the side that was taken.
    """
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
