"""Writes pickles of plain data and checkpoints of torch, step by step, for programs that read nothing else.

What is written holds plain containers, texts, numbers, numpy's arrays and torch's tensors, so a careful reader (`plain_pickle.py`,
`torch.load(weights_only=True)`) takes it. The same values give the same bytes. Our own files are never pickles.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.files import write_atomically

_STORAGES = {
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.float32: "FloatStorage",
    torch.float64: "DoubleStorage",
    torch.int32: "IntStorage",
    torch.int64: "LongStorage",
}
_SAME_TIME = (1980, 1, 1, 0, 0, 0)  # a zip holds times, and the same weights shall give the same file

TensorWriter = Callable[[Tensor], bytes]
"""Makes the steps that stand for a tensor."""


def plain_pickle(value: Any) -> bytes:
    """Write plain data as a pickle.

    Args:
        value: None, bool, int, float, str, bytes, lists, tuples and dictionaries of them, numpy's numbers and arrays of numbers or texts.

    Returns:
        The pickle, readable by Python 3.

    Raises:
        InvalidInput: The value holds something else.
    """
    return b"\x80\x03" + _steps(value, _no_tensor) + b"."


def write_plain_pickle(path: str | Path, value: Any) -> None:
    """Write plain data as a file, completely or not at all.

    Args:
        path: the file.
        value: as for `plain_pickle`.
    """
    write_atomically(path, plain_pickle(value))


def write_torch_file(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint that `torch.load` reads, completely or not at all.

    Args:
        path: the file, such as `second.pth`.
        content: plain data and tensors on any device. Each tensor is stored by itself, so nothing of a larger one comes along.
    """
    stored: list[bytes] = []

    def tensor_steps(tensor: Tensor) -> bytes:
        values = tensor.detach().cpu().contiguous()
        if values.dtype not in _STORAGES:
            raise InvalidInput(
                f"a tensor of {values.dtype} cannot be written; convert it to one of {', '.join(map(str, _STORAGES))}"
            )
        stored.append(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        where = b"(" + _text("storage") + _global("torch", _STORAGES[values.dtype]) + _text(str(len(stored) - 1)) + _text("cpu")
        where += _integer(values.numel()) + b"tQ"
        shape = _steps(tuple(values.shape), _no_tensor) + _steps(values.stride(), _no_tensor)
        hooks = _global("collections", "OrderedDict") + b")R"
        return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + where + _integer(0) + shape + b"\x89" + hooks + b"tR"

    pickle = b"\x80\x02" + _steps(content, tensor_steps) + b"."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        members = {"data.pkl": pickle, "byteorder": b"little"} | {f"data/{i}": data for i, data in enumerate(stored)}
        for name, data in (members | {"version": b"3\n"}).items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _SAME_TIME), data)
    write_atomically(path, buffer.getvalue())


def _no_tensor(tensor: Tensor) -> bytes:
    raise InvalidInput("a pickle of plain data holds no tensor; give a numpy array")


def _steps(value: Any, tensor: TensorWriter) -> bytes:
    """The steps that put a value on the stack of whoever reads them."""
    if value is None:
        return b"N"
    if isinstance(value, bool | np.bool_):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int | np.integer):
        return _integer(int(value))
    if isinstance(value, float | np.floating):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return _text(str(value))
    if isinstance(value, bytes):
        return _bytes(value)
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_steps(k, tensor) + _steps(v, tensor) for k, v in value.items()) + b"u"
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, tuple):
        return b"(" + b"".join(_steps(entry, tensor) for entry in value) + b"t"
    if isinstance(value, Sequence):
        return b"](" + b"".join(_steps(entry, tensor) for entry in value) + b"e"
    raise InvalidInput(f"a {type(value).__name__} is no plain data; give containers, numbers, texts and numpy arrays")


def _array(value: np.ndarray) -> bytes:
    kind = value.dtype.newbyteorder("<")
    if kind.kind not in "biufU":
        raise InvalidInput(f"an array of {value.dtype} cannot be written; give numbers or texts")
    text = f"U{kind.itemsize // 4}" if kind.kind == "U" else f"{kind.kind}{kind.itemsize}"
    order = "<" if kind.itemsize > 1 else "|"
    sizes = (kind.itemsize, 4, 8) if kind.kind == "U" else (-1, -1, 0)
    dtype = _global("numpy", "dtype") + b"(" + _text(text) + b"\x89\x88tR"
    dtype += _steps((3, order, None, None, None, *sizes), _no_tensor) + b"b"
    made = _global("numpy.core.multiarray", "_reconstruct") + b"(" + _global("numpy", "ndarray") + _steps((0,), _no_tensor)
    made += _bytes(b"b") + b"tR"
    state = b"(" + _integer(1) + _steps(value.shape, _no_tensor) + dtype + b"\x89" + _bytes(value.astype(kind).tobytes()) + b"t"
    return made + state + b"b"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _bytes(value: bytes) -> bytes:
    """Steps for bytes, which Python 3 has from protocol 3 on."""
    return b"B" + struct.pack("<I", len(value)) + value


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data
