"""Linkage: scenes whose order, drive and place are known by construction, and scores against slow references."""

import itertools

import pytest
import torch

from tiny import CUT
from upcycle3d.core.cut import CutSpec
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, SparseVoxels
from upcycle3d.perception.privacy.attacks.linkage import (
    LinkageConfig,
    attack_linkage,
    chain_likeness,
    cross_likeness,
    pile_likeness,
    recovered_order,
)
from upcycle3d.perception.privacy.linkage_metrics import area_under_curve, score_linkage, score_place

CONFIG = LinkageConfig(coarse_cell=0.5, reach=6.0, sideways=2.0)
CHANNELS = CUT.channels


class Street:
    """A long random world of cells with features; `seen` gives what a vehicle at x (cells) sees of it, in its own cells."""

    def __init__(self, seed: int, length: int = 200) -> None:
        generator = torch.Generator().manual_seed(seed)
        occupied = torch.rand(2, 32, length, generator=generator) < 0.15
        self.cells = occupied.nonzero()
        self.features = torch.rand(len(self.cells), CHANNELS, generator=generator)

    def seen(self, x: int, *, noise: int = 0, spec: CutSpec = CUT, y: int = 0) -> CutFeatures:
        cells = self.cells - torch.tensor([0, y, x])
        inside = ((cells >= 0) & (cells < torch.tensor(spec.shape))).all(1)
        generator = torch.Generator().manual_seed(1000 * noise + x)
        features = self.features[inside] + 0.1 * torch.randn(int(inside.sum()), CHANNELS, generator=generator)
        return upload(cells[inside], features)


def upload(cells: torch.Tensor, features: torch.Tensor) -> CutFeatures:
    coords = torch.cat([torch.zeros(len(cells), 1, dtype=torch.int64), cells], 1).to(torch.int32)
    return CutFeatures(voxels=SparseVoxels(features=features, coords=coords, shape=CUT.shape, batch_size=1), spec=CUT)


EMPTY = upload(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, CHANNELS))


def shuffled(count: int, seed: int = 0) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def test_the_order_of_a_drive_comes_back_from_a_shuffled_pile():
    street, places = Street(1), shuffled(24)
    likeness = pile_likeness([street.seen(2 * place) for place in places], CONFIG)
    order = recovered_order(likeness.score)
    found = score_linkage(likeness.score, chain_likeness(likeness.score), [order], ["a"] * 24, places)
    assert found.neighbor.found == 1.0
    assert found.neighbor.chance == pytest.approx((2 * 2 * 22 / 24 + 2 * 2 / 24) / 2 / 23)
    assert found.tau == pytest.approx((1.0,))
    assert found.tau_chance[0] < 0.2


