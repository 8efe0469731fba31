"""mmdetection3d's weights: the names of its modules, written out here, are ours under other names, and every number stays what it is."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from upcycle3d.core.boxes import decode_residuals
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.interchange.exporting import mmdet3d_checkpoint, openpcdet_checkpoint
from upcycle3d.perception.interchange.mmdet3d_weights import load_mmdet3d, mmdet3d_state
from upcycle3d.perception.models.defences.noise import NoiseConfig
from upcycle3d.perception.models.defended import DefendedDetectorConfig
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.detectors import DetectorConfig
from upcycle3d.perception.models.openpcdet import load_openpcdet
from upcycle3d.perception.models.post_processing import decode_boxes
from upcycle3d.perception.models.targets import direction_bin
from upcycle3d.perception.recipes.presets import PRESETS

Shapes = dict[str, tuple[int, ...]]

# ---- the names and shapes of mmdetection3d's own modules, built of its configurations for KITTI; nothing here looks at our modules


def norm(name: str, channels: int) -> Shapes:
    shapes: Shapes = {f"{name}.{what}": (channels,) for what in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def first_stage(head: str) -> Shapes:
    table = [("conv_input", 4, 16), ("encoder_layers.encoder_layer1.0", 16, 16)]
    for stage, c_in, c in ((2, 16, 32), (3, 32, 64), (4, 64, 64)):
        table += [(f"encoder_layers.encoder_layer{stage}.{i}", c if i else c_in, c) for i in range(3)]
    shapes: Shapes = {"middle_encoder.conv_out.0.weight": (3, 1, 1, 64, 128), **norm("middle_encoder.conv_out.1", 128)}
    for name, c_in, c in table:
        shapes |= {f"middle_encoder.{name}.0.weight": (3, 3, 3, c_in, c), **norm(f"middle_encoder.{name}.1", c)}
    for block, (c_in, c, stride) in enumerate(((256, 128, 1), (128, 256, 2))):
        for layer in range(6):
            shapes[f"backbone.blocks.{block}.{3 * layer}.weight"] = (c, c if layer else c_in, 3, 3)
            shapes |= norm(f"backbone.blocks.{block}.{3 * layer + 1}", c)
        shapes[f"neck.deblocks.{block}.0.weight"] = (c, 256, stride, stride)
        shapes |= norm(f"neck.deblocks.{block}.1", 256)
    for name, width in (("cls", 3), ("reg", 7), ("dir_cls", 2)):
        shapes |= {f"{head}.conv_{name}.weight": (6 * width, 512, 1, 1), f"{head}.conv_{name}.bias": (6 * width,)}
    return shapes


def conv_module(name: str, c_in: int, c: int) -> Shapes:
    return {f"{name}.conv.weight": (c, c_in, 1, 1), **norm(f"{name}.bn", c)}


def balls(name: str, c_in: int, c: int) -> Shapes:
    shapes: Shapes = {}
    for scale in (0, 1):
        shapes |= conv_module(f"{name}.mlps.{scale}.layer0", 3 + c_in, c) | conv_module(f"{name}.mlps.{scale}.layer1", c, c)
    return shapes


def pv_rcnn() -> Shapes:
    shapes = first_stage("rpn_head") | balls("points_encoder.rawpoints_sa_layer", 1, 16)
    for index, channels in enumerate((16, 32, 64, 64)):
        shapes |= balls(f"points_encoder.voxel_sa_layers.{index}", channels, channels)
    shapes |= conv_module("points_encoder.point_feature_fusion_layer.0", 640, 128)
    for layer, c_in in ((0, 640), (3, 256)):
        name = "roi_head.semantic_head.seg_cls_layer"
        shapes |= {f"{name}.{layer}.weight": (256, c_in), **norm(f"{name}.{layer + 1}", 256)}
    shapes |= {"roi_head.semantic_head.seg_cls_layer.6.weight": (1, 256), "roi_head.semantic_head.seg_cls_layer.6.bias": (1,)}
    shapes |= balls("roi_head.bbox_roi_extractor.roi_grid_pool_layer", 128, 64)
    for branch, c_in, out in (("shared_fc_layer", 6**3 * 128, 0), ("cls_layer", 256, 1), ("reg_layer", 256, 7)):
        name = f"roi_head.bbox_head.{branch}"
        shapes |= conv_module(f"{name}.0", c_in, 256) | conv_module(f"{name}.2", 256, 256)
        shapes |= {f"{name}.3.weight": (out, 256, 1, 1), f"{name}.3.bias": (out,)} if out else {}
    return shapes


@pytest.mark.parametrize(
    ("preset", "table"),
    [("kitti_second_iou", first_stage("bbox_head")), ("kitti_pv_rcnn_published", pv_rcnn())],
)
def test_names_and_shapes_are_those_of_mmdetection3d_in_both_directions(preset, table):
    detector = PRESETS[preset].detector.build()
    state, left_out = mmdet3d_state(detector)
    assert {name: tuple(value.shape) for name, value in state.items()} == table
    assert len(state) + len(left_out) == len(detector.state_dict())  # every weight is written or named
    assert all(name.startswith("roi_head.") for name in left_out)


# ---- round trips


def build(config: DetectorConfig, seed: int) -> Detector:
    """A detector in which no two statistics are alike."""
    torch.manual_seed(seed)
    detector = config.build()
    for name, value in detector.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand(value.shape))
        elif name.endswith("num_batches_tracked"):
            value.fill_(seed)
    return detector


def equal(a: Detector, b: Detector, without: str = "-") -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items() if not name.startswith(without))


@pytest.mark.parametrize("preset", [name for name in PRESETS if "small" in name])
def test_weights_given_away_and_taken_back_are_bit_equal_for_every_kind_of_preset(preset):
    config = PRESETS[preset].detector
    source = build(config, 1)
    for layout in ("spconv 2", "spconv 1"):
        target = build(config, 2)
        assert load_openpcdet(target, openpcdet_checkpoint(source, layout).content["model_state"]) == layout
        assert equal(source, target)
    classes = config.class_names[::-1]
    state = mmdet3d_checkpoint(source, classes).content["state_dict"]
    for turned in (state, {n: t.permute(4, 0, 1, 2, 3) if t.dim() == 5 else t for n, t in state.items()}):
        target = build(config, 2)
        _, absent = load_mmdet3d(target, turned, classes)
        assert equal(source, target, without="decoder.roi_head." if absent else "-")


def second_three() -> tuple[Detector, dict[str, Tensor]]:
    source = build(PRESETS["small_three_classes"].detector, 1)
    return source, mmdet3d_state(source, ("Cyclist", "Car", "Pedestrian"))[0]


def test_the_channels_of_a_class_follow_it():
    source, state = second_three()
    ours, theirs = source.decoder.anchor_head.conv_cls.bias.view(3, 2, 3), state["bbox_head.conv_cls.bias"].view(3, 2, 3)
    place = {"Cyclist": 0, "Car": 1, "Pedestrian": 2}
    for anchor, name in enumerate(source.class_names):
        for other, scored in enumerate(source.class_names):
            assert torch.equal(ours[anchor, :, other], theirs[place[name], :, place[scored]])
    box, moved = source.decoder.anchor_head.conv_box.weight.view(3, 14, -1), state["bbox_head.conv_reg.weight"].view(3, 14, -1)
    assert all(torch.equal(box[i], moved[place[name]]) for i, name in enumerate(source.class_names))


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded():
    source, state = second_three()
    target = build(PRESETS["small_three_classes"].detector, 2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    del state["neck.deblocks.0.0.weight"]
    with pytest.raises(InvalidInput, match=r"\(2 names\)[^$]*missing neck.deblocks.0.0.weight[^$]*left over rpn_head.x"):
        load_mmdet3d(target, state | {"rpn_head.x": torch.zeros(1)}, source.class_names)
    state = mmdet3d_state(source)[0]
    with pytest.raises(InvalidInput, match="are not the same"):
        load_mmdet3d(target, state, ("Car", "Pedestrian", "Van"))
    state["bbox_head.conv_cls.bias"] = torch.zeros(5)
    with pytest.raises(InvalidInput, match=r"conv_cls.bias: expected \(18,\), found \(5,\)"):
        load_mmdet3d(target, state, source.class_names)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_second_is_exported_without_the_head_that_it_has_not():
    config = PRESETS["small"].detector
    second = replace(config, decoder=replace(config.decoder, ranked_by="class")).build()
    made = openpcdet_checkpoint(second)
    assert made.left_out
    assert not any(name.startswith("roi_head.") for name in made.content["model_state"])
    load_openpcdet(second, made.content["model_state"], without_iou_head=True)
    assert not openpcdet_checkpoint(config.build()).left_out
    assert any("ranked by the probability of their class" in text for text in mmdet3d_checkpoint(config.build()).differences)


# ---- where the first half turn begins


@pytest.mark.parametrize("offset", [0.78539, -torch.pi / 2, 0.78539 - torch.pi, 0.0])
def test_directions_mean_the_same_wherever_the_first_half_turn_begins(offset):
    """The rule of OpenPCDet and mmdetection3d: fold the yaw into [offset, offset + pi), then add the half turns that the class says."""
    yaw = torch.linspace(-3.1, 3.1, 300)
    anchors = torch.tensor([[1.0, 2, 3, 4, 2, 1.5, 0.0]]).expand(300, 7)
    codes = torch.zeros(300, 7)
    codes[:, 6] = yaw
    boxes = decode_residuals(codes, anchors)
    bins = direction_bin(boxes[:, 6], offset)
    logits = torch.nn.functional.one_hot(bins, 2).float()
    found = decode_boxes(codes, logits, anchors, offset)[:, 6]
    turns = (found - yaw) / (2 * torch.pi)
    assert torch.allclose(turns, turns.round(), atol=1e-5)
    by_hand = [offset + (float(y) - offset) % torch.pi + torch.pi * int(d) for y, d in zip(yaw, bins, strict=True)]
    assert torch.allclose(found, torch.tensor(by_hand), atol=1e-5)


def test_a_changed_detector_is_refused_with_a_sentence():
    config = DefendedDetectorConfig(detector=PRESETS["small"].detector, defences=(NoiseConfig(),))
    with pytest.raises(InvalidInput, match="no counterpart"):
        openpcdet_checkpoint(config.build())
