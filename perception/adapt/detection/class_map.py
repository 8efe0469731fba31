"""What the class names of a target dataset mean to a detector: one of its classes, something unknown, or nothing to count.

`PAIRS` holds the meanings for each ordered pair of datasets; `pair_map` fits one to a detector's own names, `map_by_name` is for
data whose names are the detector's, and `changed_map` changes single names.

Class names: Waymo has Vehicle, Pedestrian, Sign, Cyclist; KITTI has Car, Van, Truck, Pedestrian, Person_sitting, Cyclist, Tram, Misc
and DontCare; Lyft has car, truck, bus, emergency_vehicle, other_vehicle, motorcycle, bicycle, pedestrian and animal. Waymo's Vehicle
already contains vans and trucks, so a van is no private class for a detector trained on Waymo, but it is one for a detector of
KITTI's cars. KITTI's official AP ignores Van for Car and Person_sitting for Pedestrian; AP alone would therefore hide such errors.

Read next: `proposal_matching.py`, which reads labels through a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ....core.errors import InvalidInput

UNKNOWN, IGNORE = "unknown", "ignore"


@dataclass(frozen=True, kw_only=True)
class ClassMap:
    """What each class of a target means to a model with C source classes.

    Raises:
        InvalidInput: A meaning is neither a source class nor `UNKNOWN` nor `IGNORE`, or source classes are not distinct.
    """

    source: tuple[str, ...]
    """The model's classes in order."""

    meaning: Mapping[str, str]
    """Target class -> a source class, `UNKNOWN` or `IGNORE`."""

    longest: Mapping[str, float] = field(default_factory=dict)
    """Target class -> length in m. Longer objects of the class are ignored, for a class that holds cars as well as buses."""

    def __post_init__(self) -> None:
        if not self.source or len(set(self.source)) != len(self.source) or {UNKNOWN, IGNORE} & set(self.source):
            raise InvalidInput(
                f"source classes must be distinct names other than {UNKNOWN} and {IGNORE}, found {', '.join(self.source) or 'none'}"
            )
        wrong = {n: m for n, m in self.meaning.items() if m not in (*self.source, UNKNOWN, IGNORE)}
        if wrong:
            raise InvalidInput(
                f"these target classes map to nothing known: {', '.join(f'{n}={m}' for n, m in wrong.items())}; a meaning is one of "
                f"{', '.join((*self.source, UNKNOWN, IGNORE))}"
            )

    @property
    def shared(self) -> tuple[int, ...]:
        """Source classes that the target has, ascending."""
        return tuple(i for i, name in enumerate(self.source) if name in self.meaning.values())

    def ids(self, names: Sequence[str]) -> np.ndarray:
        """Translate target classes into numbers.

        Args:
            names: N target classes.

        Returns:
            (N,) int64: 0..C-1 a source class, C unknown, -1 ignored.

        Raises:
            InvalidInput: The map lacks a class; the message names every such class.
        """
        missing = sorted(set(names) - self.meaning.keys())
        if missing:
            raise InvalidInput(
                f"the class map says nothing about {', '.join(missing)}; map each to one of "
                f"{', '.join((*self.source, UNKNOWN, IGNORE))}"
            )
        number = {**{name: i for i, name in enumerate(self.source)}, UNKNOWN: len(self.source), IGNORE: -1}
        return np.array([number[self.meaning[name]] for name in names], dtype=np.int64)


def map_by_name(source: tuple[str, ...], target: Sequence[str]) -> ClassMap:
    """Map every target class to the source class of the same name, and every other one to unknown.

    Args:
        source: The model's classes in order.
        target: The target's classes.

    Returns:
        The map.
    """
    return ClassMap(source=source, meaning={name: name if name in source else UNKNOWN for name in target})


def changed_map(base: ClassMap, target: Sequence[str], changes: Sequence[str]) -> ClassMap:
    """Change the meaning of single classes, and check that the map knows all classes of a target.

    Args:
        base: The map to start from.
        target: The target's classes; the result holds these and no others.
        changes: `NAME=MEANING` for target classes; a meaning is a source class, "unknown" or "ignore".

    Returns:
        The changed map.

    Raises:
        InvalidInput: A change is not of this form, names a class that the target lacks or a meaning that does not exist, or the map
            lacks a class of the target.
    """
    pairs = [text.partition("=") for text in changes]
    wrong = [name + sign + meaning for name, sign, meaning in pairs if not (name and sign and meaning)]
    strangers = [name for name, _, _ in pairs if name not in target]
    if wrong or strangers:
        raise InvalidInput(
            f"a class map is changed by NAME=MEANING for classes of the target ({', '.join(target)}); found "
            f"{', '.join(wrong or strangers)}. A meaning is one of {', '.join((*base.source, UNKNOWN, IGNORE))}"
        )
    whole = replace(base, meaning={**base.meaning, **{name: meaning for name, _, meaning in pairs}})
    whole.ids(target)  # raises for what is missing
    return replace(whole, meaning={name: whole.meaning[name] for name in target})


