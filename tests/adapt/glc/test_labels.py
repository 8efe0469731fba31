"""GLC's labels against a slow reading of the paper's description, and against stored outputs of the released code."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.adapt.glc.class_number import (
    ClassNumberConfig,
    class_number_candidates,
    estimate_class_number,
    occupied_classes,
)
from upcycle3d.perception.adapt.glc.kmeans import KMeansConfig, kmeans
from upcycle3d.perception.adapt.glc.lead_labels import LeadConfig, larger_mixture_mean, lead_labels
from upcycle3d.perception.adapt.glc.one_vs_all import OneVsAllConfig, one_vs_all_labels, positive_counts


def target(
    n: int = 300, classes: int = 4, private: int = 2, d: int = 12, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Features, softmax of a nearest-mean classifier over the source classes, and labels with private = `classes`."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(classes + private, d)) * 3
    label = rng.integers(0, classes + private, n)
    features = torch.from_numpy((means[label] + rng.normal(size=(n, d))).astype(np.float32))
    logits = -torch.cdist(features, torch.from_numpy(means[:classes].astype(np.float32))).square() / 20
    return features, logits.softmax(1), np.minimum(label, classes)


def labels_reference(features: torch.Tensor, probabilities: torch.Tensor, k: int, config: OneVsAllConfig) -> list[int]:
    """Every class against every sample, following the paper."""
    features = F.normalize(features)
    n, classes = probabilities.shape
    accepted, positive_cosine = np.zeros((n, classes), bool), np.zeros((n, classes))
    for c, count in enumerate(positive_counts(probabilities, k, config)):
        order = probabilities[:, c].sort(descending=True).indices.tolist()  # the order of the released code
        if config.stable:
            order = sorted(range(n), key=lambda i: (-float(probabilities[i, c]), i))
        positives, negatives = order[:count], order[count:]
        prior = config.rho + (1 - config.rho) * float(probabilities[positives, c].mean())
        prototype = F.normalize(features[positives].mean(0), dim=0)
        rivals = []
        for vote, factor in enumerate(config.negatives):
            clusters = min(round(factor * k), len(negatives))
            centroids = kmeans(features[negatives], clusters, config.kmeans, seed=config.seed + vote).centroids
            rivals.append([max(float(features[i] @ (m / m.norm())) for m in centroids) for i in range(n)])
        for i in range(n):
            positive_cosine[i, c] = float(features[i] @ prototype)
            accepted[i, c] = prior * positive_cosine[i, c] >= np.median([r[i] for r in rivals])
    best = positive_cosine.argmax(1)
    return [int(b) if accepted[i, b] else classes for i, b in enumerate(best)]


@pytest.mark.parametrize("config", [OneVsAllConfig.paper(), OneVsAllConfig()])
def test_labels_equal_the_slow_reference(config):
    features, probabilities, _ = target()
    found = one_vs_all_labels(features, probabilities, 6, config)
    assert found.hard.tolist() == labels_reference(features, probabilities, 6, config)
    assert 0 < (found.hard == 4).sum() < 300


def test_labels_find_the_unknown_on_separate_classes_and_soft_labels_are_distributions():
    features, probabilities, truth = target()
    careful = KMeansConfig(init="plusplus", restarts=5, points_per_centroid=0)
    others = OneVsAllConfig(negatives=(5 / 6,), kmeans=careful)  # exactly as many clusters as there are other classes
    found = one_vs_all_labels(features, probabilities, 6, others)
    assert (found.hard.numpy() == truth).mean() > 0.9
    unknown = found.hard == 4
    torch.testing.assert_close(found.soft.sum(1), torch.ones(300))
    assert (found.soft[unknown] == 0.25).all()
    assert torch.equal(found.soft[~unknown].argmax(1), found.hard[~unknown])
    assert torch.equal(found.margin >= 0, ~unknown)


def test_features_of_any_length_give_the_same_labels_and_so_does_a_second_call():
    features, probabilities, _ = target()
    once = one_vs_all_labels(features, probabilities, 6, OneVsAllConfig())
    again = one_vs_all_labels(features * 8, probabilities, 6, OneVsAllConfig())
    assert torch.equal(once.hard, again.hard)


def test_a_source_private_class_has_the_smallest_prior():
    features, probabilities, truth = target(seed=4)
    keep = torch.from_numpy(truth != 2)
    found = one_vs_all_labels(features[keep], probabilities[keep], 5, OneVsAllConfig())
    assert int(found.prior.argmin()) == 2
    assert ((found.prior >= 0.75) & (found.prior <= 1)).all()


def test_one_odd_number_of_negative_clusters_does_not_decide_alone():
    """A guess of K far too small lets everything in; two clusterings with more clusters outvote it."""
    features, probabilities, truth = target()
    alone = one_vs_all_labels(features, probabilities, 6, OneVsAllConfig(negatives=(0.2,)))
    voted = one_vs_all_labels(features, probabilities, 6, OneVsAllConfig(negatives=(0.2, 1.0, 1.0)))
    private = truth == 4
    assert (voted.hard.numpy()[private] == 4).mean() > (alone.hard.numpy()[private] == 4).mean() + 0.2


@pytest.mark.parametrize("positives", ["uniform", "expected"])
@pytest.mark.parametrize(("n", "classes"), [(2, 2), (3, 5), (40, 3)])
def test_there_is_always_a_positive_and_a_negative(positives, n, classes):
    features, probabilities, _ = target(n, classes, 1)
    for k in (2, 50):
        found = one_vs_all_labels(features, probabilities, k, replace(OneVsAllConfig(), positives=positives))
        assert found.margin.isfinite().all()
        assert all(1 <= c < n for c in positive_counts(probabilities, k, replace(OneVsAllConfig(), positives=positives)))


def test_a_class_that_nobody_is_nearest_to_takes_no_sample():
    features, probabilities, _ = target()
    shut = torch.cat([probabilities, torch.zeros(300, 1)], 1)
    found = one_vs_all_labels(features, shut, 6, OneVsAllConfig())
    assert (found.hard != 4).all() or (found.nearest == 4).any()
    assert found.prior[4] == pytest.approx(0.75)


def test_bad_targets_are_refused_by_name():
    features, probabilities, _ = target()

    def labels(f: torch.Tensor, p: torch.Tensor, k: int = 6) -> None:
        one_vs_all_labels(f, p, k, OneVsAllConfig())

    holed = features.clone()
    holed[7, 2] = torch.nan
    with pytest.raises(InvalidInput, match="features of 1 samples are not finite, the first at row 7"):
        labels(holed, probabilities)
    with pytest.raises(InvalidInput, match="row 0 sums to 2"):
        labels(features, probabilities * 2)
    with pytest.raises(InvalidInput, match="smallest value is -"):
        labels(features, probabilities + torch.tensor([1.0, -1.0, 0, 0]))
    with pytest.raises(InvalidInput, match="at least 2 source classes"):
        labels(features, torch.ones(300, 1))
    with pytest.raises(InvalidInput, match="at least 2 target samples, found 0"):
        labels(features[:0], probabilities[:0])
    with pytest.raises(InvalidInput, match="like the features"):
        labels(features, probabilities[:9])
    with pytest.raises(InvalidInput, match="class_number = 1"):
        labels(features, probabilities, 1)
    with pytest.raises(InvalidInput, match="odd number of positive factors"):
        OneVsAllConfig(negatives=(1.0, 2.0))
    with pytest.raises(InvalidInput, match="odd number of positive factors"):
        OneVsAllConfig(negatives=(0.0,))


# ---- the number of classes -----------------------------------------------------------------------------------------------


def test_candidates_are_never_below_two():
    assert class_number_candidates(3, "paper") == (2, 3, 6, 9)
    assert class_number_candidates(10, "paper") == (2, 5, 10, 20, 30)
    assert class_number_candidates(2, "dense") == (2, 3, 4, 5, 6)
    assert len(class_number_candidates(345, "dense")) <= 24


@pytest.mark.parametrize("config", [ClassNumberConfig.paper(), ClassNumberConfig()])
def test_the_number_of_separate_classes_is_found(config):
    features, _, _ = target(400, 4, 2, seed=1)
    found = estimate_class_number(features, range(2, 13), config)
    assert found.value == 6
    assert found == estimate_class_number(features, range(2, 13), config)


def test_smoothing_finds_overlapping_classes():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(8, 32)) * 0.35
    features = torch.from_numpy((means[np.arange(1200) % 8] + rng.normal(size=(1200, 32)) / np.sqrt(32)).astype(np.float32))
    assert estimate_class_number(features, range(2, 17), ClassNumberConfig()).value == 8


def test_too_few_samples_for_every_candidate_is_said():
    with pytest.raises(InvalidInput, match="below the 2 samples"):
        estimate_class_number(torch.eye(2), (2, 3), ClassNumberConfig())
    assert estimate_class_number(torch.eye(4), (2, 3, 9), ClassNumberConfig()).candidates == (2, 3)


# ---- LEAD ----------------------------------------------------------------------------------------------------------------


def test_lead_follows_its_formulas_sample_by_sample():
    features, probabilities, _ = target(80)
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    found = lead_labels(features, probabilities, weight, 6, LeadConfig())
    f, basis = F.normalize(features).double(), np.linalg.svd(weight.T.numpy())[0]
    score = np.linalg.norm(f.numpy() @ basis[:, 4:], axis=1)
    larger = larger_mixture_mean(torch.from_numpy(score), steps=100)
    count = 80 // 6
    positives = [np.argsort(-probabilities[:, c].numpy(), kind="stable")[:count] for c in range(4)]
    for i in range(80):
        common = []
        for c in range(4):
            prototype = f[positives[c]].mean(0)
            cosine = max(0.0, float(f[i] @ prototype / prototype.norm()))
            source = max(0.0, float(f[i] @ weight[c].double() / weight[c].double().norm()))
            common.append(np.sqrt((1 - np.exp(-cosine)) * np.exp(source - 1)))
        c = int(np.argmax(common))
        m = score[positives[c]].mean()
        boundary = m + common[c] * max(larger - m, 0)
        if abs(score[i] - boundary) > 1e-5:
            assert int(found.hard[i]) == (4 if score[i] >= boundary else c)
            expected = 1 - (1 + (score[i] - boundary) ** 2 / 1e-4) ** (-(1 + 1e-4) / 2)
            assert float(found.weight[i]) == pytest.approx(expected, abs=5e-3)


def test_the_mixture_finds_two_gaussians_and_bears_a_constant():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(np.concatenate([rng.normal(0.2, 0.05, 3000), rng.normal(0.7, 0.05, 1000)]))
    assert larger_mixture_mean(scores, steps=200) == pytest.approx(0.7, abs=0.01)
    assert larger_mixture_mean(torch.full((5,), 0.3), steps=10) == pytest.approx(0.3)


def test_lead_needs_an_unknown_space():
    features, probabilities, _ = target(50, 4, 1, d=4)
    with pytest.raises(InvalidInput, match="C < D"):
        lead_labels(features, probabilities, torch.zeros(4, 4), 5, LeadConfig())


# ---- the released code ---------------------------------------------------------------------------------------------------


def outputs(name: str) -> Any:
    """Stored inputs and outputs of the released code."""
    return np.load(tiny.shared(f"reference/glc_data/{name}.npz", "labels are those of the released code"))


def test_parity_with_the_released_code_on_n4000():
    data, reference = outputs("gauss_n4000"), outputs("glc_ref_n4000")
    features, probabilities = torch.from_numpy(data["feat"]), torch.from_numpy(data["prob"])
    estimate = estimate_class_number(features, class_number_candidates(10, "paper"), ClassNumberConfig.paper())
    assert estimate.value == 10 * reference["best_coeff"]
    found = one_vs_all_labels(features, probabilities, estimate.value, OneVsAllConfig.paper())
    assert (found.hard.numpy() == reference["hard"]).all()
    logged = [float(x) for x in json.loads(str(reference["meta"]))["log"][1].split("\t")[1:]]
    np.testing.assert_allclose(found.prior.numpy(), logged, atol=5.1e-4)


def test_occupied_classes_are_those_that_have_samples():
    assert occupied_classes(torch.arange(40) % 4, 4) == 4
    assert occupied_classes(torch.arange(40) % 4, 9) == 4
    assert occupied_classes(torch.tensor([0] * 50 + [1] * 50 + [2]), 5) == 2
    assert occupied_classes(torch.zeros(10, dtype=torch.int64), 5) == 2


def test_the_papers_options_order_equal_samples_as_the_released_code_does():
    """Equal probabilities are frequent among 20,000 float32 numbers, and their order decides from where k-means starts."""
    features, probabilities, _ = target(600)
    coarse = (probabilities * 64).round() + 1
    coarse = coarse / coarse.sum(1, keepdim=True)
    paper = OneVsAllConfig.paper()
    found = one_vs_all_labels(features, coarse, 6, paper)
    assert found.hard.tolist() == labels_reference(features, coarse, 6, paper)
    if torch.equal(coarse.sort(dim=0, descending=True).indices, coarse.sort(dim=0, descending=True, stable=True).indices):
        pytest.skip("torch's default sort keeps the order of equal values on this processor")
    assert not torch.equal(found.margin, one_vs_all_labels(features, coarse, 6, replace(paper, stable=True)).margin)
    assert OneVsAllConfig().stable


@pytest.mark.parametrize(("split", "k"), [("OPDA", 7), ("OSDA", 6), ("PDA", 5), ("CLDA", 10)])
def test_parity_with_the_first_epoch_on_digits(split, k):
    data = outputs(f"e2e_{split}")
    found = one_vs_all_labels(torch.from_numpy(data["feat0"]), torch.from_numpy(data["prob0"]), k, OneVsAllConfig.paper())
    soft = data["psd"][0]
    assert (found.hard.numpy() == np.where(soft.max(1) < 0.9, soft.shape[1], soft.argmax(1))).all()


def test_three_source_classes_leave_room_for_the_unknown():
    data = outputs("gauss_lidar3_n6000")
    features, probabilities = torch.from_numpy(data["feat"]), torch.from_numpy(data["prob"])
    estimate = estimate_class_number(features, class_number_candidates(3, "dense"), ClassNumberConfig())
    found = one_vs_all_labels(features, probabilities, estimate.value, OneVsAllConfig())
    truly = data["y"] == 3
    assert (found.hard.numpy()[truly] == 3).mean() > 0.4


def test_the_same_labels_from_one_and_two_threads():
    features, probabilities, _ = target(500)
    one, two = tiny.for_thread_counts(lambda: one_vs_all_labels(features, probabilities, 6, OneVsAllConfig()))
    assert torch.equal(one.hard, two.hard)
