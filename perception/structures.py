"""The values that flow through the toolkit.

Every function of this project takes and returns these values or plain tensors; there is no dictionary of everything.
All of them are frozen, hold torch tensors, are checked where they are made, and move with ``to(device)``.

Frame of every coordinate: x forward, y left, z up, metres. Sparse coordinates are (batch, z, y, x). Classes count from 0.

    raw scan ── PointCloud ── encoder ── SplitFeatures ─┬─ decoder ── Predictions
                                                        └─ SmashedScene: the same at rest, on disk and on the wire
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


class UpcycleError(Exception):
    """An error whose message says what was tried, what was found and what to do. Commands print it without a traceback."""


class InvalidInput(UpcycleError, ValueError):
    """A value from outside (a file, an argument) breaks the contract of its type."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidInput(message)


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


class _Value:
    """Shared by the values below: moving between devices, and a ``repr`` of shapes instead of numbers."""

    def to(self, device: torch.device | str) -> Self:
        """The same value with every tensor on ``device``."""
        moved: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor | _Value):
                moved[f.name] = value.to(device)
        return replace(self, **moved)  # type: ignore[type-var]

    def __repr__(self) -> str:
        parts = []
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            parts.append(f"{f.name}={_shape(value) if isinstance(value, Tensor) else repr(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class PointCloud(_Value):
    """One LiDAR scan.

    xyz: (N, 3) float32, metres, sensor frame (or shifted by the rig's known height).
    features: (N, C) float32; what the columns are stands in ``feature_names``; "intensity" is in 0..1.
    """

    xyz: Tensor
    features: Tensor
    feature_names: tuple[str, ...] = ("intensity",)

    def __post_init__(self) -> None:
        _require(self.xyz.ndim == 2 and self.xyz.shape[1] == 3, f"PointCloud.xyz must be (N, 3), found {_shape(self.xyz)}")
        _require(
            self.features.shape == (self.xyz.shape[0], len(self.feature_names)),
            f"PointCloud.features must be ({self.xyz.shape[0]}, {len(self.feature_names)}) for the names "
            f"{self.feature_names}, found {_shape(self.features)}",
        )

    def __len__(self) -> int:
        return self.xyz.shape[0]

    def select(self, mask_or_index: Tensor) -> PointCloud:
        """The points of a boolean mask or an index, in that order."""
        return replace(self, xyz=self.xyz[mask_or_index], features=self.features[mask_or_index])

    @staticmethod
    def concatenate(clouds: Sequence[PointCloud]) -> PointCloud:
        """All points of ``clouds`` one after the other; the feature names must agree."""
        _require(len(clouds) > 0, "PointCloud.concatenate needs at least one cloud")
        names = {c.feature_names for c in clouds}
        _require(len(names) == 1, f"cannot concatenate point clouds with different features: {sorted(names)}")
        return replace(clouds[0], xyz=torch.cat([c.xyz for c in clouds]), features=torch.cat([c.features for c in clouds]))


@dataclass(frozen=True, kw_only=True, repr=False)
class Boxes3D(_Value):
    """Oriented boxes, (N, 7) float32: x, y, z of the centre, dx (length), dy (width), dz (height), yaw.

    Metres and radians; yaw is 0 along +x, counter-clockwise seen from above, kept in [-pi, pi). Drawn in ``boxes.py``.
    """

    data: Tensor

    def __post_init__(self) -> None:
        _require(self.data.ndim == 2 and self.data.shape[1] == 7, f"Boxes3D.data must be (N, 7), found {_shape(self.data)}")

    def __len__(self) -> int:
        return self.data.shape[0]

    @staticmethod
    def empty() -> Boxes3D:
        return Boxes3D(data=torch.zeros(0, 7))


_LABEL_COLUMNS = ("classes", "num_points", "difficulty", "weight", "exact", "box_weight")


@dataclass(frozen=True, kw_only=True, repr=False)
class Labels(_Value):
    """What is known about the objects of one scene, from people, from a teacher or from pasting.

    boxes: (N, 7). classes: (N,) int64 from 0. num_points: (N,) int64, LiDAR points inside, -1 unknown.
    difficulty: (N,) int64, KITTI's 0 easy, 1 moderate, 2 hard, -1 none of them.
    weight: (N,) float32, 1 = learn from it, 0 = ignore: neither object nor background.
    exact: (N,) bool, the box is right to the centimetre (labelled or pasted), so heads that judge quality may learn from it.
    box_weight: (N,) float32, how much box regression learns from it; a teacher may know that a car is there but not its sides.
    complete: what is not labelled is background. False for pseudo labels: a teacher misses objects.
    """

    boxes: Boxes3D
    classes: Tensor
    num_points: Tensor
    difficulty: Tensor
    weight: Tensor
    exact: Tensor
    box_weight: Tensor
    complete: bool = True

    def __post_init__(self) -> None:
        n = len(self.boxes)
        for name in _LABEL_COLUMNS:
            tensor = getattr(self, name)
            _require(tensor.shape == (n,), f"Labels.{name} must be ({n},) like the boxes, found {_shape(tensor)}")

    def __len__(self) -> int:
        return len(self.boxes)

    @staticmethod
    def make(
        boxes: Tensor,
        classes: Tensor,
        *,
        num_points: Tensor | None = None,
        difficulty: Tensor | None = None,
        weight: Tensor | None = None,
        exact: Tensor | bool = True,
        box_weight: Tensor | None = None,
        complete: bool = True,
    ) -> Labels:
        """Labels with the usual defaults: unknown point counts and difficulty, weights 1, exact."""
        n = boxes.shape[0]
        unknown = torch.full((n,), -1, dtype=torch.int64, device=boxes.device)
        return Labels(
            boxes=Boxes3D(data=boxes),
            classes=classes.to(torch.int64),
            num_points=unknown if num_points is None else num_points,
            difficulty=unknown if difficulty is None else difficulty,
            weight=torch.ones(n, device=boxes.device) if weight is None else weight,
            exact=torch.full((n,), exact, device=boxes.device) if isinstance(exact, bool) else exact,
            box_weight=torch.ones(n, device=boxes.device) if box_weight is None else box_weight,
            complete=complete,
        )

    @staticmethod
    def empty(*, complete: bool = True) -> Labels:
        return Labels.make(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), complete=complete)

    def select(self, mask_or_index: Tensor) -> Labels:
        """The labels of a boolean mask or an index, in that order."""
        return replace(
            self,
            boxes=Boxes3D(data=self.boxes.data[mask_or_index]),
            **{n: getattr(self, n)[mask_or_index] for n in _LABEL_COLUMNS},
        )

    @staticmethod
    def concatenate(parts: Sequence[Labels]) -> Labels:
        """All labels of ``parts``; the result is complete only if every part is."""
        _require(len(parts) > 0, "Labels.concatenate needs at least one part")
        return Labels(
            boxes=Boxes3D(data=torch.cat([p.boxes.data for p in parts])),
            complete=all(p.complete for p in parts),
            **{n: torch.cat([getattr(p, n) for p in parts]) for n in _LABEL_COLUMNS},
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Calibration(_Value):
    """From the LiDAR frame to a camera picture (KITTI's rectified left colour camera).

    lidar_to_camera: (4, 4) float64, camera frame x right, y down, z forward, metres.
    projection: (3, 4) float64, camera frame to pixels.
    image_size: (width, height) pixels.
    """

    lidar_to_camera: Tensor
    projection: Tensor
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        _require(
            self.lidar_to_camera.shape == (4, 4),
            f"Calibration.lidar_to_camera must be (4, 4), found {_shape(self.lidar_to_camera)}",
        )
        _require(self.projection.shape == (3, 4), f"Calibration.projection must be (3, 4), found {_shape(self.projection)}")


@dataclass(frozen=True, kw_only=True, repr=False)
class Frame(_Value):
    """One scan with what is known about it. ``labels`` is None where nobody labelled (not the same as no object)."""

    id: str
    points: PointCloud
    labels: Labels | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True, kw_only=True)
