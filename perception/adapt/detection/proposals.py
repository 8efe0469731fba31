"""What a frozen detector proposes on a domain, collected once and kept in a file: the inputs of a proposal classifier.

    frames, or smashed scenes ── detector ── score, NMS over all classes, the best few of a frame ── ``DetectorProposals`` ── one file

A proposal keeps its box and score for good; adaptation changes what it is called. Everything is in the detector's frame (x, y, z as
the detector saw them, with whatever z shift the dataset was prepared with). Point counts need the scan, so proposals of smashed
scenes have none; nothing else differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require
from ....core.features import CutFeatures
from ....core.smashed_scene import SmashedScene
from ....core.structures import Boxes3D, PointCloud, Predictions, TensorValue, shape_of
from ....core.tensor_file import CorruptFile, TensorFileKind, content_digest, read_tensors, write_tensors
from ....datasets.frame_source import FrameSource
from ....datasets.prepared import PreparedDataset
from ....ops.nms import nms_rotated
from ....ops.points_in_boxes import points_in_boxes_mask
from ...models.decoders.regions import ScoredProposals
from ...models.detector import Detector
from ...server.store import collate_scenes

_KIND = TensorFileKind(
    name="file of proposals", format="upcycle3d proposals 1", advice="collect the proposals again", always_hashed=True
)
_FEATURE_LIMIT = 65504.0  # the largest float16


@dataclass(frozen=True, kw_only=True)
class ProposalSelection:
    """Which proposals of a frame are kept: scores of at least ``score``, rotated NMS at ``iou`` over all classes, the best ``most``.

    prefer: of overlapping ones, that with the larger class probability or the larger score. A small detector's score says how well a
    box fits whatever is there; its class probability says better whether that is a pedestrian or a cyclist.
    """

    score: float = 0.05
    iou: float = 0.1
    most: int = 40
    prefer: Literal["class", "score"] = "class"

    def __post_init__(self) -> None:
        require(
            0 <= self.score < 1 and 0 <= self.iou <= 1 and self.most >= 1,
            f"proposals are selected by 0 <= score < 1, 0 <= iou <= 1 and most >= 1, found {self}",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class DetectorProposals(TensorValue):
    """N proposals of a detector on the frames ``frame_ids``.

    features: (N, D) float32, the second stage's. logits: (N,) of the anchor head for the proposal's class. boxes: (N, 7) m, rad.
    classes: (N,) int64 in ``class_names``. scores: (N,) 0..1, the rank. frame: (N,) int64 into ``frame_ids``, ascending.
    points: (N,) int64 LiDAR points in the box, None where only smashed scenes are at hand.
    detector: SHA-256 of the detector's weights. data: what the frames were, in words, with their fingerprint.
    """

    features: Tensor
    logits: Tensor
    boxes: Tensor
    classes: Tensor
    scores: Tensor
    frame: Tensor
    points: Tensor | None
    frame_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    detector: str
    data: str
    selection: ProposalSelection

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
        """(N,) m, distance of the centre from the sensor, seen from above."""
        return self.boxes[:, :2].norm(dim=1)

    def of_frame(self, index: int) -> Predictions:
        """The proposals of one frame as detections, with the detector's own classes."""
        rows = self.frame == index
        scores = self.scores[rows]
        return Predictions(
            boxes=Boxes3D(data=self.boxes[rows]),
            classes=self.classes[rows],
            scores=scores,
            class_scores=torch.sigmoid(self.logits[rows]),
            iou_scores=scores,
        )


def detector_digest(detector: Detector) -> str:
    """SHA-256 of the detector's weights and buffers, on whatever device they are."""
    return content_digest({name: t.detach().cpu().contiguous() for name, t in detector.state_dict().items()})


