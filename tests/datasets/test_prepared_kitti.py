"""A prepared KITTI dataset stands on its own: moved, without the raw folder, it scores as before. Version 1 is still read."""

import hashlib
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Boxes3D, PointCloud, Predictions
from upcycle3d.datasets.gt_database import GtDatabase
from upcycle3d.datasets.kitti_text import KittiObjects, parse_objects, read_objects, write_objects
from upcycle3d.datasets.label_shares import label_share_splits
from upcycle3d.datasets.layouts import open_kitti
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.raw import prepare_raw
from upcycle3d.datasets.simulation.layout_kitti import write_kitti_layout
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.perception.evaluation.detect import kitti_detections
from upcycle3d.perception.evaluation.kitti import evaluate_kitti
from upcycle3d.perception.evaluation.score import score_detector
from upcycle3d.tools import inspect
from upcycle3d.tools import prepare as prepare_tool
from upcycle3d.tools.console import run_command

CLASSES = ("Car", "Pedestrian")
SMALL = replace(KITTI, sensor=replace(KITTI.sensor, elevations=KITTI.sensor.elevations[::4], azimuths=720))
DONT_CARE = "DontCare -1 -1 -10 500.25 100.5 900 200.125 -1 -1 -1 -1000 -1000 -1000 -10\n"
VERSION_1 = Path(__file__).parents[1] / "data" / "version_0_1" / "prepared"


class KnowsTheLabels:
    """A detector that finds a part of the labeled boxes, a little beside their places, in the scans of one dataset."""

    class_names = CLASSES

    def __init__(self, frames: PreparedDataset) -> None:
        self.boxes = {self._key(frame.points): self._found(frame.labels) for frame in frames}

    def eval(self) -> None:
        pass

    def detect(self, clouds: list[PointCloud]) -> list[Predictions]:
        return [self.boxes[self._key(cloud)] for cloud in clouds]

    @staticmethod
    def _key(cloud: PointCloud) -> str:
        return hashlib.sha256(cloud.xyz.numpy().tobytes()).hexdigest()

    @staticmethod
    def _found(labels) -> Predictions:
        generator = torch.Generator().manual_seed(len(labels))
        boxes = labels.boxes.data + 0.2 * torch.rand(len(labels), 7, generator=generator)
        scores = torch.rand(len(labels), generator=generator)
        found = Predictions(
            boxes=Boxes3D(data=boxes), classes=labels.classes, scores=scores, class_scores=scores, iou_scores=scores
        )
        return found.select(scores > 0.2)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Simulated streets in KITTI's layout; the label files have DontCare regions too."""
    root = tmp_path_factory.mktemp("kitti") / "raw"
    write_kitti_layout(root, SMALL, num_frames=4, seed=5, workers=1, view="camera", splits={"train": 1, "val": 3})
    for path in (root / "training" / "label_2").glob("*.txt"):
        path.write_text(DONT_CARE + path.read_text())
    return root


def prepared(raw: Path, out: Path) -> PreparedDataset:
    prepare_raw(open_kitti(raw, classes=CLASSES, z_shift=1.73), out, workers=0)
    return PreparedDataset(out, "val")


