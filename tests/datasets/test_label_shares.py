"""Partial labels: whole sequences, nested shares, the same draws for ever, and the published numbers of KITTI frames."""

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.label_shares import DRAWS, draw_labeled, label_share_splits, labeled_split
from upcycle3d.datasets.waymo_places import segment_of

IDS = [f"{segment:03d}_{10 * frame}" for segment in range(150) for frame in range(3)]


def test_whole_sequences_are_drawn_and_smaller_shares_lie_in_larger_ones():
    previous: set[str] = set()
    for share, count in ((0.01, 1), (0.02, 3), (0.05, 7), (0.2, 30), (1.0, 150)):
        labeled, rest = draw_labeled(IDS, share, 0, group=segment_of)
        sequences = {segment_of(i) for i in labeled}
        assert len(sequences) == count
        assert not sequences & {segment_of(i) for i in rest}
        assert sorted(labeled + rest) == sorted(IDS)
        assert list(labeled) == [i for i in IDS if i in set(labeled)]
        assert previous <= set(labeled)
        previous = set(labeled)


def test_a_draw_is_the_same_for_ever_and_in_any_order_of_the_frames():
    chosen = [{segment_of(i) for i in draw_labeled(IDS[::-1], 0.02, draw, group=segment_of)[0]} for draw in DRAWS]
    assert chosen == [{"024", "031", "057"}, {"089", "092", "095"}, {"009", "080", "121"}]


def test_kitti_frames_are_drawn_one_by_one_in_the_published_numbers():
    splits = label_share_splits([f"{i:06d}" for i in range(3712)], (0.01, 0.02, 0.05, 0.2))
    assert [len(splits[labeled_split(share, 1)]) for share in (0.01, 0.02, 0.05, 0.2)] == [37, 74, 185, 742]
    assert len(splits["train-0.01-1-rest"]) == 3712 - 37
    assert len(splits) == 24


def test_a_published_list_goes_before_the_drawn_one_and_decides_its_rest():
    ids = [f"{i:03d}" for i in range(100)]
    splits = label_share_splits(ids, (0.05,), given={"train": ids, "train-0.05-0": ["007", "042"]})
    assert "train-0.05-0" not in splits
    assert splits["train-0.05-0-rest"] == tuple(i for i in ids if i not in ("007", "042"))
    assert splits["train-0.05-1"] == draw_labeled(ids, 0.05, 1)[0]


def test_everything_labeled_leaves_no_rest():
    assert set(label_share_splits(["a", "b"], (1.0,))) == {"train-1-0", "train-1-1", "train-1-2"}


@pytest.mark.parametrize(("ids", "share"), [(IDS, 0.0), (IDS, 1.1), ([], 0.5)])
def test_no_frames_and_impossible_shares_are_refused(ids, share):
    with pytest.raises(InvalidInput, match="a share of labels needs"):
        draw_labeled(ids, share, 0)
