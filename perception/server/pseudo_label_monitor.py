"""How good pseudo labels are: a comparison with the truth where it is known, and the summary in a training's log.

For measurement only: nothing in this file reaches training. Read next: `pseudo_labels.py`, the rule that is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...core.structures import Labels
from ...ops.iou3d import iou_3d
from ..training.run_folder import RunFolder
from .pseudo_labels import labels_in_range
from .unlabeled_half import UnlabeledHalf

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PseudoLabelQuality:
    """How the pseudo labels of some scenes compare with the truth."""

    labels: int
    """Number of labels, ignored boxes left out."""

    ignored: int
    """Number of ignored boxes."""

    truth: int
    """Number of true objects that count: with weight and enough points."""

    precision_50: float
    """Share of labels that overlap a true object of their class by a 3D IoU of at least 0.5."""

    precision_70: float
    """The same for 0.7."""

    recall_50: float
    """Share of true objects that a label of their class overlaps by a 3D IoU of at least 0.5."""

    recall_70: float
    """The same for 0.7."""

    mean_iou: float
    """Mean 3D IoU of a label with the best true object of its class; 0 for a label without one."""


def pseudo_label_quality(pseudo: Sequence[Labels], truth: Sequence[Labels], *, min_points: int = 5) -> PseudoLabelQuality:
    """Compare pseudo labels with the truth, scene by scene.

    A label whose best match is an object that does not count (weight 0, or too few points) is left out if they overlap by at least
    0.5: it is neither right nor wrong.

    Args:
        pseudo: Pseudo labels of each scene.
        truth: True objects of each scene, in the same order.
        min_points: Number of LiDAR points from which a true object counts.

    Returns:
        Counts and shares over all scenes; shares of nothing are 0.
    """
    best_label: list[torch.Tensor] = []
    best_truth: list[torch.Tensor] = []
    ignored = 0
    for found, real in zip(pseudo, truth, strict=True):
        used = found.select(found.weight > 0)
        ignored += len(found) - len(used)
        counted = (real.weight > 0) & (real.num_points >= min_points)
        overlap = iou_3d(used.boxes.data, real.boxes.data) * (used.classes[:, None] == real.classes[None])
        if len(used):
            with_zero = torch.cat([overlap, overlap.new_zeros(len(used), 1)], 1)
            value, row = with_zero.max(1)
            neutral = torch.cat([~counted, counted.new_zeros(1)])[row] & (value >= 0.5)
            best_label.append(value[~neutral].cpu())
        if counted.any():
            column = torch.cat([overlap, overlap.new_zeros(1, len(real))]).amax(0)
            best_truth.append(column[counted].cpu())
    label_iou, truth_iou = torch.cat([*best_label, torch.zeros(0)]), torch.cat([*best_truth, torch.zeros(0)])

    def share(values: torch.Tensor, threshold: float) -> float:
        return float((values >= threshold).float().mean()) if values.numel() else 0.0

    return PseudoLabelQuality(
        labels=label_iou.numel(),
        ignored=ignored,
        truth=truth_iou.numel(),
        precision_50=share(label_iou, 0.5),
        precision_70=share(label_iou, 0.7),
        recall_50=share(truth_iou, 0.5),
        recall_70=share(truth_iou, 0.7),
        mean_iou=float(label_iou.mean()) if label_iou.numel() else 0.0,
    )


class PseudoLabelMonitor:
    """Collects the pseudo labels of a training and writes a summary into its log every few steps."""

    def __init__(self, *, every: int, truth: Mapping[str, Labels] | None = None, run: RunFolder | None = None) -> None:
        """Start with nothing collected.

        Args:
            every: Steps between two summaries.
            truth: True labels by scene id, where they are known; the summary then has precision, recall and mean IoU.
            run: Run folder whose metrics get the summary, as kind `pseudo_labels`.
        """
        self.every, self.truth, self.run = every, truth or {}, run
        self._clear()

    def _clear(self) -> None:
        self._pseudo: list[Labels] = []
        self._compared: list[Labels] = []
        self._truth: list[Labels] = []
        self._pasted = 0

    def add(self, half: UnlabeledHalf, scene_ids: Sequence[str]) -> None:
        """Collect the pseudo labels of one step.

        Args:
            half: The unlabeled half of the step's batch.
            scene_ids: Ids of its scenes, in the same order.
        """
        self._pseudo += half.found
        self._pasted += half.pasted
        for found, scene in zip(half.found, scene_ids, strict=True):
            if scene in self.truth:
                self._compared.append(found.to("cpu"))
                self._truth.append(labels_in_range(self.truth[scene], half.features.spec.grid))

    def finish_step(self, step: int) -> None:
        """Write the summary if it is due and something was collected, and start the next one.

        Args:
            step: The 0-based step that is done.
        """
        if not self._pseudo or (step + 1) % self.every:
            return
        values = self._summary()
        if self.run is not None:
            self.run.log(step, values, kind="pseudo_labels")
        log.info("pseudo labels until step %d: %s", step, ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
        self._clear()

    def _summary(self) -> dict[str, float]:
        scenes = len(self._pseudo)
        used = sum(int((p.weight > 0).sum()) for p in self._pseudo)
        values = {
            "labels_per_scene": used / scenes,
            "ignored_per_scene": sum(len(p) for p in self._pseudo) / scenes - used / scenes,
            "pasted_per_scene": self._pasted / scenes,
        }
        if self._compared:
            quality = pseudo_label_quality(self._compared, self._truth)
            names = ("precision_50", "precision_70", "recall_50", "recall_70", "mean_iou")
            values |= {name: getattr(quality, name) for name in names}
        return values
