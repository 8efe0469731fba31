"""Pictures in BEV: points or features at the cut, true boxes and detections.

                 x forward, up in the picture           a box:   .-.   the tick at its front shows where it heads
                     ^                                           | |
    y left, to the   |                                           |_|
    left       <-----o
               as a driver would see it on a map with the way ahead pointing up

matplotlib draws them through its objects only (no pyplot, no global figure), and the same input gives the same bytes. Points and feature
cells are painted pixel by pixel: crisp, quick for 100 000 points, small as a PNG. The ground is gray to green, truth is blue and filled, detections
are orange and hollow; people with color blindness can tell them apart. Read next: `draw_bev`, which writes one picture, and `bev_ground.py`, which
paints what lies under the boxes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon, Rectangle
from torch import Tensor

from ...core.boxes import corners_bev
from ...core.errors import InvalidInput
from ...core.features import CutFeatures
from ...core.files import write_atomically
from ...core.smashed_scene import SmashedScene
from ...core.structures import Boxes3D, Labels, PointCloud, Predictions
from ...core.tensor_value import shape_of
from .bev_ground import HEIGHT_COLORS, NORM_COLORS, Ground, ground_image, height_range

TRUTH, DETECTION = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion
_INK, _QUIET, _PAPER, _GRID = "#1B2228", "#5B6670", "#FBFBF9", "#E4E7E9"
_DPI = 100
_LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND = 46, 12, 30, 38, 26  # px around a panel, and below all panels
Found = TypeVar("Found", Labels, Predictions)
_LABELED = 12  # boxes that carry a text, the best first


class Panel(NamedTuple):
    """One picture of several.

    Attributes:
        title: Text above the picture.
        ground: Points or features of one scene, or None for boxes alone.
        truth: True boxes.
        predictions: Detections.
    """

    title: str
    ground: Ground
    truth: Labels | None = None
    predictions: Predictions | None = None


def bev_png(
    points: PointCloud | None,
    *,
    truth: Labels | None = None,
    predictions: Predictions | None = None,
    class_names: Sequence[str],
    view_range: tuple[float, float, float, float],
    title: str = "",
    min_score: float = 0.3,
    size_px: int = 720,
) -> bytes:
    """Draw one scan in BEV.

    Args:
        points: The scan, colored by height, or None for boxes alone.
        truth: True boxes in blue; dashed where their weight is 0 (ignored).
        predictions: Detections in orange with a score of at least `min_score`; the best carry class and score.
        class_names: One name per class number.
        view_range: (x0, y0, x1, y1) in meters, the part of the plane to draw.
        title: Text above the picture.
        min_score: Detections with a lower score are left out.
        size_px: Longer side of the drawn area.

    Returns:
        Bytes of a PNG file.

    Raises:
        InvalidInput: The range is empty, or a class has no name.
    """
    panel = Panel(title, points, truth, predictions)
    return bev_panels_png([panel], class_names=class_names, view_range=view_range, min_score=min_score, panel_px=size_px)


def in_view(boxes: Boxes3D, view_range: tuple[float, float, float, float]) -> Tensor:
    """Find the boxes of which a picture shows at least a corner.

    Args:
        boxes: N boxes.
        view_range: (x0, y0, x1, y1) in meters, the part of the plane that is drawn.

    Returns:
        (N,) bool.
    """
    x0, y0, x1, y1 = view_range
    corners = corners_bev(boxes.data.detach().cpu())
    x, y = corners[..., 0], corners[..., 1]
    return ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).any(1)


def renumbered(found: Found, own: Sequence[str], names: Sequence[str]) -> tuple[Found, tuple[str, ...]]:
    """Give objects of other class numbers one list of names, so that both can be drawn in one picture.

    Args:
        found: Detections or labels whose classes are numbers of `own`.
        own: Names of their classes.
        names: Names of the classes of what is drawn with them.

    Returns:
        The objects with numbers of a common list, and that list: `names`, and then what only `own` has. Case does not matter.
    """
    common = list(names)
    for name in own:
        if name.casefold() not in [known.casefold() for known in common]:
            common.append(name)
    number = {name.casefold(): i for i, name in enumerate(common)}
    table = torch.tensor([number[name.casefold()] for name in own], dtype=torch.int64)
    return replace(found, classes=table.to(found.classes.device)[found.classes]), tuple(common)


def draw_bev(
    path: str | Path,
    points: PointCloud,
    *,
    labels: Labels | None = None,
    predictions: Predictions | None = None,
    class_names: Sequence[str] = (),
    view_range: tuple[float, float, float, float] | None = None,
    title: str = "",
    min_score: float = 0.3,
) -> Path:
    """Draw one scan in BEV and write the picture as a PNG file.

    Args:
        path: File to write.
        points: The scan, colored by height.
        labels: True boxes, drawn in blue; dashed where their weight is 0 (ignored).
        predictions: Detections, drawn in orange; the best carry class and score.
        class_names: Names of the classes, such as `detector.class_names`. Without them the numbers are written.
        view_range: (x0, y0, x1, y1) in meters, the part to draw. By default all points, at most 80 m from the sensor.
        title: Text above the picture.
        min_score: Detections with a lower score are left out.

    Returns:
        The path of the picture.

    Raises:
        InvalidInput: An argument is of another type, `path` is a folder, the range is empty, or a class has no name.

    Example:
        upcycle3d.draw_bev("scan.png", scan, predictions=detector.detect(scan), class_names=detector.class_names)
    """
    if not isinstance(points, PointCloud):
        raise InvalidInput(f"draw_bev draws a PointCloud, found {shape_of(points)}; make one with PointCloud.from_array")
    for name, value, kind in (("labels", labels, Labels), ("predictions", predictions, Predictions)):
        if value is not None and not isinstance(value, kind):
            raise InvalidInput(f"{name} of draw_bev must be {kind.__name__} or None, found {shape_of(value)}")
    if Path(path).is_dir():
        raise InvalidInput(f"the picture cannot be written to {path}, which is a folder; name a file in it")
    found = [value.classes for value in (labels, predictions) if value is not None and len(value)]
    names = class_names or [str(number) for number in range(1 + max((int(classes.max()) for classes in found), default=0))]
    view = view_range or _view_of(points)
    picture = bev_png(
        points, truth=labels, predictions=predictions, class_names=names, view_range=view, title=title, min_score=min_score
    )
    write_atomically(Path(path), picture)
    return Path(path)


def _view_of(points: PointCloud, limit: float = 80.0) -> tuple[float, float, float, float]:
    """The part of the plane that holds the points, in whole steps of 5 m, at most `limit` m from the sensor."""
    xy = points.xyz[:, :2].detach().cpu()
    xy = xy[xy.isfinite().all(1) & (xy.abs() <= limit).all(1)]
    if not len(xy):
        return (-limit, -limit, limit, limit)
    low, high = (xy.amin(0) / 5).floor() * 5, (xy.amax(0) / 5).floor() * 5 + 5
    return (float(low[0]), float(low[1]), float(high[0]), float(high[1]))


def bev_features_png(
    features: SmashedScene | CutFeatures,
    *,
    truth: Labels | None = None,
    predictions: Predictions | None = None,
    class_names: Sequence[str],
    view_range: tuple[float, float, float, float] | None = None,
    title: str = "",
    min_score: float = 0.3,
    size_px: int = 720,
) -> bytes:
    """Draw what leaves the vehicle: the length of the feature vector of each cell at the cut, the largest over height.

    Args:
        features: One scene.
        truth: True boxes, as for `bev_png`.
        predictions: Detections, as for `bev_png`.
        class_names: One name per class number.
        view_range: (x0, y0, x1, y1) in meters; the whole grid by default.
        title: Text above the picture.
        min_score: Detections with a lower score are left out.
        size_px: Longer side of the drawn area.

    Returns:
        Bytes of a PNG file.

    Raises:
        InvalidInput: The range is empty, or a class has no name.
    """
    x0, y0, _, x1, y1, _ = features.spec.grid.range
    view = view_range if view_range is not None else (x0, y0, x1, y1)
    panel = Panel(title, features, truth, predictions)
    return bev_panels_png([panel], class_names=class_names, view_range=view, min_score=min_score, panel_px=size_px)


def bev_panels_png(
    panels: Sequence[Panel | tuple[str, Ground, Labels | None, Predictions | None]],
    *,
    class_names: Sequence[str],
    view_range: tuple[float, float, float, float],
    min_score: float = 0.3,
    panel_px: int = 480,
    columns: int = 3,
) -> bytes:
    """Draw several scenes, or several results of one scene, next to each other with one scale and one legend.

    Args:
        panels: The pictures, row by row.
        class_names: One name per class number.
        view_range: (x0, y0, x1, y1) in meters, the part of the plane to draw.
        min_score: Detections with a lower score are left out.
        panel_px: Longer side of each drawn area.
        columns: Panels per row.

    Returns:
        Bytes of a PNG file.

    Raises:
        InvalidInput: There is no panel, the range is empty, or a class has no name.
    """
    shown = [Panel(*panel) for panel in panels]
    x0, y0, x1, y1 = view_range
    if not shown or not (x1 > x0 and y1 > y0 and all(map(math.isfinite, view_range))):
        raise InvalidInput(
            f"a picture needs a panel and a view (x0, y0, x1, y1) with x1 > x0, y1 > y0; found {len(shown)}, {view_range}"
        )
    for panel in shown:
        _check_classes(panel, class_names)
    px_per_m = panel_px / max(x1 - x0, y1 - y0)
    wide, high = round((y1 - y0) * px_per_m), round((x1 - x0) * px_per_m)  # y runs across the picture, x up
    in_row = min(columns, len(shown))
    rows = -(-len(shown) // in_row)
    legend = _legend(shown, min_score)
    lines = math.ceil(sum(52 + 7 * len(str(entry.get_label())) for entry in legend) / (in_row * (_LEFT + wide + _RIGHT)))
    foot = _LEGEND * lines
    full_w, full_h = in_row * (_LEFT + wide + _RIGHT), rows * (_TOP + high + _BOTTOM) + foot
    figure = Figure(figsize=(full_w / _DPI, full_h / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    heights = height_range([panel.ground for panel in shown], view_range)
    for index, panel in enumerate(shown):
        row, column = divmod(index, in_row)
        left = column * (_LEFT + wide + _RIGHT) + _LEFT
        bottom = full_h - row * (_TOP + high + _BOTTOM) - _TOP - high
        axes = figure.add_axes((left / full_w, bottom / full_h, wide / full_w, high / full_h), facecolor=_PAPER)
        _frame(axes, view_range, panel.title, wide)
        image = ground_image(panel.ground, view_range, (high, wide), heights)
        if image is not None:
            axes.imshow(image, extent=(y1, y0, x0, x1), origin="upper", interpolation="nearest", zorder=1, aspect="auto")
        _draw_boxes(axes, panel, view_range, class_names, min_score, px_per_m)
    figure.legend(
        handles=legend, loc="lower center", ncols=math.ceil(len(legend) / lines), frameon=False, fontsize=9, labelcolor=_INK,
        handlelength=1.6, columnspacing=1.4, borderaxespad=0.3,
    )  # fmt: skip
    out = io.BytesIO()
    canvas.print_png(out, metadata={"Software": None})  # no version in the file: the same picture, the same bytes
    return out.getvalue()


def _frame(axes: Axes, view: tuple[float, float, float, float], title: str, wide_px: int) -> None:
    """Axes in metres with x up and y to the left, a grid, a bar of known length, and the sensor."""
    x0, y0, x1, y1 = view
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if s >= max(x1 - x0, y1 - y0) / 9)
    axes.set_xlim(y1, y0)
    axes.set_ylim(x0, x1)
    axes.set_xticks(np.arange(math.ceil(y0 / step), math.floor(y1 / step) + 1) * step)
    axes.set_yticks(np.arange(math.ceil(x0 / step), math.floor(x1 / step) + 1) * step)
    axes.grid(color=_GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5, labelsize=8, colors=_QUIET)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    axes.set_xlabel("y, to the left (m)", fontsize=8, color=_QUIET, labelpad=1)
    axes.set_ylabel("x, ahead (m)", fontsize=8, color=_QUIET, labelpad=1)
    if title:
        room = max(8, wide_px // 8)  # a letter of 11 pt is about 8 px wide
        shown = title if len(title) <= room else title[: room - 1] + "\u2026"
        axes.set_title(shown.replace("$", r"\$"), fontsize=11, color=_INK, loc="left", pad=7)
    left, bottom = y1 - 0.03 * (y1 - y0), x0 + 0.03 * (x1 - x0)
    axes.add_patch(Rectangle((left - step, bottom), step, 0.006 * (x1 - x0), color=_INK, zorder=6, linewidth=0))
    axes.text(
        left - step / 2, bottom + 0.012 * (x1 - x0), f"{step} m", fontsize=8, color=_INK, ha="center", va="bottom", zorder=6
    )
    if x0 <= 0 <= x1 and y0 <= 0 <= y1:
        axes.plot([0], [0], marker="^", markersize=7, color=_INK, markeredgecolor="white", zorder=5, clip_on=False)


def _draw_boxes(
    axes: Axes,
    panel: Panel,
    view: tuple[float, float, float, float],
    class_names: Sequence[str],
    min_score: float,
    px_per_m: float,
) -> None:
    """Truth under detections, each with a heading tick; texts where there is room."""
    truth, kept = panel.truth, panel.predictions
    if truth is not None:
        weights = truth.weight.tolist()
        for corners, weight in zip(corners_bev(truth.boxes.data.detach().cpu()).numpy(), weights, strict=True):
            _outline(axes, corners, TRUTH, width=1.7, dashed=weight == 0, fill=0.16 if weight else 0.0, zorder=3)
    if kept is not None:
        kept = kept.select(kept.scores >= min_score)
        kept = kept.select(torch.argsort(kept.scores, descending=True, stable=True))
        for corners in corners_bev(kept.boxes.data.detach().cpu()).numpy():
            _outline(axes, corners, DETECTION, width=1.4, dashed=False, fill=0.0, zorder=4)
        texts = [f"{class_names[c]} {s:.2f}" for c, s in zip(kept.classes.tolist(), kept.scores.tolist(), strict=True)]
        _label_boxes(axes, kept.boxes.data, texts, truth, view, px_per_m, DETECTION)
    elif truth is not None:
        _label_boxes(axes, truth.boxes.data, [class_names[c] for c in truth.classes.tolist()], truth, view, px_per_m, TRUTH)


def _outline(axes: Axes, corners: np.ndarray, color: str, *, width: float, dashed: bool, fill: float, zorder: int) -> None:
    """corners: (4, 2) x, y m, from front left counter-clockwise. The picture's horizontal axis is y."""
    flat = corners[:, ::-1]
    style = (0, (3, 2)) if dashed else "solid"
    if fill:
        axes.add_patch(Polygon(flat, closed=True, facecolor=color, alpha=fill, linewidth=0, zorder=zorder))
    axes.add_patch(Polygon(flat, closed=True, fill=False, edgecolor=color, linewidth=width, linestyle=style, zorder=zorder))
    middle, front = flat.mean(0), (flat[0] + flat[3]) / 2
    tip = front + 0.35 * (front - middle)
    axes.add_line(Line2D([middle[0], tip[0]], [middle[1], tip[1]], color=color, linewidth=width, zorder=zorder))


