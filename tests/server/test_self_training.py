"""ST3D's self-training: what becomes a label, how labels of rounds are merged, how augmentation grows, and that a stopped run goes on."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.structures import Boxes3D, Predictions
from upcycle3d.datasets.augment import AugmentationRanges
from upcycle3d.datasets.batches import UnlabeledBatches
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.server.self_training import (
    LabelMemory,
    ScanLabels,
    SelfTrainingStep,
    memory_ensemble,
    scan_labels,
    self_train,
    widened_ranges,
)
from upcycle3d.perception.server.upcycle_config import ScoreThresholds, SelfTrainingConfig
from upcycle3d.perception.training.ema import make_teacher
from upcycle3d.perception.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SelfTrainingConfig()
THRESHOLDS = (ScoreThresholds(iou_score=0.6, class_score=0.0, ignore=0.2),)


def box(x: float) -> list[float]:
    return [x, 0.0, 0.0, 4.0, 2.0, 1.5, 0.0]


def remembered(*entries: tuple[float, float, bool, int]) -> ScanLabels:
    """x of the box, score, positive, rounds missed."""
    return ScanLabels(
        boxes=torch.tensor([box(x) for x, *_ in entries]).view(-1, 7),
        classes=torch.zeros(len(entries), dtype=torch.int64),
        scores=torch.tensor([e[1] for e in entries]),
        positive=torch.tensor([e[2] for e in entries], dtype=torch.bool),
        missed=torch.tensor([e[3] for e in entries], dtype=torch.int64),
    )


def rows(labels: ScanLabels) -> list[tuple[float, float, bool, int]]:
    columns = (labels.boxes[:, 0], labels.scores, labels.positive, labels.missed)
    return [(round(x, 3), round(s, 3), p, m) for x, s, p, m in zip(*(c.tolist() for c in columns), strict=True)]


def test_a_box_is_a_label_ignored_or_nothing_by_its_predicted_overlap():
    scores = torch.tensor([0.9, 0.6, 0.59, 0.2, 0.19])
    found = Predictions(
        boxes=Boxes3D(data=torch.tensor([box(10.0 * k) for k in range(5)])), classes=torch.zeros(5, dtype=torch.int64),
        scores=scores, class_scores=torch.ones(5), iou_scores=scores,
    )  # fmt: skip
    labels = scan_labels(found, THRESHOLDS)
    assert rows(labels) == [(0, 0.9, True, 0), (10, 0.6, True, 0), (20, 0.59, False, 0), (30, 0.2, False, 0)]
    assert labels.labels().weight.tolist() == [1, 1, 0, 0]
    assert labels.labels().complete
    assert len(scan_labels(Predictions.empty(), THRESHOLDS).boxes) == 0


def test_of_two_boxes_of_one_object_the_higher_score_stays():
    old, new = remembered((0.0, 0.9, True, 1), (20.0, 0.3, False, 0)), remembered((0.5, 0.7, True, 0), (20.5, 0.8, True, 0))
    assert rows(memory_ensemble(old, new, CONFIG)) == [(0.0, 0.9, True, 0), (20.5, 0.8, True, 0)]


def test_an_old_box_waits_is_ignored_and_then_removed_unless_it_is_seen_again():
    labels, nothing = remembered((0.0, 0.9, True, 0)), remembered()
    states = []
    for _ in range(3):
        labels = memory_ensemble(labels, nothing, CONFIG)
        states.append(rows(labels))
    assert states == [[(0.0, 0.9, True, 1)], [(0.0, 0.9, False, 2)], []]
    again = memory_ensemble(remembered((0.0, 0.9, True, 2)), remembered((0.2, 0.5, False, 0)), CONFIG)
    assert rows(again) == [(0.0, 0.9, True, 0)]


def test_boxes_of_other_classes_or_far_away_are_other_objects():
    old, new = remembered((0.0, 0.9, True, 0)), remembered((3.9, 0.7, True, 0))  # 0.1 m of overlap: IoU under 0.1
    assert rows(memory_ensemble(old, new, CONFIG)) == [(3.9, 0.7, True, 0), (0.0, 0.9, True, 1)]
    other = ScanLabels(**{**vars(remembered((0.0, 0.7, True, 0))), "classes": torch.tensor([1])})
    assert len(memory_ensemble(old, other, CONFIG).boxes) == 2
    assert rows(memory_ensemble(remembered(), new, CONFIG)) == rows(new)


def test_augmentation_grows_step_by_step():
    ranges = AugmentationRanges(yaw=(-0.4, 0.4), scale=(0.95, 1.05))
    start, end = widened_ranges(ranges, CONFIG, 0.0), widened_ranges(ranges, CONFIG, 1.0)
    assert start.yaw == (-0.4, 0.4)
    assert start.object_scale == pytest.approx((0.95, 1.05))
    assert end.yaw[1] == pytest.approx(0.4 * 1.1**4)
    assert end.scale == pytest.approx((1 - 0.05 * 1.1**4, 1 + 0.05 * 1.1**4))
    assert widened_ranges(ranges, CONFIG, 0.4).yaw[1] == pytest.approx(0.4 * 1.1**2)


def test_labels_of_a_round_survive_on_disk(tmp_path):
    labels = [remembered((0.0, 0.9, True, 1), (9.0, 0.3, False, 0)), remembered(), remembered((5.0, 0.5, True, 2))]
    LabelMemory(tmp_path).put(3, labels)
    found = LabelMemory(tmp_path).get(3)
    assert [rows(r) for r in found] == [rows(r) for r in labels]
    assert LabelMemory(tmp_path).get(2) is None


# ---- training


SCANS = UnlabeledBatches(
    frames=[tiny.frame_with_car(seed) for seed in range(3)], batch_size=99, seed=0, augmentation=AugmentationRanges()
)
SETTINGS = tiny.upcycle_config(steps=6, labeled_batch=1, unlabeled_batch=1, self_training=SelfTrainingConfig(relabel_steps=3))


def train(run: RunFolder | None = None, **options) -> tuple[Detector, Detector]:
    student = tiny.source_model()
    return student, self_train(student, SCANS, config=SETTINGS, run=run, progress=False, **options)


def test_a_step_reads_as_many_scans_as_both_halves_of_other_methods_and_their_labels_of_the_round():
    student = tiny.source_model()
    step = SelfTrainingStep(student, make_teacher(student), SCANS, config=SETTINGS)
    rounds = [step.round_labels(s) for s in (0, 2, 3)]
    assert [len(r) for r in rounds] == [3, 3, 3]
    assert rounds[0] is rounds[1]
    assert rounds[0] is not rounds[2]
    batch = step.batch(4)
    assert len(batch) == 2
    assert all(frame.labels is not None and frame.labels.complete for frame in batch)
    assert torch.equal(step.batch(4)[0].points.xyz, batch[0].points.xyz)


def test_labels_are_made_each_round_and_everything_is_trained(tmp_path):
    run = RunFolder.create(tmp_path / "run", CONFIG, seed=0, tracker="none")
    student, teacher = train(run)
    assert [m["step"] for m in run.metrics("pseudo_labels")] == [0, 3]
    assert sorted(p.name for p in (tmp_path / "run" / "pseudo_labels").iterdir()) == [
        "round_0000.safetensors",
        "round_0001.safetensors",
    ]
    before = tiny.source_model().state_dict()
    changed = {n.split(".")[0] for n, v in student.named_parameters() if not torch.equal(v, before[n])}
    assert changed == {"encoder", "decoder"}
    assert not student.training
    assert not teacher.training
    assert all(np.isfinite(v.numpy()).all() for v in student.state_dict().values())


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path):
    def cut_off(step: int, student: Detector) -> None:
        if step == 4:
            raise RuntimeError("power cut")

    whole, _ = train(RunFolder.create(tmp_path / "whole", CONFIG, seed=0, tracker="none"))
    with (
        pytest.raises(RuntimeError, match="power cut"),
        RunFolder.create(tmp_path / "cut", CONFIG, seed=0, tracker="none") as run,
    ):
        train(run, after_step=cut_off)
    resumed, _ = train(RunFolder.create(tmp_path / "cut", CONFIG, seed=0, resume=True, tracker="none"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
