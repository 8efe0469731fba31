"""What `evaluate` says beside its scores: nothing is scored, left out or 0 without a sentence that says why."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from upcycle3d.tools import evaluate
from upcycle3d.tools.console import run_command

LABEL = "{kind} {truncated} {occluded} -1.5 {box} 1.5 1.7 4.2 {x} 1.6 {z} -1.57"


def line(
    i: int, *, kind: str = "Car", box: str = "500 150 600 250", truncated: float = 0, occluded: int = 0, score: Any = ""
) -> str:
    text = LABEL.format(kind=kind, truncated=truncated, occluded=occluded, box=box, x=-8 + 4 * (i % 5), z=10 + 6 * (i // 5))
    return f"{text} {score}".strip()


class Files:
    """Label and detection files of a few frames, and the command that scores them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.ids: list[str] = []

    def frame(self, labels: list[str], found: list[str], name: str | None = None) -> None:
        frame_id = name or f"{len(self.ids):06d}"
        self.ids.append(frame_id)
        for part, lines in (("labels", labels), ("found", found)):
            (self.folder / part).mkdir(exist_ok=True)
            (self.folder / part / f"{frame_id}.txt").write_text("".join(f"{text}\n" for text in lines))

    def score(self, *more: str, code: int = 0) -> tuple[dict[str, Any], str]:
        (self.folder / "ids.txt").write_text("\n".join(self.ids))
        names = ("--labels", "labels"), ("--detections", "found"), ("--ids", "ids.txt"), ("--json", "result.json")
        words = [word for option, name in names for word in (option, str(self.folder / name))]
        assert run_command(evaluate.command, ["kitti", *words, *more]) == code
        out, err = self.capsys.readouterr()
        result = json.loads((self.folder / "result.json").read_text()) if code == 0 else {}
        return result, " ".join((out + err).split())


@pytest.fixture
def files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Files:
    return Files(tmp_path, capsys)


def perfect(files: Files, number: int = 12, **options: Any) -> None:
    found = {"kind": options.get("kind", "Car"), "box": options.get("box", "500 150 600 250")}
    files.frame([line(i, **options) for i in range(number)], [line(i, **found, score=0.9) for i in range(number)])


def moderate(result: dict[str, Any], name: str = "Car", metric: str = "3d") -> float | None:
    value: float | None = result[name][metric]["R40"]["moderate"]
    return value


@pytest.mark.parametrize("box", ["0 0 0 0", "-1 -1 -1 -1"])
def test_labels_without_2d_boxes_have_no_ap_and_st3ds_rules_score_them(files, box):
    perfect(files, 41, box=box)
    result, said = files.score()
    assert moderate(result) is None
    assert "none of the 41 Car labels has a 2D box" in said
    assert "--rules st3d" in said
    assert " 0.00 " not in said
    result, said = files.score("--rules", "st3d")
    assert moderate(result) == pytest.approx(100)
    assert "2D box" not in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"occluded": 3}, "12 have an occlusion above 2"),
        ({"truncated": 1}, "12 are truncated"),
        ({"box": "5 5 9 19"}, "12 have a 2D box of"),
    ],
)
def test_labels_that_kittis_rules_ignore_have_no_ap_and_the_reason_is_named(files, options, reason):
    perfect(files, **options)
    result, said = files.score()
    assert moderate(result) is None
    assert "ignore all 12 Car labels" in said
    assert reason in said


def test_detections_without_2d_boxes_have_no_ap(files):
    files.frame([line(i) for i in range(6)], [line(i, box="0 0 0 0", score=0.9) for i in range(6)])
    result, said = files.score()
    assert moderate(result) is None
    assert "none of the 6 Car detections has a 2D box" in said


def test_few_objects_are_said_to_be_few(files):
    perfect(files, 9)
    result, said = files.score()
    assert moderate(result) == pytest.approx(20)
    assert "fewer than 41 objects" in said
    assert "Car has 9 (AP R40 of at most 20)" in said
    assert any("Car has 9" in note for note in result["notes"])


def test_41_objects_are_enough(files):
    perfect(files, 41)
    result, said = files.score()
    assert moderate(result) == pytest.approx(100)
    assert "fewer than" not in said


def test_a_class_without_objects_is_a_dash_and_never_0(files):
    perfect(files, 41)
    result, said = files.score()
    assert moderate(result, "Pedestrian") is None
    assert "the labels hold no Pedestrian and no Cyclist" in said
    assert " 0.00 " not in said


def test_objects_and_detections_are_counted_by_type(files):
    files.frame(
        [line(0), line(1, kind="car"), line(2, kind="Tram"), line(3, kind="DontCare")],
        [line(0, score=0.9), line(4, kind="Cars", score=0.8), line(5, kind="Cars", score=0.7)],
    )
    files.frame([line(0)], [])
    result, said = files.score()
    assert result["types"]["labels"] == {"Car": 2, "car": 1, "Tram": 1}
    assert result["types"]["detections"] == {"Car": 1, "Cars": 2}
    assert result["types"]["frames_without_detections"] == 1
    assert result["ledger"]["types_dropped"] == {"Tram": 1}
    assert result["ledger"]["boxes"] == {"Car": 3, "Pedestrian": 0, "Cyclist": 0}  # case does not matter
    assert "2 detections of the type Cars are not scored; if they are meant to be Car, rename them" in said
    assert "1 of 2 frames have no detection" in said


