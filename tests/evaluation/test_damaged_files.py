"""Label and detection files that are cut, edited or made up: every protocol's reader refuses them with a sentence or scores them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upcycle3d.core.errors import UpcycleError
from upcycle3d.perception.evaluation.accounts import account_of_kitti
from upcycle3d.perception.evaluation.cross_dataset import without_camera
from upcycle3d.perception.evaluation.kitti import evaluate_kitti, read_kitti_folders
from upcycle3d.perception.evaluation.lyft import account_of_lyft, evaluate_lyft, read_lyft_boxes
from upcycle3d.perception.evaluation.waymo_json import read_waymo_folders

ROUNDS = 120
WORDS = [
    b"nan",
    b"inf",
    b"-1e400",
    b"1e39",
    b"1e308",
    b"-0",
    b"0",
    b"1",
    b"-1",
    b"999999999999999999999999",
    b"null",
    b"true",
    b'""',
    b"[]",
]
WORDS += [
    b"{}",
    b"Car",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\x00",
    b"\x1b[2J",
    b"\n",
    b" ",
    b",",
    b"[[[[",
    b"1e-320",
    b"6.28319",
    b"360",
    b"\xe2\x80\xae",
]


def damaged(data: bytes, dice: random.Random) -> bytes:
    """One to three edits of a file: a cut, a flipped bit, a word for a word, a piece twice or left out."""
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(data) + 1)
        end = min(len(data), at + dice.randint(1, 20))
        kind = dice.randrange(6)
        if kind == 0:
            data = data[:at]
        elif kind == 1 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + dice.choice(WORDS) + data[end:]
        elif kind == 3:
            data = data[:end] + data[at:]
        elif kind == 4:
            data = data[:at] + data[end:]
        else:  # a number becomes another word
            words = data.replace(b",", b" , ").replace(b":", b" : ").split(b" ")
            words[dice.randrange(len(words))] = dice.choice(WORDS)
            data = b" ".join(words)
    return data


KITTI_LINE = "Car 0.00 0 -1.50 500.00 150.00 600.00 250.00 1.50 1.70 4.20 {x} 1.60 20.00 -1.57"
LYFT = {"sample_token": "t", "translation": [1, 2, 3], "size": [2, 4, 1.5], "rotation": [1, 0, 0, 0], "name": "car"}
WAYMO = {"class": "Vehicle", "x": 5, "y": 0, "z": 0, "dx": 4, "dy": 2, "dz": 1.5, "yaw": 0.5}


def kitti(folder: Path, labels: bytes, found: bytes) -> None:
    for name, data in (("labels", labels), ("found", found)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "a.txt").write_bytes(data)
    truths, detections = read_kitti_folders(folder / "labels", folder / "found", ["a"])
    result = evaluate_kitti(truths, detections, classes=("Car",))
    account_of_kitti(result, truths, detections).rows()
    evaluate_kitti(list(map(without_camera, truths)), list(map(without_camera, detections)), classes=("Car",)).to_json()


def waymo(folder: Path, labels: bytes, found: bytes) -> None:
    for name, data in (("labels", labels), ("found", found)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "a.json").write_bytes(data)
    read = read_waymo_folders(folder / "labels", folder / "found", classes=("Vehicle",))
    read.evaluate().to_json()
    read.account().to_json()


def lyft(folder: Path, labels: bytes, found: bytes) -> None:
    (folder / "labels.json").write_bytes(labels)
    (folder / "found.json").write_bytes(found)
    truths, detections = (
        read_lyft_boxes(folder / "labels.json", scored=False),
        read_lyft_boxes(folder / "found.json", scored=True),
    )
    result = evaluate_lyft(truths, detections)
    account_of_lyft(result, truths, detections).to_json()
    result.to_json()


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def refusal(score: Callable[[Path, bytes, bytes], None], folder: Path, labels: bytes, found: bytes) -> str | None:
    """The sentence with which files are refused; None where they are scored. Any other error passes."""
    try:
        score(folder, labels, found)
    except UpcycleError as error:
        return str(error)
    return None


ZONE = {"no_label_zones": [[[18, -2], [22, -2], [22, 2]]], "context_name": "1024", "timestamp_micros": 7}
FORMATS: dict[str, tuple[Callable[[Path, bytes, bytes], None], bytes, bytes]] = {
    "kitti": (
        kitti,
        "\n".join(KITTI_LINE.format(x=x) for x in (-4, 0, 4)).encode(),
        "\n".join(KITTI_LINE.format(x=x) + " 0.9" for x in (-4, 0, 4)).encode(),
    ),
    "waymo": (
        waymo,
        text({"objects": [WAYMO | {"level": 1}, WAYMO | {"num_points": 9}], **ZONE}),
        text([WAYMO | {"score": 0.5}] * 2),
    ),
    "lyft": (lyft, text([LYFT, LYFT | {"name": "bus"}]), text([LYFT | {"score": 0.5}] * 2)),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("which", ["labels", "found"])
def test_a_damaged_file_is_refused_with_a_sentence_or_scored(name, which, tmp_path):
    score, labels, found = FORMATS[name]
    score(tmp_path, labels, found)
    dice = random.Random(f"{name} {which}")
    refused = 0
    for _ in range(ROUNDS):
        files = (damaged(labels, dice), found) if which == "labels" else (labels, damaged(found, dice))
        said = refusal(score, tmp_path, *files)
        if said is not None:
            refused += 1
            assert str(tmp_path) in said
            assert len(said) < 1500
    assert refused > ROUNDS / 4


@pytest.mark.parametrize("name", FORMATS)
def test_deep_huge_and_empty_files_are_refused_or_hold_nothing(name, tmp_path):
    score, labels, _ = FORMATS[name]
    for data in (
        b"",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 20_000,
        b"[" + b"9" * 5000 + b"]",
        b"\xff\xfe",
        b"\x00" * 100,
        b"null",
        b"7",
    ):
        assert len(refusal(score, tmp_path, labels, data) or "") < 1500


@pytest.mark.parametrize("name", FORMATS)
def test_a_byte_order_mark_changes_nothing(name, tmp_path):
    score, labels, found = FORMATS[name]
    score(tmp_path, b"\xef\xbb\xbf" + labels, b"\xef\xbb\xbf" + found)
    if name == "kitti":
        truths, detections = read_kitti_folders(tmp_path / "labels", tmp_path / "found", ["a"])
        assert truths[0].types == detections[0].types == ("Car", "Car", "Car")


@pytest.mark.parametrize(
    ("name", "good", "bad", "message"),
    [
        ("kitti", "-1.57 0.9", "-90 0.9", "degrees"),
        ("kitti", "-1.57 0.9", "nan 0.9", "NaN"),
        ("kitti", " 0.9", " inf", "NaN or inf"),
        ("waymo", '"yaw": 0.5', '"yaw": 90', "degrees"),
        ("waymo", '"yaw": 0.5', '"yaw": NaN', "NaN"),
        ("waymo", '"x": 5', '"x": 1e39', "expected numbers"),
        ("waymo", '"score": 0.5', '"score": true', "expected a score"),
        ("lyft", '"score": 0.5', '"score": NaN', "finite"),
        ("lyft", "[1, 2, 3]", '["1", 2, 3]', "translation"),
        ("lyft", "[1, 0, 0, 0]", "[0, 0, 0, 0]", "rotation zero"),
    ],
)
def test_detections_that_are_no_boxes_are_refused_by_name(name, good, bad, message, tmp_path):
    score, labels, found = FORMATS[name]
    with pytest.raises(UpcycleError, match=message) as caught:
        score(tmp_path, labels, found.replace(good.encode(), bad.encode()))
    assert str(tmp_path) in str(caught.value)
