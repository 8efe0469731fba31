"""``evaluate waymo``, ``evaluate lyft`` and the protocols of ``evaluate run``: from files to a table and JSON, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.detection_json import boxes_json
from upcycle3d.core.strict_json import json_digest
from upcycle3d.core.structures import Boxes3D, Labels, PointCloud, Predictions
from upcycle3d.perception.evaluation.protocols import LabeledDetections, score_lyft, score_waymo, waymo_objects
from upcycle3d.perception.evaluation.waymo_objects import write_waymo_objects
from upcycle3d.tools import evaluate, prepare
from upcycle3d.tools.console import run_command


def run(*arguments: object) -> int:
    return run_command(evaluate.command, [str(a) for a in arguments])


def record(x: float, kind: str = "Vehicle", **more: object) -> dict[str, object]:
    return {"class": kind, "x": x, "y": 0, "z": 0, "dx": 4, "dy": 2, "dz": 1.5, "yaw": 0.5} | more


META = {"ledger", "types", "warnings", "notes"}


def scores(result: dict[str, Any]) -> list[str]:
    """The classes of a result, without what the command says about them."""
    assert set(result) >= META
    return [name for name in result if name not in META]


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def waymo(tmp_path: Path) -> tuple[object, ...]:
    """Two frames: one vehicle found and a wrong one in a no-label zone; one hard vehicle missed and one without points."""
    zone = [[18, -2], [22, -2], [22, 2], [18, 2]]
    objects = [record(5, level=1), record(8, "Sign", num_points=9)]
    header = {"context_name": "1024", "timestamp_micros": 7}
    write(tmp_path / "labels" / "a.json", {"objects": objects, "no_label_zones": [zone], **header})
    write(tmp_path / "labels" / "b.json", [record(35, num_points=5), record(45, num_points=0)])
    write(tmp_path / "found" / "a.json", [record(20, score=0.9), record(5, "Car", score=0.8), record(8, "Sign", score=0.8)])
    write(tmp_path / "found" / "b.json", [])
    return ("waymo", "--labels", tmp_path / "labels", "--detections", tmp_path / "found", "--json", tmp_path / "result.json")


def test_waymo_scores_a_folder_of_json_files(
    waymo: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*waymo) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert scores(result) == ["Vehicle", "Pedestrian", "Cyclist"]
    assert result["Vehicle"]["all"]["LEVEL_1"] == {"ap": pytest.approx(100), "aph": pytest.approx(100), "ground_truths": 1}
    assert result["Vehicle"]["all"]["LEVEL_2"] == {"ap": pytest.approx(50), "aph": pytest.approx(50), "ground_truths": 2}
    assert result["Vehicle"]["[30, 50)"]["LEVEL_2"]["ap"] == 0
    assert result["Cyclist"]["all"]["LEVEL_1"]["ap"] is None
    printed = capsys.readouterr().out
    assert "Waymo AP and APH" in printed
    assert "2 frames; minimum 3D overlap: Vehicle 0.7" in printed


def test_waymo_scores_the_frames_and_classes_asked_for(waymo: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a\n")
    assert run(*waymo, "--ids", tmp_path / "ids.txt", "--classes", "Sign", "Vehicle") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["Sign"]["all"]["LEVEL_1"]["ap"] == pytest.approx(100)
    assert result["Vehicle"]["all"]["LEVEL_2"]["ground_truths"] == 1


def test_waymo_writes_the_official_message(waymo: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids.txt").write_text("a\n")
    assert run(*waymo, "--ids", tmp_path / "ids.txt", "--objects", tmp_path / "objects.bin") == 0
    data = (tmp_path / "objects.bin").read_bytes()
    assert data.count(b"\x22\x041024\x28\x07") == 2  # context and time of two vehicles; the sign was not asked for
    assert run(*waymo, "--objects", tmp_path / "other.bin") == 2
    assert "frame b has no context_name" in capsys.readouterr().err
    assert not (tmp_path / "other.bin").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels", [record(5)], "expected a level of 1 or 2, or num_points"),
        ("labels", [record(5, level=3)], "expected a level of 1 or 2"),
        ("labels", [record(5, "Tree", level=1)], "unknown class 'Tree'; known are Vehicle"),
        ("labels", {"boxes": []}, "must hold a list of boxes, found NoneType"),
        ("labels", {"objects": [], "no_label_zones": [[1]]}, "must be a list of polygons"),
        ("labels", {"objects": [], "timestamp_micros": "now"}, "timestamp_micros a whole number"),
        ("found", [record(5)], "expected a score from 0 to 1, found None"),
        ("found", [record(5, score=1, dx=0)], "positive sizes"),
        ("found", [record(5, score=1, yaw="left")], "expected numbers x, y, z"),
        ("found", [7], "object 0: expected numbers"),
    ],
)
def test_a_broken_file_is_named(
    waymo: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: object, message: str
) -> None:
    write(tmp_path / name / "b.json", content)
    assert run(*waymo) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"{tmp_path / name / 'b.json'}" in error
    assert not (tmp_path / "result.json").exists()


def test_a_missing_detection_file_or_folder_is_an_error(
    waymo: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "found" / "b.json").unlink()
    assert run(*waymo) == 2
    assert "write [] for a frame without any" in capsys.readouterr().err
    assert run("waymo", "--labels", tmp_path / "nowhere", "--detections", tmp_path / "found") == 2
    assert "no label files ID.json" in capsys.readouterr().err


def test_lyft_scores_two_json_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item: dict[str, Any] = {
        "sample_token": "t",
        "translation": [1, 2, 3],
        "size": [2, 4, 1.5],
        "rotation": [1, 0, 0, 0],
        "name": "car",
    }
    write(tmp_path / "truths.json", [item, item | {"translation": [11, 2, 3]}, item | {"name": "bus"}])
    write(tmp_path / "found.json", [item | {"score": 0.5}])
    files = ("--labels", tmp_path / "truths.json", "--detections", tmp_path / "found.json", "--json", tmp_path / "result.json")
    assert run("lyft", *files) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["mAP"] == pytest.approx(25)
    assert result["classes"]["car"] == {"AP": pytest.approx(50), "by_overlap": [50.0] * 10, "ground_truths": 2}
    assert "Lyft AP in percent" in capsys.readouterr().out
    assert run("lyft", *files, "--classes", "car", "animal") == 0
    assert json.loads((tmp_path / "result.json").read_text())["mAP"] == pytest.approx(50)


def test_lyft_reads_the_sdks_own_files(tmp_path: Path) -> None:
    samples = tiny.shared("data/lyft/map_test_jsons", "the command scores the sample files of Lyft's SDK")
    files = ("--labels", samples / "all_class_gt.json", "--detections", samples / "test_file_with_all_classes.json")
    assert run("lyft", *files, "--json", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["mAP"], len(result["classes"])) == (100, 9)


class SeesEverything:
    """A detector that finds the one car of the test's scans, at 10 m ahead, the sensor raised by 2 m."""

    class_names = ("Pedestrian", "Car")
    decoder = torch.nn.Identity()  # it has no experts whose use is counted

    def to(self, device: torch.device) -> "SeesEverything":
        return self

    def eval(self) -> None:
        pass

    def detect(self, clouds: list[PointCloud]) -> list[Predictions]:
        one = torch.ones(1)
        boxes = Boxes3D(data=torch.tensor([[10.0, 0, 1, 4, 2, 1.5, 0.1]]))
        return [
            Predictions(boxes=boxes, classes=torch.tensor([1]), scores=0.9 * one, class_scores=one, iou_scores=one)
            for _ in clouds
        ]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three scans of a folder with one car each, prepared with the sensor at 2 m, and a detector that sees it."""
    raw = tmp_path / "raw"
    for folder in ("points", "labels"):
        (raw / folder).mkdir(parents=True)
    for name in ("a", "b", "c"):
        rows = np.array([[10, 0.1 * i, -1, 0.5] for i in range(9)], np.float32)
        (raw / "points" / f"{name}.bin").write_bytes(rows.tobytes())
        (raw / "labels" / f"{name}.txt").write_text("car 10 0 -1 4 2 1.5 0.1\n")
    data = tmp_path / "data"
    options = ("--z-shift", 2, "--classes", "car", "--workers", 1, "--out", data)
    assert run_command(prepare.command, ["folder", str(raw), *map(str, options)]) == 0
    monkeypatch.setattr(evaluate, "load_detector", lambda path: SeesEverything())
    return data


def lay_out(data: Path, layout: str) -> None:
    header = json.loads((data / "dataset.json").read_text())
    header["origin"]["layout"] = layout
    header["digest"] = json_digest(header)
    (data / "dataset.json").write_text(json.dumps(header))


def evaluate_run(data: Path, *more: object) -> Any:
    out = data.parent / "result.json"
    assert run("run", "--detector", "any", "--data", f"{data}:all", "--json", out, *more) == 0
    return json.loads(out.read_text())


def test_a_dataset_is_scored_by_its_own_protocol(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_out(prepared, "waymo")
    result = evaluate_run(prepared)
    assert scores(result) == ["Pedestrian", "Vehicle"]
    assert result["Vehicle"]["[0, 30)"]["LEVEL_1"] == {"ap": pytest.approx(100), "aph": pytest.approx(100), "ground_truths": 3}
    assert result["Pedestrian"]["all"]["LEVEL_1"]["ap"] is None
    lay_out(prepared, "lyft")
    assert evaluate_run(prepared)["classes"]["car"]["AP"] == pytest.approx(100)
    lay_out(prepared, "kitti")
    assert run("run", "--detector", "any", "--data", f"{prepared}:all") == 2  # its label files are not there
    assert "no label file" in capsys.readouterr().err


def test_another_protocol_may_be_asked_for(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_out(prepared, "waymo")
    result = evaluate_run(prepared, "--protocol", "cross_dataset")
    assert scores(result) == ["Car"]
    assert result["Car"]["3d"]["R11"]["easy"] == result["Car"]["3d"]["R11"]["hard"] > 0  # three objects fill three samples
    printed = capsys.readouterr().out
    assert "bev" in printed
    assert "bbox" not in printed  # of boxes that were made up
    assert set(result["Car"]) == {"3d", "bev"}
    assert evaluate_run(prepared, "--protocol", "lyft")["mAP"] == pytest.approx(100)
    assert run("run", "--detector", "any", "--data", f"{prepared}:all", "--protocol", "kitti") == 2
    assert "--protocol cross_dataset is KITTI's AP without them" in capsys.readouterr().err


def test_a_layout_without_a_protocol_asks_for_one(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--detector", "any", "--data", f"{prepared}:all") == 2
    assert (
        "the layout 'folder', which has no protocol of its own; choose one with --protocol: cross_dataset fits"
        in capsys.readouterr().err
    )
    assert evaluate_run(prepared, "--protocol", "waymo")["Vehicle"]["all"]["LEVEL_2"]["ap"] == pytest.approx(100)


def test_detections_of_a_run_are_written_in_the_sensors_frame_and_score_the_same(prepared: Path, tmp_path: Path) -> None:
    result = evaluate_run(prepared, "--protocol", "waymo", "--detections", tmp_path / "found")
    found = json.loads((tmp_path / "found" / "a.json").read_text())
    assert (found[0]["class"], found[0]["z"]) == ("Car", -1)
    for name in ("a", "b", "c"):
        write(tmp_path / "boxes" / f"{name}.json", [{k: v for k, v in found[0].items() if k != "score"} | {"num_points": 9}])
    options = ("--labels", tmp_path / "boxes", "--detections", tmp_path / "found", "--json", tmp_path / "again.json")
    assert run("waymo", *options, "--classes", "Pedestrian", "Vehicle") == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert {name: again[name] for name in scores(again)} == {name: result[name] for name in scores(result)}


def test_a_run_writes_the_official_message_of_frames_that_say_their_time(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--objects", tmp_path / "objects.bin")
    one = ("run", "--detector", "any", "--data", f"{prepared}:all", *out)
    assert run(*one, "--protocol", "waymo") == 2
    assert "frame ids CONTEXT_TIMESTAMP" in capsys.readouterr().err
    assert run(*one, "--protocol", "lyft") == 2
    assert "the protocol here is lyft" in capsys.readouterr().err
    found = SeesEverything().detect([PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1))])
    named = LabeledDetections(
        ids=("10_24_7",),
        labels=(Labels.empty(),),
        predictions=tuple(found),
        label_classes=(),
        detector_classes=("Pedestrian", "Car"),
    )
    frames, classes = waymo_objects(named)
    write_waymo_objects(tmp_path / "objects.bin", frames, classes=classes)
    assert (tmp_path / "objects.bin").read_bytes().endswith(b"\x22\x0510_24\x28\x07")


def test_waymo_and_lyft_know_no_ignored_labels() -> None:
    boxes = torch.tensor([[10.0, 0, 1, 4, 2, 1.5, 0.1], [20.0, 0, 1, 4, 2, 1.5, 0.1]])
    labels = Labels.make(boxes, torch.zeros(2), num_points=torch.full((2,), 9), weight=torch.tensor([1.0, 0]))
    found = SeesEverything().detect([PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1))])
    both = LabeledDetections(
        ids=("a",), labels=(labels,), predictions=tuple(found), label_classes=("car",), detector_classes=("Pedestrian", "car")
    )
    assert score_waymo(both, difficulty_is_level=False).classes["Vehicle"]["all"]["LEVEL_1"].ground_truths == 1
    assert score_lyft(both).ground_truths == {"pedestrian": 0, "car": 1}


def test_labels_are_what_predict_writes_plus_a_level(tmp_path: Path) -> None:
    found = SeesEverything().detect([PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1))])[0]
    records = boxes_json(found, SeesEverything.class_names)
    write(tmp_path / "found" / "a.json", records)
    write(tmp_path / "labels" / "a.json", [r | {"level": 1} for r in records])
    assert run("waymo", "--labels", tmp_path / "labels", "--detections", tmp_path / "found", "--json", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["Vehicle"]["all"]["LEVEL_1"]["ap"] == pytest.approx(100)
