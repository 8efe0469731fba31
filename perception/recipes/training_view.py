"""What a finished upcycling run made of a scene: the labels of its teacher, and the objects that F-GT pastes.

A training shows its student each scene once, with augmentation, and keeps none of it. This file makes the same again for one scene, without the
augmentation, so that a person can look at it. Read next: `perception/server/unlabeled_half.py`, which does the work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...core.config_json import config_stored_in
from ...core.errors import InvalidInput
from ...core.features import CutFeatures
from ...core.rig import RigSpec
from ...core.structures import Labels
from ..models.detector import Detector
from ..models.encoders.fingerprint import encoder_fingerprint
from ..server.feature_gt import JoinedObjects, ObjectDatabase
from ..server.feature_object_database import FeatureObjectDatabase
from ..server.methods import METHODS, Method
from ..server.unlabeled_half import smashed_half
from ..server.upcycle_config import UpcycleConfig
from ..training.detector_files import TEACHER_FILE, load_detector
from ..training.run_folder import RunFolder
from .fleet_sizes import SIZES_FILE, at_sizes_of, read_estimates
from .job_records import UpcyclingRecord
from .labeled_half import NO_SHIFT
from .upcycling_job import OBJECTS_FOLDER


@dataclass(frozen=True, kw_only=True)
class SceneInTraining:
    """One scene as the student would see it, before augmentation."""

    features: CutFeatures
    """Features after pasting, a batch of one."""
    teacher: Labels
    """Labels that the rule of the method makes of the teacher's detections; weight 0 where a box is ignored."""
    pasted: Labels
    """Objects that F-GT pasted; none for a method without F-GT."""


@dataclass(frozen=True, kw_only=True)
class TrainingView:
    """The parts of an upcycling run that decide what its student sees.

    Example:
        view = TrainingView.open("runs/upcycled")
        scene = view.look(collate_scenes([store[0]]))
        print(len(scene.teacher), len(scene.pasted))
    """

    teacher: Detector
    """The teacher after the last step, in evaluation mode."""
    student: Detector
    """The result of the run, with the encoder that the fleet runs. The teacher's encoder is an average of equal weights. It may differ in the sign
    of a zero, and then it has another fingerprint."""
    method: Method
    """The method, without its augmentation."""
    config: UpcycleConfig
    """Thresholds and F-GT's settings."""
    objects: ObjectDatabase | None
    """Objects to paste; None where the method pastes none."""
    seed: int
    """Seed of the run. What is pasted is drawn anew, so it is not what one step of the run pasted."""

    @staticmethod
    def open(run: Path | str) -> TrainingView:
        """Read the run folder of `upcycle`.

        Args:
            run: The folder of a finished run.

        Returns:
            Its teacher, method and objects.

        Raises:
            InvalidInput: The folder is no run of `upcycle`, the run is not finished, its method is the caller's own, or its objects are
                damaged or were cut from other data.
        """
        run = Path(run)
        stored = RunFolder.open(run).config_json()
        if "method" not in stored:
            raise InvalidInput(f"{run} is a run of `train`, which has no teacher; give the run folder of `upcycle`")
        record = config_stored_in(run / "config.json", UpcyclingRecord, stored, "give the run folder of `upcycle`")
        if not isinstance(record.method, str) or record.method not in METHODS:
            raise InvalidInput(
                f"the run in {run} used a method that is not one of {', '.join(METHODS)}, so its labels cannot be made again"
            )
        if not (run / TEACHER_FILE).is_file():
            raise InvalidInput(f"{run} holds no {TEACHER_FILE}: the run is not finished; continue it with `upcycle --resume`")
        teacher, student = load_detector(run / TEACHER_FILE), load_detector(run)
        method = replace(METHODS[record.method], augmentation=None, mixing=None)
        config = record.preset.upcycle
        if method.estimates_sizes:
            config = at_sizes_of(config, read_estimates(run / SIZES_FILE))
        objects = _objects(run, record, student, config) if method.f_gt else None
        return TrainingView(teacher=teacher, student=student, method=method, config=config, objects=objects, seed=record.seed)

    def look(self, features: CutFeatures, number: int = 0) -> SceneInTraining:
        """Make labels and paste objects for one scene.

        Args:
            features: Its features, as a vehicle of this fleet sends them; a batch of one.
            number: Number of the scene. Each has its own draw of objects.

        Returns:
            The scene as the student would see it.

        Raises:
            InvalidInput: The features were made at another cut.
        """
        rng = np.random.default_rng([self.seed, number])
        half = smashed_half(features, self.teacher, method=self.method, config=self.config, pasted_objects=self.objects, rng=rng)
        (labels,), (found,) = half.labels, half.found
        rows = np.arange(len(labels)) >= len(found)  # pasted objects follow the teacher's labels
        pasted = labels.classes.new_tensor(rows.tolist()).bool()
        return SceneInTraining(features=half.features, teacher=labels.select(~pasted), pasted=labels.select(pasted))


def _objects(run: Path, record: UpcyclingRecord, student: Detector, config: UpcycleConfig) -> ObjectDatabase:
    """The databases that the run built: of the labeled split, and of the labeled frames of the target where there are any."""
    fingerprint = encoder_fingerprint(student.encoder, RigSpec())
    folder = run / OBJECTS_FOLDER
    found: list[ObjectDatabase] = [
        FeatureObjectDatabase.open(
            folder, config=config.f_gt, split_fingerprint=record.data_fingerprint, encoder_fingerprint=fingerprint
        )
    ]
    if record.target_labels is not None:
        unshifted = replace(config.f_gt, size_shift=NO_SHIFT)
        beside = folder.with_name(f"{OBJECTS_FOLDER}_target")
        found.append(
            FeatureObjectDatabase.open(
                beside, config=unshifted, split_fingerprint=record.target_fingerprint, encoder_fingerprint=fingerprint
            )
        )
    return found[0] if len(found) == 1 else JoinedObjects(found)
