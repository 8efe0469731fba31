"""What a training says of its data before it begins, what it keeps of how they were read, and what scoring says of frames it has seen."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Frame
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.scan_comparison import compare_road
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.core.structures import PointCloud
from upcycle3d.core.trained_on import ScanMeasures, estimate_road_height, summarize_scans
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.folder import FolderDataset
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.recipes.audit_inputs import check_audit_inputs
from upcycle3d.perception.recipes.audit_membership import MembershipPlan, check_membership
from upcycle3d.perception.recipes.job_start import JobStart
from upcycle3d.perception.recipes.jobs import evaluate_on, train_preset
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.recipes.scan_survey import describe_training, expected_road, survey_split
from upcycle3d.perception.recipes.training_frames import shared_frames_note
from upcycle3d.perception.recipes.upcycling_job import upcycle_preset
from upcycle3d.perception.recipes.validation import Validation
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector
from upcycle3d.perception.training.run_folder import RunFolder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


@dataclass(frozen=True, kw_only=True)
class _Started:
    """The part of a run's record that names places."""

    detector: Path
    data: DataSplit


class Stop(Exception):
    """The test has seen enough."""


def lifted(frame: Frame, by: float) -> Frame:
    shift = torch.tensor([0.0, 0.0, by])
    boxes = frame.labels.boxes.data.clone()
    boxes[:, 2] += by
    points = replace(frame.points, xyz=frame.points.xyz + shift)
    return replace(frame, points=points, labels=replace(frame.labels, boxes=replace(frame.labels.boxes, data=boxes)))


def written(folder: Path, frames: list[Frame], **splits: list[str]) -> DataSplit:
    ids = [frame.id for frame in frames]
    prepare(frames, ids, folder, splits=splits or {"train": ids}, classes=("Car",), workers=0)
    return DataSplit(root=folder, name="train")


def notes_of(data: DataSplit, out: Path, **options: object) -> list[str]:
    """What a training says before it begins."""
    said: list[str] = []

    def stop(start: JobStart) -> None:
        said.extend(start.notes)
        raise Stop

    with pytest.raises(Stop):
        train_preset(tiny.preset(), data, out, progress=False, on_start=stop, **options)
    assert not out.exists()
    return said


def test_a_training_warns_of_a_road_at_another_height_than_its_preset_expects(tmp_path):
    frames = [tiny.frame_with_car(i) for i in range(12)]
    assert notes_of(written(tmp_path / "right", frames), tmp_path / "out") == []
    low = written(tmp_path / "low", [lifted(frame, -0.9) for frame in frames])
    (said,) = notes_of(low, tmp_path / "out")
    assert "the road lies at z = -0.89 m in these scans, and this detector expects it at z = 0.00 m" in said
    assert "--z-shift 0.89 (now 0)" in said
    assert notes_of(low, tmp_path / "out", classes=("Car",)) == []  # anchors of the data itself, and all of it in range
    high = written(tmp_path / "high", [lifted(frame, 1.5) for frame in frames])
    (said,) = notes_of(high, tmp_path / "out", classes=("Car",))
    assert "objects are cut off" in said


