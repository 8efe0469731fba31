"""What anchors and regions are told to learn, on scenes small enough to work out by hand."""

import math

import pytest
import torch
from torch import Tensor

from upcycle3d.core.boxes import decode_residuals
from upcycle3d.core.cut import CutSpec, VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Labels
from upcycle3d.perception.models.anchors import ANCHOR_YAWS, AnchorClass, make_anchors
from upcycle3d.perception.models.targets import (
    RoiSampling,
    assign_anchors,
    direction_bin,
    iou_quality_target,
    match_rois,
    sample_rois,
)

CAR = AnchorClass(name="Car", size=(4.0, 2.0, 1.5), bottom_z=-0.75, matched=0.55, unmatched=0.40)
VAN = AnchorClass(name="Van", size=(4.0, 2.0, 1.5), bottom_z=-0.75, matched=0.55, unmatched=0.40)
# Two 4 x 2 boxes shifted along x by s overlap by (8 - 2 s) / (8 + 2 s):
SAME, NEAR, BETWEEN, FAR = 0.0, 1.0, 1.5, 2.0  # IoU 1, 0.6, 0.4545, 0.333


def box(x: float, yaw: float = 0.0, y: float = 0.0) -> list[float]:
    return [x, y, 0.0, 4.0, 2.0, 1.5, yaw]


def anchors_at(*xs: float, classes: int = 1) -> Tensor:
    """(1, W, 2 * classes, 7): at every x one anchor along x and one across it, for every class."""
    return torch.tensor([[[box(x, yaw) for _ in range(classes) for yaw in ANCHOR_YAWS] for x in xs]])


def labels_of(
    *boxes: list[float], classes: tuple[int, ...] | None = None, weight: tuple[float, ...] | None = None, **kw
) -> Labels:
    data = torch.tensor(boxes).view(-1, 7)
    given = torch.zeros(len(data), dtype=torch.int64) if classes is None else torch.tensor(classes)
    return Labels.make(data, given, weight=None if weight is None else torch.tensor(weight), **kw)


def along(values: Tensor) -> list:
    """Of the flat per-anchor values of a one-class row, those of the anchors along x."""
    return values.view(-1, 2)[:, 0].tolist()


# ---- anchors


def test_anchors_reach_from_one_end_of_the_range_to_the_other():
    grid = VoxelGrid(range=(0.0, -4.0, -1.0, 8.0, 4.0, 3.0), voxel_size=(0.5, 0.5, 0.5))
    spec = CutSpec(layer="cut", channels=1, stride=(2, 4, 4), shape=(4, 3, 5), grid=grid)
    anchors = make_anchors(spec, (CAR, AnchorClass(name="Ped", size=(0.8, 0.6, 1.7), bottom_z=0.1, matched=0.5, unmatched=0.35)))
    assert anchors.shape == (3, 5, 4, 7)
    assert anchors[0, :, 0, 0].tolist() == [0, 2, 4, 6, 8]
    assert anchors[:, 0, 0, 1].tolist() == [-4, 0, 4]
    assert torch.allclose(anchors[1, 2, :, 6], torch.tensor([0, 1.57, 0, 1.57]))
    assert torch.allclose(anchors[2, 1, 3, 2:6], torch.tensor([0.1 + 0.85, 0.8, 0.6, 1.7]))
    assert torch.allclose(anchors[2, 1, 0, 2:6], torch.tensor([0.0, 4, 2, 1.5]))


# ---- assignment


def test_positive_ignored_and_background_by_overlap():
    targets = assign_anchors(anchors_at(SAME, NEAR, BETWEEN, FAR, 20.0), (CAR,), labels_of(box(0.0)))
    assert along(targets.positive) == [True, True, False, False, False]
    assert along(targets.class_weight) == [1, 1, 0, 1, 1]
    assert not targets.positive.view(-1, 2)[:, 1].any()  # across the car: IoU 1/3 at best
    assert targets.class_weight.view(-1, 2)[:, 1].tolist() == [1] * 5


def test_an_object_that_no_anchor_fits_forces_its_best_one():
    targets = assign_anchors(anchors_at(FAR, 3.0, 20.0), (CAR,), labels_of(box(0.0)))
    assert along(targets.positive) == [True, False, False]
    assert targets.class_weight.tolist() == [1] * 6
    # With overlap 0 there is nothing to force.
    assert not assign_anchors(anchors_at(20.0), (CAR,), labels_of(box(0.0))).positive.any()


def test_equally_good_best_anchors_are_all_forced():
    targets = assign_anchors(anchors_at(-FAR, FAR), (CAR,), labels_of(box(0.0)))
    assert along(targets.positive) == [True, True]


