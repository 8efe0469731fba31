"""`prepare` in Python says what the command prints: swapped sizes, bottoms taken for centers, splits that share frames."""

import warnings

import pytest
import torch

import upcycle3d
from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Boxes3D, Labels, PointCloud


def frame(number: int, change) -> Frame:
    """A road at z = 0 and four cars on it, whose boxes are changed."""
    g = torch.Generator().manual_seed(number)
    road = torch.rand(600, 3, generator=g) * torch.tensor([25.0, 20.0, 0.02]) + torch.tensor([5.0, -10.0, 0.0])
    boxes = torch.tensor([[8.0 + 4 * i, -6.0 + 4 * i, 0.8, 4.3, 1.8, 1.6, 0.0] for i in range(4)])
    hull = (torch.rand(4, 40, 3, generator=g) - 0.5) * 0.9 * torch.tensor([4.3, 1.8, 1.6]) + boxes[:, None, :3]
    xyz = torch.cat([road, hull.reshape(-1, 3)])
    points = PointCloud(xyz=xyz, features=torch.full((len(xyz), 1), 0.3), feature_names=("intensity",))
    labels = Labels.make(Boxes3D(data=change(boxes)), torch.zeros(4))
    return Frame(id=f"s{number}", points=points, labels=labels)


def prepared(folder, change=lambda boxes: boxes, splits=None):
    frames = [frame(number, change) for number in range(4)]
    ids = [f.id for f in frames]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = upcycle3d.prepare(
            frames, ids, folder, splits=splits or {"train": ids[:3], "val": ids[3:]}, classes=("Car",), workers=0
        )
    assert all(w.filename == __file__ for w in caught)
    assert tuple(str(w.message) for w in caught) == report.warnings
    return report


def test_usual_data_say_nothing_and_the_objects_are_in_the_report(tmp_path):
    report = prepared(tmp_path)
    assert report.warnings == ()
    assert [summary.boxes for summary in report.objects] == [16]
    assert report.road_height == pytest.approx(0.0, abs=0.1)


def test_swapped_sizes_are_said(tmp_path):
    report = prepared(tmp_path, lambda boxes: boxes[:, [0, 1, 2, 4, 3, 5, 6]])
    assert any("Car" in text and "size" in text for text in report.warnings)


def test_bottoms_that_were_taken_for_centers_are_said(tmp_path):
    report = prepared(tmp_path, lambda boxes: boxes - torch.tensor([0, 0, 0.8, 0, 0, 0, 0]))
    assert any("below the road" in text for text in report.warnings)


def test_splits_that_share_frames_are_said_and_label_shares_are_not(tmp_path):
    report = prepared(tmp_path / "a", splits={"train": ["s0", "s1", "s2"], "val": ["s2", "s3"]})
    assert any("the splits train and val share 1 frame" in text for text in report.warnings)
    shares = {"train": ["s0", "s1"], "train-0.5-0": ["s0"], "train-0.5-1": ["s1"], "train-0.5-1-rest": ["s0"]}
    assert prepared(tmp_path / "b", splits=shares).warnings == ()
