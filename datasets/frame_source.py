"""What a dataset is in this toolkit: it has a length and returns frame `i`.

Training, preparation, the ground-truth database, extraction and evaluation ask for nothing else, so your own dataset is a class
with two methods (a plain `list` of frames works too). There is no registry, no base class and no info file. The two larger
protocols below are optional: `prepare` stores what they add.

Read next: `prepare.py`, which reads a source once and writes it for fast use; `folder.py`, the shortest reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from ..core.frame import Frame
from .kitti_text import KittiObjects

Layout = Literal[
    "kitti", "folder", "lyft", "nuscenes", "waymo", "argoverse2", "once", "pandaset", "labelcloud", "sustechpoints", "cvat", "bag", "own"
]  # fmt: skip
"""How a dataset lies on disk, by the name of the reader; "own" is a class of your own."""


class FrameSource(Protocol):
    """Frames by position. All readers of this package satisfy it.

    `source[i]` reads one frame each time it is called and keeps nothing. It raises `InvalidInput` or `OSError` for a frame that
    cannot be read, and `IndexError` past the end.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Frame: ...


@dataclass(frozen=True, kw_only=True)
class DatasetOrigin:
    """Which data a prepared dataset was made from, and how it was read."""

    layout: Layout = "own"
    """The reader. Evaluation takes the dataset's own protocol from it."""
    root: Path | None = None
    """Absolute folder that was read, for people to see. No code opens it, so a prepared dataset can be moved."""
    options: tuple[tuple[str, str], ...] = ()
    """Names and values, as text, of the reader's options. They are shown and compared, never interpreted: preparation that is
    started again with other options is refused, because its frames would not fit the earlier ones."""


@runtime_checkable
class DescribedSource(FrameSource, Protocol):
    """A source that knows its origin. A source without one counts as the layout "own"."""

    @property
    def origin(self) -> DatasetOrigin:
        """Where the frames come from and how they are read."""
        ...


@runtime_checkable
class KittiLabelSource(FrameSource, Protocol):
    """A source with KITTI label files. Preparation stores them, so that KITTI's protocol needs no raw data later."""

    def kitti_objects(self, frame_id: str) -> KittiObjects:
        """Read the label file of a frame.

        Args:
            frame_id: Id of the frame.

        Returns:
            Every line of the file in its order, DontCare included.
        """
        ...


@runtime_checkable
class FiledSource(FrameSource, Protocol):
    """A source that reads files and names them, so that preparation reads again what was changed since."""

    def files_of(self, frame_id: str) -> tuple[Path, ...]:
        """Name the files that a frame is read from.

        Args:
            frame_id: Id of the frame.

        Returns:
            The files, among them those that are missing. A label file that is not opened is left out.
        """
        ...


@runtime_checkable
class LabelChoiceSource(FrameSource, Protocol):
    """A source that knows, before it reads a frame, whether it gives labels."""

    def has_labels(self, frame_id: str) -> bool:
        """Say whether the labels of a frame are read.

        Args:
            frame_id: Id of the frame.

        Returns:
            Whether the frame is given with labels.
        """
        ...


def described_origin(layout: Layout, root: Path | str | None, options: Mapping[str, object]) -> DatasetOrigin:
    """Describe how a reader was set up.

    Args:
        layout: Its layout.
        root: Folder that it reads.
        options: Its options by name. Tuples and mappings become words.

    Returns:
        The origin, with an absolute root and every option as text.
    """

    def text(value: object) -> str:
        if isinstance(value, Mapping):
            return " ".join(f"{name}={item}" for name, item in value.items())
        return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

    folder = None if root is None else Path(root).resolve()
    return DatasetOrigin(layout=layout, root=folder, options=tuple((name, text(value)) for name, value in options.items()))
