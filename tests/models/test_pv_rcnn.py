"""PV-RCNN as a whole: where its keypoints lie, the frames of its regions, poor scenes, that every part learns, and its files."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tiny import BALLS, CAR, CAR_LABEL, GRID, cloud, pv_rcnn, pv_rcnn_config, second_iou_config
from tiny import NO_POINTS as NOTHING
from tiny import scan_with_car as scan
from upcycle3d.core.boxes import wrap_angle
from upcycle3d.core.cut import cells_of_centers
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, Keypoints
from upcycle3d.core.structures import Labels, LossTerms, PointCloud
from upcycle3d.ops.iou3d import iou_3d
from upcycle3d.perception.models.decoders.pv_rcnn import PvRcnnDecoder
from upcycle3d.perception.models.decoders.regions import region_grid
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoder
from upcycle3d.perception.models.encoders.second import SecondEncoder
from upcycle3d.perception.models.post_processing import ProposalNms, decode_regions
from upcycle3d.perception.models.targets import encode_regions
from upcycle3d.perception.training.detector_files import load_detector, save_detector, save_run_detector
from upcycle3d.perception.wire.encoder_file import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 96
TINY = pv_rcnn_config()
GUESS = Labels.make(CAR, torch.zeros(1, dtype=torch.int64), exact=False, complete=False)
FEW = cloud(torch.tensor([[5.05, 0.05, 0.55], [5.05, 0.05, 0.56], [6.05, 0.35, 0.75]]))  # two voxels


def losses(model: Detector, clouds: list[PointCloud], labels: list[Labels]) -> LossTerms:
    return model.loss(model.decode(model.encode(clouds), labels), labels)


# ---- what it is


def test_shapes_from_points_to_boxes():
    model = pv_rcnn().eval()
    with torch.no_grad():
        features = model.encode([scan(), scan(1)])
        outputs = model.decode(features)
    spec = model.spec
    assert spec.keypoints.channels == 16 * 2 + 4 * BALLS.out_channels == features.keypoints.features.shape[1]
    assert features.keypoints.starts == (0, COUNT, 2 * COUNT)
    assert outputs.keypoint_logits.shape == (2 * COUNT,)
    assert outputs.quality_logits.shape == outputs.proposals.valid.shape == (2, 32)
    assert outputs.box_codes.shape == (2, 32, 7)
    found = model.predict(outputs)
    assert [p.boxes.data.shape[1] for p in found] == [7, 7]
    for p in found:
        assert len(p) > 0
        assert bool((p.scores.diff() <= 0).all())
        assert bool((p.boxes.data[:, 6].abs() <= math.pi + 1e-6).all())


def test_a_decoder_without_keypoints_to_read_says_so():
    with pytest.raises(InvalidInput, match="has none"):
        PvRcnnDecoder(SecondEncoder(TINY.encoder.voxels).spec, TINY.decoder)


def test_a_batch_is_detected_like_its_scenes_alone():
    model = pv_rcnn().eval()
    clouds = [scan(), NOTHING, scan(2), FEW]
    batch = model.detect(clouds)
    for one, found in zip(clouds, batch, strict=True):
        alone = model.detect([one])[0]
        assert len(found) == len(alone)
        assert torch.allclose(found.scores, alone.scores, atol=1e-5)
        assert torch.allclose(found.boxes.data, alone.boxes.data, atol=1e-4)


def test_features_at_the_cut_of_a_batch_are_those_of_its_scenes():
    encoder = pv_rcnn().encoder.eval()
    clouds = [scan(), NOTHING, FEW, scan(2)]
    with torch.no_grad():
        batch = encoder(clouds)
        for i, one in enumerate(clouds):
            alone = encoder([one]).keypoints
            assert torch.equal(batch.scene(i).keypoints.xyz, alone.xyz)
            assert torch.allclose(batch.scene(i).keypoints.features, alone.features, atol=1e-5)


# ---- where keypoints lie


def test_keypoints_are_centers_of_occupied_voxels_whatever_the_order_of_the_points():
    encoder = pv_rcnn().encoder.eval()
    points = scan().xyz
    shuffled = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(5))]
    with torch.no_grad():
        a, b = (encoder([cloud(p)]).keypoints.xyz for p in (points, shuffled))
    assert torch.equal(a, b)
    assert len(a) == COUNT
    cells = cells_of_centers(a, GRID)  # raises for a point that is no center
    assert len(cells.unique(dim=0)) == COUNT
    occupied = encoder.voxelize([cloud(points)]).coords[:, 1:]
    assert set(map(tuple, cells.tolist())) <= set(map(tuple, occupied.tolist()))
    # None is a point of the scan.
    assert torch.cdist(a, points).min() > 1e-4


def test_a_scene_with_fewer_voxels_than_keypoints_has_fewer_keypoints():
    with torch.no_grad():
        keypoints = pv_rcnn().encoder.eval()([FEW, NOTHING, scan()]).keypoints
    assert keypoints.starts == (0, 2, 2, 2 + COUNT)
    assert sorted(keypoints.xyz[:2].tolist()) == [pytest.approx(x, abs=1e-5) for x in ([5.05, 0.05, 0.55], [6.05, 0.35, 0.75])]


def test_raw_keypoints_are_points_of_the_scan_in_range():
    config = replace(TINY.encoder, keypoint_source="raw_points")
    encoder = PvRcnnEncoder(config).eval()
    outside = torch.tensor([[20.0, 0, 0], [5, -9, 0], [-1, 0, 0]])
    with torch.no_grad():
        keypoints = encoder([cloud(torch.cat([outside, scan().xyz])), FEW]).keypoints
    assert keypoints.starts == (0, COUNT, COUNT + 3)
    points = set(map(tuple, scan().xyz.tolist()))
    assert set(map(tuple, keypoints.xyz[:COUNT].tolist())) <= points
    assert keypoints.xyz[COUNT:].tolist() == [FEW.xyz[i].tolist() for i in (0, 2, 1)]  # the farthest one first


@pytest.mark.parametrize("source", ["raw_points", "conv1", "conv3", "conv4"])
def test_a_source_can_be_left_out(source):
    config = replace(TINY.encoder, **{source: None})
    encoder = PvRcnnEncoder(config).eval()
    with torch.no_grad():
        features = encoder([scan()])
    assert features.keypoints.features.shape[1] == encoder.spec.keypoints.channels == 32 + 3 * BALLS.out_channels


# ---- poor scenes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("labels", [CAR_LABEL, Labels.empty(), Labels.empty(complete=False), GUESS])
@pytest.mark.parametrize("clouds", [[NOTHING, NOTHING], [NOTHING, scan(), FEW], [FEW]], ids=["nothing", "mixed", "few"])
def test_scenes_with_few_or_no_points_are_legal(training, labels, clouds):
    model = pv_rcnn().train(training)
    terms = losses(model, clouds, [labels] * len(clouds))
    assert terms.first_non_finite() is None
    terms.total().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(torch.isfinite(b).all() for b in model.buffers())
    assert all(torch.isfinite(p.boxes.data).all() for p in model.eval().detect(clouds))


@pytest.mark.parametrize("count", [0, 1])
def test_a_step_with_hardly_any_region_is_legal(count):
    model = pv_rcnn().train()
    keypoints = model.encode([scan()]).keypoints
    fused = replace(keypoints, features=torch.randn(COUNT, 16, requires_grad=True))
    quality, codes = model.decoder.roi_head(CAR[:count], [0, count], fused)
    assert quality.shape == (count,)
    assert codes.shape == (count, 7)
    (quality.sum() + codes.sum()).backward()
    assert torch.isfinite(quality).all()
    assert all(torch.isfinite(b).all() for b in model.buffers())


# ---- regions


def some_regions(count: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Regions with headings all around, and boxes near them."""
    generator = torch.Generator().manual_seed(seed)
    regions = torch.rand(count, 7, generator=generator) * torch.tensor([60.0, 40, 2, 4, 2, 2, 12]) + torch.tensor(
        [0, -20, -1, 1, 0.5, 0.5, -6]
    )
    shift = torch.randn(count, 7, generator=generator) * torch.tensor([1, 1, 0.3, 0.3, 0.2, 0.2, 2])
    boxes = regions + shift
    boxes[:, 3:6] = boxes[:, 3:6].clamp_min(0.3)
    return regions, boxes


