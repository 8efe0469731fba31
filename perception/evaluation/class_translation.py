"""Names of classes from one protocol to another. Case never matters, as in KITTI's own program."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from ...core.errors import InvalidInput
from ...core.foreign_text import shown


def translate(name: str, names: Mapping[str, str]) -> str | None:
    """Translate a class name.

    Args:
        name: The name, in any case.
        names: A protocol's name by other names for the same class.

    Returns:
        The protocol's name, or None where the protocol does not know the class.
    """
    exact = names.get(name)
    return exact if exact is not None else {k.casefold(): v for k, v in names.items()}.get(name.casefold())


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.75) -> str | None:
    """Find the name that a misspelt one is likely to mean.

    Args:
        name: The name that nobody knows.
        known: The names that exist.
        cutoff: How like they must be, 0 to 1.

    Returns:
        The nearest of them, or None where none is near.
    """
    plain = {k.casefold(): k for k in known}
    letters = "".join(c for c in name[:100].casefold() if c.isalnum() or c == "_")
    near = difflib.get_close_matches(letters, plain, n=1, cutoff=cutoff)
    return plain[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Write a hint for a name that nobody knows.

    Args:
        name: The name.
        known: The names that exist.

    Returns:
        "; did you mean 'Car'?", or an empty text where no name is near.
    """
    near = nearest_name(name, known, cutoff=0.6)
    return f"; did you mean {shown(repr(near), most=60)}?" if near else ""


def spelled(asked: Sequence[str], names: Mapping[str, str], protocol: str) -> tuple[str, ...]:
    """Spell the classes that a user asks for as the protocol does.

    Args:
        asked: Names in any case.
        names: The protocol's name by other names for the same class.
        protocol: Name of the protocol, for the message.

    Returns:
        The protocol's names.

    Raises:
        InvalidInput: A name is unknown (the message lists all such names) or two mean the same class.
    """
    found = {name: translate(name, names) for name in asked}
    unknown = [name for name, known in found.items() if known is None]
    known = tuple(dict.fromkeys(names.values()))
    if unknown:
        listed = ", ".join(shown(repr(name), most=60) for name in unknown[:10])
        raise InvalidInput(
            f"{protocol} has no class {listed}{did_you_mean(unknown[0], names)}; its classes are {', '.join(known)}"
        )
    classes = tuple(name for name in found.values() if name is not None)
    if len(set(classes)) < len(asked) or not asked:
        raise InvalidInput(f"name each class once and at least one; found {' '.join(map(shown, asked)) or 'none'}")
    return classes
