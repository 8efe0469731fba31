"""Files without a header: another width or type of their rows is found by their numbers, and what is right passes."""

import re
from pathlib import Path

import numpy as np
import pytest

import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.point_files import read_scan
from upcycle3d.core.row_width import check_number_rows, number_type, usual_columns
from upcycle3d.core.scan_options import ScanOptions

DATA = Path(upcycle3d.__file__).resolve().parent.parent / "shared" / "data"


def scan(n: int, *, seed: int = 0) -> np.ndarray:
    """(n, 4) points of a flat road in random order, the hardest case, with intensity."""
    rng = np.random.default_rng(seed)
    radius, angle = 70 * np.sqrt(rng.uniform(0.003, 1, n)), rng.uniform(-np.pi, np.pi, n)
    xyz = [radius * np.cos(angle), radius * np.sin(angle), rng.normal(-1.73, 0.02, n)]
    return np.stack([*xyz, rng.uniform(0, 0.99, n)], 1)


def rows(width: int, n: int, extra: str = "ring") -> np.ndarray:
    """Rows of `width` columns; those after the fourth are a ring, the intensity again, or 0."""
    table = scan(n)
    more = {"ring": np.arange(n) % 32.0, "again": table[:, 3], "zero": np.zeros(n)}[extra]
    return np.concatenate([table, np.repeat(more[:, None], max(width - 4, 0), 1)], 1)[:, :width]


def check(table, dtype: str = "float32", *, columns: int = 4, read_as: str = "float32", named: bool = False) -> None:
    table = np.asarray(table)
    scaled = table * ([100, 100, 100, 255] + [1] * 6)[: table.shape[1]] if number_type(dtype).kind == "i" else table
    data = np.frombuffer(scaled.astype(number_type(dtype)).tobytes(), np.uint8)
    check_number_rows(data, usual_columns(columns).split(), read_as, named=named)


@pytest.mark.parametrize(
    ("head", "foot"),
    [
        ([500, 4, 0, 0], []),
        ([1e6, 0, 0, 0], []),
        ([0, 0, 0, 0, 9999, 4, 1, 1], []),
        (list(np.array([500, 4, 1, 0], np.uint32).view(np.float32)), []),
        ([], [123456.0, 0, 0, 0]),
    ],
)
def test_a_header_or_a_footer_of_whole_rows_is_no_point(tmp_path, head, foot):
    table = scan(500).astype(np.float32)
    (tmp_path / "000.bin").write_bytes(
        np.concatenate([np.float32(head), table.ravel(), np.float32(foot)]).astype("<f4").tobytes()
    )
    with pytest.raises(InvalidInput, match=r"the (first|last) row .* is no point: .* Cut off the (first|last) [48] numbers"):
        read_scan(tmp_path / "000.bin")
    (tmp_path / "000.bin").write_bytes(table.tobytes())
    assert len(read_scan(tmp_path / "000.bin")[0]) == 500


@pytest.mark.parametrize("extra", ["ring", "again", "zero"])
@pytest.mark.parametrize("width", [3, 5, 6, 7, 9, 10])
def test_rows_of_another_width_are_refused_although_the_size_fits(width, extra):
    with pytest.raises(InvalidInput, match=rf"looks like {width} values per point: give --columns {usual_columns(width)},"):
        check(rows(width, 4000, extra))
    check(rows(width, 4000, extra), columns=width, named=True)


@pytest.mark.parametrize("extra", ["ring", "again", "zero"])
@pytest.mark.parametrize("width", [11, 12, 13, 15, 16, 20, 24])
def test_wide_rows_are_refused_also_where_they_are_a_multiple_of_four(width, extra):
    with pytest.raises(InvalidInput, match=rf"looks like {width} values per point: give --columns {usual_columns(width)},"):
        check(rows(width, 4000, extra))
    check(rows(width, 4000, extra), columns=width, named=True)


