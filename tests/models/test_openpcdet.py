"""OpenPCDet's names: every weight of ours has exactly one there and the other way round, and whatever does not fit is named."""

import pytest
import torch

from upcycle3d.perception.features import VoxelGrid
from upcycle3d.perception.models.decoders.bev import BevBackboneConfig
from upcycle3d.perception.models.decoders.second_iou import SecondIouConfig
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.encoders.second import SecondEncoderConfig
from upcycle3d.perception.models.openpcdet import PARTS, load_openpcdet, to_our_name
from upcycle3d.perception.models.second_iou import SecondIouDetectorConfig, second_iou
from upcycle3d.perception.structures import InvalidInput

CONFIG = SecondIouDetectorConfig(
    encoder=SecondEncoderConfig(
        grid=VoxelGrid(range=(0.0, -1.6, -1.0, 3.2, 1.6, 3.0), voxel_size=(0.1, 0.1, 0.1)), channels=(2, 2, 2, 2, 2)
    ),
    decoder=SecondIouConfig(
        bev=BevBackboneConfig(layers=(1, 1), channels=(2, 2), up_channels=(2, 2)), head_channels=4, pool_size=2
    ),
)


def detector(seed: int) -> Detector:
    torch.manual_seed(seed)
    return second_iou(CONFIG)


def their_state(model: Detector) -> dict[str, torch.Tensor]:
    """The weights of ``model`` under OpenPCDet's names."""
    to_theirs = {ours: theirs for theirs, ours in PARTS.items()}
    state = {"global_step": torch.tensor([7])}
    for name, value in model.state_dict().items():
        part = next(p for p in to_theirs if name.startswith(p + "."))
        state[to_theirs[part] + name[len(part) :]] = value.clone()
    return state


def test_every_weight_has_a_name_in_both_worlds():
    model = detector(0)
    names = [n for n in their_state(model) if n != "global_step"]
    assert sorted(map(to_our_name, names)) == sorted(model.state_dict())


def test_names_of_the_reference_are_met():
    names = their_state(detector(0))
    for expected in (
        "backbone_3d.conv_input.0.weight", "backbone_3d.conv1.0.1.running_mean", "backbone_3d.conv4.2.0.weight",
        "backbone_3d.conv_out.1.bias", "backbone_2d.blocks.0.1.weight", "backbone_2d.deblocks.1.0.weight",
        "dense_head.conv_cls.weight", "dense_head.conv_dir_cls.bias", "roi_head.shared_fc_layer.0.weight",
        "roi_head.shared_fc_layer.4.weight", "roi_head.iou_layers.7.bias",
    ):  # fmt: skip
        assert expected in names


def test_loading_copies_every_weight():
    source, target = detector(0), detector(1)
    load_openpcdet(target, their_state(source))
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_missing_left_over_and_misshapen_weights_are_all_listed_and_nothing_is_loaded():
    model = detector(1)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    state = their_state(detector(0))
    del state["dense_head.conv_box.bias"]
    state["roi_head.reg_layers.0.weight"] = torch.zeros(1)
    state["backbone_3d.conv_input.1.weight"] = torch.zeros(5)
    with pytest.raises(InvalidInput) as caught:
        load_openpcdet(model, state)
    message = str(caught.value)
    assert "3 names" in message
    assert "missing decoder.anchor_head.conv_box.bias" in message
    assert "left over decoder.roi_head.reg_layers.0.weight" in message
    assert "encoder.sparse_backbone.conv_input.1.weight: expected (2,), found (5,)" in message
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["point_head.cls_layers.0.weight", "weight", ""])
def test_a_part_that_we_do_not_have_is_refused(name):
    with pytest.raises(InvalidInput, match="no place for the OpenPCDet weight"):
        to_our_name(name)
