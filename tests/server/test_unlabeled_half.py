"""The unlabeled half of a batch, without a training: what the labels of two scenes are, and what pasting and mixing change."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Boxes3D, Labels, Predictions
from upcycle3d.datasets.augment import AugmentationRanges
from upcycle3d.datasets.batches import UnlabeledBatches
from upcycle3d.perception.server import unlabeled_half as module
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.server.pseudo_labels import hybrid_labels
from upcycle3d.perception.server.store import collate_scenes
from upcycle3d.perception.server.unlabeled_half import UnlabeledHalf, raw_half, smashed_half

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher():
    return tiny.source_model().eval()


@pytest.fixture(scope="module")
def scenes(store):
    return collate_scenes([store[0], store[1]])


def half(scenes, teacher, method="hybrid", pasted_objects=None, *, seed=0, **settings) -> UnlabeledHalf:
    """Labels of two scenes. `method` is a name of METHODS or a Method."""
    method = METHODS[method] if isinstance(method, str) else method
    config, rng = tiny.upcycle_config(**settings), np.random.default_rng(seed)
    return smashed_half(scenes, teacher, method=method, config=config, pasted_objects=pasted_objects, rng=rng)


def detections(teacher, scenes) -> list[Predictions]:
    with torch.no_grad():
        return teacher.predict(teacher.decode(scenes))


# ---- smashed scenes


def test_hybrid_labels_of_two_scenes(scenes, teacher):
    found = half(scenes, teacher, teacher_box_weight=0.5)
    assert found.pasted == 0
    assert found.features.batch_size == len(found.labels) == 2
    assert torch.equal(found.features.voxels.dense(), scenes.voxels.dense())
    for labels, prediction in zip(found.labels, detections(teacher, scenes), strict=True):
        assert torch.equal(labels.boxes.data, prediction.boxes.data)  # every box is a label with these thresholds
        assert labels.weight.tolist() == [1] * len(prediction)
        assert labels.box_weight.tolist() == [0.5] * len(prediction)
        assert not labels.exact.any()
        assert not labels.complete
    assert found.labels == found.found


def test_trusted_labels_count_as_the_truth(scenes, teacher):
    found = half(scenes, teacher, "pseudo_label", teacher_box_weight=0.5)
    for labels in found.labels:
        assert labels.complete
        assert labels.exact.all()
        assert set(labels.box_weight.tolist()) == {1.0}


def test_pasted_objects_are_exact_labels_of_the_student_and_no_label_of_the_teacher(scenes, teacher, pasted_objects):
    found = half(scenes, teacher, "upcycling", pasted_objects, thresholds=tiny.NOTHING)
    assert found.pasted == sum(map(len, found.labels)) > 0
    for labels, teachers in zip(found.labels, found.found, strict=True):
        assert len(teachers) == 0
        assert labels.exact.all()
        assert not labels.complete  # what nobody labeled is still no background
        assert all(any(torch.equal(b, pasted_objects.boxes[i]) for i in range(len(pasted_objects))) for b in labels.boxes.data)
    assert not torch.equal(found.features.voxels.dense(), scenes.voxels.dense())


def test_pasted_objects_keep_clear_of_what_the_teacher_half_believes(scenes, teacher, pasted_objects, monkeypatch):
    """Boxes far too weak to be labels are obstacles: there may be an object."""
    seen: list[tuple[int, int]] = []
    real = module.sample_objects

    def spy(database, labels, obstacles, *rest):
        seen.append((len(labels), len(obstacles)))
        return real(database, labels, obstacles, *rest)

    monkeypatch.setattr(module, "sample_objects", spy)
    for score in (0.0, 1.0):
        half(scenes, teacher, "upcycling", pasted_objects, thresholds=tiny.NOTHING, obstacle_score=score)
    boxes = [len(p) for p in detections(teacher, scenes)]
    assert min(boxes) > 0
    assert seen == [(0, boxes[0]), (0, boxes[1]), (0, 0), (0, 0)]


def test_turned_objects_lie_on_the_cut_ones_up_to_the_largest_angle(scenes, teacher, pasted_objects):
    plain, turned = (half(scenes, teacher, m, pasted_objects, thresholds=tiny.NOTHING) for m in ("upcycling", "f_rot"))
    first, other = plain.labels[0].boxes.data, turned.labels[0].boxes.data
    assert torch.equal(first[:, :6], other[:, :6])
    angle = (other[:, 6] - first[:, 6] + torch.pi).remainder(2 * torch.pi) - torch.pi
    assert 0 < angle.abs().max() <= METHODS["f_rot"].max_paste_rotation + 1e-6


def test_augmentation_changes_features_and_labels_of_each_scene(scenes, teacher):
    def shifted(scene, labels, rng):
        boxes = labels.boxes.data + labels.boxes.data.new_tensor([rng.integers(1, 9), 0, 0, 0, 0, 0, 0])
        voxels = replace(scene.voxels, features=scene.voxels.features + 1)
        return replace(scene, voxels=voxels), replace(labels, boxes=Boxes3D(data=boxes))

    plain, changed = half(scenes, teacher), half(scenes, teacher, replace(METHODS["hybrid"], augmentation=shifted))
    assert torch.equal(changed.features.voxels.features, plain.features.voxels.features + 1)
    shifts = [round(float(b.boxes.data[0, 0] - a.boxes.data[0, 0])) for a, b in zip(plain.labels, changed.labels, strict=True)]
    rng = np.random.default_rng(0)
    assert shifts == [rng.integers(1, 9), rng.integers(1, 9)]  # one generator, scene by scene
    assert all(torch.equal(a.boxes.data, b.boxes.data) for a, b in zip(plain.found, changed.found, strict=True))


def test_mixing_gives_every_scene_a_partner(scenes, teacher):
    pairs = []

    def noted(a, labels_a, b, labels_b, rng):
        pairs.append((len(a.voxels.coords), len(b.voxels.coords)))
        return a, labels_a

    mixed = half(scenes, teacher, replace(METHODS["hybrid"], mixing=noted))
    sizes = [len(scenes.scene(i).voxels.coords) for i in range(2)]
    partners = np.random.default_rng(0).permutation(2)
    assert pairs == [(sizes[i], sizes[j]) for i, j in enumerate(partners)]
    assert mixed.features.batch_size == 2


def test_the_half_is_a_function_of_the_generator_and_leaves_the_scenes_alone(scenes, teacher, pasted_objects):
    before = scenes.voxels.dense().clone()
    a, b, c = (half(scenes, teacher, "upcycling", pasted_objects, seed=s, thresholds=tiny.NOTHING) for s in (1, 1, 2))
    assert torch.equal(a.features.voxels.features, b.features.voxels.features)
    assert a.pasted + c.pasted > 0
    assert [x.boxes.data.tolist() for x in a.labels] != [x.boxes.data.tolist() for x in c.labels]
    assert torch.equal(scenes.voxels.dense(), before)


# ---- own functions that return something wrong


def labels_with(**changed):
    """A label rule that changes columns of the hybrid labels; a value is put into row 1."""

    def rule(predictions, config):
        labels = hybrid_labels(predictions, config)
        columns = {name: getattr(labels, name).clone() for name in changed}
        for name, value in changed.items():
            columns[name][1] = value
        return replace(labels, **columns)

    return rule


def boxes_with(column, value):
    def rule(predictions, config):
        labels = hybrid_labels(predictions, config)
        boxes = labels.boxes.data.clone()
        boxes[1, column] = value
        return replace(labels, boxes=Boxes3D(data=boxes))

    return rule


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (labels_with(classes=7), r"labels_with.<locals>.rule returned a class outside 0 to 0 \(label 1 of"),
        (labels_with(classes=-1), "a class outside 0 to 0"),
        (labels_with(weight=float("nan")), "a weight that is negative or not finite"),
        (labels_with(weight=-1.0), "a weight that is negative or not finite"),
        (labels_with(box_weight=float("inf")), "a box_weight that is negative or not finite"),
        (boxes_with(3, -4.0), "a size that is zero or negative"),
        (boxes_with(0, float("nan")), "a value that is not finite"),
        (lambda predictions, config: None, "must return Labels, found a value of type NoneType"),
        (lambda predictions, config: predictions, "must return Labels, found a value of type Predictions"),
        (lambda predictions, config: [], "must return Labels, found a value of type list"),
        (
            lambda predictions, config: hybrid_labels(predictions, config).to("meta"),
            "must return labels on cpu.*found some on meta",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["smashed", "raw"])
def test_a_label_rule_that_returns_wrong_labels_is_named(scenes, teacher, kind, rule, message):
    def of_raw_scans(method):
        return raw_half(RAW(0), teacher, tiny.source_model().eval(), method=method, config=tiny.upcycle_config())

    call, name = (partial(half, scenes, teacher), "hybrid") if kind == "smashed" else (of_raw_scans, "iou_match")
    with pytest.raises(InvalidInput, match=f"the label rule .*{message}"):
        call(method=replace(METHODS[name], label_rule=rule))


def test_boxes_outside_the_grid_and_no_boxes_are_legal_labels(scenes, teacher):
    far = half(scenes, teacher, replace(METHODS["hybrid"], label_rule=boxes_with(0, 500.0)))
    assert all(labels.boxes.data[1, 0] == 500 for labels in far.labels)
    none = half(scenes, teacher, replace(METHODS["hybrid"], label_rule=lambda predictions, config: Labels.empty(complete=False)))
    assert all(len(labels) == 0 for labels in none.labels)


def test_odd_boxes_of_an_untrained_teacher_are_not_blamed_on_the_label_rule(scenes, teacher, monkeypatch):
    real = teacher.predict

    def infinite(decoded):
        found = real(decoded)
        for predictions in found:
            predictions.boxes.data[0, 3] = float("inf")
        return found

    monkeypatch.setattr(teacher, "predict", infinite)
    assert all(labels.boxes.data[0, 3].isinf() for labels in half(scenes, teacher).labels)


def scene_with(**changed):
    """An augmentation that replaces fields of the cells, each by a function of the cells."""

    def augmentation(scene, labels, rng):
        return replace(scene, voxels=replace(scene.voxels, **{n: f(scene.voxels) for n, f in changed.items()})), labels

    return augmentation


def moved_cells(*shift):
    return scene_with(coords=lambda voxels: voxels.coords + torch.tensor(shift, dtype=torch.int32))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (moved_cells(0, 0, -90, 0), r"a cell outside the grid: \(batch, z, y, x\) = \[0, \d+, -\d+"),
        (moved_cells(0, 0, 0, 90), "a cell outside the grid"),
        (moved_cells(1, 0, 0, 0), "a cell outside the grid"),
        (scene_with(coords=lambda voxels: voxels.coords[:1].repeat(len(voxels.coords), 1)), "the same cell more than once"),
        (scene_with(features=lambda voxels: voxels.features.double()), "of type torch.float64 on cpu instead of torch.float32"),
        (scene_with(features=lambda voxels: voxels.features * float("nan")), "that are not finite"),
        (scene_with(batch_size=lambda voxels: 2), "a batch of 2 scenes"),
        (lambda scene, labels, rng: scene, "must return a pair of CutFeatures and Labels, found CutFeatures"),
        (lambda scene, labels, rng: (labels, scene), r"must return a pair .*found \['Labels', 'CutFeatures'\]"),
        (lambda scene, labels, rng: None, "must return a pair .*found NoneType"),
        (lambda scene, labels, rng: (scene, None), "must return Labels, found a value of type NoneType"),
        (lambda scene, labels, rng: (scene, replace(labels, weight=-labels.weight)), "a weight that is negative"),
    ],
)
def test_an_augmentation_or_mixing_that_returns_something_wrong_is_named(scenes, teacher, function, message):
    with pytest.raises(InvalidInput, match=f"the augmentation .*{message}"):
        half(scenes, teacher, replace(METHODS["hybrid"], augmentation=function))
    with pytest.raises(InvalidInput, match=f"the mixing .*{message}"):
        half(scenes, teacher, replace(METHODS["hybrid"], mixing=lambda a, b, c, d, rng: function(a, b, rng)))


def test_an_augmentation_that_moves_cells_in_place_is_checked_too(scenes, teacher):
    def outside(scene, labels, rng):
        scene.voxels.coords[:, 3] += 90
        return scene, labels

    with pytest.raises(InvalidInput, match="a cell outside the grid"):
        half(scenes, teacher, replace(METHODS["hybrid"], augmentation=outside))


# ---- raw scans

RAW = UnlabeledBatches(
    frames=[tiny.frame_with_car(seed) for seed in (10, 11, 12)],
    batch_size=2,
    seed=0,
    augmentation=AugmentationRanges(flip_y=1.0),
)


def test_raw_scans_are_moved_for_the_student_and_the_boxes_move_along(teacher):
    """The teacher sees the scan as it came. Labels of the scans are not passed on."""
    scans, config, student = RAW(0), tiny.upcycle_config(), tiny.source_model().eval()
    assert all(scan.frame.labels is None for scan in scans)
    found = raw_half(scans, teacher, student, method=METHODS["iou_match"], config=config)
    with torch.no_grad():
        moved = student.encode([scan.moved().points for scan in scans])
        clean = teacher.encode([scan.frame.points for scan in scans])
    assert torch.equal(found.features.voxels.dense(), moved.voxels.dense())
    assert found.features.voxels.features.requires_grad  # the encoder is trained
    for scan, prediction, labels, teachers in zip(scans, detections(teacher, clean), found.labels, found.found, strict=True):
        expected = hybrid_labels(prediction, config)
        assert torch.equal(teachers.boxes.data, expected.boxes.data)
        boxes = scan.movement.boxes(expected.boxes.data)
        inside = (boxes[:, 0] >= 0) & (boxes[:, 0] < 12.8) & (boxes[:, 1].abs() < 6.4)
        assert inside.any()
        assert torch.equal(labels.boxes.data, boxes[inside])
