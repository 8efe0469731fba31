"""The server's step on a detector of toy size: every method runs, changes what it should and nothing else, and repeats bit for bit."""

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from upcycle3d.core.cut import VoxelGrid
from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.core.features import CutFeatures
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Frame, Labels, PointCloud
from upcycle3d.datasets.augment import AugmentationRanges
from upcycle3d.datasets.batches import UnlabeledBatches
from upcycle3d.perception.models.anchors import AnchorClass
from upcycle3d.perception.models.decoders.bev import BevBackboneConfig
from upcycle3d.perception.models.decoders.pv_rcnn import PvRcnnConfig
from upcycle3d.perception.models.decoders.second_iou import SecondIouConfig
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoderConfig
from upcycle3d.perception.models.encoders.second import SecondEncoderConfig
from upcycle3d.perception.models.encoders.set_abstraction import SetAbstractionConfig
from upcycle3d.perception.models.post_processing import FinalNms, ProposalNms
from upcycle3d.perception.models.pv_rcnn import PvRcnnDetectorConfig
from upcycle3d.perception.models.second_iou import SecondIouDetectorConfig
from upcycle3d.perception.models.targets import RoiSampling
from upcycle3d.perception.server import store as store_module
from upcycle3d.perception.server import trainer as trainer_module
from upcycle3d.perception.server.feature_object_database import FeatureObjectDatabase, build_feature_object_database
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.server.pseudo_labels import teacher_labels
from upcycle3d.perception.server.store import SmashedStore, collate_scenes, quantize_features
from upcycle3d.perception.server.trainer import upcycle
from upcycle3d.perception.server.upcycle_config import FeatureGtConfig, ScoreThresholds, UpcycleConfig
from upcycle3d.perception.training.loop import LoopConfig
from upcycle3d.perception.training.optim import OneCycle
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.codec import CODECS, decode_scene, encode_scene
from upcycle3d.perception.wire.shards import ShardWriter

TINY = SecondIouDetectorConfig(
    encoder=SecondEncoderConfig(
        grid=VoxelGrid(range=(0.0, -6.4, -1.0, 12.8, 6.4, 3.0), voxel_size=(0.1, 0.1, 0.1)),
        point_features=(),
        channels=(2, 4, 4, 4, 8),
    ),
    decoder=SecondIouConfig(
        anchors=(AnchorClass(name="Car", size=(3.0, 1.6, 1.6), bottom_z=0.0, matched=0.55, unmatched=0.40),),
        bev=BevBackboneConfig(layers=(1, 1), channels=(8, 8), up_channels=(8, 8)),
        head_channels=8,
        pool_size=3,
        train_proposals=ProposalNms(pre=64, iou=0.8, post=32),
        test_proposals=ProposalNms(pre=64, iou=0.5, post=16),
        roi_sampling=RoiSampling(count=16),
        iou_target=(0.0, 1.0),
        final=FinalNms(score=0.0),
    ),
)
# An untrained teacher is sure of nothing: these thresholds take all it says, or nothing.
EVERYTHING = (ScoreThresholds(iou_score=0.0, class_score=0.0, ignore=0.0),)
NOTHING = (ScoreThresholds(iou_score=1.0, class_score=1.0, ignore=1.0),)


