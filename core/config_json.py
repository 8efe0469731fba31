"""Configurations as JSON and back: frozen dataclasses, nested, with tuples, Optionals, Literals, Unions and Paths.

The way back is strict: an unknown name is an error that suggests the nearest known one, and a wrong type is an error that says what
was expected. Nothing is looked up in a registry: the classes are read from the type hints.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import InvalidInput

C = TypeVar("C")
Json = Any
"""A value that JSON can hold: None, bool, number, string, list or dictionary with string keys."""

_LISTS = (tuple, list, collections.abc.Sequence)
_DICTS = (dict, collections.abc.Mapping)


def config_to_json(config: Any) -> dict[str, Json]:
    """Turn a configuration into plain JSON values.

    Args:
        config: Instance of a dataclass. A field whose type is a union of several dataclasses is stored with the name of its class
            under `kind`.

    Returns:
        Field names and values, nested like the configuration.

    Raises:
        InvalidInput: It is not a dataclass, or holds a value that JSON cannot keep.

    Example:
        >>> from upcycle3d.core.cut import KeypointSpec
        >>> config_to_json(KeypointSpec(count=2048, channels=128))
        {'count': 2048, 'channels': 128, 'source': 'voxel_centers'}
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise InvalidInput(f"a configuration must be an instance of a dataclass, found a {type(config).__name__}")
    encoded: dict[str, Json] = _encode(config, type(config), "")
    return encoded


def config_from_json(cls: type[C], data: Mapping[str, Json]) -> C:
    """Make a configuration of JSON values, the inverse of `config_to_json`.

    Args:
        cls: The dataclass to make.
        data: Names and values, from `config_to_json` or a YAML file of the same form.

    Returns:
        An instance of `cls`, which has checked itself.

    Raises:
        InvalidInput: An unknown name, a missing one without default, a value of a wrong type, or one that `cls` refuses.
    """
    decoded: C = _decode(data, cls, "")
    return decoded


def fields_from_json(cls: type[Any], data: Mapping[str, Json]) -> dict[str, Any]:
    """Make only the fields that JSON values name, of a configuration whose other fields come from somewhere else.

    Args:
        cls: The dataclass whose fields they are.
        data: Names and values of some of its fields.

    Returns:
        The values by name, each as `config_from_json` would make it.

    Raises:
        InvalidInput: An unknown name, or a value of a wrong type.
    """
    _check_names(data, cls, "")
    hints: dict[str, Any] = typing.get_type_hints(cls)
    return {key: _decode(value, hints[key], f"{key}.") for key, value in data.items()}


def config_stored_in(path: Path, cls: type[C], data: Json, advice: str) -> C:
    """Make a configuration of the description that a file holds, and say which file it was if that fails.

    Args:
        path: The file.
        cls: The dataclass to make.
        data: Its description.
        advice: What a person can do; ends the message.

    Returns:
        An instance of `cls`, which has checked itself.

    Raises:
        InvalidInput: As for `config_from_json`, or the description is no object.
    """
    if not isinstance(data, dict):
        raise InvalidInput(f"the description in {path} is a {type(data).__name__}, not an object; {advice}")
    try:
        return config_from_json(cls, data)
    except InvalidInput as error:
        raise InvalidInput(f"the description in {path} cannot be used: {error}; {advice}") from error


