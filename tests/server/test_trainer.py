"""The server's training on a tiny detector: every method runs, changes what it should and nothing else, and repeats bit for bit."""

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.core.features import CutFeatures
from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Labels, Predictions
from upcycle3d.datasets.augment import AugmentationRanges
from upcycle3d.datasets.batches import UnlabeledBatches
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.server import store as store_module
from upcycle3d.perception.server.feature_augmentation import cut_mix, flip_x
from upcycle3d.perception.server.feature_object_database import FeatureObjectDatabase, build_feature_object_database
from upcycle3d.perception.server.methods import METHODS, Method
from upcycle3d.perception.server.pseudo_labels import hybrid_labels
from upcycle3d.perception.server.trainer import upcycle
from upcycle3d.perception.server.upcycle_config import FeatureGtConfig, UpcycleConfig
from upcycle3d.perception.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = [tiny.frame_with_car(seed) for seed in range(4)]
RAW = UnlabeledBatches(
    frames=[tiny.frame_with_car(seed) for seed in (10, 11, 12)],
    batch_size=2,
    seed=0,
    augmentation=AugmentationRanges(flip_y=1.0),
)


def labeled(step: int) -> tuple[Frame, ...]:
    return FRAMES[step % 4], FRAMES[(step + 1) % 4]


def train(
    method: str | Method,
    store,
    pasted_objects,
    *,
    settings: UpcycleConfig | None = None,
    detector: Detector | None = None,
    **options,
) -> tuple[Detector, Detector]:
    """Student and teacher after a few steps of `method` from the one source model, or from `detector`."""
    chosen = METHODS[method] if isinstance(method, str) else method
    detector = detector or tiny.source_model()
    teacher = upcycle(
        detector,
        method=chosen,
        store=store,
        pasted_objects=pasted_objects,
        config=settings or tiny.upcycle_config(),
        progress=False,
        **{"labeled": labeled, "scans": RAW if chosen.unlabeled == "raw" else None, **options},
    )
    return detector, teacher


def differing(a: torch.nn.Module, b: torch.nn.Module) -> set[str]:
    other = b.state_dict()
    return {name for name, value in a.state_dict().items() if not torch.equal(value, other[name])}


# ---- every method


@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_what_it_trains_and_repeats_bit_for_bit_with_and_without_the_truth(method, store, pasted_objects, truth):
    student, teacher = train(method, store, pasted_objects)
    changed = differing(student, tiny.source_model())
    trains = METHODS[method].trains
    if trains == "nothing":
        assert changed == set()
        assert differing(teacher, tiny.source_model()) == set()
    else:
        assert any(name.startswith("decoder.anchor_head") for name in changed)
        assert any(name.startswith("decoder.bev_backbone") for name in changed)
        assert any(name.startswith("encoder.") for name in changed) == (trains == "all")
        assert not student.training
        assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    again, teacher_again = train(method, store, pasted_objects, truth=truth)  # truth measures; it must not teach
    assert differing(student, again) == set()
    assert differing(teacher, teacher_again) == set()


def test_a_fleet_that_is_extracted_twice_trains_the_same_network_bit_for_bit(store, pasted_objects, tmp_path):
    """The vehicle gives every scene a random id and every shard a random order; the seed alone decides what is learned."""
    students = []
    for name, order in (("a", (11, 10, 12)), ("b", (12, 11, 10))):
        scans = [tiny.frame_with_car(seed).points for seed in order]
        again = tiny.store(tmp_path / name, tiny.source_model(), scans)
        assert {again[i].scene_id for i in range(3)}.isdisjoint(store[i].scene_id for i in range(3))
        students.append(train("upcycling", again, pasted_objects)[0])
    first = train("upcycling", store, pasted_objects)[0]
    assert differing(first, students[0]) == differing(first, students[1]) == set()


def test_a_method_of_raw_scans_without_any_says_so():
    with pytest.raises(InvalidInput, match="raw unlabeled scans"):
        train("mean_teacher", None, None, scans=None)


def test_methods_differ_in_what_they_learn(store, pasted_objects):
    students = {
        m: train(m, store, pasted_objects)[0]
        for m in ("source_continued", "pseudo_label", "hybrid", "noise", "flip_y", "cut_mix")
    }
    names = list(students)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert differing(students[a], students[b]), f"{a} and {b} trained the same network"


def test_another_seed_is_another_run(store, pasted_objects):
    a, b = (train("hybrid", store, pasted_objects, settings=tiny.upcycle_config(seed=seed))[0] for seed in (0, 1))
    assert differing(a, b)


