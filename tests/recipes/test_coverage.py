"""What of a split lies in a detector's range: points, cells, and boxes by class; absurd shares warn, and a total loss stops."""

from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Frame
from upcycle3d.core.ledger import Ledger
from upcycle3d.core.ledger_rules import judge
from upcycle3d.datasets.kitti import KittiDataset, read_ids
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.models.detectors import DetectorConfig
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.recipes.scan_survey import Survey, survey_split


def survey(folder, frames, detector) -> Survey:
    ids = [frame.id for frame in frames]
    prepare(frames, ids, folder, splits={"train": ids}, classes=("Car",), workers=0)
    return survey_split(PreparedDataset(folder, "train"), detector.encoder)


def moved(frame: Frame, *, by: float = 0.0, scale: float = 1.0) -> Frame:
    shift = torch.tensor([by, 0.0, 0.0])
    boxes = frame.labels.boxes.data.clone()
    boxes[:, :3] = boxes[:, :3] * scale + shift
    return replace(
        frame,
        points=replace(frame.points, xyz=frame.points.xyz * scale + shift),
        labels=replace(frame.labels, boxes=replace(frame.labels.boxes, data=boxes)),
    )


def frames(count: int = 4) -> list[Frame]:
    return [replace(tiny.frame_with_car(seed), id=f"frame{seed}") for seed in range(count)]


def test_a_split_in_range_is_counted_and_nothing_is_said(tmp_path):
    found = survey(tmp_path, frames(), tiny.second_iou())
    ledger = found.ledger
    assert (ledger.scans, ledger.points_outside_range, ledger.cells_over_limit) == (4, 0, 0)
    assert ledger.points == sum(len(f.points) for f in frames())
    assert ledger.cells > 0
    assert ledger.boxes == {"Car": sum(len(f.labels) for f in frames())}
    assert not judge(ledger)


def test_half_of_the_frames_out_of_range_warns_of_points_and_of_boxes_by_class(tmp_path):
    far = [moved(frame, by=500.0) for frame in frames()[:2]]
    ledger = survey(tmp_path, [*far, *frames()[2:]], tiny.second_iou()).ledger
    assert ledger.boxes_outside_range == {"Car": 2}
    assert ledger.scans_without_points == 2
    texts = [finding.text for finding in judge(ledger)]
    assert any("50% of the points lie outside the detector's range" in text for text in texts)
    assert any("2 of 4 boxes lie outside the detector's range" in text for text in texts)
    assert not any(finding.stops for finding in judge(ledger))


@pytest.mark.parametrize("change", [{"by": 500.0}, {"scale": 1000.0}])
def test_a_split_of_which_nothing_lies_in_range_stops(tmp_path, change):
    """Another place, or millimeters."""
    ledger = survey(tmp_path, [moved(frame, **change) for frame in frames()], tiny.second_iou()).ledger
    first = judge(ledger)[0]
    assert first.stops
    assert "no point lies in the detector's range" in first.text


def test_a_range_without_cells_is_refused():
    config = tiny.second_iou_config()
    with pytest.raises(InvalidInput):
        replace(config, encoder=replace(config.encoder, grid=replace(config.encoder.grid, range=(0.0, 0, 0, 0, 1, 1)))).build()


def test_points_and_boxes_behind_the_sensor_are_counted(tmp_path):
    config = tiny.second_iou_config()
    _, y0, z0, x1, y1, z1 = config.encoder.grid.range
    around = replace(config, encoder=replace(config.encoder, grid=replace(config.encoder.grid, range=(-x1, y0, z0, x1, y1, z1))))
    front = frames()[0]
    behind = moved(replace(front, id="behind"), by=-x1)
    ledger = survey(tmp_path, [front, behind], tiny.second_iou(around)).ledger
    assert ledger.boxes_behind == len(behind.labels)
    assert ledger.points_behind == int((behind.points.xyz[:, 0] < 0).sum()) > 0


def test_labels_of_weight_0_are_no_boxes_of_the_class(tmp_path):
    vans = [
        replace(
            f, labels=replace(f.labels, weight=torch.zeros(len(f.labels))), reading=Ledger(types_ignored={"Van": len(f.labels)})
        )
        for f in frames()[:1]
    ]
    ledger = survey(tmp_path, [*vans, *frames()[1:]], tiny.second_iou()).ledger
    assert ledger.boxes == {"Car": sum(len(f.labels) for f in frames()[1:])}
    assert ledger.types_ignored == {"Van": len(vans[0].labels)}


@pytest.mark.parametrize(("axis", "words"), [(0, "beyond its sides (x, y)"), (2, "below or above it (z)")])
def test_the_side_on_which_points_and_boxes_left_the_range_is_measured(tmp_path, axis, words):
    shift = torch.zeros(3)
    shift[axis] = 500.0
    away = []
    for frame in frames():
        boxes = frame.labels.boxes.data.clone()
        boxes[:, :3] += shift
        labels = replace(frame.labels, boxes=replace(frame.labels.boxes, data=boxes))
        away.append(replace(frame, points=replace(frame.points, xyz=frame.points.xyz + shift), labels=labels))
    ledger = survey(tmp_path, away, tiny.second_iou()).ledger
    assert all(words in finding.text for finding in judge(ledger) if "the detector's range" in finding.text)
    outside = sum(ledger.boxes_outside_range.values())
    assert (ledger.points_outside_height, ledger.boxes_outside_height) == ((ledger.points, outside) if axis == 2 else (0, 0))


@pytest.fixture(scope="module")
def kitti(tmp_path_factory) -> PreparedDataset:
    """The validation frames of real KITTI in the camera's view, in the sensor's own frame."""
    root = tiny.shared("data/kitti", "the range of a preset is compared with real frames")
    ids = read_ids(root / "ImageSets" / "val.txt")
    folder = tmp_path_factory.mktemp("kitti")
    source = KittiDataset(root, ids, classes=("Car",))
    prepare(source, ids, folder, splits={"val": ids}, classes=("Car",), workers=0)
    return PreparedDataset(folder, "val")


def coverage(frames: PreparedDataset, preset: DetectorConfig) -> tuple[float, float, list[str]]:
    """Share of points and of boxes outside the range, and what the rules say."""
    ledger = survey_split(frames, preset.build().encoder).ledger
    outside, boxes = sum(ledger.boxes_outside_range.values()), sum(ledger.boxes.values())
    return ledger.points_outside_range / ledger.points, outside / boxes, [finding.text for finding in judge(ledger)]


def test_a_preset_for_another_height_on_real_kitti_frames_warns_and_the_right_one_does_not(kitti):
    points, boxes, said = coverage(kitti, PRESETS["small"].detector)
    assert points > 0.5
    assert boxes > 0.2
    assert any("points lie outside" in text for text in said)
    assert any("boxes lie outside" in text for text in said)
    points, boxes, said = coverage(kitti, PRESETS["kitti_small"].detector)
    assert points < 0.1
    assert boxes < 0.1
    assert said == []
