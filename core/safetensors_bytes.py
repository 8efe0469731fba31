"""Safetensors files in one spelling, and the SHA-256 over every byte of them.

The library's own writer keeps metadata in a random order, so equal content has many files. Here equal content has one file:

    8 bytes    length of the header
    header     JSON without spaces: metadata by name, then tensors by name; filled with spaces to a multiple of 8 bytes
    values     little-endian: the widest numbers first, then by name, so that every tensor lies at a multiple of its number's size

The hash stands in the header itself. It is the SHA-256 of the whole file with 64 zeros in its place, so a change of any bit is
noticed: in a value, in a configuration, or in the padding. Every program that reads safetensors reads these files.

Read next: `tensor_file.py`, which reads and checks them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidInput

FILE_DIGEST_KEY = "file_sha256"
"""Name of the metadata entry that holds the hash of the file."""
METADATA_KEY = "__metadata__"
"""Name of the header's entry for metadata, in every safetensors file."""
_ZEROS = "0" * 64
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[memoryview]:
    """Write tensors as a safetensors file in its one spelling.

    Args:
        tensors: Tensors by name, on any device. Tensors that share memory (tied weights) are written twice.
        metadata: Strings by name. Where it has the entry `FILE_DIGEST_KEY`, whatever its value, the entry gets the hash of the file.

    Returns:
        The bytes of the file, in pieces.

    Raises:
        InvalidInput: A tensor has a name or a type that such a file cannot hold.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        if name == METADATA_KEY or tensor.dtype not in _TYPES:
            raise InvalidInput(
                f"a file cannot hold the tensor {name} of {tensor.dtype}; rename it, or turn it into one of "
                f"{', '.join(_TYPES.values())}"
            )
    order = sorted(plain, key=lambda name: (-plain[name].element_size(), name))
    spans, end = {}, 0
    for name in order:
        start, end = end, end + plain[name].numel() * plain[name].element_size()
        spans[name] = (start, end)
    described: dict[str, Any] = {
        name: {"dtype": _TYPES[plain[name].dtype], "shape": list(plain[name].shape), "data_offsets": list(spans[name])}
        for name in sorted(plain)
    }
    values = [plain[name].reshape(-1).view(torch.uint8).numpy().data for name in order if plain[name].numel()]
    meta = dict(sorted((metadata or {}).items()))
    hashed = FILE_DIGEST_KEY in meta
    if hashed:
        meta[FILE_DIGEST_KEY] = _ZEROS
    head = _header({METADATA_KEY: meta, **described} if meta else described)
    if hashed:
        digest = hashlib.sha256(head)
        for piece in values:
            digest.update(piece)
        meta[FILE_DIGEST_KEY] = digest.hexdigest()
        head = _header({METADATA_KEY: meta, **described})
    return [memoryview(head), *values]


def file_digest_of(header: bytes, values: Iterator[memoryview], recorded: str) -> str:
    """Compute the hash that a file with this header and these values must record.

    Args:
        header: Everything before the values, the 8 bytes of the length included.
        values: Everything after it, in pieces.
        recorded: The recorded hash, whose place is filled with zeros first.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256(header.replace(json.dumps(recorded).encode(), json.dumps(_ZEROS).encode(), 1))
    for piece in values:
        digest.update(piece)
    return digest.hexdigest()


def _header(described: Mapping[str, Any]) -> bytes:
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
