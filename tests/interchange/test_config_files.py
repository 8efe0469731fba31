"""Configurations of OpenPCDet and mmdetection3d are read as data, become our detectors, and nothing in them is dropped in silence."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.interchange.config_files import NotRead, python_config, read_python_config, read_yaml_config
from upcycle3d.perception.interchange.mmdet3d_config import mmdet3d_classes, read_mmdet3d_config
from upcycle3d.perception.interchange.openpcdet_config import read_openpcdet_config
from upcycle3d.perception.interchange.settings import Settings
from upcycle3d.perception.models.post_processing import FinalNms, ProposalNms
from upcycle3d.perception.recipes.presets import PRESETS

SECOND_IOU = PRESETS["kitti_second_iou"].detector
PV_RCNN = PRESETS["kitti_pv_rcnn_published"].detector

# ---- Python as data


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder / f"{next(iter(files))}.py"


def test_python_is_computed_from_literals_and_names_alone(tmp_path):
    path = write(
        tmp_path,
        top="""
_base_ = ['./model.py', './data.py']
import os
os.mkdir('ran')
root = 'data/' + 'kitti/'
voxel = [0.05, 0.05, 0.1]
lr = 0.001 * 10
model = dict(type='VoxelNet', head=dict(_delete_=True, sizes=[-1, (2, 3)], voxel=voxel, path=root + 'x'), again=_base_.model.depth)
call = os.getcwd()
product = 'x' * 1000000000
function = lambda: 3
""",
        model="model = dict(type='Other', depth=4, head=dict(a=1), neck={'b': 2})",
        data="data = dict(samples=2)\nlr = 1",
    )
    values = read_python_config(path)
    assert values["model"] == {
        "type": "VoxelNet",
        "depth": 4,
        "head": {"sizes": [-1, (2, 3)], "voxel": [0.05, 0.05, 0.1], "path": "data/kitti/x"},
        "neck": {"b": 2},
        "again": 4,
    }
    assert values["lr"] == pytest.approx(0.01)
    assert values["data"] == {"samples": 2}
    for name in ("call", "product", "function"):
        assert isinstance(values[name], NotRead)
    assert not Path("ran").exists()
    with pytest.raises(InvalidInput, match="must be a int"):
        Settings(values, "top.py").take("call", int)


def test_settings_that_are_unpacked_are_there_and_later_ones_replace_them():
    text = """'''A text that stands alone.'''
import os
def helper():
    os.abort()
common = dict(channels=64, stride=2)
model = dict(type='SECOND', **common)
neck = {**common, 'stride': 1}
unknown = dict(a=1, **helper())
"""
    values = python_config(text, "here")
    assert values["model"] == {"type": "SECOND", "channels": 64, "stride": 2}
    assert values["neck"] == {"channels": 64, "stride": 1}
    assert isinstance(values["unknown"], NotRead)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "no Python"),
        ("a = " + "[" * 5000, "no Python"),
        ("from mmengine.config import read_base\nwith read_base():\n    from .x import *", "imports its bases as Python modules"),
        ("model = dict(a=1)\nmodel['a'] = 2", "line 2: `model.'a'. = 2` may change a setting"),
        ("model = dict(a=1)\nmodel.update(a=2)", "line 2: .* may change a setting"),
        ("size = 1\nif size:\n    size = 2", "line 2: .* may change a setting"),
        ("size = 1\nsize += 1", "line 2: .* may change a setting"),
        ("size, other = 1, 2", "line 1: .* may change a setting"),
        ("_base_ = ['mmdet3d::x.py']", "a file of another package"),
        ("_base_ = ['missing.py']", "there is no configuration .*missing.py, on which .*top.py is based"),
        ("_base_ = ['top.py']", "is based on itself"),
    ],
)
def test_python_that_cannot_be_read_says_why(tmp_path, text, message):
    with pytest.raises(InvalidInput, match=message):
        read_python_config(write(tmp_path, top=text))


# ---- OpenPCDet

ANCHOR = "{class_name: %s, anchor_sizes: [[%s]], anchor_rotations: [0, 1.57], anchor_bottom_heights: [%s], align_center: False, feature_map_stride: 8, matched_threshold: %s, unmatched_threshold: %s}"
ANCHORS = [
    ANCHOR % ("Car", "3.9, 1.6, 1.56", -1.78, 0.6, 0.45),
    ANCHOR % ("Pedestrian", "0.8, 0.6, 1.73", -0.6, 0.5, 0.35),
    ANCHOR % ("Cyclist", "1.76, 0.6, 1.73", -0.6, 0.5, 0.35),
]
DATA = """
DATASET: KittiDataset
POINT_CLOUD_RANGE: [0, -40, -3, 70.4, 40, 1]
POINT_FEATURE_ENCODING: {used_feature_list: [x, y, z, intensity]}
DATA_PROCESSOR:
  - {NAME: shuffle_points}
  - NAME: transform_points_to_voxels
    VOXEL_SIZE: [0.05, 0.05, 0.1]
    MAX_POINTS_PER_VOXEL: 5
    MAX_NUMBER_OF_VOXELS: {train: 16000, test: 40000}
