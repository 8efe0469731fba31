"""Safetensors files that are mapped into memory and read in parts, after the whole file was checked.

`read_tensors` brings a whole file into memory. A store whose tensors come and go maps the file instead: the header is checked first, then
the hash of every byte is computed in small pieces, and from then on any tensor can be copied out alone. Nothing is allocated that the
header only claims: each tensor must lie inside of the file and have the bytes of its shape.

Read next: `tensor_file.py`, which writes such files.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import InvalidInput
from .files import check_input_file
from .foreign_text import shown
from .safetensors_bytes import FILE_DIGEST_KEY, METADATA_KEY, file_digest_of
from .strict_json import strict_json
from .tensor_file import FORMAT_KEY, MAX_HEADER_BYTES, CorruptFile, TensorFileKind

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_STEP = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TensorSpan:
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    """Type of its numbers."""
    shape: tuple[int, ...]
    """Its shape."""
    start: int
    """First byte in the file."""
    size: int
    """Number of bytes."""


class MappedTensors:
    """A checked tensor file in the address space of the process. Pages come from the disk when they are touched.

    Example:
        file = map_tensors("experts.safetensors", EXPERTS_FILE)
        weight = file.copy("expert 0000 layer 0000")
        file.close()
    """

    def __init__(self, path: Path, mapping: mmap.mmap, spans: Mapping[str, TensorSpan], meta: Mapping[str, str]) -> None:
        self.path, self.spans, self.meta = path, spans, meta
        self._mapping = mapping
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(mapping, dtype=np.uint8)

    def described(self, key: str) -> Any:
        """Read one entry of the metadata as JSON.

        Args:
            key: Name of the entry.

        Returns:
            The plain value.

        Raises:
            CorruptFile: The entry is missing or is not JSON.
        """
        if key not in self.meta:
            raise CorruptFile(f"{self.path} has no {key!r} in its metadata, so it is incomplete; copy it again from its source")
        text = self.meta[key].encode("utf-8", "surrogatepass")
        return strict_json(text, f"the {key!r} in the metadata of {self.path}", CorruptFile)

    def span(self, name: str) -> TensorSpan:
        """Find a tensor.

        Args:
            name: Its name.

        Returns:
            Where it lies.

        Raises:
            CorruptFile: It is not there.
        """
        if name not in self.spans:
            raise CorruptFile(f"{self.path} is incomplete: it has no tensor {name}; copy it again from its source")
        return self.spans[name]

    def copy_bytes(self, start: int, into: NDArray[np.uint8]) -> None:
        """Copy bytes out of the file. Other threads of Python run meanwhile.

        Args:
            start: First byte in the file.
            into: Where they go; its size is the number of bytes.

        Raises:
            CorruptFile: The file was shortened after it was opened.
            InvalidInput: It is closed, or the bytes lie outside of it.
        """
        if self._bytes is None:
            raise InvalidInput(f"{self.path} is closed")
        if start < 0 or start + into.size > self._bytes.size:
            raise InvalidInput(f"{self.path} has {self._bytes.size} bytes, and {start}..{start + into.size} were asked for")
        try:
            now = os.stat(self.path).st_size
        except OSError:
            now = self._bytes.size  # it was deleted, and the mapping keeps its bytes
        if now < start + into.size:  # reading behind the end of a mapped file would kill the process
            raise CorruptFile(f"{self.path} was shortened to {now} bytes while it was in use; copy it again from its source")
        np.copyto(into, self._bytes[start : start + into.size])

    def copy(self, name: str) -> Tensor:
        """Copy one tensor out of the file.

        Args:
            name: Its name.

        Returns:
            The tensor on the CPU.

        Raises:
            CorruptFile: It is not there, or the file was shortened.
        """
        span = self.span(name)
        made = torch.empty(span.size, dtype=torch.uint8)
        self.copy_bytes(span.start, made.numpy())
        return made.view(span.dtype).view(span.shape)

    def forget(self, start: int, size: int) -> None:
        """Take pages out of the process and, where the system agrees, out of its page cache, so that the next read comes from the disk.

        Args:
            start: First byte in the file.
            size: Number of bytes.
        """
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_DONTNEED, first, start + size - first)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Unmap the file. Tensors that were copied stay."""
        self._bytes = None
        self._mapping.close()


def map_tensors(path: str | Path, kind: TensorFileKind) -> MappedTensors:
    """Map a tensor file into memory and check all of it, without holding more than a few megabytes.

    Args:
        path: The file.
        kind: What it must be.

    Returns:
        The mapped file.

    Raises:
        InvalidInput: The file is missing, cannot be opened, is too large, or is of another kind.
        CorruptFile: The file is not readable as safetensors, or does not have the recorded hash.
    """
    path = Path(path)
    check_input_file(path, kind.name)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > kind.max_bytes:
                raise InvalidInput(f"{path} has {size} bytes, and at most {kind.max_bytes} are read; {kind.advice}")
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CorruptFile(f"{path} is not a readable safetensors file ({size} bytes, no valid header); {kind.advice}")
            header = stream.read(length)
            meta, spans = _described(header, size, path, kind)
            mapping = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise InvalidInput(f"there is no {kind.name} at {path}; {kind.advice}") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}; {kind.advice}") from error
    file = MappedTensors(path, mapping, spans, meta)
    try:
        recorded = meta.get(FILE_DIGEST_KEY, "")
        if file_digest_of(start + header, _pieces(file, 8 + length, size), recorded) != recorded:
            raise CorruptFile(f"{path} does not have the SHA-256 that it records: it was changed or damaged; {kind.advice}")
    except BaseException:
        file.close()
        raise
    return file


def _pieces(file: MappedTensors, start: int, end: int) -> Iterator[memoryview]:
    step = np.empty(min(_STEP, max(1, end - start)), dtype=np.uint8)
    for first in range(start, end, _STEP):
        part = step[: min(_STEP, end - first)]
        file.copy_bytes(first, part)
        yield part.data


def _described(header: bytes, size: int, path: Path, kind: TensorFileKind) -> tuple[dict[str, str], dict[str, TensorSpan]]:
    """Metadata and places in a header, each compared with the size of the file."""
    told = strict_json(header, f"the header of {path}", CorruptFile)
    meta = told.pop(METADATA_KEY, {}) if isinstance(told, dict) else None
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise CorruptFile(f"{path} is not a readable safetensors file (its header is no table of tensors); {kind.advice}")
    if meta.get(FORMAT_KEY) != kind.format:
        found = f"'{shown(meta[FORMAT_KEY])}'" if FORMAT_KEY in meta else "no format name"
        raise InvalidInput(f"{path} is not a {kind.name}: expected format {kind.format!r}, found {found}; {kind.advice}")
    base, end = 8 + len(header), 0
    spans: dict[str, TensorSpan] = {}
    for name, entry in told.items():
        try:
            dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
            first, last = entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
            good = whole and last - first == math.prod(shape) * dtype.itemsize and base + last <= size
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise CorruptFile(f"{path} is not a readable safetensors file (tensor {shown(name)} does not fit); {kind.advice}")
        spans[name] = TensorSpan(dtype=dtype, shape=shape, start=base + first, size=last - first)
        end = max(end, last)
    if base + end != size:
        raise CorruptFile(f"{path} has {size} bytes, and its header describes {base + end}; {kind.advice}")
    return dict(meta), spans
