"""PV-RCNN equals OpenPCDet stage by stage, on a real KITTI frame with weights made by a rule (`conftest.py`).

OpenPCDet takes its keypoints from the raw points, and so does the encoder here. A neighbor on the edge of a ball may be in or
out by float rounding: the golden file flags the keypoints and regions near such an edge, and these are left out. The sparse backbone,
the anchor head and the proposals are the same as in SECOND-IoU (test_golden_second_iou.py); the balls are tested with `ball_query`.
"""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.features import CutFeatures, Keypoints
from upcycle3d.core.structures import PointCloud, Predictions
from upcycle3d.perception.models.decoders.pv_rcnn import PvRcnnOutputs
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.openpcdet import load_openpcdet
from upcycle3d.perception.models.post_processing import decode_regions
from upcycle3d.perception.recipes.architectures import KITTI_PV_RCNN_PUBLISHED_DETECTOR

LABEL = "stage by stage, on a real KITTI frame, the numbers of OpenPCDet"
GOLDEN = tiny.shared("reference/golden", LABEL)
SCAN = tiny.shared("data/kitti/training/velodyne_reduced/000003.bin", LABEL)
Golden = dict[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    detector: Detector
    features: CutFeatures
    outputs: PvRcnnOutputs
    predictions: Predictions


@pytest.fixture(scope="module")
def golden() -> Golden:
    return dict(np.load(GOLDEN / "pv_rcnn_kitti.npz"))


@pytest.fixture(scope="module")
def run(rule_weights) -> Run:
    spec = json.loads((GOLDEN / "state_dict_pv_rcnn.json").read_text())
    detector = replace(
        KITTI_PV_RCNN_PUBLISHED_DETECTOR, encoder=replace(KITTI_PV_RCNN_PUBLISHED_DETECTOR.encoder, keypoint_source="raw_points")
    ).build()
    load_openpcdet(detector, rule_weights(spec["entries"]))
    detector.eval()
    scan = torch.from_numpy(np.fromfile(SCAN, np.float32).reshape(-1, 4))
    with torch.no_grad():
        features = detector.encode([PointCloud(xyz=scan[:, :3], features=scan[:, 3:])])
        outputs = detector.decode(features)
        return Run(detector=detector, features=features, outputs=outputs, predictions=detector.predict(outputs)[0])


def close(found: torch.Tensor, expected: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected.astype(np.float64), atol=atol, rtol=0)


@pytest.fixture(scope="module")
def safe(golden) -> np.ndarray:
    """(2048,) keypoints without a neighbor on the edge of a ball."""
    flagged = golden["keypoint_near_ball_boundary"]
    assert flagged.mean() < 0.1
    return ~flagged


@pytest.fixture(scope="module")
def safe_regions(golden) -> np.ndarray:
    """(100,) regions whose own balls have no such neighbor, nor the keypoints that they gather: a tenth, they gather many."""
    flagged = golden["roi_near_ball_boundary"]
    assert flagged.sum() == 90
    return ~flagged


@pytest.fixture(scope="module")
def given_keypoints(golden) -> Keypoints:
    """What the golden run gave to its region head."""
    features = torch.from_numpy(golden["point_features"] * golden["keypoint_scores"][:, None])
    return Keypoints(xyz=torch.from_numpy(golden["keypoints"]), features=features, starts=(0, 2048))


def test_parameter_counts_of_every_part(run):
    encoder, decoder = run.detector.encoder, run.detector.decoder
    parts = {
        "backbone_3d": [encoder.second],
        "pfe": [encoder.raw_abstraction, encoder.stage_abstractions, decoder.fusion],
        "backbone_2d": [decoder.bev_backbone],
        "dense_head": [decoder.anchor_head],
        "point_head": [decoder.keypoint_head],
        "roi_head": [decoder.roi_head],
    }
    found = {name: sum(p.numel() for m in modules for p in m.parameters()) for name, modules in parts.items()}
    assert found == {
        "backbone_3d": 711_872, "pfe": 41_120 + 82_176, "backbone_2d": 4_576_768, "dense_head": 36_936,
        "point_head": 230_657, "roi_head": 7_436_168,
    }  # fmt: skip
    assert sum(p.numel() for p in run.detector.parameters()) == sum(found.values()) == 13_115_697


def test_voxels_come_in_the_order_of_the_reference_and_keypoints_are_its_points(run, golden):
    scan = torch.from_numpy(golden["points"])
    voxels = run.detector.encoder.voxelize([PointCloud(xyz=scan[:, :3], features=scan[:, 3:])])
    order = np.lexsort(golden["voxel_coords_zyx"].T[::-1])
    assert np.array_equal(voxels.coords[:, 1:].numpy(), golden["voxel_coords_zyx"][order])
    assert np.array_equal(run.features.keypoints.xyz.numpy(), golden["keypoints"])
    assert np.array_equal(golden["points"][golden["keypoint_index"], :3], golden["keypoints"])


def test_features_of_keypoints_before_and_after_fusion(run, golden, safe):
    before, rows = run.features.keypoints.features, golden["before_fusion_rows"]
    close(before[rows][safe[rows]], golden["point_features_before_fusion"][safe[rows]], 3e-4)
    # The map at the cut (the first 256) has no balls.
    close(before[rows, :256], golden["point_features_before_fusion"][:, :256], 3e-4)
    close(before.double().mean(0), golden["before_fusion_channel_mean"], 3e-4)
    close(before.double().std(0, correction=0), golden["before_fusion_channel_std"], 1e-3)
    with torch.no_grad():
        close(run.detector.decoder.fusion(before)[safe], golden["point_features"][safe], 3e-4)


def test_scores_of_keypoints(run, golden, safe):
    logits = run.outputs.keypoint_logits
    close(logits[safe], golden["keypoint_logits"][safe], 1e-4)
    close(torch.sigmoid(logits)[safe], golden["keypoint_scores"][safe], 2e-5)


def test_proposals(run, golden):
    proposals = run.outputs.proposals
    assert proposals.valid.all()
    close(proposals.boxes[0], golden["rois"], 1e-4)
    close(proposals.logits[0], golden["roi_scores"], 2e-5)
    assert np.array_equal(proposals.classes[0].numpy() + 1, golden["roi_labels"])


def test_regions_gather_the_keypoints_they_are_given(run, golden, given_keypoints):
    head, safe = run.detector.decoder.roi_head, ~golden["roi_own_ball_near_boundary"]
    with torch.no_grad():
        pooled = head.pool(torch.from_numpy(golden["rois"]), [0, 100], given_keypoints)
        shared = head.shared_fc_layer(pooled.transpose(1, 2).flatten(1)[..., None])[..., 0]
        quality, codes = head(torch.from_numpy(golden["rois"]), [0, 100], given_keypoints)
    rows = golden["roi_pooled_rows"]
    assert safe[rows].any()
    close(pooled[rows][safe[rows]], golden["roi_pooled"][safe[rows]], 3e-4)
    wide = pooled.double().flatten(1)
    close(wide.mean(1)[safe], golden["roi_pooled_mean"][safe], 3e-4)
    close(wide.std(1, correction=0)[safe], golden["roi_pooled_std"][safe], 3e-4)
    close(wide.amax(1)[safe], golden["roi_pooled_max"][safe], 3e-4)
    close(pooled.double().mean((0, 1)), golden["roi_pooled_channel_mean"], 3e-4)
    close(shared[safe], golden["roi_shared_features"][safe], 3e-4)
    close(quality[safe], golden["rcnn_cls"][safe], 1e-4)
    close(codes[safe], golden["rcnn_reg"][safe], 2e-5)


def test_quality_and_refined_boxes_end_to_end(run, golden, safe_regions):
    outputs = run.outputs
    close(outputs.quality_logits[0][safe_regions], golden["rcnn_cls"][safe_regions], 1e-4)
    close(outputs.box_codes[0][safe_regions], golden["rcnn_reg"][safe_regions], 2e-5)
    boxes = decode_regions(outputs.box_codes[0], outputs.proposals.boxes[0])
    close(boxes[safe_regions], golden["rcnn_boxes"][safe_regions], 1e-4)
    # A flipped neighbor moves a quality logit by about 0.01.
    close(outputs.quality_logits[0], golden["rcnn_cls"], 0.05)


def test_final_boxes(run, golden):
    found = run.predictions
    assert np.array_equal(found.classes.numpy() + 1, golden["final_labels"])
    # The balls of these 22 regions are flagged here and there; none flips, as distances are rounded alike.
    close(found.boxes.data[:, :6], golden["final_boxes"][:, :6], 1e-4)
    turn = (found.boxes.data[:, 6].double().numpy() - golden["final_boxes"][:, 6]) / (2 * np.pi)
    np.testing.assert_allclose(turn, np.round(turn), atol=1e-4)
    close(found.scores, golden["final_scores"], 5e-5)
