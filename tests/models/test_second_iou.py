"""SECOND-IoU as a whole: its size, its two halves, empty scenes, which loss reaches which part, and that it learns."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from tiny import CAR, CAR_LABEL, second_iou, second_iou_config
from tiny import NO_POINTS as NOTHING
from tiny import scan_with_car as scan
from upcycle3d.core.cut import VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures
from upcycle3d.core.structures import Labels, PointCloud, Predictions
from upcycle3d.ops.iou3d import iou_3d
from upcycle3d.perception.models.decoders.bev import height_compression
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.encoders.second import SecondEncoder, SecondEncoderConfig
from upcycle3d.perception.models.post_processing import FinalNms
from upcycle3d.perception.recipes.presets import KITTI_SECOND_IOU

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = second_iou_config()


def same(a: Predictions, b: Predictions) -> bool:
    return torch.equal(a.boxes.data, b.boxes.data) and torch.equal(a.scores, b.scores) and torch.equal(a.classes, b.classes)


def losses(model: Detector, clouds: list[PointCloud], labels: list[Labels]):
    return model.loss(model.decode(model.encode(clouds), labels), labels)


# ---- what it is


def test_parameter_counts_of_the_reference():
    with torch.device("meta"):
        model = KITTI_SECOND_IOU.detector.build()
    parts = (model.encoder, model.decoder.bev_backbone, model.decoder.anchor_head, model.decoder.roi_head)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [711_872, 4_576_768, 36_936, 6_621_441]
    assert sum(p.numel() for p in model.parameters()) == 711_872 + 4_576_768 + 36_936 + 6_621_441
    assert model.encoder.spec.shape == (2, 200, 176)
    assert model.encoder.spec.channels == 128
    assert model.decoder.anchors.shape == (200, 176, 6, 7)
    assert model.class_names == ("Car", "Pedestrian", "Cyclist")


def test_the_two_halves_are_the_whole():
    model = second_iou().eval()
    clouds = [scan(), scan(seed=1), NOTHING]
    with torch.no_grad():
        features = model.encode(clouds)
        halves = model.predict(model.decode(features))
    whole = model(clouds)
    assert len(halves) == len(whole) == 3
    assert [len(p) > 0 for p in whole] == [True, True, False]  # nothing is detected in a scan without a point
    assert all(same(a, b) for a, b in zip(halves[:2], whole[:2], strict=True))


def test_a_scene_is_detected_alike_alone_and_in_a_batch():
    model = second_iou().eval()
    clouds = [scan(), NOTHING, scan(seed=2), NOTHING]
    batch = model.detect(clouds)
    assert len(batch) == 4
    for cloud, found in zip(clouds, batch, strict=True):
        alone = model.detect([cloud])[0]
        assert len(found) == len(alone)
        assert torch.allclose(found.scores, alone.scores, atol=1e-5)
    with torch.no_grad():
        features = model.encode(clouds)
    assert features.batch_size == 4
    assert features.scene(3).voxels.features.shape == (0, 16)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("labels", [CAR_LABEL, Labels.empty(), Labels.empty(complete=False)], ids=["car", "none", "unknown"])
def test_scenes_without_any_point_are_legal(training, labels):
    model = second_iou().train(training)
    terms = losses(model, [NOTHING, NOTHING], [labels, labels])
    assert terms.first_non_finite() is None
    terms.total().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(torch.isfinite(b).all() for b in model.buffers())
    model.eval()
    assert all(torch.isfinite(p.boxes.data).all() for p in model.detect([NOTHING, NOTHING]))


def test_detections_lie_above_the_final_threshold():
    strict = second_iou(replace(TINY, decoder=replace(TINY.decoder, final=FinalNms(score=0.999)))).eval()
    assert [len(p) for p in strict.detect([scan()])] == [0]
    found = second_iou().eval().detect([scan()])[0]
    assert bool((found.scores.diff() <= 0).all())
    assert bool((found.boxes.data[:, 6].abs() <= math.pi + 1e-6).all())


def test_a_grid_too_shallow_for_the_cut_is_refused_where_the_encoder_is_made():
    def grid(layers: int) -> SecondEncoderConfig:
        return replace(TINY.encoder, grid=VoxelGrid(range=(0.0, -6.4, 0.0, 12.8, 6.4, layers / 10), voxel_size=(0.1, 0.1, 0.1)))

    with pytest.raises(InvalidInput, match="at least 24 voxels in z"):
        SecondEncoder(grid(23))
    assert SecondEncoder(grid(24)).spec.shape == (1, 16, 16)


def test_missing_point_features_are_named():
    wants = replace(TINY, encoder=replace(TINY.encoder, point_features=("intensity", "elongation")))
    with pytest.raises(InvalidInput, match="elongation"):
        second_iou(wants).encode([scan()])
    with pytest.raises(InvalidInput, match="at least one point cloud"):
        second_iou().encode([])


# ---- gradients


def test_every_part_learns():
    model = second_iou().train()
    losses(model, [scan(), scan(seed=1)], [CAR_LABEL, CAR_LABEL]).total().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for part in (model.encoder, model.decoder.bev_backbone, model.decoder.anchor_head, model.decoder.roi_head):
        assert sum(p.grad.abs().sum() for p in part.parameters()) > 0


def test_the_iou_loss_reaches_its_own_head_only():
    model = second_iou().train()
    losses(model, [scan(), scan(seed=1)], [CAR_LABEL, CAR_LABEL]).terms["iou"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder.roi_head.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if "roi_head" not in n)


def test_in_a_pseudo_labeled_scene_the_iou_head_learns_nothing_and_the_rest_does():
    model = second_iou().train()
    guess = Labels.make(CAR, torch.zeros(1, dtype=torch.int64), exact=False, complete=False)
    terms = losses(model, [scan()], [guess])
    assert terms.terms["iou"] == 0
    assert all(terms.terms[name] > 0 for name in ("class", "box", "direction"))
    terms.total().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.decoder.roi_head.parameters())


def test_an_ignored_object_costs_less_than_a_missed_one():
    model = second_iou().eval()  # no batch statistics: the outputs are the same each time
    ignored = replace(CAR_LABEL, weight=torch.zeros(1))
    features = model.encode([scan()])
    outputs = model.decode(features, [ignored])
    with_ignored, without = (model.loss(outputs, [x]).terms for x in (ignored, Labels.empty()))
    assert with_ignored["box"] == without["box"] == 0
    assert with_ignored["class"] < without["class"]  # fewer anchors are background


def test_a_frozen_encoder_keeps_weights_statistics_and_gives_no_gradient():
    model = second_iou().train()
    model.freeze_encoder()
    before = copy.deepcopy(model.encoder.state_dict())
    for _ in range(2):
        model.eval()
        model.train()  # the trainer and the loop switch modes; the encoder must not follow
        assert not any(m.training for m in model.encoder.modules())
        assert model.decoder.training
        features = model.encode([scan(), scan(seed=1)])
        assert not features.voxels.features.requires_grad
        losses(model, [scan(), scan(seed=1)], [CAR_LABEL, CAR_LABEL]).total().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(torch.equal(v, before[n]) for n, v in model.encoder.state_dict().items())
    assert any(p.grad is not None for p in model.decoder.parameters())
    assert copy.deepcopy(model).train().encoder.training is False  # a teacher is a deep copy


def test_features_of_the_vehicle_keep_their_gradient_for_the_server():
    """An inversion attack or joint training differentiates through the decoder to the features at the cut."""
    model = second_iou().eval()
    features = model.encode([scan()])
    leaf = features.voxels.features.detach().requires_grad_()
    live = CutFeatures(voxels=replace(features.voxels, features=leaf), spec=features.spec)
    model.loss(model.decode(live, [CAR_LABEL]), [CAR_LABEL]).total().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


# ---- learning and export


def test_it_learns_one_scene_by_heart():
    torch.manual_seed(0)
    model = second_iou().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=80)
    for _ in range(80):
        optimizer.zero_grad()
        losses(model, [scan()], [CAR_LABEL]).total().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():  # running statistics of so few steps lag behind: take those of the scene
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        model.decode(model.encode([scan()]), [CAR_LABEL])
    found = model.eval().detect([scan()])[0]
    best = found.boxes.data[:1]
    assert iou_3d(best, CAR).item() > 0.7
    assert abs(math.remainder(best[0, 6].item() - CAR[0, 6].item(), 2 * math.pi)) < 0.3  # looks forward, not back
    assert found.class_scores[0] > 0.5


class BevHalf(torch.nn.Module):
    """What a server would compile: everything dense, from the bird's-eye-view map to the anchors' outputs."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.bev_backbone, self.anchor_head = model.decoder.bev_backbone, model.decoder.anchor_head

    def forward(self, bev: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dense = self.anchor_head(self.bev_backbone(bev))
        return dense.class_logits, dense.box_codes, dense.direction_logits


def test_the_dense_half_exports():
    model = second_iou().eval()
    with torch.no_grad():
        bev = height_compression(model.encode([scan(), scan(seed=1)]).voxels)
        half = BevHalf(model).eval()
        expected = half(bev)
        exported = torch.export.export(half, (bev,)).module()(bev)
    for found, wanted in zip(exported, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_a_map_with_an_odd_number_of_cells_keeps_its_size():
    grid = VoxelGrid(range=(0.0, -6.0, -1.0, 12.0, 6.0, 3.0), voxel_size=(0.1, 0.1, 0.1))  # 15 x 15 cells
    model = second_iou(replace(TINY, encoder=replace(TINY.encoder, grid=grid))).eval()
    assert model.encoder.spec.shape[1:] == (15, 15)
    assert len(model.detect([scan()])) == 1


def test_boxes_can_be_kept_out_of_box_regression():
    model = second_iou()
    outputs = model.decode(model.encode([scan()]), [CAR_LABEL])
    trusted = model.loss(outputs, [CAR_LABEL]).floats()
    half, none = (
        model.loss(outputs, [replace(CAR_LABEL, box_weight=torch.full((1,), weight))]).floats() for weight in (0.5, 0.0)
    )
    assert trusted["box"] > 0
    assert half["box"] == pytest.approx(trusted["box"] / 2)
    assert none["box"] == 0
    assert none["class"] == trusted["class"]
    assert none["direction"] == trusted["direction"]


@pytest.mark.slow
def test_one_training_step_of_the_full_reference_preset():
    model = second_iou(KITTI_SECOND_IOU.detector)
    generator = torch.Generator().manual_seed(0)
    xyz = torch.rand(30_000, 3, generator=generator) * torch.tensor([70.0, 79.0, 0.4]) - torch.tensor([0.0, 39.5, 1.9])
    cloud = PointCloud(xyz=xyz, features=torch.rand(30_000, 1, generator=generator))
    labels = Labels.make(torch.tensor([[20.0, 3.0, -1.0, 3.9, 1.6, 1.5, 0.3]]), torch.zeros(1, dtype=torch.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model.loss(model.decode(model.encode([cloud]), [labels]), [labels]).total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(value) for value in losses)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
