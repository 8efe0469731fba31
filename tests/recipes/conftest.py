"""What several files here start from. Each file has its own copy, so that what one writes does not reach another."""

import pytest

import tiny
from upcycle3d.datasets.data_split import DataSplit


@pytest.fixture(scope="module")
def data(tmp_path_factory, one_thread) -> DataSplit:
    """Tiny prepared data with a database of objects to paste."""
    split = tiny.prepared(tmp_path_factory.mktemp("data") / "prepared")
    split.ensure_gt_database()
    return split
