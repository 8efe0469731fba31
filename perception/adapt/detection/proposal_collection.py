"""Collecting a detector's proposals, from scans or from the smashed scenes of a fleet.

Read next: `proposal_cache.py`, which collects only what is not in a file yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ....core.errors import InvalidInput
from ....core.features import CutFeatures
from ....core.smashed_scene import SmashedScene
from ....core.structures import PointCloud
from ....core.tensor_file import content_digest
from ....datasets.frame_source import FrameSource
from ....ops.nms import nms_rotated
from ....ops.points_in_boxes import points_in_boxes_mask
from ...models.decoders.regions import ScoredProposals
from ...models.detector import Detector
from ...server.store import collate_scenes
from .proposals import DetectorProposals, ProposalSelection

OnProgress = Callable[[int, int], None]
"""Called with the number of frames that are done and the number of all frames."""


def detector_digest(detector: Detector) -> str:
    """Compute the SHA-256 of a detector's weights and buffers.

    Args:
        detector: The detector, on any device.

    Returns:
        64 hexadecimal digits.
    """
    return content_digest({name: t.detach().cpu().contiguous() for name, t in detector.state_dict().items()})


class SceneSource(Protocol):
    """Smashed scenes by position; `SmashedStore` and a list of scenes satisfy it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> SmashedScene: ...


def collect_from_frames(
    detector: Detector,
    frames: FrameSource,
    selection: ProposalSelection,
    *,
    data: str,
    batch_size: int = 2,
    on_progress: OnProgress | None = None,
) -> DetectorProposals:
    """Collect proposals on scans, with point counts. Labels are not looked at.

    Args:
        detector: It is put into evaluation mode.
        frames: The scans, in the detector's frame.
        selection: Which proposals are kept.
        data: What the frames are, in words.
        batch_size: Frames per batch.
        on_progress: Called after each batch.

    Returns:
        The proposals, on the CPU.

    Raises:
        InvalidInput: There is no frame.
    """

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
    on_progress: OnProgress | None = None,
) -> DetectorProposals:
    """Collect proposals on a fleet's smashed scenes, without point counts.

    Args:
        detector: It is put into evaluation mode. Its encoder must have made the scenes.
        store: The scenes.
        selection: Which proposals are kept.
        data: What the scenes are, in words.
        batch_size: Scenes per batch.
        on_progress: Called after each batch.

    Returns:
        The proposals, on the CPU; `points` is None.

    Raises:
        InvalidInput: There is no scene.
    """
    device = next(detector.parameters()).device

    def read(rows: range) -> _Batch:
        scenes = [store[i] for i in rows]
        return detector.encoder.restore(collate_scenes(scenes).to(device)), [s.scene_id for s in scenes], [None] * len(scenes)

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
    on_progress: OnProgress | None,
) -> DetectorProposals:
    detector.eval()
    parts: list[tuple[ScoredProposals, Tensor | None]] = []
    ids: list[str] = []
    for start in range(0, length, batch_size):
        features, names, clouds = read(range(start, min(start + batch_size, length)))
        for proposals, cloud in zip(detector.proposals(features), clouds, strict=True):
            kept = _select(proposals, selection)
            boxes = kept.detections.boxes.data.cpu()
            parts.append((kept, None if cloud is None else points_in_boxes_mask(cloud.xyz, boxes).sum(1)))
        ids += names
        if on_progress is not None:
            on_progress(len(ids), length)
    return _joined(detector, parts, ids, data, selection)


def _select(proposals: ScoredProposals, selection: ProposalSelection) -> ScoredProposals:
    found = proposals.detections
    rows = (found.scores >= selection.score).nonzero()[:, 0]
    rank = found.class_scores if selection.prefer == "class" else found.scores
    rows = rows[nms_rotated(found.boxes.data[rows], rank[rows], selection.iou)]
    rows = rows[found.scores[rows].sort(descending=True, stable=True).indices[: selection.most]]
    return ScoredProposals(detections=found.select(rows), logits=proposals.logits[rows], features=proposals.features[rows])


def _joined(
    detector: Detector,
    parts: Sequence[tuple[ScoredProposals, Tensor | None]],
    ids: Sequence[str],
    data: str,
    selection: ProposalSelection,
) -> DetectorProposals:
    if not parts:
        raise InvalidInput(f"{data} holds no frame to collect proposals from; give at least one")
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
