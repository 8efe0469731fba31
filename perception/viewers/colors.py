"""Colors of the viewers: one for each layer of boxes, a scale for heights and intensities, and colors that stand for features.

The colors of the layers are Okabe and Ito's, which people with color blindness can tell apart, on a dark ground.
Read next: `drawn_frame.py`, whose values get these colors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .drawn_frame import DrawnFrame, LayerName

LAYER_COLORS: dict[LayerName, tuple[int, int, int]] = {
    "truth": (86, 180, 233),
    "detections": (230, 159, 0),
    "teacher": (0, 200, 140),
    "pasted": (230, 130, 190),
}
"""Red, green and blue, 0..255. In the order of the layers: sky blue, orange, green, purple."""

SCALE: tuple[tuple[int, int, int], ...] = ((62, 74, 137), (49, 104, 142), (38, 150, 139), (83, 197, 103), (222, 226, 90))
"""Colors from low to high, evenly spaced: viridis without its darkest end, which a dark ground would hide."""

HEIGHTS = (-2.5, 1.5)
"""Meters around the median height that the scale covers. The road is near the median of most scans."""

_FEATURE_ROWS = 20_000  # cells that the principal components are computed of


def scale_colors(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Color numbers by `SCALE`.

    Args:
        values: (N,) numbers; below 0 counts as 0, above 1 as 1.

    Returns:
        (N, 3) red, green, blue.
    """
    stops = np.linspace(0, 1, len(SCALE))
    table = np.array(SCALE, np.float64)
    return np.stack([np.interp(values, stops, table[:, k]) for k in range(3)], 1).round().astype(np.uint8).reshape(-1, 3)


def height_span(frames: Iterable[DrawnFrame]) -> tuple[float, float]:
    """Choose the heights of the scale's two ends, one pair for all frames, so that a color means the same in each of them.

    Args:
        frames: The frames; those without points do not count.

    Returns:
        Two heights in meters; -2.5 and 1.5 without any point.
    """
    heights = [points.xyz[:, 2] for frame in frames if (points := frame.points_to_draw()) is not None and len(points.xyz)]
    middle = float(np.median(np.concatenate(heights))) if heights else 0.0
    return middle + HEIGHTS[0], middle + HEIGHTS[1]


def height_colors(xyz: NDArray[np.float32], heights: tuple[float, float]) -> NDArray[np.uint8]:
    """Color points by their height.

    Args:
        xyz: (N, 3) points.
        heights: What `height_span` gave.

    Returns:
        (N, 3) red, green, blue.
    """
    return scale_colors((xyz[:, 2] - heights[0]) / (heights[1] - heights[0]))


@dataclass(frozen=True, kw_only=True)
class FeatureColors:
    """Colors that stand for features: similar features have similar colors, in all frames alike.

    The first three principal components of the features are red, green and blue. The components are those of the first frame with
    cells, and serve all others.
    """

    mean: NDArray[np.float32]
    """(C,) mean feature."""
    axes: NDArray[np.float32]
    """(C, 3) principal components; zero where the features have fewer."""
    low: NDArray[np.float32]
    """(3,) values of the components that become 0."""
    high: NDArray[np.float32]
    """(3,) values of the components that become 255."""

    @staticmethod
    def of(frames: Iterable[DrawnFrame]) -> FeatureColors | None:
        """Find the colors of the features of frames.

        Args:
            frames: The frames.

        Returns:
            The colors; None where no frame has a cell.
        """
        for frame in frames:
            cells = frame.cells_to_draw()
            if cells is not None and len(cells.features):
                return FeatureColors._of_rows(cells.features)
        return None

    @staticmethod
    def _of_rows(features: NDArray[np.float32]) -> FeatureColors:
        step = -(-len(features) // _FEATURE_ROWS)
        rows = features[::step].astype(np.float64)
        mean = rows.mean(0)
        _, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean))
        axes = np.zeros((rows.shape[1], 3))
        strongest = vectors[:, ::-1][:, :3]
        # An eigenvector has no sign of its own; the largest entry is made positive, so that every machine draws the same colors.
        largest = np.take_along_axis(strongest, np.abs(strongest).argmax(0)[None], 0)
        axes[:, : strongest.shape[1]] = strongest * np.where(largest < 0, -1, 1)
        values = (rows - mean) @ axes
        low, high = np.quantile(values, 0.02, 0), np.quantile(values, 0.98, 0)
        return FeatureColors(
            mean=mean.astype(np.float32), axes=axes.astype(np.float32), low=low.astype(np.float32), high=high.astype(np.float32)
        )

    def colors(self, features: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Color features.

        Args:
            features: (M, C) features.

        Returns:
            (M, 3) red, green, blue, at least 55 each, so that a dark ground hides none.
        """
        values = (features - self.mean) @ self.axes
        shares = np.clip((values - self.low) / np.maximum(self.high - self.low, 1e-12), 0, 1)
        return (55 + 200 * shares).round().astype(np.uint8)
