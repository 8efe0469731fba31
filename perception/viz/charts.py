"""Charts of the report as SVG text: curves of loss and quality, bars, the closed gap, and milliseconds per stage.

The charts are written by hand rather than by matplotlib: a chart has 2 to 20 kB, text stays text, and lines take the color of the page, so that one
file can be read in a light and in a dark scheme. Lines carry their names at their ends instead of a legend. The same input gives the same bytes.
Read next: `svg.py` for the drawing, `html.py` for the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...core.errors import InvalidInput
from .svg import LINE, PALETTE, WIDTH, Plot, Rows, Svg, color_of, linear_ticks, text_width

QUIET = "#8A939C"  # bars that are not the point of the chart


@dataclass(frozen=True)
class Series:
    """One named curve. A point that is not finite is left out and breaks the line."""

    name: str
    """Name at the end of the curve."""
    x: Sequence[float]
    """(N,) positions along the axis."""
    y: Sequence[float]
    """(N,) values."""
    style: int | None = None
    """Number of its color and dashes, so that a method looks the same in every chart; by default its place in the chart."""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise InvalidInput(f"series {self.name!r}: x and y must have one length, found {len(self.x)} and {len(self.y)}")


def number_text(value: float) -> str:
    """Write a number for people: about three digits, thin spaces between thousands, a dash for what is not finite.

    Args:
        value: The number.

    Returns:
        Its text.
    """
    if not math.isfinite(value):
        return "\u2013"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace("-", "\u2212")
    return _fixed(value, _decimals([value]))


def numbers_text(values: Sequence[float]) -> list[str]:
    """Write numbers that stand together, with equal decimals. A number that would round to 0 is written by `number_text`.

    Args:
        values: The numbers.

    Returns:
        Their texts.
    """
    decimals = _decimals(values)
    return [_fixed(v, decimals) if v == 0 or 2 * abs(v) >= 10.0**-decimals else number_text(v) for v in values]


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, title: str, *, log_y: bool = False, smooth: int = 1, height: int = 340
) -> str:
    """Curves over one axis, each named at its right end.

    Args:
        series: The curves.
        x_label: What the horizontal axis shows, with its unit.
        y_label: What the vertical axis shows, with its unit.
        title: Title of the chart.
        log_y: Logarithmic axis. Values that are not positive are left out, and the chart says how many.
        smooth: Window in points of a centered running mean; 1 means none. The chart says so and keeps the raw curve, faint.
        height: Height of the chart in px.

    Returns:
        SVG text.

    Raises:
        InvalidInput: `smooth` is below 1.
    """
    if smooth < 1:
        raise InvalidInput(f"smooth is a window in points, at least 1, found {smooth}")
    raw = [(np.asarray(s.x, dtype=np.float64), np.asarray(s.y, dtype=np.float64)) for s in series]
    notes = [y_label] + ([f"bold: running mean of {smooth} points, faint: as recorded"] if smooth > 1 else [])
    if log_y:
        hidden = sum(int((np.isfinite(y) & (y <= 0)).sum()) for _, y in raw)
        raw = [(x, np.where(y > 0, y, np.nan)) for x, y in raw]
        notes += [f"{hidden} values of 0 or less are not on this logarithmic axis"] if hidden else []
    shown = [_running_mean(y, smooth) for _, y in raw]
    valid = [np.isfinite(x) & np.isfinite(y) for x, y in raw]
    right = 16 + min(180, max((text_width(s.name) for s in series), default=0) + 14)
    if not any(v.any() for v in valid):
        return Plot(Svg(title, notes, 150), left=56, right=16, bottom=48).empty(x_label)
    plot = Plot(Svg(title, notes, height), left=56, right=right, bottom=48)
    xs = np.concatenate([x[v] for (x, _), v in zip(raw, valid, strict=True)])
    ys = np.concatenate([y[v] for (_, y), v in zip(raw, valid, strict=True)])
    x_at = plot.x_axis(linear_ticks(xs.min(), xs.max(), 6), (xs.min(), xs.max()), x_label)
    y_at = plot.y_axis(ys.min(), ys.max(), log_y)

    ends: list[tuple[float, float, int]] = []
    styles = [number if s.style is None else s.style for number, s in enumerate(series)]
    for index, ((x, y), mean, ok) in enumerate(zip(raw, shown, valid, strict=True)):
        if not ok.any():
            continue
        if smooth > 1:
            plot.svg.curve(x_at(x), y_at(y), styles[index], opacity=0.25)
        plot.svg.curve(x_at(x), y_at(mean), styles[index])
        last = int(np.flatnonzero(ok)[-1])
        ends.append((float(x_at(x[last])), float(y_at(mean[last])), index))
        if ok.sum() == 1 or len(x) <= 12:
            for px, py in zip(x_at(x[ok]), y_at(mean[ok]), strict=True):
                plot.svg.circle(px, py, 3, color_of(styles[index]))
    for (end_x, end_y, index), label_y in zip(*_spread(ends, plot.top, plot.bottom), strict=True):
        plot.svg.polyline(
            [(end_x + 2, end_y), (plot.right + 4, label_y), (plot.right + 10, label_y)], color_of(styles[index]), width=1
        )
        plot.svg.text(plot.right + 14, label_y + 4, series[index].name)
    return plot.svg.done()


def bar_chart(
    labels: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float] | None = None,
    *,
    value_label: str,
    title: str,
    highlight: int | None = None,
    styles: Sequence[int] | None = None,
) -> str:
    """Horizontal bars from 0 with their values at the end, so that long names stay readable.

    Args:
        labels: One name per bar.
        values: One value per bar.
        errors: Half length of each whisker, in the unit of `values`; `value_label` should say what it is.
        value_label: What the values are, with their unit.
        title: Title of the chart.
        highlight: Index of the bar that the chart is about; without `styles` the others turn gray.
        styles: Number of each bar's color, the same as in `Series`.

    Returns:
        SVG text.

    Raises:
        InvalidInput: Lengths differ, or a value is not finite.
    """
    _same_length("bar_chart", labels=labels, values=values, errors=errors if errors is not None else values)
    _all_finite("bar_chart", values, errors or ())
    spread = list(errors) if errors is not None else [0.0] * len(values)
    texts = numbers_text(values)
    rows = Rows(labels, title, value_label, 26, room_right=16 + max(map(text_width, texts), default=0))
    if not labels:
        return rows.plot.empty(value_label)
    low = min([0.0, *(v - e for v, e in zip(values, spread, strict=True))])
    high = max([0.0, *(v + e for v, e in zip(values, spread, strict=True))])
    at = rows.axis(low, high)
    for index, (value, error) in enumerate(zip(values, spread, strict=True)):
        y = rows.middle(index)
        color = PALETTE[0] if highlight is None else PALETTE[1] if index == highlight else QUIET
        color = color if styles is None else color_of(styles[index])
        rows.svg.rect(min(at(0), at(value)), y - 9, abs(at(value) - at(0)), 18, color)
        if error:
            rows.svg.whisker(at(value - error), at(value + error), y)
        end = max(at(0), at(value + error))
        rows.svg.text(end + 6, y + 4, texts[index], bold=index == highlight)
    rows.svg.line(at(0), rows.plot.top, at(0), rows.plot.bottom, opacity=0.6)
    return rows.svg.done()


def gap_chart(
    source_only: float,
    methods: Sequence[tuple[str, float]],
    oracle: float,
    *,
    value_label: str,
    title: str,
    errors: Sequence[float] | None = None,
    styles: Mapping[str, int] | None = None,
) -> str:
    """How much of the distance from source-only to the oracle each method closes, all on one axis.

    The share is (value - source_only) / (oracle - source_only). Where the oracle is not above source-only there is no gap to close; the chart says so
    instead of giving a share.

    Args:
        source_only: Score of the source model.
        methods: (name, score) of each method, in the same unit.
        oracle: Score of training with all target labels.
        value_label: What the scores are, with their unit.
        title: Title of the chart.
        errors: Half length of each method's whisker.
        styles: Number of the color by name of the method, and of "source-only" and "oracle", the same as in `Series`.

    Returns:
        SVG text.

    Raises:
        InvalidInput: Lengths differ, or a score is not finite.
    """
    values = [value for _, value in methods]
    _same_length("gap_chart", methods=methods, errors=errors if errors is not None else methods)
    _all_finite("gap_chart", [source_only, oracle, *values], errors or ())
    spread = list(errors) if errors is not None else [0.0] * len(values)
    gap = oracle - source_only
    notes = [] if gap > 0 else ["the oracle is not above source-only: there is no gap to close, so no share is given"]
    rows = Rows([name for name, _ in methods], title, value_label, 34, notes=notes, head=36, room_right=92)
    everything = [source_only, oracle, *(v - e for v, e in zip(values, spread, strict=True))]
    everything += [v + e for v, e in zip(values, spread, strict=True)]
    margin = 0.06 * (max(everything) - min(everything)) or 1.0
    at = rows.axis(min(everything) - margin, max(everything) + margin)
    if gap > 0:
        rows.svg.rect(
            at(source_only), rows.plot.top, at(oracle) - at(source_only), rows.plot.bottom - rows.plot.top, QUIET, opacity=0.12
        )
    source_text, oracle_text, *texts = numbers_text([source_only, oracle, *values])
    style = dict(styles or {})
    source_color = color_of(style["source-only"]) if "source-only" in style else QUIET
    oracle_color = color_of(style.get("oracle", 2))
    ends = [(f"source-only {source_text}", source_only, source_color), (f"oracle {oracle_text}", oracle, oracle_color)]
    ends.sort(key=lambda end: end[1])
    for (name, value, color), anchor in zip(ends, ("start", "end"), strict=True):
        rows.svg.line(at(value), rows.plot.top - 4, at(value), rows.plot.bottom, color=color, width=2)
        x, anchor = _keep_inside(at(value), name, anchor, rows.plot.left - 90, WIDTH - 4)
        rows.svg.text(x, rows.plot.top - (26 if anchor == "start" else 10), name, anchor=anchor)
    for index, ((name, value), error) in enumerate(zip(methods, spread, strict=True)):
        y, color = rows.middle(index), color_of(style.get(name, index))
        rows.svg.line(at(source_only), y, at(value), y, color=color, width=7, opacity=0.55)
        if error:
            rows.svg.whisker(at(value - error), at(value + error), y)
        rows.svg.circle(at(value), y, 6, color)
        rows.svg.text(at(value), y - 9, texts[index], anchor="middle")
        if gap > 0:
            rows.svg.text(
                WIDTH - 8, y + 4, f"{100 * (value - source_only) / gap:.0f} %".replace("-", "\u2212"), anchor="end", bold=True
            )
    if gap > 0 and methods:
        rows.svg.text(WIDTH - 8, rows.plot.top - 10, "gap closed", anchor="end")
    return rows.svg.done()


def stacked_bars(labels: Sequence[str], stages: Sequence[tuple[str, Sequence[float]]], *, value_label: str, title: str) -> str:
    """One horizontal bar per label, made of named parts, such as milliseconds per stage.

    Args:
        labels: One name per bar.
        stages: (name, one value of at least 0 per label) of each part.
        value_label: What the values are, with their unit.
        title: Title of the chart.

    Returns:
        SVG text.

    Raises:
        InvalidInput: Lengths differ, or a value is negative or not finite.
    """
    for name, values in stages:
        _same_length(f"stacked_bars, stage {name!r}", labels=labels, values=values)
        _all_finite("stacked_bars", values, ())
        if any(value < 0 for value in values):
            raise InvalidInput(f"stacked_bars: stage {name!r} holds a negative value, which cannot be stacked: {list(values)}")
    legend_rows = _legend_rows([name for name, _ in stages])
    rows = Rows(labels, title, value_label, 34, head=12 + 20 * len(legend_rows))
    if not labels or not stages:
        return rows.plot.empty(value_label)
    totals = [sum(values[i] for _, values in stages) for i in range(len(labels))]
    at = rows.axis(0.0, max(totals))
    for line, names in enumerate(legend_rows):
        for x, index in names:
            y = rows.plot.top - 20 * (len(legend_rows) - line) + 4
            rows.svg.rect(x, y - 10, 11, 11, color_of(index))
            rows.svg.text(x + 16, y, stages[index][0])
    texts = numbers_text([value for _, values in stages for value in values] + totals)
    for row, total in enumerate(totals):
        start, y = 0.0, rows.middle(row)
        for index, (_, values) in enumerate(stages):
            left, right = at(start), at(start + values[row])
            rows.svg.rect(left, y - 11, right - left, 22, color_of(index))
            text = texts[index * len(labels) + row]
            if right - left > text_width(text) + 8:
                ink = "#000000" if color_of(index) in PALETTE[3:] else "#FFFFFF"
                rows.svg.text((left + right) / 2, y + 4, text, anchor="middle", color=ink)
            start += values[row]
        rows.svg.text(at(total) + 6, y + 4, texts[len(stages) * len(labels) + row], bold=True)
    return rows.svg.done()


def _decimals(values: Sequence[float]) -> int:
    """How many decimals give the largest of `values` three digits; none for whole numbers."""
    finite = [v for v in values if math.isfinite(v)]
    size = max((abs(v) for v in finite), default=0.0)
    return 0 if size >= 100 or all(v == int(v) for v in finite) else 1 if size >= 10 else 2 if size >= 1 else 3


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace(",", "\u2009").replace("-", "\u2212") if math.isfinite(value) else "\u2013"


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """(N,) centered mean over `window` points, over fewer at the ends; not finite where `y` is not."""
    ok = np.isfinite(y)
    kernel = np.ones(min(window, max(1, len(y))))
    if window == 1 or len(y) == 0:
        return y
    total = np.convolve(np.where(ok, y, 0.0), kernel, "same")
    return np.where(ok, total / np.maximum(np.convolve(ok.astype(float), kernel, "same"), 1), np.nan)


def _spread(
    ends: list[tuple[float, float, int]], top: float, bottom: float
) -> tuple[list[tuple[float, float, int]], list[float]]:
    """Line ends (x, y, index) from top to bottom, and for each one's label the nearest y such that labels do not overlap.

    Less k line heights, the k-th label may not be above the one before: isotonic regression, by pooling neighbours that violate it.
    """
    ends = sorted(ends, key=lambda end: end[1])
    pools: list[tuple[float, int]] = []  # mean, size
    for k, (_, y, _) in enumerate(ends):
        mean, size = y - k * LINE, 1
        while pools and pools[-1][0] > mean:
            above, count = pools.pop()
            mean, size = (above * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    last = max(top, bottom - (len(ends) - 1) * LINE)
    free = [min(max(mean, top), last) for mean, size in pools for _ in range(size)]
    return ends, [y + k * LINE for k, y in enumerate(free)]


def _keep_inside(x: float, text: str, anchor: str, low: float, high: float) -> tuple[float, str]:
    """Where to put a label beside `x` so that it stays within low..high, and its anchor."""
    width = text_width(text)
    if anchor == "start":
        return min(max(x, low), high - width), anchor
    return max(min(x, high), low + width), anchor


def _legend_rows(names: Sequence[str]) -> list[list[tuple[float, int]]]:
    """Names flowed into rows: per row the x in px and the index of each."""
    rows: list[list[tuple[float, int]]] = []
    x = float(WIDTH)
    for index, name in enumerate(names):
        width = 34 + text_width(name)
        if x + width > WIDTH - 8:
            rows.append([])
            x = 12.0
        rows[-1].append((x, index))
        x += width
    return rows


def _same_length(where: str, **parts: Sequence[object]) -> None:
    if len({len(part) for part in parts.values()}) > 1:
        raise InvalidInput(f"{where}: lengths must agree, found " + ", ".join(f"{k} {len(v)}" for k, v in parts.items()))


def _all_finite(where: str, values: Sequence[float], errors: Sequence[float]) -> None:
    if not all(math.isfinite(v) for v in [*values, *errors]):
        raise InvalidInput(
            f"{where}: a bar needs finite values, found {list(values)} with errors {list(errors)}; leave that bar out"
        )
