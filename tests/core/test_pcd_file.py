"""`.pcd` files as PCL and other programs write them, encoded here from the description of the format."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.ledger import Ledger
from upcycle3d.core.pcd_file import read_pcd
from upcycle3d.core.point_files import read_points, read_scan
from upcycle3d.core.scan_options import ScanOptions

ROWS = np.array([[1.5, -2.25, 0.5, 0.25], [10.0, 20.0, -1.75, 1.0], [-3.0, 4.0, 0.0, 0.0]])
XYZI = [("x", "F", 4, ROWS[:, :1]), ("y", "F", 4, ROWS[:, 1:2]), ("z", "F", 4, ROWS[:, 2:3]), ("intensity", "F", 4, ROWS[:, 3:])]


def lzf(raw: bytes) -> bytes:
    """LZF as liblzf's documentation describes it, with references back wherever three bytes have occurred before."""
    out, literal, seen, i = bytearray(), bytearray(), {}, 0

    def flush() -> None:
        for start in range(0, len(literal), 32):
            piece = literal[start : start + 32]
            out.extend((len(piece) - 1, *piece))
        literal.clear()

    while i < len(raw):
        three, back = raw[i : i + 3], seen.get(raw[i : i + 3], -1)
        seen[three] = i
        if len(three) == 3 and back >= 0 and i - back <= 8192:
            length = 3
            while i + length < len(raw) and length < 264 and raw[back + length] == raw[i + length]:
                length += 1
            flush()
            offset, more = i - back - 1, length - 2
            out.extend([(min(more, 7) << 5) | offset >> 8, *([more - 7] if more >= 7 else []), offset & 255])
            i += length
        else:
            literal.append(raw[i])
            i += 1
    flush()
    return bytes(out)


def pcd(fields, data="binary", *, height=1, newline="\n", counts=None, header=None, body=None) -> bytes:
    """A file of (name, type, size, (N, count) values) per field."""
    kinds = [f"<{kind.lower()}{size}" for _, kind, size, _ in fields]
    arrays = [np.asarray(values).astype(kind) for (*_, values), kind in zip(fields, kinds)]
    n = len(arrays[0])
    stored = [a for a, f in zip(arrays, fields) if data != "binary_compressed" or f[0] != "_"]
    lines = {
        "VERSION": "0.7",
        "FIELDS": " ".join(f[0] for f in fields),
        "SIZE": " ".join(str(f[2]) for f in fields),
        "TYPE": " ".join(f[1] for f in fields),
        "COUNT": counts or " ".join(str(a.shape[1]) for a in arrays),
        "WIDTH": n // height,
        "HEIGHT": height,
        "VIEWPOINT": "5 6 7 1 0 0 0",
        "POINTS": n,
        "DATA": data,
    } | (header or {})
    rows = [[a[i] for a in arrays] for i in range(n)]
    if body is None:
        if data == "ascii":
            text = [" ".join(str(v) for part in row for v in part.tolist()) for row in rows]
            body = newline.join([*text, ""]).encode()
        elif data == "binary":
            body = b"".join(part.tobytes() for row in rows for part in row)
        else:
            raw = b"".join(a.tobytes() for a in stored)
            packed = lzf(raw)
            body = struct.pack("<II", len(packed), len(raw)) + packed
    head = newline.join(["# .PCD v0.7 - Point Cloud Data file format", *(f"{k} {v}" for k, v in lines.items()), ""])
    return head.encode() + body


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("data", ["ascii", "binary", "binary_compressed"])
def test_the_three_encodings_give_the_same_points_with_the_line_ends_of_every_system(data, newline):
    names, values, organized = read_pcd(pcd(XYZI, data, newline=newline), ())
    assert (names, organized) == (("x", "y", "z", "intensity"), False)
    assert values.tolist() == ROWS.tolist()


@pytest.mark.parametrize("data", ["ascii", "binary", "binary_compressed"])
def test_files_with_padding_counts_and_fields_of_every_type_are_read(data):
    """What PCL writes for PointXYZIRT: padding of 4, 10 and 0 bytes between fields of other sizes, colors and normals."""
    n = 700
    rng = np.random.default_rng(0)
    xyz, intensity = rng.normal(size=(n, 3)) * 20, rng.integers(0, 255, (n, 1))
    fields = [
        ("x", "F", 8, xyz[:, :1]), ("y", "F", 4, xyz[:, 1:2]), ("z", "F", 4, xyz[:, 2:]),
        ("_", "U", 1, np.zeros((n, 4))),
        ("rgb", "U", 4, rng.integers(0, 2**24, (n, 1))),
        ("reflectivity", "U", 2, rng.integers(0, 9, (n, 1))),
        ("intensity", "I", 2, intensity),
        ("_", "U", 1, np.zeros((n, 0))),
        ("normal", "F", 4, rng.normal(size=(n, 3))),
        ("_", "U", 1, np.zeros((n, 10))),
        ("timestamp", "F", 8, np.arange(n)[:, None] * 1e6),
    ]  # fmt: skip
    file = pcd(fields, data)
    names, values, _ = read_pcd(file, ())
    assert names == ("x", "y", "z", "intensity")
    np.testing.assert_allclose(values, np.concatenate([xyz, intensity], 1), rtol=1e-6)
    names, values, _ = read_pcd(file, ("timestamp", "_", "x", "y", "z", "reflectivity"))
    assert names == ("timestamp", "x", "y", "z", "reflectivity")
    assert values[:, 0].tolist() == (np.arange(n) * 1e6).tolist()