"""
FIRST = f"""
CLASS_NAMES: [Car, Pedestrian, Cyclist]
DATA_CONFIG: {{_BASE_CONFIG_: cfgs/dataset_configs/kitti.yaml, DATASET: Mine}}
OPTIMIZATION: {{LR: 0.003, NUM_EPOCHS: 80}}
MODEL:
  NAME: NETWORK
  VFE: {{NAME: MeanVFE}}
  BACKBONE_3D: {{NAME: VoxelBackBone8x}}
  MAP_TO_BEV: {{NAME: HeightCompression, NUM_BEV_FEATURES: 256}}
  BACKBONE_2D: {{NAME: BaseBEVBackbone, LAYER_NUMS: [5, 5], LAYER_STRIDES: [1, 2], NUM_FILTERS: [128, 256],
    UPSAMPLE_STRIDES: [1, 2], NUM_UPSAMPLE_FILTERS: [256, 256]}}
  DENSE_HEAD:
    NAME: AnchorHeadSingle
    CLASS_AGNOSTIC: False
    USE_DIRECTION_CLASSIFIER: True
    DIR_OFFSET: 0.78539
    DIR_LIMIT_OFFSET: 0.0
    NUM_DIR_BINS: 2
    ANCHOR_GENERATOR_CONFIG: [{", ".join(ANCHORS)}]
    TARGET_ASSIGNER_CONFIG: {{BOX_CODER: ResidualCoder}}
    LOSS_CONFIG: {{LOSS_WEIGHTS: {{loc_weight: 2.0, dir_weight: 0.2}}}}
  POST_PROCESSING: {{SCORE_THRESH: 0.1, NMS_CONFIG: {{MULTI_CLASSES_NMS: False, NMS_TYPE: nms_gpu, NMS_THRESH: FINAL,
    NMS_PRE_MAXSIZE: 4096, NMS_POST_MAXSIZE: 500}}}}
"""
SECOND_STAGE = """
  ROI_HEAD:
    NAME: SECONDHead
    CLASS_AGNOSTIC: True
    SHARED_FC: [256, 256]
    IOU_FC: [256, 256]
    DP_RATIO: 0.3
    NMS_CONFIG:
      TRAIN: {NMS_TYPE: nms_gpu, MULTI_CLASSES_NMS: False, NMS_PRE_MAXSIZE: 9000, NMS_POST_MAXSIZE: 512, NMS_THRESH: 0.8}
      TEST: {NMS_TYPE: nms_gpu, MULTI_CLASSES_NMS: False, NMS_PRE_MAXSIZE: 1024, NMS_POST_MAXSIZE: 100, NMS_THRESH: 0.7}
    ROI_GRID_POOL: {GRID_SIZE: 7}
    TARGET_CONFIG: {ROI_PER_IMAGE: 128, FG_RATIO: 0.5, CLS_SCORE_TYPE: roi_iou, CLS_FG_THRESH: 0.75, CLS_BG_THRESH: 0.25,
      CLS_BG_THRESH_LO: 0.1, HARD_BG_RATIO: 0.8, REG_FG_THRESH: 0.55}
"""
BALLS = "{MLPS: [[%s, %s], [%s, %s]], POOL_RADIUS: [%s], NSAMPLE: [%s]}"
SOURCES = {"raw_points": (16, "0.4, 0.8", "16, 16"), "x_conv1": (16, "0.4, 0.8", "16, 16"), "x_conv2": (32, "0.8, 1.2", "16, 32")}
SOURCES |= {"x_conv3": (64, "1.2, 2.4", "16, 32"), "x_conv4": (64, "2.4, 4.8", "16, 32")}
LAYERS = ", ".join(f"{name}: {BALLS % (c, c, c, c, radii, limits)}" for name, (c, radii, limits) in SOURCES.items())
KEYPOINTS = f"""
  PFE: {{NAME: VoxelSetAbstraction, POINT_SOURCE: raw_points, NUM_KEYPOINTS: 2048, NUM_OUTPUT_FEATURES: 128, SAMPLE_METHOD: FPS,
    FEATURES_SOURCE: [bev, x_conv1, x_conv2, x_conv3, x_conv4, raw_points], SA_LAYER: {{{LAYERS}}}}}
  POINT_HEAD: {{NAME: PointHeadSimple, CLS_FC: [256, 256], USE_POINT_FEATURES_BEFORE_FUSION: True}}
