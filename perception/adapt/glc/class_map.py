"""What a target dataset's class names mean to a source model: one of its classes, something it never learned, or nothing to count.

``PAIRS`` holds the meanings for each ordered pair of datasets (glc.md section 4.3); ``pair_map`` fits one to a detector's own names,
``map_by_name`` is for data whose names are the detector's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ....core.errors import InvalidInput

UNKNOWN, IGNORE = "unknown", "ignore"


@dataclass(frozen=True, kw_only=True)
class ClassMap:
    """source: the model's classes in order. meaning: target name -> a source class, UNKNOWN or IGNORE.

    longest: target name -> m; a longer object is ignored, whatever its name means (a class that holds cars and buses).

    Raises InvalidInput for a meaning that is none of these, and for source classes that are not distinct.
    """

    source: tuple[str, ...]
    meaning: Mapping[str, str]
    longest: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.source or len(set(self.source)) != len(self.source) or {UNKNOWN, IGNORE} & set(self.source):
            raise InvalidInput(
                f"source classes must be distinct names other than {UNKNOWN!r} and {IGNORE!r}, found {self.source}"
            )
        wrong = {n: m for n, m in self.meaning.items() if m not in (*self.source, UNKNOWN, IGNORE)}
        if wrong:
            raise InvalidInput(
                f"these target classes map to nothing known: {wrong}; allowed are {(*self.source, UNKNOWN, IGNORE)}"
            )

    @property
    def shared(self) -> tuple[int, ...]:
        """Source classes that the target has, ascending."""
        return tuple(i for i, name in enumerate(self.source) if name in self.meaning.values())

    @property
    def source_private(self) -> tuple[int, ...]:
        """Source classes that the target lacks, ascending."""
        return tuple(i for i in range(len(self.source)) if i not in self.shared)

    def ids(self, names: Sequence[str]) -> np.ndarray:
        """(N,) int64: 0..C-1 source class, C unknown, -1 ignored. Raises InvalidInput naming every class the map misses."""
        missing = sorted(set(names) - self.meaning.keys())
        if missing:
            raise InvalidInput(
                f"the class map says nothing about {missing}; map each to one of {(*self.source, UNKNOWN, IGNORE)}"
            )
        number = {**{name: i for i, name in enumerate(self.source)}, UNKNOWN: len(self.source), IGNORE: -1}
        return np.array([number[self.meaning[name]] for name in names], dtype=np.int64)


def map_by_name(source: tuple[str, ...], target: Sequence[str]) -> ClassMap:
    """A target class of a source class's name is that class, every other one is unknown."""
    return ClassMap(source=source, meaning={name: name if name in source else UNKNOWN for name in target})


# ---- ordered pairs of datasets

# The words of three datasets for one thing; a table speaks of the first, a detector may use any.
_SAME = (("Vehicle", "Car", "car"), ("Pedestrian", "pedestrian"), ("Cyclist", "bicycle"), ("Truck", "truck"))
_KITTI_IGNORED = {"Person_sitting": IGNORE, "DontCare": IGNORE}
_LYFT_VEHICLES = ("truck", "bus", "other_vehicle", "emergency_vehicle")
_VEHICLE_LENGTH = {"Vehicle": 6.0}  # m; Waymo's vehicles hold trucks and buses too

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
"""(source, target) -> target name -> source name, UNKNOWN or IGNORE. Waymo's vehicles already hold vans and trucks; KITTI's cars do not."""


def pair_map(source: str, target: str, classes: tuple[str, ...]) -> ClassMap:
    """The map from dataset ``target`` to a detector of ``classes`` trained on ``source`` ("kitti", "waymo", "lyft").

    A class that the detector has not learnt is unknown to it, though its dataset has it. Raises InvalidInput for a pair without a table.
    """
    if (source, target) not in PAIRS:
        pairs = ", ".join(f"{a} {b}" for a, b in PAIRS)
        raise InvalidInput(
            f"there is no class map from {source} to {target}; known pairs are {pairs}. Map names one by one instead"
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
