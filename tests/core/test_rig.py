"""The rig: one pair of functions between the sensor frame and the shifted frame, for scans, boxes and coordinates."""

import re
from dataclasses import asdict

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Frame
from upcycle3d.core.intensity import propose_scale
from upcycle3d.core.rig import RigSpec, count_intensity
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
    with pytest.raises(InvalidInput, match=r"found 64 to 256 after scaling by 1; .* give --intensity-scale 1/260"):
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


def test_a_rounding_error_of_the_factor_is_clipped_and_counted_and_more_is_refused():
    rows = torch.zeros(3, 3), torch.tensor([[0.0], [51.0], [255.0]])
    scan = PointCloud(xyz=rows[0], features=rows[1])
    assert 255 * 0.0039216 > 1
    for scale in (0.0039216, 1 / 255):
        assert RigSpec(intensity_scale=scale).from_sensor(scan).features.max() == 1
    counted = count_intensity(scan, 0.0039216)
    assert (counted.points_intensity_clipped, counted.points_intensity_outside) == (1, 0)
    assert (counted.lowest_intensity, counted.highest_intensity) == (0, 255)
    with pytest.raises(
        InvalidInput, match=r"found 0 to 1\.02 after scaling by 0\.004; give --intensity-scale 1/255 for a sensor"
    ):
        RigSpec(intensity_scale=0.004).from_sensor(scan)
    counted = count_intensity(scan, 0.004)
    assert (counted.points_intensity_clipped, counted.points_intensity_outside) == (0, 1)


@pytest.mark.parametrize(
    ("lowest", "highest", "words"),
    [
        (0, 255, "1/255 for a sensor that counts to 255"),
        (0, 180, "1/255"),
        (0, 64, "1/255 if the sensor counts to 255, or 1/100"),
        (0, 65_535, "1/65535"),
        (0, 891, "no usual sensor counts to 891: .* 1/900;"),
        (0, 3300, "no usual sensor counts to 3300: .* 1/3300;"),
        (0, 1.0099, "1/1.1;"),
        (0, 1.0, "leave --intensity-scale out"),
        (-0.5, 1.0, "no sensor gives -0.5: look at the columns"),
    ],
)
def test_the_factor_is_proposed_from_the_numbers_of_the_sensor(lowest, highest, words):
    assert re.search(words, propose_scale(lowest, highest))