def test_an_ignored_object_is_neither_object_nor_background():
    targets = assign_anchors(anchors_at(SAME, NEAR, BETWEEN, FAR, 20.0), (CAR,), labels_of(box(0.0), weight=(0.0,)))
    assert not targets.positive.any()
    assert along(targets.class_weight) == [0, 0, 0, 1, 1]
    # Its best anchor, which a learned object would force to be positive, is not background either.
    assert along(assign_anchors(anchors_at(FAR, 20.0), (CAR,), labels_of(box(0.0), weight=(0.0,))).class_weight) == [0, 1]


def test_an_ignored_object_leaves_a_distant_learned_one_alone():
    scene = labels_of(box(0.0), box(30.0), weight=(0.0, 1.0))
    targets = assign_anchors(anchors_at(SAME, 30.0), (CAR,), scene)
    assert along(targets.positive) == [False, True]
    assert along(targets.class_weight) == [0, 1]


def test_classes_do_not_see_each_other():
    targets = assign_anchors(anchors_at(SAME, BETWEEN, classes=2), (CAR, VAN), labels_of(box(0.0), classes=(1,)))
    positive, weight = targets.positive.view(2, 2, 2), targets.class_weight.view(2, 2, 2)  # place, class, yaw
    assert not positive[:, 0].any()
    assert weight[:, 0].tolist() == [[1, 1], [1, 1]]
    assert positive[:, 1, 0].tolist() == [True, False]
    assert weight[:, 1, 0].tolist() == [1, 0]


@pytest.mark.parametrize("class_number", [2, -1, -2])
def test_a_label_whose_class_has_no_anchor_is_refused(class_number):
    scene = labels_of(box(0.0), box(8.0), classes=(1, class_number))
    with pytest.raises(
        InvalidInput, match=rf"1 of 2 labels have a class outside 0\.\.1, .* \({CAR.name}, {VAN.name}\); train with"
    ):
        assign_anchors(anchors_at(0.0, 4.0, classes=2), (CAR, VAN), scene)


def test_without_labels_everything_is_background():
    targets = assign_anchors(anchors_at(0.0, 4.0), (CAR,), Labels.empty())
    assert not targets.positive.any()
    assert targets.class_weight.tolist() == [1] * 4
    assert targets.box_codes.shape == (4, 7)


def test_codes_lead_from_the_anchor_to_its_own_object():
    scene = labels_of(box(0.3, 0.1), box(10.2, 1.6, y=0.2), box(20.0, 0.0))
    anchors = anchors_at(0.0, 10.0, 15.0)
    targets = assign_anchors(anchors, (CAR,), scene)
    rows = targets.positive.nonzero().squeeze(1)
    assert rows.tolist() == [0, 3]  # along x, and across it
    decoded = decode_residuals(targets.box_codes[rows], anchors.view(-1, 7)[rows])
    assert torch.allclose(decoded, scene.boxes.data[:2], atol=1e-6)
    assert targets.direction[rows].tolist() == direction_bin(scene.boxes.data[:2, 6]).tolist()
    assert not targets.box_codes[~targets.positive].any()


def test_positive_anchors_always_teach_their_class():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        xs = torch.rand(12, generator=generator) * 20
        weight = (torch.rand(12, generator=generator) > 0.4).float()
        scene = labels_of(*[box(x) for x in xs.tolist()], weight=tuple(weight.tolist()))
        targets = assign_anchors(anchors_at(*torch.arange(20.0).tolist()), (CAR,), scene)
        assert bool((targets.class_weight[targets.positive] == 1).all())


def test_direction_bins_are_half_turns_and_opposite_headings_differ():
    yaws = torch.tensor([math.pi / 2, math.pi, -math.pi, 0.0, -math.pi / 2, 2 * math.pi])
    assert direction_bin(yaws).tolist() == [0, 0, 0, 1, 1, 1]
    many = torch.linspace(-7, 7, 301)
    assert bool((direction_bin(many) != direction_bin(many + math.pi)).all())


# ---- regions


def test_in_a_complete_scene_every_region_teaches_but_those_on_ignored_objects():
    scene = labels_of(box(0.0), box(50.0), weight=(1.0, 0.0))
    rois = torch.tensor([box(0.0), box(1.0), box(20.0), box(50.5), box(53.9)])
    found = match_rois(rois, torch.zeros(5, dtype=torch.int64), scene)
    assert torch.allclose(found.iou, torch.tensor([1.0, 0.6, 0.0, 7 / 9, 0.2 / 15.8]), atol=1e-5)
    assert found.match[[0, 1, 3]].tolist() == [0, 0, 1]
    assert found.weight.tolist() == [1, 1, 1, 0, 1]  # the last one barely touches the ignored object


def test_regions_match_their_own_class_only():
    found = match_rois(torch.tensor([box(0.0), box(0.0)]), torch.tensor([0, 1]), labels_of(box(0.0), classes=(1,)))
    assert found.iou.tolist() == [0, 1]


