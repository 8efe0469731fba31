"""A file of features comes from outside: what is damaged or too large is refused before memory is taken."""

from __future__ import annotations

import numpy as np
import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.adapt.glc.feature_file import read_target_features


def test_a_small_file_that_unpacks_to_hundreds_of_megabytes_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, features=np.zeros((70_000, 1000), np.float32), probabilities=np.full((70_000, 2), 0.5, np.float32))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(InvalidInput, match="unpack to"):
        read_target_features(path)


@pytest.mark.parametrize("cut", [0, 1, 30, 200, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path, cut):
    path = tmp_path / "a.npz"
    np.savez(path, features=np.zeros((5, 3), np.float32), probabilities=np.full((5, 2), 0.5, np.float32))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InvalidInput, match="readable npz"):
        read_target_features(path)
