"""`DIR[:SPLIT]`: what a user may write to name a split of a prepared dataset."""

from pathlib import Path

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.data_split import DataSplit


@pytest.mark.parametrize(
    ("text", "root", "name"),
    [
        ("data/kitti:val", "data/kitti", "val"),
        ("data/kitti", "data/kitti", None),
        ("data/a:b/kitti", "data/a:b/kitti", None),
        ("data/a:b/kitti:train-0.05-1", "data/a:b/kitti", "train-0.05-1"),
    ],
)
def test_the_split_follows_the_last_colon(text, root, name):
    assert DataSplit.parse(text) == DataSplit(root=Path(root), name=name)
    assert str(DataSplit.parse(text)) == text


@pytest.mark.parametrize("text", ["data/kitti:", ":val", ""])
def test_a_missing_folder_or_split_is_refused(text):
    with pytest.raises(InvalidInput, match=r"written DIR\[:SPLIT\]"):
        DataSplit.parse(text)


def test_an_existing_folder_with_a_colon_is_taken_whole(tmp_path):
    folder = tmp_path / "day:1"
    assert DataSplit.parse(str(folder)) == DataSplit(root=tmp_path / "day", name="1")
    assert DataSplit.parse(f"{folder}/") == DataSplit(root=folder)
    folder.mkdir()
    assert DataSplit.parse(str(folder)) == DataSplit(root=folder)
    assert DataSplit.parse(f"{folder}:val") == DataSplit(root=folder, name="val")


def test_a_command_fills_in_its_default_split():
    assert DataSplit.parse("data").or_split("train") == DataSplit.parse("data:train")
    assert DataSplit.parse("data:val").or_split("train") == DataSplit.parse("data:val")


def test_a_gt_database_belongs_to_a_named_split():
    with pytest.raises(InvalidInput, match="name it"):
        DataSplit.parse("data").gt_database  # noqa: B018