def fill_defaults(stored: Json, config: Any) -> Json:
    """Add to a stored configuration the fields that it lacks because it was stored before they existed, with their defaults.

    Args:
        stored: What `config_to_json` gave for an earlier form of the configuration.
        config: A configuration of today's form; only its classes are looked at.

    Returns:
        `stored` with the missing fields that have a default.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type) or not isinstance(stored, dict):
        return stored
    filled = dict(stored)
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if field.name in filled:
            filled[field.name] = fill_defaults(filled[field.name], getattr(config, field.name))
        elif field.default is not dataclasses.MISSING:
            filled[field.name] = _encode(field.default, hints[field.name], f"{field.name}.")
        elif field.default_factory is not dataclasses.MISSING:
            filled[field.name] = _encode(field.default_factory(), hints[field.name], f"{field.name}.")
    return filled


def first_difference(old: Json, new: Json, where: str = "", *, names: tuple[str, str] = ("stored", "now")) -> str | None:
    """Find the first place where two JSON values differ.

    Args:
        old: One value.
        new: The other value.
        where: Path of the two values inside a larger one, ending in a dot.
        names: What the message calls the two.

    Returns:
        A text such as `"train.lr: stored 0.1, now 0.2"`, or None where they are equal.
    """
    first, second = names
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            if key not in new:
                return f"{where}{key}: {first} {_short(old[key])}, {second} unknown"
            if key not in old:
                return f"{where}{key}: not {first}, {second} {_short(new[key])}"
            found = first_difference(old[key], new[key], f"{where}{key}.", names=names)
            if found:
                return found
        return None
    return None if old == new else f"{where[:-1]}: {first} {_short(old)}, {second} {_short(new)}"


def _encode(value: Any, hint: Any, where: str) -> Json:
    options = _options(hint)
    if dataclasses.is_dataclass(value):
        cls: Any = type(value)
        hints = _hints(cls)
        tag = {"kind": type(value).__name__} if sum(dataclasses.is_dataclass(o) for o in options) > 1 else {}
        body = {f.name: _encode(getattr(value, f.name), hints[f.name], f"{where}{f.name}.") for f in dataclasses.fields(value)}
        return {**tag, **body}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no infinity
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, tuple | list):
        hints_of = (_element_hints(o, len(value)) for o in options if typing.get_origin(o) in _LISTS)
        elements = next((h for h in hints_of if h is not None), [Any] * len(value))
        return [_encode(v, h, f"{where}{i}.") for i, (v, h) in enumerate(zip(value, elements, strict=True))]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        element = next((typing.get_args(o)[1] for o in options if typing.get_origin(o) in _DICTS), Any)
        return {k: _encode(v, element, f"{where}{k}.") for k, v in value.items()}
    raise InvalidInput(f"the configuration field {where[:-1]!r} holds a {type(value).__name__}, which JSON cannot keep")


def _decode(data: Json, hint: Any, where: str) -> Any:
    options = _options(hint)
    classes = [o for o in options if dataclasses.is_dataclass(o)]
    if isinstance(data, Mapping) and classes:
        return _decode_dataclass(data, classes, where)
    for option in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if option is Any or (option is type(None) and data is None):
            return data
        if origin is Literal and any(data == a and type(data) is type(a) for a in arguments):
            return data
        if option in (bool, int, str) and type(data) is option:
            return data
        if option is float and (type(data) in (int, float) or data in ("inf", "-inf", "nan")):
            return _finite(data, where)
        if option is Path and isinstance(data, str):
            return Path(data)
        if origin in _LISTS and isinstance(data, list | tuple):
            elements = _element_hints(option, len(data))
            if elements is not None:
                decoded = [_decode(v, h, f"{where}{i}.") for i, (v, h) in enumerate(zip(data, elements, strict=True))]
                return decoded if origin is list else tuple(decoded)
        if origin in _DICTS and isinstance(data, Mapping):
            return {k: _decode(v, arguments[1], f"{where}{k}.") for k, v in data.items()}
    wanted = [text for option in options for text in _texts_of(option)]
    choice = wanted[0] if len(wanted) == 1 else f"{', '.join(wanted[:-1])} or {wanted[-1]}"
    raise InvalidInput(f"{where[:-1] or 'the configuration'} must be {choice}, found {_short(data)}")


def _finite(data: Json, where: str) -> float:
    try:
        return float(data)
    except OverflowError:
        raise InvalidInput(f"{where[:-1]} must be float, found a whole number of {len(str(data))} digits") from None


def _texts_of(option: Any) -> list[str]:
    """What a message calls a type: each value of a `Literal`, else its name, with the entries of a dataclass."""
    if typing.get_origin(option) is Literal:
        return [repr(a) for a in typing.get_args(option)]
    if option is type(None):
        return ["None"]
    if dataclasses.is_dataclass(option):
        return [f"{getattr(option, '__name__', option)} with the entries {', '.join(f.name for f in dataclasses.fields(option))}"]
    return [str(option) if typing.get_args(option) else getattr(option, "__name__", str(option))]


def _short(data: Json) -> str:
    text = repr(data)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _decode_dataclass(data: Mapping[str, Json], classes: Sequence[Any], where: str) -> Any:
    cls = classes[0]
    if len(classes) > 1:
        by_name = {c.__name__: c for c in classes}
        kind = str(data.get("kind"))
        if kind not in by_name:
            raise InvalidInput(f"`{where}kind` cannot be {kind!r}{_suggestion(kind, by_name, '')}")
        cls, data = by_name[kind], {k: v for k, v in data.items() if k != "kind"}
    fields = _check_names(data, cls, where)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in data:
            raise InvalidInput(f"the option `{where}{key}` of {cls.__name__} is missing and has no default")
    hints = _hints(cls)
    return cls(**{key: _decode(value, hints[key], f"{where}{key}.") for key, value in data.items()})


def _check_names(data: Mapping[str, Json], cls: Any, where: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass by name, after refusing names that are none of them."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in fields:
            raise InvalidInput(f"unknown option `{where}{key}` of {cls.__name__}{_suggestion(key, fields, where)}")
    return fields


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Types of a dataclass' fields. Finding them takes 0.5 ms, and every prepared frame has a ledger."""
    return typing.get_type_hints(cls)


def _options(hint: Any) -> list[Any]:
    """The members of a union (flat), or the hint itself; `Annotated` is looked through."""
    if typing.get_origin(hint) is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [o for member in typing.get_args(hint) for o in _options(member)]
    return [hint]


def _element_hints(option: Any, count: int) -> list[Any] | None:
    """Types of `count` elements of a tuple or list type; None if it is a tuple of another length."""
    arguments = typing.get_args(option)
    if typing.get_origin(option) is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return list(arguments) if len(arguments) == count else None
    return [arguments[0]] * count


def _suggestion(name: str, known: Iterable[str], where: str) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean `{where}{near[0]}`?" if near else f"; known are {sorted(names)}"
