"""What a dataset is here: it has a length and gives frame ``i``.

Training, preparation, the ground-truth database, extraction and evaluation ask for nothing else, so a dataset of your own is a
class of two methods (a plain ``list`` of frames is one already). No registry, no base class, no info files.
"""

from __future__ import annotations

from typing import Protocol

from ..core.structures import Frame


class FrameSource(Protocol):
    """Frames by position. The KITTI, folder, simulated and prepared readers satisfy it.

    ``__getitem__`` reads one frame each time it is called, keeps nothing, and raises ``InvalidInput`` or ``OSError`` for a frame
    that cannot be read, ``IndexError`` past the end.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Frame: ...
