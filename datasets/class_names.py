"""Which labeled objects belong to which class: the one rule of class names, for every layout.

* **Case does not matter**, as in KITTI's own evaluation: a label `car` belongs to the class `Car`. Nothing else is guessed.
* A class map gives a type of the labels another name: `Vehicle` becomes `Car`.
* A class that the user asks for and that occurs in no label is an error, which names the nearest type that does occur. For classes
  that nobody asked for by name (a command's default) it is a warning.
* No object of any class, although the labels hold objects, is always an error.
* Types that no class wants are dropped and counted.

Read next: `raw.py`, which applies the rule before it reads a scan; `core/ledger.py`, which holds the counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from functools import cached_property

from ..core.errors import InvalidInput
from ..core.foreign_text import LONGEST_NAME, shown

_NEAR = 0.8  # likeness from which a dropped type is taken for a misspelling of a class
_OF_BENCHMARKS = frozenset(
    (
        "van",
        "truck",
        "tram",
        "misc",
        "person_sitting",
        "bus",
        "trailer",
        "motorcyclist",
        "bicycle",
        "motorcycle",
        "sign",
        "animal",
    )
)
"""Types that are no misspelling, whatever they are like."""


def check_class_names(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse names that no class can have.

    Args:
        classes: Names of the classes to learn, in order.

    Returns:
        The same names.

    Raises:
        InvalidInput: There is no name, a name is empty or too long, has blanks or quotes around it or inside it, occurs twice
            (in any case), or is DontCare.
    """
    if isinstance(classes, str):
        raise InvalidInput(
            f"classes must be a tuple of names, found the text {shown(repr(classes))}; write ({shown(repr(classes))},)"
        )
    if not classes:
        raise InvalidInput("no class is named; name at least one (--classes Car)")
    seen: dict[str, str] = {}
    for name in classes:
        if not isinstance(name, str) or not name or len(name) > LONGEST_NAME or shown(name, most=LONGEST_NAME) != name:
            raise InvalidInput(f"{shown(repr(name))} cannot be the name of a class; give one printable word, such as Car")
        if any(c.isspace() or c in "\"'`,;" for c in name):
            raise InvalidInput(
                f"the class name {shown(repr(name))} holds a blank, a quotation mark or a comma; write names apart and without quotes: "
                "--classes Car Pedestrian"
            )
        if is_dont_care(name):
            raise InvalidInput(f"{name} is no class: it marks regions in which nobody labeled; leave it out of the classes")
        if name.casefold() in seen:
            other = seen[name.casefold()]
            raise InvalidInput(f"the classes name {other} twice ({' '.join(map(shown, classes))}); case does not matter")
        seen[name.casefold()] = name
    return classes


def is_dont_care(kind: str) -> bool:
    """Say whether a type is KITTI's DontCare, in any case: a region in which nobody labeled, so no object and no class.

    Args:
        kind: Type of a label file.

    Returns:
        True for DontCare.
    """
    return kind.casefold() == "dontcare"


@dataclass(frozen=True)
class ClassRule:
    """Classes and class map of a dataset: it says which class an object of some type has.

    Raises:
        InvalidInput: A class name cannot be used, or the map leads to no class.
    """

    classes: tuple[str, ...]
    """Names of the classes; their order gives the class numbers."""
    class_map: Mapping[str, str] = field(default_factory=dict)
    """Type of the labels -> class. Types that it does not name keep their own name."""
    own_names: bool = True
    """Whether a type that the map does not name may be a class by its own name. False where the map is complete (Lyft, nuScenes)."""

    def __post_init__(self) -> None:
        check_class_names(self.classes)
        known = {name.casefold() for name in self.classes}
        for kind, name in self.class_map.items():
            if name.casefold() not in known:
                raise InvalidInput(
                    f"the class map leads from {shown(kind)} to {shown(name)}, which is none of the classes "
                    f"{', '.join(self.classes)}{nearest(name, self.classes)}"
                )
        if len({kind.casefold() for kind in self.class_map}) < len(self.class_map):
            raise InvalidInput(
                f"the class map names a type twice ({', '.join(map(shown, self.class_map))}); case does not matter"
            )

    @cached_property
    def _numbers(self) -> dict[str, int]:
        numbers = {name.casefold(): i for i, name in enumerate(self.classes)}
        own = numbers if self.own_names else {}
        return {**own, **{kind.casefold(): numbers[name.casefold()] for kind, name in self.class_map.items()}}

    def number(self, kind: str) -> int | None:
        """Say which class an object has.

        Args:
            kind: Type of the object in the labels.

        Returns:
            Number of the class, or None where no class wants it.
        """
        return self._numbers.get(kind.casefold())


