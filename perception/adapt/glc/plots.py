"""Two pictures of an adaptation, as SVG for the report: where the samples lie, and where the unknown ones begin."""

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
_LEGEND = 15  # letters that fit beside the picture
_MARKS = 1500  # points drawn at most: a picture shows no more and the file stays small


def embedding_plot(features: Tensor, classes: Tensor, names: Sequence[str], title: str, *, seed: int = 0) -> str:
    """Normalised features (N, D) along their two main directions; colour by class (N,), grey where it is ``len(names)``: unknown.

    A random sample of 1,500 is drawn; classes beyond the sixth share colours with earlier ones, the legend names them together.
    """
    require(len(features) == len(classes), f"one class per sample expected, found {len(classes)} for {len(features)}")
    rows = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(features))[:_MARKS]))
    notes = [f"{len(rows)} of {len(features)} samples, the two principal components of normalised features"]
    if len(names) > len(PALETTE):
        notes.append(f"colours repeat every {len(PALETTE)} classes")
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
    """Unknown scores (N,) in 0..1, named ``label``, and the threshold, above which a sample counts as unknown."""
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