def test_labels_of_other_spellings_are_named(files):
    files.frame([line(i, kind='"Car"') for i in range(3)], [line(i, score=0.9) for i in range(3)])
    _, said = files.score()
    assert "the labels hold no object of the class Car or Pedestrian or Cyclist" in said
    assert '3 labels of the type "Car" are not scored; if they are meant to be Car, rename them' in said


def test_a_class_that_is_never_detected_is_named(files):
    files.frame([line(i) for i in range(5)], [line(0, kind="Cyclist", score=0.5)])
    result, said = files.score("--classes", "Car")
    assert moderate(result) == 0
    assert "no detection is a Car, but the labels hold 5: AP is 0. The detections hold Cyclist 1" in said


def test_detection_files_that_belong_to_no_frame_are_counted(files):
    perfect(files, 3)
    for name in ("000007.txt", "._000007.txt"):
        (files.folder / "found" / name).write_text("")
    result, said = files.score()
    assert "1 detection file belongs to none of the frames that are scored and is not read (000007.txt)" in said
    assert result["ledger"]["files_skipped"] == {"detections of a frame that is not scored": 1}


@pytest.mark.parametrize("rules", ["kitti", "st3d"])
def test_any_class_can_be_scored_with_an_overlap_of_its_own(files, rules):
    perfect(files, 41, kind="Tram")
    result, said = files.score("--overlap", "Tram", "0.5", "truck", "0.6", "--rules", rules)
    assert moderate(result, "Tram") == pytest.approx(100)
    assert moderate(result, "truck") is None
    assert "Tram 0.5" in said
    result, _ = files.score("--classes", "tram", "--overlap", "Tram", "0.5", "--overlap", "Bus", "0.4", "--rules", rules)
    assert [name for name in result if name in ("Tram", "Bus", "Car", "tram")] == ["Tram", "Bus"]


def test_an_overlap_replaces_the_official_one(files):
    files.frame([line(i) for i in range(41)], [line(i, score=0.9).replace(" 4.2 ", " 2.3 ") for i in range(41)])
    assert moderate(files.score()[0]) == 0
    assert moderate(files.score("--overlap", "car", "0.5")[0]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "Cra"], "no minimum overlap for Cra; did you mean 'Car'[?]; KITTI's rules"),
        (["--classes", "Tram", "Bus"], "no minimum overlap for Tram, Bus;"),
        (["--overlap", "Tram"], "--overlap takes pairs"),
        (["--overlap", "Tram", "high"], "--overlap Tram high: the minimum overlap must be a number between 0 and 1"),
        (["--overlap", "Tram", "70"], "between 0 and 1"),
        (["--overlap", "Tram", "nan"], "between 0 and 1"),
        (["--overlap", "Tram", "0.5", "tram", "0.6"], "names tram twice"),
    ],
)
def test_a_class_or_an_overlap_that_cannot_be_used_is_refused(files, words, message):
    perfect(files, 3)
    _, said = files.score(*words, code=2)
    assert re.search(message, said), said


def test_vans_are_neither_right_nor_wrong_with_the_words_of_every_command(files):
    files.frame([line(0), line(1, kind="Van"), line(2, kind="Tram")], [line(0, score=0.9)])
    result, said = files.score()
    assert (result["ledger"]["types_ignored"], result["ledger"]["types_dropped"]) == ({"Van": 1}, {"Tram": 1})
    assert "objects of type Van, kept with weight 0 │ 1 │ 33.3% of all objects" in said
    assert "objects of type Tram, dropped │ 1 │ 33.3% of all objects" in said
    assert "│ Van │ 1 │ 0 │ neither right nor wrong │" in said


def test_spellings_of_one_class_are_one_row(files):
    files.frame([line(i, kind="car") for i in range(3)], [line(i, score=0.9) for i in range(2)])
    _, said = files.score()
    assert "│ car, Car │ 3 │ 2 │ Car │" in said


def test_without_a_camera_the_file_holds_no_metrics_of_the_picture(files):
    perfect(files, 41)
    assert set(files.score()[0]["Car"]) == {"3d", "bev", "bbox", "aos"}
    assert set(files.score("--rules", "st3d")[0]["Car"]) == {"3d", "bev"}


def test_intensity_that_evaluate_does_not_measure_is_null(files):
    perfect(files, 3)
    ledger = files.score()[0]["ledger"]
    assert (ledger["lowest_intensity"], ledger["highest_intensity"], ledger["intensity_range"]) == (None, None, None)