def test_the_teacher_is_the_average_of_the_students_and_shares_their_statistics(store, pasted_objects):
    student, teacher = train("hybrid", store, pasted_objects, settings=tiny.upcycle_config(steps=2))
    assert "decoder.anchor_head.conv_cls.weight" in differing(student, teacher)
    buffers = dict(teacher.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in student.named_buffers())
    # After its first step the teacher is the student (decay 0).
    student, teacher = train("hybrid", store, pasted_objects, settings=tiny.upcycle_config(steps=1))
    assert differing(student, teacher) == set()


def test_a_labeled_frame_without_labels_is_refused_by_name(store):
    frames = (FRAMES[0], replace(FRAMES[1], labels=None))
    with pytest.raises(InvalidInput, match=r"1 of 2 frames have no labels \(frame1\)"):
        train("hybrid", store, None, labeled=lambda step: frames)


# ---- pseudo labels and F-GT


def summaries(caplog) -> list[dict[str, float]]:
    texts = [r.getMessage() for r in caplog.records if r.getMessage().startswith("pseudo labels until")]
    return [{k: float(v) for k, v in re.findall(r"(\w+) (\d+\.\d+)", text)} for text in texts]


@pytest.mark.parametrize("method", ["pseudo_label", "upcycling", "f_gt_trusted", "cut_mix"])
def test_no_pseudo_label_is_legal(method, store, pasted_objects, caplog):
    with caplog.at_level(logging.INFO):
        student, _ = train(method, store, pasted_objects, settings=tiny.upcycle_config(thresholds=tiny.NOTHING))
    assert [r["labels_per_scene"] for r in summaries(caplog)] == [0, 0]
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())


def test_objects_are_pasted_by_f_gt_only(store, pasted_objects, caplog):
    pasted = {}
    for method in ("upcycling", "f_gt_trusted", "hybrid"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train(method, store, pasted_objects, settings=tiny.upcycle_config(steps=1, thresholds=tiny.NOTHING))
        pasted[method] = summaries(caplog)[0]["pasted_per_scene"]
    assert pasted["upcycling"] > 0
    assert pasted["f_gt_trusted"] > 0
    assert pasted["hybrid"] == 0


def test_the_truth_is_reported_beside_the_labels(store, pasted_objects, truth, caplog):
    with caplog.at_level(logging.INFO):
        train("hybrid", store, pasted_objects, truth=truth)
    assert len(summaries(caplog)) == 2
    for values in summaries(caplog):
        assert values["labels_per_scene"] > 0
        assert 0 <= values["precision_70"] <= values["precision_50"] <= 1
        assert 0 <= values["recall_70"] <= values["recall_50"] <= 1


def test_labeled_features_pass_the_codec_scene_by_scene_where_the_encoder_is_frozen(store, pasted_objects, monkeypatch):
    seen: list[tuple[int, str]] = []
    real = store_module.round_trip

    def spy(values: torch.Tensor, codec: str) -> torch.Tensor:
        seen.append((len(values), codec))
        return real(values, codec)

    monkeypatch.setattr(store_module, "round_trip", spy)
    train("hybrid", store, pasted_objects, settings=tiny.upcycle_config(steps=1), codec="int8")
    with torch.no_grad():
        expected = [len(tiny.source_model().eval().encode([f.points]).voxels.coords) for f in labeled(0)]
    assert seen == [(n, "int8") for n in expected]
    seen.clear()
    train("oracle_full", None, None)
    assert seen == []
    # What the decoder learns from is the quantized feature: a coarser codec trains another network.
    assert differing(
        train("hybrid", store, pasted_objects, codec="int8")[0], train("hybrid", store, pasted_objects, codec="fp16")[0]
    )


# ---- a method of one's own


def test_an_augmentation_and_a_label_rule_of_ones_own_are_used(store):
    def last_cell_removed(scene: CutFeatures, labels: Labels, rng: np.random.Generator) -> tuple[CutFeatures, Labels]:
        voxels = replace(scene.voxels, features=scene.voxels.features[:-1], coords=scene.voxels.coords[:-1])
        return replace(scene, voxels=voxels), labels

    def best_box(predictions: Predictions, config: UpcycleConfig) -> Labels:
        return hybrid_labels(predictions.select(slice(0, 1)), config)

    hybrid = METHODS["hybrid"]
    methods = [hybrid, replace(hybrid, augmentation=last_cell_removed), replace(hybrid, label_rule=best_box)]
    students = [train(method, store, None)[0] for method in methods]
    assert all(differing(students[i], students[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unlabeled": "raw", "f_gt": True}, "cannot use f_gt"),
        ({"unlabeled": "none", "augmentation": flip_x}, "cannot use augmentation"),
        ({"unlabeled": "raw", "mixing": cut_mix}, "cannot use mixing"),
        ({"max_paste_rotation": 0.1}, "set f_gt=True"),
        ({"unlabeled": "raw", "self_training": True}, "trains the whole detector"),
    ],
)
def test_a_method_that_would_ignore_a_part_of_itself_is_refused(fields, message):
    with pytest.raises(InvalidInput, match=message):
        Method(summary="mine", **fields)


# ---- what is missing, and going on


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.unlabeled == "smashed"])
def test_a_method_that_needs_scenes_says_so(method, pasted_objects):
    for nothing in (None, []):
        with pytest.raises(InvalidInput, match="store is empty; run `upcycle3d extract`"):
            train(method, nothing, pasted_objects)