"""
PV_STAGE = SECOND_STAGE.replace("SECONDHead", "PVRCNNHead").replace(
    "IOU_FC: [256, 256]", "CLS_FC: [256, 256]\n    REG_FC: [256, 256]"
)
PV_STAGE = PV_STAGE.replace(
    "{GRID_SIZE: 7}", "{GRID_SIZE: 6, MLPS: [[64, 64], [64, 64]], POOL_RADIUS: [0.8, 1.6], NSAMPLE: [16, 16]}"
)


@pytest.fixture
def tools(tmp_path) -> Path:
    pytest.importorskip("yaml", reason="YAML is read with the extra [yaml]")
    folder = tmp_path / "tools" / "cfgs"
    (folder / "kitti_models").mkdir(parents=True)
    (folder / "dataset_configs").mkdir()
    (folder / "dataset_configs" / "kitti.yaml").write_text(DATA)
    return folder / "kitti_models"


def config(folder: Path, network: str, more: str = "", final: str = "0.01", **changes: str) -> Path:
    text = FIRST.replace("NETWORK", network).replace("FINAL", final) + more
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "x.yaml").write_text(text)
    return folder / "x.yaml"


def test_bases_lie_below_and_are_found_from_any_folder(tools, monkeypatch):
    monkeypatch.chdir("/")
    values = read_yaml_config(config(tools, "SECONDNet"))
    assert values["DATA_CONFIG"]["DATASET"] == "Mine"
    assert values["DATA_CONFIG"]["POINT_CLOUD_RANGE"] == [0, -40, -3, 70.4, 40, 1]


def test_published_configurations_of_openpcdet_are_our_presets(tools):
    assert read_openpcdet_config(config(tools, "SECONDNetIoU", SECOND_STAGE), SECOND_IOU).detector == SECOND_IOU
    read = read_openpcdet_config(config(tools, "PVRCNN", KEYPOINTS + PV_STAGE, "0.1"), PV_RCNN)
    assert read.detector == PV_RCNN
    assert not read.without_iou_head


def test_second_is_one_suppression_by_class_scores(tools):
    read = read_openpcdet_config(config(tools, "SECONDNet"), SECOND_IOU)
    expected = replace(SECOND_IOU.decoder, ranked_by="class", test_proposals=ProposalNms(pre=4096, iou=0.01, post=500))
    assert read.detector == replace(SECOND_IOU, decoder=expected)
    assert read.without_iou_head
    turned = config(tools, "SECONDNet", **{"DIR_LIMIT_OFFSET: 0.0": "DIR_LIMIT_OFFSET: 1"})
    assert read_openpcdet_config(turned, SECOND_IOU).detector.decoder.direction_offset == pytest.approx(0.78539 - math.pi)


def test_what_has_no_counterpart_is_listed(tools):
    read = read_openpcdet_config(config(tools, "SECONDNet", "  BACKBONE_X: 3\n"), SECOND_IOU)
    found = {entry.setting: entry.value for entry in read.left_over}
    assert found == {
        "DATA_CONFIG": "'Mine'",
        "DATA_CONFIG.DATA_PROCESSOR": "2 settings",
        "OPTIMIZATION": "2 settings",
        "MODEL.MAP_TO_BEV.NUM_BEV_FEATURES": "256",
        "MODEL.BACKBONE_X": "3",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"VoxelBackBone8x": "VoxelResBackBone8x"}, "MODEL.BACKBONE_3D.NAME in .*x.yaml is 'VoxelResBackBone8x'"),
        ({"NUM_DIR_BINS: 2": "NUM_DIR_BINS: 4"}, "two half turns"),
        ({"[Car, Pedestrian, Cyclist]": "[Car, Cyclist, Pedestrian]"}, "one anchor for each of CLASS_NAMES"),
        ({"anchor_rotations: [0, 1.57]": "anchor_rotations: [0, 1.5708]"}, "0 and 1.57"),
        ({"cfgs/dataset_configs/kitti.yaml": "cfgs/other.yaml"}, "is in no folder above it"),
        ({"LAYER_NUMS: [5, 5]": "LAYER_NUMS: [5]"}, "must be 2 numbers"),
        ({"SCORE_THRESH: 0.1": "SCORE_THRESH: .nan"}, "score"),
        ({"SECONDNet": "PointPillar"}, "SECONDNet, SECONDNetIoU and PVRCNN can be imported"),
    ],
)
def test_a_network_that_is_not_built_here_is_refused(tools, change, message):
    with pytest.raises(InvalidInput, match=message):
        read_openpcdet_config(config(tools, "SECONDNet", **change), SECOND_IOU)


def test_a_preset_of_the_other_detector_is_refused(tools):
    with pytest.raises(InvalidInput, match="choose a preset of SECOND-IoU"):
        read_openpcdet_config(config(tools, "SECONDNet"), PV_RCNN)


# ---- mmdetection3d

MMDET3D = """
class_names = ['Pedestrian', 'Cyclist', 'Car']
optim_wrapper = dict(optimizer=dict(lr=0.1, type='AdamW'))
model = dict(
    type='VoxelNet',
    data_preprocessor=dict(voxel_layer=dict(
        max_num_points=5, point_cloud_range=[0, -40, -3, 70.4, 40, 1], voxel_size=[0.05, 0.05, 0.1], max_voxels=(16000, 40000))),
    voxel_encoder=dict(type='HardSimpleVFE'),
    middle_encoder=dict(type='SparseEncoder', in_channels=4, sparse_shape=[41, 1600, 1408], order=('conv', 'norm', 'act')),
    backbone=dict(type='SECOND', layer_nums=[5, 5], layer_strides=[1, 2], out_channels=[128, 256]),
    neck=dict(type='SECONDFPN', upsample_strides=[1, 2], out_channels=[256, 256]),
    bbox_head=dict(
        type='Anchor3DHead', num_classes=3, use_direction_classifier=True, diff_rad_by_sin=True,
        anchor_generator=dict(
            type='Anchor3DRangeGenerator',
            ranges=[[0, -40, -0.6, 70.4, 40, -0.6], [0, -40, -0.6, 70.4, 40, -0.6], [0, -40, -1.78, 70.4, 40, -1.78]],
            sizes=[[0.8, 0.6, 1.73], [1.76, 0.6, 1.73], [3.9, 1.6, 1.56]], rotations=[0, 1.57]),
        bbox_coder=dict(type='DeltaXYZWLHRBBoxCoder'),
        loss_cls=dict(use_sigmoid=True), loss_bbox=dict(loss_weight=2.0), loss_dir=dict(loss_weight=0.2)),
    train_cfg=dict(assigner=[
        dict(pos_iou_thr=0.5, neg_iou_thr=0.35), dict(pos_iou_thr=0.5, neg_iou_thr=0.35), dict(pos_iou_thr=0.6, neg_iou_thr=0.45)]),
    test_cfg=dict(use_rotate_nms=True, nms_thr=0.01, score_thr=0.1, nms_pre=100, max_num=50))