def assert_equal(a: KittiObjects, b: KittiObjects) -> None:
    assert a.types == b.types
    for name in ("truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    assert a.scores is None
    assert b.scores is None


def test_a_moved_dataset_scores_the_same_without_the_raw_data(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    frames = prepared(tmp_path / "raw", tmp_path / "data")
    detector = KnowsTheLabels(frames)
    files = [read_objects(raw / "training" / "label_2" / f"{frame_id}.txt") for frame_id in frames.ids]
    detections = [kitti_detections(frame, detector.detect([frame.points])[0], CLASSES) for frame in frames]
    expected = evaluate_kitti(files, detections, classes=CLASSES)
    assert expected.classes["Car"].box_3d.r40[1] > 0

    shutil.rmtree(tmp_path / "raw")
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    moved = PreparedDataset(tmp_path / "elsewhere", "val")
    for frame_id, objects in zip(moved.ids, files, strict=True):
        assert objects.types[0] == "DontCare"
        assert_equal(moved.kitti_objects(frame_id), objects)
    with pytest.raises(InvalidInput, match="there is no protocol 'coco'; choose one of kitti, waymo, lyft, cross_dataset"):
        score_detector(detector, moved, "coco")  # type: ignore[arg-type]
    report = score_detector(detector, moved)
    assert report.protocol == "kitti"
    assert report.result.to_json() == expected.to_json()


def test_an_empty_label_file_is_kept_apart_from_none(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    (tmp_path / "raw" / "training" / "label_2" / "000001.txt").write_text("")
    frames = prepared(tmp_path / "raw", tmp_path / "data")
    assert len(frames.kitti_objects("000001")) == 0
    with pytest.raises(InvalidInput, match="has no frame '000000' in this split"):
        frames.kitti_objects("000000")


def test_a_dataset_without_label_files_says_how_to_get_them_or_what_to_use_instead(raw, tmp_path):
    source = replace(open_kitti(raw).source, with_labels=False)
    prepare(source, source.ids, tmp_path / "unlabeled", splits={}, classes=CLASSES, workers=0)
    with pytest.raises(InvalidInput, match=rf"Prepare it again with `upcycle3d prepare kitti {raw} --out NEW_FOLDER"):
        PreparedDataset(tmp_path / "unlabeled").kitti_objects("000000")
    frames = [replace(source[i], id=f"{i}") for i in range(2)]
    prepare(frames, ["0", "1"], tmp_path / "own", splits={}, classes=CLASSES, workers=0)
    with pytest.raises(InvalidInput, match="--protocol cross_dataset"):
        PreparedDataset(tmp_path / "own").kitti_objects("0")


def test_a_source_of_your_own_may_bring_label_files_too(raw, tmp_path):
    class Own:
        """Frames of another layout whose objects are known in KITTI's fields."""

        frames = (replace(open_kitti(raw, classes=CLASSES).source[0], id="mine"),)

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int):
            return self.frames[index]

        def kitti_objects(self, frame_id: str) -> KittiObjects:
            return parse_objects(DONT_CARE, frame_id)

    prepare(Own(), ["mine"], tmp_path, splits={}, classes=CLASSES, workers=0)
    assert_equal(PreparedDataset(tmp_path).kitti_objects("mine"), parse_objects(DONT_CARE, ""))


def test_columns_of_a_label_file_come_back_exactly(tmp_path):
    objects = parse_objects("Van 0.1 3 -1.123456789 1 2 3 4 1.1 2.2 3.3 -7 8 9.000001 3.14\n" + DONT_CARE, "")
    assert_equal(KittiObjects.from_columns(objects.types, objects.label_columns()), objects)
    write_objects(tmp_path / "a.txt", objects)
    assert read_objects(tmp_path / "a.txt").types == ("Van", "DontCare")


# ---- what version 0.1 wrote


@pytest.mark.parametrize("split", ["train", "val"])
def test_version_1_is_read_bit_by_bit(split):
    """`data/version_0_1/prepared` and `expected.json` in it were made by the code of commit a53290a. Never make them anew."""
    expected, frames = json.loads((VERSION_1 / "expected.json").read_text())[split], PreparedDataset(VERSION_1, split)
    frame = frames[0]
    assert (frame.id, frames.split_fingerprint().partition("+")[0]) == (expected["id"], expected["fingerprint"])
    assert frames.rig == frame.rig == RigSpec(z_shift=1.73)
    assert (frames.origin.layout, frames.origin.root) == ("kitti", Path("/tmp/kitti"))
    values = {"xyz": frame.points.xyz, "features": frame.points.features, "boxes": frame.labels.boxes.data}
    values |= {name: getattr(frame.labels, name) for name in ("classes", "num_points", "difficulty", "weight")}
    values |= {name: getattr(frame.calibration, name) for name in ("lidar_to_camera", "projection")}
    found = {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in values.items()}
    assert found == expected["sha256"]
    assert frames.verify() == ()


def test_version_1_serves_its_objects_but_has_no_label_files():
    train = PreparedDataset(VERSION_1, "train")
    assert len(GtDatabase.open(VERSION_1 / "gt_database" / "train", expected_fingerprint=train.split_fingerprint())) == 3
    with pytest.raises(InvalidInput, match="earlier version of this program") as refused:
        train.kitti_objects("000000")
    # Everything that the scores depend on and that differs from the defaults of the command.
    command = "upcycle3d prepare kitti /tmp/kitti --out NEW_FOLDER --classes Car --z-shift 1.73 --splits train val"
    assert f"Prepare it again with `{command}`" in str(refused.value)


@pytest.mark.parametrize("shares", [(), (0.5,)])
def test_the_command_that_is_advised_prepares_the_same_data(shares, raw, tmp_path):
    shutil.copytree(raw, tmp_path / "the raw data")
    opened = open_kitti(
        tmp_path / "the raw data",
        classes=("Cyclist", "Car"),
        z_shift=1.7345678901234567,
        crop_to_camera=False,
        points_folder="velodyne_reduced",
    )
    # Prepared without labels, as a dataset that lacks the label files; its splits and options are those of any other.
    source = replace(opened.source, with_labels=False)
    splits = {**opened.splits, **label_share_splits(opened.splits["train"], shares, given=opened.splits)}
    prepare(source, source.ids, tmp_path / "old", splits=splits, classes=opened.classes, workers=0)
    with pytest.raises(InvalidInput) as refused:
        PreparedDataset(tmp_path / "old", "val").kitti_objects("000001")
    program, name, *arguments = shlex.split(str(refused.value).split("`")[1])
    assert (program, name) == ("upcycle3d", "prepare")
    arguments[arguments.index("NEW_FOLDER")] = str(tmp_path / "new")
    assert run_command(prepare_tool.command, arguments) == 0
    old, new = PreparedDataset(tmp_path / "old"), PreparedDataset(tmp_path / "new")
    assert (new.classes, new.rig, new.splits, new.ids) == (old.classes, old.rig, old.splits, old.ids)
    assert [o for o in new.origin.options if o[0] != "with_labels"] == [o for o in old.origin.options if o[0] != "with_labels"]
    for i in range(len(old)):
        assert torch.equal(new[i].points.xyz, old[i].points.xyz)
    assert len(new.kitti_objects("000001"))


def test_preparation_never_goes_on_in_a_folder_of_version_1(raw, tmp_path):
    shutil.copytree(VERSION_1, tmp_path / "old")
    with pytest.raises(InvalidInput, match=r"begun by another version of this program \(schema version 1, this one writes 3\)"):
        prepared(raw, tmp_path / "old")


# ---- a damaged copy


def test_inspect_verifies_the_points(raw, tmp_path, capsys):
    prepared(raw, tmp_path)
    assert run_command(inspect.command, [str(tmp_path), "--verify"]) == 0
    assert "none" in capsys.readouterr().out
    part = next((tmp_path / "parts").glob("*.f32"))
    data = bytearray(part.read_bytes())
    data[40] ^= 1
    part.write_bytes(data)
    assert run_command(inspect.command, [str(tmp_path), "--verify"]) == 2
    assert "1 frames" in capsys.readouterr().err
    assert run_command(inspect.command, [str(raw / "simulation.json"), "--verify"]) == 2
