"""Two pictures of an adaptation, as SVG for the report: where the samples lie, and from which score they are unknown.

Read next: `feature_report.py`, and `../detection/adaptation_report.py` for detectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import require
from ...viz.svg import LINE, PALETTE, WIDTH, Plot, Svg, color_of, linear_ticks
from .kmeans import principal_components

UNKNOWN_COLOR = "#8A939C"
_LEGEND = 15  # letters that fit next to the picture
_MARKS = 1500  # most points that are drawn: a picture shows no more and the file stays small


def embedding_plot(features: Tensor, classes: Tensor, names: Sequence[str], title: str, *, seed: int = 0) -> str:
    """Draw normalized features along their two main directions, colored by class and gray for unknown.

    At most 1,500 samples are drawn, chosen at random. Classes beyond the sixth share colors with earlier ones, and the legend
    names them together.

    Args:
        features: (N, D) of any length.
        classes: (N,) int64 in 0..len(names); `len(names)` means unknown.
        names: Names of the known classes.
        title: Title of the picture.
        seed: Decides which samples are drawn.

    Returns:
        The SVG element.

    Raises:
        InvalidInput: There is not one class per sample.
    """
    require(len(features) == len(classes), f"a plot needs one class per sample, found {len(classes)} for {len(features)}")
    rows = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(features))[:_MARKS]))
    notes = [f"{len(rows)} of {len(features)} samples, the two principal components of normalized features"]
    if len(names) > len(PALETTE):
        notes.append(f"colors repeat every {len(PALETTE)} classes")
    plot = Plot(Svg(title, notes, 400), left=56, right=120, bottom=48)
    label = "first principal component, upwards the second"
    if not len(rows):
        return plot.empty(label)
    points = principal_components(F.normalize(features[rows.to(features.device)]), 2).cpu().numpy()
    points = np.hstack([points, np.zeros((len(points), 2))])[:, :2]
    drawn = classes[rows.to(classes.device)].cpu().numpy()
    x_at = plot.x_axis(linear_ticks(*_ends(points[:, 0]), 6), _ends(points[:, 0]), label)
    y_at = plot.y_axis(*_ends(points[:, 1]), False)
    for x, y, index in zip(x_at(points[:, 0]), y_at(points[:, 1]), drawn, strict=True):
        plot.svg.circle(x, y, 2, UNKNOWN_COLOR if index == len(names) else color_of(int(index)))
    entries = [(", ".join(names[i :: len(PALETTE)]), color) for i, color in enumerate(PALETTE[: len(names)])]
    for k, (text, color) in enumerate([*entries, ("unknown", UNKNOWN_COLOR)]):
        plot.svg.circle(WIDTH - 106, plot.top + 8 + LINE * k, 4, color)
        plot.svg.text(WIDTH - 96, plot.top + 12 + LINE * k, text if len(text) <= _LEGEND else text[: _LEGEND - 1] + "…", size=12)
    return plot.svg.done()


def score_histogram(scores: Tensor, threshold: float, title: str, label: str, *, bins: int = 50) -> str:
    """Draw a histogram of unknown scores with the threshold.

    Args:
        scores: (N,) unknown scores, 0 to 1.
        threshold: A score above it means unknown.
        title: Title of the picture.
        label: Name of the score at the axis.
        bins: Number of bins.

    Returns:
        The SVG element.
    """
    values = scores.detach().cpu().numpy()
    above = int((values > threshold).sum())
    plot = Plot(
        Svg(title, [f"samples per bin; {above} of {len(values)} lie above the threshold {threshold:.3f}"], 300),
        left=56,
        right=16,
        bottom=48,
    )
    label = f"{label} (0 certain, 1 no idea)"
    if not len(values):
        return plot.empty(label)
    counts, edges = np.histogram(values, bins=bins, range=(0.0, 1.0))
    x_at = plot.x_axis(linear_ticks(0.0, 1.0, 5), (0.0, 1.0), label)
    y_at = plot.y_axis(0.0, float(max(1, counts.max())), False)
    base = float(y_at(np.asarray(0.0)))
    for count, left, right in zip(counts.tolist(), x_at(edges[:-1]), x_at(edges[1:]), strict=True):
        top = float(y_at(np.asarray(count)))
        middle = (left + right) / 2
        color = UNKNOWN_COLOR if middle > float(x_at(np.asarray(threshold))) else PALETTE[0]
        plot.svg.rect(left, top, right - left - 0.5, base - top, color)
    at = float(x_at(np.asarray(min(max(threshold, 0.0), 1.0))))
    plot.svg.line(at, plot.top, at, plot.bottom, color=PALETTE[1], width=2)
    return plot.svg.done()


def _ends(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())