"""


def test_second_of_mmdetection3d_keeps_its_directions_and_takes_our_order_of_classes():
    values = python_config(MMDET3D, "here")
    read = read_mmdet3d_config(values, "here", mmdet3d_classes(values, {}), SECOND_IOU)
    expected = replace(
        SECOND_IOU.decoder,
        direction_offset=-math.pi / 2,
        ranked_by="class",
        test_proposals=ProposalNms(pre=100, iou=0.01, post=50),
        final=FinalNms(score=0.1, iou=0.01, pre=100, post=50),
    )
    assert read.detector == replace(SECOND_IOU, decoder=expected)
    assert [entry.setting for entry in read.left_over] == ["model.test_cfg (suppression)", "class_names", "optim_wrapper"]


def test_classes_are_found_in_the_checkpoint_first():
    assert mmdet3d_classes({"class_names": ["b"]}, {"dataset_meta": {"classes": ("a",)}}) == ("a",)
    assert mmdet3d_classes({"class_names": ["b"]}, {"CLASSES": ["c"]}) == ("c",)
    assert mmdet3d_classes({"metainfo": {"CLASSES": ["d"]}}, {}) == ("d",)
    assert mmdet3d_classes({}, {"classes": [3]}) == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[3.9, 1.6, 1.56]", "[1.6, 3.9, 1.56]", "before 1.0"),
        ("-1.78, 70.4, 40", "-1.78, 69, 40", "not the range of the points"),
        ("Anchor3DRangeGenerator", "AlignedAnchor3DRangeGenerator", "spread from one end"),
        ("[41, 1600, 1408]", "[40, 1600, 1408]", "sparse_shape"),
        ("in_channels=4", "in_channels=5", "reads 5 values per point"),
        ("num_classes=3", "num_classes=2", "there are the classes"),
        ("'HardSimpleVFE'", "'HardVFE'", "mean of their points"),
        ("'VoxelNet'", "'CenterPoint'", "can be imported"),
        ("nms_pre=100", "nms_pre=max(1, 2)", "must be a int"),
    ],
)
def test_a_model_of_mmdetection3d_that_is_not_built_here_is_refused(old, new, message):
    assert old in MMDET3D
    values = python_config(MMDET3D.replace(old, new), "here")
    with pytest.raises(InvalidInput, match=message):
        read_mmdet3d_config(values, "here", mmdet3d_classes(values, {}), SECOND_IOU)
