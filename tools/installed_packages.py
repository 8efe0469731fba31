"""Which packages this program can use, and which of them are here: those it always needs, and those of each extra.

Read next: `doctor.py`, which prints them.
"""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_NAME = __package__.partition(".")[0]
_CORE = ""  # what no extra names


@dataclass(frozen=True, kw_only=True)
class WantedPackage:
    """A package that this program can use."""

    name: str
    """Name on the package index."""
    least: str
    """Lowest version, empty where any will do."""
    found: str | None
    """Version that is installed; None where it is not."""

    @property
    def state(self) -> str:
        """What a table says about it."""
        if self.found is None:
            return "not installed"
        return self.found if _numbers(self.found) >= _numbers(self.least) else f"{self.found}, needs {self.least} or newer"

    @property
    def serves(self) -> bool:
        """Whether it is installed and new enough."""
        return self.found is not None and _numbers(self.found) >= _numbers(self.least)


def wanted_packages() -> dict[str, list[WantedPackage]]:
    """List the packages of the program under an empty name, and those of each extra under its name.

    Returns:
        The packages by extra; empty where the program was installed in no known way.
    """
    return {extra: [_looked_up(text) for text in texts] for extra, texts in _requirements().items()}


def by_extra(requirements: Iterable[str]) -> dict[str, list[str]]:
    """Sort the requirements of an installed package by the extra that names them.

    Args:
        requirements: What its metadata say, such as `wandb>=0.31; extra == "wandb"`.

    Returns:
        Requirements without their extra; those that are always needed under an empty name.
    """
    found: dict[str, list[str]] = {_CORE: []}
    for text in requirements:
        extra = re.search(r"""extra == ['"]([\w.-]+)['"]""", text)
        found.setdefault(extra[1] if extra else _CORE, []).append(text)
    return found


def _requirements() -> Mapping[str, list[str]]:
    """Of the checkout that this code lies in, whose metadata may be older than its files; else of the installed package."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        described = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if described.get("name") == _NAME:
            return {_CORE: described["dependencies"], **described.get("optional-dependencies", {})}
    try:
        return by_extra(importlib.metadata.requires(_NAME) or [])
    except importlib.metadata.PackageNotFoundError:
        return {}


def _looked_up(requirement: str) -> WantedPackage:
    wanted = requirement.partition(";")[0]  # without its marker
    name, lowest = re.split(r"[^\w.-]", wanted.strip(), maxsplit=1)[0], re.search(r">=\s*([\w.]+)", wanted)
    try:
        found: str | None = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    return WantedPackage(name=name, least="" if lowest is None else lowest[1], found=found)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu and 2.13.0rc1 are 2, 13, 0."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers is not None else ()