def test_scenes_of_one_drive_are_told_from_those_of_another():
    drives = [Street(seed) for seed in (1, 2, 3)]
    places = shuffled(36)
    uploads = [drives[place % 3].seen(3 * (place // 3)) for place in places]
    likeness = pile_likeness(uploads, CONFIG)
    chains = chain_likeness(likeness.score)
    names, positions = [str(place % 3) for place in places], [place // 3 for place in places]
    orders = [recovered_order(likeness.score[rows][:, rows]) for rows in ([i for i in range(36) if names[i] == n] for n in "012")]
    found = score_linkage(likeness.score, chains, orders, names, positions)
    assert found.same_drive.found == 1.0
    assert found.drive_auc == 1.0
    assert found.tau == pytest.approx((1.0, 1.0, 1.0))


def test_a_place_is_found_again_from_another_position_by_the_aligned_map_only():
    """A second vehicle passes 3 cells beside and 5 cells further on: no cell meets its own."""
    streets = [Street(seed) for seed in range(12)]
    ours = [street.seen(20, noise=1) for street in streets]
    theirs = [streets[i].seen(25, noise=2, y=3) for i in range(12)]
    likeness = cross_likeness(ours, theirs, CONFIG)
    same = torch.eye(12, dtype=torch.bool)
    assert score_place(likeness.aligned, same).top1.found == 1.0
    assert score_place(likeness.aligned, same).auc == 1.0
    assert score_place(likeness.fine, same).top1.found < 0.5
    assert score_place(likeness.fine, same).top1.chance == pytest.approx(1 / 12)


def test_a_turned_scene_is_found_where_the_turn_is_tried():
    street = Street(5)
    before = street.seen(10)
    angle = torch.deg2rad(torch.tensor(6.0))
    cells = before.voxels.coords[:, 1:].long()
    x, y = CUT.position(cells[:, 1].float(), cells[:, 2].float())
    turned = torch.stack([torch.cos(angle) * y + torch.sin(angle) * x, torch.cos(angle) * x - torch.sin(angle) * y], 1)
    low, size = torch.tensor([CUT.grid.range[1], CUT.grid.range[0]]), 0.5
    new = torch.cat([cells[:, :1], ((turned - low) / size).floor().long()], 1)
    inside = ((new >= 0) & (new < torch.tensor(CUT.shape))).all(1)
    after = upload(new[inside], before.voxels.features[inside])
    others = [Street(seed).seen(0) for seed in range(6, 12)]
    pile = [after, *others]
    tried = cross_likeness([before], pile, CONFIG).aligned[0]
    untried = cross_likeness([before], pile, LinkageConfig(coarse_cell=0.5, reach=6.0, sideways=2.0, turns=(0.0,))).aligned[0]
    assert tried[0] > 1.2 * untried[0]
    assert tried.argmax() == 0
    assert tried[0] > 2 * tried[1:].max()


def test_scenes_without_anything_in_common_are_not_linked_beyond_chance():
    uploads = [Street(seed).seen(0) for seed in range(40)]
    score = pile_likeness(uploads, CONFIG).score
    found = score_linkage(score, chain_likeness(score), [recovered_order(score)], ["a"] * 40, list(range(40)))
    assert found.neighbor.found < 0.2
    assert found.tau[0] < 0.35


def test_uploads_without_a_cell_and_without_features_are_compared_too():
    street = Street(1)
    likeness = pile_likeness([EMPTY, street.seen(0), EMPTY, street.seen(1)], CONFIG)
    assert bool(likeness.score.isfinite().all())
    assert likeness.score[1].argsort(descending=True).tolist()[1] == 3
    assert likeness.score[0, 2] == 0
    assert bool(chain_likeness(likeness.score).isfinite().fill_diagonal_(True).all())
    assert bool(pile_likeness([EMPTY, EMPTY], CONFIG).score.eq(0).all())
    equal = [
        upload(s.voxels.coords[:, 1:].long(), torch.ones(len(s.voxels.coords), CHANNELS)) for s in map(street.seen, (0, 1, 20))
    ]
    assert pile_likeness(equal, CONFIG).aligned[0, 1] > pile_likeness(equal, CONFIG).aligned[0, 2]


def test_the_same_pile_gives_the_same_likeness_in_any_order():
    street = Street(1)
    uploads = [street.seen(3 * i) for i in range(8)]
    places = shuffled(8)
    one, other = pile_likeness(uploads, CONFIG).score, pile_likeness([uploads[i] for i in places], CONFIG).score
    torch.testing.assert_close(other, one[places][:, places])
    torch.testing.assert_close(one, one.T)
    assert one.diagonal().min() > 0.999
    assert one.max() < 1.001


def test_uploads_of_two_cuts_and_an_empty_pile_are_refused():
    other = CutSpec(layer="x", channels=CHANNELS, stride=CUT.stride, shape=CUT.shape, grid=CUT.grid)
    stranger = CutFeatures(voxels=EMPTY.voxels, spec=other)
    with pytest.raises(InvalidInput, match="one cut"):
        pile_likeness([EMPTY, stranger])
    with pytest.raises(InvalidInput, match="empty pile"):
        cross_likeness([EMPTY], [])


def test_a_chain_is_as_strong_as_its_weakest_link():
    """Oracle: the best bottleneck over all paths, by the algorithm of Floyd and Warshall."""
    for seed in range(5):
        score = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed))
        score = (score + score.T) / 2
        best = score.double().clone().fill_diagonal_(float("inf"))
        for k, i, j in itertools.product(range(9), repeat=3):
            best[i, j] = max(best[i, j], min(best[i, k], best[k, j]))
        torch.testing.assert_close(chain_likeness(score), best, check_dtype=False)


def test_the_area_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (40,), generator=generator).float()
    positive = torch.rand(40, generator=generator) < 0.4
    wins = [float(a > b) + 0.5 * float(a == b) for a in scores[positive] for b in scores[~positive]]
    assert area_under_curve(scores, positive) == pytest.approx(sum(wins) / len(wins))
    assert area_under_curve(scores, torch.ones(40, dtype=torch.bool)) != area_under_curve(scores, positive)


def test_scores_by_hand():
    """Drive a: scenes 0, 1, 2 in this order; b: 3 and 4. Scene 5 is alone and its place is unknown."""
    score = torch.zeros(6, 6)
    for one, other, value in ((0, 1, 0.9), (1, 2, 0.8), (0, 2, 0.95), (3, 4, 0.5), (2, 3, 0.6), (4, 5, 0.7)):
        score[one, other] = score[other, one] = value
    drives, positions = ["a", "a", "a", "b", "b", "c"], [10, 20, 30, 1, 2, None]
    found = score_linkage(score, chain_likeness(score), [torch.tensor([0.0, 1.0, 2.0])], drives, positions)
    assert found.neighbor.asked == 5
    assert found.neighbor.found == pytest.approx(1 / 5)  # 0 and 2 take each other, 3 takes 2, 4 takes 5; 1 is right
    assert found.neighbor.chance == pytest.approx((1 + 2 + 1 + 1 + 1) / 5 / 5)
    assert found.neighbor_in_drive.found == pytest.approx(3 / 5)
    assert found.neighbor_in_drive.chance == pytest.approx((1 / 2 + 1 + 1 / 2 + 1 + 1) / 5)
    assert found.same_drive.asked == 5
    assert found.same_drive.found == pytest.approx(3 / 5)
    assert found.tau == pytest.approx((1.0,))
    assert found.tau_chance[0] == pytest.approx((2 * 1 + 4 / 3) / 6, abs=0.02)  # of 6 orders 2 have |tau| 1 and 4 have 1/3
    assert found.neighbor.times_chance == pytest.approx((1 / 5) / (6 / 25))


def test_the_attack_reports_the_measure_that_finds_most_neighbors():
    streets, places = [Street(seed) for seed in (1, 2)], shuffled(16)
    uploads = [streets[place % 2].seen(4 * (place // 2)) for place in places]
    drives, positions = [str(place % 2) for place in places], [place // 2 for place in places]
    likeness, rates = pile_likeness(uploads), []
    for score in (likeness.score, likeness.fine, likeness.aligned):
        orders = [torch.arange(8), torch.arange(8)]
        rates.append(score_linkage(score, chain_likeness(score), orders, drives, positions).neighbor.found)
    best = attack_linkage(uploads, drives, positions)
    assert best.neighbor.found == max(rates) > min(rates)
    assert len(best.tau) == 2
