"""`upcycle3d predict`: boxes for a scan or a folder of scans.

Read next: `core/point_files.py`, which reads a scan and counts what it drops.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from ..core.detection_json import boxes_json
from ..core.device import find_device
from ..core.errors import InvalidInput, UpcycleError
from ..core.files import write_atomically
from ..core.foreign_text import shown
from ..core.frame import Calibration
from ..core.ledger import Ledger
from ..core.ledger_rules import warnings_of
from ..core.point_files import find_scans, read_scan
from ..core.rig import RigSpec
from ..core.scan_comparison import ScanWatch, reaches_behind, rig_of_scans
from ..core.scan_options import ScanOptions
from ..core.structures import PointCloud, Predictions
from ..core.trained_on import ScanMeasures
from ..datasets.kitti import crop_to_camera
from ..datasets.kitti_calibration import find_calibration, is_off_center, read_calibration, shift_calibration
from ..datasets.kitti_text import predictions_to_kitti, write_objects
from ..datasets.picture_size import find_picture, read_picture_size
from ..perception.models.detector import Detector, unwatched
from ..perception.models.encoders.scan_survey import measure_scan
from ..perception.training.detector_files import load_detector
from .console import console, print_table, print_warning, progress_bar, run_command, settle, warnings_so_far, write_json
from .expert_use import ScanExperts, print_expert_use
from .scan_option import ScanOption

_SUFFIXES = {"json": ".json", "kitti": ".txt"}

LISTED_FAILURES = 20
"""Scans that failed and are listed on the terminal; `--json` has all."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Detect objects in scans. Boxes are written in the sensor frame, one file per scan."""

    detector: Path
    """Run folder, `detector.safetensors` or `teacher.safetensors`."""
    scans: tuple[Path, ...]
    """Scan files (.bin, .npy, .pcd) or folders of them."""
    out: Path
    """Folder for the detections, one file per scan under the name of the scan. Files of an earlier run with these names are replaced, or
    removed where the scan fails now; the others stay, and a warning counts both."""
    format: Literal["json", "kitti"] = "json"
    """`json`: boxes in the sensor frame. `kitti`: text in the camera frame, which needs `--calib`."""
    calib: Path | None = None
    """Folder of KITTI calibration files, one per scan. `--format kitti` needs it; and where the detector was trained on what a camera
    sees, only points that the camera sees are kept."""
    reading: ScanOption = ScanOptions()
    """How the scans are read."""
    min_score: float = 0.1
    """Detections with a lower score are left out. The detector's own limits come first: the `score` and the `post` (most boxes per scan) of
    `final` in its configuration, so 0 does not give every box."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    json: Path | None = None
    """Also write the number of boxes per scan, the scans that failed with their reasons, and all counts to this file as JSON. Of an upcycled
    head that decides per scene, also the weight of each expert per scan, which tells domains apart: guard it like the scans."""


def command(config: Predict) -> None:
    """Find objects in a scan or in a folder of scans. A scan that cannot be read is reported, and the others go on."""
    if config.format == "kitti" and config.calib is None:
        raise InvalidInput("KITTI's text format is in the camera frame, so it needs --calib; or use --format json")
    if config.calib is None:
        config.reading.refuse_image_size("nothing is cropped without a calibration; give --calib FOLDER too, or leave it out")
    elif not config.calib.is_dir():
        raise InvalidInput(f"there is no folder {config.calib} (--calib); it must hold one calibration file per scan")
    if not 0 <= config.min_score <= 1:
        raise InvalidInput(f"--min-score must be in 0..1, found {config.min_score:g}")
    target = find_device(config.device)
    detector = load_detector(config.detector).to(target)
    scans, ledger = find_scans(config.scans)
    done = _Done(earlier=_earlier_files(config, scans))
    rig, said = rig_of_scans(config.reading, detector.trained_on, scans)
    for text in said:
        print_warning(text)
    watch, camera = ScanWatch(detector.trained_on, print_warning, rig=rig), _CameraWatch(config, detector)
    experts = ScanExperts(detector)
    with progress_bar("predict", len(scans)) as advance:
        for number, path in enumerate(scans, start=1):
            try:
                found = _detect(path, config, detector, rig, partial(watch.add, name=path.name), camera)
            except UpcycleError as error:
                done.failed[path.name] = str(error)
                done.drop_earlier(config.out / f"{path.stem}{_SUFFIXES[config.format]}")
                ledger = ledger + Ledger(scans_failed=1)
            else:
                _write(path, found, config, rig, detector.class_names, done)
                experts.note(path.name)
                ledger = ledger + found.ledger
            advance(number, len(scans))
    watch.finish()
    print_expert_use(detector)
    _report(config, done, ledger, experts.weights)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The detections of one scan in the shifted frame."""

    boxes: Predictions
    calibration: Calibration | None
    ledger: Ledger


@dataclass(kw_only=True)
class _Done:
    """Results by file name: boxes written, boxes that lie outside the picture, and why scans failed."""

    earlier: frozenset[str] = frozenset()
    """Names of files of detections that lay in the folder before."""
    written: dict[str, int] = field(default_factory=dict)
    outside_picture: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    removed: int = 0
    """Files of detections of an earlier run that were removed, because their scan failed now."""

    def drop_earlier(self, file: Path) -> None:
        """Remove the detections that an earlier run found in a scan that fails now: nothing in the file says that they are old."""
        if file.name in self.earlier and file.is_file():
            file.unlink()
            self.removed += 1


