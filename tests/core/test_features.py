"""Features at the cut: rows of voxels in order, keypoints that stay with their scenes, and cuts that do not mix."""

from dataclasses import replace

import pytest
import torch

from upcycle3d.core.cut import CutSpec, KeypointSpec, VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, Keypoints, SparseVoxels

GRID = VoxelGrid(range=(0.0, -2.0, -1.0, 4.0, 2.0, 3.0), voxel_size=(0.5, 0.5, 0.5))
PLAIN = CutSpec(layer="cut", channels=1, stride=(2, 2, 2), shape=(4, 4, 4), grid=GRID)
SPEC = replace(PLAIN, keypoints=KeypointSpec(count=5, channels=2))


def voxels(counts: tuple[int, ...], seed: int = 0) -> SparseVoxels:
    """`counts[b]` voxels of scene b, shuffled; the feature is the row's place in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    index = [torch.randperm(64, generator=generator)[:n].sort().values for n in counts]
    coords = torch.cat([torch.stack([i * 0 + b, i // 16, i // 4 % 4, i % 4], 1) for b, i in enumerate(index)]).int()
    order = torch.randperm(len(coords), generator=generator)
    return SparseVoxels(
        features=torch.arange(len(coords))[order, None].float(), coords=coords[order], shape=(4, 4, 4), batch_size=len(counts)
    )


def keypoints(counts: tuple[int, ...], channels: int = 2) -> Keypoints:
    k = sum(counts)
    starts = (0, *torch.tensor(counts).cumsum(0).tolist())
    return Keypoints(
        xyz=torch.arange(3.0 * k).view(k, 3), features=torch.arange(k)[:, None].expand(k, channels) * 1.0, starts=starts
    )


def batch_of(counts: tuple[int, ...]) -> CutFeatures:
    return CutFeatures(voxels=voxels(tuple(2 * n for n in counts)).sorted(), spec=SPEC, keypoints=keypoints(counts))


def test_sorting_is_ascending_in_batch_z_y_x_and_takes_the_features_along():
    shuffled = voxels((5, 0, 9, 3))
    found = shuffled.sorted()
    assert found.features[:, 0].tolist() == list(range(17))
    assert found.coords.tolist() == sorted(shuffled.coords.tolist())
    assert torch.equal(found.dense(), shuffled.dense())
    assert found.coords.dtype == torch.int32
    none = voxels((0, 0))
    assert none.sorted().coords.shape == (0, 4)


def test_bounds_of_scenes_count_empty_ones():
    assert voxels((5, 0, 9, 3, 0)).sorted().starts() == (0, 5, 5, 14, 17, 17)
    assert voxels((0,)).starts() == (0, 0)
    found = voxels((0, 4)).sorted()
    for b, (first, last) in enumerate(zip(found.starts(), found.starts()[1:], strict=False)):
        assert torch.equal(found.scene(b).features, found.features[first:last])


def test_keypoints_are_selected_by_mask_or_index_in_that_order():
    one = keypoints((4,))
    assert one.select(torch.tensor([True, False, False, True])).features[:, 0].tolist() == [0, 3]
    picked = one.select(torch.tensor([2, 0]))
    assert picked.features[:, 0].tolist() == [2, 0]
    assert picked.xyz[:, 0].tolist() == [6, 0]
    assert picked.starts == (0, 2)
    assert one.select(torch.zeros(4, dtype=torch.bool)).starts == (0, 0)
    with pytest.raises(InvalidInput, match="batch of 2"):
        keypoints((1, 2)).select(torch.tensor([0]))


def test_scenes_of_a_batch_take_their_keypoints_with_them_and_come_together_again():
    batch = batch_of((3, 0, 4))
    scenes = [batch.scene(i) for i in range(3)]
    assert [s.keypoints.starts for s in scenes] == [(0, 3), (0, 0), (0, 4)]
    again = CutFeatures.collate(scenes)
    assert again.keypoints.starts == batch.keypoints.starts
    assert torch.equal(again.keypoints.xyz, batch.keypoints.xyz)
    assert torch.equal(again.keypoints.features, batch.keypoints.features)
    assert torch.equal(again.voxels.coords, batch.voxels.coords)
    twice = CutFeatures.collate([batch, batch])
    assert twice.batch_size == 6
    assert twice.keypoints.starts == (0, 3, 3, 7, 10, 10, 14)


def test_keypoints_must_be_those_of_the_cut():
    good = batch_of((2,))
    with pytest.raises(InvalidInput, match="the cut 'cut' has 5 keypoints, but the features have none"):
        replace(good, keypoints=None)
    with pytest.raises(InvalidInput, match="the cut 'cut' has no keypoints, but the features have some"):
        replace(good, spec=PLAIN)
    with pytest.raises(InvalidInput, match=r"expected \(channels, scenes\) \(2, 1\), found \(3, 1\)"):
        replace(good, keypoints=keypoints((2,), channels=3))
    with pytest.raises(InvalidInput, match=r"found \(2, 2\)"):
        replace(good, keypoints=keypoints((1, 1)))
    other = replace(good, spec=replace(SPEC, keypoints=KeypointSpec(count=6, channels=2)))
    with pytest.raises(InvalidInput, match="different cuts"):
        CutFeatures.collate([good, other])