def test_no_preset_warns_of_the_height_of_real_scans_that_are_prepared_as_documented():
    """KITTI in its own frame for the unshifted presets, and shifted by 1.73 m for the others; Waymo, nuScenes and Lyft shifted."""
    root = tiny.shared("data", "the heights that presets expect fit real scans")

    def heights(files: list[Path], columns: int, z_shift: float) -> list[float]:
        tables = [np.fromfile(f, np.float32) for f in files]
        rows = [t[: len(t) // columns * columns].reshape(-1, columns)[:, :3] for t in tables]
        return [estimate_road_height(PointCloud.from_array(r, columns=("x", "y", "z"))) + z_shift for r in rows]

    kitti = sorted((root / "kitti/training/velodyne_reduced").glob("*.bin"))[::40]
    turns = sorted((root / "kitti/training/velodyne").glob("*.bin"))[:4]
    nuscenes = sorted((root / "nuscenes/samples/LIDAR_TOP").glob("*.bin"))[:2]
    waymo = sorted((root / "waymo/points_unlabelled").glob("*.bin"))[:1]
    lyft = sorted((root / "lyft/lidar").glob("*.bin"))
    unshifted = [heights(kitti, 4, 0.0), heights(turns, 4, 0.0)]
    shifted = [
        heights(kitti, 4, 1.73),
        heights(turns, 4, 1.73),
        heights(nuscenes, 5, 1.84),
        heights(waymo, 5, 0.0),
        heights(lyft, 5, 1.83),
    ]
    for name, preset in PRESETS.items():
        _, _, low, _, _, high = preset.detector.encoder.grid.range
        own, other = (unshifted, shifted) if name.startswith("kitti") else (shifted, unshifted)
        for place, silent in ((own, True), (other, False)):
            for roads in place:
                found = summarize_scans([ScanMeasures(points=1, cells=1, ground_height=road, intensity=0.3) for road in roads])
                expected = expected_road(preset.detector)
                said = compare_road(found, expected=expected, rig=RigSpec(), z_range=(low, high))
                assert (said == ()) is silent, (name, roads)


def test_a_split_without_labels_is_named_before_the_run_folder_is_taken(tmp_path):
    frames = [tiny.frame_with_car(i) for i in range(6)]
    frames[4:] = [replace(frame, labels=None) for frame in frames[4:]]
    ids = [frame.id for frame in frames]
    data = written(tmp_path / "data", frames, train=ids[:4], fleet=ids[4:], mixed=ids[3:])
    out = tmp_path / "out"
    with pytest.raises(InvalidInput, match=r"the split fleet of .* has no labels, .* splits with labels are: train, mixed"):
        train_preset(tiny.preset(), replace(data, name="fleet"), out)
    with pytest.raises(InvalidInput, match=r"the split mixed of .* has 2 frames without labels, frame4 is one"):
        train_preset(tiny.preset(), replace(data, name="mixed"), out, classes=("Car",))
    save_run_detector(tmp_path, tiny.source_model())
    with pytest.raises(InvalidInput, match=r"the split fleet of .* has no labels"):
        upcycle_preset(tiny.preset(), replace(data, name="fleet"), tmp_path, out, method="source_only")
    assert not out.exists()


def test_the_way_of_reading_is_kept_beside_the_weights(tmp_path):
    root = tmp_path / "raw"
    for folder in ("points", "labels"):
        (root / folder).mkdir(parents=True)
    rows = np.c_[-tiny.scan_with_car().xyz.numpy()[:, [1]], tiny.scan_with_car().xyz.numpy()[:, [0, 2]], np.zeros((550, 1))]
    rows.astype(np.float32).tofile(root / "points" / "a.bin")
    (root / "labels" / "a.txt").write_text("Car -1.1 6.3 0.8 4.2 1.9 1.6 0.4\n")
    source = FolderDataset(root, ("a",), classes=("Car",), scan=ScanOptions(axes=("y", "-x", "z")))
    prepare(source, ["a"], tmp_path / "data", splits={"train": ["a"]}, classes=("Car",), workers=0)
    frames, detector = PreparedDataset(tmp_path / "data", "train"), tiny.second_iou()
    known = describe_training(detector, frames, survey_split(frames, detector.encoder))
    assert (known.axes, known.columns, known.dtype) == (("y", "-x", "z"), (), "float32")
    own = written(tmp_path / "own", [tiny.frame_with_car(0)]).open()
    known = describe_training(detector, own, survey_split(own, detector.encoder))
    assert (known.axes, known.columns, known.dtype) == (None, None, None)


def test_scores_on_frames_of_the_training_get_a_note_and_others_do_not(tmp_path):
    data = tiny.prepared(tmp_path / "data")
    run = tmp_path / "run"
    train_preset(tiny.preset(steps=2), data, run, progress=False)
    train, val = data.open(), replace(data, name="val").open()
    note = shared_frames_note(run, train)
    assert note is not None
    assert note.startswith("4 of 4 frames were also in the training")
    assert shared_frames_note(run / "detector.safetensors", replace(data, name=None).open()).startswith("4 of 6 frames")
    assert shared_frames_note(run, val) is None
    assert shared_frames_note(tmp_path, train) is None  # no run folder
    other = tiny.prepared(tmp_path / "other")  # the same names, which mean nothing in other data
    assert shared_frames_note(run, other.open()) is None
    with pytest.warns(UserWarning, match="4 of 4 frames were also in the training"):
        evaluate_on(run, data, protocol="cross_dataset")
    upcycled = tmp_path / "upcycled"
    RunFolder.create(upcycled, _Started(detector=run, data=replace(data, name="val")), seed=0).close()
    assert shared_frames_note(upcycled, val).startswith("2 of 2 frames")
    assert shared_frames_note(upcycled, train).startswith("4 of 4 frames")  # of the source model
    (said,) = notes_of(data, tmp_path / "out", validate=Validation(data=data))
    assert "4 of 4 frames of" in said
    shutil.move(data.root, tmp_path / "moved")
    assert shared_frames_note(run, DataSplit(root=tmp_path / "moved", name="train").open()).startswith("4 of 4 frames")
    assert shared_frames_note(run, DataSplit(root=tmp_path / "moved", name="val").open()) is None


def test_an_audit_refuses_victims_that_were_trained_on_and_members_that_were_not(tmp_path):
    """Attacks are scored on new frames, and a member that never was one makes membership look harmless."""
    data = tiny.prepared(tmp_path / "data")
    run = tmp_path / "run"
    train_preset(tiny.preset(steps=2), data, run, progress=False)
    detector, val = load_detector(run), replace(data, name="val")
    with pytest.raises(InvalidInput, match=r"are no new frames for .*4 of 4 frames were also in the training"):
        check_audit_inputs(detector, run, attacker=val, labeled=val, victims=data, warn=print)
    check_audit_inputs(detector, run, attacker=data, labeled=data, victims=val, warn=print)
    with pytest.raises(InvalidInput, match="so there is no member to find"):
        check_membership(MembershipPlan(members=val), detector, run, data)
    check_membership(MembershipPlan(members=data), detector, run, val)
