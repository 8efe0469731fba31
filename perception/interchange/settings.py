"""The settings of another program's configuration, and a record of which of them had a counterpart here.

Whoever translates a configuration takes the settings that decide the network one by one. What is left at the end has no counterpart,
and the user sees that list: no setting is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ..models.detectors import DetectorConfig

Program = Literal["openpcdet", "mmdet3d"]
"""Whose files and weights."""
T = TypeVar("T")
_MOST_TEXT = 60
_NOTHING = "there is no such setting here"


@dataclass(frozen=True, kw_only=True)
class LeftOver:
    """A setting, or a group of them, without counterpart."""

    setting: str
    """Its place in the other program's configuration, such as `OPTIMIZATION`."""
    value: str
    """Its value, or how many settings the group has."""
    why: str
    """What it means for the detector here."""


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """What a configuration of another program says in our words."""

    detector: DetectorConfig
    """The detector that it describes."""
    left_over: tuple[LeftOver, ...]
    """What has no counterpart."""
    without_iou_head: bool
    """Whether it describes SECOND, which has no IoU head."""


class Settings:
    """Nested dictionaries and lists, of which parts are taken."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        """Hold settings of which nothing is taken yet.

        Args:
            values: the settings.
            source: the file, for messages.
        """
        self.values, self.source = values, source
        self._taken: list[str] = []

    def has(self, path: str) -> bool:
        """Whether a setting is there.

        Args:
            path: names and list positions, joined by dots.

        Returns:
            True if it is.
        """
        try:
            self._find(path)
        except InvalidInput:
            return False
        return True

    def is_list(self, path: str) -> bool:
        """Whether a setting is a list, without taking it.

        Args:
            path: its place.

        Returns:
            True for a list or a tuple.
        """
        return isinstance(self._find(path), list | tuple)

    def names(self, path: str, field: str) -> list[Any]:
        """Look at one field of every entry of a list, without taking anything.

        Args:
            path: the list.
            field: the field.

        Returns:
            Its value in each entry, None where an entry has none.

        Raises:
            InvalidInput: There is no such list.
        """
        entries = self._find(path)
        if not isinstance(entries, list | tuple):
            raise InvalidInput(f"{path} in {self.source} must be a list, found {shown(repr(entries))[:200]}")
        return [entry.get(field) if isinstance(entry, Mapping) else None for entry in entries]

    def take(self, path: str, kind: type[T], default: T | None = None) -> T:
        """Take a setting.

        Args:
            path: names and list positions, joined by dots.
            kind: what it must be; a whole number is a number too.
            default: its value where it is not there, the other program's own default. None where it must be there.

        Returns:
            The value; lists and tuples come as lists.

        Raises:
            InvalidInput: It is missing or of another kind.
        """
        if default is not None and not self.has(path):
            return default
        value = self._find(path)
        self._taken.append(path)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is list and isinstance(value, tuple):
            value = list(value)
        if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
            raise InvalidInput(f"{path} in {self.source} must be a {kind.__name__}, found {shown(repr(value))[:200]}")
        return value

    def numbers(self, path: str, count: int, default: Sequence[float] | None = None) -> tuple[float, ...]:
        """Take a list of numbers of fixed length.

        Args:
            path: its place.
            count: how many numbers it has.
            default: its value where it is not there.

        Returns:
            The numbers.

        Raises:
            InvalidInput: It is missing, of another length, or holds something else.
        """
        values = self.take(path, list, None if default is None else list(default))
        if len(values) != count or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise InvalidInput(f"{path} in {self.source} must be {count} numbers, found {shown(repr(values))[:200]}")
        return tuple(float(v) for v in values)

    def expect(self, path: str, *allowed: object, why: str) -> None:
        """Refuse a value that would make another network than the one that is built here.

        Args:
            path: its place. A setting that is not there is what the first allowed value is.
            *allowed: the values that are supported.
            why: what is supported, for the message.

        Raises:
            InvalidInput: It has another value.
        """
        if not self.has(path):
            return
        value = self._find(path)
        self._taken.append(path)
        plain = list(value) if isinstance(value, tuple) else value
        if plain not in allowed:
            raise InvalidInput(
                f"{path} in {self.source} is {shown(repr(value))[:200]}, and {why}; such a detector cannot be imported"
            )

    def left_over(self, detector: str, groups: Mapping[str, str]) -> tuple[LeftOver, ...]:
        """List what nobody took.

        Args:
            detector: where the settings of the detector itself stand, such as "model".
            groups: why settings below a place have no counterpart, by the beginning of their path; "" for what is not of the detector.

        Returns:
            One entry for each group that is there, for each other setting of the detector, and for each other part of the file.
        """
        found: dict[str, list[tuple[str, Any]]] = {}
        for path, value in _leaves(self.values, ""):
            if not any(path == taken or path.startswith(f"{taken}.") or taken.startswith(f"{path}.") for taken in self._taken):
                own = path if path.startswith(f"{detector}.") else path.partition(".")[0]
                group = max((g for g in groups if path == g or path.startswith(f"{g}.")), key=len, default=own)
                found.setdefault(group, []).append((path, value))
        return tuple(
            LeftOver(
                setting=shown(group),
                value=f"{len(entries)} settings" if len(entries) > 1 else shown(repr(entries[0][1]))[:_MOST_TEXT],
                why=groups.get(group, _NOTHING if group.startswith(f"{detector}.") else groups[""]),
            )
            for group, entries in found.items()
        )

    def _find(self, path: str) -> Any:
        value: Any = self.values
        for part in path.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                raise InvalidInput(f"{self.source} has no {path}; give the configuration that the weights were trained with")
        return value


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        parts: list[tuple[object, Any]] = list(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
        parts = list(enumerate(value))
    else:
        return [(path, value)]
    return [leaf for name, entry in parts for leaf in _leaves(entry, f"{path}.{name}" if path else str(name))]