def test_codes_lead_from_a_region_to_its_box():
    regions, boxes = some_regions()
    found = decode_regions(encode_regions(boxes, regions), regions)
    assert torch.allclose(found[:, :6], boxes[:, :6], atol=1e-4)
    half_turns = (found[:, 6] - boxes[:, 6]) / math.pi
    assert torch.allclose(half_turns, half_turns.round(), atol=1e-4)
    assert bool(((found[:, 6] - regions[:, 6]).abs() <= math.pi / 2 + 1e-4).all())  # a region is never turned round


def test_opposite_headings_and_whole_turns_have_the_same_code():
    regions, boxes = some_regions()
    boxes[:, 6] = regions[:, 6] + torch.linspace(-1.4, 1.4, len(boxes))  # clear of the seam at a quarter turn
    codes = encode_regions(boxes, regions)
    for turn in (math.pi, -math.pi, 2 * math.pi):
        turned = boxes + torch.tensor([0, 0, 0, 0, 0, 0, turn])
        assert torch.allclose(encode_regions(turned, regions), codes, atol=1e-4)
        assert torch.allclose(encode_regions(boxes, regions + torch.tensor([0, 0, 0, 0, 0, 0, 2 * turn])), codes, atol=1e-3)
    assert torch.allclose(codes[:, 6], torch.linspace(-1.4, 1.4, len(boxes)), atol=1e-4)