@pytest.mark.parametrize("n", [400, 30_000])
@pytest.mark.parametrize("toward", [1, -1])
def test_points_of_pcl_with_intensity_and_normals_have_twelve_values(n, toward):
    """pcl::PointXYZINormal: x y z 1, nx ny nz 0, intensity curvature 0 0; the normals of walls lie along the ray."""
    table = scan(n)
    ray = table[:, :3] / np.linalg.norm(table[:, :3], axis=1, keepdims=True)
    normal = np.where(np.arange(n)[:, None] % 3 == 0, toward * ray, [[0.01, -0.02, 0.999]])
    zero, one = np.zeros((n, 1)), np.ones((n, 1))
    twelve = np.concatenate([table[:, :3], one, normal, zero, table[:, 3:], 0.1 * table[:, 3:], zero, zero], 1)
    with pytest.raises(InvalidInput, match="looks like 12 values per point"):
        check(twelve)


def test_three_or_four_lasers_that_fire_in_turn_are_points(tmp_path):
    for lasers in (3, 4, 5):
        n = 6000 // lasers * lasers
        angle = np.linspace(0, 2 * np.pi, n // lasers).repeat(lasers)
        up = np.tile(np.linspace(-0.3, 0.1, lasers), n // lasers)
        reach = np.tile(np.linspace(8, 60, lasers), n // lasers)
        check(
            np.stack(
                [reach * np.cos(angle), reach * np.sin(angle), reach * up, np.tile(np.linspace(0.1, 0.9, lasers), n // lasers)], 1
            )
        )


@pytest.mark.parametrize("head", [b"LIDARSCANv1.0   ", b"LIDAR" + b" " * 59, b"# my scan\nx y z intensity time\n\n "])
def test_a_header_of_text_is_refused_by_name(tmp_path, head):
    (tmp_path / "000.bin").write_bytes(head + scan(500).astype("<f4").tobytes())
    with pytest.raises(InvalidInput, match=r"the file begins with text .* a header in front of the points"):
        read_scan(tmp_path / "000.bin")


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("n", [3000, 3001])
def test_half_floats_never_become_points_light_years_away(tmp_path, width, n):
    table = rows(width, n // 2 * 2)
    table[:, 0] = np.abs(table[:, 0]) + 4  # ahead only, like a camera's view
    (tmp_path / "000.bin").write_bytes(table.astype("<f2").tobytes())
    with pytest.raises(InvalidInput):
        read_scan(tmp_path / "000.bin")


def test_a_few_far_points_pass_and_many_are_named_with_their_causes(tmp_path):
    table = scan(2000).astype("<f4")
    table[100:110, 0] = 5e6
    table.tofile(tmp_path / "000.bin")
    assert len(read_scan(tmp_path / "000.bin")[0]) == 2000
    for factor in (1000.0, 1e12):
        (scan(2000) * [factor, factor, factor, 1]).astype("<f4").tofile(tmp_path / "000.bin")
        with pytest.raises(InvalidInput, match=r"beyond 10 km .* float16 .* millimeters|make no sense"):
            read_scan(tmp_path / "000.bin")


@pytest.mark.parametrize("n", [40, 41, 42, 43])
def test_forty_points_are_enough_whether_the_size_fits_or_not(n):
    with pytest.raises(InvalidInput, match="looks like 5 values per point"):
        check(rows(5, n))


def test_a_row_of_eight_is_found_where_the_second_half_is_no_other_point():
    again, moved = np.concatenate([scan(400)] * 2, 1), np.array([0, 0, 0, 0, 5, 0, 1.7, 0])
    for table in (rows(8, 400), rows(8, 400, "zero"), again, again + moved):
        with pytest.raises(InvalidInput, match="looks like 8 values per point"):
            check(table)
    check(again, columns=8, named=True)


def test_columns_that_somebody_named_are_refused_only_where_another_width_is_clear():
    for real, columns in ((4, 5), (4, 8), (5, 10), (5, 4), (3, 6)):
        with pytest.raises(InvalidInput, match=rf"looks like {real} values per point"):
            check(rows(real, 4000, "again"), columns=columns, named=True)


@pytest.mark.parametrize("width", [3, 4, 5, 6])
@pytest.mark.parametrize("dtype", ["float64", ">f4", ">f8", "int16", ">i2", "int32", ">i4", "float16"])
def test_rows_of_another_type_are_refused_and_the_type_is_named(dtype, width):
    with pytest.raises(
        InvalidInput, match=rf"looks like {width} values per point of type {dtype}: give --dtype '?{dtype}'? --columns"
    ):
        check(rows(width, 4000), dtype)
    check(rows(width, 4000), dtype, columns=width, read_as=dtype, named=True)


@pytest.mark.parametrize("dtype", ["float64", ">f4", "int16", "float16", ">i4"])
def test_a_type_that_somebody_named_wrongly_is_refused(dtype):
    with pytest.raises(InvalidInput, match="looks like 4 values per point of type float32"):
        check(rows(4, 4000), "float32", read_as=dtype)


def test_a_file_that_is_cut_off_or_holds_text_is_called_that():
    cut = np.frombuffer(rows(4, 400).astype("<f4").tobytes()[:-6], np.uint8)
    with pytest.raises(InvalidInput, match="looks like 4 values per point and is cut off"):
        check_number_rows(cut, usual_columns(4).split(), "float32", named=False)
    for spaces in range(4):
        text = "".join(f"{a:.3f} {b:.3f} {c:.3f}\n" for a, b, c, _ in scan(60)).encode() + b" " * spaces
        with pytest.raises(InvalidInput, match="holds text"):
            check_number_rows(np.frombuffer(text, np.uint8), usual_columns(4).split(), "float32", named=False)


def unusual(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    noise = rng.normal(size=(n, 4))
    angle = np.linspace(0, 2 * np.pi, n)
    lasers = np.where(np.arange(n) % 2, 0.1, -0.2)  # lasers that fire alternately up and down
    reach = np.where(np.arange(n) % 2, 40, 12) * rng.uniform(0.7, 1.3, n)
    return {
        "noise": noise,
        "positive": np.abs(noise),
        "box": rng.uniform([-50, -50, -2, 0], [50, 50, 2, 1], (n, 4)),
        "whole numbers": rng.integers(0, 9, (n, 4)),
        "counting": np.arange(4 * n).reshape(n, 4),
        "zeros": np.zeros((n, 4)),
        "one point": np.tile([[1.5, -2, 0.5, 0.25]], (n, 1)),
        "three points": np.tile([[1.5, -2, 0.5, 0.25], [9, 2, 1, 0], [7, 7, -1, 0.5]], (n, 1))[:n],
        "straight ahead": np.stack([np.linspace(1, 60, n), np.zeros(n), np.zeros(n), np.full(n, 0.5)], 1),
        "millimeters": noise * [3e4, 3e4, 1e3, 0.1],
        "far away": noise * np.array([20, 20, 1, 0.1]) + np.array([691_000, 5_334_000, 500, 0]),
        "circle": np.stack([10 * np.cos(angle), 10 * np.sin(angle), 0 * angle, 0 * angle], 1),
        "missing returns": np.where(np.arange(n)[:, None] % 3 > 0, np.nan, noise * [20, 20, 1, 0.1]),
        "alternating lasers": np.stack([reach * np.cos(angle), reach * np.sin(angle), reach * lasers, 0.3 + 0 * angle], 1),
    }[kind]


@pytest.mark.parametrize("n", [1, 2, 5, 10, 15, 20, 60, 300, 5000])
@pytest.mark.parametrize(
    "kind",
    [
        "noise",
        "positive",
        "box",
        "whole numbers",
        "counting",
        "zeros",
        "one point",
        "three points",
        "straight ahead",
        "millimeters",
        "far away",
        "circle",
        "missing returns",
        "alternating lasers",
    ],
)
def test_unusual_scans_pass(kind, n):
    check(unusual(kind, n))


@pytest.mark.skipif(not DATA.is_dir(), reason="real data are not at hand")
def test_real_scans_pass_with_their_columns_and_fail_with_those_of_others():
    kitti = sorted(DATA.glob("kitti/training/velodyne*/*.bin"))
    five = [*DATA.glob("nuscenes/s*/LIDAR_TOP/*.bin"), *DATA.glob("waymo/points*/*.bin"), *DATA.glob("lyft/lidar/*.bin")]
    assert len(kitti) > 300
    assert len(five) > 8
    named = ScanOptions(columns=("x", "y", "z", "intensity", "_"))
    for path in kitti[::15]:
        assert read_scan(path)[1].points > 1000
        with pytest.raises(InvalidInput, match=r"looks like 4 values"):
            read_scan(path, named)
    for path in five:
        assert read_scan(path, named)[1].points > 1000
        with pytest.raises(InvalidInput, match=re.escape("looks like 5 values per point: give --columns x y z intensity _")):
            read_scan(path)
