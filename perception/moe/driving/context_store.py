"""The contexts of a carved detector in memory: one detector, whose carved layers point to the tensors of the context in use.

It is an `ExpertStore` of the runtime: an expert is a context, loaded as a whole. A load copies the context's tensors out of the mapped file,
and a switch changes pointers and copies nothing. Read next: `drive_runtime.py` and `detection_server.py`, which use it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require
from ...models.detector import Detector
from ..runtime.expert_memory import ExpertLayout
from .carved_folder import CarvedDetector


class ContextStore:
    """Contexts that come from files and go.

    Example:
        store = ContextStore(open_carved_detector("carved"))
        store.load(1)
        store.use(1).detect(scan)
        store.drop(1)
    """

    def __init__(self, opened: CarvedDetector, *, keep_cached: bool = True) -> None:
        """Hold no context.

        Args:
            opened: The carved detector. The store closes its files, and its `detector` runs with whatever context is in use.
            keep_cached: Whether the system may keep pages that were read. False reads the disk at every load, as on a machine whose memory
                is full.
        """
        self.layout = ExpertLayout(experts=len(opened.description.contexts))
        self._opened, self._keep_cached = opened, keep_cached
        own = opened.detector.state_dict(keep_vars=True)
        self._slots = {name: own[name] for name in opened.changing}
        self._resident: dict[int, dict[str, Tensor]] = {}
        self._used: int | None = None
        self._empty_slots()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the contexts in memory."""
        return sum(tensor.nbytes for held in tuple(self._resident.values()) for tensor in held.values())

    def bytes_of(self, expert: int) -> int:
        """Get the size of a context in memory.

        Args:
            expert: Number of the context.

        Returns:
            Its bytes.
        """
        require(0 <= expert < self.layout.experts, f"there is no context {expert}; there are {self.layout.experts}")
        return self._opened.context_bytes

    def load(self, expert: int) -> None:
        """Copy the tensors of a context into memory.

        Args:
            expert: Number of a context that is not in memory.

        Raises:
            InvalidInput: It is in memory already, or its file was shortened or closed.
        """
        require(expert not in self._resident, f"the context {expert} is in memory already")
        file = self._opened.files[expert]
        self._resident[expert] = {name: file.copy(name) for name in self._slots}
        if not self._keep_cached:
            for name in self._slots:
                span = file.span(name)
                file.forget(span.start, span.size)

    def drop(self, expert: int) -> None:
        """Free the memory of a context.

        Args:
            expert: Number of a context in memory.

        Raises:
            InvalidInput: It is not in memory.
        """
        if self._resident.pop(expert, None) is None:
            raise InvalidInput(f"the context {expert} is not in memory")
        if self._used == expert:
            self._empty_slots()

    def use(self, expert: int) -> Detector:
        """Let the detector compute with a context.

        Args:
            expert: Number of a context in memory.

        Returns:
            The detector. It must not be used after the context was dropped, or while another one is used.

        Raises:
            InvalidInput: The context is not in memory.
        """
        held = self._resident.get(expert)
        if held is None:
            raise InvalidInput(f"the context {expert} is not in memory; it must be held while it is used")
        if self._used != expert:
            for name, slot in self._slots.items():
                slot.data = held[name]
            self._used = expert
        return self._opened.detector

    def close(self) -> None:
        """Free all contexts and unmap the files."""
        self._resident.clear()
        self._empty_slots()
        self._opened.close()

    def _empty_slots(self) -> None:
        """Let the detector hold no context, so that dropped memory is free."""
        self._used = None
        for slot in self._slots.values():
            slot.data = torch.empty(0, dtype=slot.dtype)