def frame(seed: int) -> Frame:
    """A sparse road and one car."""
    generator = torch.Generator().manual_seed(seed)
    road = torch.rand(100, 3, generator=generator) * torch.tensor([12.8, 12.8, 0.05]) - torch.tensor([0.0, 6.4, 0.0])
    x, y, yaw = (torch.rand(3, generator=generator) * torch.tensor([6.0, 6.0, 6.0]) + torch.tensor([3.0, -3.0, -3.0])).tolist()
    size = torch.tensor([3.0, 1.6, 1.5])
    body = (torch.rand(150, 3, generator=generator) - 0.5) * size
    turn = torch.tensor([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    xyz = torch.cat([road, body @ turn.T + torch.tensor([x, y, 0.8])])
    box = torch.tensor([[x, y, 0.8, *size.tolist(), yaw]])
    labels = Labels.make(box, torch.zeros(1), num_points=torch.full((1,), 150))
    return Frame(id=f"frame{seed}", points=PointCloud(xyz=xyz, features=torch.zeros(250, 1)), labels=labels)


FRAMES = [frame(seed) for seed in range(4)]


def labeled(step: int) -> tuple[Frame, ...]:
    return FRAMES[step % 4], FRAMES[(step + 1) % 4]


def checkpoint() -> Detector:
    torch.manual_seed(0)
    return TINY.build()


def config(steps: int = 2, thresholds: tuple[ScoreThresholds, ...] = EVERYTHING, seed: int = 0, **changes) -> UpcycleConfig:
    loop = LoopConfig(seed=seed, optim=OneCycle(lr=0.01, total_steps=steps), log_every=1, checkpoint_every=2)
    values = {
        "loop": loop, "labeled_batch": 2, "unlabeled_batch": 2, "thresholds": thresholds,
        "f_gt": FeatureGtConfig(max_objects=(2,)), "obstacle_score": 1.0, "round_steps": 1,
    }  # fmt: skip
    return UpcycleConfig(**{**values, **changes})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """For toy networks a second thread costs more than it brings, and on a busy machine the two wait for each other for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> SmashedStore:
    """Three scenes of a fleet, through shard and ingest, as the vehicle's encoder made them."""
    folder = tmp_path_factory.mktemp("fleet")
    extractor = Extractor(checkpoint().encoder, RigSpec(), "fp16")
    with ShardWriter(folder / "in", spec=extractor.spec, fingerprint=extractor.fingerprint, codec="fp16") as writer:
        extract([frame(seed).points for seed in (10, 11, 12)], extractor, writer)
    ingest(folder / "in", folder / "store", expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)
    return SmashedStore(folder / "store")


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> FeatureObjectDatabase:
    folder: Path = tmp_path_factory.mktemp("features") / "db"
    detector = checkpoint()
    fingerprint = encoder_fingerprint(detector.encoder, RigSpec())
    return build_feature_object_database(
        folder, FRAMES, detector, codec="fp16", config=config().f_gt, split_fingerprint="ab" * 32, encoder_fingerprint=fingerprint
    )


@pytest.fixture(scope="module")
def truth(store) -> dict[str, Labels]:
    answers = [frame(seed).labels for seed in (10, 11, 12)]
    return {store[i].scene_id: labels for i, labels in enumerate(answers)}


RAW = UnlabeledBatches(
    frames=[frame(seed) for seed in (10, 11, 12)], batch_size=2, seed=0, augmentation=AugmentationRanges(flip_y=1.0)
)


def train(method: str, store, features, *, settings: UpcycleConfig | None = None, **options) -> tuple[Detector, Detector]:
    """Student and teacher after a few steps of ``method`` from the one checkpoint."""
    detector = checkpoint()
    scans = RAW if METHODS[method].unlabeled == "raw" else None
    teacher = upcycle(
        detector, method=METHODS[method], labeled=labeled, store=store, pasted_objects=features, config=settings or config(),
        progress=False, **{"scans": scans, **options},
    )  # fmt: skip
    return detector, teacher


def differing(a: torch.nn.Module, b: torch.nn.Module) -> set[str]:
    other = b.state_dict()
    return {name for name, value in a.state_dict().items() if not torch.equal(value, other[name])}


# ---- every method


@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_what_it_trains_and_repeats_bit_for_bit_with_and_without_the_truth(method, store, features, truth):
    student, teacher = train(method, store, features)
    changed = differing(student, checkpoint())
    trains = METHODS[method].trains
    if trains == "nothing":
        assert changed == set()
        assert differing(teacher, checkpoint()) == set()
    else:
        assert any(name.startswith("decoder.anchor_head") for name in changed)
        assert any(name.startswith("decoder.bev_backbone") for name in changed)
        assert any(name.startswith("encoder.") for name in changed) == (trains == "all")
        assert not student.training
        assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    again, teacher_again = train(method, store, features, truth=truth)  # truth measures; it must not teach
    assert differing(student, again) == set()
    assert differing(teacher, teacher_again) == set()


def test_raw_scans_are_moved_for_the_student_and_the_boxes_move_along(store, monkeypatch):
    """The teacher sees the scan as it came; what it says is flipped with the student's scan. No label of the scans is passed on."""
    seen: dict[str, list] = {"teacher": [], "student": [], "labels": []}
    real_encode, real_loss = Detector.encode, Detector.loss

    def encode(self, points):
        seen["student" if self.training else "teacher"].append(points)
        return real_encode(self, points)

    def loss(self, outputs, labels):
        seen["labels"].append(labels)
        return real_loss(self, outputs, labels)

    monkeypatch.setattr(Detector, "encode", encode)
    monkeypatch.setattr(Detector, "loss", loss)
    train("iou_match", None, None, settings=config(steps=1))
    [clean], [_, moved] = seen["teacher"], seen["student"]
    scans = RAW(0)
    for scan, before, after in zip(scans, clean, moved, strict=True):
        assert scan.frame.labels is None
        assert torch.equal(before.xyz, scan.frame.points.xyz)
        assert torch.equal(after.xyz, scan.movement.points(scan.frame.points.xyz))
    with torch.no_grad():
        teacher = checkpoint().eval()
        found = teacher.predict(teacher.decode(teacher.encode(clean)))
    for scan, prediction, labels in zip(scans, found, seen["labels"][0][-2:], strict=True):
        expected = teacher_labels(prediction, config().thresholds, trusted=False, box_weight=config().teacher_box_weight)
        boxes = scan.movement.boxes(expected.boxes.data)
        assert len(labels) > 0
        assert all(any(torch.allclose(b, e, atol=1e-4) for e in boxes) for b in labels.boxes.data)


def test_a_method_of_raw_scans_without_any_says_so():
    with pytest.raises(InvalidInput, match="raw unlabelled scans"):
        train("mean_teacher", None, None, scans=None)


def test_methods_differ_in_what_they_learn(store, features):
    students = {
        m: train(m, store, features)[0] for m in ("source_continued", "pseudo_label", "hybrid", "noise", "flip_y", "cut_mix")
    }
    names = list(students)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert differing(students[a], students[b]), f"{a} and {b} trained the same network"


def test_another_seed_is_another_run(store, features):
    a, b = (train("hybrid", store, features, settings=config(seed=seed))[0] for seed in (0, 1))
    assert differing(a, b)


def test_the_teacher_is_the_average_of_the_students_and_shares_their_statistics(store, features):
    student, teacher = train("hybrid", store, features, settings=config(steps=2))
    assert "decoder.anchor_head.conv_cls.weight" in differing(student, teacher)
    buffers = dict(teacher.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in student.named_buffers())
    # After its first step the teacher is the student (decay 0).
    student, teacher = train("hybrid", store, features, settings=config(steps=1))
    assert differing(student, teacher) == set()


# ---- pseudo labels and F-GT


def rounds(caplog) -> list[dict[str, float]]:
    texts = [r.getMessage() for r in caplog.records if r.getMessage().startswith("pseudo labels until")]
    return [{k: float(v) for k, v in re.findall(r"(\w+) (\d+\.\d+)", text)} for text in texts]


@pytest.mark.parametrize("method", ["pseudo_label", "upcycling", "f_gt_trusted", "cut_mix"])
def test_no_pseudo_label_is_legal(method, store, features, caplog):
    with caplog.at_level(logging.INFO):
        student, _ = train(method, store, features, settings=config(thresholds=NOTHING))
    assert [r["labels_per_scene"] for r in rounds(caplog)] == [0, 0]
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())


def test_objects_are_pasted_by_f_gt_only(store, features, caplog):
    pasted = {}
    for method in ("upcycling", "f_gt_trusted", "hybrid"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train(method, store, features, settings=config(steps=1, thresholds=NOTHING))
        pasted[method] = rounds(caplog)[0]["pasted_per_scene"]
    assert pasted["upcycling"] > 0
    assert pasted["f_gt_trusted"] > 0
    assert pasted["hybrid"] == 0


def test_pasted_objects_keep_clear_of_what_the_teacher_half_believes(store, features, monkeypatch):
    """Boxes far too weak to be labels are obstacles: there may be an object."""
    seen: list[tuple[int, int]] = []
    real = trainer_module.sample_objects

    def spy(database, labels, obstacles, *rest):
        seen.append((len(labels), len(obstacles)))
        return real(database, labels, obstacles, *rest)

    monkeypatch.setattr(trainer_module, "sample_objects", spy)
    train("upcycling", store, features, settings=config(steps=1, thresholds=NOTHING, obstacle_score=0.0))
    train("upcycling", store, features, settings=config(steps=1, thresholds=NOTHING, obstacle_score=1.0))
    assert [labels for labels, _ in seen] == [0, 0, 0, 0]
    assert all(obstacles > 0 for _, obstacles in seen[:2])
    assert all(obstacles == 0 for _, obstacles in seen[2:])


def test_the_truth_is_reported_beside_the_labels(store, features, truth, caplog):
    with caplog.at_level(logging.INFO):
        train("hybrid", store, features, truth=truth)
    assert len(rounds(caplog)) == 2
    for values in rounds(caplog):
        assert values["labels_per_scene"] > 0
        assert 0 <= values["precision_70"] <= values["precision_50"] <= 1
        assert 0 <= values["recall_70"] <= values["recall_50"] <= 1


def test_labeled_features_pass_the_codec_scene_by_scene_where_the_encoder_is_frozen(store, features, monkeypatch):
    seen: list[tuple[int, str]] = []
    real = store_module.round_trip

    def spy(values: torch.Tensor, codec: str) -> torch.Tensor:
        seen.append((len(values), codec))
        return real(values, codec)

    monkeypatch.setattr(store_module, "round_trip", spy)
    train("hybrid", store, features, settings=config(steps=1), codec="int8")
    with torch.no_grad():
        expected = [len(checkpoint().eval().encode([f.points]).voxels.coords) for f in labeled(0)]
    assert seen == [(n, "int8") for n in expected]
    seen.clear()
    train("oracle_full", None, None)
    assert seen == []
    # What the decoder learns from is the quantised feature: a coarser codec trains another network.
    assert differing(train("hybrid", store, features, codec="int8")[0], train("hybrid", store, features, codec="fp16")[0])


# ---- what is missing, and going on


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.unlabeled == "smashed"])
def test_a_method_that_needs_scenes_says_so(method, features):
    for nothing in (None, []):
        with pytest.raises(InvalidInput, match="store is empty; run `upcycle3d extract`"):
            train(method, nothing, features)


