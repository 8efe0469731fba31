"""The name of a labelled split by its content, so that knowledge of other labels cannot slip in unnoticed.

A run that learns from 1 % of the labels must not paste objects cut from the other 99 %. Whatever is derived from labels (the
ground-truth database above all) carries the fingerprint of the split it was made from and refuses to serve another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from ..core.errors import InvalidInput
from ..core.structures import Labels


def split_fingerprint(ids: Sequence[str], labels: Iterable[Labels | None], *, classes: Sequence[str]) -> str:
    """SHA-256 (hex) over the sorted (frame id, class name, box bytes) of a split; the order of frames and boxes is irrelevant.

    ids: frame ids; labels: one entry a frame, in the same order (read once, so a generator keeps memory flat). A frame without
    objects counts by its id, an unlabelled one (None) like an empty one. classes: names of the class numbers.
    Raises ``ValueError`` if the lengths differ, ``InvalidInput`` if a class number has no name.
    """
    return combine_digests([frame_digest(i, frame, classes=classes) for i, frame in zip(ids, labels, strict=True)])


def frame_digest(frame_id: str, labels: Labels | None, *, classes: Sequence[str]) -> bytes:
    """What one frame contributes to the fingerprint of its split."""
    objects = []
    if labels is not None:
        boxes = labels.boxes.data.detach().cpu().float().numpy().astype("<f4")
        for class_index, box in zip(labels.classes.tolist(), boxes, strict=True):
            if not 0 <= class_index < len(classes):
                raise InvalidInput(f"frame {frame_id!r} has class {class_index}; only {len(classes)} are named: {tuple(classes)}")
            objects.append(hashlib.sha256(classes[class_index].encode() + b"\0" + box.tobytes()).digest())
    return hashlib.sha256(frame_id.encode() + b"\0" + b"".join(sorted(objects))).digest()


def combine_digests(frames: Iterable[bytes]) -> str:
    """The fingerprint of a split from the digests of its frames, for a caller that reads them one by one."""
    return hashlib.sha256(b"".join(sorted(frames))).hexdigest()
