"""``upcycle3d adapt features``: pseudo labels and unknown scores for features of an unlabelled target domain.

A command for detectors would be a module of its own beside this one, registered as ``adapt detector``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from ..core.errors import InvalidInput
from ..perception.adapt.glc.feature_file import facts, label_features, read_features, report, write_labels
from ..perception.adapt.glc.labeling import ClassNumberConfig, OneVsAllConfig
from ..perception.adapt.glc.lead import LeadConfig
from ..perception.adapt.glc.unknown import UnknownRule
from ..perception.viz.html import write_html
from .console import console, print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class Features:
    """Label target features with GLC's one-vs-all clustering, and choose a threshold for the unknown; no training."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """npz files with features (N, D) and probabilities (N, C); labels (N,), if there, only serve to report metrics"""
    out: Path
    """folder for the results: NAME.npz, NAME.json and NAME.html of every NAME.npz"""
    class_number: int | None = None
    """number of classes of the target, if it is known; else it is estimated"""
    labeler: Literal["glc", "lead"] = "glc"
    """lead needs the classifier's weight (C, D) as the array "weight" of the file"""
    options: Literal["ours", "paper"] = "ours"
    """positives and k-means of the labeller, candidates of the class number, and threshold: ours, or the GLC paper's"""
    threshold: Literal["fixed", "otsu", "yen", "two_means"] | None = None
    """rule of the threshold, if another than that of the options"""
    fixed_threshold: float = 0.55
    """normalised entropy above which a sample is unknown, with the rule "fixed\""""
    seed: int = 0
    """of the class number's estimate and of k-means"""


def command(config: Features) -> None:
    """Pseudo labels and unknown scores for features of an unlabelled target domain."""
    stems = [path.stem for path in config.files]
    if not stems or len(set(stems)) != len(stems):
        raise InvalidInput(f"give at least one file, and files of different names: results are named after them; found {stems}")
    if config.out.resolve() in {path.resolve().parent for path in config.files}:
        raise InvalidInput(f"the results would overwrite the files in {config.out}; give another folder with --out")
    paper = config.options == "paper"
    rows = []
    for path in config.files:
        file = read_features(path)
        found = label_features(
            file,
            class_number=config.class_number,
            labeling=_labeling(config),
            unknown=_rule(config),
            estimate=ClassNumberConfig.paper() if paper else ClassNumberConfig(),
            seed=config.seed,
        )
        numbers = facts(file, found)
        write_labels(config.out / f"{path.stem}.npz", found)
        write_json(config.out / f"{path.stem}.json", numbers)
        write_html(config.out / f"{path.stem}.html", report(path.stem, file, found))
        share = 100 * int((found.labels.hard == file.probabilities.shape[1]).sum()) / len(file.features)
        rows.append((path.stem, len(file.features), found.labels.class_number, f"{share:.1f} %", f"{found.threshold:.3f}"))
    print_table("labelled", ("file", "samples", "target classes", "unknown", "threshold"), rows)
    console.print(f"written to {config.out}")


def _labeling(config: Features) -> OneVsAllConfig | LeadConfig:
    clustering = OneVsAllConfig.paper() if config.options == "paper" else OneVsAllConfig()
    return LeadConfig() if config.labeler == "lead" else replace(clustering, seed=clustering.seed + config.seed)


def _rule(config: Features) -> UnknownRule:
    rule = UnknownRule(method="fixed") if config.options == "paper" else UnknownRule()
    return UnknownRule(method=config.threshold or rule.method, value=config.fixed_threshold)


if __name__ == "__main__":
    sys.exit(run_command(command))