def test_f_gt_without_objects_says_so(store, tmp_path):
    empty = FeatureObjectDatabase.write(
        tmp_path / "db",
        [],
        spec=checkpoint().spec,
        config=FeatureGtConfig(max_objects=(5,)),
        split_fingerprint="ab",
        encoder_fingerprint="cd",
    )
    for nothing in (None, empty):
        with pytest.raises(InvalidInput, match="F-GT needs a feature database"):
            train("upcycling", store, nothing)


def test_a_method_takes_only_what_it_needs():
    for method in ("source_only", "source_continued", "oracle_frozen", "oracle_full"):
        train(method, None, None, settings=config(steps=1))


class PowerCut(UpcycleError):
    pass


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(store, features, tmp_path):
    settings = config(steps=4)
    straight = train("upcycling", store, features, settings=settings)

    def cut_off(step: int) -> tuple[Frame, ...]:
        if step == 3:
            raise PowerCut
        return labeled(step)

    def run() -> RunFolder:
        return RunFolder.create(tmp_path / "run", settings, seed=0, resume=True, tensorboard=False)

    with pytest.raises(PowerCut):
        upcycle(
            checkpoint(), method=METHODS["upcycling"], labeled=cut_off, store=store, pasted_objects=features, config=settings,
            run=run(), progress=False,
        )  # fmt: skip
    resumed = train("upcycling", store, features, settings=settings, run=run())
    assert [differing(a, b) for a, b in zip(straight, resumed, strict=True)] == [set(), set()]


