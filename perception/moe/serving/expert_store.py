"""A store whose experts come from a mapped file and go: what a runtime's memory loads into, so that resident bytes are real.

On the CPU a load copies a piece into a buffer of its own, and a drop frees the buffer. On a CUDA device the piece goes through one pinned
buffer on the host and a stream of its own, so that copying overlaps with computing. Read next: `runtime/expert_memory.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require
from .expert_files import ExpertFile, ExpertPiece, piece_name


class MappedExpertStore:
    """The experts of a file, some of them in memory. It is an `ExpertStore` of the runtime.

    Example:
        store = MappedExpertStore(open_experts("experts.safetensors"), whole=False)
        store.load(3)
        y = store.part(expert=3, layer=0).apply(x)
        store.drop(3)
    """

    def __init__(self, opened: ExpertFile, *, whole: bool, device: torch.device | str = "cpu", keep_cached: bool = True) -> None:
        """Hold nothing yet.

        Args:
            opened: The file. The store closes it.
            whole: Whether an expert is loaded as a whole; else layer by layer.
            device: Where the experts are used.
            keep_cached: Whether pages that were read may stay in the page cache of the system. False asks the system to forget them, so
                that every load reads the disk, as on a machine whose memory is full.
        """
        self.form, self.layout = opened.form, opened.form.layout(whole=whole)
        self.device = torch.device(device)
        self._file, self._keep_cached = opened.file, keep_cached
        self._resident: dict[int, tuple[Tensor, tuple[ExpertPiece, ...]]] = {}
        self._cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None
        self._pinned: Tensor | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes of all buffers in memory."""
        return sum(buffer.nbytes for buffer, _ in tuple(self._resident.values()))

    def bytes_of(self, expert: int) -> int:
        """Get the size of a piece in memory.

        Args:
            expert: Number of the piece in the layout.

        Returns:
            Its bytes.
        """
        owner, layers = self._layers_of(expert)
        return sum(self.form.count(owner, layer) for layer in layers) * self.form.dtype.itemsize

    def load(self, expert: int) -> None:
        """Copy a piece into memory. It can be used when this returns.

        Args:
            expert: Number of a piece that is not in memory.

        Raises:
            InvalidInput: It is in memory already, or the file was shortened or closed.
        """
        require(expert not in self._resident, f"piece {expert} is in memory already")
        owner, layers = self._layers_of(expert)
        start, size = self._file.span(piece_name(owner, layers[0])).start, self.bytes_of(expert)
        buffer = self._to_device(start, size) if self._cuda else torch.empty(size, dtype=torch.uint8)
        if not self._cuda:
            self._file.copy_bytes(start, buffer.numpy())
        if not self._keep_cached:
            self._file.forget(start, size)
        counts = [self.form.count(owner, layer) for layer in layers]
        parts = buffer.view(self.form.dtype).split(counts)
        pieces = tuple(self.form.forms[layer].piece(part, self.form.units[layer][owner]) for layer, part in zip(layers, parts))
        self._resident[expert] = (buffer, pieces)

    def drop(self, expert: int) -> None:
        """Free the buffer of a piece.

        Args:
            expert: Number of a piece in memory.

        Raises:
            InvalidInput: It is not in memory.
        """
        held = self._resident.pop(expert, None)
        if held is None:
            raise InvalidInput(f"piece {expert} is not in memory")
        if self._cuda:  # products that were started may still read it: its memory may be used again only after them
            held[0].record_stream(torch.cuda.current_stream(self.device))

    def part(self, *, expert: int, layer: int) -> ExpertPiece:
        """Get the own units of an expert in one layer.

        Args:
            expert: Number of the expert.
            layer: Number of the layer.

        Returns:
            Views of the buffer in memory. They must not be kept: the buffer is freed when nobody uses it.

        Raises:
            InvalidInput: It is not in memory.
        """
        whole = self.layout.layers == 1
        number = self.layout.piece(expert, 0 if whole else layer)
        held = self._resident.get(number)
        if held is None:
            raise InvalidInput(f"expert {expert} of layer {layer} is not in memory; it must be held while it is used")
        return held[1][layer if whole else 0]

    def close(self) -> None:
        """Free all buffers and close the file."""
        self._resident.clear()
        self._pinned = None
        self._file.close()

    def _layers_of(self, number: int) -> tuple[int, range]:
        """The expert of a piece and the layers that it spans."""
        require(0 <= number < self.layout.pieces, f"there is no piece {number}; there are {self.layout.pieces}")
        layer, expert = divmod(number, self.layout.experts)
        return expert, range(self.form.layers) if self.layout.layers == 1 else range(layer, layer + 1)

    def _to_device(self, start: int, size: int) -> Tensor:
        """File, pinned buffer, device. One thread loads, so one pinned buffer is enough."""
        if self._pinned is None:
            largest = max(self.bytes_of(number) for number in range(self.layout.pieces))
            self._pinned = torch.empty(largest, dtype=torch.uint8, pin_memory=True)
        host = self._pinned[:size]
        self._file.copy_bytes(start, host.numpy())
        stream = self._stream
        assert stream is not None
        with torch.cuda.stream(stream):
            buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
            buffer.copy_(host, non_blocking=True)
        stream.synchronize()
        return buffer
