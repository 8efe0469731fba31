"""Category shift on simulated streets: the target holds road users that the source does not know, or lacks one that it knows.

A source detector has learned cars, pedestrians and cyclists. The four scenarios of universal domain adaptation (You et al., "Universal domain
adaptation", CVPR 2019), by what the target holds:

    closed         the same classes
    partial        one source class is missing
    open           trucks, trams, animals and trailers as well
    open_partial   both

No world holds vans, neither source nor target: KITTI counts them neither as cars nor as something else, and a scenario needs every object to be
known or private. The place's own trucks are left out too, so trucks exist only where they are private. Cars take their share of the traffic.
The four scenarios of a domain are the same streets, frame by frame, except for what is added or missing and what added objects hide. So
differences between scenarios are differences of categories. Read next: `places.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from ...core.errors import InvalidInput
from .places import Domain, OpenPlace, Place

ShiftKind = Literal["closed", "partial", "open", "open_partial"]

SOURCE_CLASSES = ("Car", "Pedestrian", "Cyclist")
PRIVATE_CLASSES = ("Truck", "Tram", "Animal", "Trailer")
# Mean numbers within 100 m either way, for at least 60 of each to be seen in 100 frames of the camera (docs/simulation.md).
TRUCKS, TRAMS, ANIMALS, TRAILERS = 2.5, 1.75, 4.5, 2.5


def source_domain(domain: Domain) -> Domain:
    """The domain that the source detector is trained on: cars, pedestrians and cyclists alone.

    It has as many cyclists as pedestrians. Otherwise pedestrians are four or more to one, and a detector that cannot tell the two apart (AUROC 0.74
    after 201 cyclists in 400 frames) has nothing to adapt.

    Args:
        domain: An ordinary domain.

    Returns:
        The domain with the same sensor and streets.
    """
    place = _without_trucks(domain.place)
    return replace(domain, name=f"{domain.name}-source", place=replace(place, cyclists=max(place.cyclists, place.pedestrians)))


def _without_trucks(place: Place) -> Place:
    return replace(place, vehicle_mix=(1.0, 0.0, 0.0))


def category_shift(target: Domain, kind: ShiftKind, *, lacking: str = "Cyclist") -> Domain:
    """The target domain of a scenario, for a source of `SOURCE_CLASSES`. All kinds share their streets, seed by seed.

    Args:
        target: An ordinary domain.
        kind: Scenario.
        lacking: The source class that `partial` and `open_partial` leave out; the other kinds ignore it.

    Returns:
        The target domain.

    Raises:
        InvalidInput: There is no such kind, or the source does not have the class.
    """
    known, private = known_classes(kind, lacking=lacking), bool(private_classes(kind))
    absent = tuple(name for name in SOURCE_CLASSES if name not in known)
    street = _without_trucks(target.place)
    place = OpenPlace.like(
        street,
        trucks=TRUCKS * private,
        trams=TRAMS * private,
        animals=ANIMALS * private,
        trailers=TRAILERS * private,
        absent=absent,
    )
    name = "-".join([target.name, kind, *(f"no-{a.lower()}" for a in absent)])
    return replace(target, name=name, place=place)


def known_classes(kind: ShiftKind, *, lacking: str = "Cyclist") -> tuple[str, ...]:
    """The source classes that the target of a scenario holds.

    Args:
        kind: Scenario.
        lacking: The source class that `partial` and `open_partial` leave out.

    Returns:
        Class names in the source's order.

    Raises:
        InvalidInput: There is no such kind, or the source does not have the class.
    """
    _check(kind)
    if lacking not in SOURCE_CLASSES:
        raise InvalidInput(f"lacking must be one of the source's {', '.join(SOURCE_CLASSES)}, found {lacking!r}")
    return tuple(name for name in SOURCE_CLASSES if kind in ("closed", "open") or name != lacking)


def private_classes(kind: ShiftKind) -> tuple[str, ...]:
    """The classes in the target of a scenario that its source does not know.

    Args:
        kind: Scenario.

    Returns:
        `PRIVATE_CLASSES`, or no class.

    Raises:
        InvalidInput: There is no such kind.
    """
    _check(kind)
    return PRIVATE_CLASSES if kind in ("open", "open_partial") else ()


def _check(kind: str) -> None:
    if kind not in get_args(ShiftKind):
        raise InvalidInput(f"kind must be one of {', '.join(get_args(ShiftKind))}, found {kind!r}")
