"""The one value that every viewer draws: a frame with its points, the cells that its features occupy, and boxes in layers.

    scan, labels, detections ──┐
    features at the cut ───────┼── DrawnFrame ──┬── html_page.py     one WebGL page
    teacher's labels, pasted ──┘                ├── rerun_file.py    a recording for Rerun
                                                ├── open3d_view.py   a window or a picture
                                                └── ply.py, gltf.py  files for other programs

`DrawnFrame` holds the values of `core/`. Its `points_to_draw`, `cells_to_draw` and `layers` are plain numpy arrays, and they are all
that a viewer reads. Everything is in the shifted frame: x forward, y left, z up, in meters. Read next: `colors.py`, then any viewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ...core.boxes import corners_3d
from ...core.cut import CutSpec
from ...core.errors import require
from ...core.features import CutFeatures
from ...core.foreign_text import shown
from ...core.structures import Labels, PointCloud, Predictions

LayerName = Literal["truth", "detections", "teacher", "pasted"]
"""What the boxes of a layer are: labels of people, detections, labels of a teacher, or objects that F-GT pasted."""

LAYER_TITLES: dict[LayerName, str] = {
    "truth": "truth",
    "detections": "detections",
    "teacher": "teacher labels",
    "pasted": "pasted objects",
}
"""The layers in the order in which viewers list them, and what a reader sees."""

BOX_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7), (8, 9))
"""Pairs of the corners that `outline` gives. The last edge points from the roof's middle to its front: there the object heads."""


