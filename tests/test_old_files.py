"""Files that version 0.1 wrote are read as they were then: detectors, encoders and stores, bit by bit where bits were stored.

`data/version_0_1` was made with the code of commit a53290a from simulated scans: for each detector the files of a training run, a
store of three scenes, a scan, and in `expected.json` what that code read and found. Never make it anew: a change that these
tests refuse would refuse the files of every user.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import PointCloud, Predictions
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.server.store import SmashedStore, collate_scenes
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.wire.encoder_file import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parent / "data" / "version_0_1"
TENSORS = ("coords", "features", "keypoint_cells", "keypoint_features")


@pytest.fixture(params=["second_iou", "pv_rcnn"])
def old(request) -> Path:
    return DATA / request.param


def expected(old: Path) -> dict[str, Any]:
    return json.loads((old / "expected.json").read_text())


def assert_found(found: Predictions, expected: list[dict[str, Any]]) -> None:
    """The scans were chosen so that rounding decides nothing: boxes on another machine differ by what rounding is."""
    assert len(expected) >= 2
    torch.testing.assert_close(found.boxes.data, torch.tensor([e["box"] for e in expected]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.scores, torch.tensor([e["score"] for e in expected]), rtol=1e-3, atol=1e-3)


def test_the_encoder_has_its_fingerprint(old):
    facts = expected(old)
    rig = RigSpec(**facts["rig"])
    for encoder in (load_encoder(old / "encoder.safetensors"), load_detector(old).encoder):
        assert encoder_fingerprint(encoder, rig) == facts["encoder_fingerprint"]
    assert encoder_fingerprint(encoder, RigSpec(z_shift=rig.z_shift + 1)) != facts["encoder_fingerprint"]


def test_every_stored_scene_is_read_bit_by_bit(old):
    facts, store = expected(old), SmashedStore(old / "store")
    assert (store.codecs, store.fingerprint) == ((facts["codec"],), facts["encoder_fingerprint"])
    assert store.spec == load_detector(old).spec
    assert [store[i].scene_id for i in range(len(store))] == [scene["scene_id"] for scene in facts["scenes"]]
    for i, scene in enumerate(facts["scenes"]):
        for name in TENSORS:
            found = getattr(store[i], name).contiguous().numpy().tobytes()
            assert hashlib.sha256(found).hexdigest() == scene["sha256"][name], (i, name)


def test_the_detector_finds_in_stored_scenes_what_it_found(old):
    detector, store = load_detector(old), SmashedStore(old / "store")
    for i, scene in enumerate(expected(old)["scenes"]):
        with torch.no_grad():
            (found,) = detector.predict(detector.decode(collate_scenes([store[i]])))
        assert_found(found, scene["detections"])


def test_the_detector_finds_in_a_scan_what_it_found(old):
    facts, rows = expected(old), torch.from_numpy(np.load(old / "scan.npy", allow_pickle=False))
    points = RigSpec(**facts["rig"]).from_sensor(PointCloud(xyz=rows[:, :3].contiguous(), features=rows[:, 3:].contiguous()))
    (found,) = load_detector(old).detect([points])
    assert_found(found, facts["detections"])
