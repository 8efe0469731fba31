"""A folder that is no prepared dataset: the message says what it is and what to run."""

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.data_split import DataSplit


@pytest.mark.parametrize(
    ("folder", "made", "message"),
    [
        ("nothere", None, "there is no folder .*nothere; give the folder that"),
        ("KITTI", "KITTI/training/velodyne", "holds raw data, .* run `upcycle3d prepare kitti .*/KITTI --out DIR`"),
        ("KITTI/training", "KITTI/training/velodyne", "holds raw data, .* run `upcycle3d prepare kitti .*/KITTI --out DIR`"),
        ("mine", "mine/points", "run `upcycle3d prepare folder .*/mine --out DIR`"),
        ("nu", "nu/samples", "run `upcycle3d prepare nuscenes .*/nu --out DIR`"),
        ("begun", "begun/parts", "has not finished; run the same `upcycle3d prepare` command again"),
        ("empty", "empty", "is not a prepared dataset; give the folder"),
    ],
)
def test_a_folder_that_is_no_prepared_dataset_is_named_for_what_it_is(tmp_path, folder, made, message):
    if made is not None:
        (tmp_path / made).mkdir(parents=True)
    with pytest.raises(InvalidInput, match=message):
        DataSplit.parse(f"{tmp_path / folder}:train").open()


def test_a_run_folder_given_as_data_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="is a run folder, not a prepared dataset"):
        DataSplit.parse(str(tmp_path)).open()
