"""Reads pickles of plain data without unpickling: info files and results of OpenPCDet and mmdetection3d.

A pickle is a program for a small stack machine, and the usual reader calls whatever function that program names. This one knows the
steps that build lists, dictionaries, texts, numbers and numpy's arrays, and nothing else. It imports nothing that the file names and
calls nothing of the file's choice, so a file with any other step is refused at that step and nothing has run.

Read next: `plain_pickle_writing.py`, which writes what this module reads.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import InvalidInput
from ...core.files import check_input_file
from ...core.foreign_text import shown

LARGEST_PICKLE = 1024**3
"""Maximum size of a file in bytes. The training infos of KITTI have 6e6, those of Waymo 0.3e9."""
MOST_STEPS = 100_000_000
"""Maximum number of steps of a file. The training infos of KITTI have about 2e6."""
_MADE_OF, _MADE_MORE = 4, 1 << 20  # arrays are made of at most 4 times the bytes of the file, and 1 MiB

_ARRAY_KINDS = re.compile(r"[<>|=]?([?bBhHiIlLqQefd]|[biuf]\d{1,2}|[US][1-9]\d{0,5}|O8?)\Z")
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")


class _Callable(str):
    """The name of something that the file asks for. It is compared and never looked up."""


class _Unfinished:
    """An array or a type of array whose state comes later in the file."""

    def __init__(self, of: Callable[[Any], Any]) -> None:
        self.of, self.value = of, None


def read_plain_pickle(path: str | Path) -> Any:
    """Read a pickle that holds plain data.

    Args:
        path: the file, such as `kitti_infos_train.pkl`.

    Returns:
        Its content: dictionaries, lists, tuples, sets, texts, bytes, numbers, None, numpy's arrays and numbers.

    Raises:
        InvalidInput: There is no such file, or it is too large, damaged, or holds anything else.

    Example:
        ```python
        infos = read_plain_pickle("kitti_infos_val.pkl")
        print(infos[0]["annos"]["gt_boxes_lidar"])
        ```
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(f"there is no file {path}; give a .pkl file of OpenPCDet or mmdetection3d")
    check_input_file(path, "info file", most=LARGEST_PICKLE)
    try:
        return plain_content(path.read_bytes())
    except InvalidInput as error:
        raise InvalidInput(f"{path} was not read, and nothing in it was run: {error}") from error


def plain_content(data: bytes) -> Any:
    """Read a pickle that is in memory.

    Args:
        data: the pickle.

    Returns:
        What `read_plain_pickle` returns.

    Raises:
        InvalidInput: It is damaged or holds anything but plain data.
    """
    machine, file = _Machine(_MADE_OF * len(data) + _MADE_MORE), io.BytesIO(data)
    try:
        for count, (step, argument, _) in enumerate(pickletools.genops(file)):
            if count >= MOST_STEPS:
                raise InvalidInput(f"it has more than {MOST_STEPS:,} steps; split it")
            machine.take(step.name, argument)
        if not machine.stopped or len(machine.stack) != 1:
            raise InvalidInput("it is damaged: its end is missing; get it again")
        if left := len(data) - file.tell():
            raise InvalidInput(f"it goes on for {left:,} bytes after its end; give a file of one pickle")
        content = _finished(machine.stack[0])
        if _values(content, {}) > MOST_STEPS:
            raise InvalidInput(f"it names its own parts so often that it stands for more than {MOST_STEPS:,} values")
    except InvalidInput:
        raise
    except _DAMAGE as error:
        raise InvalidInput(f"it is damaged or no pickle ({shown(str(error))[:200]}); get it again") from error
    return content


def _values(value: Any, known: dict[int, int]) -> int:
    """How many values a container has when it is printed or copied: a part that is in it twice counts twice."""
    if not isinstance(value, dict | list | tuple):
        return 1
    if id(value) not in known:  # a list that holds itself recurses to Python's limit, which is damage
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(value)]


def _finished(value: Any) -> Any:
    if isinstance(value, _Callable):
        raise InvalidInput(f"it holds {shown(value)} itself and not plain data")
    if not isinstance(value, _Unfinished):
        return value
    if value.value is None:
        raise InvalidInput("it is damaged: an array has no content; get it again")
    return value.value


