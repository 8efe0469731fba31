"""What every detector checks before it computes: its mode, its scans, and the cut that features belong to."""

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Predictions

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = pytest.mark.parametrize("make", [tiny.second_iou, tiny.pv_rcnn], ids=["SECOND-IoU", "PV-RCNN"])


@BOTH
def test_one_scan_gives_its_detections_and_a_list_gives_a_list(make):
    detector = make().eval()
    clouds = [tiny.scan_with_car(), tiny.scan_with_car(1)]
    found = detector.detect(clouds[0])
    assert isinstance(found, Predictions)
    assert len(found) > 0
    assert torch.equal(found.boxes.data, detector.detect(clouds[:1])[0].boxes.data)
    assert [type(p) for p in detector.detect(clouds)] == [type(p) for p in detector(clouds)] == [Predictions, Predictions]


@BOTH
def test_detecting_in_training_mode_is_refused(make):
    with pytest.raises(InvalidInput, match=r"in training mode.*call eval\(\)"):
        make().train().detect(tiny.scan_with_car())


@BOTH
def test_what_is_not_a_scan_is_refused_with_the_way_to_make_one(make):
    detector = make().eval()
    scan = tiny.scan_with_car()
    for wrong, kind in ((scan.xyz, "Tensor"), (scan.xyz.numpy(), "ndarray")):
        with pytest.raises(InvalidInput, match=rf"type PointCloud, found {kind}; .*PointCloud\.from_array"):
            detector.encode([wrong])
        with pytest.raises(InvalidInput, match="type PointCloud"):
            detector.detect(wrong)
    with pytest.raises(InvalidInput, match="given one PointCloud; pass it in a list"):
        detector.encode(scan)


def test_features_of_another_cut_are_refused_and_the_difference_is_named():
    second, pv_rcnn = tiny.second_iou().eval(), tiny.pv_rcnn().eval()
    wide = tiny.second_iou(tiny.second_iou_config(width=32)).eval()
    scan = [tiny.scan_with_car()]
    with torch.no_grad():
        for detector, features, message in (
            (second, wide.encode(scan), r"decodes \(channels: this SECOND-IoU 16, the features 32\)"),
            (second, pv_rcnn.encode(scan), r"keypoints: this SECOND-IoU None, the features {"),
            (pv_rcnn, second.encode(scan), r"decodes \(keypoints: this PV-RCNN {.*, the features None\)"),
        ):
            with pytest.raises(InvalidInput, match=message):
                detector.decode(features)
            with pytest.raises(InvalidInput, match=message):
                detector.proposals(features)
        for asked in (pv_rcnn.decoder, pv_rcnn.decoder.proposals):
            with pytest.raises(InvalidInput, match=r"the features of the cut 'sparse_backbone\.conv_out' have none"):
                asked(second.encode(scan))


def test_features_of_another_detector_with_the_same_cut_are_taken():
    """The fingerprint of the encoder tells such features apart, where scenes are stored; a batch does not carry it."""
    a, b = tiny.second_iou(seed=0).eval(), tiny.second_iou(seed=1).eval()
    with torch.no_grad():
        assert len(a.predict(a.decode(b.encode([tiny.scan_with_car()])))) == 1
