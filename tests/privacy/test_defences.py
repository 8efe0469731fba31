"""Defences: what they send is what they say, and encoder, fingerprint, store and trainer know about them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Boxes3D, Labels
from upcycle3d.perception.models.defences.bottleneck import BottleneckConfig
from upcycle3d.perception.models.defences.cells import DecoyConfig, DropConfig, JitterConfig
from upcycle3d.perception.models.defences.noise import NoiseConfig, RoundingConfig
from upcycle3d.perception.models.defences.obfuscator import ObfuscatorConfig
from upcycle3d.perception.models.defences.region import RegionConfig, RegionUpload
from upcycle3d.perception.models.defended import defended
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.server.uploaded import features_as_uploaded, only_seen, seen_cells
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector
from upcycle3d.perception.vehicle.extractor import Extractor
from upcycle3d.perception.wire.encoder_file import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = (
    RegionConfig(),
    DropConfig(share=0.5),
    JitterConfig(),
    DecoyConfig(),
    NoiseConfig(),
    RoundingConfig(),
    BottleneckConfig(channels=4, keypoint_channels=4),
    ObfuscatorConfig(channels=4, keypoint_channels=4, hidden=8),
)


@pytest.fixture(scope="module", params=["second_iou", "pv_rcnn"])
def detector(request):
    return getattr(tiny, request.param)().eval()


@pytest.fixture(scope="module")
def scan():
    return tiny.scan_with_car(0)


def rng():
    return np.random.default_rng(5)


def one_scene(detector, scan) -> CutFeatures:
    with torch.no_grad():
        return detector.encode([scan])


def cells_of(features: CutFeatures) -> set[tuple[int, ...]]:
    return {tuple(row) for row in features.voxels.coords[:, 1:].tolist()}


@pytest.mark.parametrize("config", EVERY, ids=lambda c: type(c).__name__)
def test_every_defence_sends_a_scene_that_the_server_restores_and_survives_an_empty_one(detector, scan, config):
    defence, scene = config.build(detector.spec), one_scene(detector, scan)
    for given in (scene, empty(scene)):
        sent = defence.send(given, rng())
        assert sent.spec == defence.upload_spec
        back = defence.restore(sent)
        assert back.spec == detector.spec
        assert back.voxels.coords.equal(sent.voxels.coords)
        assert defence.compute(given).voxels.coords.equal(given.voxels.coords)  # the vehicle's own decoder misses no cell
    assert len(defence.send(empty(scene), rng()).voxels.coords) == 0


def empty(scene: CutFeatures) -> CutFeatures:
    voxels = replace(scene.voxels, features=scene.voxels.features[:0], coords=scene.voxels.coords[:0])
    return replace(scene, voxels=voxels, keypoints=scene.keypoints and scene.keypoints.select(torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize("config", EVERY, ids=lambda c: type(c).__name__)
def test_a_defence_repeats_with_the_same_random_numbers(detector, scan, config):
    defence, scene = config.build(detector.spec), one_scene(detector, scan)
    first, second = (defence.send(scene, rng()) for _ in range(2))
    assert first.voxels.coords.equal(second.voxels.coords)
    assert first.voxels.features.equal(second.voxels.features)


def test_region_upload_sends_the_surroundings_of_high_scores_and_nothing_else(detector, scan):
    scene = one_scene(detector, scan)
    defence = RegionUpload(detector.spec, RegionConfig(margin_cells=1, background_share=0.0))
    target = scene.voxels.coords[len(scene.voxels.coords) // 2]
    scores = torch.full((1, *detector.spec.shape[1:]), -9.0)
    scores[0, target[2], target[3]] = 9.0
    defence.scores = lambda features: scores
    defence.threshold.fill_(0.5)
    sent = defence.send(scene, rng())
    near = ((scene.voxels.coords[:, 2:] - target[2:]).abs() <= 1).all(1)
    assert cells_of(sent) == {tuple(row) for row in scene.voxels.coords[near, 1:].tolist()}
    if sent.keypoints is not None:  # keypoints outside are left out too
        x, y = detector.spec.cell_size()
        column_row = (sent.keypoints.xyz[:, :2] - torch.tensor(detector.spec.grid.range[:2])) / torch.tensor([x, y])
        assert ((column_row.floor().flip(1) - target[2:]).abs() <= 1).all()


def test_region_upload_sends_the_stated_share_of_background():
    detector = tiny.second_iou()
    defence = RegionUpload(detector.spec, RegionConfig(background_share=0.3, background_block=2))
    kept = torch.zeros(200, 200, dtype=torch.bool)
    shares = [defence._background(kept, np.random.default_rng(seed)).float().mean().item() for seed in range(20)]
    assert abs(np.mean(shares) - 0.3) < 0.02
    assert defence._background(kept, rng()).shape == kept.shape


def test_dropping_jittering_and_decoys_change_as_many_cells_as_they_say(detector, scan):
    scene = one_scene(detector, scan)
    m = len(scene.voxels.coords)
    assert cells_of(DropConfig(share=0.0).build(detector.spec).send(scene, rng())) == cells_of(scene)
    assert not cells_of(DropConfig(share=1.0).build(detector.spec).send(scene, rng()))
    assert cells_of(JitterConfig(share=0.0).build(detector.spec).send(scene, rng())) == cells_of(scene)
    more = DecoyConfig(share=0.5).build(detector.spec).send(scene, rng())
    assert cells_of(scene) < cells_of(more)
    assert m < len(more.voxels.coords) <= m + round(0.5 * m)
    true = {tuple(c): f for c, f in zip(scene.voxels.coords.tolist(), scene.voxels.features, strict=True)}
    for cell, feature in zip(more.voxels.coords.tolist(), more.voxels.features, strict=True):
        assert tuple(cell) not in true or feature.equal(true[tuple(cell)])  # a false cell never replaces a true one


def test_noise_has_the_size_that_was_measured(detector, scan):
    scene = one_scene(detector, scan)
    defence = NoiseConfig(sigma=2.0).build(detector.spec)
    defence.measure(scene)
    many = torch.stack([defence.send(scene, np.random.default_rng(s)).voxels.features for s in range(200)])
    torch.testing.assert_close(many.std(0).mean(0), 2 * defence.spread, rtol=0.2, atol=1e-3)
    torch.testing.assert_close(many.mean(0), scene.voxels.features, rtol=0, atol=float(1.0 * defence.spread.max()))


def test_rounding_leaves_as_many_levels_as_it_says(detector, scan):
    sent = RoundingConfig(levels=4).build(detector.spec).send(one_scene(detector, scan), rng())
    assert max(len(column.unique()) for column in sent.voxels.features.T) <= 4


def test_a_full_bottleneck_changes_nothing_and_a_narrow_one_keeps_the_best_directions(scan):
    detector = tiny.second_iou().eval()
    scene = one_scene(detector, scan)
    full = BottleneckConfig(channels=detector.spec.channels).build(detector.spec)
    full.measure(scene)
    torch.testing.assert_close(full.restore(full.send(scene, rng())).voxels.features, scene.voxels.features, rtol=1e-3, atol=1e-4)
    narrow = BottleneckConfig(channels=2).build(detector.spec)
    narrow.measure(scene)
    x = scene.voxels.features
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]  # Eckart and Young
    torch.testing.assert_close(narrow.restore(narrow.send(scene, rng())).voxels.features, best, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(narrow.compute(scene).voxels.features, best, rtol=1e-3, atol=1e-3)
    with pytest.raises(InvalidInput, match="at most as many channels"):
        BottleneckConfig(channels=detector.spec.channels + 1).build(detector.spec)


def test_a_defended_detector_is_kept_in_files_and_its_encoder_has_another_fingerprint(tmp_path, detector, scan):
    plain = encoder_fingerprint(detector.encoder, RigSpec())
    guarded = defended(detector, (RegionConfig(), NoiseConfig(sigma=0.1)))
    other = defended(detector, (RegionConfig(), NoiseConfig(sigma=0.2)))
    prints = {encoder_fingerprint(d.encoder, RigSpec()) for d in (guarded, other)}
    assert len(prints | {plain}) == 3
    save_run_detector(tmp_path, guarded)
    for loaded in (load_detector(tmp_path).encoder, load_encoder(tmp_path)):
        assert encoder_fingerprint(loaded, RigSpec()) == encoder_fingerprint(guarded.encoder, RigSpec())
    found = [d.detect(scan).boxes.data for d in (detector, guarded)]
    assert found[0].equal(found[1])  # neither cells nor accuracy are lost where nothing is sent
    with pytest.raises(InvalidInput, match="without any"):
        defended(guarded, (DropConfig(),))


def test_a_vehicle_sends_what_its_defences_leave_and_the_server_reads_it(detector, scan):
    guarded = defended(detector, (DropConfig(share=0.5), BottleneckConfig(channels=4, keypoint_channels=4)))
    extractor = Extractor(guarded.encoder, RigSpec(), "fp16")
    plain = Extractor(detector.encoder, RigSpec(), "fp16")
    scene, whole = extractor.smash(scan)[0], plain.smash(scan)[0]
    assert scene.spec.channels == 4
    assert 0 < len(scene.coords) < len(whole.coords)
    again = extractor.smash(scan)[0]
    assert not again.coords.equal(scene.coords)  # new random numbers for every scan
    features = features_as_uploaded(guarded, [scan, scan], "fp16")
    assert (features.spec, features.batch_size) == (detector.spec, 2)
    assert len(guarded.decode(features).dense.class_logits) == 2


def test_a_partial_scene_teaches_nothing_where_nothing_was_sent(scan):
    detector = tiny.second_iou().eval()
    scene = one_scene(detector, scan)
    seen = seen_cells(scene)
    occupied = torch.zeros_like(seen)
    occupied[scene.voxels.coords[:, 2].long(), scene.voxels.coords[:, 3].long()] = True
    rows, columns = occupied.nonzero().unbind(1)
    for row, column in (~seen).nonzero().tolist():  # independent of pooling: the nearest sent column is far
        assert torch.maximum((rows - row).abs(), (columns - column).abs()).min() > 2
    assert bool((seen | ~occupied).all())
    boxes = torch.tensor([[1e3, 1e3, 0.0, 4.0, 2.0, 1.5, 0.0]])
    labels = only_seen(Labels.make(Boxes3D(data=boxes), [0]), scene)
    assert labels.weight.tolist() == [0.0]
    everything = only_seen(Labels.empty(), scene)
    hidden = replace(everything, seen=torch.zeros_like(seen))
    outputs = detector.decode(scene, [Labels.empty()])
    assert float(detector.loss(outputs, [hidden]).terms["class"]) == 0.0
    assert float(detector.loss(outputs, [Labels.empty()]).terms["class"]) > 0.0


def test_a_rig_of_one_kind_has_one_fingerprint():
    nominal = RigSpec(z_shift=1.73, intensity_scale=1 / 255)
    for near in (RigSpec(z_shift=1.6, intensity_scale=1 / 256), RigSpec(z_shift=1.97, intensity_scale=1 / 255), nominal):
        assert near.rounded(nominal) == nominal
    for far in (
        RigSpec(z_shift=1.2, intensity_scale=1 / 255),
        RigSpec(z_shift=1.73),
        RigSpec(z_shift=2.2, intensity_scale=1 / 255),
    ):
        assert far.rounded(nominal) != nominal
    heights = {RigSpec(z_shift=0.3 + 0.001 * i).rounded(nominal).z_shift for i in range(2500)}
    assert len(heights) <= 7  # a class of half a meter, not the height
