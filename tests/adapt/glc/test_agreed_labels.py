"""Labels on which clusters and classifier agree, the neighbors they ask, and the guard that falls back to no adaptation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.adapt.glc.agreed_labels import AgreedConfig, agreed_labels
from upcycle3d.perception.adapt.glc.feature_file import TargetFeatures
from upcycle3d.perception.adapt.glc.feature_labels import FeatureLabelConfig, label_features
from upcycle3d.perception.adapt.glc.guard import Guard, compare_certainty, guard_neighbors
from upcycle3d.perception.adapt.glc.neighborhood import certainty, most_certain_threshold, neighbor_agreement, neighbors_of
from upcycle3d.perception.adapt.glc.one_vs_all import one_vs_all_labels
from upcycle3d.perception.adapt.glc.pseudo_labels import unadapted_labels
from upcycle3d.perception.adapt.glc.unknown_rule import normalized_entropy


def target(
    n: int = 240, classes: int = 4, private: int = 2, seed: int = 0, distance: float = 2
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Features, softmax of a nearest-mean classifier over the source classes, and labels with private = `classes`."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(classes + private, 12)) * distance
    label = rng.integers(0, classes + private, n)
    features = torch.from_numpy((means[label] + rng.normal(size=(n, 12))).astype(np.float32))
    logits = -torch.cdist(features, torch.from_numpy(means[:classes].astype(np.float32))).square() / 20
    return features, logits.softmax(1), np.minimum(label, classes)


def information(labels: list[int], neighbors: list[list[int]]) -> float:
    """Mutual information of the labels of neighbors, pair by pair, each pair in both orders."""
    pairs = [(labels[i], labels[j]) for i, row in enumerate(neighbors) for j in row]
    pairs += [(b, a) for a, b in pairs]
    one = [a for a, _ in pairs]
    share = {pair: pairs.count(pair) / len(pairs) for pair in set(pairs)}
    return sum(p * np.log(p / (one.count(a) * one.count(b) / len(one) ** 2)) for (a, b), p in share.items())


def slow_labels(features: torch.Tensor, probabilities: torch.Tensor, k: int, config: AgreedConfig) -> list[int]:
    """The description of the module, sample by sample in Python."""
    n, classes = probabilities.shape
    clusters = one_vs_all_labels(features, probabilities, k, config.clusters)
    p = probabilities.double().numpy()
    entropy = [-sum(x * np.log(x + 1e-5) for x in row) / np.log(classes) for row in p]
    cosine = (F.normalize(features) @ F.normalize(features).T).numpy()
    neighbors = [sorted((j for j in range(n) if j != i), key=lambda j: -cosine[i, j])[:10] for i in range(n)]
    alone = [classes if e > config.entropy else int(row.argmax()) for e, row in zip(entropy, p)]
    certain = [
        information(labels, neighbors) * np.cbrt(information([int(label == classes) for label in labels], neighbors))
        for labels in (clusters.hard.tolist(), alone)
    ]

    def places(scores: list[float]) -> list[float]:
        place = [0.0] * n
        for position, i in enumerate(sorted(range(n), key=lambda i: scores[i])):
            place[i] = position / n
        return place

    order, share = [0.0] * n, 0.0
    for weight, scores, labels in zip(
        (certain[0] / sum(certain), certain[1] / sum(certain)),
        ((-clusters.margin).tolist(), entropy),
        (clusters.hard.tolist(), alone),
    ):
        raw = places(scores)
        smooth = places([np.mean([raw[i], *(raw[j] for j in neighbors[i][: config.neighbors])]) for i in range(n)])
        order = [a + weight * b for a, b in zip(order, smooth)]
        share += weight * labels.count(classes) / n
    votes = [[int(clusters.nearest[j]) for j in (i, *neighbors[i])] for i in range(n)]
    winners = [min(range(classes), key=lambda c: (-vote.count(c), c)) for vote in votes]
    unit, cosines = F.normalize(features), []
    for c in range(classes):
        positives = sorted(range(n), key=lambda i: -p[i, c])[: n // k]
        frequency = winners.count(c) * classes / n
        penalty = config.rarity * max(0.0, -np.log(frequency + 0.01))
        cosines.append(unit @ F.normalize(unit[positives].mean(0), dim=0) - penalty)
    nearest = torch.stack(cosines).argmax(0).tolist()
    return [classes if place > 1 - share else nearest[i] for i, place in enumerate(places(order))]


@pytest.mark.parametrize("config", [AgreedConfig(), AgreedConfig(neighbors=0, rarity=0.0)])
def test_labels_equal_the_slow_reference(config):
    features, probabilities, _ = target()
    found = agreed_labels(features, probabilities, 4, config).hard
    slow = torch.tensor(slow_labels(features, probabilities, 4, config))
    assert (found != slow).sum() <= 2  # float32 sums of equal places may order two neighbors differently
    assert 0 < (found == 4).sum() < len(found)


def test_they_are_better_than_clusters_and_classifier_alone_where_classes_overlap():
    def right(hard: torch.Tensor) -> float:
        return float((hard.numpy() == truth).mean())

    features, probabilities, truth = target(600, seed=2, distance=1.3)
    config = AgreedConfig()
    agreed = right(agreed_labels(features, probabilities, 4, config).hard)
    assert agreed > right(one_vs_all_labels(features, probabilities, 4, config.clusters).hard)
    assert agreed > right(unadapted_labels(probabilities).hard)


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_a_classifier_that_calls_nothing_or_everything_unknown_has_no_say(temperature):
    features, probabilities, _ = target(400)
    probabilities = (probabilities.log() / temperature).softmax(1)
    config = AgreedConfig(rarity=0.0)
    clusters = one_vs_all_labels(features, probabilities, 4, config.clusters).hard
    found = agreed_labels(features, probabilities, 4, config).hard
    assert len(set((unadapted_labels(probabilities).hard == 4).tolist())) == 1
    assert abs(int((found == 4).sum()) - int((clusters == 4).sum())) <= 1


def test_classes_that_the_target_lacks_take_fewer_samples():
    def right(rarity: float) -> float:
        return float((agreed_labels(features, probabilities, 8, AgreedConfig(rarity=rarity)).nearest.numpy() == truth).mean())

    features, probabilities, truth = target(1600, 8, 0, seed=1, distance=1.2)
    present = torch.from_numpy(truth < 3)
    features, probabilities, truth = features[present], probabilities[present], truth[present.numpy()]
    assert right(AgreedConfig().rarity) > right(0.0) + 0.05


@pytest.mark.parametrize(("n", "classes"), [(2, 2), (3, 5), (12, 3)])
def test_the_smallest_targets_get_labels(n, classes):
    features, probabilities, _ = target(n, classes, 1)
    found = agreed_labels(features, probabilities, classes, AgreedConfig())
    assert found.margin.isfinite().all()
    assert found.hard.shape == (n,)
    with pytest.raises(InvalidInput, match="at least 2 target samples"):
        agreed_labels(features[:0], probabilities[:0], classes, AgreedConfig())


def test_neighbors_are_the_most_similar_other_rows_also_among_a_part_of_them():
    features, _, _ = target(50)
    cosine = (F.normalize(features) @ F.normalize(features).T).fill_diagonal_(-2)
    assert torch.equal(neighbors_of(features, 3, most_rows=100), cosine.topk(3, dim=1).indices)
    some = neighbors_of(features, 3, most_rows=10)
    assert set(some.flatten().tolist()) <= set(range(0, 50, 5))
    assert (some != torch.arange(50)[:, None]).all()
    assert neighbors_of(features[:0], 3, most_rows=10).shape == (0, 0)
    assert neighbors_of(features[:1], 3, most_rows=10).shape == (1, 0)


def test_agreement_is_the_information_that_neighbors_share_and_about_zero_for_random_labels():
    features, _, _ = target(400)
    neighbors = neighbors_of(features, 10, most_rows=1000)
    assert neighbor_agreement(torch.tensor([0, 0, 1, 1]), torch.tensor([[1], [0], [3], [2]])) == pytest.approx(np.log(2))
    random = torch.randint(0, 3, (400,), generator=torch.Generator().manual_seed(0))
    assert abs(neighbor_agreement(random, neighbors)) < 0.05
    assert neighbor_agreement(random, neighbors) == pytest.approx(information(random.tolist(), neighbors.tolist()))
    assert neighbor_agreement(torch.zeros(400, dtype=torch.int64), neighbors) == 0


def test_the_guard_falls_back_where_adaptation_is_less_certain_and_says_so():
    features, _, truth = target(400)
    random = torch.randint(0, 5, (400,), generator=torch.Generator().manual_seed(0))
    worse = compare_certainty(guard_neighbors(features), random, torch.from_numpy(truth), unknown=4, acts=True)
    assert worse.fell_back
    assert "the labels are those of the unadapted model" in worse.sentence()
    assert not replace(worse, acts=False).fell_back
    assert "were kept because the guard is off" in replace(worse, acts=False).sentence()
    better = compare_certainty(guard_neighbors(features), torch.from_numpy(truth), random, unknown=4, acts=True)
    assert not better.fell_back
    assert better.sentence().startswith("Adaptation is at least as certain")


def test_adaptation_that_rightly_calls_nothing_unknown_is_not_doubted_for_it():
    features, _, truth = target(400, private=0)
    right = torch.from_numpy(truth)
    some = torch.where(features[:, 0] > 1, 4, right)
    neighbors = neighbors_of(features, 10, most_rows=1000)
    assert certainty(right, 4, neighbors) == 0 < certainty(some, 4, neighbors)
    assert not compare_certainty(guard_neighbors(features), right, some, unknown=4, acts=True).doubts
    assert compare_certainty(guard_neighbors(features), torch.zeros_like(right), some, unknown=4, acts=True).doubts


def test_the_labels_of_no_adaptation_are_returned_where_the_guard_falls_back(monkeypatch):
    features, probabilities, _ = target()
    doubtful = Guard(adapted=0.1, unadapted=0.2, acts=True)
    monkeypatch.setattr(
        "upcycle3d.perception.adapt.glc.feature_labels.compare_certainty", lambda *_, unknown, acts: replace(doubtful, acts=acts)
    )
    given = TargetFeatures(features=features, probabilities=probabilities)
    assert torch.equal(label_features(given).labels.hard, unadapted_labels(probabilities).hard)
    kept = label_features(given, replace(FeatureLabelConfig(), fall_back=False))
    assert not torch.equal(kept.labels.hard, unadapted_labels(probabilities).hard)


def test_no_adaptation_is_the_papers_threshold_on_the_entropy():
    certain, undecided = torch.tensor([[0.98, 0.01, 0.01]]), torch.full((1, 3), 1 / 3)
    assert unadapted_labels(torch.cat([certain, undecided])).hard.tolist() == [0, 3]


def test_settings_out_of_range_are_refused():
    for change in (
        {"entropy": 1.5},
        {"rarity": -1.0},
        {"neighbors": -1},
        {"most_rows": 5},
        {"rarity": float("nan")},
        {"rarity": float("inf")},
    ):
        with pytest.raises(InvalidInput, match="agreed labels need"):
            AgreedConfig(**change)


def test_the_most_certain_threshold_is_the_best_of_a_list_tried_one_by_one():
    features, probabilities, truth = target(400)
    neighbors = neighbors_of(features, 10, most_rows=1000)
    labels = unadapted_labels(probabilities)
    scores = normalized_entropy(probabilities)
    found = most_certain_threshold(scores, labels.nearest, 4, neighbors)
    tried = {step / 50: certainty(torch.where(scores > step / 50, 4, labels.nearest), 4, neighbors) for step in range(1, 50)}
    assert tried[found] == max(tried.values()) > 0
    # A classifier that is certain of everything is no reason to call nothing unknown.
    sharp = (probabilities.log() * 8).softmax(1)
    threshold = most_certain_threshold(normalized_entropy(sharp), labels.nearest, 4, neighbors)
    assert threshold < 0.2
    assert ((normalized_entropy(sharp) > threshold).numpy() == (truth == 4)).mean() > 0.6
