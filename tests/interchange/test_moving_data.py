"""Labels and detections move to OpenPCDet and mmdetection3d and come back: boxes are equal, and so is the score."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.kitti_text import KittiObjects, read_objects, write_objects
from upcycle3d.datasets.layouts import open_kitti
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.raw import prepare_raw
from upcycle3d.datasets.simulation.layout_kitti import write_kitti_layout
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.perception.evaluation.kitti import evaluate_kitti
from upcycle3d.perception.interchange.info_files import frames_of
from upcycle3d.perception.interchange.plain_pickle import read_plain_pickle
from upcycle3d.perception.interchange.result_files import results_of, results_to
from upcycle3d.tools import export_infos, export_results, import_infos, import_results, prepare
from upcycle3d.tools.console import run_command

PROGRAMS = pytest.mark.parametrize("program", ["openpcdet", "mmdet3d"])
SMALL = replace(KITTI, sensor=replace(KITTI.sensor, elevations=KITTI.sensor.elevations[::4], azimuths=720))
DONT_CARE = "DontCare -1 -1 -10 500.25 100.5 900 200.125 -1 -1 -1 -1000 -1000 -1000 -10\n"


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> PreparedDataset:
    return tiny.prepared(tmp_path_factory.mktemp("own") / "data").open()


@pytest.fixture(scope="module")
def kitti(tmp_path_factory) -> PreparedDataset:
    """Simulated streets in KITTI's layout, with DontCare in front of the labels and a z shift."""
    root = tmp_path_factory.mktemp("kitti")
    write_kitti_layout(root / "raw", SMALL, num_frames=3, seed=5, workers=1, view="camera", splits={"train": 1, "val": 2})
    for path in (root / "raw" / "training" / "label_2").glob("*.txt"):
        path.write_text(DONT_CARE + path.read_text())
    prepare_raw(open_kitti(root / "raw", classes=("Car", "Pedestrian"), z_shift=1.73), root / "data", workers=0)
    return PreparedDataset(root / "data", "val")


def run(tool, *arguments: object) -> int:
    return run_command(tool.command, [str(argument) for argument in arguments])


@PROGRAMS
def test_own_data_goes_there_and_comes_back_with_the_same_boxes_and_points(own, tmp_path, capsys, program):
    assert run(export_infos, program, "--data", f"{own.root}:train", "--out", tmp_path / "there") == 0
    file = tmp_path / "there" / "custom_infos_train.pkl"
    assert pickle.loads(file.read_bytes())  # what the other program does
    back = tmp_path / "back"
    assert run(import_infos, file, "--split", "train", "--points", tmp_path / "there" / "points", "--out", back) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"next: upcycle3d prepare folder {back} --out DIR --classes Car" in said
    options = ("--columns", "x", "y", "z", *own.feature_names)
    assert run(prepare, "folder", back, "--out", tmp_path / "again", "--classes", "Car", *options) == 0
    again = PreparedDataset(tmp_path / "again", "train")
    assert again.ids == own.ids
    for before, after in zip(own, again, strict=True):
        assert torch.equal(before.points.xyz, after.points.xyz)
        assert torch.equal(before.labels.classes, after.labels.classes)
        assert torch.allclose(before.labels.boxes.data, after.labels.boxes.data, atol=1e-6)


def test_a_box_of_mmdetection3d_has_the_height_of_its_bottom(own, tmp_path):
    for program in ("openpcdet", "mmdet3d"):
        assert run(export_infos, program, "--data", f"{own.root}:train", "--out", tmp_path / program) == 0
    center = pickle.loads((tmp_path / "openpcdet" / "custom_infos_train.pkl").read_bytes())[0]["annos"]["gt_boxes_lidar"][0]
    bottom = pickle.loads((tmp_path / "mmdet3d" / "custom_infos_train.pkl").read_bytes())["data_list"][0]["instances"][0][
        "bbox_3d"
    ]
    expected = center.copy()
    expected[2] -= expected[5] / 2
    assert bottom == pytest.approx(expected.tolist())


@PROGRAMS
def test_kitti_keeps_every_line_and_its_boxes_lie_in_the_frame_of_the_sensor(kitti, tmp_path, program):
    assert run(export_infos, program, "--data", f"{kitti.root}:val", "--out", tmp_path / "there") == 0
    content = read_plain_pickle(tmp_path / "there" / "kitti_infos_val.pkl")
    frames = frames_of(content)
    assert [frame.id for frame in frames] == list(kitti.ids)
    for index, frame in enumerate(frames):
        lines = kitti.kitti_objects(frame.id)
        assert sorted(frame.types) == sorted(kind for kind in lines.types if kind != "DontCare")
        assert frame.dropped == 1
        labels = kitti[index].labels
        expected = kitti.rig.to_sensor(labels.boxes.data)
        of_classes = frame.boxes[[kind in ("Car", "Pedestrian") for kind in frame.types]]
        assert np.allclose(of_classes, expected.numpy()[labels.weight.numpy() > 0], atol=1e-4)
    if program == "openpcdet":
        annos, lines = content[0]["annos"], kitti.kitti_objects(frames[0].id)
        assert annos["name"][-1] == "DontCare"
        assert annos["dimensions"][0].tolist() == lines.dimensions[1][[2, 0, 1]].tolist()
        assert annos["num_points_in_gt"][-1] == -1
        assert annos["num_points_in_gt"][:-1].max() > 0
        assert content[0]["calib"]["P2"].shape == (4, 4)


