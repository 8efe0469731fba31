"""AP on rebuilt scans: labels and rules stay, and the scan is the only thing that changes."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Boxes3D, Labels, PointCloud, Predictions
from upcycle3d.perception.privacy.detection_on_rebuilt import detection_ap, raw_scans, rebuilt_scan
from upcycle3d.perception.privacy.frames import AuditFrame, audit_frames

BOXES = torch.tensor([[6.3, 1.1, 0.8, 4.2, 1.9, 1.6, 0.4], [4.0, -3.0, 0.8, 4.2, 1.9, 1.6, 1.9]])


class Lookout(nn.Module):
    """A detector that finds a car exactly where more than 20 points lie within 1.2 m of a true car's center."""

    class_names = ("Car",)

    def detect(self, points: Sequence[PointCloud]) -> list[Predictions]:
        found = []
        for scan in points:
            boxes = BOXES[(torch.cdist(BOXES[:, :3], scan.xyz) < 1.2).sum(1) > 20]
            scores = torch.linspace(0.9, 0.8, len(boxes)) - 0.001 * len(found)
            classes = torch.zeros(len(boxes), dtype=torch.int64)
            found.append(
                Predictions(boxes=Boxes3D(data=boxes), classes=classes, scores=scores, class_scores=scores, iou_scores=scores)
            )
        return found


@pytest.fixture(scope="module")
def frames() -> list[AuditFrame]:
    labels = Labels.make(BOXES, [0, 0])
    scan = Frame(id="0", points=tiny.scan_with_car(0, boxes=BOXES), labels=labels)
    return (
        audit_frames([scan], tiny.second_iou().eval().encoder, "fp16") * 24
    )  # 48 cars: KITTI's rules sample 41 places of the recall


def test_ap_falls_with_the_objects_that_a_rebuilt_scan_lacks(frames: list[AuditFrame]):
    raw = detection_ap(Lookout(), frames, raw_scans(frames), ("Car",))  # type: ignore[arg-type]
    assert raw.classes[0].box_3d == raw.classes[0].bev_loose == 100
    assert (raw.frames, raw.classes[0].objects) == (24, 48)
    one_car = [rebuilt_scan(f.scan.xyz[f.scan.xyz[:, 1] > -1], ("intensity",)) for f in frames]
    half = detection_ap(Lookout(), frames, one_car, ("Car",)).classes[0]  # type: ignore[arg-type]
    assert half.box_3d == half.bev == pytest.approx(50, abs=5)
    nothing = [rebuilt_scan(torch.zeros(0, 3), ()) for _ in frames]
    assert detection_ap(Lookout(), frames, nothing, ("Car",)).classes[0].box_3d_loose == 0  # type: ignore[arg-type]


def test_a_real_detector_runs_on_rebuilt_scans(frames: list[AuditFrame]):
    detector, frames = tiny.second_iou().eval(), frames[:2]
    scans = [rebuilt_scan(f.scan.xyz, detector.point_features) for f in frames]
    assert detection_ap(detector, frames, scans, ("Car",)) == detection_ap(detector, frames, raw_scans(frames), ("Car",))


def test_point_features_are_a_guess_or_a_constant():
    xyz = torch.rand(5, 3)
    scan = rebuilt_scan(xyz, ("intensity", "ring"), constant=0.3, guesses={"ring": torch.arange(5)})
    assert scan.features.tolist() == [[pytest.approx(0.3), float(i)] for i in range(5)]
    with pytest.raises(InvalidInput, match="there is a guess for ring"):
        rebuilt_scan(xyz, ("intensity",), guesses={"ring": torch.arange(5)})
    with pytest.raises(InvalidInput, match="one value for each of the 5 points"):
        rebuilt_scan(xyz, ("intensity",), guesses={"intensity": torch.zeros(4)})


def test_frames_without_labels_or_scans_are_refused(frames: list[AuditFrame]):
    with pytest.raises(InvalidInput, match="one scan"):
        detection_ap(tiny.second_iou(), frames, raw_scans(frames)[:1], ("Car",))
    with pytest.raises(InvalidInput, match="no labels"):
        detection_ap(tiny.second_iou(), [replace(frames[0], labels=None)], raw_scans(frames)[:1], ("Car",))


def test_an_object_that_the_true_scan_does_not_show_is_nobodys_fault(frames: list[AuditFrame]):
    hidden = torch.cat([BOXES, torch.tensor([[60.0, 0.0, 0.8, 4.2, 1.9, 1.6, 0.0]])])
    more = [replace(f, labels=Labels.make(hidden, [0, 0, 0])) for f in frames]
    assert detection_ap(Lookout(), more, raw_scans(more), ("Car",)).classes[0].box_3d == 100  # type: ignore[arg-type]