def test_f_gt_without_objects_says_so(store, tmp_path):
    empty = FeatureObjectDatabase.write(
        tmp_path / "db",
        [],
        spec=tiny.source_model().spec,
        config=FeatureGtConfig(max_objects=(5,)),
        split_fingerprint="ab",
        encoder_fingerprint="cd",
    )
    for nothing in (None, empty):
        with pytest.raises(InvalidInput, match="F-GT needs a database with objects"):
            train("upcycling", store, nothing)


def test_a_method_takes_only_what_it_needs():
    for method in ("source_only", "source_continued", "oracle_frozen", "oracle_full"):
        train(method, None, None, settings=tiny.upcycle_config(steps=1))


class PowerCut(UpcycleError):
    pass


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(store, pasted_objects, tmp_path):
    settings = tiny.upcycle_config(steps=4)
    straight = train("upcycling", store, pasted_objects, settings=settings)

    def cut_off(step: int) -> tuple[Frame, ...]:
        if step == 3:
            raise PowerCut
        return labeled(step)

    def run() -> RunFolder:
        return RunFolder.create(tmp_path / "run", settings, seed=0, resume=True, tracker="none")

    with pytest.raises(PowerCut):
        train("upcycling", store, pasted_objects, settings=settings, run=run(), labeled=cut_off)
    resumed = train("upcycling", store, pasted_objects, settings=settings, run=run())
    assert [differing(a, b) for a, b in zip(straight, resumed, strict=True)] == [set(), set()]


def test_batches_made_by_a_worker_are_the_same(store, pasted_objects):
    here, there = (train("upcycling", store, pasted_objects, workers=w)[0] for w in (0, 1))
    assert differing(here, there) == set()


# ---- keypoints


def keypoint_model() -> Detector:
    return tiny.pv_rcnn(tiny.pv_rcnn_config(width=8, keypoints=64))


def test_a_detector_with_keypoints_is_upcycled_with_pasted_objects(tmp_path, caplog):
    scans = [tiny.frame_with_car(seed).points for seed in (10, 11, 12)]
    store = tiny.store(tmp_path, keypoint_model(), scans, codec="int8")
    assert store.keypoints.tolist() == [64, 64, 64]
    pasted_objects = build_feature_object_database(
        tmp_path / "db",
        FRAMES,
        keypoint_model(),
        codec="int8",
        config=tiny.upcycle_config().f_gt,
        split_fingerprint="ab" * 32,
        encoder_fingerprint=store.fingerprint,
    )
    assert any(len(pasted_objects[i].keypoints.xyz) for i in range(len(pasted_objects)))

    settings = tiny.upcycle_config(steps=3, thresholds=tiny.NOTHING)

    def run() -> tuple[Detector, Detector]:
        return train("upcycling", store, pasted_objects, settings=settings, detector=keypoint_model(), codec="int8")

    with caplog.at_level(logging.INFO):
        student, teacher = run()
    assert sum(r["pasted_per_scene"] for r in summaries(caplog)) > 0
    changed = differing(student, keypoint_model())
    for part in ("bev_backbone", "anchor_head", "fusion", "keypoint_head", "roi_head.roi_grid_pool_layer", "roi_head.cls_layers"):
        assert any(name.startswith(f"decoder.{part}") for name in changed), part
    assert not any(name.startswith("encoder.") for name in changed)
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    assert [differing(a, b) for a, b in zip((student, teacher), run(), strict=True)] == [set(), set()]
