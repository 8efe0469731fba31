"""Detections as JSON: what is written is read again, and a damaged file is named."""

import json

import pytest
import torch

from upcycle3d.core.detection_json import boxes_json, read_boxes_json
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Boxes3D, Predictions

BOX = {"class": "Car", "score": 0.5, "x": 1, "y": 2.0, "z": 0.0, "dx": 4.0, "dy": 2.0, "dz": 1.5, "yaw": 0.1}


def test_detections_come_back(tmp_path):
    score = torch.tensor([0.9, 0.25])
    boxes = Boxes3D(data=torch.tensor([[1.0, 2, 3, 4, 5, 6, 0.5], [7.0, 8, 9, 1, 2, 3, -0.5]]))
    found = Predictions(boxes=boxes, classes=torch.tensor([1, 0]), scores=score, class_scores=score, iou_scores=score)
    (tmp_path / "a.json").write_text(json.dumps(boxes_json(found, ("Car", "Van"))))
    read, names = read_boxes_json(tmp_path / "a.json")
    assert [names[c] for c in read.classes] == ["Van", "Car"]
    torch.testing.assert_close(read.boxes.data, boxes.data)
    torch.testing.assert_close(read.scores, score)
    (tmp_path / "a.json").write_text("[]")
    assert (len(read_boxes_json(tmp_path / "a.json")[0]), read_boxes_json(tmp_path / "a.json")[1]) == (0, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": None}, "must be an object with the name of a class as `class`"),
        ({"class": "\x1b[2J"}, "must be an object with the name of a class"),
        ({"yaw": None}, "must have a number as `yaw`, found None"),
        ({"x": "1"}, "must have a number as `x`, found 1"),
        ({"x": True}, "must have a number as `x`"),
        ({"x": 1e300}, "must have a number as `x`"),
        ({"dx": 0.0}, "a size that is not above 0, or a score outside 0..1"),
        ({"score": 1.5}, "a size that is not above 0, or a score outside 0..1"),
    ],
)
def test_a_record_that_cannot_be_is_named(tmp_path, change, message):
    (tmp_path / "a.json").write_text(json.dumps([BOX, BOX | change]))
    with pytest.raises(InvalidInput, match=rf"a.json \(detections\), box 1 .*{message}"):
        read_boxes_json(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[", '[{"class": "Car", "score": NaN}]'])
def test_files_of_other_kinds_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"detections.*give a file that `upcycle3d predict` wrote"):
        read_boxes_json(tmp_path / "a.json")
