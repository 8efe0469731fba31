"""What a frozen detector proposes on a domain: the inputs of the proposal classifier.

    frames, or smashed scenes ── detector ── minimum score, NMS over all classes, the best few per frame ── `DetectorProposals`

A proposal keeps its box and score; adaptation changes its class only. Everything is in the detector's frame: x, y, z in meters as the
detector saw them, including the z shift that the dataset was prepared with. Point counts need the scan, so proposals of smashed
scenes have none; nothing else differs.

Read next: `proposal_collection.py`, which makes this value, and `proposal_matching.py`, which compares it with labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ....core.errors import require
from ....core.structures import Boxes3D, Predictions
from ....core.tensor_value import TensorValue, shape_of


@dataclass(frozen=True, kw_only=True)
class ProposalSelection:
    """Which proposals of a frame are kept.

    Suppression prefers the larger class probability by default. The score of a small detector says how well a box fits whatever is
    there; its class probability says better whether this is a pedestrian or a cyclist.
    """

    score: float = 0.05
    """Minimum score, 0 to 1. Lower it to keep more objects that the detector is unsure of."""

    iou: float = 0.1
    """Rotated NMS over all classes removes proposals with a larger BEV IoU than this."""

    most: int = 40
    """Most proposals per frame, the best by score."""

    prefer: Literal["class", "score"] = "class"
    """Which of two overlapping proposals stays: the one with the larger class probability, or with the larger score."""

    def __post_init__(self) -> None:
        require(
            0 <= self.score < 1 and 0 <= self.iou <= 1 and self.most >= 1,
            "proposals are selected by 0 <= score < 1, 0 <= iou <= 1 and most >= 1, found "
            f"{self.score:g}, {self.iou:g} and {self.most}",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class DetectorProposals(TensorValue):
    """N proposals of a detector, ordered by frame.

    Raises:
        InvalidInput: A tensor has a wrong shape, a value is not finite, or a class or frame number does not exist.
    """

    features: Tensor
    """(N, D) float32, the shared feature of the detector's second stage."""

    logits: Tensor
    """(N,) logit of the anchor head for the proposal's class."""

    boxes: Tensor
    """(N, 7) x, y, z of the center, length, width, height in m, yaw in rad."""

    classes: Tensor
    """(N,) int64, the detector's class, an index into `class_names`."""

    scores: Tensor
    """(N,) the detector's score, 0 to 1."""

    frame: Tensor
    """(N,) int64 index into `frame_ids`, ascending."""

    points: Tensor | None
    """(N,) int64 number of LiDAR points in the box, or None where only smashed scenes are at hand."""

    frame_ids: tuple[str, ...]
    """Ids of all frames that were looked at, also of those without a proposal."""

    class_names: tuple[str, ...]
    """The detector's classes in order."""

    detector: str
    """SHA-256 of the detector's weights (`detector_digest`)."""

    data: str
    """What the frames are, in words, with their fingerprint."""

    selection: ProposalSelection
    """Which proposals were kept."""

    def __post_init__(self) -> None:
        n = len(self.features)
        wanted = {"logits": (n,), "boxes": (n, 7), "classes": (n,), "scores": (n,), "frame": (n,)}
        wanted |= {"points": (n,)} if self.points is not None else {}
        require(self.features.ndim == 2, f"proposal features must be (N, D), found {shape_of(self.features)}")
        for name, shape in wanted.items():
            found = getattr(self, name)
            require(found.shape == shape, f"proposals: {name} must be {shape} like the features, found {shape_of(found)}")
        for name in ("features", "logits", "boxes", "scores"):
            bad = (~torch.isfinite(getattr(self, name).view(n, -1)).all(1)).nonzero()[:, 0] if n else torch.zeros(0)
            require(
                len(bad) == 0, f"proposals: {name} of {len(bad)} rows are not finite, first row {int(bad[0]) if len(bad) else 0}"
            )
        for name, limit in (("classes", len(self.class_names)), ("frame", len(self.frame_ids))):
            values = getattr(self, name)
            require(
                not n or (int(values.min()) >= 0 and int(values.max()) < limit), f"proposals: {name} must count 0..{limit - 1}"
            )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def ranges(self) -> Tensor:
        """(N,) distance in m of each center from the sensor in BEV."""
        return self.boxes[:, :2].norm(dim=1)

    def of_frame(self, index: int) -> Predictions:
        """Give the proposals of one frame as detections, with the detector's own classes.

        Args:
            index: Position of the frame in `frame_ids`.

        Returns:
            The detections, in the order of the proposals.
        """
        rows = self.frame == index
        scores = self.scores[rows]
        return Predictions(
            boxes=Boxes3D(data=self.boxes[rows]),
            classes=self.classes[rows],
            scores=scores,
            class_scores=torch.sigmoid(self.logits[rows]),
            iou_scores=scores,
        )
