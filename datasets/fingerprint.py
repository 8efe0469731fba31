"""The fingerprint of a labeled split, so that knowledge of other labels cannot slip into a run unnoticed.

A run that learns from 1 % of the labels must not paste objects that were cut from the other 99 %. Whatever is derived from labels
(above all the ground-truth database) carries the fingerprint of its split and refuses to serve another.

Read next: `gt_database.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from ..core.errors import InvalidInput
from ..core.structures import Labels


def split_fingerprint(ids: Sequence[str], labels: Iterable[Labels | None], *, classes: Sequence[str]) -> str:
    """Hash the labels of a split. The order of frames and of boxes does not matter.

    Args:
        ids: Frame ids.
        labels: One entry per frame, in the same order. They are read once, so a generator keeps memory flat. A frame without objects
            counts by its id; an unlabeled one (None) counts like an empty one.
        classes: Names of the class numbers.

    Returns:
        SHA-256, in hexadecimal digits, over frame ids, class names and the bytes of the boxes, sorted.

    Raises:
        InvalidInput: A class number has no name.
        ValueError: There are more or fewer labels than ids.
    """
    return combine_digests([frame_digest(i, frame, classes=classes) for i, frame in zip(ids, labels, strict=True)])


def frame_digest(frame_id: str, labels: Labels | None, *, classes: Sequence[str]) -> bytes:
    """Hash one frame: what it contributes to the fingerprint of its split.

    Args:
        frame_id: Id of the frame.
        labels: Its labels, or None where nobody labeled.
        classes: Names of the class numbers.

    Returns:
        32 bytes.

    Raises:
        InvalidInput: A class number has no name.
    """
    objects = []
    if labels is not None:
        boxes = labels.boxes.data.detach().cpu().float().numpy().astype("<f4")
        for class_index, box in zip(labels.classes.tolist(), boxes, strict=True):
            if not 0 <= class_index < len(classes):
                raise InvalidInput(f"frame {frame_id!r} has class {class_index}; only {len(classes)} are named: {tuple(classes)}")
            objects.append(hashlib.sha256(classes[class_index].encode() + b"\0" + box.tobytes()).digest())
    return hashlib.sha256(frame_id.encode() + b"\0" + b"".join(sorted(objects))).digest()


def combine_digests(frames: Iterable[bytes]) -> str:
    """Make the fingerprint of a split from the digests of its frames, for a caller that reads the frames one by one.

    Args:
        frames: The results of `frame_digest`, in any order.

    Returns:
        The same text as `split_fingerprint`.
    """
    return hashlib.sha256(b"".join(sorted(frames))).hexdigest()
