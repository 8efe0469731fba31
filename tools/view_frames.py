"""What `upcycle3d view` draws: frames of a prepared dataset, files of scans, or the smashed scenes of a store, as `DrawnFrame`s.

Read next: `perception/viewers/drawn_frame.py`, the value that every viewer takes; `perception/recipes/training_view.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..core.detection_json import read_boxes_json
from ..core.errors import InvalidInput
from ..core.features import CutFeatures
from ..core.foreign_text import check_name
from ..core.ledger import Ledger
from ..core.point_files import find_scans, read_scan
from ..core.scan_options import ScanOptions
from ..core.structures import PointCloud, Predictions
from ..datasets.data_split import DataSplit
from ..perception.models.detector import Detector
from ..perception.models.encoders.fingerprint import encoder_fingerprint
from ..perception.recipes.fleet_stores import rig_of_training
from ..perception.recipes.scan_survey import data_warnings, survey_split
from ..perception.recipes.training_view import TrainingView
from ..perception.server.store import SmashedStore, collate_scenes
from ..perception.training.detector_files import load_detector
from ..perception.viewers.drawn_frame import DrawnFrame
from ..perception.viz.bev import renumbered


@dataclass(kw_only=True)
class FramesToDraw:
    """What was found for the options of `view`."""

    frames: list[DrawnFrame] = field(default_factory=list)
    """The frames, in order."""
    found: int = 0
    """How many frames there are; the first ones are drawn."""
    below_score: list[int] = field(default_factory=list)
    """Detections of each frame that are left out because of their score."""
    ledger: Ledger = Ledger()
    """What was read and dropped."""
    warnings: list[str] = field(default_factory=list)
    """What does not fit together."""

    def add(self, frame: DrawnFrame, found: Predictions | None, own: tuple[str, ...], min_score: float) -> None:
        """Add a frame with its detections.

        Args:
            frame: The frame without detections.
            found: Detections, of any score; None where nobody looked for objects.
            own: Names of the classes of `found`.
            min_score: Detections with a lower score are left out.
        """
        below = 0
        if found is not None:
            found, names = renumbered(found, own, frame.class_names)
            good = found.scores >= min_score
            below = int((~good).sum())
            frame = replace(frame, detections=found.select(good), class_names=names)
        self.frames.append(frame)
        self.below_score.append(below)


@dataclass(frozen=True, kw_only=True)
class Looker:
    """Who looks at a frame: a detector, an upcycling run, both or none."""

    detector: Detector | None = None
    """Its detections are drawn, and its features where there is no run."""
    training: TrainingView | None = None
    """The run whose teacher labels, pasted objects and features are drawn."""
    with_features: bool = True
    """Whether features are drawn; computing them takes time."""

    @staticmethod
    def load(detector: Path | None, training: Path | None, *, with_features: bool) -> Looker:
        """Load what the options name.

        Args:
            detector: Run folder or detector file.
            training: Run folder of `upcycle`.
            with_features: See the attribute.

        Returns:
            The detector and the run.

        Raises:
            InvalidInput: A folder or file cannot be used.
        """
        return Looker(
            detector=None if detector is None else load_detector(detector),
            training=None if training is None else TrainingView.open(training),
            with_features=with_features,
        )

    def look(self, frame: DrawnFrame, number: int) -> DrawnFrame:
        """Add features, and what the run makes of them.

        Args:
            frame: A frame with points, or with the features of a smashed scene.
            number: Number of the frame, for the draw of pasted objects.

        Returns:
            The frame with features, teacher labels and pasted objects, as far as they are asked for.
        """
        if not self.with_features:
            return frame
        if frame.features is None and frame.points is not None:
            frame = replace(frame, features=self._features(frame.points))
        if self.training is None or frame.features is None:
            return frame
        scene = self.training.look(frame.features, number)
        own = self.training.teacher.class_names
        teacher, names = renumbered(scene.teacher, own, frame.class_names)
        pasted, names = renumbered(scene.pasted, own, names)
        return replace(frame, features=scene.features, teacher=teacher, pasted=pasted, class_names=names)

    def differences(self, store: SmashedStore) -> list[str]:
        """Say where the scenes of a store come from another encoder, or another kind of rig, than those who look at them know.

        Args:
            store: The store.

        Returns:
            A sentence for each option that names another encoder.
        """
        detectors = {"--detector": self.detector, "--teacher": None if self.training is None else self.training.student}
        return [
            f"the store {store.folder} was made by another encoder, or on another kind of rig, than the one that {option} was trained with, so "
            "the boxes may be wrong; give the detector whose encoder the fleet runs"
            for option, each in detectors.items()
            if isinstance(each, Detector) and store.fingerprint != encoder_fingerprint(each.encoder, rig_of_training(each))
        ]

    def _features(self, points: PointCloud) -> CutFeatures | None:
        detector = self.detector if self.training is None else self.training.teacher
        return detector.upload([points]) if isinstance(detector, Detector) else None


def frames_of_data(data: DataSplit, looker: Looker, *, limit: int, min_score: float) -> FramesToDraw:
    """Take frames of a prepared dataset.

    Args:
        data: The split.
        looker: Who looks at them.
        limit: Highest number of frames; the first ones are taken.
        min_score: Detections with a lower score are left out.

    Returns:
        The frames with their labels.

    Raises:
        InvalidInput: The dataset cannot be read, or the id of a frame cannot be a file name.
    """
    source = data.open()
    number = min(len(source), limit)
    for frame_id in source.ids[:number]:
        check_name(frame_id, "frame id")
    drawn = FramesToDraw(found=len(source), ledger=Ledger(scans=number))
    if isinstance(looker.detector, Detector):
        survey = survey_split(source, looker.detector.encoder, most=number)
        drawn.ledger = survey.ledger
        drawn.warnings += data_warnings(looker.detector, source, survey.statistics)
    for i in range(number):
        frame = source[i]
        found = None if looker.detector is None else looker.detector.detect([frame.points])[0]
        own = () if looker.detector is None else looker.detector.class_names
        plain = DrawnFrame(id=frame.id, class_names=source.classes, points=frame.points, truth=frame.labels)
        drawn.add(looker.look(plain, i), found, own, min_score)
    return drawn


def frames_of_scans(
    scans: Sequence[Path], detections: Path | None, reading: ScanOptions, *, limit: int, min_score: float
) -> FramesToDraw:
    """Take files of scans, with the detections that `predict` wrote for them. Both are in the sensor frame.

    Args:
        scans: Files, or folders of them.
        detections: A file for one scan, or a folder with a file `NAME.json` for each scan; None without detections.
        reading: How scans are read.
        limit: Highest number of scans.
        min_score: Detections with a lower score are left out.

    Returns:
        The frames.

    Raises:
        InvalidInput: A file cannot be read, or no scan has detections.
    """
    paths, ledger = find_scans(scans)
    if detections is not None and not detections.is_dir() and len(paths) > 1:
        raise InvalidInput(
            f"{len(paths)} scans need a folder of detections, and {detections} is none; give the folder that `predict` wrote"
        )
    drawn, missing = FramesToDraw(found=len(paths), ledger=ledger), []
    for path in paths[:limit]:
        points, counted = read_scan(path, reading, rig=reading.rig())
        drawn.ledger = drawn.ledger + counted
        file = detections if detections is None or not detections.is_dir() else detections / f"{path.stem}.json"
        if file is not None and not file.exists():
            missing.append(path.name)
            file = None
        found, own = (None, tuple[str, ...]()) if file is None else read_boxes_json(file)
        drawn.add(DrawnFrame(id=check_name(path.stem, "name of a scan"), class_names=(), points=points), found, own, min_score)
    if missing and len(missing) == len(drawn.frames):
        raise InvalidInput(
            f"{detections} holds no detections for {missing[0]}: there is no file of its name with the suffix .json"
        )
    if missing:
        drawn.warnings.append(
            f"{len(missing)} of {len(drawn.frames)} scans have no file of detections in {detections}, such as {missing[0]}"
        )
    if reading.z_shift and detections is not None:
        drawn.warnings.append(
            "--z-shift moves the points, and the boxes of `predict` are in the sensor frame, so both do not fit; leave it out"
        )
    return drawn


def frames_of_store(store: Path, looker: Looker, *, limit: int, min_score: float) -> FramesToDraw:
    """Take smashed scenes of a store. They hold no points, so their occupied cells are drawn.

    Args:
        store: Folder of the store.
        looker: Who looks at them.
        limit: Highest number of scenes; the first ones are taken.
        min_score: Detections with a lower score are left out.

    Returns:
        The frames, in the order of the store. The id of a frame is its position, followed by the first digits of the scene's name.

    Raises:
        InvalidInput: The scenes were made at another cut than the detector or the teacher decodes.
        BrokenStore: The store cannot be read.
    """
    scenes = SmashedStore(store)
    number = min(len(scenes), limit)
    if not number:
        raise InvalidInput(
            f"the store {store} holds no scene; look for reasons in its quarantine folder, then run `ingest` again"
        )
    drawn = FramesToDraw(found=len(scenes), ledger=Ledger(scans=number))
    drawn.warnings += looker.differences(scenes)
    for i in range(number):
        scene = scenes[i]
        features = collate_scenes([scene])
        found = None
        if looker.detector is not None:
            with torch.no_grad():
                found = looker.detector.predict(looker.detector.decode(features))[0]
        own = () if looker.detector is None else looker.detector.class_names
        plain = DrawnFrame(id=f"{i:06d}_{scene.scene_id[:8]}", class_names=(), features=features)
        drawn.add(looker.look(plain, i), found, own, min_score)
    return drawn