def compare_types(
    rule: ClassRule, types: Mapping[str, int], *, asked: bool, map_asked: bool = False, allow_absent: bool = False
) -> tuple[str, ...]:
    """Compare the classes of a dataset with the types that occur in its labels.

    Args:
        rule: Classes and class map.
        types: Number of objects by type, as spelled in the labels, DontCare left out.
        asked: Whether the user named these classes; then an absent one is an error.
        map_asked: Whether the user gave the class map; then a type of it that is absent is an error.
        allow_absent: Whether absent classes are all right (`--allow-absent-classes`).

    Returns:
        Warnings: absent classes where they are allowed, several spellings of a class, and dropped types that look like a class.

    Raises:
        InvalidInput: A class or a type of the class map is absent, or no object has any class although there are objects.
    """
    found = [0] * len(rule.classes)
    spellings: list[list[str]] = [[] for _ in rule.classes]
    for kind, count in types.items():
        number = rule.number(kind)
        if number is not None:
            found[number] += count
            spellings[number].append(kind)
    dropped = {kind: count for kind, count in types.items() if rule.number(kind) is None}
    there = f"the labels hold {_listed(types)}" if types else "the labels hold no object"
    present = {kind.casefold() for kind in types}
    unused = [kind for kind in rule.class_map if kind.casefold() not in present]
    absent = [name for name, count in zip(rule.classes, found) if not count]
    if dropped and not any(found):
        raise InvalidInput(
            f"no labeled object is of the class {' or '.join(rule.classes)}, so every object would count as background: {there}"
            f"{_hint(absent[0], tuple(dropped))}"
        )
    warnings: list[str] = []
    if absent:
        what = f"the class {absent[0]} occurs" if len(absent) == 1 else f"the classes {' and '.join(absent)} occur"
        text = f"{what} in no label of these frames: {there}"
        if asked and not allow_absent:
            raise InvalidInput(
                f"{text}{_hint(absent[0], tuple(types))}. Leave it out of --classes, or give --allow-absent-classes if that is right"
            )
        warnings.append(text)
    if map_asked and unused and types and not allow_absent:
        raise InvalidInput(
            f"the class map names the type {shown(unused[0])}, which occurs in no label of these frames: {there}"
            f"{nearest(unused[0], tuple(types))}. Leave it out, or give --allow-absent-classes if that is right"
        )
    for name, names in zip(rule.classes, spellings):
        kinds = [kind for kind in names if kind.casefold() == name.casefold()]
        if len(kinds) > 1:
            warnings.append(
                f"the labels spell the class {name} in {len(kinds)} ways ({_listed({k: types[k] for k in kinds})}); case does not "
                "matter, so all of them are kept"
            )
    for kind, count in dropped.items():
        near = _misspelt(kind, rule.classes)
        if near is not None:
            warnings.append(
                f"{count} objects of the type {shown(kind)} are dropped, which looks like the class {near}; "
                f"--class-map {shown(kind)} {near} keeps them"
            )
    return tuple(warnings)


def spelled_map(class_map: Mapping[str, str], types: tuple[str, ...], classes: tuple[str, ...]) -> dict[str, str]:
    """Spell a class map as a reader that compares names exactly needs it.

    Args:
        class_map: Type -> class, in any case.
        types: All types, as the labels spell them.
        classes: The classes, as the user spells them.

    Returns:
        The map, with types and classes spelled like that; what is unknown keeps its spelling.
    """
    kinds, names = ({name.casefold(): name for name in known} for known in (types, classes))
    return {kinds.get(kind.casefold(), kind): names.get(name.casefold(), name) for kind, name in class_map.items()}


def nearest(name: str, known: tuple[str, ...]) -> str:
    """Write a hint for a name that does not exist.

    Args:
        name: The name.
        known: The names that exist.

    Returns:
        "; did you mean 'Car'?", or an empty text where none is near.
    """
    near = _nearest_name(name, known)
    return "" if near is None else f"; did you mean {shown(repr(near), most=60)}?"


def _nearest_name(name: str, known: tuple[str, ...]) -> str | None:
    plain = {_plain(k): k for k in known}
    near = get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    return plain[near[0]] if near else None


def _hint(absent: str, found: tuple[str, ...]) -> str:
    near = _nearest_name(absent, found)
    if near is not None:
        return f"; the nearest is {shown(near, most=60)}: did you mean --classes {shown(near, most=60)}, or --class-map {shown(near, most=60)} {absent}?"
    return f"; --class-map TYPE {absent} gives a type of the labels this name" if found else ""


def _misspelt(kind: str, classes: tuple[str, ...]) -> str | None:
    plain = _plain(kind)
    if plain in _OF_BENCHMARKS:
        return None
    likeness = {
        name: 1.0 if _two_swapped(plain, _plain(name)) else SequenceMatcher(None, plain, _plain(name)).ratio() for name in classes
    }
    best = max(likeness, key=lambda name: likeness[name])
    return best if likeness[best] >= _NEAR else None


def _two_swapped(one: str, other: str) -> bool:
    """Whether two words differ by two neighboring letters that changed places: `Cra` is Car."""
    apart = [i for i, (a, b) in enumerate(zip(one, other)) if a != b]
    if len(one) != len(other) or len(apart) != 2 or apart[1] != apart[0] + 1:
        return False
    i, j = apart
    return (one[i], one[j]) == (other[j], other[i])


def _plain(name: str) -> str:
    """A name without case, quotation marks and the like, for comparing: `"Car",` is near to Car."""
    return "".join(c for c in name.casefold() if c.isalnum() or c in "_.") or name.casefold()


def _listed(types: Mapping[str, int], most: int = 12) -> str:
    """Types with their counts, the most frequent first."""
    ranked = sorted(types.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{shown(kind, most=60)} {count}" for kind, count in ranked[:most]]
    return ", ".join(words) + (f" and {len(ranked) - most} types more" if len(ranked) > most else "")
