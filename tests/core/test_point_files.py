"""Scans from files: right values from every format, and a readable refusal of everything broken."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.ledger import Ledger
from upcycle3d.core.point_files import find_scans, read_points, read_scan, write_bin
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.core.structures import PointCloud

ROWS = np.array([[1.5, -2.25, 0.5, 0.25], [10.0, 20.0, -1.75, 1.0], [-3.0, 4.0, 0.0, 0.0]], dtype=np.float32)


def _pcd(fields: str, kinds: str, sizes: str, body: bytes, *, points: int = 3, data: str = "binary", counts: str = "") -> bytes:
    n = len(fields.split())
    lines = [
        "# .PCD v0.7",
        "VERSION 0.7",
        f"FIELDS {fields}",
        f"SIZE {sizes}",
        f"TYPE {kinds}",
        f"COUNT {counts or ' '.join(['1'] * n)}",
    ]
    lines += [f"WIDTH {points}", "HEIGHT 1", "VIEWPOINT 0 0 0 1 0 0 0", f"POINTS {points}", f"DATA {data}"]
    return "\n".join(lines).encode() + b"\n" + body


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _check(cloud: PointCloud, rows: np.ndarray = ROWS) -> None:
    assert cloud.xyz.dtype == torch.float32
    torch.testing.assert_close(cloud.xyz, torch.from_numpy(rows[:, :3].copy()), rtol=0, atol=0)
    torch.testing.assert_close(cloud.features, torch.from_numpy(rows[:, 3:].copy()), rtol=0, atol=0)


def test_bin_npy_and_pcd_give_the_same_points(tmp_path: Path) -> None:
    _check(read_points(_write(tmp_path / "a.bin", ROWS.tobytes())))
    np.save(tmp_path / "a.npy", ROWS.astype(np.float64))
    _check(read_points(tmp_path / "a.npy"))
    _check(read_points(_write(tmp_path / "a.pcd", _pcd("x y z intensity", "F F F F", "4 4 4 4", ROWS.tobytes()))))
    text = "\n".join(" ".join(map(str, r)) for r in ROWS.tolist()).encode() + b"\n"
    _check(read_points(_write(tmp_path / "t.pcd", _pcd("x y z i", "F F F F", "4 4 4 4", text, data="ascii"))))


def test_write_bin_reads_back_exactly_and_leaves_no_temporary(tmp_path: Path) -> None:
    cloud = read_points(_write(tmp_path / "a.bin", ROWS.tobytes()))
    write_bin(tmp_path / "new" / "b.bin", cloud)
    _check(read_points(tmp_path / "new" / "b.bin"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["b.bin"]


def test_columns_are_named_reordered_and_skipped(tmp_path: Path) -> None:
    rows = np.array([[0.5, 1, 2, 3, 7, 0.125]], dtype=np.float32)
    path = _write(tmp_path / "a.bin", rows.tobytes())
    cloud = read_points(path, columns=("intensity", "x", "y", "z", "_", "elongation"))
    assert cloud.feature_names == ("intensity", "elongation")
    assert cloud.xyz.tolist() == [[1, 2, 3]]
    assert cloud.features.tolist() == [[0.5, 0.125]]


def test_wrong_byte_count_names_size_width_and_fitting_widths(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.bin", np.zeros((3, 5), np.float32).tobytes())
    with pytest.raises(
        InvalidInput,
        match=r"a\.bin: 60 bytes .* rows of 4 float32 .* fits 3 or 5 or 15 values per point: name them with --columns",
    ):
        read_points(path)
    with pytest.raises(InvalidInput, match="cut off"):
        read_points(_write(tmp_path / "b.bin", b"\0" * 61))


def test_intensity_beyond_one_is_said(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.bin", (ROWS * [1, 1, 1, 255]).astype(np.float32).tobytes())
    with pytest.warns(UserWarning, match=r"a.*: intensity reaches 255, expected 0..1; give intensity_scale 1/255") as caught:
        read_points(path)
    assert caught[0].filename == __file__  # the warning names the line of the caller
    _check(read_points(path, intensity_scale=1 / 255))


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_non_finite_points_are_refused_or_dropped_as_asked(tmp_path: Path, suffix: str) -> None:
    rows = np.concatenate([ROWS, [[np.nan, 0, 0, 0], [0, np.inf, 0, 0]]]).astype(np.float32)
    path = tmp_path / f"a{suffix}"
    if suffix == ".bin":
        path.write_bytes(rows.tobytes())
    else:
        np.save(path, rows)
    with pytest.raises(InvalidInput, match="2 of 5 points hold NaN or inf"):
        read_points(path)
    _check(read_points(path, drop_non_finite=True))


def test_a_scan_without_points_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no point"):
        read_points(_write(tmp_path / "a.bin", b""))


def test_missing_file_and_unknown_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no scan at"):
        read_points(tmp_path / "a.bin")
    with pytest.raises(InvalidInput, match=r"found '\.las'"):
        read_points(_write(tmp_path / "a.las", b"x"))


def test_pickled_truncated_and_misshapen_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidInput, match="not a readable numpy array"):
        read_points(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", ROWS)
    whole = (tmp_path / "b.npy").read_bytes()
    huge = whole.replace(b"(3, 4), ", b"(3000000000, 4), ".ljust(8))[: len(whole)]
    deep = b"\x93NUMPY\x01\x00" + (4000).to_bytes(2, "little") + b"(" * 3999 + b"\n"
    for data in (
        whole[:-4],
        huge,
        b"\x93NUMPY",
        b"rubbish",
        deep,
        whole.replace(b"<f4", b"<\xe94"),
        whole.replace(b"'shape'", b"'Shape'"),
    ):
        with pytest.raises(InvalidInput, match="not a readable numpy array"):
            read_points(_write(tmp_path / "c.npy", data))
    np.save(tmp_path / "d.npy", ROWS[:, :3])
    with pytest.raises(InvalidInput, match=r"expected numbers of shape \(N, 4\).*found \(3, 3\); give --columns x y z,"):
        read_points(tmp_path / "d.npy")


@pytest.mark.parametrize("name", ["a.bin", "a.npy", "a.pcd"])
@pytest.mark.parametrize("columns", ["xyzi", ("x", "y", "z", "z")])
def test_columns_are_names_and_each_is_there_once(name, columns, tmp_path):
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, ROWS)
    else:
        _write(path, ROWS.tobytes() if name == "a.bin" else _pcd("x y z intensity", "F F F F", "4 4 4 4", ROWS.tobytes()))
    with pytest.raises(InvalidInput, match=rf"{name}: columns must "):
        read_points(path, columns=columns)


def test_what_is_dropped_is_counted(tmp_path):
    rows = np.concatenate([ROWS, [[np.nan, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.5]]]).astype(np.float32)
    path = _write(tmp_path / "a.bin", rows.tobytes())
    cloud, ledger = read_scan(path, ScanOptions(drop_non_finite=True))
    _check(cloud)
    assert ledger == Ledger(scans=1, points=6, points_non_finite=1, points_zero=2)
    with pytest.raises(InvalidInput, match="all 2 points are NaN, infinite or at the sensor"):
        read_scan(_write(tmp_path / "b.bin", rows[3:5].tobytes()), ScanOptions(drop_non_finite=True))


def test_axes_are_turned_before_anything_else(tmp_path):
    """A file with x to the right and y forward: forward is y, left is -x."""
    path = _write(tmp_path / "a.bin", np.array([[1, 20, 3, 0.5]], np.float32).tobytes())
    cloud, _ = read_scan(path, ScanOptions(axes=("y", "-x", "z")))
    assert cloud.xyz.tolist() == [[20, -1, 3]]


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", ">f8"])
def test_other_number_types_are_read_when_they_are_named(dtype, tmp_path):
    rows = ROWS.astype(dtype)
    cloud, _ = read_scan(_write(tmp_path / "a.bin", rows.tobytes()), ScanOptions(dtype=dtype))
    _check(cloud)


def test_a_rig_shifts_scales_and_counts_intensity_that_stays_outside(tmp_path):
    rows = np.array([[1, 2, 3, 51], [1, 2, 3, 255]], np.float32)
    path = _write(tmp_path / "a.bin", rows.tobytes())
    cloud, ledger = read_scan(path, rig=RigSpec(z_shift=1.5, intensity_scale=0.0039216))
    assert cloud.xyz[:, 2].tolist() == [4.5, 4.5]
    assert cloud.features[1] == 1
    assert ledger.points_intensity_clipped == 1
    cloud, ledger = read_scan(path, rig=RigSpec())
    assert cloud.features[1] == 255
    counts = {"lowest_intensity": 51, "highest_intensity": 255}
    assert ledger == Ledger(scans=1, points=2, points_intensity_outside=2, **counts)
    assert read_scan(path)[0].features[1] == 255


def test_arrays_in_column_order_and_with_named_fields_are_read(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(ROWS))
    _check(read_points(tmp_path / "a.npy"))
    record = np.zeros(3, [("reflectivity", "<u2"), ("x", "<f8"), ("y", "<f4"), ("z", "<f4"), ("intensity", "<f4")])
    for i, name in enumerate(("x", "y", "z", "intensity")):
        record[name] = ROWS[:, i]
    np.save(tmp_path / "b.npy", record)
    _check(read_points(tmp_path / "b.npy"))
    np.save(tmp_path / "c.npy", np.zeros((0, 4), np.float32))
    with pytest.raises(InvalidInput, match="holds no point"):
        read_points(tmp_path / "c.npy")


def test_hidden_files_and_folders_are_no_scans_and_are_counted(tmp_path):
    for name in ("b.bin", "a.bin", "._a.bin", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c.bin").mkdir()
    files, ledger = find_scans([tmp_path])
    assert [f.name for f in files] == ["a.bin", "b.bin"]
    assert ledger == Ledger(files_skipped={"hidden file": 2, "not a scan": 1, "folder": 1})
    assert find_scans([tmp_path / "a.bin", tmp_path / "._a.bin"])[0] == (tmp_path / "a.bin",)
    with pytest.raises(InvalidInput, match=r"no scan .*; skipped were: hidden file \(1\)"):
        find_scans([tmp_path / "._a.bin"])


@pytest.mark.parametrize("suffix", [".bin", ".npy", ".pcd"])
def test_folders_and_damaged_files_give_a_sentence(suffix, tmp_path):
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(InvalidInput, match=f"there is no scan at .*folder{suffix}: it is a folder"):
        read_points(folder)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "whole.npy", ROWS)
    whole = {
        ".bin": ROWS.tobytes(),
        ".npy": (tmp_path / "whole.npy").read_bytes(),
        ".pcd": _pcd("x y z intensity", "F F F F", "4 4 4 4", ROWS.tobytes()),
    }[suffix]
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path = _write(tmp_path / f"damaged{suffix}", bytes(data[: rng.integers(len(data) // 2, len(data) + 1)]))
        with suppress(InvalidInput):
            read_points(path, intensity_scale=None)


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/null")])
def test_a_pipe_or_a_device_is_said_to_be_no_regular_file(tmp_path, make):
    make(tmp_path / "000.bin")
    with pytest.raises(InvalidInput, match="is not a regular file but a pipe, a socket or a device"):
        read_scan(tmp_path / "000.bin")