@pytest.mark.parametrize(
    ("stored", "taken"),
    [
        (("reflectivity", "intensity"), "intensity"),
        (("Reflectivity", "Intensity"), "Intensity"),
        (("reflectivity", "i"), "i"),
        (("ring", "reflectance"), "reflectance"),
        (("ring", "time"), None),
    ],
)
def test_an_exact_name_comes_before_other_names_of_intensity(stored, taken):
    extra = [(name, "F", 4, np.full((3, 1), 1.0 + k)) for k, name in enumerate(stored)]
    names, values, _ = read_pcd(pcd([*extra, *XYZI[:3]]), ())
    if taken is None:
        assert names == ("x", "y", "z")
    else:
        assert set(values[:, names.index("intensity")]) == {1.0 + stored.index(taken)}
    with pytest.raises(InvalidInput, match=r"no field elongation; the file has .* x y z; .* --columns"):
        read_pcd(pcd([*extra, *XYZI[:3]]), ("x", "y", "z", "elongation"))


def test_missing_returns_of_an_organized_cloud_are_dropped_and_counted(tmp_path):
    rows = np.concatenate([ROWS, np.zeros((4, 4)), np.full((3, 4), np.nan)])
    fields = [(name, kind, size, rows[:, [i]]) for i, (name, kind, size, _) in enumerate(XYZI)]
    path = tmp_path / "a.pcd"
    path.write_bytes(pcd(fields, height=2))
    cloud, ledger = read_scan(path)
    assert cloud.xyz.tolist() == ROWS[:, :3].tolist()
    assert ledger == Ledger(scans=1, points=10, points_non_finite=3, points_zero=4)
    path.write_bytes(pcd(fields))  # NaN in one row of points is a fault
    with pytest.raises(InvalidInput, match="3 of 10 points hold NaN"):
        read_points(path)
    assert read_scan(path, ScanOptions(drop_non_finite=True))[1] == ledger


BIG = struct.pack("<II", 20, 2_000_000_000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pcd(XYZI, header={"WIDTH": 2 * 10**9, "POINTS": 2 * 10**9}), "declares 2000000000 points of 16 bytes, but 48 bytes follow"),
        (pcd(XYZI, header={"WIDTH": 2, "POINTS": 2}), "declares 2 points of 16 bytes, but 48 bytes follow"),
        (pcd(XYZI, header={"POINTS": 2}), "WIDTH 3 times HEIGHT 1 is not POINTS 2"),
        (pcd(XYZI)[:-1], "is the file cut off"),
        (pcd(XYZI, "ascii", body=b"1 2 3\n"), "declares 3 points of 4 values, but 3 values follow"),
        (pcd(XYZI, "ascii", body=b"1 2 3 a " * 3), "a word that is not a number"),
        (pcd(XYZI, "ascii", body="1 2 3 ² ".encode("latin-1") * 3), "a word that is not a number"),
        (pcd(XYZI, "binary_compressed", body=b""), "but 0 bytes follow"),
        (pcd(XYZI, "binary_compressed", body=BIG + bytes(20)), "20 bytes that become 2000000000"),
        (
            pcd(XYZI, "binary_compressed", body=BIG + bytes(20), header={"WIDTH": 125_000_000, "POINTS": 125_000_000}),
            "20 bytes that become 2000000000",
        ),
        (pcd(XYZI, "binary_compressed", body=struct.pack("<II", 2, 48) + b"\x20\x00"), "the compressed points are damaged"),
        (pcd(XYZI, "binary_compressed")[:-3], "is the file cut off"),
        (pcd(XYZI, header={"DATA": "zipped"}), "stored as DATA zipped; known are ascii, binary and binary_compressed"),
        (pcd(XYZI, header={"TYPE": "F F"}), "of equal length"),
        (pcd(XYZI, header={"SIZE": "4 4 3 4"}), "the field z TYPE F SIZE 3; known are"),
        (pcd(XYZI, header={"SIZE": "4 4 1 4"}), "the field z TYPE F SIZE 1; known are"),
        (pcd(XYZI, header={"TYPE": "F F X F"}), "the field z TYPE X SIZE 4; known are"),
        (pcd(XYZI, header={"SIZE": "4 4 four 4"}), "a line SIZE with whole numbers"),
        (pcd(XYZI, header={"SIZE": "4 4 ² 4"}), "a line SIZE with whole numbers"),
        (pcd(XYZI, header={"COUNT": "1 1 1 0"}), "the field intensity has COUNT 0"),
        (pcd(XYZI, header={"COUNT": "1 1 1 99999999"}), "COUNT 99999999; at most"),
        (pcd(XYZI, header={"FIELDS": "a " * 600}), "names 600 fields"),
        (pcd(XYZI, header={"FIELDS": "a\x1b[2J y z i"}), r"no field x; the file has a\\x1b\[2J y z i"),
        (b"VERSION 0.7\nFIELDS x y z\n", "no line DATA"),
    ],
)  # fmt: skip
def test_broken_files_are_refused_with_the_reason(data, message):
    with pytest.raises(InvalidInput, match=message):
        read_pcd(data, ())


def test_damaged_compressed_points_never_give_another_error():
    whole = bytearray(pcd(XYZI, "binary_compressed"))
    rng = np.random.default_rng(0)
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        try:
            names, values, _ = read_pcd(bytes(data), ())
        except InvalidInput:
            continue
        assert values.shape[1] == len(names)
