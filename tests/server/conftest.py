"""A fleet's scenes and labeled objects for the tests of the server's training; all of one tiny SECOND-IoU, `source_model()`."""

from pathlib import Path

import pytest

import tiny
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Labels
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.server.feature_object_database import FeatureObjectDatabase, build_feature_object_database
from upcycle3d.perception.server.store import SmashedStore


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> SmashedStore:
    """Three scenes of a fleet, through shard and ingest, as the vehicle's encoder made them."""
    scans = [tiny.frame_with_car(seed).points for seed in (10, 11, 12)]
    return tiny.store(tmp_path_factory.mktemp("fleet"), tiny.source_model(), scans)


@pytest.fixture(scope="session")
def pasted_objects(tmp_path_factory) -> FeatureObjectDatabase:
    """The cars of four labeled frames."""
    folder: Path = tmp_path_factory.mktemp("objects") / "db"
    detector = tiny.source_model()
    return build_feature_object_database(
        folder,
        [tiny.frame_with_car(seed) for seed in range(4)],
        detector,
        codec="fp16",
        config=tiny.upcycle_config().f_gt,
        split_fingerprint="ab" * 32,
        encoder_fingerprint=encoder_fingerprint(detector.encoder, RigSpec()),
    )


@pytest.fixture(scope="session")
def truth(store) -> dict[str, Labels]:
    """True labels of scenes by id. Which scene is which car does not matter to the tests."""
    cars = [tiny.frame_with_car(seed).labels for seed in (10, 11, 12)]
    return {store[i].scene_id: labels for i, labels in enumerate(cars)}