def test_in_an_incomplete_scene_only_exact_boxes_teach():
    scene = labels_of(
        box(0.0), box(50.0), box(80.0), weight=(1.0, 1.0, 0.0), exact=torch.tensor([False, True, True]), complete=False
    )
    rois = torch.tensor([box(0.0), box(50.5), box(52.0), box(80.0), box(30.0)])
    found = match_rois(rois, torch.zeros(5, dtype=torch.int64), scene)
    # On the teacher's box, and where nobody labeled: nothing. On the pasted object: yes. On an ignored one: no.
    assert found.weight.tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize(("complete", "weight"), [(True, 1.0), (False, 0.0)])
def test_without_labels_regions_are_background_only_if_the_scene_is_complete(complete, weight):
    found = match_rois(torch.tensor([box(0.0)]), torch.zeros(1, dtype=torch.int64), Labels.empty(complete=complete))
    assert found.iou.tolist() == [0]
    assert found.weight.tolist() == [weight]
    none = match_rois(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), labels_of(box(0.0)))
    assert none.weight.shape == none.iou.shape == none.match.shape == (0,)


def test_a_box_is_refined_where_it_overlaps_enough_and_as_much_as_its_label_is_worth():
    scene = labels_of(box(0.0), box(50.0), box(80.0), weight=(1.0, 1.0, 0.0), box_weight=torch.tensor([1.0, 0.25, 1.0]))
    rois = torch.tensor([box(0.0), box(1.0), box(1.5), box(50.0), box(80.0), box(30.0)])  # overlaps 1, 0.6, 0.45, 1, 1, 0
    found = match_rois(rois, torch.zeros(6, dtype=torch.int64), scene)
    assert found.box_weight.tolist() == [1, 1, 0, 0.25, 0, 0]
    assert match_rois(rois, torch.ones(6, dtype=torch.int64), scene).box_weight.tolist() == [0] * 6  # another class
    # A teacher's box may refine, though it judges nothing.
    guess = labels_of(box(0.0), exact=False, complete=False)
    found = match_rois(rois, torch.zeros(6, dtype=torch.int64), guess)
    assert found.weight.tolist() == [0] * 6
    assert found.box_weight.tolist() == [1, 1, 0, 0, 0, 0]
    assert match_rois(rois, torch.zeros(6, dtype=torch.int64), Labels.empty()).box_weight.tolist() == [0] * 6


def kinds(iou: Tensor, rows: Tensor, sampling: RoiSampling) -> tuple[int, int, int]:
    """Foreground, hard background, easy background among the drawn."""
    drawn = iou[rows]
    foreground, easy = drawn >= sampling.foreground_iou, drawn < sampling.easy_background_iou
    return int(foreground.sum()), int((~foreground & ~easy).sum()), int(easy.sum())


@pytest.mark.parametrize(
    ("pool", "drawn"),
    [
        ((100, 60, 50), (64, 51, 13)),  # 51 = four fifths of 64
        ((100, 20, 50), (64, 20, 44)),  # too few hard ones: as many draws as there are
        ((3, 200, 50), (3, 100, 25)),  # too few foreground ones: background fills up
        ((3, 0, 50), (3, 0, 125)),
        ((3, 7, 0), (3, 125, 0)),
        ((0, 7, 7), (0, 7, 121)),
        ((0, 0, 1), (0, 0, 128)),
        ((2, 0, 0), (128, 0, 0)),  # only foreground: repeated
        ((200, 0, 0), (128, 0, 0)),
    ],
)
def test_quotas_of_drawn_regions(pool, drawn):
    sampling = RoiSampling()
    iou = torch.cat([torch.full((n,), v) for n, v in zip(pool, (0.9, 0.3, 0.05), strict=True)])
    torch.manual_seed(0)
    rows = sample_rois(iou, sampling)
    assert rows.shape == (128,)
    assert kinds(iou, rows, sampling) == drawn
    if pool[1] + pool[2]:
        foreground = rows[iou[rows] >= sampling.foreground_iou]
        assert len(foreground.unique()) == len(foreground)  # drawn without replacement


def test_thresholds_of_drawn_regions_are_inclusive_below():
    sampling = RoiSampling(count=10)
    iou = torch.tensor([0.55, 0.1])
    assert kinds(iou, sample_rois(iou, sampling), sampling) == (1, 9, 0)


def test_drawing_is_repeatable_and_legal_from_nothing():
    iou = torch.rand(50, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    first = sample_rois(iou, RoiSampling(count=16))
    torch.manual_seed(5)
    assert torch.equal(first, sample_rois(iou, RoiSampling(count=16)))
    assert sample_rois(torch.zeros(0), RoiSampling()).shape == (0,)


def test_quality_target_is_linear_between_its_ends():
    iou = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert iou_quality_target(iou, 0.25, 0.75).tolist() == [0, 0, 0.5, 1, 1]
    assert torch.equal(iou_quality_target(iou, 0.0, 1.0), iou)
