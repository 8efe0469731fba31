"""`view`: names come from the detector, counts are those of what is drawn, and nothing is written outside its folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.structures import Boxes3D, PointCloud, Predictions
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.viz.bev import in_view, renumbered
from upcycle3d.tools import evaluate, prepare, view, view_frames, view_pictures
from upcycle3d.tools.console import run_command


class FindsFour:
    """A detector with its own order of classes: two cars in the picture, one beyond it, one of a low score."""

    class_names = ("Cyclist", "Pedestrian", "Car")

    def to(self, device: torch.device) -> "FindsFour":
        return self

    def eval(self) -> None:
        pass

    def detect(self, clouds: list[PointCloud]) -> list[Predictions]:
        boxes = torch.tensor(
            [[10.0, 0, 0, 4, 2, 1.5, 0.1], [20.0, 5, 0, 4, 2, 1.5, 0], [200.0, 0, 0, 4, 2, 1.5, 0], [15.0, 0, 0, 4, 2, 1.5, 0]]
        )
        scores = torch.tensor([0.9, 0.8, 0.7, 0.1])
        kinds = torch.full((4,), 2)
        return [
            Predictions(boxes=Boxes3D(data=boxes), classes=kinds, scores=scores, class_scores=scores, iou_scores=scores)
            for _ in clouds
        ]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two scans of a folder, each with a car in the picture and one beyond it."""
    raw = tmp_path / "raw"
    for folder in ("points", "labels"):
        (raw / folder).mkdir(parents=True)
    for name in ("a", "b"):
        rows = np.array([[10, 0.1 * i, -1, 0.5] for i in range(9)], np.float32)
        (raw / "points" / f"{name}.bin").write_bytes(rows.tobytes())
        (raw / "labels" / f"{name}.txt").write_text("Car 10 0 -1 4 2 1.5 0.1\nCar 100 0 -1 4 2 1.5 0.1\n")
    assert (
        run_command(prepare.command, ["folder", str(raw), "--classes", "Car", "--workers", "1", "--out", str(tmp_path / "data")])
        == 0
    )
    for module in (view_frames, evaluate):
        monkeypatch.setattr(module, "load_detector", lambda path: FindsFour())
    return tmp_path / "data"


def run_view(data: Path, *more: object, code: int = 0) -> Any:
    out = data.parent / "view.json"
    words = ["--data", str(data), "--out", str(data.parent / "pictures"), "--json", str(out), *map(str, more)]
    assert run_command(view.command, words) == code
    return json.loads(out.read_text()) if code == 0 else None


def test_detections_carry_the_names_of_the_detector(prepared, monkeypatch):
    drawn = []
    real = view_pictures.bev_panels_png

    def note(panels: list[Any], **options: Any) -> bytes:
        drawn.extend((panel, options["class_names"]) for panel in panels)
        return real(panels, **options)

    monkeypatch.setattr(view_pictures, "bev_panels_png", note)
    run_view(prepared, "--detector", "any")
    assert [names[c] for panel, names in drawn for c in panel.predictions.classes] == ["Car"] * 6  # the fourth has a low score
    assert [names[c] for panel, names in drawn for c in panel.truth.classes] == ["Car"] * 4


def test_the_counts_are_those_of_what_is_drawn(prepared, capsys):
    found = run_view(prepared, "--detector", "any")["pictures"][0]
    assert (found["detections"], found["below_score"], found["detections_outside"]) == (2, 1, 1)
    assert (found["labels"], found["labels_outside"]) == (1, 1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 boxes lie outside the drawn part (x 0 to 51.2 m, y -25.6 to 25.6 m)" in printed
    assert "score below 0.3" in printed
    found = run_view(prepared, "--detector", "any", "--range", -10, -10, 300, 10, "--min-score", 0)["pictures"][0]
    assert (found["detections"], found["below_score"], found["detections_outside"]) == (4, 0, 0)
    found = run_view(prepared)["pictures"][0]
    assert (found["labels"], found["detections"]) == (1, None)


def test_an_empty_picture_is_warned_about(prepared, capsys):
    run_view(prepared, "--range", 100, 100, 200, 200)
    assert "no point of 2 of 2 frames lies in the drawn part" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", 0), "--limit must be at least 1"),
        (("--limit", -3), "--limit must be at least 1"),
        (("--min-score", 2), "--min-score between 0 and 1"),
        (("--min-score", "nan"), "--min-score between 0 and 1"),
        (("--range", 10, 0, 0, 5), "--range must be x0 y0 x1 y1"),
        (("--range", 0, 0, "inf", 5), "--range must be x0 y0 x1 y1"),
    ],
)
def test_options_without_a_picture_are_refused(prepared, capsys, options, message):
    run_view(prepared, *options, code=2)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "..", "a/b", "x\x1b[2J"])
def test_a_frame_id_that_is_a_path_writes_nothing_outside(prepared, monkeypatch, capsys, name):
    real = PreparedDataset.__getitem__

    def renamed(self: PreparedDataset, index: int) -> Any:
        frame = real(self, index)
        object.__setattr__(frame, "id", name)
        return frame

    monkeypatch.setattr(PreparedDataset, "__getitem__", renamed)
    before = sorted(prepared.parent.rglob("*"))
    run_view(prepared, code=2)
    assert "cannot be a file name" in capsys.readouterr().err
    arguments = [
        "run",
        "--detector",
        "any",
        "--data",
        f"{prepared}:all",
        "--protocol",
        "waymo",
        "--detections",
        str(prepared.parent / "found"),
    ]
    assert run_command(evaluate.command, arguments) == 2
    assert "cannot be a file name" in capsys.readouterr().err
    assert sorted(prepared.parent.rglob("*")) == before


def found(*classes: int) -> Predictions:
    ones = torch.ones(len(classes))
    return Predictions(
        boxes=Boxes3D(data=tiny.CAR.repeat(len(classes), 1)),
        classes=torch.tensor(classes, dtype=torch.int64),
        scores=ones,
        class_scores=ones,
        iou_scores=ones,
    )


def test_detections_keep_their_names_where_the_labels_have_other_numbers():
    predictions, names = renumbered(found(0, 1, 2), ("Car", "Tram", "pedestrian"), ("Pedestrian", "Car"))
    assert names == ("Pedestrian", "Car", "Tram")
    assert [names[c] for c in predictions.classes.tolist()] == ["Car", "Tram", "Pedestrian"]
    predictions, names = renumbered(found(), ("Car",), ())
    assert (len(predictions), names) == (0, ("Car",))


def test_boxes_outside_the_picture_are_not_counted():
    boxes = Boxes3D(data=tiny.CAR + torch.tensor([[0.0] * 7, [3.0, 0, 0, 0, 0, 0, 0], [60.0, 0, 0, 0, 0, 0, 0]]))
    assert in_view(boxes, (0.0, -6.4, 8.0, 6.4)).tolist() == [True, True, False]


@pytest.mark.parametrize("part", ["0 0 1e-9 1e-9", "0 0 1e30 1e30", "-1e308 0 1e308 1", "0 0 1000 0.001", "0 0 900 10"])
def test_parts_that_no_picture_can_show_are_refused(prepared, capsys, part):
    words = ["--data", str(prepared), "--out", str(prepared.parent / "p"), "--limit", "1", "--range", *part.split()]
    assert run_command(view.command, words) == 2
    assert "--range must lie within 1000 m, with sides of at least 1 m" in " ".join(capsys.readouterr().err.split())
    assert not (prepared.parent / "p").exists()
