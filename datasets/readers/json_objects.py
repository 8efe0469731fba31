"""Label files of annotation tools: JSON with one object per box, whose vectors are objects with named numbers.

Read next: `sustechpoints.py`, `cvat.py`, `labelcloud.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.ledger import Ledger
from ...core.point_files import read_scan
from ...core.scan_options import ScanOptions
from ...core.strict_json import read_json
from ...core.structures import PointCloud
from ..kitti import scan_settings
from .boxed import FrameFiles

LABEL_REMEDY = "export the labels again, or remove the file, so that the scan counts as not labeled"
"""What to do about a broken label file."""


@dataclass(frozen=True, kw_only=True)
class AnnotatedScans:
    """Scans of an annotation tool: plain scan files, whose axes the labels share. The tools' formats inherit from it."""

    read: ScanOptions = ScanOptions()
    """How scan files are read. The rig is not used: see `BoxedDataset`."""

    def __post_init__(self) -> None:
        self.read.refuse_image_size("annotation tools have no camera to crop to; leave it out")
        if self.read.axes != ("x", "y", "z"):
            raise InvalidInput(
                f"the axes of these scans cannot be turned (found {' '.join(self.read.axes)}), because the labels belong to the file's axes; "
                "turn scans and labels before they are annotated, or convert both to a folder of your own (prepare folder --axes)"
            )

    def options(self) -> Mapping[str, object]:
        """Say how scans are read; `BoxedDataset` states the intensity scale itself.

        Returns:
            Options that shape the dataset, by name.
        """
        return {name: value for name, value in scan_settings(self.read).items() if name not in ("intensity_scale", "image_size")}

    def scan(self, frame: FrameFiles) -> tuple[PointCloud, Ledger]:
        """Read the scan of a frame.

        Args:
            frame: The frame.

        Returns:
            The scan in the frame of the file, and its counts.

        Raises:
            InvalidInput: As for `read_scan`.
        """
        return read_scan(frame.scan, self.read)


def read_objects_of(path: Path, *keys: str) -> list[Any]:
    """Read the list of objects of a label file.

    Args:
        path: The file.
        *keys: Names of the entry that holds the list; the first that is there is taken. Without any, the file itself is the list.

    Returns:
        The objects.

    Raises:
        InvalidInput: The file is missing, is not JSON, or holds no such list.
    """
    value = read_json(path, "label file", remedy=LABEL_REMEDY, kind=object)
    key = next((key for key in keys if isinstance(value, dict) and key in value), None)
    found = value if key is None else value[key]
    if not isinstance(found, list):
        raise InvalidInput(f"{path} must hold a list of objects{f' called {keys[0]}' if keys else ''}; {LABEL_REMEDY}")
    return found


def texts(where: str, objects: Iterable[Any], key: str) -> list[str]:
    """Take one text out of every object.

    Args:
        where: The file, for messages.
        objects: The objects.
        key: Name of the entry.

    Returns:
        The texts.

    Raises:
        InvalidInput: With the number of the object: it has no such text.
    """
    found = [item.get(key) if isinstance(item, dict) else None for item in objects]
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise InvalidInput(f"{where}, object {number}: there is no text {key!r}; {LABEL_REMEDY}")
    return [text for text in found if isinstance(text, str)]


def vectors(where: str, objects: Iterable[Any], path: Sequence[str], names: Sequence[str] = ("x", "y", "z")) -> Tensor:
    """Take one vector out of every object.

    Args:
        where: The file, for messages.
        objects: The objects.
        path: Names of the entries that lead to the vector.
        names: Names of its numbers.

    Returns:
        (N, C) float64.

    Raises:
        InvalidInput: With the number of the object: it has no such vector.
    """
    rows = []
    for number, item in enumerate(objects):
        value = item
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        row = [value.get(name) if isinstance(value, dict) else None for name in names]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in row):
            raise InvalidInput(
                f"{where}, object {number}: {'.'.join(path)} must hold the numbers {' '.join(names)}, found {shown(repr(value), most=80)}; "
                f"{LABEL_REMEDY}"
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(names))
