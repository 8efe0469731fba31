"""`upcycle3d.evaluate` warns in Python of what the command warns of, and its report keeps it."""

import warnings
from dataclasses import replace

import pytest
import torch

import tiny
import upcycle3d
from upcycle3d.core.errors import UpcycleError
from upcycle3d.core.frame import Frame
from upcycle3d.core.rig import RigSpec
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.recipes.scan_survey import describe_training, survey_split

pytestmark = pytest.mark.usefixtures("one_thread")


def data(folder, *, shift: tuple[float, float, float] = (0, 0, 0), rig: RigSpec | None = None, far: int = 6) -> str:
    """Six frames with a car; the first `far` of them are shifted."""
    frames: list[Frame] = []
    for seed in range(6):
        frame = replace(tiny.frame_with_car(seed), id=f"frame{seed}", rig=rig or RigSpec())
        by = torch.tensor(shift, dtype=torch.float32) * (seed < far)
        boxes = frame.labels.boxes.data.clone()
        boxes[:, :3] += by
        labels = replace(frame.labels, boxes=replace(frame.labels.boxes, data=boxes))
        frames.append(replace(frame, points=replace(frame.points, xyz=frame.points.xyz + by), labels=labels))
    ids = [frame.id for frame in frames]
    prepare(frames, ids, folder, splits={"val": ids}, classes=("Car",), workers=0)
    return str(folder)


@pytest.fixture
def detector(tmp_path) -> Detector:
    model = tiny.second_iou().eval()
    frames = PreparedDataset(data(tmp_path / "trained"), "val")
    model.trained_on = describe_training(model, frames, survey_split(frames, model.encoder))
    return model


def scored(detector, place):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = upcycle3d.evaluate(detector, place, protocol="cross_dataset")
    assert all(w.filename == __file__ for w in caught)
    return report, [str(w.message) for w in caught]


def test_another_rig_is_warned_of_in_python_and_stands_in_the_report_with_the_counts_of_the_points(detector, tmp_path):
    report, heard = scored(detector, data(tmp_path / "other", rig=RigSpec(z_shift=1.73)))
    assert any("the training had z_shift 0" in text for text in heard)
    assert set(heard) == set(report.account.warnings)
    assert report.account.ledger.points > 0
    assert report.account.ledger.cells > 0


def test_points_and_boxes_outside_the_range_are_warned_of_in_python(detector, tmp_path):
    report, heard = scored(detector, data(tmp_path / "far", shift=(500, 0, 0), far=4))
    assert any("of the points lie outside the detector's range" in text for text in heard)
    assert any("of 6 boxes lie outside the detector's range" in text for text in heard)
    assert set(heard) == set(report.account.warnings)


def test_a_split_of_which_nothing_lies_in_range_stops_in_python_too(detector, tmp_path):
    with pytest.raises(UpcycleError, match="range"):
        scored(detector, data(tmp_path / "far", shift=(500, 0, 0)))


def test_the_data_of_the_training_are_scored_without_a_warning_of_rig_road_or_range(detector, tmp_path):
    _, heard = scored(detector, data(tmp_path / "same"))
    assert not [text for text in heard if "range" in text or "rig" in text or "road" in text or "training" in text]
