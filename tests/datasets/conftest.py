"""Fixtures for tests of readers: simulated datasets on disk, written once, and copies to break."""

import shutil
from pathlib import Path

import pytest
import tiny_waymo

from upcycle3d.datasets.simulation.layout_waymo import write_waymo_layout


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    """The dataset of `tiny_waymo`. Do not change it."""
    root = tmp_path_factory.mktemp("waymo")
    made = write_waymo_layout(
        root, tiny_waymo.SMALL, num_frames=tiny_waymo.FRAMES, seed=tiny_waymo.SEED, workers=1, splits=tiny_waymo.SPLITS
    )
    assert made == tiny_waymo.FRAMES
    return root


@pytest.fixture
def waymo_copy(written: Path, tmp_path: Path) -> Path:
    """A copy of the dataset of `tiny_waymo`, to break."""
    return Path(shutil.copytree(written, tmp_path / "waymo"))