class VoxelGrid:
    """A box of space cut into voxels.

    range: (x0, y0, z0, x1, y1, z1) m. voxel_size: (x, y, z) m. ``shape`` is (z, y, x) in voxels.
    """

    range: tuple[float, float, float, float, float, float]
    voxel_size: tuple[float, float, float]

    def __post_init__(self) -> None:
        _require(all(v > 0 for v in self.voxel_size), f"VoxelGrid.voxel_size must be positive, found {self.voxel_size}")
        for axis in range(3):
            extent = (self.range[axis + 3] - self.range[axis]) / self.voxel_size[axis]
            _require(
                extent > 0.5 and abs(extent - round(extent)) < 1e-3,
                f"VoxelGrid range {self.range} is not a positive whole number of voxels of {self.voxel_size} along {'xyz'[axis]} "
                f"({extent:.3f}); change the range or the voxel size",
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x) number of voxels."""
        sizes = [round((self.range[a + 3] - self.range[a]) / self.voxel_size[a]) for a in (2, 1, 0)]
        return (sizes[0], sizes[1], sizes[2])


@dataclass(frozen=True, kw_only=True, repr=False)
class SparseVoxels(_Value):
    """A sparse 3D tensor of a batch.

    features: (M, C) float. coords: (M, 4) int32 batch, z, y, x. shape: (z, y, x). batch_size is explicit, because the last
    scene may be empty.
    """

    features: Tensor
    coords: Tensor
    shape: tuple[int, int, int]
    batch_size: int

    def __post_init__(self) -> None:
        m = self.features.shape[0]
        _require(self.features.ndim == 2, f"SparseVoxels.features must be (M, C), found {_shape(self.features)}")
        _require(
            self.coords.shape == (m, 4) and self.coords.dtype == torch.int32,
            f"SparseVoxels.coords must be ({m}, 4) int32 (batch, z, y, x), found {_shape(self.coords)}",
        )

    def check_range(self) -> SparseVoxels:
        """Itself, after checking that every coordinate lies in the grid. Called once where coordinates come from outside."""
        if len(self.coords):
            low, high = self.coords.amin(0).tolist(), self.coords.amax(0).tolist()
            limit = (self.batch_size, *self.shape)
            _require(
                min(low) >= 0 and all(h < s for h, s in zip(high, limit, strict=True)),
                f"voxel coordinates out of range: expected (batch, z, y, x) in 0..{limit}, found {low} to {high}; is the order z y x?",
            )
        return self

    def scene(self, index: int) -> SparseVoxels:
        """Scene ``index`` alone, as a batch of one."""
        mask = self.coords[:, 0] == index
        coords = self.coords[mask].clone()
        coords[:, 0] = 0
        return replace(self, features=self.features[mask], coords=coords, batch_size=1)

    def dense(self) -> Tensor:
        """(B, C, Z, Y, X): zeros where no voxel is. Differentiable; duplicates are not allowed."""
        z, y, x = self.shape
        c = self.coords.long()
        index = ((c[:, 0] * z + c[:, 1]) * y + c[:, 2]) * x + c[:, 3]
        flat = self.features.new_zeros(self.batch_size * z * y * x, self.features.shape[1])
        flat = flat.index_put((index,), self.features)
        return flat.view(self.batch_size, z, y, x, -1).permute(0, 4, 1, 2, 3).contiguous()


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """Where a network is cut: the layer whose output leaves the vehicle.

    stride is (z, y, x) input voxels per cell of the cut; shape is the sparse grid (z, y, x) at the cut.
    """

    layer: str
    channels: int
    stride: tuple[int, int, int]
    shape: tuple[int, int, int]
    grid: VoxelGrid

    def cell_size(self) -> tuple[float, float]:
        """(x, y) metres of one bird's-eye-view cell."""
        return (self.grid.voxel_size[0] * self.stride[2], self.grid.voxel_size[1] * self.stride[1])


