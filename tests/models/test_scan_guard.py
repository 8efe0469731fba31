"""`detect` says when scans do not suit the detector, each kind once, and refuses absurd boxes."""

import warnings
from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.errors import NonFiniteValue
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import PointCloud
from upcycle3d.core.trained_on import TrainedOn, summarize_scans
from upcycle3d.perception.models.detector import Detector, unwatched
from upcycle3d.perception.models.encoders.scan_survey import measure_scan

pytestmark = pytest.mark.usefixtures("one_thread")


def road(seed: int, *, count: int = 300) -> PointCloud:
    """A flat road between 5 and 6 m in front, in the range of the tiny grid, with a car."""
    car = tiny.scan_with_car(seed)
    g = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(tiny.GRID.range[:3]), torch.tensor(tiny.GRID.range[3:])
    xyz = low + (high - low) * torch.rand(count, 3, generator=g) * 0.999
    xyz[:, 0] = xyz[:, 0].clamp(min=5.2)
    xyz[:, 2] = low[2] + 0.3
    return PointCloud(
        xyz=torch.cat([car.xyz, xyz]), features=torch.full((len(car) + count, 1), 0.3), feature_names=("intensity",)
    )


@pytest.fixture
def detector() -> Detector:
    model = tiny.second_iou().eval()
    measures = [measure_scan(road(seed), model.encoder)[0] for seed in range(3)]
    model.trained_on = TrainedOn(
        rig=RigSpec(),
        feature_names=("intensity",),
        classes=model.class_names,
        point_range=model.spec.grid.range,
        scans=summarize_scans(measures),
    )
    return model


def said(detector: Detector, scan: PointCloud) -> tuple[int, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = detector.detect(scan)
    assert all(w.filename == __file__ for w in caught)  # a warning points to whoever detects
    return len(found), [str(w.message) for w in caught]


def test_scans_like_those_of_training_are_detected_without_a_word(detector):
    for seed in range(25):
        assert said(detector, road(seed))[1] == []


def test_each_kind_of_unsuitable_scan_is_said_once_per_detector(detector):
    scan = road(0)
    faults = {
        "the road lies at": replace(scan, xyz=scan.xyz + torch.tensor([0, 0, 0.7])),
        "mean intensity": replace(scan, features=scan.features * 0.001),
        "no point lies in the detector's range": replace(scan, xyz=scan.xyz * 1000 + 500),
        "without a point": scan.select(torch.zeros(len(scan), dtype=torch.bool)),
    }
    assert said(detector, scan)[1] == []
    for text, fault in faults.items():
        _, heard = said(detector, fault)
        assert any(text in line for line in heard), (text, heard)
    for fault in faults.values():
        assert said(detector, fault)[1] == []
    other = tiny.second_iou().eval()  # one whose training nobody knows judges the counts all the same
    assert [len(said(other, fault)[1]) for fault in faults.values()] == [0, 0, 1, 1]


def test_a_scan_without_a_point_in_range_has_no_boxes_and_its_neighbors_keep_theirs(detector):
    scan = road(0)
    far = replace(scan, xyz=scan.xyz - 500)
    with unwatched(detector), warnings.catch_warnings():
        warnings.simplefilter("error")
        first, nothing, empty = detector.detect([scan, far, scan.select(torch.zeros(len(scan), dtype=torch.bool))])
    assert len(first) > 0
    assert len(nothing) == len(empty) == 0
    assert said(detector, far)[0] == 0


def test_a_scan_with_more_cells_than_the_voxel_limit_is_warned_of():
    model = tiny.second_iou().eval()
    limit = model.encoder.config.max_voxels
    low, high = torch.tensor(tiny.GRID.range[:3]), torch.tensor(tiny.GRID.range[3:])
    xyz = low + (high - low) * torch.rand(limit * 4, 3, generator=torch.Generator().manual_seed(0)) * 0.999
    scan = PointCloud(xyz=xyz, features=torch.full((len(xyz), 1), 0.3), feature_names=("intensity",))
    assert "of the occupied cells were dropped" in said(model, scan)[1][0]


def test_odd_scans_among_many_say_nothing_and_a_lasting_change_does(detector):
    lifted = replace(road(0), xyz=road(0).xyz + torch.tensor([0, 0, 0.7]))
    for seed in range(10):
        detector.detect(road(seed))
    heard = [said(detector, lifted if number % 4 == 0 else road(number))[1] for number in range(10)]
    assert not any(heard)
    heard = [said(detector, lifted)[1] for _ in range(10)]
    assert "the road lies at" in heard[-1][0]


@pytest.mark.parametrize("build", [tiny.second_iou, tiny.pv_rcnn])
def test_boxes_of_absurd_place_or_size_are_refused_like_nan(build):
    model = build().eval()
    head = model.decoder.anchor_head.conv_box
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias.view(-1, 7)[:, 0] = 1e28
    with pytest.raises(NonFiniteValue, match=r"cannot detect anything here: .*boxes are absurd.*e\+.*weights were damaged"):
        model.detect(road(0))
