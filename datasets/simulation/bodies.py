"""What road users look like to a laser: each consists of a few tapered boxes, ellipsoids and cylinders.

A body is a list of parts in its own frame: the origin is on the ground under the middle of the labeled box, x points to the front. The parts lie
inside the labeled box and touch its sides, so that a perfect detector could recover the box from enough points. Read next: `world.py`, which
places the bodies on a street.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .places import ANIMAL, CAR, CYCLIST, PEDESTRIAN, TRAILER, TRAM, TRUCK, VAN
from .raycast import BOX, CYLINDER, ELLIPSOID

CABIN_PASS = 0.45  # a cabin's sides are mostly glass; what the rays meet inside is not modelled
CABIN_GLOSS, PAINT_GLOSS = 0.3, 0.2
TYRE = 0.06


def part(
    kind: int,
    center: tuple[float, float, float],
    half: tuple[float, float, float],
    reflectivity: float,
    *,
    taper: tuple[float, float, float] = (0.0, 0.0, 0.0),
    pass_chance: float = 0.0,
    free_path: float = 0.0,
    gloss: float = 0.0,
) -> np.ndarray:
    """Make one part, not rotated and owned by no object.

    Args:
        kind: `BOX`, `ELLIPSOID` or `CYLINDER`.
        center: x, y, z in m.
        half: Half sizes in m.
        reflectivity: 0 to 1.
        taper: How far the top face of a box steps in at the front, at the rear and at each side, in m.
        pass_chance: Share of rays that go through, as through glass or spokes.
        free_path: Mean distance in m that a ray flies inside, as in leaves; 0 means solid.
        gloss: Share of rays that are mirrored away and never come back.

    Returns:
        (17,) float64, the columns of `raycast.py`.
    """
    return np.array([kind, *center, 1.0, 0.0, *half, *taper, reflectivity, pass_chance, free_path, gloss, -1.0], np.float64)


@dataclass(frozen=True, kw_only=True)
class _Style:
    """Outline of a cabin. Lengths are shares of the car's length from its middle (the front bumper is 0.5), heights of the car's height."""

    shoulder: float
    screen_foot: float
    screen_top: float
    rear_foot: float
    rear_top: float


_STYLES = (
    _Style(shoulder=0.60, screen_foot=0.24, screen_top=0.02, rear_foot=-0.49, rear_top=-0.38),  # hatchback
    _Style(shoulder=0.60, screen_foot=0.20, screen_top=0.02, rear_foot=-0.38, rear_top=-0.20),  # sedan
    _Style(shoulder=0.60, screen_foot=0.25, screen_top=0.08, rear_foot=-0.49, rear_top=-0.43),  # SUV
    _Style(shoulder=0.58, screen_foot=0.20, screen_top=0.07, rear_foot=-0.10, rear_top=-0.06),  # pickup
)


def _span(low: float, high: float) -> tuple[float, float]:
    return (low + high) / 2, (high - low) / 2


def _wheels(length: float, width: float, radius: float, axles: tuple[float, ...]) -> list[np.ndarray]:
    return [part(BOX, (a * length, 0, radius), (radius * 0.85, width * 0.46, radius), TYRE) for a in axles]


def _car(length: float, width: float, height: float, paint: float, style: _Style) -> list[np.ndarray]:
    z, hz = _span(0.18, style.shoulder * height)
    hood = part(
        BOX, (0, 0, z), (length / 2, width / 2, hz), paint, taper=(0.03 * length, 0.02 * length, 0.03 * width), gloss=PAINT_GLOSS
    )
    x, hx = _span(style.rear_foot * length, style.screen_foot * length)
    z, hz = _span(style.shoulder * height, height)
    taper = ((style.screen_foot - style.screen_top) * length, (style.rear_top - style.rear_foot) * length, 0.10 * width)
    cabin = part(
        BOX, (x, 0, z), (hx, 0.47 * width, hz), 0.6 * paint + 0.1, taper=taper, pass_chance=CABIN_PASS, gloss=CABIN_GLOSS
    )
    return [hood, cabin, *_wheels(length, width, 0.31, (-0.30, 0.31))]


def _van(length: float, width: float, height: float, paint: float) -> list[np.ndarray]:
    x, hx = _span(-0.5 * length, 0.32 * length)
    z, hz = _span(0.22, height)
    hold = part(BOX, (x, 0, z), (hx, width / 2, hz), paint, taper=(0.12 * length, 0.01 * length, 0.04 * width), gloss=PAINT_GLOSS)
    x, hx = _span(0.25 * length, 0.5 * length)
    z, hz = _span(0.22, 0.52 * height)
    nose = part(BOX, (x, 0, z), (hx, width / 2, hz), paint, taper=(0.04 * length, 0, 0.03 * width), gloss=PAINT_GLOSS)
    return [hold, nose, *_wheels(length, width, 0.34, (-0.28, 0.32))]


def _truck(length: float, width: float, height: float, paint: float) -> list[np.ndarray]:
    cab_rear = length / 2 - 2.2
    x, hx = _span(cab_rear, length / 2)
    z, hz = _span(0.35, 0.85 * height)
    cab = part(BOX, (x, 0, z), (hx, 0.48 * width, hz), paint, taper=(0.2, 0, 0.05), gloss=PAINT_GLOSS)
    x, hx = _span(-length / 2, cab_rear - 0.3)
    z, hz = _span(0.95, height)
    cargo = part(BOX, (x, 0, z), (hx, width / 2, hz), 0.55)
    return [cab, cargo, *_wheels(length, width, 0.5, (-0.36, -0.22, 0.36))]


def _pedestrian(length: float, width: float, height: float, clothes: float) -> list[np.ndarray]:
    stride, shoulder, knee = 0.5 * length - 0.11, 0.5 * width - 0.06, 0.26 * height
    shins = [part(CYLINDER, (s * stride, s * 0.1, knee / 2), (0.11, 0.08, knee / 2), 0.7 * clothes) for s in (-1, 1)]
    thighs = [part(CYLINDER, (s * stride / 2, s * 0.1, 1.5 * knee), (0.12, 0.09, knee / 2), 0.7 * clothes) for s in (-1, 1)]
    arms = [
        part(CYLINDER, (-s * 0.15 * length, s * shoulder, 0.62 * height), (0.07, 0.06, 0.19 * height), clothes) for s in (-1, 1)
    ]
    torso = part(ELLIPSOID, (0, 0, 0.66 * height), (0.15, shoulder, 0.23 * height), clothes)
    head = part(ELLIPSOID, (0, 0, height - 0.13), (0.11, 0.09, 0.13), 0.4)
    return [*shins, *thighs, *arms, torso, head]


def _cyclist(length: float, width: float, height: float, clothes: float) -> list[np.ndarray]:
    radius = 0.33
    wheels = [
        part(ELLIPSOID, (s * (length / 2 - radius), 0, radius), (radius, 0.04, radius), TYRE, pass_chance=0.6) for s in (-1, 1)
    ]
    frame = part(BOX, (0, 0, 0.55), (0.25 * length, 0.04, 0.22), 0.4, pass_chance=0.3)
    handlebar = part(BOX, (0.25 * length, 0, 1.0), (0.05, width / 2, 0.04), 0.3)
    legs = [part(CYLINDER, (s * 0.06, s * 0.12, 0.6), (0.10, 0.08, 0.33), 0.7 * clothes) for s in (-1, 1)]
    torso = part(ELLIPSOID, (-0.04 * length, 0, 0.72 * height), (0.2, 0.42 * width, 0.2 * height), clothes)
    head = part(ELLIPSOID, (0.08, 0, height - 0.13), (0.12, 0.09, 0.13), 0.4)
    return [*wheels, frame, handlebar, *legs, torso, head]


def _tram(length: float, width: float, height: float, paint: float) -> list[np.ndarray]:
    """Low-floor cars joined by narrow bellows: skirt, a band of windows that lean in at both ends, roof with boxes on it."""
    joint, cars = 0.5, max(3, round(length / 6.5))
    car = (length - (cars - 1) * joint) / cars
    parts = []
    for i in range(cars):
        x = -length / 2 + car / 2 + i * (car + joint)
        nose, tail = float(i == cars - 1), float(i == 0)
        z, hz = _span(0.18, 1.05)
        parts.append(part(BOX, (x, 0, z), (car / 2, width / 2, hz), paint, taper=(0.1 * nose, 0.1 * tail, 0), gloss=PAINT_GLOSS))
        z, hz = _span(1.05, 0.68 * height)
        parts.append(
            part(
                BOX, (x, 0, z), (car / 2 - 0.05 * (nose + tail), 0.49 * width, hz), 0.3,
                taper=(0.6 * nose, 0.6 * tail, 0.03), pass_chance=CABIN_PASS, gloss=CABIN_GLOSS,
            )
        )  # fmt: skip
        left, right = x - car / 2 + 0.65 * tail, x + car / 2 - 0.65 * nose
        (mid, hx), (z, hz) = _span(left, right), _span(0.68 * height, 0.86 * height)
        parts.append(part(BOX, (mid, 0, z), (hx, 0.47 * width, hz), paint, taper=(0.3 * nose, 0.3 * tail, 0.1)))
        z, hz = _span(0.86 * height, height)
        parts.append(part(BOX, (x, 0, z), (0.3 * car, 0.3 * width, hz), 0.4))
        parts.append(part(BOX, (x, 0, 0.2), (1.2, 0.4 * width, 0.2), TYRE))
        if i:
            z, hz = _span(0.3, 0.83 * height)
            parts.append(part(BOX, (x - car / 2 - joint / 2, 0, z), (joint / 2, 0.42 * width, hz), 0.1))
    return parts


@dataclass(frozen=True, kw_only=True)
class _Animal:
    """Proportions of a species. Heights are shares of the animal's height, lengths of its length, from the middle (the nose is 0.5).

    `chest` is where the trunk ends; `head` holds half its length, width and height; `neck` is how far the neck's foot reaches back; `leg` is a radius;
    `tail` is its low and high end.
    """

    back: float
    belly: float
    chest: float
    head: tuple[float, float, float]
    neck: float
    leg: float
    tail: tuple[float, float]
    antlers: float = 0.0


_ANIMALS = (
    _Animal(back=0.76, belly=0.40, chest=0.28, head=(0.15, 0.32, 0.13), neck=0.12, leg=0.035, tail=(0.5, 0.98)),  # dog
    _Animal(
        back=0.64, belly=0.38, chest=0.24, head=(0.12, 0.22, 0.07), neck=0.10, leg=0.024, tail=(0.46, 0.60), antlers=0.2
    ),  # deer
    _Animal(back=0.72, belly=0.42, chest=0.22, head=(0.15, 0.20, 0.09), neck=0.20, leg=0.032, tail=(0.30, 0.68)),  # horse
)


def _animal(length: float, width: float, height: float, coat: float, kind: _Animal) -> list[np.ndarray]:
    """Four legs apart, a round trunk between them, neck and head before it, a tail behind."""
    tail = 0.03 * length
    x, hx = _span(tail - length / 2, kind.chest * length)
    z, hz = _span(kind.belly * height, kind.back * height)
    trunk = [part(ELLIPSOID, (x, 0, z), (hx, width / 2, hz), coat)]
    trunk += [part(ELLIPSOID, (x + s * 0.55 * hx, 0, z), (0.44 * hx, 0.48 * width, 0.96 * hz), coat) for s in (-1, 1)]
    leg, stride = kind.leg * length, 0.05 * length
    legs = [
        part(CYLINDER, (x + front * 0.68 * hx + front * left * stride, left * 0.28 * width, z / 2), (leg, leg, z / 2), 0.8 * coat)
        for front in (-1, 1)
        for left in (-1, 1)
    ]
    half_head, head_top = kind.head[0] * length, (1 - kind.antlers) * height
    head_z = head_top - kind.head[2] * height
    head = part(ELLIPSOID, (length / 2 - half_head, 0, head_z), (half_head, kind.head[1] * width, kind.head[2] * height), coat)
    # The neck's front stands upright before the chest, its back slants: parts only lean inwards.
    neck_front = max(length / 2 - 1.5 * half_head, kind.chest * length)
    x, hx = _span(kind.chest * length - kind.neck * length, neck_front)
    z, hz = _span(z, head_z + 0.5 * kind.head[2] * height)
    neck = part(BOX, (x, 0, z), (hx, 0.24 * width, hz), coat, taper=(0, max(0.0, 2 * hx - half_head), 0.08 * width))
    tail_z, half_tail = _span(kind.tail[0] * height, kind.tail[1] * height)
    parts = [*trunk, *legs, neck, head, part(CYLINDER, (tail - length / 2, 0, tail_z), (tail, tail, half_tail), coat)]
    z, hz = _span(head_z, height)  # ears, or antlers
    out, wide = (0.36 * width, 0.14 * width) if kind.antlers else (0.12 * width, 0.05 * width)
    x = length / 2 - 1.6 * half_head
    return [*parts, *(part(BOX, (x, s * out, z), (0.02 * length, wide, hz), coat) for s in (-1, 1))]


def _trailer(length: float, width: float, height: float, paint: float, flat: bool) -> list[np.ndarray]:
    """A closed box or a loaded bed between stakes, high above two axles, and a drawbar with its prop: no cab, no nose."""
    bar = 1.3
    deck = length / 2 - bar  # its front end
    x, hx = _span(-length / 2, deck)
    wheels = [
        part(ELLIPSOID, (x + axle * 0.4, s * (width / 2 - 0.12), 0.33), (0.33, 0.12, 0.33), TYRE)
        for axle in (-1.15, 0.75)
        for s in (-1, 1)
    ]
    z = 0.55 if flat else 0.6
    frame = part(BOX, (x, 0, z), (hx, 0.3 * width, 0.07), 0.3)
    front, half_bar = _span(deck, length / 2)
    drawbar = [
        part(BOX, (front, 0, 0.5), (half_bar, 0.06, 0.06), 0.3),
        part(BOX, (deck + 0.25, 0, 0.5), (0.25, 0.4, 0.05), 0.3),
        part(BOX, (deck + 0.65, 0, 0.5), (0.15, 0.2, 0.05), 0.3),
        part(CYLINDER, (length / 2 - 0.3, 0, 0.4), (0.07, 0.07, 0.4), 0.3),
    ]
    parts = [*wheels, frame, *drawbar]
    if not flat:
        z, hz = _span(0.72, height)
        return [*parts, part(BOX, (x, 0, z), (hx, width / 2, hz), paint, taper=(0.25, 0, 0.02 * width), gloss=PAINT_GLOSS)]
    bed, board = 0.72, 0.35
    parts.append(part(BOX, (x, 0, bed - 0.05), (hx, width / 2, 0.05), 0.4))
    z, hz = _span(bed, bed + board)
    parts += [part(BOX, (x, s * (width / 2 - 0.03), z), (hx, 0.03, hz), paint) for s in (-1, 1)]
    parts.append(part(BOX, (0.03 - length / 2, 0, z), (0.03, width / 2, hz), paint))
    z, hz = _span(bed, height)
    parts.append(part(BOX, (deck - 0.05, 0, z), (0.05, width / 2, hz), paint, pass_chance=0.4))  # a headboard of bars
    stakes = [(a, s) for a in (0.05 - length / 2, x - 0.33 * hx, x + 0.33 * hx) for s in (-1, 1)]
    parts += [part(CYLINDER, (a, s * (width / 2 - 0.05), z), (0.05, 0.05, hz), 0.3) for a, s in stakes]
    z, hz = _span(bed, bed + 0.55 * (height - bed))
    parts.append(part(BOX, (x - 0.35 * hx, 0, z), (0.5 * hx, 0.36 * width, hz), 0.5))
    return parts


def body(class_index: int, size: np.ndarray, reflectivity: float, style: int) -> np.ndarray:
    """Build a road user in its own frame.

    Args:
        class_index: Index into `places.ALL_CLASS_NAMES`.
        size: (3,) labeled length, width, height in m.
        reflectivity: Of paint, clothes or coat, 0 to 1.
        style: A car's hatchback, sedan, SUV, pickup (0 to 3); an animal's dog, deer, horse; a trailer's box, flat bed. Other classes ignore it.

    Returns:
        (P, 17) parts.
    """
    length, width, height = (float(v) for v in size)
    if class_index == CAR:
        return np.stack(_car(length, width, height, reflectivity, _STYLES[style]))
    if class_index == ANIMAL:
        return np.stack(_animal(length, width, height, reflectivity, _ANIMALS[style]))
    if class_index == TRAILER:
        return np.stack(_trailer(length, width, height, reflectivity, flat=style == 1))
    builders: dict[int, Callable[[float, float, float, float], list[np.ndarray]]] = {
        PEDESTRIAN: _pedestrian, CYCLIST: _cyclist, VAN: _van, TRUCK: _truck, TRAM: _tram,
    }  # fmt: skip
    build = builders[class_index]
    return np.stack(build(length, width, height, reflectivity))


def tree(height: float, crown: float, trunk: float) -> np.ndarray:
    """Build a trunk with a crown of leaves.

    Args:
        height: Height of the top in m.
        crown: Radius of the crown in m.
        trunk: Radius of the trunk in m.

    Returns:
        (2, 17) parts.
    """
    foot = 0.35 * height
    z, hz = _span(foot, height)
    return np.stack(
        [
            part(CYLINDER, (0, 0, foot / 2 + 0.2), (trunk, trunk, foot / 2 + 0.2), 0.3),
            part(ELLIPSOID, (0, 0, z), (crown, crown, hz), 0.45, free_path=0.8),
        ]
    )


def bush(half: tuple[float, float, float]) -> np.ndarray:
    """Build leaves that reach down to the ground.

    Args:
        half: Half sizes in m.

    Returns:
        (1, 17) parts.
    """
    return part(ELLIPSOID, (0, 0, 0.7 * half[2]), half, 0.45, free_path=0.3)[None]


def block(half: tuple[float, float, float], reflectivity: float) -> np.ndarray:
    """Build a solid box on the ground: a building, a wall, a fence.

    Args:
        half: Half sizes in m.
        reflectivity: 0 to 1.

    Returns:
        (1, 17) parts.
    """
    return part(BOX, (0, 0, half[2]), half, reflectivity)[None]


def post(height: float, radius: float, *, sign: bool) -> np.ndarray:
    """Build a pole.

    Args:
        height: Height in m.
        radius: Radius in m.
        sign: Whether it carries a small board of high reflectivity that faces along x.

    Returns:
        (1 or 2, 17) parts.
    """
    pole = part(CYLINDER, (0, 0, height / 2), (radius, radius, height / 2), 0.4)
    board = part(BOX, (0, 0, height - 0.35), (0.02, 0.32, 0.32), 0.95)
    return np.stack([pole, board]) if sign else pole[None]