@dataclass(frozen=True, kw_only=True)
class BoxLayer:
    """The boxes of one kind in one frame."""

    name: LayerName
    """What they are."""
    boxes: NDArray[np.float32]
    """(N, 7) x, y, z of the center, length, width, height in meters, yaw in radians."""
    classes: tuple[str, ...]
    """Name of the class of each box, without control characters."""
    scores: NDArray[np.float32]
    """(N,) score in 0..1 of each box; NaN where the layer has no scores."""
    ignored: NDArray[np.bool_]
    """(N,) whether the box has weight 0: nothing is learned from it, and nothing counts it."""
    left_out: int = 0
    """Boxes that cannot be drawn, because a number of theirs is NaN or infinite or a size is not above zero."""

    def __len__(self) -> int:
        return len(self.boxes)

    def outline(self) -> NDArray[np.float32]:
        """Give (N, 10, 3) points: the eight corners of `corners_3d`, then the two ends of the tick on the roof; for `BOX_EDGES`."""
        corners = corners_3d(torch.from_numpy(self.boxes)).numpy().reshape(-1, 8, 3)
        middle, front = corners[:, 4:8].mean(1, keepdims=True), corners[:, [4, 7]].mean(1, keepdims=True)
        return np.concatenate([corners, middle, front], 1).astype(np.float32)

    def captions(self) -> list[str]:
        """Say class and score of each box, such as `Car 0.87`."""
        return [
            f"{name}{'' if np.isnan(score) else f' {score:.2f}'}{' (ignored)' if ignored else ''}"
            for name, score, ignored in zip(self.classes, self.scores, self.ignored, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class DrawnPoints:
    """The points of a frame that can be drawn."""

    xyz: NDArray[np.float32]
    """(N, 3) meters."""
    intensity: NDArray[np.float32] | None
    """(N,) intensity, cut to 0..1; None where the scan has none."""
    left_out: int
    """Points with a NaN or infinite coordinate."""


@dataclass(frozen=True, kw_only=True)
class DrawnCells:
    """The cells of the cut that features occupy."""

    centers: NDArray[np.float32]
    """(M, 3) meters."""
    size: tuple[float, float, float]
    """Length, width and height of a cell in meters."""
    features: NDArray[np.float32]
    """(M, C) their features."""


@dataclass(frozen=True, kw_only=True)
class DrawnFrame:
    """One frame to draw. What is None is not known, and no viewer draws it."""

    id: str
    """Name of the frame."""
    class_names: tuple[str, ...]
    """One name per class number of all labels and detections."""
    points: PointCloud | None = None
    """The scan; None for a smashed scene, which holds no point."""
    features: CutFeatures | None = None
    """Features of this frame at the cut, a batch of one. Keypoints are not drawn."""
    truth: Labels | None = None
    """Labels of people."""
    detections: Predictions | None = None
    """Detections, those that shall be drawn."""
    teacher: Labels | None = None
    """What a teacher makes of its detections."""
    pasted: Labels | None = None
    """Objects that F-GT pasted into `features`."""

    def __post_init__(self) -> None:
        count = 1 if self.features is None else self.features.batch_size
        require(count == 1, f"a drawn frame shows one scene, found a batch of {count}; take features.scene(index)")
        for name, value in (
            ("truth", self.truth),
            ("teacher", self.teacher),
            ("pasted", self.pasted),
            ("detections", self.detections),
        ):
            highest = -1 if value is None or not len(value) else int(value.classes.max())
            require(
                highest < len(self.class_names),
                f"{name} of frame {shown(self.id)} holds the class number {highest}, and {len(self.class_names)} classes have names",
            )

    def points_to_draw(self) -> DrawnPoints | None:
        """Give the finite points, or None without a scan."""
        if self.points is None:
            return None
        xyz = self.points.xyz.detach().cpu().numpy()
        finite = np.isfinite(xyz).all(1)
        intensity = None
        if "intensity" in self.points.feature_names:
            column = self.points.features[:, self.points.feature_names.index("intensity")].detach().cpu().numpy()
            intensity = np.nan_to_num(np.clip(column[finite], 0, 1)).astype(np.float32)
        return DrawnPoints(xyz=xyz[finite].astype(np.float32), intensity=intensity, left_out=int((~finite).sum()))

    def cells_to_draw(self) -> DrawnCells | None:
        """Give the occupied cells, or None without features."""
        if self.features is None:
            return None
        spec, voxels = self.features.spec, self.features.voxels
        centers = _cell_centers(voxels.coords[:, 1:].detach().cpu().numpy(), spec)
        return DrawnCells(centers=centers, size=_cell_size(spec), features=voxels.features.detach().cpu().float().numpy())

    def layers(self) -> tuple[BoxLayer, ...]:
        """Give the layers of boxes that are known, in the order of `LAYER_TITLES`; a known layer may be empty."""
        values = {"truth": self.truth, "detections": self.detections, "teacher": self.teacher, "pasted": self.pasted}
        return tuple(_layer(name, value, self.class_names) for name in LAYER_TITLES if (value := values[name]) is not None)


def _layer(name: LayerName, value: Labels | Predictions, class_names: tuple[str, ...]) -> BoxLayer:
    boxes = value.boxes.data.detach().cpu().numpy().astype(np.float32)
    drawable = np.isfinite(boxes).all(1) & (boxes[:, 3:6] > 0).all(1)
    scores = np.full(len(boxes), np.nan, np.float32)
    ignored = np.zeros(len(boxes), bool)
    if isinstance(value, Predictions):
        scores = value.scores.detach().cpu().float().numpy()
    else:
        ignored = value.weight.detach().cpu().numpy() == 0
    numbers = value.classes.detach().cpu().numpy()[drawable]
    return BoxLayer(
        name=name,
        boxes=boxes[drawable],
        classes=tuple(shown(class_names[number]) if number >= 0 else "unknown" for number in numbers),
        scores=scores[drawable],
        ignored=ignored[drawable],
        left_out=int((~drawable).sum()),
    )


def _cell_size(spec: CutSpec) -> tuple[float, float, float]:
    """Cells divide the height of the grid evenly: the last convolutions along z have no padding, so a stride would not tell their place."""
    x, y = spec.cell_size()
    return x, y, (spec.grid.range[5] - spec.grid.range[2]) / spec.shape[0]


def _cell_centers(cells: NDArray[np.int32], spec: CutSpec) -> NDArray[np.float32]:
    """cells: (M, 3) z, y, x. Returns (M, 3) meters."""
    x, y = spec.position(torch.from_numpy(cells[:, 1]).double(), torch.from_numpy(cells[:, 2]).double())
    z = spec.grid.range[2] + (cells[:, 0] + 0.5) * _cell_size(spec)[2]
    return np.stack([x.numpy(), y.numpy(), z], 1).astype(np.float32)
