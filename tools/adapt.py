"""`upcycle3d adapt features`: pseudo labels and unknown scores for features of an unlabeled target domain.

Read next: `perception/adapt/glc/adapt_features.py`. The command for detectors is in `adapt_detector.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from ..core.errors import InvalidInput
from ..perception.adapt.glc.adapt_features import adapt_features
from ..perception.adapt.glc.feature_labels import FeatureLabelConfig
from ..perception.adapt.glc.lead_labels import LeadConfig
from ..perception.adapt.glc.unknown_rule import ThresholdKind, UnknownRule
from .console import console, print_table, print_warning, run_command


@dataclass(frozen=True, kw_only=True)
class Features:
    """Label target features with GLC's one-vs-all clustering, and choose a threshold for unknown samples. Nothing is trained."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """npz files with the arrays `features` (N, D) and `probabilities` (N, C). `labels` (N,), if present, only serve for metrics."""
    out: Path
    """Folder for the results: NAME.npz, NAME.json and NAME.html for every NAME.npz."""
    class_number: int | None = None
    """Number of classes of the target, if it is known. Without it: as many as the source has; `--options paper` estimates it."""
    labeler: Literal["glc", "lead"] = "glc"
    """Which pseudo labels are made. `lead` needs the classifier's weight (C, D) as the array `weight` of the file."""
    options: Literal["ours", "paper"] = "ours"
    """Settings of labels, class number and threshold: ours, or those of the GLC paper, which never fall back to the source model."""
    threshold: ThresholdKind | None = None
    """How the threshold is chosen, if not the way of `--options`."""
    fixed_threshold: float = 0.55
    """Normalized entropy above which a sample is unknown, with the threshold `fixed`."""
    seed: int = 0
    """Decides the estimate of the class number and the clustering."""


def command(config: Features) -> None:
    """Pseudo labels and unknown scores for features of an unlabeled target domain."""
    stems = [path.stem for path in config.files]
    if not stems or len(set(stems)) != len(stems):
        raise InvalidInput(f"give at least one file, and files of different names: results are named after them; found {stems}")
    if config.out.resolve() in {path.resolve().parent for path in config.files}:
        raise InvalidInput(f"the results would overwrite the files in {config.out}; give another folder with --out")
    settings = _settings(config)
    rows = []
    for path in config.files:
        found = adapt_features(path, config.out, settings)
        samples, classes = found.labels.soft.shape
        share = 100 * int((found.labels.hard == classes).sum()) / samples
        if found.guard.doubts:
            print_warning(f"{path.name}: {found.guard.sentence()}")
        decided = "no adaptation" if found.guard.fell_back else "adaptation"
        rows.append((path.stem, samples, found.labels.class_number, f"{share:.1f} %", f"{found.threshold:.3f}", decided))
    print_table("labeled", ("file", "samples", "target classes", "unknown", "threshold", "labels by"), rows)
    console.print(f"written to {config.out}")


def _settings(config: Features) -> FeatureLabelConfig:
    base = FeatureLabelConfig.paper() if config.options == "paper" else FeatureLabelConfig()
    unknown = UnknownRule(kind=config.threshold or base.unknown.kind, value=config.fixed_threshold)
    labeling = LeadConfig() if config.labeler == "lead" else base.labeling
    return replace(base, class_number=config.class_number, labeling=labeling, unknown=unknown, seed=config.seed)


if __name__ == "__main__":
    sys.exit(run_command(command))