def test_a_region_that_fits_has_code_zero_and_offsets_are_measured_along_the_region():
    regions, _ = some_regions(5)
    assert torch.allclose(encode_regions(regions, regions), torch.zeros(5, 7), atol=1e-5)
    region = torch.tensor([[10.0, 5, 0, 4, 3, 2, math.pi / 2]])  # looks left
    # One meter of a diagonal of five.
    ahead = region + torch.tensor([[0, 1.0, 0, 0, 0, 0, 0]])
    assert torch.allclose(encode_regions(ahead, region)[0], torch.tensor([0.2, 0, 0, 0, 0, 0, 0]), atol=1e-5)


def test_the_grid_of_a_region_is_the_centers_of_its_cells():
    regions, _ = some_regions(4)
    found = region_grid(regions, 3)
    for region, points in zip(regions.tolist(), found.tolist(), strict=True):
        x, y, z, dx, dy, dz, yaw = region
        for ix in range(3):
            for iy in range(3):
                for iz in range(3):
                    along, across, up = ((i + 0.5) / 3 * size - size / 2 for i, size in ((ix, dx), (iy, dy), (iz, dz)))
                    expected = [
                        x + along * math.cos(yaw) - across * math.sin(yaw),
                        y + along * math.sin(yaw) + across * math.cos(yaw),
                        z + up,
                    ]
                    assert points[(ix * 3 + iy) * 3 + iz] == pytest.approx(expected, abs=1e-4)
    assert region_grid(torch.zeros(0, 7), 3).shape == (0, 27, 3)
    assert torch.equal(region_grid(regions, 1)[:, 0], regions[:, :3])


def test_the_head_pools_keypoints_of_its_own_scene_only():
    head = pv_rcnn().decoder.roi_head.eval()
    xyz = CAR[:, :3] + torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * 0.5
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    regions = CAR.repeat(2, 1)
    with torch.no_grad():
        pooled = head.pool(regions, [0, 1, 2], Keypoints(xyz=xyz, features=features, starts=(0, 20, 40)))
        for scene in (0, 1):
            rows = slice(20 * scene, 20 * scene + 20)
            alone = head.pool(CAR, [0, 1], Keypoints(xyz=xyz[rows], features=features[rows], starts=(0, 20)))
            assert torch.allclose(pooled[scene], alone[0], atol=1e-5)
        assert not torch.allclose(pooled[0], pooled[1])


# ---- gradients, learning


def test_every_weight_learns():
    # Let proposals be the anchors, all of them, and the car like an anchor: then some region is on the car.
    everything = ProposalNms(pre=512, iou=0.99, post=512)
    model = pv_rcnn(replace(TINY, decoder=replace(TINY.decoder, train_proposals=everything))).train()
    torch.nn.init.zeros_(model.decoder.anchor_head.conv_box.bias)
    straight = Labels.make(CAR * torch.tensor([1.0, 1, 1, 1, 1, 1, 0]), torch.zeros(1, dtype=torch.int64))
    terms = losses(model, [scan(), scan(1)], [straight, straight])
    assert terms.terms["roi_box"] > 0
    assert set(terms.terms) == {"class", "box", "direction", "keypoint", "roi_quality", "roi_box", "roi_corner"}
    terms.total().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_the_regions_losses_reach_back_into_the_encoder_past_the_proposals():
    model = pv_rcnn().train()
    terms = losses(model, [scan()], [CAR_LABEL]).terms
    (terms["roi_quality"] + terms["roi_corner"] + terms["roi_box"]).backward()
    decoder, encoder = model.decoder, model.encoder
    for part in (encoder.second, encoder.raw_abstraction, encoder.stage_abstractions, decoder.fusion, decoder.keypoint_head):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert all(p.grad is None for part in (decoder.bev_backbone, decoder.anchor_head) for p in part.parameters())