@PROGRAMS
def test_results_score_equal_after_the_way_there_and_back(kitti, tmp_path, program):
    generator = torch.Generator().manual_seed(1)
    labels, detections = [], {}
    for name in kitti.ids:
        lines = kitti.kitti_objects(name)
        labels.append(lines)
        own = lines.select(torch.tensor([kind in ("Car", "Pedestrian") for kind in lines.types]))
        moved = own.location + 0.05 * torch.rand(own.location.shape, generator=generator, dtype=torch.float64)
        detections[name] = replace(own, location=moved, scores=torch.rand(len(own), generator=generator, dtype=torch.float64))
        write_objects(tmp_path / "ours" / f"{name}.txt", detections[name])
    assert run(export_results, program, "--detections", tmp_path / "ours", "--out", tmp_path / "result.pkl") == 0
    assert run(import_results, tmp_path / "result.pkl", "--out", tmp_path / "back") == 0
    before, after = (
        evaluate_kitti(
            labels, [read_objects(tmp_path / folder / f"{name}.txt") for name in kitti.ids], classes=("Car", "Pedestrian")
        )
        for folder in ("ours", "back")
    )
    assert before.classes["Car"].box_3d.r40[2] > 0
    assert before.to_json() == after.to_json()
    for name in kitti.ids:
        assert (tmp_path / "back" / f"{name}.txt").read_bytes() == (tmp_path / "ours" / f"{name}.txt").read_bytes()
    with pytest.raises(InvalidInput, match="a score is missing"):
        results_to(program, {"000001": labels[0]})


def test_a_frame_without_a_detection_has_a_name_in_openpcdet_only():
    empty = KittiObjects.from_columns((), torch.zeros(0, 15, dtype=torch.float64))
    assert list(results_of(results_to("openpcdet", {"000007": empty}))) == ["000007"]
    with pytest.raises(InvalidInput, match="names no frame"):
        results_of(results_to("mmdet3d", {"000007": empty}))
    with pytest.raises(InvalidInput, match="is no number"):
        results_to("mmdet3d", {"scan": empty})


def info(**changes: object) -> dict[str, object]:
    annos = {"name": np.array(["Car"]), "gt_boxes_lidar": np.array([[1.0, 2, 3, 4, 2, 1.5, 0]])}
    return {"point_cloud": {"num_features": 4, "lidar_idx": "a"}, "annos": annos | changes}


