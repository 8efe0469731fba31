"""OpenPCDet's weights: its layer tables, written out here, are ours under other names, and whatever does not fit is named."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.cut import VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.models.decoders.bev import BevBackboneConfig
from upcycle3d.perception.models.decoders.second_iou import SecondIouConfig
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.detectors import DetectorConfig
from upcycle3d.perception.models.encoders.second import SecondEncoderConfig
from upcycle3d.perception.models.openpcdet import load_openpcdet, openpcdet_parts, openpcdet_state
from upcycle3d.perception.models.second_iou import SecondIouDetectorConfig
from upcycle3d.perception.recipes.architectures import (
    KITTI_PV_RCNN_PUBLISHED_DETECTOR,
    KITTI_SECOND_IOU_DETECTOR,
    SMALL_PV_RCNN_PUBLISHED_DETECTOR,
    WAYMO_PV_RCNN_PUBLISHED_DETECTOR,
)

Shapes = dict[str, tuple[int, ...]]

# ---- the layer tables of OpenPCDet's kitti_models and waymo_models, in its names; nothing here looks at our modules


def norm(name: str, channels: int) -> Shapes:
    statistics = {f"{name}.{what}": (channels,) for what in ("weight", "bias", "running_mean", "running_var")}
    return {**statistics, f"{name}.num_batches_tracked": ()}


def biased(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def backbone_3d(inputs: int) -> Shapes:
    table = [("conv_input", inputs, 16), ("conv1.0", 16, 16)]
    for stage, c_in, c in ((2, 16, 32), (3, 32, 64), (4, 64, 64)):
        table += [(f"conv{stage}.0", c_in, c), (f"conv{stage}.1", c, c), (f"conv{stage}.2", c, c)]
    shapes: Shapes = {"backbone_3d.conv_out.0.weight": (128, 3, 1, 1, 64), **norm("backbone_3d.conv_out.1", 128)}
    for name, c_in, c in table:
        shapes |= {f"backbone_3d.{name}.0.weight": (c, 3, 3, 3, c_in), **norm(f"backbone_3d.{name}.1", c)}
    return shapes


def bev_and_anchors(classes: int) -> Shapes:
    shapes: Shapes = {}
    for block, (c_in, c, stride) in enumerate(((256, 128, 1), (128, 256, 2))):
        for layer in range(6):  # 0 is the padding; convolution, norm and ReLU follow six times
            index = 1 + 3 * layer
            shapes[f"backbone_2d.blocks.{block}.{index}.weight"] = (c, c if layer else c_in, 3, 3)
            shapes |= norm(f"backbone_2d.blocks.{block}.{index + 1}", c)
        shapes[f"backbone_2d.deblocks.{block}.0.weight"] = (c, 256, stride, stride)
        shapes |= norm(f"backbone_2d.deblocks.{block}.1", 256)
    for name, width in (("cls", classes), ("box", 7), ("dir_cls", 2)):
        shapes |= biased(f"dense_head.conv_{name}", 2 * classes * width, 512, 1, 1)
    return shapes


def two_layers(name: str, c_in: int) -> Shapes:
    """Convolution, norm, ReLU, dropout, convolution, norm, ReLU."""
    shapes: Shapes = {f"{name}.0.weight": (256, c_in, 1), f"{name}.4.weight": (256, 256, 1)}
    return shapes | norm(f"{name}.1", 256) | norm(f"{name}.5", 256)


def set_abstraction(name: str, c_in: int, c: int) -> Shapes:
    shapes: Shapes = {}
    for scale in (0, 1):
        mlp = f"{name}.mlps.{scale}"
        shapes |= {f"{mlp}.0.weight": (c, 3 + c_in, 1, 1), f"{mlp}.3.weight": (c, c, 1, 1)}
        shapes |= norm(f"{mlp}.1", c) | norm(f"{mlp}.4", c)
    return shapes


def second(inputs: int = 4, classes: int = 3) -> Shapes:
    return {"global_step": (1,), **backbone_3d(inputs), **bev_and_anchors(classes)}


def second_iou() -> Shapes:
    head = two_layers("roi_head.shared_fc_layer", 512 * 7 * 7) | two_layers("roi_head.iou_layers", 256)
    return second() | head | biased("roi_head.iou_layers.7", 1, 256, 1)


def pv_rcnn(inputs: int, stages: tuple[int, ...], fused_from: int) -> Shapes:
    shapes = second(inputs)
    for index, stage in enumerate(stages):
        channels = (16, 32, 64, 64)[stage - 1]
        shapes |= set_abstraction(f"pfe.SA_layers.{index}", channels, channels)
    shapes |= set_abstraction("pfe.SA_rawpoints", inputs - 3, 16)
    shapes |= {"pfe.vsa_point_feature_fusion.0.weight": (128, fused_from), **norm("pfe.vsa_point_feature_fusion.1", 128)}
    for layer, c_in in ((0, fused_from), (3, 256)):
        shapes |= {f"point_head.cls_layers.{layer}.weight": (256, c_in), **norm(f"point_head.cls_layers.{layer + 1}", 256)}
    shapes |= biased("point_head.cls_layers.6", 1, 256)
    shapes |= set_abstraction("roi_head.roi_grid_pool_layer", 128, 64)
    for branch, c_in in (("shared_fc_layer", 6**3 * 128), ("cls_layers", 256), ("reg_layers", 256)):
        shapes |= two_layers(f"roi_head.{branch}", c_in)
    return shapes | biased("roi_head.cls_layers.7", 1, 256, 1) | biased("roi_head.reg_layers.7", 7, 256, 1)


KITTI_PV_RCNN_TABLE = pv_rcnn(4, (1, 2, 3, 4), 640)


@pytest.mark.parametrize(
    ("config", "table"),
    [
        pytest.param(KITTI_SECOND_IOU_DETECTOR, second_iou(), id="second_iou"),
        pytest.param(KITTI_PV_RCNN_PUBLISHED_DETECTOR, KITTI_PV_RCNN_TABLE, id="pv_rcnn"),
        pytest.param(WAYMO_PV_RCNN_PUBLISHED_DETECTOR, pv_rcnn(5, (3, 4), 544), id="waymo_pv_rcnn"),
    ],
)
def test_names_and_shapes_are_those_of_openpcdet_in_both_directions(config: DetectorConfig, table: Shapes):
    model = config.build()
    ours = {name: tuple(t.shape) for name, t in openpcdet_state(model).items()}
    assert sorted(table.items() - ours.items()) == []  # every weight of theirs has a place here
    assert sorted(ours.items() - table.items()) == []  # every weight here is one of theirs
    assert len(ours) == len(model.state_dict()) + 1  # none of ours is left out; one more is global_step


def test_second_is_second_iou_without_its_head():
    assert second() == {n: shape for n, shape in second_iou().items() if not n.startswith("roi_head.")}


@pytest.mark.parametrize(
    ("name", "table"), [("second", second()), ("second_iou", second_iou()), ("pv_rcnn", KITTI_PV_RCNN_TABLE)]
)
def test_the_tables_of_this_test_are_those_of_openpcdets_own_modules(name, table):
    golden = tiny.shared("reference/golden", "the names and shapes of the weights of OpenPCDet's own modules")
    entries = json.loads((golden / f"state_dict_{name}.json").read_text())["entries"]
    assert {e["name"]: tuple(e["shape"]) for e in entries} == table


# ---- loading, on small detectors

SECOND_IOU = SecondIouDetectorConfig(
    encoder=SecondEncoderConfig(
        grid=VoxelGrid(range=(0.0, -1.6, -1.0, 3.2, 1.6, 3.0), voxel_size=(0.1, 0.1, 0.1)), channels=(3, 3, 3, 4, 2)
    ),
    decoder=SecondIouConfig(
        bev=BevBackboneConfig(layers=(1, 1), channels=(2, 2), up_channels=(2, 2)), head_channels=4, pool_size=2
    ),
)
PV_RCNN = SMALL_PV_RCNN_PUBLISHED_DETECTOR
BOTH = pytest.mark.parametrize("config", [SECOND_IOU, PV_RCNN], ids=["second_iou", "pv_rcnn"])


def detector(config: DetectorConfig, seed: int) -> Detector:
    """A detector whose batch-norm statistics are not all alike."""
    torch.manual_seed(seed)
    model = config.build()
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand(value.shape))
        elif name.endswith("num_batches_tracked"):
            value.fill_(seed)
    return model


def weights(model: Detector) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@BOTH
def test_weights_given_to_openpcdet_come_back_equal(config):
    source, target = detector(config, 1), detector(config, 2)
    state = openpcdet_state(source)
    state["global_step"] += 7
    assert load_openpcdet(target, state) == "spconv 2"
    assert same(weights(target), weights(source))


@BOTH
def test_what_is_given_away_is_a_copy(config):
    model = detector(config, 1)
    before = weights(model)
    for value in openpcdet_state(model).values():
        value.fill_(3)
    assert same(weights(model), before)


def test_weights_arrive_at_the_layer_of_the_same_place():
    state = openpcdet_state(detector(PV_RCNN, 1))
    model = detector(PV_RCNN, 2)
    load_openpcdet(model, state)
    encoder, decoder = model.encoder, model.decoder
    for name, here in {
        "backbone_3d.conv3.2.0.weight": encoder.second.sparse_backbone.conv3[2][0].weight,
        "pfe.SA_layers.1.mlps.0.4.running_var": encoder.stage_abstractions[1].mlps[0][4].running_var,
        "pfe.SA_rawpoints.mlps.1.3.weight": encoder.raw_abstraction.mlps[1][3].weight,
        "pfe.vsa_point_feature_fusion.0.weight": decoder.fusion[0].weight,
        "point_head.cls_layers.6.bias": decoder.keypoint_head.cls_layers[6].bias,
        "backbone_2d.deblocks.1.0.weight": decoder.bev_backbone.deblocks[1][0].weight,
        "dense_head.conv_dir_cls.bias": decoder.anchor_head.conv_dir_cls.bias,
        "roi_head.reg_layers.5.running_mean": decoder.roi_head.reg_layers[5].running_mean,
    }.items():
        assert torch.equal(state[name], here), name


@BOTH
def test_every_weight_lies_in_exactly_one_part(config):
    model = detector(config, 1)
    parts = [f"{part}." for part in openpcdet_parts(model)]
    assert all(sum(name.startswith(p) for p in parts) == 1 for name in model.state_dict())


@BOTH
def test_weights_of_spconv_1_are_turned_round_also_where_a_shape_fits_both_ways(config):
    """The second layer of SECOND_IOU has 3 channels in and out: its shape does not tell, those of other layers do."""
    source, target = detector(config, 1), detector(config, 2)
    state = {n: t.permute(1, 2, 3, 4, 0) if t.dim() == 5 else t for n, t in openpcdet_state(source).items()}
    if config is SECOND_IOU:
        assert state["backbone_3d.conv1.0.0.weight"].shape == (3, 3, 3, 3, 3)
    assert load_openpcdet(target, state) == "spconv 1"
    assert same(weights(target), weights(source))


def test_missing_left_over_and_misfit_weights_are_all_listed_and_nothing_is_loaded():
    model = detector(SECOND_IOU, 1)
    before = weights(model)
    state = openpcdet_state(detector(SECOND_IOU, 2))
    del state["dense_head.conv_cls.bias"]
    state["roi_head.reg_layers.0.weight"] = torch.zeros(1)
    state["vfe.pfn_layers.0.linear.weight"] = torch.zeros(64, 10)
    state["backbone_3d.conv_input.1.weight"] = torch.zeros(5)
    state["backbone_3d.conv_input.1.bias"] = torch.full((3,), torch.nan)
    state["backbone_3d.conv_input.1.running_mean"] = torch.zeros(3, dtype=torch.int64)
    state["backbone_3d.conv_input.1.running_var"] = torch.zeros(3, device="meta")
    state["backbone_2d.blocks.0.1.weight"] = torch.zeros(2, 4, 3, 3).to_sparse()
    state["backbone_2d.blocks.0.4.weight"] = torch.zeros(2, 2, 3, 3, dtype=torch.complex64)
    with pytest.raises(InvalidInput) as caught:
        load_openpcdet(model, state)
    message = str(caught.value)
    for part in (
        "(9 names)",
        "missing dense_head.conv_cls.bias (18,)",
        "left over roi_head.reg_layers.0.weight (1,)",
        "left over vfe.pfn_layers.0.linear.weight (64, 10)",
        "backbone_3d.conv_input.1.weight: expected (3,), found (5,)",
        "backbone_3d.conv_input.1.bias: holds numbers that are not finite",
        "backbone_3d.conv_input.1.running_mean: expected torch.float32, found torch.int64",
        "backbone_3d.conv_input.1.running_var: expected plain numbers",
        "backbone_2d.blocks.0.1.weight: expected plain numbers, found a tensor of torch.sparse_coo",
        "backbone_2d.blocks.0.4.weight: expected torch.float32, found torch.complex64",
    ):
        assert part in message
    assert same(weights(model), before)


def test_weights_of_other_classes_or_point_features_say_so():
    one = replace(SECOND_IOU, decoder=replace(SECOND_IOU.decoder, anchors=SECOND_IOU.decoder.anchors[:1]))
    with pytest.raises(InvalidInput, match=r"anchors of 3 classes, this detector of 1 \(Car\)"):
        load_openpcdet(detector(one, 1), openpcdet_state(detector(SECOND_IOU, 2)))
    waymo = replace(SECOND_IOU, encoder=replace(SECOND_IOU.encoder, point_features=("intensity", "elongation")))
    state = openpcdet_state(detector(waymo, 2))
    for turned in (state, {n: t.permute(1, 2, 3, 4, 0) if t.dim() == 5 else t for n, t in state.items()}):
        with pytest.raises(InvalidInput, match="weights read 5 values per point, this detector 4"):
            load_openpcdet(detector(SECOND_IOU, 1), turned)


def test_weights_of_neither_detector_are_not_taken_for_seconds():
    state = {"vfe.pfn_layers.0.linear.weight": torch.zeros(64, 10), "backbone_3d.conv_input.0.weight": torch.tensor(1.0)}
    with pytest.raises(InvalidInput, match=r"and 129 more\n  left over vfe\.pfn_layers") as caught:
        load_openpcdet(detector(SECOND_IOU, 1), state)
    assert "left over vfe.pfn_layers.0.linear.weight" in str(caught.value)
    assert "build the detector with the configuration" in str(caught.value)


def test_weights_of_the_other_detector_say_so():
    with pytest.raises(InvalidInput, match="SECOND-IoU, the weights have a keypoint part"):
        load_openpcdet(detector(SECOND_IOU, 1), openpcdet_state(detector(PV_RCNN, 2)))
    with pytest.raises(InvalidInput, match="PV-RCNN, the weights have no keypoint part"):
        load_openpcdet(detector(PV_RCNN, 1), openpcdet_state(detector(SECOND_IOU, 2)))


def test_second_is_imported_only_when_its_missing_head_is_accepted():
    source, target = detector(SECOND_IOU, 1), detector(SECOND_IOU, 2)
    head = {n: t for n, t in weights(target).items() if n.startswith("decoder.roi_head.")}
    state = {n: t for n, t in openpcdet_state(source).items() if not n.startswith("roi_head.")}
    with pytest.raises(InvalidInput, match=r"no IoU head.*must be trained"):
        load_openpcdet(target, state)
    load_openpcdet(target, state, without_iou_head=True)
    expected = {n: t for n, t in weights(source).items() if not n.startswith("decoder.roi_head.")} | head
    assert same(weights(target), expected)


def test_leaving_out_a_head_that_is_there_or_cannot_be_is_refused():
    with pytest.raises(InvalidInput, match="have an IoU head"):
        load_openpcdet(detector(SECOND_IOU, 1), openpcdet_state(detector(SECOND_IOU, 2)), without_iou_head=True)
    with pytest.raises(InvalidInput, match="PV-RCNN has no IoU head"):
        load_openpcdet(detector(PV_RCNN, 1), openpcdet_state(detector(PV_RCNN, 2)), without_iou_head=True)
