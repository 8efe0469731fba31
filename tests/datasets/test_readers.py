"""Readers of other people's layouts: every box holds exactly the points that were put into it, and nothing is dropped without a count."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
import tiny_layouts
import tiny_readers
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.raw import RawDataset
from upcycle3d.datasets.readers.argoverse2 import open_argoverse2
from upcycle3d.datasets.readers.boxed import euler_matrices
from upcycle3d.datasets.readers.cvat import open_cvat
from upcycle3d.datasets.readers.json_objects import AnnotatedScans
from upcycle3d.datasets.readers.labelcloud import open_labelcloud
from upcycle3d.datasets.readers.once import open_once
from upcycle3d.datasets.readers.opening import BoxedOptions
from upcycle3d.datasets.readers.pandaset import open_pandaset
from upcycle3d.datasets.readers.sustechpoints import open_sustechpoints

OPENERS: dict[str, tuple[Callable[[Path], Path], Callable[..., RawDataset]]] = {
    "argoverse2": (tiny_readers.argoverse2, open_argoverse2),
    "once": (tiny_readers.once, open_once),
    "pandaset": (tiny_readers.pandaset, open_pandaset),
    "sustechpoints": (tiny_readers.sustechpoints, open_sustechpoints),
    "cvat": (tiny_readers.cvat, open_cvat),
    "labelcloud": (lambda root: tiny_readers.labelcloud(root, "centroid_abs"), open_labelcloud),
}
LABELS = {
    "argoverse2": "train/0a1b/annotations.feather",
    "once": "data/000076/000076.json",
    "pandaset": "001/annotations/cuboids/00.feather",
    "sustechpoints": "town/label/000950.json",
    "cvat": "ds0/ann/0001.bin.json",
    "labelcloud": "labels/scan_1.json",
}


@pytest.mark.parametrize("layout", OPENERS)
def test_boxes_hold_exactly_their_points_in_our_axes(layout, tmp_path):
    write, open_layout = OPENERS[layout]
    raw = open_layout(write(tmp_path), BoxedOptions(z_shift=1.5))
    # PandaSet's boxes are upright in the world, and its test vehicle is pitched by a degree: centers stay exact, faces move.
    tiny_readers.check(raw.source[0], z_shift=1.5, tolerance=5e-3)
    assert raw.source.origin.layout == layout
    assert all(path.is_file() for path in raw.source.files_of(raw.ids[0]))


@pytest.mark.parametrize("form", ["centroid_rel", "centroid_abs", "vertices", "kitti", "kitti_untransformed"])
def test_labelcloud_is_read_in_all_of_its_formats(form, tmp_path):
    raw = open_labelcloud(tiny_readers.labelcloud(tmp_path, form))
    tiny_readers.check(raw.source[0])
    assert raw.found.files_skipped == {"not a scan": 1}


@pytest.mark.parametrize(
    "change",
    [
        lambda corners: corners[[3, 2, 1, 0, 7, 6, 5, 4]],  # counted the other way round: mirrored
        lambda corners: corners[[0, 1, 3, 2, 4, 5, 7, 6]],  # as bits count: no round trip
        lambda corners: corners + np.eye(8, 3),  # a corner out of place
        lambda corners: corners * np.array([1, -1, 1]),  # y of the labels to the right
    ],
)
def test_vertices_of_labelcloud_in_another_order_are_refused(change, tmp_path):
    root = tiny_readers.labelcloud(tmp_path, "vertices")
    path = root / LABELS["labelcloud"]
    value = json.loads(path.read_text())
    value["objects"][1]["vertices"] = change(np.array(value["objects"][1]["vertices"])).tolist()
    path.write_text(json.dumps(value))
    with pytest.raises(InvalidInput, match=r"scan_1.json, object 1: the vertices are no box in labelCloud's order"):
        _ = open_labelcloud(root).source[0]


def test_labelcloud_asks_where_nothing_says_degrees_or_radians(tmp_path):
    root = tiny_readers.labelcloud(tmp_path, "centroid_abs")
    (root / "labels" / "_classes.json").unlink()
    with pytest.raises(InvalidInput, match="--form"):
        open_labelcloud(root)
    with pytest.raises(InvalidInput, match="degrees: give --form centroid_abs"):
        _ = open_labelcloud(root, form="centroid_rel").source[0]


def test_what_is_dropped_is_counted(tmp_path):
    bollard = open_argoverse2(tiny_readers.argoverse2(tmp_path / "a")).source[0].reading
    assert bollard.types_dropped == {"BOLLARD": 1}
    other = open_pandaset(tiny_readers.pandaset(tmp_path / "p")).source[0].reading
    assert other.types_dropped == {"Car (other LiDAR)": 1}
    mask = open_cvat(tiny_readers.cvat(tmp_path / "c")).source[0].reading
    assert mask.types_dropped == {"Tree (no cuboid)": 1}
    cars = open_sustechpoints(tiny_readers.sustechpoints(tmp_path / "s"), BoxedOptions(classes=("Car",)))
    assert cars.source[0].reading.types_dropped == {"Pedestrian": 1, "Cyclist": 1}
    assert cars.found.files_skipped == {"scan without labels": 1}  # 000965 would count as an empty road


def argoverse2_times(root: Path, change: Callable[[np.ndarray], object]) -> None:
    """Change the times of the boxes."""
    path = root / LABELS["argoverse2"]
    table = pyarrow.feather.read_table(path)
    times = pa.array(change(table["timestamp_ns"].to_numpy()))
    pyarrow.feather.write_feather(table.set_column(0, "timestamp_ns", times), str(path))


def test_boxes_of_argoverse2_whose_sweep_is_missing_are_counted_and_a_sweep_without_boxes_is_no_empty_road(tmp_path):
    root = tiny_readers.argoverse2(tmp_path)
    argoverse2_times(root, lambda times: np.where(times == times.max(), times + 1, times))
    raw = open_argoverse2(root)
    assert raw.found.files_skipped == {"box without its sweep": 4, "scan without labels": 1}
    assert raw.ids == ("0a1b_315966080359713000",)
    argoverse2_times(root, lambda times: times + 7)
    with pytest.raises(InvalidInput, match="no frame of the split train has labels"):
        open_argoverse2(root)


@pytest.mark.parametrize(
    "change", [lambda times: times.astype(float), lambda times: times.astype("M8[ns]"), lambda times: times.astype(str)]
)
def test_times_of_argoverse2_that_are_no_whole_numbers_cost_the_log_and_are_named(change, tmp_path):
    root = tiny_readers.argoverse2(tmp_path)
    argoverse2_times(root, change)
    with pytest.raises(InvalidInput, match="timestamp_ns must hold whole nanoseconds"):
        _ = open_argoverse2(root).source[0]


def test_annotations_without_scan_and_misnamed_scans_are_counted(tmp_path):
    root = tiny_readers.once(tmp_path / "o")
    path = root / LABELS["once"]
    value = json.loads(path.read_text())
    value["frames"].append(value["frames"][0] | {"frame_id": "1616343528000"})
    path.write_text(json.dumps(value))
    assert open_once(root).found.files_skipped == {"annotated frame without its scan": 1, "scan without labels": 1}
    root = tiny_readers.pandaset(tmp_path / "p")
    shutil.copy(root / "001" / "lidar" / "00.feather", root / "001" / "lidar" / "00-copy.feather")
    assert open_pandaset(root).found.files_skipped == {"file whose name is no frame number": 1}


def test_a_leaning_box_is_counted_and_keeps_center_size_and_heading(tmp_path):
    root = tiny_readers.sustechpoints(tmp_path, wrapped=True)
    path = root / LABELS["sustechpoints"]
    value = json.loads(path.read_text())
    value["objs"][0]["psr"]["rotation"] = {"x": 0.2, "y": 0.0, "z": 0.5}
    path.write_text(json.dumps(value))
    frame = open_sustechpoints(root).source[0]
    assert frame.reading.boxes_leaning == 1
    heading = math.atan2(math.cos(0.2) * math.sin(0.5), math.cos(0.5))  # first column of Rx(0.2) Rz(0.5)
    assert frame.labels.boxes.data[0].tolist() == pytest.approx([*tiny_readers.BOXES[0, :6], heading], abs=1e-5)


def test_euler_angles_are_products_of_turns_about_the_axes():
    about = []
    for axis, angle in enumerate((0.3, -0.4, 0.5)):
        turn, (i, j) = np.eye(3), ((1, 2), (2, 0), (0, 1))[axis]
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[j, i], turn[i, j] = math.sin(angle), -math.sin(angle)
        about.append(turn)
    angles = torch.tensor([[0.3, -0.4, 0.5]], dtype=torch.float64)
    assert np.allclose(euler_matrices(angles, "xyz")[0], about[0] @ about[1] @ about[2])
    assert np.allclose(euler_matrices(angles, "zyx")[0], about[2] @ about[1] @ about[0])
    assert euler_matrices(angles[:0], "xyz").shape == (0, 3, 3)


@pytest.mark.parametrize("layout", OPENERS)
@pytest.mark.parametrize("damage", ["empty", "cut", "foreign"])
def test_a_broken_label_file_costs_its_frame_and_is_named(layout, damage, tmp_path):
    write, open_layout = OPENERS[layout]
    root = write(tmp_path)
    path = root / LABELS[layout]
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "foreign": b"[[1, 2], 3]"}[damage])
    with pytest.raises(InvalidInput, match=path.name) as caught:
        _ = open_layout(root).source[0]
    assert caught.value.args[0].startswith(f"frame {open_layout(root).ids[0]}: ")


@pytest.mark.parametrize("layout", OPENERS)
def test_a_scan_that_is_cut_off_costs_its_frame_and_is_named(layout, tmp_path):
    write, open_layout = OPENERS[layout]
    raw = open_layout(write(tmp_path))
    scan = raw.source.files_of(raw.ids[0])[0]
    scan.write_bytes(scan.read_bytes()[:-7])
    with pytest.raises(InvalidInput, match=scan.name):
        _ = raw.source[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"position": {"x": 1.0, "y": 2.0}}, "psr.position must hold the numbers x y z"),
        ({"scale": {"x": 4.0, "y": 0.0, "z": 1.5}}, "sizes positive"),
        ({"position": {"x": 1e300, "y": 2.0, "z": 1.0}}, "numbers must be finite"),
        ({"rotation": {"x": 0, "y": 0, "z": True}}, "psr.rotation must hold"),
    ],
)
def test_a_broken_box_is_named_with_file_and_number(change, told, tmp_path):
    root = tiny_readers.sustechpoints(tmp_path)
    path = root / LABELS["sustechpoints"]
    value = json.loads(path.read_text())
    value[1]["psr"] |= change
    path.write_text(json.dumps(value))
    with pytest.raises(InvalidInput, match=rf"000950.json, object 1.*{told}"):
        _ = open_sustechpoints(root).source[0]


def test_a_quaternion_without_unit_length_is_refused(tmp_path):
    root = tiny_readers.argoverse2(tmp_path)
    path = root / LABELS["argoverse2"]
    table = pyarrow.feather.read_table(path)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    tiny_readers.write_feather(path, columns | {"qz": [float("nan")] * 8})
    with pytest.raises(InvalidInput, match="no unit quaternion"):
        _ = open_argoverse2(root).source[0]
    tiny_readers.write_feather(path, {name: values for name, values in columns.items() if name != "tx_m"})
    with pytest.raises(InvalidInput, match="there is no column tx_m"):
        _ = open_argoverse2(root).source[0]


def test_half_precision_sweeps_are_read(tmp_path):
    root = tiny_readers.argoverse2(tmp_path)
    path = next((root / "train/0a1b/sensors/lidar").iterdir())
    columns = {name: np.array([1.5, 2.5], np.float16) for name in "xyz"} | {"intensity": np.array([255, 0], np.uint8)}
    tiny_readers.write_feather(path, columns)
    frame = next(f for f in open_argoverse2(root).source if f.id.endswith(path.stem))
    assert frame.points.xyz.tolist() == [[1.5] * 3, [2.5] * 3]
    assert frame.points.features.tolist() == [[1.0], [0.0]]


def test_splits_are_folders_or_lists_of_drives_and_test_has_no_labels(tmp_path):
    root = tiny_readers.argoverse2(tmp_path)
    shutil.copytree(root / "train" / "0a1b", root / "val" / "0c2d")
    shutil.copytree(root / "train" / "0a1b", root / "test" / "0e3f")
    (root / "test" / "0e3f" / "annotations.feather").unlink()
    raw = open_argoverse2(root)
    assert {name: len(ids) for name, ids in raw.splits.items()} == {"train": 2, "val": 2, "test": 2}
    assert raw.unlabeled == ("test",)
    assert raw.source[4].labels is None
    assert {raw.group(i) for i in raw.splits["val"]} == {"0c2d"}
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "one.txt").write_text("0c2d\n")
    assert set(open_argoverse2(root).splits) == {"one"}
    (root / "ImageSets" / "one.txt").write_text("0c2e\n")
    with pytest.raises(InvalidInput, match="0c2e"):
        open_argoverse2(root)


def test_a_whole_split_without_labels_is_refused_and_can_be_declared(tmp_path):
    root = tiny_readers.argoverse2(tmp_path, labeled=False)
    with pytest.raises(InvalidInput, match="--unlabeled train"):
        open_argoverse2(root)
    raw = open_argoverse2(root, BoxedOptions(unlabeled=("train",)))
    assert raw.source[0].labels is None
    assert raw.unlabeled == ("train",)


def test_once_frames_without_annotations_are_left_out_and_counted(tmp_path):
    raw = open_once(tiny_readers.once(tmp_path))
    assert raw.splits == {"train": ("000076_1616343527000",)}
    assert raw.found.files_skipped == {"scan without labels": 1}
    assert dict(raw.source.origin.options)["axes"] == "-y x z"


def test_pandaset_pickles_are_never_read_and_the_error_says_how_to_convert(tmp_path):
    folder = tmp_path / "001" / "lidar"
    folder.mkdir(parents=True)
    (folder / "00.pkl.gz").write_bytes(b"not opened")
    with pytest.raises(InvalidInput, match=r"read_pickle\('00.pkl.gz'\).*to_feather"):
        open_pandaset(tmp_path)


def test_axes_of_annotated_scans_cannot_be_turned():
    with pytest.raises(InvalidInput, match="labels belong to the file's axes"):
        AnnotatedScans(read=ScanOptions(axes=("y", "-x", "z")))


def test_the_commands_prepare_each_layout(tmp_path, capsys):
    for layout, (write, _) in OPENERS.items():
        root = write(tmp_path / layout)
        code, said = tiny_layouts.prepare(capsys, layout, root, tmp_path / "out" / layout)
        assert code == 0, said
        prepared = PreparedDataset(tmp_path / "out" / layout)
        assert prepared.origin.layout == layout
        tiny_readers.check_prepared(prepared[0])


def test_one_broken_file_does_not_lose_the_other_frames(tmp_path, capsys):
    root = tiny_readers.argoverse2(tmp_path / "raw")
    first = sorted((root / "train/0a1b/sensors/lidar").iterdir())[0]
    first.write_bytes(b"ARROW1")
    code, said = tiny_layouts.prepare(capsys, "argoverse2", root, tmp_path / "out")
    assert code == 0
    assert "1 frames" in said
    assert "left out" in said
    assert first.stem in said