# ---- ordered pairs of datasets

# The words of three datasets for one thing. The tables use the first; a detector may use any.
_SAME = (("Vehicle", "Car", "car"), ("Pedestrian", "pedestrian"), ("Cyclist", "bicycle"), ("Truck", "truck"))
_KITTI_IGNORED = {"Person_sitting": IGNORE, "DontCare": IGNORE}
_LYFT_VEHICLES = ("truck", "bus", "other_vehicle", "emergency_vehicle")
_VEHICLE_LENGTH = {"Vehicle": 6.0}  # m; Waymo's vehicles also include trucks and buses, most of them longer

PAIRS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("waymo", "kitti"): {"Car": "Vehicle", "Van": "Vehicle", "Truck": "Vehicle", "Pedestrian": "Pedestrian", "Cyclist": "Cyclist"}
    | {"Tram": UNKNOWN, "Misc": UNKNOWN}
    | _KITTI_IGNORED,
    ("kitti", "kitti"): {"Car": "Car", "Pedestrian": "Pedestrian", "Cyclist": "Cyclist"}
    | dict.fromkeys(("Van", "Truck", "Tram", "Misc"), UNKNOWN)
    | _KITTI_IGNORED,
    ("kitti", "waymo"): {"Vehicle": "Car", "Pedestrian": "Pedestrian", "Cyclist": "Cyclist", "Sign": UNKNOWN},
    ("waymo", "lyft"): {"car": "Vehicle", **dict.fromkeys(_LYFT_VEHICLES, "Vehicle"), "pedestrian": "Pedestrian"}
    | {"bicycle": "Cyclist", "motorcycle": "Cyclist", "animal": UNKNOWN},
    ("kitti", "lyft"): {"car": "Car", **dict.fromkeys(_LYFT_VEHICLES, UNKNOWN), "pedestrian": "Pedestrian"}
    | {"bicycle": "Cyclist", "motorcycle": UNKNOWN, "animal": UNKNOWN},
    ("lyft", "kitti"): {"Car": "car", "Truck": "truck", "Pedestrian": "pedestrian", "Cyclist": "bicycle", "Van": IGNORE}
    | {"Tram": UNKNOWN, "Misc": UNKNOWN}
    | _KITTI_IGNORED,
    ("lyft", "waymo"): {"Vehicle": "car", "Pedestrian": "pedestrian", "Cyclist": "bicycle", "Sign": UNKNOWN},
}
"""(source, target) -> target class -> source class, `UNKNOWN` or `IGNORE`. A Waymo detector counts Lyft's motorcycles as cyclists, like
OpenPCDet's KITTI-style class map of Lyft."""


def pair_map(source: str, target: str, classes: tuple[str, ...]) -> ClassMap:
    """Fit the table of a pair of datasets to a detector's classes.

    Args:
        source: Dataset that the detector was trained on: "kitti", "waymo" or "lyft".
        target: Dataset of the target.
        classes: The detector's classes in order.

    Returns:
        The map. A class that the detector has not learned is unknown to it, even if its dataset has it.

    Raises:
        InvalidInput: There is no table for this pair.
    """
    if (source, target) not in PAIRS:
        pairs = ", ".join(f"{a} {b}" for a, b in PAIRS)
        raise InvalidInput(
            f"there is no class map from {source} to {target}; known pairs are {pairs}. Map the classes one by one instead"
        )

    def own(name: str) -> str:
        if name in (IGNORE, UNKNOWN, *classes):
            return name
        synonyms = next((words for words in _SAME if name in words), ())
        return next((word for word in synonyms if word in classes), UNKNOWN)

    coarser = target == "waymo" and source != "waymo"
    return ClassMap(
        source=classes,
        meaning={name: own(meaning) for name, meaning in PAIRS[source, target].items()},
        longest=_VEHICLE_LENGTH if coarser else {},
    )
