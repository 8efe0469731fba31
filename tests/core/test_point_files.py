"""Scans from files: right values from every format, and a readable refusal of everything broken."""

from pathlib import Path

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.ledger import Ledger
from upcycle3d.core.point_files import read_points, read_scan, write_bin
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


def test_pcd_fields_of_other_types_padding_and_counts(tmp_path: Path) -> None:
    record = np.dtype([("x", "<f8"), ("pad", "u1", 4), ("y", "<f4"), ("z", "<i2"), ("i", "<u2"), ("normal", "<f4", 3)])
    rows = np.zeros(2, record)
    rows["x"], rows["y"], rows["z"], rows["i"] = [1, 2], [3, 4], [-5, 6], [51, 255]
    data = _pcd("x _ y z intensity normal", "F U F I U F", "8 1 4 2 2 4", rows.tobytes(), points=2, counts="1 4 1 1 1 3")
    cloud = read_points(_write(tmp_path / "a.pcd", data), intensity_scale=1 / 255)
    assert cloud.xyz.tolist() == [[1, 3, -5], [2, 4, 6]]
    torch.testing.assert_close(cloud.features, torch.tensor([[0.2], [1.0]]))


def test_pcd_without_intensity_has_no_feature_unless_it_is_asked_for(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.pcd", _pcd("x y z", "F F F", "4 4 4", ROWS[:, :3].tobytes()))
    assert read_points(path).feature_names == ()
    with pytest.raises(InvalidInput, match="there is no field intensity; the file has x y z"):
        read_points(path, columns=("x", "y", "z", "intensity"))


def test_wrong_byte_count_names_size_width_and_fitting_widths(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.bin", np.zeros((3, 5), np.float32).tobytes())
    with pytest.raises(
        InvalidInput, match=r"a\.bin: 60 bytes .* rows of 4 float32 .* fits 3 or 5 values per point: name them with --columns"
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
    for data in (whole[:-4], huge, b"\x93NUMPY", b"rubbish"):
        with pytest.raises(InvalidInput, match="not a readable numpy array"):
            read_points(_write(tmp_path / "c.npy", data))
    np.save(tmp_path / "d.npy", ROWS[:, :3])
    with pytest.raises(InvalidInput, match=r"expected numbers of shape \(N, 4\).*found \(3, 3\)"):
        read_points(tmp_path / "d.npy")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            _pcd("x y z", "F F F", "4 4 4", b"", points=2_000_000_000),
            "declares 2000000000 points of 12 bytes, but only 0 bytes follow",
        ),
        (_pcd("x y z", "F F F", "4 4 4", b"1 2 3\n", data="ascii"), "declares 3 points of 3 values, but 3 values follow"),
        (_pcd("x y z", "F F F", "4 4 4", b"1 2 a\n", data="ascii", points=1), "a word that is not a number"),
        (
            _pcd("x y z", "F F F", "4 4 4", b"", data="binary_compressed"),
            "files with DATA binary_compressed are not read; convert it",
        ),
        (_pcd("x y z", "F F", "4 4 4", b""), "of equal length"),
        (_pcd("x y z", "F F F", "4 4 3", b""), "known are F I U"),
        (_pcd("x y z", "F F F", "4 4 1", b""), "there is no number of TYPE"),
        (_pcd("x y z", "F F F", "4 4 four", b""), "a line SIZE with whole numbers"),
        (b"VERSION 0.7\nFIELDS x y z\n", "no line DATA"),
    ],
)
def test_broken_pcd_files_are_refused_with_the_reason(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_points(_write(tmp_path / "a.pcd", data))


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
    assert ledger == Ledger(scans=1, points=2, points_intensity_outside=2, highest_intensity=255)
    assert read_scan(path)[0].features[1] == 255
