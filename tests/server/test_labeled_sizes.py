"""A few labeled frames of the fleet: their mean size, how far it can be trusted, and the mean with another estimate."""

import numpy as np
import pytest
import torch

from upcycle3d.core.structures import Labels
from upcycle3d.perception.server.labeled_sizes import LabeledMean, joined_by_precision, mean_of_labels

LABELED = torch.tensor([4.0, 1.8, 1.5], dtype=torch.float64)


def labels(sizes: list[tuple[float, float, float]], classes: list[int] | None = None) -> Labels:
    boxes = torch.tensor([[8.0, 0.0, 0.8, *size, 0.0] for size in sizes]).reshape(-1, 7)
    return Labels.make(boxes, torch.tensor(classes if classes is not None else [0] * len(sizes)))


def test_the_error_is_that_of_frames_and_not_of_cars():
    """Ten times the same cars in one frame are no ten observations: the spread of the mean over redrawn frames is what is given."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(200):
        frames = [labels([(4.5 + rng.normal(0, 0.3), 1.8, 1.5)] * 10) for _ in range(12)]
        found = mean_of_labels(frames, 0, LABELED)
        means.append(float(found.difference[0]))
        errors.append(float(found.error[0]))
    assert np.mean(means) == pytest.approx(0.5, abs=0.03)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    assert np.mean(errors) == pytest.approx(0.3 / 12**0.5, rel=0.15)


def test_other_classes_and_objects_without_weight_do_not_count():
    found = mean_of_labels([labels([(5.0, 1.8, 1.5), (0.8, 0.6, 1.7)], [0, 1]), labels([(4.4, 1.8, 1.5)])], 0, LABELED)
    assert found.objects == 2
    assert found.difference.tolist() == pytest.approx([0.7, 0.0, 0.0], abs=1e-6)


def test_nothing_and_a_single_frame_say_nothing_of_their_error():
    none, one = mean_of_labels([labels([])], 0, LABELED), mean_of_labels([labels([(5.0, 1.8, 1.5)] * 3)], 0, LABELED)
    assert (none.objects, one.objects) == (0, 3)
    assert all(bool(found.error.isinf().all()) for found in (none, one))


def test_two_estimates_are_weighed_as_by_the_normal_equations():
    """The oracle is the least-squares solution of both equations, each divided by its error."""
    one, error = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    asked = LabeledMean(difference=torch.tensor([0.4, 0.1, 0.0], dtype=torch.float64), error=error.flip(0), objects=9)
    mean, joined = joined_by_precision(one, error, asked, 0.03)
    for side in range(3):
        rows = np.array([[1 / error[side]], [1 / asked.error[side]]])
        values = np.array([one[side] / error[side], asked.difference[side] / asked.error[side]])
        assert float(mean[side]) == pytest.approx(float(np.linalg.lstsq(rows, values, rcond=None)[0][0]))
        assert float(joined[side]) == pytest.approx(float(np.linalg.inv(rows.T @ rows)[0, 0] ** 0.5))


def test_an_estimate_without_a_number_has_no_weight():
    nothing = (
        torch.tensor([torch.nan, 0.3, 0.3], dtype=torch.float64),
        torch.tensor([0.1, torch.inf, torch.nan], dtype=torch.float64),
    )
    asked = LabeledMean(difference=LABELED, error=torch.full((3,), 0.05, dtype=torch.float64), objects=9)
    mean, error = joined_by_precision(*nothing, asked, 0.03)
    assert torch.allclose(mean, LABELED)
    assert torch.allclose(error, asked.error)
