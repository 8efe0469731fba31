"""Scores on a validation split while a detector trains. They only watch: the result of a training is the detector of its last step.

The best detector on the validation split is kept beside it, as `best.safetensors`, with a record that says it was chosen on that split:
its score there is too good, and no command takes it unless it is named.

Read next: `perception/evaluation/score.py`, which scores.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ...core.errors import InvalidInput, require
from ...core.files import write_atomically
from ...core.strict_json import strict_json
from ...datasets.data_split import DataSplit
from ...datasets.prepared import PreparedDataset
from ..evaluation.score import Protocol, Scores, own_protocol, score_detector
from ..models.detector import Detector
from ..training.detector_files import save_detector
from ..training.run_folder import RunFolder

BEST_FILE = "best.safetensors"
BEST_RECORD = "best.json"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is scored while a detector trains, and how often.

    Raises:
        InvalidInput: `every` is below 1.
    """

    data: DataSplit
    """Labeled split to score on. Take another one than the split that results are reported on."""
    every: int | None = None
    """Steps between two scores; the last step is always scored. None takes a tenth of all steps."""
    protocol: Protocol | None = None
    """Rules; the dataset's own by default, and `cross_dataset` for a dataset without one."""

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, f"validation needs at least 1 step between two scores, found {self.every}")


class Validator:
    """Scores a detector at the steps that are due, and keeps the best. Only one process of a training calls it."""

    def __init__(self, validation: Validation, *, total_steps: int, folder: Path) -> None:
        """Open the split and check that it can be scored, before the training takes a folder.

        Args:
            validation: What is scored.
            total_steps: Steps of the training.
            folder: The run folder, which may not exist yet.

        Raises:
            InvalidInput: The split has frames without labels.
        """
        self.frames = validation.data.open()
        self.data, self.folder, self.total = validation.data, folder, total_steps
        self.every = validation.every or max(1, total_steps // 10)
        self.protocol = validation.protocol or _protocol_of(self.frames)
        if any(self.frames.labels(i) is None for i in range(len(self.frames))):
            raise InvalidInput(f"{validation.data} has frames without labels, so it cannot be scored; take a labeled split")

    def look(self, step: int, detector: Detector, run: RunFolder | None, *, progress: bool = False) -> Scores | None:
        """Score a detector if this step is due. It is in training mode afterwards.

        Args:
            step: The 0-based step that is done.
            detector: The detector in training.
            run: Run folder for the scores.
            progress: Whether a line is printed to the error stream.

        Returns:
            The scores, or None where the step is not due.
        """
        done = step + 1
        if done % self.every and done != self.total:
            return None
        scores = dict(score_detector(detector, self.frames, self.protocol).headline())
        detector.train()
        if progress:
            print(
                f"validation after step {done}: {', '.join(f'{n} {v:.2f}' for n, v in scores.items()) or 'no score'}",
                file=sys.stderr,
            )
        if run is not None:
            run.log(step, scores, kind="validation")
            self._keep_best(done, detector, scores)
        return scores

    def _keep_best(self, done: int, detector: Detector, scores: Scores) -> None:
        known = [value for value in scores.values() if value == value]
        if not known:
            return
        score, record = fmean(known), self.folder / BEST_RECORD
        if record.exists() and strict_json(record.read_bytes(), str(record)).get("score", -1.0) >= score:
            return
        save_detector(self.folder / BEST_FILE, detector)
        body = {
            "step": done,
            "score": score,
            "scores": scores,
            "chosen_on": str(self.data),
            "protocol": self.protocol,
            "note": f"The mean of these scores was the highest among the steps that were looked at. The step was chosen on {self.data}, so its "
            "score there is too good to report; report scores on another split.",
        }
        write_atomically(record, (json.dumps(body, indent=1) + "\n").encode())


def _protocol_of(frames: PreparedDataset) -> Protocol:
    try:
        return own_protocol(frames)
    except InvalidInput:
        return "cross_dataset"
