"""A split of a prepared dataset, as commands name it: `DIR[:SPLIT]`.

Read next: `prepared.py`, which reads the frames of a split, and `gt_database.py`, whose objects are pasted into them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from ..core.errors import InvalidInput
from .fingerprint import short
from .gt_database import build_gt_database
from .prepared import PreparedDataset


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """A split of a prepared dataset, not yet opened.

    Example:
        frames = DataSplit.parse("data/kitti:val").open()
    """

    root: Path
    """Folder of the prepared dataset."""
    name: str | None = None
    """Name of the split. None means that the user named none: all frames, unless `or_split` fills in a default."""

    SYNTAX: ClassVar[str] = "DIR[:SPLIT]"
    """How a split is written on the command line."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `DIR` or `DIR:SPLIT`. What follows the last colon is the split, unless it contains a slash.

        A folder that exists under the whole text is taken whole, so its name may hold a colon.

        Args:
            text: A folder, a colon and the name of a split; or a folder alone.

        Returns:
            The split. Its `name` is None where the text has none.

        Raises:
            InvalidInput: The folder or the split is empty.
        """
        root, colon, name = text.rpartition(":")
        if not colon or "/" in name or Path(text).is_dir():
            root, name = text, ""
        elif not name:
            root = ""  # "DIR:" promises a split and names none
        if not root:
            raise InvalidInput(
                f"a split of a prepared dataset is written {cls.SYNTAX}, found {text!r}; end a folder with a colon in its name with /"
            )
        return cls(root=Path(root), name=name or None)

    def __str__(self) -> str:
        return str(self.root) if self.name is None else f"{self.root}:{self.name}"

    def or_split(self, name: str) -> Self:
        """Fill in a command's default split.

        Args:
            name: The split to take where the user named none.

        Returns:
            A split with a name.
        """
        return self if self.name is not None else replace(self, name=name)

    def resolved(self) -> Self:
        """The same split with an absolute folder, which stays valid from another working directory."""
        return replace(self, root=self.root.resolve())

    def open(self) -> PreparedDataset:
        """The frames of the split, or all frames of the dataset where no split is named."""
        return PreparedDataset(self.root, self.name)

    def summary(self) -> str:
        """Number and fingerprint of the frames, their labels and points, to recognize the same frames again."""
        frames = self.open()
        return f"{len(frames)} frames {short(frames.split_fingerprint(), 16)}"

    @property
    def gt_database(self) -> Path:
        """The folder of the split's own GT database, which `prepare` writes for labeled splits.

        Raises:
            InvalidInput: No split is named.
        """
        if self.name is None:
            raise InvalidInput(f"a GT database belongs to one split; name it, as in {self.root}:train")
        return self.root / "gt_database" / self.name

    def ensure_gt_database(self) -> None:
        """Build the split's GT database if it is not there."""
        folder = self.gt_database
        if not (folder / "database.json").exists():
            frames = self.open()
            build_gt_database(frames, folder, class_names=frames.classes, fingerprint=frames.split_fingerprint())