def _earlier_files(config: Predict, scans: Sequence[Path]) -> frozenset[str]:
    """Find detections of an earlier run in the folder, and warn of them: nothing in a file says which run wrote it."""
    suffix = _SUFFIXES[config.format]
    if not config.out.is_dir():
        return frozenset()
    there = frozenset(p.name for p in config.out.iterdir() if p.suffix == suffix and not p.name.startswith("."))
    replaced = len(there & {f"{scan.stem}{suffix}" for scan in scans})
    if there:
        print_warning(
            f"{config.out} held {len(there)} {suffix} {'file' if len(there) == 1 else 'files'} before this run; number replaced because a scan "
            f"has the same name: {replaced}, number that stay: {len(there) - replaced}. Give a new folder with --out where runs should not mix"
        )
    return there


class _CameraWatch:
    """Warns once, before anything else is said, of a full turn for a detector that was trained on what a camera sees."""

    def __init__(self, config: Predict, detector: Detector) -> None:
        trained = detector.trained_on
        self._waits = config.calib is None and trained is not None and trained.camera_view

    def look(self, path: Path, points: PointCloud) -> None:
        if self._waits and reaches_behind(points):
            self._waits = False
            print_warning(
                f"the detector was trained on what a camera ahead sees, and {shown(path.name)} reaches behind the sensor; give --calib FOLDER "
                "(KITTI calibration files), which keeps what the camera sees. Other axes than those of the training look the same (--axes)"
            )


def _detect(
    path: Path,
    config: Predict,
    detector: Detector,
    rig: RigSpec,
    measured: Callable[[ScanMeasures], None],
    camera: _CameraWatch,
) -> _Found:
    points, reading = read_scan(path, config.reading)
    camera.look(path, points)
    points = rig.from_sensor(points)
    calibration = None
    if config.calib is not None:
        calibration = shift_calibration(_calibration(config.calib, path.stem, config.reading.image_size), rig.z_shift)
        reading = reading + Ledger(scans_off_center=int(is_off_center(calibration)))
        if detector.trained_on is not None and detector.trained_on.camera_view:
            whole = len(points)
            points = crop_to_camera(points, calibration)
            reading = reading + Ledger(points_outside_camera=whole - len(points))
    measures, ledger = measure_scan(points, detector.encoder, reading)
    if ledger.scans_without_points:  # a network makes boxes of nothing
        return _Found(boxes=Predictions.empty(), calibration=calibration, ledger=ledger)
    measured(measures)
    with unwatched(detector):  # `measured` compares
        found = detector.detect([points])[0].to("cpu")
    return _Found(boxes=found.select(found.scores >= config.min_score), calibration=calibration, ledger=ledger)


def _calibration(folder: Path, name: str, image_size: tuple[int, int] | None) -> Calibration:
    """The calibration of a scan; in KITTI's layout its picture lies beside and gives the size."""
    picture = find_picture(folder.parent / "image_2", name) if image_size is None else None
    return read_calibration(
        find_calibration(folder, name), image_size=image_size if picture is None else read_picture_size(picture)
    )


def _write(path: Path, found: _Found, config: Predict, rig: RigSpec, class_names: tuple[str, ...], done: _Done) -> None:
    if config.format == "kitti":
        assert found.calibration is not None
        objects = predictions_to_kitti(found.boxes, class_names, found.calibration)
        write_objects(config.out / f"{path.stem}.txt", objects)
        done.written[path.name] = len(objects)
        done.outside_picture[path.name] = len(found.boxes) - len(objects)
        return
    record = boxes_json(replace(found.boxes, boxes=rig.to_sensor(found.boxes.boxes)), class_names)
    write_atomically(config.out / f"{path.stem}.json", (json.dumps(record, indent=1) + "\n").encode())
    done.written[path.name] = len(record)


def _report(config: Predict, done: _Done, ledger: Ledger, experts: Mapping[str, Mapping[str, float]]) -> None:
    """Print and write what was done; raise an error where every scan failed."""
    outside = sum(done.outside_picture.values())
    value: dict[str, object] = {"boxes": done.written, "boxes_outside_picture": done.outside_picture, "failed": done.failed}
    value |= {"experts": experts} if experts else {}
    write_json(config.json, value | {"ledger": ledger.to_json(), "warnings": [*warnings_so_far(), *warnings_of(ledger)]})
    if done.failed:
        rows = list(done.failed.items())[:LISTED_FAILURES]
        print_table(f"scans that failed: {len(done.failed)}", ("scan", "why"), rows)
        if len(done.failed) > len(rows):
            console.print(f"and {len(done.failed) - len(rows)} more; --json FILE lists all")
    if not done.written:
        (name, reason), *others = done.failed.items()
        raise UpcycleError(
            f"none of {1 + len(others)} scans could be used, so nothing was written{_about_removed(done)}; {name} failed because: {reason}"
        )
    row = (len(done.written), sum(done.written.values()), str(config.out))
    print_table("detections", ("scans", "boxes written", "folder"), [row])
    console.print(f"scores of at least {config.min_score:g}; format {config.format}")
    if outside:
        print_warning(
            f"{outside} of {outside + row[1]} boxes lie outside the picture or behind the camera; KITTI's text has no place for them "
            "(--format json has). If they are many, look at the size of the picture (--image-size) and the calibrations"
        )
    if done.failed:
        print_warning(
            f"{len(done.failed)} of {len(done.failed) + row[0]} scans failed and have no detections{_about_removed(done)}"
        )
    settle(ledger, "scans that were read")


def _about_removed(done: _Done) -> str:
    return (
        f"; the files of an earlier run with the names of scans that failed now were removed: {done.removed}"
        if done.removed
        else ""
    )


if __name__ == "__main__":
    sys.exit(run_command(command))
