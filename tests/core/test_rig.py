"""The rig: one pair of functions between the sensor frame and the shifted frame, for scans, boxes and coordinates."""

from dataclasses import asdict

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Frame
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Boxes3D, PointCloud

RIG = RigSpec(z_shift=1.75, intensity_scale=1 / 256)
SCAN = PointCloud(
    xyz=torch.tensor([[1.0, 2, -1.75], [3, 4, 0.25]]),
    features=torch.tensor([[256.0, 7], [64, 8]]),
    feature_names=("intensity", "ring"),
)
BOXES = torch.tensor([[10.0, 1, -1, 4, 2, 1.5, 0.3]])


def test_a_scan_goes_to_the_shifted_frame_and_back():
    shifted = RIG.from_sensor(SCAN)
    assert shifted.xyz.tolist() == [[1, 2, 0], [3, 4, 2]]
    assert shifted.features.tolist() == [[1, 7], [0.25, 8]]  # only intensity is scaled
    back = RIG.to_sensor(shifted)
    assert torch.equal(back.xyz, SCAN.xyz)
    assert torch.equal(back.features, SCAN.features)
    assert SCAN.features[0, 0] == 256  # the argument is left unchanged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_and_coordinates_move_in_z_only(dtype):
    boxes = BOXES.to(dtype)
    assert RIG.from_sensor(boxes).tolist() == [[10, 1, 0.75, *boxes[0, 3:].tolist()]]
    assert RIG.from_sensor(boxes[:, :3]).tolist() == [[10, 1, 0.75]]
    assert RIG.to_sensor(RIG.from_sensor(boxes)).dtype == dtype
    found = RIG.to_sensor(Boxes3D(data=BOXES))
    assert torch.equal(found.data, RIG.to_sensor(BOXES))
    assert found.data[0, 2] == -2.75


def test_nothing_is_legal_everywhere():
    empty = PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1))
    assert len(RIG.from_sensor(empty)) == len(RIG.to_sensor(empty)) == len(RIG.from_sensor(Boxes3D.empty())) == 0
    bare = PointCloud(xyz=torch.zeros(1, 3), features=torch.zeros(1, 0), feature_names=())
    assert RIG.from_sensor(bare).xyz[0, 2] == 1.75


def test_a_wrong_scale_is_refused_and_says_what_to_set():
    with pytest.raises(InvalidInput, match=r"after scaling by 1, found 64 to 256; set RigSpec\.intensity_scale"):
        RigSpec().from_sensor(SCAN)
    with pytest.raises(InvalidInput, match="found nan and 1"):
        RigSpec(z_shift=float("nan"))
    with pytest.raises(InvalidInput, match="positive intensity_scale"):
        RigSpec(intensity_scale=0.0)


def test_the_fields_are_what_the_encoder_fingerprint_hashes():
    """Another name or another field would change the fingerprint of every encoder that is on the road."""
    assert asdict(RigSpec()) == {"z_shift": 0.0, "intensity_scale": 1.0}


def test_a_rig_is_of_numbers_and_a_frame_needs_a_rig_and_a_name():
    with pytest.raises(InvalidInput, match=r"a rig needs numbers, found z_shift '1'"):
        RigSpec(z_shift="1")
    with pytest.raises(InvalidInput, match=r"Frame.rig must be a RigSpec, found a value of type tuple"):
        Frame(id="a", points=SCAN, rig=(1, 2))
    with pytest.raises(InvalidInput, match=r"Frame.id must be a text, found 3"):
        Frame(id=3, points=SCAN)


def test_a_frame_names_its_rig():
    assert Frame(id="a", points=SCAN).rig == RigSpec()
    assert Frame(id="a", points=SCAN, rig=RIG).to("cpu").rig == RIG
