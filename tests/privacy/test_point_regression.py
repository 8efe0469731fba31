"""The attack by point regression: the cells that points belong to, what it learns on features that say where points are, and determinism."""

from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.cut import CutSpec
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, SparseVoxels
from upcycle3d.perception.privacy.attacks.point_regression import (
    PointRegressionAttack,
    PointRegressionConfig,
    cell_boxes,
    points_of_cells,
)
from upcycle3d.perception.privacy.frames import AuditFrame, audit_frames
from upcycle3d.perception.privacy.geometry_metrics import MATCHED, score_all
from upcycle3d.perception.privacy.true_scan import RegionRules, TrueScan

SPEC = CutSpec(layer="test", channels=3, stride=(16, 8, 8), shape=(2, 16, 16), grid=tiny.GRID)
QUICK = PointRegressionConfig(points_per_cell=4, channels=16, blocks=1, steps=150, lr=0.01)


def telling_frame(seed: int, cells: int = 60) -> AuditFrame:
    """A frame whose features are the place of the only point in each cell."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randperm(2 * 15 * 15, generator=generator)[:cells]
    coords = torch.stack([torch.zeros_like(number), number // 225, number // 15 % 15 + 1, number % 15 + 1], 1).to(torch.int32)
    place = torch.rand(cells, 3, generator=generator)
    boxes = cell_boxes(coords, SPEC)
    upload = CutFeatures(voxels=SparseVoxels(features=place * 3 - 1, coords=coords, shape=SPEC.shape, batch_size=1), spec=SPEC)
    return AuditFrame(id=str(seed), upload=upload, scan=tiny.cloud(boxes.low + place * boxes.size))


def f_20cm(attack: PointRegressionAttack, frames: list[AuditFrame]) -> float:
    pairs = [(attack.rebuild(f.upload), TrueScan.of(f, RegionRules())) for f in frames]
    mean = score_all(pairs, MATCHED).scene.f_20cm.mean
    assert mean is not None
    return mean


def test_every_point_lies_in_the_box_of_its_cell():
    frame = telling_frame(0)
    rows = points_of_cells(frame.scan.xyz, frame.upload.voxels.coords, SPEC)
    assert rows.tolist() == list(range(60))
    hidden = frame.upload.voxels.coords[1:]
    assert points_of_cells(frame.scan.xyz, hidden, SPEC).tolist() == [-1, *range(59)]
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled[points_of_cells(frame.scan.xyz, frame.upload.voxels.coords[shuffled], SPEC)], torch.arange(60))


def test_boxes_are_centered_on_the_receptive_field_and_part_the_height():
    boxes = cell_boxes(torch.tensor([[0, 1, 2, 3]]), SPEC)
    x, y = SPEC.position(2, 3)
    assert (boxes.low + boxes.size / 2)[0].tolist() == pytest.approx([x, y, 2.0])
    assert boxes.size[0].tolist() == pytest.approx([0.8, 0.8, 2.0])


@pytest.mark.parametrize("loss", ["chamfer", "mse"])
def test_it_reads_places_that_stand_in_the_features(loss: str):
    """What the features say is rebuilt on frames that were not seen; the same network on features that say nothing is much worse."""
    attack = PointRegressionAttack(replace(QUICK, loss=loss, points_per_cell=1))
    attack.train([telling_frame(seed) for seed in range(4)])
    unseen = [telling_frame(seed) for seed in (10, 11)]
    told = f_20cm(attack, unseen)
    silent = [replace(f, upload=replace(f.upload, voxels=replace(f.upload.voxels, features=torch.zeros(60, 3)))) for f in unseen]
    assert told > 0.8
    assert f_20cm(attack, silent) < 0.3


def test_the_same_seed_gives_the_same_scan_whatever_was_drawn_before():
    frames = [telling_frame(seed) for seed in range(3)]
    quick = replace(QUICK, steps=5)

    def rebuilt(seed: int, drawn: int) -> torch.Tensor:
        torch.manual_seed(drawn)
        attack = PointRegressionAttack(replace(quick, seed=seed))
        attack.train(frames)
        return attack.rebuild(frames[0].upload).xyz

    assert torch.equal(rebuilt(0, drawn=1), rebuilt(0, drawn=2))
    assert not torch.equal(rebuilt(0, drawn=1), rebuilt(1, drawn=1))


def test_crowded_cells_are_thinned_and_cells_without_points_are_learned_as_such():
    frame = telling_frame(0)
    crowd = tiny.cloud(torch.rand(3000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.7, 0.7, 0.9]) + 4.5)
    crowd = replace(crowd, xyz=crowd.xyz - torch.tensor([0.0, 4.5, 4.5]))
    attack = PointRegressionAttack(replace(QUICK, steps=3))
    attack.train([replace(frame, scan=crowd), frame])
    assert len(attack.rebuild(frame.upload).xyz) <= 60 * 4


@pytest.mark.parametrize("detector", [tiny.second_iou, tiny.pv_rcnn])
def test_it_runs_on_uploads_of_both_detectors_and_on_empty_ones(detector):
    frames = [tiny.frame_with_car(seed) for seed in range(2)]
    empty = replace(frames[0], points=tiny.NO_POINTS)
    audited = audit_frames([*frames, empty], detector().eval().encoder, "int8")
    attack = PointRegressionAttack(replace(QUICK, steps=3))
    attack.train(audited)
    found = attack.rebuild(audited[0].upload)
    low, high = (torch.tensor(side) for side in (tiny.GRID.range[:3], tiny.GRID.range[3:]))
    assert bool(((found.xyz >= low) & (found.xyz < high)).all())
    assert bool(((found.score >= 0) & (found.score <= 1)).all())
    assert len(attack.rebuild(audited[2].upload).xyz) == 0


def test_where_nothing_was_sent_nothing_is_rebuilt_and_an_audit_goes_on():
    frame = telling_frame(0)
    attack = PointRegressionAttack(replace(QUICK, steps=1))
    attack.train([replace(frame, scan=tiny.NO_POINTS)])
    assert len(attack.rebuild(frame.upload).xyz) == 0
    attack.train([frame])
    assert len(attack.rebuild(frame.upload).xyz)


def test_what_cannot_be_attacked_is_refused():
    frame = telling_frame(0)
    attack = PointRegressionAttack(replace(QUICK, steps=1))
    with pytest.raises(InvalidInput, match="was not trained"):
        attack.rebuild(frame.upload)
    with pytest.raises(InvalidInput, match="at least one frame"):
        attack.train([])
    attack.train([frame])
    other = replace(SPEC, layer="another")
    with pytest.raises(InvalidInput, match="another cut"):
        attack.rebuild(replace(frame.upload, spec=other))
    with pytest.raises(InvalidInput, match="'chamfer' or 'mse'"):
        PointRegressionConfig(loss="l1")  # type: ignore[arg-type]
