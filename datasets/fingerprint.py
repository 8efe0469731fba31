"""The fingerprint of a split, so that other labels or other scans cannot slip into a run unnoticed.

A run that learns from 1 % of the labels must not paste objects that were cut from the other 99 %. Whatever is derived from labels
(above all the ground-truth database) carries the fingerprint of its split and refuses to serve another. Results of unlabeled scans are
known by the same fingerprint, and the ids of two fleets are often the same numbers, so it has two halves, `LABELS+POINTS`. Earlier
versions wrote the first half only; `same_split` compares what both fingerprints have.

Read next: `gt_database.py`.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Sequence

import torch

from ..core.errors import InvalidInput
from ..core.structures import Labels, PointCloud

_SEPARATOR = "+"


def split_fingerprint(ids: Sequence[str], labels: Iterable[Labels | None], *, classes: Sequence[str]) -> str:
    """Hash the labels of a split: the first half of its fingerprint. The order of frames and of boxes does not matter.

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


def with_points(labels: str, checksums: Iterable[tuple[str, int]]) -> str:
    """Make the whole fingerprint of a split.

    Args:
        labels: The first half, from `split_fingerprint`.
        checksums: Id and checksum (`points_checksum`) of every frame, in any order.

    Returns:
        The two halves, `LABELS+POINTS`.
    """
    digests = sorted(hashlib.sha256(frame_id.encode() + b"\0%08x" % crc).digest() for frame_id, crc in checksums)
    return labels + _SEPARATOR + hashlib.sha256(b"".join(digests)).hexdigest()


def points_checksum(points: PointCloud) -> int:
    """Compute the checksum of a scan that the index of a prepared dataset holds.

    Args:
        points: The scan.

    Returns:
        CRC-32 of its rows in float32: x, y, z and the features.
    """
    return zlib.crc32(points_bytes(points))


def points_bytes(points: PointCloud) -> bytes:
    """Return the rows of a scan as a prepared dataset stores them.

    Args:
        points: The scan.

    Returns:
        Little-endian float32 rows of x, y, z and the features.
    """
    return torch.cat([points.xyz, points.features], 1).float().cpu().numpy().astype("<f4").tobytes()


def same_split(recorded: str, now: str) -> bool:
    """Compare two fingerprints of splits.

    Args:
        recorded: One of a record; an earlier version wrote the half of the labels only.
        now: The other one.

    Returns:
        Whether they are equal in the halves that both have.
    """
    return as_recorded(now, recorded) == as_recorded(recorded, now)


def as_recorded(now: str, recorded: str) -> str:
    """Give a text with fingerprints the form of a text that may come from an earlier version, to compare the two.

    Args:
        now: A fingerprint, whole or shortened, or a text with one.
        recorded: What it will be compared with.

    Returns:
        `now`, without the half of the points where `recorded` has none.
    """
    return now if _HALF_OF_POINTS.search(recorded) else _HALF_OF_POINTS.sub("", now)


_HALF_OF_POINTS = re.compile(r"(?<=[0-9a-f]{12})\+[0-9a-f]{12,64}\b")


def short(fingerprint: str, digits: int = 12) -> str:
    """Shorten a fingerprint for a message.

    Args:
        fingerprint: The fingerprint.
        digits: Number of digits to keep of each half.

    Returns:
        The first digits of each half.
    """
    return _SEPARATOR.join(half[:digits] for half in fingerprint.split(_SEPARATOR))
