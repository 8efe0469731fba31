"""Damage to the bytes of a valid file: of the kind that disks and networks do, and of the kind that people and programs do.

`mutate(data, suffix, rng)` chooses one. Bytes are changed anywhere; fields are changed in files whose form is known (JSON, text,
safetensors, npy), because a byte in the middle of numbers seldom makes a *plausible* wrong file.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

NASTY_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, -1e308, 2**31, 2**63, 10**40, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "nan", "1e999", "\x1b[2J", "[/x]", "é点", "a" * 5000, [], {}, [[]], [None], {"a": 1}, [0] * 1000,
)  # fmt: skip
"""What a changed field may hold instead: other types, edges of numbers, text that is dangerous to show or to use as a path."""
NASTY_WORDS = (
    b"nan", b"inf", b"-inf", b"1e308", b"-1", b"0", b"", b"x", b"1e999", b"99999999999999999999", b"\xff\xfe", b"\xef\xbb\xbf", b"\x00",
    b"\xe9", b"\x1b[2J", b"../..", b"1,5", b"0x10", b"1_000", b"\t", b"  ", b"\r", b"DontCare", b"a" * 3000, b"\xe2\x80\xae",
)  # fmt: skip
"""What a changed word of a text file may be."""


def mutate(data: bytes, suffix: str, rng: random.Random) -> bytes:
    """Damage a file once or twice.

    Args:
        data: The valid file.
        suffix: Its suffix, which says which fields can be changed.
        rng: Source of randomness.

    Returns:
        Other bytes (in rare cases the same).
    """
    changers: list[Callable[[bytes, random.Random], bytes]] = list(_BYTE_WISE)
    fields = _FIELD_WISE.get(suffix)
    if fields is not None:
        changers += [fields] * len(_BYTE_WISE)  # half of all
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = rng.choice(changers)(data, rng)
    return data


# ---- bytes


def _flip_bit(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _set_bytes(data: bytes, rng: random.Random) -> bytes:
    at, length = _range(data, rng, 8)
    return data[:at] + bytes(rng.choice((0, 255, rng.randrange(256))) for _ in range(length)) + data[at + length :]


def _cut_off(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, len(data) // 2, max(len(data) - 1, 0), rng.randrange(len(data) + 1)))]


def _delete(data: bytes, rng: random.Random) -> bytes:
    at, length = _range(data, rng, 64)
    return data[:at] + data[at + length :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at, length = _range(data, rng, 256)
    return data[: at + length] + data[at : at + length] * rng.choice((1, 3)) + data[at + length :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 40))) + data[at:]


def _append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0" * 512, b"\n", rng.randbytes(7), data))


def _swap(data: bytes, rng: random.Random) -> bytes:
    (a, length), b = _range(data, rng, 64), rng.randrange(len(data) + 1)
    first, second = sorted((a, b))
    if first + length > second or second + length > len(data):
        return data
    one, other = data[first : first + length], data[second : second + length]
    return data[:first] + other + data[first + length : second] + one + data[second + length :]


def _zero_half(data: bytes, _rng: random.Random) -> bytes:
    return data[: len(data) // 2] + b"\0" * (len(data) - len(data) // 2)


def _other_file(_data: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        (
            b"",
            b"\0" * 4096,
            b"<!DOCTYPE html><html>404</html>",
            b"version https://git-lfs.github.com/spec/v1\n",
            b"[" * 100_000,
            b"{}",
            b"null",
        )
    )


_BYTE_WISE = (_flip_bit, _flip_bit, _set_bytes, _cut_off, _delete, _repeat, _insert, _append, _swap, _zero_half, _other_file)


def _range(data: bytes, rng: random.Random, longest: int) -> tuple[int, int]:
    at = rng.randrange(len(data) + 1)
    return at, min(rng.randint(1, longest), len(data) - at)


# ---- fields


def _json_field(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _flip_bit(data, rng)
    value = _changed(value, rng)
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    except RecursionError:
        return data
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:  # a key that stands twice
        text = '{"version": 7, ' + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """Change one node, at any depth."""
    if isinstance(value, dict) and value and (depth < 8 and rng.random() < 0.85):
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.15:
            return {**value, rng.choice(("x", "", "__class__", key + "_")): rng.choice(NASTY_VALUES)}
        if action < 0.2:
            return {(k if k != key else k.upper()): v for k, v in value.items()}
        return {**value, key: _changed(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and (depth < 8 and rng.random() < 0.85):
        at, action = rng.randrange(len(value)), rng.random()
        if action < 0.1:
            return value[:at] + value[at + 1 :]
        if action < 0.2:
            return value[: at + 1] + value[at:]
        if action < 0.25:
            return value[::-1]
        return [*value[:at], _changed(value[at], rng, depth + 1), *value[at + 1 :]]
    if isinstance(value, bool) or not isinstance(value, int | float) or rng.random() < 0.5:
        if isinstance(value, str) and rng.random() < 0.3:
            return rng.choice((value + "x", value[:-1], value.upper(), value * 2, value[::-1]))
        return rng.choice(NASTY_VALUES)
    return rng.choice((value + 1, value - 1, -value, value * 10, value * 1e6, float(value), str(value)))


def _text_word(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        return b"\n".join(
            rng.choice((lines[:at] + lines[at + 1 :], lines[: at + 1] + lines[at:], lines[::-1], [b"#" + x for x in lines]))
        )
    words = list(re.finditer(rb"[^\s,]+", data))
    if not words:
        return data + rng.choice(NASTY_WORDS)
    word = rng.choice(words)
    new = rng.choice((*NASTY_WORDS, word[0] + b"0", word[0] * 2, b"-" + word[0], word[0].lower(), word[0].upper()))
    return data[: word.start()] + new + data[word.end() :]


def _safetensors_header(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if length > len(data):
        return _flip_bit(data, rng)
    changed = _json_field(header, rng)
    if rng.random() < 0.5:  # a change inside the JSON that stands as text in the metadata
        try:
            parsed = json.loads(header)
            meta = parsed.get("__metadata__", {})
            name = rng.choice(sorted(meta))
            parsed["__metadata__"] = {**meta, name: _json_field(meta[name].encode(), rng).decode("utf-8", "replace")}
            changed = json.dumps(parsed).encode()
        except (ValueError, IndexError, AttributeError, RecursionError, TypeError):
            pass
    changed += b" " * (-len(changed) % 8)
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def _npy_header(data: bytes, rng: random.Random) -> bytes:
    for old, new in rng.sample(
        [
            (b"'<f4'", b"'|O'"),
            (b"'<f4'", b"'>f8'"),
            (b"False", b"True"),
            (b"(", b"(99999999, "),
            (b", ", b", -"),
            (b"'descr'", b"'x'"),
        ],
        1,
    ):
        data = data.replace(old, new, 1)
    return data


def _parquet_value(data: bytes, rng: random.Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
        column = rng.randrange(table.num_columns)
        name, values = table.column_names[column], table.column(column).to_pylist()
        if rng.random() < 0.2:
            table = table.drop_columns([name])
        elif values:
            at = rng.randrange(len(values))
            values[at] = _changed(values[at], rng)
            field = table.schema.field(column)
            table = table.set_column(column, field, pa.array(values, field.type))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        return sink.getvalue().to_pybytes()
    except (pa.ArrowException, ValueError, TypeError, OverflowError, OSError):
        return _flip_bit(data, rng)


_FIELD_WISE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": _json_field,
    ".txt": _text_word,
    ".csv": _text_word,
    ".pcd": _text_word,
    ".yaml": _text_word,
    ".safetensors": _safetensors_header,
    ".npy": _npy_header,
    ".parquet": _parquet_value,
}