def mmdet3d_info(meta: dict[str, object]) -> dict[str, object]:
    instance = {"bbox_3d": [1.0, 2, 3, 4, 2, 1.5, 0], "bbox_label_3d": 0}
    return {"metainfo": meta, "data_list": [{"lidar_points": {"lidar_path": "a.bin"}, "instances": [instance]}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([info(gt_boxes_lidar=np.full((1, 7), np.nan))], "not finite"),
        ([info(gt_boxes_lidar=np.zeros((1, 7)))], "not positive"),
        ([info(gt_boxes_lidar=np.zeros((3, 7)))], "has 1 names and 3 boxes"),
        ([info(gt_boxes_lidar="none")], "another form"),
        ([info(name=np.array(["a b"]))], "names of one word"),
        ([info(), info()], "names a frame twice"),
        ([info() | {"point_cloud": {"lidar_idx": "../up"}}], "frame id"),
        ({"Car": [{"path": "x"}]}, "objects to paste"),
        ([3], "no info file that is known"),
        ({"metainfo": {}, "data_list": [{"sample_idx": 3}]}, "another form"),
        ([], "no info file that is known"),
        ({"metainfo": {"categories": {"Car": 0}}, "data_list": []}, "holds no frame"),
        (mmdet3d_info({"dataset": "custom"}), "does not name its classes"),
        (mmdet3d_info({"dataset": "Waymo", "categories": {"Car": 0}}), "infos of waymo do not say"),
        (mmdet3d_info({"dataset": "KITTI", "categories": {"Car": 0}}), "KeyError('images')"),  # no box of a LiDAR
    ],
)
def test_other_content_is_refused_and_nothing_is_written(tmp_path, capsys, content, message):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    assert run(import_infos, tmp_path / "x.pkl", "--split", "train", "--out", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_infos_of_nuscenes_name_the_center_and_unlabeled_frames_get_no_label_file(tmp_path):
    box = {"bbox_3d": [1.0, 2, 3, 4, 2, 1.5, 0, 0.1, 0.2], "bbox_label_3d": 0}
    other = {"bbox_3d": [1.0, 2, 3, 4, 2, 1.5, 0], "bbox_label_3d": -1}
    scans = [{"lidar_points": {"lidar_path": "d/s1.bin"}, "instances": [box, other]}, {"lidar_points": {"lidar_path": "s2.bin"}}]
    for dataset, z in (("nuscenes", 3.0), ("mine", 3.75)):
        content = {"metainfo": {"categories": {"car": 0}, "dataset": dataset}, "data_list": scans}
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
        out, report = tmp_path / dataset, tmp_path / "report.json"
        assert run(import_infos, tmp_path / "x.pkl", "--split", "train", "--out", out, "--json", report) == 0
        assert (out / "labels" / "s1.txt").read_text().split() == ["car", "1", "2", f"{z:g}", "4", "2", "1.5", "0"]
        assert not (out / "labels" / "s2.txt").exists()
        assert (out / "splits" / "train.txt").read_text() == "s1\ns2\n"
        assert json.loads(report.read_text()) == {"frames": 2, "objects": {"car": 1}, "left_out": 1, "unlabeled": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([info()], "OpenPCDet's: their center"),
        (
            mmdet3d_info({"dataset": "nuscenes", "categories": {"Car": 0}}),
            "x points to the right and y forward: give `prepare folder` --axes y -x z",
        ),
        (mmdet3d_info({"dataset": "mine", "categories": {"Car": 0}}), "bottom face, .* the dataset 'mine'"),
    ],
)
def test_the_import_says_how_it_understood_the_boxes(tmp_path, capsys, content, said):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    assert run(import_infos, tmp_path / "x.pkl", "--split", "train", "--out", tmp_path / "out") == 0
    assert re.search(said, " ".join(capsys.readouterr().out.split()))


def test_labels_and_scans_of_another_split_are_not_replaced(tmp_path, capsys):
    for name, x in (("first", 1.0), ("second", 5.0)):
        (tmp_path / name).mkdir()
        content = [info(gt_boxes_lidar=np.array([[x, 2, 3, 4, 2, 1.5, 0]]))]
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
    out = tmp_path / "out"
    first = [tmp_path / "first.pkl", "--split", "train", "--points", tmp_path / "first", "--out", out]
    assert run(import_infos, *first) == run(import_infos, *first) == 0  # the same again changes nothing
    assert run(import_infos, tmp_path / "second.pkl", "--split", "val", "--out", out) == 2
    assert "a.txt is there already with other labels" in " ".join(capsys.readouterr().err.split())
    assert (out / "labels" / "a.txt").read_text().split()[1] == "1"
    assert run(import_infos, *first[:3], "--points", tmp_path / "second", "--out", out) == 2
    assert "is not" in capsys.readouterr().err
    (out / "points").unlink()
    (out / "points").symlink_to(tmp_path / "gone")
    assert run(import_infos, *first) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": np.array(["Person sitting"])}, "is no word"),
        ({"name": np.array("Car")}, "no list of classes"),
        ({"name": None}, "no list of classes"),
        ({"rotation_y": np.array([np.nan])}, "NaN or inf in rotation_y"),
    ],
)
def test_results_that_kittis_text_cannot_hold_are_refused(change, message):
    columns = {name: np.ones((1, 4)) if name == "bbox" else np.ones((1, 3)) for name in ("bbox", "dimensions", "location")}
    columns |= {name: np.ones(1) for name in ("truncated", "occluded", "alpha", "rotation_y", "score")}
    entry = {"name": np.array(["Car"]), "frame_id": np.int64(4)} | columns
    assert list(results_of([entry])) == ["000004"]
    with pytest.raises(InvalidInput, match=message):
        results_of([entry | change])
    with pytest.raises(InvalidInput, match="no list of detections"):
        results_of([])


def test_detections_are_not_written_among_older_ones(tmp_path, capsys):
    empty = KittiObjects.from_columns((), torch.zeros(0, 15, dtype=torch.float64))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(results_to("openpcdet", {"000007": empty})))
    assert run(import_results, tmp_path / "x.pkl", "--out", tmp_path / "out") == 0
    assert run(import_results, tmp_path / "x.pkl", "--out", tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err


def test_an_existing_folder_is_not_written_to(own, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    assert run(export_infos, "openpcdet", "--data", f"{own.root}:train", "--out", tmp_path / "there") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in Path(tmp_path / "there").iterdir()] == ["mine"]