def _label_boxes(
    axes: Axes,
    boxes: Tensor,
    texts: Sequence[str],
    truth: Labels | None,
    view: tuple[float, float, float, float],
    px_per_m: float,
    color: str,
) -> None:
    """A text right or left of each box, first come first served: inside the view, never over another text, rather not over a box."""
    everything = boxes.detach().cpu() if truth is None else torch.cat([boxes.detach().cpu(), truth.boxes.data.detach().cpu()])
    corners = corners_bev(everything)
    low, high = corners.amin(1).tolist(), corners.amax(1).tolist()
    outlines = [(*a, *b) for a, b in zip(low, high, strict=True)]  # x0, y0, x1, y1 m
    written: list[tuple[float, ...]] = []
    half, gap = 7 / px_per_m, 4 / px_per_m
    for (x0, y0, x1, y1), text in list(zip(outlines, texts))[:_LABELED]:
        x, width = (x0 + x1) / 2, 6.8 * len(text) / px_per_m
        if not (view[0] < x < view[2] and view[1] < (y0 + y1) / 2 < view[3]):
            continue
        places = [(x - half, y0 - gap - width, x + half, y0 - gap), (x - half, y1 + gap, x + half, y1 + gap + width)]
        places = [p for p in places if p[1] >= view[1] and p[3] <= view[3] and not any(_overlap(p, w) for w in written)]
        if places:
            place = min(places, key=lambda p: sum(_overlap(p, box) for box in outlines))  # the right one if both are as free
            written.append(place)
            shown = axes.text(place[3], x, text.replace("$", r"\$"), fontsize=8, color=color, ha="left", va="center", zorder=5)
            shown.set_bbox({"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8})
            shown.set_clip_on(True)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two upright rectangles (x0, y0, x1, y1) overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend(panels: Sequence[Panel], min_score: float) -> list[Patch | Line2D]:
    """One entry per kind of thing that any panel holds."""
    entries: list[Patch | Line2D] = []
    if any(p.truth is not None for p in panels):
        entries.append(Patch(facecolor=(0, 114 / 255, 178 / 255, 0.16), edgecolor=TRUTH, linewidth=1.8, label="ground truth"))
    if any(p.truth is not None and bool((p.truth.weight == 0).any()) for p in panels):
        entries.append(Patch(fill=False, edgecolor=TRUTH, linewidth=1.8, linestyle=(0, (3, 2)), label="ignored"))
    if any(p.predictions is not None for p in panels):
        entries.append(Patch(fill=False, edgecolor=DETECTION, linewidth=1.4, label=f"detection, score \u2265 {min_score:g}"))
    if any(isinstance(p.ground, PointCloud) for p in panels):
        for shade, name in ((0.0, "low point"), (1.0, "high point")):
            entries.append(Line2D([], [], linestyle="", marker="s", markersize=5, color=HEIGHT_COLORS(shade), label=name))
    if any(isinstance(p.ground, SmashedScene | CutFeatures) for p in panels):
        for shade, name in ((0.1, "weak feature"), (1.0, "strong feature")):
            entries.append(Patch(facecolor=NORM_COLORS(shade), label=name))
    entries.append(Line2D([], [], linestyle="", marker="^", markersize=6, color=_INK, label="sensor"))
    return entries


def _check_classes(panel: Panel, class_names: Sequence[str]) -> None:
    for value in (panel.truth, panel.predictions):
        if value is not None and len(value) and not 0 <= int(value.classes.min()) <= int(value.classes.max()) < len(class_names):
            raise InvalidInput(
                f"panel {panel.title!r}: classes {sorted(set(value.classes.tolist()))} need names, found {list(class_names)}"
            )