class SceneSource(Protocol):
    """Smashed scenes by position, as ``server.store.SmashedStore`` has them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> SmashedScene: ...


def collect_from_frames(
    detector: Detector,
    frames: FrameSource,
    selection: ProposalSelection,
    *,
    data: str,
    batch_size: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> DetectorProposals:
    """Proposals on scans, with point counts. Labels are not looked at. Puts the detector into evaluation mode."""

    def read(rows: range) -> _Batch:
        batch = [frames[i] for i in rows]
        return detector.encode([f.points for f in batch]), [f.id for f in batch], [f.points for f in batch]

    return _collect(detector, len(frames), read, selection, data, batch_size, on_progress)


def collect_from_store(
    detector: Detector,
    store: SceneSource,
    selection: ProposalSelection,
    *,
    data: str,
    batch_size: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> DetectorProposals:
    """Proposals on a fleet's smashed scenes, without point counts; the detector's encoder must have made them."""
    device = next(detector.parameters()).device

    def read(rows: range) -> _Batch:
        scenes = [store[i] for i in rows]
        return collate_scenes(scenes).to(device), [s.scene_id for s in scenes], [None] * len(scenes)

    return _collect(detector, len(store), read, selection, data, batch_size, on_progress)


_Batch = tuple[CutFeatures, list[str], Sequence[PointCloud | None]]


@torch.no_grad()
def _collect(
    detector: Detector,
    length: int,
    read: Callable[[range], _Batch],
    selection: ProposalSelection,
    data: str,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> DetectorProposals:
    detector.eval()
    parts: list[tuple[ScoredProposals, Tensor | None]] = []
    ids: list[str] = []
    for start in range(0, length, batch_size):
        split, names, clouds = read(range(start, min(start + batch_size, length)))
        for regions, cloud in zip(detector.proposals(split), clouds, strict=True):
            kept = _select(regions, selection)
            boxes = kept.detections.boxes.data.cpu()
            parts.append((kept, None if cloud is None else points_in_boxes_mask(cloud.xyz, boxes).sum(1)))
        ids += names
        if on_progress is not None:
            on_progress(len(ids), length)
    return _joined(detector, parts, ids, data, selection)


def _select(regions: ScoredProposals, selection: ProposalSelection) -> ScoredProposals:
    found = regions.detections
    rows = (found.scores >= selection.score).nonzero()[:, 0]
    rank = found.class_scores if selection.prefer == "class" else found.scores
    rows = rows[nms_rotated(found.boxes.data[rows], rank[rows], selection.iou)]
    rows = rows[found.scores[rows].sort(descending=True, stable=True).indices[: selection.most]]
    return ScoredProposals(detections=found.select(rows), logits=regions.logits[rows], features=regions.features[rows])


def _joined(
    detector: Detector,
    parts: Sequence[tuple[ScoredProposals, Tensor | None]],
    ids: Sequence[str],
    data: str,
    selection: ProposalSelection,
) -> DetectorProposals:
    if not parts:
        raise InvalidInput(f"{data} holds no frame to collect proposals from")
    counts = [points for _, points in parts if points is not None]
    return DetectorProposals(
        features=torch.cat([p.features for p, _ in parts]).float().cpu(),
        logits=torch.cat([p.logits for p, _ in parts]).float().cpu(),
        boxes=torch.cat([p.detections.boxes.data for p, _ in parts]).cpu(),
        classes=torch.cat([p.detections.classes for p, _ in parts]).cpu(),
        scores=torch.cat([p.detections.scores for p, _ in parts]).cpu(),
        frame=torch.cat([torch.full((len(p.features),), i) for i, (p, _) in enumerate(parts)]),
        points=torch.cat(counts).to(torch.int64) if counts else None,
        frame_ids=tuple(ids),
        class_names=detector.class_names,
        detector=detector_digest(detector),
        data=data,
        selection=selection,
    )


# ---- one file: safetensors, features in float16, everything else as it is


def _plain_fields(proposals: DetectorProposals) -> dict[str, Any]:
    names = ("frame_ids", "class_names", "detector", "data")
    return {name: getattr(proposals, name) for name in names} | {"selection": asdict(proposals.selection)}


def as_stored(proposals: DetectorProposals) -> DetectorProposals:
    """``proposals`` as they come back from a file: features rounded to float16, clipped to its range."""
    rounded = proposals.features.clamp(-_FEATURE_LIMIT, _FEATURE_LIMIT).half().float()
    return replace(proposals, features=rounded)


def save_proposals(path: Path, proposals: DetectorProposals) -> None:
    """Write one file, atomically. Features are rounded to float16 (``as_stored``)."""
    tensors = {f.name: t for f in fields(proposals) if isinstance(t := getattr(proposals, f.name), Tensor)}
    tensors |= {"features": as_stored(proposals).features.half()}
    write_tensors(path, tensors, {"proposals": json.dumps(_plain_fields(proposals))}, _KIND)


def load_proposals(path: Path) -> DetectorProposals:
    """Read and check a file of ``save_proposals``. Sizes are checked against the file before anything is allocated.

    Raises InvalidInput naming the file: another kind of file, damaged, larger than 16 GiB, or breaking the contract of its type.
    """
    file = read_tensors(path, _KIND)
    tensors, plain = file.tensors, file.described("proposals")
    try:
        return DetectorProposals(
            features=tensors["features"].float(),
            **{name: tensors[name] for name in ("logits", "boxes", "classes", "scores", "frame")},
            points=tensors.get("points"),
            frame_ids=tuple(plain["frame_ids"]),
            class_names=tuple(plain["class_names"]),
            detector=plain["detector"],
            data=plain["data"],
            selection=ProposalSelection(**plain["selection"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is damaged: {error}; {_KIND.advice}") from error


def cached_proposals(
    path: Path,
    detector: Detector,
    selection: ProposalSelection,
    *,
    data: str,
    collect: Callable[[], DetectorProposals],
) -> DetectorProposals:
    """The proposals in ``path`` if this detector made them on ``data`` by this selection, else new ones, written there.

    Raises InvalidInput if the file holds others: a cache is never overwritten by another question's answer.
    """
    if not path.exists():
        save_proposals(path, collect())
        return load_proposals(path)
    found, digest = load_proposals(path), detector_digest(detector)
    for what, stored, wanted in (
        ("detector", found.detector, digest),
        ("data", found.data, data),
        ("selection", found.selection, selection),
    ):
        if stored != wanted:
            raise InvalidInput(f"{path} holds proposals of another {what} ({stored}, wanted {wanted}); choose another folder")
    return found


def cached_on_frames(
    path: Path,
    detector: Detector,
    frames: PreparedDataset,
    selection: ProposalSelection,
    *,
    split: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> DetectorProposals:
    """``cached_proposals`` on a split of a prepared dataset, known by its name and fingerprint."""
    data = f"{split}: {len(frames)} frames {frames.split_fingerprint()[:16]}"
    return cached_proposals(
        path,
        detector,
        selection,
        data=data,
        collect=lambda: collect_from_frames(detector, frames, selection, data=data, on_progress=on_progress),
    )
