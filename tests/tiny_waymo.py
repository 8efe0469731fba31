"""A small simulated Waymo dataset in v2 tables, which several tests of `tests/datasets` read; see the fixtures of its `conftest.py`."""

from dataclasses import replace
from pathlib import Path

from upcycle3d.datasets.simulation.places import WAYMO
from upcycle3d.datasets.waymo_places import FramePlace, find_waymo_frames

SENSOR = replace(WAYMO.sensor, elevations=WAYMO.sensor.elevations[4::5], azimuths=300, jitter=0.0)
"""Every fifth beam and every ninth column, at exact angles."""
SMALL = replace(WAYMO, sensor=SENSOR)
FRAMES = 7
"""Five of the split train, two of val; each split is one segment."""
SEGMENTS = ("simulated_000000_000005", "simulated_000005_000007")
SPLITS = {"train": 5, "val": 2}
SEED = 4


def places(root: Path, **options) -> tuple[FramePlace, ...]:
    """The places of all frames below a folder."""
    return tuple(place for part in find_waymo_frames(root, **options).values() for place in part)
