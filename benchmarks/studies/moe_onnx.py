"""Not a script: reads the weights out of an ONNX file, as the protocol buffer that it is. `moe_towers.py` fills an encoder with them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from upcycle3d.core.errors import InvalidInput


def onnx_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the float32 constants of an ONNX model.

    Args:
        data: The file.

    Returns:
        The constants by their names, and the two-dimensional ones that a MatMul uses by the name of its node.
    """
    view = memoryview(data)
    graph = next(value for number, value in _fields(view) if number == 7)
    tensors: dict[str, Tensor] = {}
    nodes: list[tuple[str, list[str]]] = []
    for number, value in _fields(graph):
        if number == 5:  # initializer
            dims: list[int] = []
            name, raw, kind = "", None, 0
            for inner, part in _fields(value):
                if inner == 1:
                    dims += [part] if isinstance(part, int) else list(_varints(part))
                elif inner == 2:
                    kind = part
                elif inner == 8:
                    name = bytes(part).decode()
                elif inner == 9:
                    raw = part
            if kind == 1 and raw is not None:
                tensors[name] = torch.from_numpy(np.frombuffer(raw, np.float32).reshape(dims).copy())
        elif number == 1:  # node
            fields = list(_fields(value))
            if any(inner == 4 and bytes(part) == b"MatMul" for inner, part in fields):
                inputs = [bytes(part).decode() for inner, part in fields if inner == 1]
                nodes.append((next(bytes(part).decode() for inner, part in fields if inner == 3), inputs))
    used = {name: tensors[i] for name, inputs in nodes for i in inputs if i in tensors and tensors[i].ndim == 2}
    return tensors, used


def _fields(view: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of the fields of one message of a protocol buffer."""
    at = 0
    while at < len(view):
        key, at = _varint(view, at)
        if key & 7 == 0:
            value, at = _varint(view, at)
            yield key >> 3, value
        elif key & 7 == 2:
            size, at = _varint(view, at)
            yield key >> 3, view[at : at + size]
            at += size
        elif key & 7 in (1, 5):
            at += 8 if key & 7 == 1 else 4
        else:
            raise InvalidInput(f"not an ONNX file: field of kind {key & 7} at byte {at}")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varints(view: memoryview) -> Iterator[int]:
    at = 0
    while at < len(view):
        value, at = _varint(view, at)
        yield value
