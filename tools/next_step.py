"""What a training wrote and where, and the command that scores it, with a split and a protocol that the dataset really has.

Read next: `tools/evaluate.py`.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..core.errors import InvalidInput
from ..core.short_numbers import duration_text
from ..datasets.data_split import DataSplit
from ..datasets.prepared import PreparedDataset
from ..perception.evaluation.score import own_protocol

_IN_A_RUN = {
    "detector.safetensors": "the detector",
    "teacher.safetensors": "its teacher",
    "encoder.safetensors": "for vehicles",
    "best.safetensors": "best on the validation split",
    "metrics.jsonl": "all metrics",
    "checkpoints": "to resume",
    **{name: f"metrics in {name}" for name in ("tensorboard", "wandb", "mlflow", "trackio")},
}


def what_lies_in(run: Path, seconds: float | None = None) -> str:
    """Say what a training has left in its run folder.

    Args:
        run: The run folder.
        seconds: Duration of the training, where it is known.

    Returns:
        One line.
    """
    parts = [f"{name} ({what})" for name, what in _IN_A_RUN.items() if (run / name).exists()]
    after = "" if seconds is None else f" after {duration_text(seconds)}"
    return f"{run}{after}: {', '.join(parts)}"


def scoring_command(detector: Path, data: DataSplit) -> str:
    """Write the command that scores a detector next.

    Args:
        detector: Its run folder.
        data: The split that it learned from.

    Returns:
        A line to paste: on the split `val` of the dataset, else on another one, else on the training split itself. KITTI's AP without
        a camera is named where the dataset has no protocol of its own, as a folder of scans.
    """
    frames = PreparedDataset(data.root, data.name)
    others = sorted((n for n in frames.splits if n != data.name and not n.startswith("train")), key=lambda name: name != "val")
    labeled = (name for name in others if PreparedDataset(data.root, name).labels(0) is not None)
    split = next(labeled, data.name or "train")
    words = ["upcycle3d", "evaluate", "run", "--detector", str(detector), "--data", f"{data.root}:{split}"]
    try:
        own_protocol(frames)
    except InvalidInput:
        words += ["--protocol", "cross_dataset"]
    return shlex.join(words)
