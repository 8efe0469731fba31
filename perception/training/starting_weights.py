"""Starts a training from weights that exist: a run, a detector file, a checkpoint, or imported weights.

Weights are taken by name where their shapes are equal. With other classes, the parts that belong to classes start fresh and everything
else is taken. What was taken, what is fresh and what was not used is reported by name.

Read next: `detector_files.py`, which reads the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...core.errors import InvalidInput
from ...core.tensor_file import content_digest
from ..models.detector import Detector
from .detector_files import load_detector


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """Which weights a training started from."""

    source: Path
    """Run folder, detector file or checkpoint that they came from."""
    taken: tuple[str, ...]
    """Names of the tensors that were taken."""
    fresh: tuple[str, ...]
    """Names of the tensors that keep their random start."""
    unused: tuple[str, ...]
    """Names of the tensors of the source that the detector has no place for."""
    digest: str
    """SHA-256 of all tensors of the source."""

    def rows(self) -> list[tuple[str, int, str]]:
        """Summarize for a table.

        Returns:
            What happened to tensors, how many there are, and the parts that they belong to.
        """
        return [
            (what, len(names), _parts(names))
            for what, names in (("taken", self.taken), ("fresh", self.fresh), ("unused", self.unused))
        ]


def take_weights(detector: Detector, source: str | Path) -> StartingWeights:
    """Copy the weights of another training into a detector, as far as they fit.

    Args:
        detector: The detector to change, with fresh weights.
        source: Run folder, detector file or checkpoint.

    Returns:
        What was taken.

    Raises:
        InvalidInput: The source cannot be read, or nothing of it fits.
    """
    given = load_detector(source)
    same_classes = given.class_names == detector.class_names
    of_classes = () if same_classes else tuple(f"decoder.{part}." for part in detector.decoder.class_parts)
    offered, own = given.state_dict(), detector.state_dict()
    taken = [
        name
        for name, target in own.items()
        if name in offered
        and offered[name].shape == target.shape
        and offered[name].is_floating_point() == target.is_floating_point()
        and not name.startswith(of_classes or ("\0",))
    ]
    if not any(own[name].ndim > 1 for name in taken):
        odd = [
            f"{n} is {tuple(offered[n].shape)} there and {tuple(t.shape)} here"
            for n, t in own.items()
            if n in offered and t.ndim > 1
        ]
        reason = f"; for example {odd[0]}" if odd else ""
        raise InvalidInput(
            f"no weight of {source} (a {given.label}) fits this {detector.label}{reason}; take a preset of the same architecture and sizes"
        )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(offered[name])
    chosen = set(taken)
    return StartingWeights(
        source=Path(source),
        taken=tuple(taken),
        fresh=tuple(name for name in own if name not in chosen),
        unused=tuple(name for name in offered if name not in chosen),
        digest=content_digest(offered),
    )


def _parts(names: Sequence[str]) -> str:
    """The parts of a detector that tensors belong to, each with the number of its tensors."""
    counts: dict[str, int] = {}
    for name in names:
        part = ".".join(name.split(".")[:2])
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} ({number})" for part, number in counts.items())
