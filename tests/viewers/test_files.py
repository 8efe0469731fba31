"""PLY and glTF files, read back by plain parsers written here, and by other readers where they are installed; recordings by Rerun itself."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import viewers_scene

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Labels
from upcycle3d.perception.viewers import gltf as gltf_module
from upcycle3d.perception.viewers.colors import LAYER_COLORS, FeatureColors, height_span
from upcycle3d.perception.viewers.drawn_frame import BOX_EDGES, DrawnFrame
from upcycle3d.perception.viewers.gltf import write_gltf
from upcycle3d.perception.viewers.ply import write_ply
from upcycle3d.perception.viewers.rerun_file import write_rerun

FRAME = viewers_scene.frame()
POINTS = FRAME.points_to_draw()
NOTHING = DrawnFrame(id="nothing", class_names=())
OUTLINES = np.concatenate([layer.outline().reshape(-1, 3) for layer in FRAME.layers()])


def ply(folder: Path, frame: DrawnFrame) -> tuple[Path, ...]:
    return write_ply(folder, frame, heights=height_span([frame]), feature_colors=FeatureColors.of([frame]))


def read_ply(path: Path) -> dict[str, np.ndarray]:
    """The tables of a binary PLY file by element, read by the words of its header."""
    head, _, body = path.read_bytes().partition(b"end_header\n")
    lines = head.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    kinds = {"float": "<f4", "uchar": "u1", "int": "<i4"}
    tables: dict[str, Any] = {}
    for words in map(str.split, lines[2:]):
        if words[0] == "element":
            tables[words[1]] = (int(words[2]), [])
        elif words[0] == "property":
            tables[list(tables)[-1]][1].append((words[2], kinds[words[1]]))
    found = {}
    for name, (count, columns) in tables.items():
        size = count * np.dtype(columns).itemsize
        found[name], body = np.frombuffer(body[:size], columns), body[size:]
        assert len(found[name]) == count
    assert body == b""
    return found


def xyz_of(table: np.ndarray) -> np.ndarray:
    return np.stack([table[axis] for axis in "xyz"], 1)


def test_ply_files_hold_points_cells_and_the_edges_of_boxes(tmp_path):
    files = ply(tmp_path, FRAME)
    assert [path.name for path in files] == ["a.points.ply", "a.cells.ply", "a.boxes.ply"]
    points, cells, boxes = map(read_ply, files)
    np.testing.assert_array_equal(xyz_of(points["vertex"]), POINTS.xyz)
    np.testing.assert_array_equal(points["vertex"]["intensity"], POINTS.intensity)
    assert len(np.unique(points["vertex"]["green"])) > 3  # colored by height
    np.testing.assert_array_equal(xyz_of(cells["vertex"]), FRAME.cells_to_draw().centers)
    np.testing.assert_array_equal(xyz_of(boxes["vertex"]), OUTLINES)
    edges = boxes["edge"]
    assert len(edges) == 5 * len(BOX_EDGES)
    drawn = list(zip(edges["vertex1"].tolist(), edges["vertex2"].tolist(), strict=True))
    assert drawn == [(10 * box + a, 10 * box + b) for box in range(5) for a, b in BOX_EDGES]
    assert tuple(int(edges[-1][name]) for name in ("red", "green", "blue")) == LAYER_COLORS["pasted"]


def test_ply_files_of_nothing_are_not_written_and_an_empty_layer_is(tmp_path):
    assert ply(tmp_path, NOTHING) == ()
    (path,) = ply(tmp_path, replace(NOTHING, truth=Labels.empty()))
    assert {name: len(table) for name, table in read_ply(path).items()} == {"vertex": 0, "edge": 0}
    with pytest.raises(InvalidInput, match="cannot be a file name"):
        ply(tmp_path, replace(FRAME, id="../out"))


def test_other_readers_read_the_ply_files(tmp_path):
    plyfile = pytest.importorskip("plyfile", reason="not checked: PLY files by another reader. It needs the package plyfile")
    points, _, boxes = ply(tmp_path, FRAME)
    np.testing.assert_array_equal(plyfile.PlyData.read(points)["vertex"]["x"], POINTS.xyz[:, 0])
    assert plyfile.PlyData.read(boxes)["edge"].count == 5 * len(BOX_EDGES)


def read_glb(path: Path) -> tuple[dict[str, Any], bytes]:
    """JSON and numbers of a binary glTF file, after checking its frame: magic word, version, lengths, alignment."""
    data = path.read_bytes()
    assert struct.unpack("<4sII", data[:12]) == (b"glTF", 2, len(data))
    chunks, at = {}, 12
    while at < len(data):
        length, kind = struct.unpack("<I4s", data[at : at + 8])
        assert length % 4 == 0
        chunks[kind] = data[at + 8 : at + 8 + length]
        at += 8 + length
    return json.loads(chunks[b"JSON"]), chunks.get(b"BIN\0", b"")


def array_of(gltf: dict[str, Any], numbers: bytes, index: int) -> np.ndarray:
    accessor = gltf["accessors"][index]
    view = gltf["bufferViews"][accessor["bufferView"]]
    width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
    kind = {5121: "u1", 5125: "<u4", 5126: "<f4"}[accessor["componentType"]]
    assert view["byteOffset"] % 4 == 0
    part = numbers[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
    return np.frombuffer(part, kind).reshape(accessor["count"], width)


def test_a_gltf_file_holds_a_scene_for_each_frame(tmp_path):
    size = write_gltf(tmp_path / "a.glb", [FRAME, replace(FRAME, id="b", points=None), NOTHING])
    assert size == (tmp_path / "a.glb").stat().st_size
    gltf, numbers = read_glb(tmp_path / "a.glb")
    assert (gltf["asset"]["version"], gltf["scene"]) == ("2.0", 0)
    assert [scene["name"] for scene in gltf["scenes"]] == ["a", "b", "nothing"]
    assert gltf["buffers"] == [{"byteLength": len(numbers)}]
    root = gltf["nodes"][gltf["scenes"][0]["nodes"][0]]
    parts = {gltf["nodes"][child]["name"]: gltf["nodes"][child] for child in root["children"]}
    assert list(parts) == ["points", "occupied cells", "truth", "detections", "teacher labels", "pasted objects"]
    (points,) = gltf["meshes"][parts["points"]["mesh"]]["primitives"]
    assert points["mode"] == 0
    found = array_of(gltf, numbers, points["attributes"]["POSITION"])
    np.testing.assert_array_equal(found, POINTS.xyz)
    assert gltf["accessors"][points["attributes"]["POSITION"]]["min"] == POINTS.xyz.min(0).tolist()
    assert set(array_of(gltf, numbers, points["attributes"]["COLOR_0"])[:, 3]) == {255}
    (boxes,) = gltf["meshes"][parts["detections"]["mesh"]]["primitives"]
    edges = array_of(gltf, numbers, boxes["indices"]).reshape(-1, 2)
    assert (boxes["mode"], edges.tolist()) == (1, [[10 * box + a, 10 * box + b] for box in range(2) for a, b in BOX_EDGES])
    assert [(box["class"], round(box["score"], 2)) for box in parts["detections"]["extras"]["boxes"]] == [
        ("Car", 0.9),
        ("Van", 0.4),
    ]
    # glTF has y up and looks along -z: our x, y, z must become these axes, without a mirror.
    turn = np.array(root["matrix"]).reshape(4, 4).T[:3, :3]
    np.testing.assert_array_equal(turn @ np.eye(3), np.array([[0, -1, 0], [0, 0, 1], [-1, 0, 0]]))
    assert np.linalg.det(turn) == 1


def test_other_readers_read_the_gltf_file(tmp_path):
    trimesh = pytest.importorskip("trimesh", reason="not checked: glTF files by another reader. It needs the package trimesh")
    write_gltf(tmp_path / "a.glb", [FRAME])
    scene = trimesh.load_scene(tmp_path / "a.glb")
    clouds = [shape for shape in scene.geometry.values() if len(shape.vertices) == 200]
    np.testing.assert_allclose(clouds[0].vertices, POINTS.xyz)


def test_gltf_files_of_nothing_are_refused_or_whole_and_large_ones_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match="at least one frame"):
        write_gltf(tmp_path / "a.glb", [])
    write_gltf(tmp_path / "a.glb", [replace(NOTHING, truth=Labels.empty())])
    gltf, numbers = read_glb(tmp_path / "a.glb")
    assert (len(gltf["nodes"]), numbers) == (1, b"")
    assert [] not in gltf.values()  # the format allows no empty list
    monkeypatch.setattr(gltf_module, "MOST_GLTF_BYTES", 1000)
    with pytest.raises(InvalidInput, match="draw fewer frames"):
        write_gltf(tmp_path / "b.glb", [FRAME])
    assert not (tmp_path / "b.glb").exists()


def test_a_recording_is_whole_and_holds_every_entity(tmp_path):
    pytest.importorskip("rerun", reason="not checked: recordings for Rerun. They need the extra `viz`")
    path = tmp_path / "a.rrd"
    size = write_rerun(path, [FRAME, NOTHING, replace(FRAME, id="b", pasted=None)], title="three frames")
    assert size == path.stat().st_size > 2000
    assert [file.name for file in tmp_path.iterdir()] == ["a.rrd"]
    program = [sys.executable, "-m", "rerun", "rrd"]
    subprocess.run([*program, "verify", str(path)], check=True, capture_output=True, timeout=60)
    said = subprocess.run([*program, "print", "-v", str(path)], check=True, capture_output=True, text=True, timeout=60).stdout
    for name in ("points", "cells", "truth", "detections", "teacher", "pasted"):
        assert f"/world/{name}" in said
    with pytest.raises(InvalidInput, match="at least one frame"):
        write_rerun(path, [], title="none")


def test_without_rerun_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(InvalidInput, match=r"rerun-sdk, which is not installed; install it with: pip install .*\[viz\]"):
        write_rerun(tmp_path / "a.rrd", [FRAME], title="a")
    assert list(tmp_path.iterdir()) == []
