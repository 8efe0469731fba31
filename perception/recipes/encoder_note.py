"""What a training that changes the encoder of a detector costs: the scenes that a fleet sent with that encoder.

Read next: `jobs.py`, which says it before the first step.
"""

from __future__ import annotations

from pathlib import Path

from ...core.errors import UpcycleError
from ..models.detector import Detector
from ..models.upcycled import UpcycledDetectorConfig
from ..training.run_folder import RunFolder


def encoder_note(source: Path, detector: Detector) -> tuple[str, ...]:
    """Say that stored scenes will not fit the result, where the encoder of the source is one that a fleet may run.

    Args:
        source: Run folder, detector file or checkpoint that a training of the whole detector starts from.
        detector: The detector that is trained.

    Returns:
        One sentence where the detector has an upcycled head, or `source` is a run of `upcycle`, which keeps the encoder of its source model;
        else nothing.
    """
    if isinstance(detector.config, UpcycledDetectorConfig):
        why = "has an upcycled head, whose encoder is that of its specialists"
    elif kept := _kept_from(source):
        why = f"was made by `upcycle`, which kept the encoder of {kept}"
    else:
        return ()
    return (
        f"this training changes the encoder too, and {source} {why}: smashed scenes that were extracted with that encoder will not fit the "
        f"result, and vehicles must get its new encoder file. To keep them valid, train the decoder alone: upcycle3d upcycle PRESET --detector "
        f"{source} --data DIR:train --method source_continued --out RUN",
    )


def _kept_from(source: Path) -> str:
    """The source model of the run of `upcycle` that a path lies in; empty where there is no such run."""
    for folder in (source, *list(source.absolute().parents)[:2]):
        try:
            stored = RunFolder.open(folder).config_json()
        except (UpcycleError, OSError, ValueError):
            continue
        return str(stored["detector"]) if "method" in stored and isinstance(stored.get("detector"), str) else ""
    return ""
