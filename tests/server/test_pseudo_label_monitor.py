"""How good pseudo labels are is counted as one would by hand, and the log sums it up."""

import logging

import pytest
import torch

import tiny
from upcycle3d.core.structures import Labels
from upcycle3d.perception.server.pseudo_label_monitor import PseudoLabelMonitor, pseudo_label_quality
from upcycle3d.perception.server.store import collate_scenes
from upcycle3d.perception.server.unlabeled_half import UnlabeledHalf
from upcycle3d.perception.training.run_folder import RunFolder


def box(x: float) -> list[float]:
    return [x, 0.0, 0.0, 4.0, 2.0, 1.5, 0.0]


def labels(*xs: float, **options) -> Labels:
    return Labels.make(torch.tensor([box(x) for x in xs]).view(-1, 7), torch.zeros(len(xs), dtype=torch.int64), **options)


def points(*counts: int) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int64)


def test_quality_of_hand_made_labels():
    # Boxes of 4 m shifted by s along x overlap by (4 - s) / (4 + s): 1 m -> 0.6, 0.5 m -> 0.778.
    truth = labels(0.0, 20.0, 40.0, 60.0, num_points=points(50, 50, 50, 50))
    pseudo = labels(0.0, 21.0, 40.5, 100.0, 60.0, weight=torch.tensor([1.0, 1, 1, 1, 0]))
    quality = pseudo_label_quality([pseudo], [truth])
    assert (quality.labels, quality.ignored, quality.truth) == (4, 1, 4)
    assert quality.precision_50 == pytest.approx(3 / 4)  # exact, 0.6 and 0.78; one is on nothing
    assert quality.precision_70 == pytest.approx(2 / 4)
    assert quality.recall_50 == pytest.approx(3 / 4)  # the object under the ignored box is not found
    assert quality.recall_70 == pytest.approx(2 / 4)
    assert quality.mean_iou == pytest.approx((1 + 0.6 + 3.5 / 4.5 + 0) / 4, abs=1e-5)


def test_a_label_on_an_object_that_does_not_count_is_neutral():
    # Too few points, and ignored by people: nobody can expect the teacher to find them, nor blame it for it.
    truth = labels(0.0, 20.0, 40.0, num_points=points(4, 50, 50), weight=torch.tensor([1.0, 0, 1]))
    quality = pseudo_label_quality([labels(0.0, 20.5, 40.0)], [truth])
    assert (quality.labels, quality.truth) == (1, 1)
    assert quality.precision_70 == quality.recall_70 == quality.mean_iou == 1
    # Barely touching such an object is no excuse.
    assert pseudo_label_quality([labels(23.5, 40.0)], [truth]).precision_50 == 0.5


def test_classes_do_not_match_each_other():
    pedestrian = Labels.make(torch.tensor([box(0.0)]), torch.ones(1, dtype=torch.int64))
    quality = pseudo_label_quality([pedestrian], [labels(0.0, num_points=points(50))])
    assert (quality.precision_50, quality.recall_50) == (0, 0)


def test_scenes_are_compared_one_by_one_and_may_be_empty():
    truth = [labels(0.0, num_points=points(9)), labels(), labels(20.0, num_points=points(9)), labels()]
    pseudo = [labels(0.0), labels(20.0), labels(), labels()]
    quality = pseudo_label_quality(pseudo, truth)
    assert (quality.labels, quality.truth) == (2, 2)
    assert (quality.precision_50, quality.recall_50) == (0.5, 0.5)
    nothing = pseudo_label_quality([labels()], [labels()])
    assert (nothing.labels, nothing.truth, nothing.precision_50, nothing.mean_iou) == (0, 0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        pseudo_label_quality(pseudo, truth[:2])


# ---- the log


def test_a_summary_counts_the_scenes_since_the_last_one_and_compares_those_whose_truth_is_known(store, tmp_path, caplog):
    def half(*found: Labels, pasted: int = 0) -> UnlabeledHalf:
        features = collate_scenes([store[0]] * len(found))
        return UnlabeledHalf(features=features, labels=found, found=found, pasted=pasted)

    ahead, far = labels(3.0, num_points=points(50)), labels(3.0, 99.0, num_points=points(50, 50))  # 99 m is out of range
    ignored = labels(3.0, 5.0, weight=torch.tensor([1.0, 0.0]))
    with (
        RunFolder.create(tmp_path / "run", tiny.upcycle_config(), seed=0, tracker="none") as run,
        caplog.at_level(logging.INFO),
    ):
        monitor = PseudoLabelMonitor(every=2, truth={"a": ahead, "b": far}, run=run)
        monitor.finish_step(1)  # nothing to say
        monitor.add(half(labels(3.0), ignored, pasted=3), ["a", "unknown"])
        monitor.finish_step(2)  # not due
        monitor.add(half(labels(9.0), labels(3.0)), ["a", "b"])
        monitor.finish_step(3)
        monitor.add(half(labels()), ["a"])
        monitor.finish_step(5)
    first, second = run.metrics("pseudo_labels")
    assert (first["step"], first["labels_per_scene"], first["ignored_per_scene"], first["pasted_per_scene"]) == (3, 1, 0.25, 0.75)
    assert first["precision_50"] == first["recall_50"] == pytest.approx(2 / 3)
    assert (second["step"], second["labels_per_scene"], second["recall_50"]) == (5, 0, 0)
    assert "pseudo labels until step 3: labels_per_scene 1.000" in caplog.text


def test_without_truth_only_numbers_of_labels_are_logged(store, caplog):
    monitor = PseudoLabelMonitor(every=1)
    with caplog.at_level(logging.INFO):
        monitor.add(UnlabeledHalf(features=collate_scenes([store[0]]), labels=(labels(),), found=(labels(1.0),)), ["a"])
        monitor.finish_step(0)
    assert "labels_per_scene 1.000" in caplog.text
    assert "precision" not in caplog.text