def test_batches_made_by_a_worker_are_the_same(store, features):
    here, there = (train("upcycling", store, features, workers=w)[0] for w in (0, 1))
    assert differing(here, there) == set()


# ---- keypoints

BALLS = SetAbstractionConfig(channels=(4, 4), radii=(0.6, 1.2), limits=(4, 8))
TINY_PV_RCNN = PvRcnnDetectorConfig(
    encoder=PvRcnnEncoderConfig(
        voxels=TINY.encoder, keypoints=64, raw_points=BALLS, conv1=None, conv2=None, conv3=BALLS, conv4=None
    ),
    decoder=PvRcnnConfig(
        anchors=TINY.decoder.anchors,
        bev=TINY.decoder.bev,
        fused_channels=8,
        keypoint_channels=8,
        grid_size=2,
        grid_pooling=BALLS,
        head_channels=8,
        train_proposals=TINY.decoder.train_proposals,
        test_proposals=TINY.decoder.test_proposals,
        roi_sampling=TINY.decoder.roi_sampling,
        quality_target=(0.0, 1.0),
        final=FinalNms(score=0.0, iou=0.1),
    ),
)


def keypoint_checkpoint() -> Detector:
    torch.manual_seed(0)
    return TINY_PV_RCNN.build()


def test_a_detector_with_keypoints_is_upcycled_with_pasted_objects(tmp_path, caplog):
    extractor = Extractor(keypoint_checkpoint().encoder, RigSpec(), "int8")
    with ShardWriter(tmp_path / "in", spec=extractor.spec, fingerprint=extractor.fingerprint, codec="int8") as writer:
        extract([frame(seed).points for seed in (10, 11, 12)], extractor, writer)
    ingest(tmp_path / "in", tmp_path / "store", expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)
    store = SmashedStore(tmp_path / "store")
    assert store.keypoints.tolist() == [64, 64, 64]
    features = build_feature_object_database(
        tmp_path / "db", FRAMES, keypoint_checkpoint(), codec="int8", config=config().f_gt, split_fingerprint="ab" * 32,
        encoder_fingerprint=extractor.fingerprint,
    )  # fmt: skip
    assert any(len(features[i].keypoints.xyz) for i in range(len(features)))

    def run() -> tuple[Detector, Detector]:
        student = keypoint_checkpoint()
        teacher = upcycle(
            student, method=METHODS["upcycling"], labeled=labeled, store=store, pasted_objects=features,
            config=config(steps=3, thresholds=NOTHING), codec="int8", progress=False,
        )  # fmt: skip
        return student, teacher

    with caplog.at_level(logging.INFO):
        student, teacher = run()
    assert sum(r["pasted_per_scene"] for r in rounds(caplog)) > 0
    changed = differing(student, keypoint_checkpoint())
    for part in ("bev_backbone", "anchor_head", "fusion", "keypoint_head", "roi_head.roi_grid_pool_layer", "roi_head.cls_layers"):
        assert any(name.startswith(f"decoder.{part}") for name in changed), part
    assert not any(name.startswith("encoder.") for name in changed)
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    assert [differing(a, b) for a, b in zip((student, teacher), run(), strict=True)] == [set(), set()]


@pytest.mark.parametrize("codec", CODECS)
def test_labeled_features_are_bit_for_bit_what_a_store_would_give(codec):
    encoder = keypoint_checkpoint().encoder.eval()
    clouds = [f.points for f in FRAMES[:2]] + [PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1))]
    extractor = Extractor(encoder, RigSpec(), codec)
    scenes = [
        decode_scene(
            encode_scene(extractor.smash(c)[0]), expected_spec=extractor.spec, expected_fingerprint=extractor.fingerprint
        )
        for c in clouds
    ]
    expected = collate_scenes(scenes)
    encoder.requires_grad_(False)  # frozen, as in every method that learns from a store
    live = CutFeatures.collate([encoder([c]) for c in clouds])
    found = quantize_features(live, codec)
    assert found.keypoints.starts == expected.keypoints.starts == (0, 64, 128, 128)
    assert torch.equal(found.keypoints.xyz, expected.keypoints.xyz)
    assert torch.equal(found.keypoints.features, expected.keypoints.features)
    assert torch.equal(found.voxels.sorted().coords, expected.voxels.sorted().coords)
    assert torch.equal(found.voxels.sorted().features, expected.voxels.sorted().features)
    assert not torch.equal(found.keypoints.features, live.keypoints.features)