def test_a_frozen_encoder_gives_no_gradient_and_keeps_its_statistics():
    model = pv_rcnn().train().freeze_encoder()
    before = {n: v.clone() for n, v in model.encoder.state_dict().items()}
    features = model.encode([scan(), scan(1)])
    assert not features.keypoints.features.requires_grad
    labels = [CAR_LABEL, GUESS]
    model.loss(model.decode(features, labels), labels).total().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(torch.equal(v, before[n]) for n, v in model.encoder.state_dict().items())
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_features_of_the_vehicle_keep_their_gradient_for_the_server():
    model = pv_rcnn().eval()
    features = model.encode([scan()])
    leaf = features.keypoints.features.detach().requires_grad_()
    live = CutFeatures(voxels=features.voxels, spec=features.spec, keypoints=replace(features.keypoints, features=leaf))
    model.loss(model.decode(live, [CAR_LABEL]), [CAR_LABEL]).total().backward()
    assert leaf.grad.any()


@pytest.mark.parametrize("clouds", [[scan(), scan(1)], [NOTHING, FEW]], ids=["cars", "nothing"])
def test_a_step_in_half_precision_is_close_to_one_in_full(clouds):
    labels = [CAR_LABEL, GUESS]
    full, half = pv_rcnn().train(), pv_rcnn().train()
    torch.manual_seed(1)
    expected = losses(full, clouds, labels).floats()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = losses(half, clouds, labels)
    terms.total().backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)
    assert {n: v.dtype for n, v in half.state_dict().items()} == {n: v.dtype for n, v in full.state_dict().items()}
    for name in ("class", "direction", "keypoint"):  # other terms depend on which regions were drawn
        assert terms.floats()[name] == pytest.approx(expected[name], rel=0.1, abs=0.02), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.isfinite(p.boxes.data).all() for p in half.eval().detect(clouds))


def test_it_learns_two_scenes_by_heart():
    model = pv_rcnn().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        terms = losses(model, [scan(), scan(1)], [CAR_LABEL, CAR_LABEL])
        terms.total().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        history.append(terms.floats())

    def mean(name: str, steps: list[dict[str, float]]) -> float:
        return sum(s[name] for s in steps) / len(steps)

    start, end = ({name: mean(name, steps) for name in history[0]} for steps in (history[:3], history[-3:]))
    assert sum(end.values()) < 0.3 * sum(start.values())
    for name in ("class", "keypoint", "roi_quality"):
        assert end[name] < start[name], name
    with torch.no_grad():  # running statistics of so few steps lag behind: take those of the scenes
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        model.decode(model.encode([scan(), scan(1)]), [CAR_LABEL, CAR_LABEL])
    found = model.eval().detect([scan()])[0]
    assert iou_3d(found.boxes.data[:1], CAR).item() > 0.6
    assert abs(wrap_angle(found.boxes.data[0, 6] - CAR[0, 6])) < 0.4


# ---- files


@pytest.mark.parametrize("config", [TINY, second_iou_config()], ids=["pv_rcnn", "second_iou"])
def test_a_detector_and_its_vehicle_half_come_back_from_their_files(tmp_path, config):
    torch.manual_seed(3)
    model = config.build().train()
    losses(model, [scan(), scan(1)], [CAR_LABEL, CAR_LABEL])  # running statistics that are not those of a new network
    model.eval()
    save_run_detector(tmp_path, model)
    loaded = load_detector(tmp_path)
    assert loaded.config == config
    assert not loaded.training
    encoder = load_encoder(tmp_path / "encoder.safetensors")
    assert type(encoder) is type(model.encoder)
    assert encoder.config == config.encoder
    assert encoder.spec == model.spec == loaded.spec
    for a, b in ((model, loaded), (model.encoder, encoder)):
        state = b.state_dict()
        assert a.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[n]) for n, v in a.state_dict().items())
    assert torch.equal(model.detect([scan()])[0].boxes.data, loaded.detect([scan()])[0].boxes.data)


def test_another_file_is_no_detector_and_no_encoder(tmp_path):
    model = pv_rcnn()
    save_run_detector(tmp_path, model)
    with pytest.raises(InvalidInput, match="not a vehicle encoder"):
        load_encoder(tmp_path / "detector.safetensors")
    with pytest.raises(InvalidInput, match="not a detector of this program"):
        load_detector(tmp_path / "encoder.safetensors")
    raw = replace(TINY, encoder=replace(TINY.encoder, keypoint_source="raw_points", raw_points=None))
    save_detector(tmp_path / "raw.safetensors", pv_rcnn(raw))
    assert load_detector(tmp_path / "raw.safetensors").config == raw
