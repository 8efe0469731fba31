"""SECOND-IoU equals OpenPCDet stage by stage, on a real KITTI frame with weights made by a rule (`conftest.py`)."""

import json

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.structures import PointCloud
from upcycle3d.ops.iou3d import iou_bev
from upcycle3d.ops.nms import nms_rotated
from upcycle3d.perception.models.decoders.bev import height_compression
from upcycle3d.perception.models.openpcdet import load_openpcdet
from upcycle3d.perception.models.post_processing import decode_boxes
from upcycle3d.perception.recipes.presets import KITTI_SECOND_IOU

LABEL = "stage by stage, on a real KITTI frame, the numbers of OpenPCDet"
GOLDEN = tiny.shared("reference/golden", LABEL)
SCAN = tiny.shared("data/kitti/training/velodyne_reduced/000003.bin", LABEL)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "second_iou_kitti.npz"))


@pytest.fixture(scope="module")
def run(rule_weights) -> dict[str, object]:
    spec = json.loads((GOLDEN / "state_dict_second_iou.json").read_text())
    detector = KITTI_SECOND_IOU.detector.build()
    parts = {
        "backbone_3d": detector.encoder,
        "backbone_2d": detector.decoder.bev_backbone,
        "dense_head": detector.decoder.anchor_head,
        "roi_head": detector.decoder.roi_head,
    }
    for name, part in parts.items():
        assert sum(p.numel() for p in part.parameters()) == spec["parameters"][name]
    load_openpcdet(detector, rule_weights(spec["entries"]))
    detector.eval()
    raw = torch.from_numpy(np.fromfile(SCAN, np.float32).reshape(-1, 4))
    inside = (raw[:, 0] >= 0) & (raw[:, 0] <= 70.4) & (raw[:, 1] >= -40) & (raw[:, 1] <= 40)
    cloud = PointCloud(xyz=raw[inside, :3], features=raw[inside, 3:])
    with torch.no_grad():
        voxels = detector.encoder.voxelize([cloud])
        stages = detector.encoder.sparse_backbone.stages(voxels)
        bev = height_compression(stages[-1])
        bev_2d = detector.decoder.bev_backbone(bev)
        outputs = detector.decode(detector.encode([cloud]))
        predictions = detector.predict(outputs)[0]
    return {
        "voxels": voxels, "stages": stages, "bev": bev, "bev_2d": bev_2d, "outputs": outputs, "predictions": predictions,
        "anchors": detector.decoder.anchors.view(-1, 7),
    }  # fmt: skip


def close(found: torch.Tensor, expected: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected.astype(np.float64), atol=atol, rtol=0)


def test_voxels(run, golden):
    assert np.array_equal(run["voxels"].coords[:, 1:].numpy(), golden["voxel_coords_zyx"])
    close(run["voxels"].features, golden["voxel_mean_features"], 1e-5)


@pytest.mark.parametrize("index", range(4))
def test_sparse_stages(run, golden, index):
    stage = run["stages"][index]
    coords = stage.coords[:, 1:].long()
    _, y, x = stage.shape
    order = ((coords[:, 0] * y + coords[:, 1]) * x + coords[:, 2]).argsort()
    name = f"conv{index + 1}"
    assert np.array_equal(coords[order].numpy(), golden[f"{name}_coords_zyx"])
    close(stage.features[order][golden[f"{name}_rows"]], golden[f"{name}_features"], 2e-5)
    close(stage.features.double().mean(0), golden[f"{name}_channel_mean"], 2e-5)


def test_features_at_the_cut(run, golden):
    cut = run["stages"][-1]
    order = np.lexsort(cut.coords[:, 1:].numpy().T[::-1])
    golden_order = np.lexsort(golden["conv_out_coords_zyx"].T[::-1])
    assert np.array_equal(cut.coords[:, 1:].numpy()[order], golden["conv_out_coords_zyx"][golden_order])
    close(cut.features[order], golden["conv_out_features"][golden_order], 2e-5)
    close(run["bev"][0].double().mean((1, 2)), golden["spatial_features_channel_mean"], 2e-5)


def test_bev_backbone_and_anchor_head(run, golden):
    cells = golden["bev_cells_yx"]
    close(run["bev_2d"][0, :, cells[:, 0], cells[:, 1]].T, golden["spatial_features_2d_cells"], 4e-3)
    height, width = run["bev_2d"].shape[-2:]
    dense = run["outputs"].dense

    def at_cells(flat: torch.Tensor) -> torch.Tensor:
        return flat[0].view(height, width, -1)[cells[:, 0], cells[:, 1]]

    close(at_cells(dense.class_logits), golden["cls_preds"], 2e-5)
    close(at_cells(dense.box_codes), golden["box_preds"], 2e-6)
    close(at_cells(dense.direction_logits), golden["dir_cls_preds"], 2e-5)


def test_decoded_boxes_iou_and_nms(run, golden):
    rows = torch.from_numpy(golden["top_anchor_index"]).long()
    dense = run["outputs"].dense
    close(run["anchors"][rows], golden["top_anchor_anchors"], 1e-5)
    close(dense.class_logits[0, rows], golden["top_anchor_cls_logits"], 2e-5)
    boxes = decode_boxes(dense.box_codes[0, rows], dense.direction_logits[0, rows], run["anchors"][rows])
    close(boxes, golden["top_anchor_boxes"], 1e-4)
    close(iou_bev(boxes[:100], boxes[:100]), golden["bev_iou_top100"], 1e-4)
    for threshold in (0.7, 0.3, 0.1, 0.01):
        kept = nms_rotated(boxes, torch.arange(300, 0, -1.0), threshold)
        assert np.array_equal(kept.numpy(), golden[f"nms_keep_top300_at_{threshold}"])


def test_proposals_and_iou_head(run, golden):
    proposals = run["outputs"].proposals
    close(proposals.boxes[0], golden["rois"], 1e-4)
    close(proposals.logits[0], golden["roi_scores"], 2e-5)
    assert np.array_equal(proposals.classes[0].numpy() + 1, golden["roi_labels"])
    close(run["outputs"].iou_logits[0], golden["roi_iou_logits"], 2e-4)


def test_final_boxes(run, golden):
    found = run["predictions"]
    assert np.array_equal(found.classes.numpy() + 1, golden["final_labels"])
    close(found.boxes.data[:, :6], golden["final_boxes"][:, :6], 1e-4)
    turn = (found.boxes.data[:, 6].double().numpy() - golden["final_boxes"][:, 6]) / (2 * np.pi)
    np.testing.assert_allclose(turn, np.round(turn), atol=1e-4)
    close(found.scores, golden["final_scores"], 5e-5)
    close(found.class_scores, golden["final_cls_scores"], 5e-5)