class _Machine:
    """The stack machine of pickles, with the steps of plain data alone."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.stopped = False
        self.made = 0

    def take(self, step: str, argument: Any) -> None:
        """Do one step, or refuse it."""
        if step in _VALUES:
            self.stack.append(argument if _VALUES[step] is None else _VALUES[step]())  # type: ignore[misc]
        elif step in ("PROTO", "FRAME"):
            pass
        elif step in _STEPS:
            _STEPS[step](self, argument)
        else:
            raise InvalidInput(f"it has the step {step}, which plain data does not need")

    def pop(self) -> Any:
        return _finished(self.stack.pop())

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        taken = [_finished(value) for value in self.stack[start:]]
        del self.stack[start:]
        return taken

    def top(self, kind: type) -> Any:
        value = _finished(self.stack[-1])
        if not isinstance(value, kind):
            raise InvalidInput(f"it is damaged: a {kind.__name__} was expected, found {type(value).__name__}")
        return value

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def stop(self, _: Any) -> None:
        self.stopped = True

    def put(self, place: Any) -> None:
        self.memo[len(self.memo) if place is None else int(place)] = self.stack[-1]

    def get(self, place: Any) -> None:
        self.stack.append(self.memo[int(place)])

    def ask(self, name: Any) -> None:
        if name is None:
            *_, module, attribute = self.stack
            del self.stack[-2:]
            name = f"{module} {attribute}"
        module, _, attribute = str(name).partition(" ")
        if (module, attribute) not in _KNOWN:
            raise InvalidInput(
                f"it asks for {shown(f'{module}.{attribute}')}, and only plain containers, numbers, texts and numpy's arrays are read. If "
                "you trust the file, load it with the program that wrote it and save lists and numpy arrays instead"
            )
        self.stack.append(_Callable(_KNOWN[module, attribute]))

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Callable) or not isinstance(arguments, tuple):
            raise InvalidInput("it is damaged: it calls something that is no function")
        self.spend(arguments)
        self.stack.append(_made(function, arguments))

    def spend(self, arguments: Any) -> None:
        """Count what something is made of: a file can name the same bytes again and again, and each array copies them."""
        self.made += sum(len(part) for part in arguments if isinstance(part, str | bytes | bytearray | list | dict))
        if self.made > self.most:
            raise InvalidInput(f"it makes more than {self.most:,} bytes out of its own parts")

    def build(self, _: Any) -> None:
        state = self.pop()
        self.spend(state)
        target = self.stack[-1]
        if not isinstance(target, _Unfinished) or target.value is not None:
            raise InvalidInput("it sets the inside of something that is no array")
        target.value = target.of(state)

    def append(self, _: Any) -> None:
        value = self.pop()
        self.top(list).append(value)

    def appends(self, _: Any) -> None:
        values = self.since_mark()
        self.top(list).extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.top(dict).update(_entries([key, value]))

    def set_items(self, _: Any) -> None:
        entries = _entries(self.since_mark())
        self.top(dict).update(entries)

    def add_items(self, _: Any) -> None:
        values = _plain_keys(self.since_mark())
        self.top(set).update(values)

    def as_tuple(self, count: int) -> None:
        taken = [self.stack.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(value if isinstance(value, _Callable) else _finished(value) for value in taken))

    def as_marked_tuple(self, _: Any) -> None:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        self.stack.append(tuple(value if isinstance(value, _Callable) else _finished(value) for value in taken))

    def as_dict(self, _: Any) -> None:
        self.stack.append(_entries(self.since_mark()))

    def drop(self, _: Any) -> None:
        self.stack.pop()

    def drop_mark(self, _: Any) -> None:
        self.since_mark()


def _entries(flat: list[Any]) -> dict[Any, Any]:
    """A dictionary of keys and values in turn."""
    return dict(zip(_plain_keys(flat[::2]), flat[1::2], strict=True))


def _plain_keys(keys: list[Any]) -> list[Any]:
    """Keys, or members of a set. Finding the place of a tuple takes as long as all that it holds, again and again."""
    if odd := next((key for key in keys if not isinstance(key, str | bytes | int | float | np.generic | None)), None):
        raise InvalidInput(f"it has a {type(odd).__name__} as a key, and only texts and numbers are read")
    return keys


def _made(function: str, arguments: tuple[Any, ...]) -> Any:
    """What one of the known functions of numpy and Python makes of its arguments, computed here."""
    if function == "array":
        return _Unfinished(_array)
    if function == "dtype":
        kind = _kind(arguments[0])
        made = _Unfinished(lambda state: _with_order(kind, state))
        return made
    if function == "scalar":
        kind, data = arguments
        return np.frombuffer(_bytes(data), kind, 1)[0]
    if function == "frombuffer":
        data, kind, shape, order = arguments
        return _laid_out(_bytes(data), kind, shape, order == "F")
    if function == "encode" and arguments[1] in ("latin1", "latin-1"):
        return str(arguments[0]).encode("latin-1")
    if function == "ordered":
        pairs: list[Any] = list(*arguments)
        _plain_keys([key for key, _ in pairs])
        return dict(pairs)
    if function == "set":
        return set(_plain_keys(list(*arguments)))
    if function == "bytes" and not arguments:
        return b""
    raise InvalidInput(f"it makes {shown(function)} of something else than plain data")


def _array(state: Any) -> Any:
    _, shape, kind, fortran, data = state
    if kind == np.dtype(object):
        if not isinstance(data, list) or math.prod(shape) != len(data):
            raise InvalidInput("it is damaged: an array of objects has another length than its shape says")
        return data if len(shape) == 1 else _nested(data, tuple(shape))
    return _laid_out(_bytes(data), kind, shape, bool(fortran))


def _nested(values: list[Any], shape: tuple[int, ...]) -> Any:
    """Values of an array of objects as lists of lists."""
    if len(shape) <= 1:
        return values if shape else values[0]
    step = len(values) // shape[0] if shape[0] else 0
    return [_nested(values[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def _laid_out(data: bytes, kind: np.dtype[Any], shape: tuple[int, ...], fortran: bool) -> np.ndarray:
    """An array of bytes that are there: nothing is allocated for a shape that the file only claims."""
    if not isinstance(kind, np.dtype) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise InvalidInput("it is damaged: an array has no type or no shape")
    if math.prod(shape) * kind.itemsize != len(data):
        raise InvalidInput(f"it is damaged: an array {tuple(shape)} of {kind} has {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C").copy()


def _kind(text: Any) -> np.dtype[Any]:
    if not isinstance(text, str) or _ARRAY_KINDS.match(text) is None:
        raise InvalidInput(
            f"it holds an array of {shown(str(text)) if isinstance(text, str) else type(text).__name__}, and only numbers and texts are read"
        )
    return np.dtype(text)


def _with_order(kind: np.dtype[Any], state: Any) -> np.dtype[Any]:
    if not isinstance(state, tuple) or len(state) < 3 or any(part is not None for part in state[2:5]):
        raise InvalidInput("it holds an array of records, and only numbers and texts are read")
    return kind.newbyteorder(state[1]) if state[1] in ("<", ">") else kind


def _bytes(data: Any) -> bytes:
    if isinstance(data, str):  # written by Python 2
        return data.encode("latin-1")
    if not isinstance(data, bytes | bytearray):
        raise InvalidInput("it is damaged: the content of an array is missing")
    return bytes(data)


_DAMAGE = (
    *(ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError),
    *(RecursionError, MemoryError),
)
"""What the steps of a damaged file raise."""

_KNOWN = (
    {(module, "_reconstruct"): "array" for module in _NUMPY}
    | {(module, "scalar"): "scalar" for module in _NUMPY}
    | {(module, "_frombuffer"): "frombuffer" for module in _NUMPY}
    | {(module, "set"): "set" for module in ("builtins", "__builtin__")}
    | {(module, "bytes"): "bytes" for module in ("builtins", "__builtin__")}
    | {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): "dtype"}
    | {("_codecs", "encode"): "encode", ("collections", "OrderedDict"): "ordered"}
)
"""What a file may ask for, by module and name, and our word for it."""

_VALUES: dict[str, Callable[[], Any] | None] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")),
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
}
"""Steps that put a value on the stack: their argument, or what the function makes."""

_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "STOP": _Machine.stop,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Machine.ask),
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.stack.append(frozenset(_plain_keys(machine.since_mark()))),
    "DICT": _Machine.as_dict,
    "TUPLE": _Machine.as_marked_tuple,
    "TUPLE1": lambda machine, _: machine.as_tuple(1),
    "TUPLE2": lambda machine, _: machine.as_tuple(2),
    "TUPLE3": lambda machine, _: machine.as_tuple(3),
}