@dataclass(frozen=True, kw_only=True, repr=False)
class SplitFeatures(_Value):
    """Live, batched, differentiable features at the cut: what ``encode`` returns and ``decode`` takes."""

    voxels: SparseVoxels
    spec: SplitSpec

    def __post_init__(self) -> None:
        found = (self.voxels.features.shape[1], self.voxels.shape)
        _require(
            found == (self.spec.channels, self.spec.shape),
            f"features do not fit the cut {self.spec.layer!r}: expected (channels, shape) {(self.spec.channels, self.spec.shape)}, found {found}",
        )

    @property
    def batch_size(self) -> int:
        return self.voxels.batch_size

    def scene(self, index: int) -> SplitFeatures:
        return replace(self, voxels=self.voxels.scene(index))

    @staticmethod
    def collate(scenes: Sequence[SplitFeatures]) -> SplitFeatures:
        """One batch of several batches, scenes in order."""
        _require(len(scenes) > 0, "SplitFeatures.collate needs at least one scene")
        specs = {s.spec for s in scenes}
        _require(len(specs) == 1, f"cannot batch features of different cuts: {specs}")
        coords, start = [], 0
        for s in scenes:
            shifted = s.voxels.coords.clone()
            shifted[:, 0] += start
            coords.append(shifted)
            start += s.batch_size
        voxels = replace(
            scenes[0].voxels,
            features=torch.cat([s.voxels.features for s in scenes]),
            coords=torch.cat(coords),
            batch_size=start,
        )
        return SplitFeatures(voxels=voxels, spec=scenes[0].spec)


