"""From proposals and labels to new labels: matching by hand, class maps, the classifier, adaptation, metrics, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Labels
from upcycle3d.perception.adapt.detection.adaptation import DetectorAdaptConfig, adapt_proposals
from upcycle3d.perception.adapt.detection.class_map import ClassMap, map_by_name, pair_map
from upcycle3d.perception.adapt.detection.classifier_file import cached_classifier, load_classifier, save_classifier
from upcycle3d.perception.adapt.detection.classifier_training import train_proposal_classifier
from upcycle3d.perception.adapt.detection.detections_file import write_detections
from upcycle3d.perception.adapt.detection.open_set import (
    ClassifiedProposals,
    OpenSetConfig,
    baselines,
    classify_open_set,
    classify_without_adaptation,
    known_detections,
    unknown_scores,
)
from upcycle3d.perception.adapt.detection.proposal_classifier import ClassifierConfig, WeightNormLinear
from upcycle3d.perception.adapt.detection.proposal_matching import BACKGROUND, IGNORED, Matches, MatchRules, match_proposals
from upcycle3d.perception.adapt.detection.proposal_metrics import known_ap, proposal_report
from upcycle3d.perception.adapt.detection.proposals import DetectorProposals, ProposalSelection
from upcycle3d.perception.adapt.glc.adapter import AdaptConfig
from upcycle3d.perception.adapt.glc.unknown_rule import UnknownRule

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("Car", "Pedestrian", "Cyclist")
TARGET = (*NAMES, "Truck", "Animal", "Odd")
# Trucks are proposed as cars and animals as people: a detector knows no other sizes.
SIZES = torch.tensor([[4.0, 1.8, 1.6], [0.8, 0.6, 1.7], [1.8, 0.6, 1.7], [4.2, 1.9, 1.7], [0.9, 0.6, 1.6], [4.0, 1.8, 1.6]])
SHARES = (0.25, 0.12, 0.08, 0.1, 0.1, 0.35)  # of cars, .., animals, and of proposals on nothing
MEANS = torch.from_numpy(np.random.default_rng(5).normal(size=(6, 24))).float() * 1.3


def scenes(n: int, *, open_set: bool, shift: float, seed: int, frames: int = 40) -> tuple[DetectorProposals, list[Labels]]:
    """Proposals whose region features cluster by class, and the labels they lie on; the last kind lies on nothing."""
    rng = np.random.default_rng(seed)
    shares = np.array(SHARES) * ([1, 1, 1, 1, 1, 1] if open_set else [1, 1, 1, 0, 0, 1])
    kind = torch.from_numpy(rng.choice(6, n, p=shares / shares.sum()))
    features = MEANS[kind] + torch.from_numpy(rng.normal(size=(n, 24))).float() + shift * MEANS.mean(0)
    frame = torch.arange(n) % frames
    order = frame.argsort(stable=True)
    kind, features, frame = kind[order], features[order], frame[order]
    place = torch.stack([5 + 10 * (torch.arange(n) % 5), 12 * (torch.arange(n) // 5 % 5) - 24, torch.zeros(n)], 1).float()
    boxes = torch.cat([place, SIZES[kind], torch.zeros(n, 1)], 1)
    labels = []
    for f in range(frames):
        rows = ((frame == f) & (kind < 5)).nonzero()[:, 0]
        labels.append(Labels.make(boxes[rows], kind[rows]))
    proposals = DetectorProposals(
        features=features,
        logits=torch.from_numpy(rng.normal(size=n)).float(),
        boxes=boxes,
        classes=kind % 3,
        scores=torch.from_numpy(rng.uniform(0.1, 1, n)).float(),
        frame=frame,
        points=torch.from_numpy(rng.integers(0, 90, n)),
        frame_ids=tuple(f"{f:06d}" for f in range(frames)),
        class_names=NAMES,
        detector="d" * 64,
        data=f"scenes {seed}",
        selection=ProposalSelection(),
    )
    return proposals, labels


def matched(proposals: DetectorProposals, labels: list[Labels]) -> Matches:
    return match_proposals(proposals, labels, TARGET, map_by_name(NAMES, TARGET))


SOURCE, SOURCE_LABELS = scenes(900, open_set=False, shift=0.0, seed=0)
OPEN, OPEN_LABELS = scenes(1000, open_set=True, shift=0.3, seed=1)
QUICK = ClassifierConfig(width=16, epochs=8)


@pytest.fixture(scope="module")
def classifier():
    return train_proposal_classifier(SOURCE, matched(SOURCE, SOURCE_LABELS).ids, QUICK)


# ---- matching


def one_frame(*boxes: list[float]) -> DetectorProposals:
    data, n = torch.tensor(boxes).view(-1, 7), len(boxes)
    return replace(
        SOURCE, features=torch.zeros(n, 4), logits=torch.zeros(n), boxes=data, classes=torch.zeros(n, dtype=torch.int64),
        scores=torch.ones(n), frame=torch.zeros(n, dtype=torch.int64), points=None, frame_ids=("a",),
    )  # fmt: skip


def test_matches_by_hand():
    car, person, truck, ignored = (
        [10.0, 0, 0, 4, 2, 1.6, 0],
        [20.0, 5, 0, 0.8, 0.8, 1.7, 0],
        [30.0, 0, 0, 12, 2.5, 3, 0],
        [10.0, 9, 0, 4, 2, 1.6, 0],
    )
    labels = Labels.make(
        torch.tensor([car, person, truck, ignored]), torch.tensor([0, 1, 3, 0]), weight=torch.tensor([1.0, 1, 1, 0])
    )
    cases = [
        ([10.5, 0.0, 0, 4, 2, 1.6, 0], 0, 0),  # IoU 0.78
        ([11.5, 0.0, 0, 4, 2, 1.6, 0], IGNORED, -1),  # IoU 0.45: neither
        ([13.4, 0.0, 0, 4, 2, 1.6, 0], BACKGROUND, -1),  # IoU 0.08, 3.4 m away
        ([20.4, 5.0, 0, 0.8, 0.8, 1.7, 0], 1, 1),  # half a metre between centres
        ([20.9, 5.0, 0, 0.8, 0.8, 1.7, 0], IGNORED, -1),  # touches nothing, but within a metre
        ([27.0, 0.0, 0, 4, 2, 1.6, 0], 3, 2),  # wholly on the truck, IoU 0.27
        ([36.8, 0.0, 0, 4, 2, 1.6, 0], IGNORED, -1),  # a third of it on the truck
        ([10.0, 9.0, 0, 4, 2, 1.6, 0], IGNORED, 3),  # on an object that is ignored
        ([50.0, 0.0, 0, 4, 2, 1.6, 0], BACKGROUND, -1),
    ]
    found = matched(one_frame(*(c[0] for c in cases)), [labels])
    assert found.ids.tolist() == [c[1] for c in cases]
    assert found.objects.tolist() == [c[2] for c in cases]
    assert found.label_ids.tolist() == [0, 1, 3, IGNORED]
    assert found.private_names(3) == ("Truck",)


def test_frames_without_objects_or_proposals_are_fine_and_unlabeled_ones_are_named():
    empty = Labels.empty()
    assert matched(one_frame([5.0, 0, 0, 4, 2, 1.6, 0]), [empty]).ids.tolist() == [BACKGROUND]
    assert matched(one_frame(), [OPEN_LABELS[0]]).ids.tolist() == []
    with pytest.raises(InvalidInput, match="frame a has no labels"):
        match_proposals(one_frame(), [None], TARGET, map_by_name(NAMES, TARGET))
    with pytest.raises(InvalidInput, match="as many labels"):
        matched(one_frame(), [])
    with pytest.raises(InvalidInput, match="says nothing about"):
        match_proposals(one_frame(), [empty], TARGET, ClassMap(source=NAMES, meaning={"Car": "Car"}))
    with pytest.raises(InvalidInput, match="background_overlap"):
        MatchRules(min_overlap=0.1)


def test_objects_longer_than_their_class_may_be_are_ignored():
    m = pair_map("kitti", "waymo", NAMES)
    long, short = Labels.make(torch.tensor([[10.0, 0, 0, 7, 2, 1.6, 0]]), torch.tensor([0])), [10.0, 0, 0, 5, 2, 1.6, 0]
    assert match_proposals(one_frame(short), [long], ("Vehicle",), m).label_ids.tolist() == [IGNORED]


# ---- the classifier


def test_the_classifier_learns_every_class_and_repeats(classifier, tmp_path: Path):
    ids = matched(SOURCE, SOURCE_LABELS).ids
    classified = classify_without_adaptation(
        classifier, SOURCE, OpenSetConfig.classifier_alone("known", UnknownRule(kind="fixed", value=1.0))
    )
    for c in range(3):
        assert (classified.nearest[ids == c] == c).float().mean() > 0.8, NAMES[c]
    assert (classified.probabilities.argmax(1) == 3)[ids == BACKGROUND].float().mean() > 0.6
    state = torch.get_rng_state()
    again = train_proposal_classifier(SOURCE, ids, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    save_classifier(tmp_path / "c.safetensors", again)
    loaded = load_classifier(tmp_path / "c.safetensors")
    for other in (again, loaded):
        same = classify_without_adaptation(other, SOURCE, OpenSetConfig())
        assert torch.equal(same.probabilities, classified.probabilities)
    assert (loaded.classes, loaded.config, loaded.counts) == (classifier.classes, QUICK, classifier.counts)
    other_seed = train_proposal_classifier(SOURCE, ids, replace(QUICK, seed=1))
    assert not torch.equal(other_seed.bottleneck[1].weight, again.bottleneck[1].weight)


def test_the_effective_weight_is_what_the_head_computes():
    torch.manual_seed(0)
    head, x = WeightNormLinear(5, 3), torch.randn(4, 5)
    torch.testing.assert_close(head(x), x @ head.weight.T + head.bias)
    torch.testing.assert_close(head.weight.norm(dim=1, keepdim=True), head.length)


def test_what_the_classifier_cannot_learn_or_read_is_named(classifier, tmp_path: Path):
    ids = matched(SOURCE, SOURCE_LABELS).ids
    with pytest.raises(InvalidInput, match="no source proposal of scenes 0 is Cyclist"):
        train_proposal_classifier(SOURCE, torch.where(ids == 2, IGNORED, ids), QUICK)
    with pytest.raises(InvalidInput, match="is background"):
        train_proposal_classifier(SOURCE, torch.where(ids == BACKGROUND, IGNORED, ids), QUICK)
    with pytest.raises(InvalidInput, match="found id 3"):
        train_proposal_classifier(OPEN, matched(OPEN, OPEN_LABELS).ids, QUICK)
    with pytest.raises(InvalidInput, match="smashed scenes hold no"):
        classifier.inputs(replace(OPEN, points=None))
    blind = train_proposal_classifier(SOURCE, ids, replace(QUICK, points=False))
    assert len(blind.inputs(replace(OPEN, points=None))) == len(OPEN)
    with pytest.raises(InvalidInput, match="same detector"):
        classifier.inputs(replace(OPEN, detector="e" * 64))
    for bad in ({"width": 1}, {"smoothing": 1.0}, {"balance": 2.0}, {"lr": float("nan")}):
        with pytest.raises(InvalidInput, match="needs"):
            ClassifierConfig(**bad)
    path = tmp_path / "c.safetensors"
    first = cached_classifier(path, SOURCE, lambda: matched(SOURCE, SOURCE_LABELS), QUICK)
    assert cached_classifier(path, SOURCE, lambda: pytest.fail("trained twice"), QUICK).counts == first.counts
    with pytest.raises(InvalidInput, match="other options"):
        cached_classifier(path, SOURCE, lambda: pytest.fail("trained"), ClassifierConfig())
    with pytest.raises(InvalidInput, match="other source"):
        cached_classifier(path, replace(SOURCE, data="other"), lambda: pytest.fail("trained"), QUICK)


# ---- scores and adaptation


def test_background_does_not_swallow_the_unknown():
    sure_car, blurred_car, car_or_cyclist, nothing = (
        [0.9, 0.03, 0.03, 0.04],
        [0.48, 0.01, 0.01, 0.5],
        [0.05, 0.0, 0.05, 0.9],
        [1e-12, 1e-12, 1e-12, 1.0],
    )
    p = torch.tensor([sure_car, blurred_car, car_or_cyclist, nothing])
    objects, everything = unknown_scores(p), unknown_scores(p, "all")
    assert (
        objects[1] < 0.25 < 0.5 < objects[2]
    )  # a blurred car is a car; what is a car or a cyclist is unknown, though background
    assert everything[2] < everything[1]  # the other way round
    assert objects.isfinite().all()
    with pytest.raises(InvalidInput, match="two known classes"):
        unknown_scores(torch.tensor([[0.4, 0.6]]))
    with pytest.raises(InvalidInput, match="background last"):
        classify_open_set(p, torch.zeros(4, 2), few(5))
    with pytest.raises(InvalidInput, match="background last"):
        classify_open_set(p[:, :3], torch.zeros(4, 2), few(4))


def test_the_detector_has_a_say_in_score_and_class():
    p = torch.tensor([[0.3, 0.3, 0.3, 0.1], [0.3, 0.3, 0.3, 0.1], [0.5, 0.1, 0.3, 0.1], [0.9, 0.01, 0.01, 0.08]])
    asked = replace(few(4), scores=torch.tensor([0.9, 0.1, 0.1, 0.1]), classes=torch.tensor([1, 1, 2, 2]))
    alone = classify_open_set(
        p, torch.zeros(4, 2), asked, OpenSetConfig.classifier_alone("known", UnknownRule(kind="fixed", value=0.5))
    )
    assert alone.nearest.tolist() == [0, 0, 0, 0]
    assert alone.unknown.tolist() == [True, True, True, False]
    both = classify_open_set(p, torch.zeros(4, 2), asked, OpenSetConfig(unknown=UnknownRule(kind="fixed", value=0.5)))
    assert both.nearest.tolist() == [1, 1, 2, 0]  # unless the classifier is sure of another class
    assert both.unknown.tolist() == [False, True, True, False]  # a box that the detector is sure of is no unknown
    torch.testing.assert_close(both.unknown_scores, alone.unknown_scores * torch.tensor([0.1, 0.9, 0.9, 0.9]) ** 2)
    detector = classify_open_set(p, torch.zeros(4, 2), asked, baselines(OpenSetConfig())["detector's score alone"])
    torch.testing.assert_close(detector.unknown_scores, torch.tensor([0.01, 0.81, 0.81, 0.81]))
    for bad in ({"score_exponent": -1.0}, {"class_bonus": float("nan")}, {"entropy_over": "none", "score_exponent": 0.0}):
        with pytest.raises(InvalidInput):
            OpenSetConfig(**bad)


def test_adaptation_finds_the_unknown_repeats_and_leaves_the_classifier_alone(classifier):
    alone = OpenSetConfig.classifier_alone("known", UnknownRule())  # these simulated detector scores say nothing
    config = DetectorAdaptConfig(glc=replace(DetectorAdaptConfig().glc, epochs=4), open_set=alone)
    before = classifier.bottleneck[1].weight.clone()
    adapted = adapt_proposals(classifier, OPEN, config)
    assert torch.equal(classifier.bottleneck[1].weight, before)
    assert torch.equal(adapt_proposals(classifier, OPEN, config).classified.probabilities, adapted.classified.probabilities)
    matches = matched(OPEN, OPEN_LABELS)
    result = proposal_report(OPEN, adapted.classified, matches, OPEN_LABELS, map_by_name(NAMES, TARGET))
    assert result.matched.h is not None
    assert result.matched.h > 0.6
    assert result.matched.auroc is not None
    assert result.matched.auroc > 0.75
    assert set(result.private) == {"Truck", "Animal"}
    assert all(p.proposed == p.objects for p in result.private.values())
    assert set(result.ranges) == {"0-20 m", "20-35 m", "35+ m"}
    assert sum(r.known + r.unknown for r in result.ranges.values()) == result.matched.known + result.matched.unknown
    json.dumps(result.known_ap)
    with pytest.raises(InvalidInput, match="neighbors"):
        adapt_proposals(classifier, few(3), config)
    with pytest.raises(InvalidInput, match="same detector"):
        adapt_proposals(classifier, replace(OPEN, detector="e" * 64), config)


def few(n: int) -> DetectorProposals:
    names = ("features", "logits", "boxes", "classes", "scores", "frame", "points")
    return replace(OPEN, **{name: getattr(OPEN, name)[:n] for name in names})


def test_a_closed_target_has_no_h_and_all_the_rest(classifier):
    classified = classify_without_adaptation(classifier, SOURCE, OpenSetConfig.classifier_alone("known", UnknownRule()))
    result = proposal_report(SOURCE, classified, matched(SOURCE, SOURCE_LABELS), SOURCE_LABELS, map_by_name(NAMES, TARGET))
    assert (result.matched.h, result.matched.auroc, result.private, result.novel_category_accuracy) == (None, None, {}, None)
    assert result.matched.closed_accuracy > 0.8
    nothing = replace(matched(SOURCE, SOURCE_LABELS), ids=torch.full((len(SOURCE),), BACKGROUND))
    with pytest.raises(InvalidInput, match="no proposal of scenes 0 lies on"):
        proposal_report(SOURCE, classified, nothing, SOURCE_LABELS, map_by_name(NAMES, TARGET))


def perfect() -> ClassifiedProposals:
    """Judged by the labels, to test what measures."""
    ids = matched(OPEN, OPEN_LABELS).ids
    nearest = torch.where((ids >= 0) & (ids < 3), ids, 0)
    return ClassifiedProposals(
        probabilities=torch.full((len(OPEN), 4), 0.25),
        features=MEANS[torch.where(ids < 0, 5, ids)] + 0.01 * OPEN.features,
        unknown_scores=(ids == 3).float(),
        nearest=nearest,
        unknown=ids == 3,
        threshold=0.5,
        classes=NAMES,
    )


def test_perfect_labels_measure_as_perfect_and_raise_known_ap():
    matches, names = matched(OPEN, OPEN_LABELS), map_by_name(NAMES, TARGET)
    result = proposal_report(OPEN, perfect(), matches, OPEN_LABELS, names)
    m = result.matched
    assert (m.os_star, m.unk, m.auroc, m.fpr95, m.closed_accuracy, m.accuracy) == (1, 1, 1, 0, 1, 1)
    assert result.called_unknown.known == result.called_unknown.background == 0
    assert result.called_unknown.private == m.unknown
    wrong = known_ap(OPEN, None, OPEN_LABELS, TARGET, names)  # the detector calls a truck a car, an animal a pedestrian
    assert result.known_ap["Pedestrian 3D 0.5"] > wrong["Pedestrian 3D 0.5"] + 10
    assert wrong.keys() == result.known_ap.keys()


def test_written_detections_keep_boxes_and_scores_and_say_what_is_unknown(tmp_path: Path):
    classified = perfect()
    write_detections(tmp_path, OPEN, classified, rig=RigSpec(z_shift=1.5))
    files = sorted(tmp_path.glob("*.json"))
    assert [f.stem for f in files] == list(OPEN.frame_ids)
    records = [r for f in files for r in json.loads(f.read_text())]
    assert len(records) == len(OPEN)
    for row, record in enumerate(records):
        assert record["unknown"] == bool(classified.unknown[row])
        assert record["class"] == ("unknown" if record["unknown"] else NAMES[classified.nearest[row]])
        assert record["score"] == pytest.approx(float(OPEN.scores[row]), abs=1e-4)
        assert record["x"] == pytest.approx(float(OPEN.boxes[row, 0]), abs=1e-3)
        assert record["z"] == pytest.approx(float(OPEN.boxes[row, 2]) - 1.5, abs=1e-3)
        assert 0 <= record["unknown_score"] <= 1
        assert set(record["probabilities"]) == {*NAMES, "background"}
    kept = known_detections(OPEN, classified, 0)
    assert len(kept) == int((~classified.unknown[OPEN.frame == 0]).sum())
    with pytest.raises(InvalidInput, match="do not belong together"):
        write_detections(tmp_path, few(3), classified, rig=RigSpec())


def test_paper_options_run_too(classifier):
    config = DetectorAdaptConfig(
        glc=replace(AdaptConfig.paper(), epochs=1), open_set=OpenSetConfig.classifier_alone("all", UnknownRule())
    )
    assert len(adapt_proposals(classifier, few(120), config).classified) == 120