SMASHED_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, repr=False)
class SmashedScene(_Value):
    """One scene's features at rest: what a vehicle hands over.

    There is no field for a raw point, a time, a pose or a vehicle, on purpose. ``scene_id`` is random.
    coords: (M, 3) int32 z, y, x, ascending and unique. features: (M, C) float32, after the codec's round trip if it was read.
    codec: how features are stored ("fp16", "int8"). encoder_fingerprint: SHA-256 of the encoder that made it.
    """

    spec: SplitSpec
    coords: Tensor
    features: Tensor
    codec: str
    encoder_fingerprint: str
    scene_id: str
    schema_version: int = SMASHED_SCHEMA_VERSION

    def __post_init__(self) -> None:
        m = self.features.shape[0]
        _require(
            self.features.shape == (m, self.spec.channels) and self.features.is_floating_point(),
            f"SmashedScene.features must be (M, {self.spec.channels}) float, found {_shape(self.features)}",
        )
        _require(
            self.coords.shape == (m, 3) and self.coords.dtype == torch.int32,
            f"SmashedScene.coords must be ({m}, 3) int32 (z, y, x) cells of the cut, found {_shape(self.coords)}; raw points cannot be stored",
        )
        if m:
            z, y, x = self.spec.shape
            _require(
                bool((self.coords >= 0).all() and (self.coords < torch.tensor([z, y, x], dtype=torch.int32)).all()),
                f"SmashedScene.coords leave the grid {self.spec.shape}: found {self.coords.amin(0).tolist()} to {self.coords.amax(0).tolist()}",
            )
            c = self.coords.long()
            index = (c[:, 0] * y + c[:, 1]) * x + c[:, 2]
            _require(bool((index[1:] > index[:-1]).all()), "SmashedScene.coords must be unique and ascending in (z, y, x)")
            _require(
                bool(torch.isfinite(self.features).all()),
                "SmashedScene.features hold NaN or inf; the encoder or its input is broken",
            )


@dataclass(frozen=True, kw_only=True, repr=False)
class Predictions(_Value):
    """Detections of one scene, best first.

    boxes: (N, 7). classes: (N,) int64. scores: (N,) in 0..1, what they are ranked by.
    class_scores: (N,) in 0..1, the classifier's own. iou_scores: (N,) in 0..1, the predicted overlap with the truth.
    """

    boxes: Boxes3D
    classes: Tensor
    scores: Tensor
    class_scores: Tensor
    iou_scores: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, mask_or_index: Tensor) -> Predictions:
        return Predictions(
            boxes=Boxes3D(data=self.boxes.data[mask_or_index]),
            **{n: getattr(self, n)[mask_or_index] for n in ("classes", "scores", "class_scores", "iou_scores")},
        )

    @staticmethod
    def empty() -> Predictions:
        zero = torch.zeros(0)
        return Predictions(
            boxes=Boxes3D.empty(), classes=torch.zeros(0, dtype=torch.int64), scores=zero, class_scores=zero, iou_scores=zero
        )


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Named scalar losses of one step, already weighted; their sum is what is minimised."""

    terms: dict[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()

    def scaled(self, factor: float, prefix: str = "") -> LossTerms:
        """Every term times ``factor``, its name behind ``prefix``."""
        return LossTerms(terms={prefix + name: value * factor for name, value in self.terms.items()})

    def merged(self, other: LossTerms) -> LossTerms:
        """The terms of both; the names must not clash."""
        clash = self.terms.keys() & other.terms.keys()
        _require(not clash, f"two losses share a name: {sorted(clash)}")
        return LossTerms(terms={**self.terms, **other.terms})

    def first_non_finite(self) -> str | None:
        """The name of the first NaN or infinite term, or None."""
        for name, value in self.terms.items():
            if not np.isfinite(value.item()):
                return name
        return None

    def floats(self) -> dict[str, float]:
        return {name: value.item() for name, value in self.terms.items()}
