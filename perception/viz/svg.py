"""SVG elements, axes and rows: the drawing under the charts of the report.

Text and lines take the color of the page (`currentColor`), so that one picture can be read in a light and in a dark scheme. The colors of series
are Okabe and Ito's, which people with color blindness can tell apart; further rounds through them are dashed. Read next: `charts.py`, which draws
with these parts.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape, quoteattr

import numpy as np

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito 2008, without black and yellow
_DASHES = ("", "6 4", "2 3", "9 3 2 3")  # of the first, second, third and fourth round through the palette
WIDTH, FONT, LINE = 540, 13, 16  # px; the page scales the picture, so only their ratio counts


class Svg:
    """SVG elements of one picture. Every string is escaped here and nowhere else. Positions are in pixels of a picture `WIDTH` wide."""

    def __init__(self, title: str, notes: Sequence[str], height: int) -> None:
        self.label, self.notes = title, list(notes)
        self.title_lines = textwrap.wrap(title, 62) or [""]
        self.top = 10 + LINE * len(self.title_lines) + (15 * len(self.notes)) + 10
        self.height = height + self.top - 36
        self.parts: list[str] = []
        for index, line in enumerate(self.title_lines):
            self.text(8, 20 + LINE * index, line, size=14, bold=True)
        for index, note in enumerate(self.notes):
            self.text(8, 20 + LINE * len(self.title_lines) + 15 * index, note, size=11, opacity=0.75)

    def text(
        self, x: float, y: float, string: str, *, size: int = FONT, anchor: str = "start", bold: bool = False,
        opacity: float = 1.0, color: str = "currentColor",
    ) -> None:  # fmt: skip
        """Add one line of text.

        Args:
            x: Position in px, of the start, middle or end of the text by `anchor`.
            y: Baseline in px.
            string: The text, not yet escaped.
            size: Font size in px.
            anchor: `start`, `middle` or `end`.
            bold: Whether the text is bold.
            opacity: 1 for opaque.
            color: CSS color.
        """
        extra = (' font-weight="600"' if bold else "") + (f' opacity="{opacity}"' if opacity < 1 else "")
        extra += f' text-anchor="{anchor}"' if anchor != "start" else ""
        clean = escape(_printable(string))
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}"{extra}>{clean}</text>')

    def line(
        self, x0: float, y0: float, x1: float, y1: float, *, color: str = "currentColor", width: float = 1.0, opacity: float = 1.0
    ) -> None:  # fmt: skip
        """Add a straight line.

        Args:
            x0: Start in px.
            y0: Start in px.
            x1: End in px.
            y1: End in px.
            color: CSS color.
            width: Line width in px.
            opacity: 1 for opaque.
        """
        self.parts.append(
            f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{color}" stroke-width="{width}" opacity="{opacity}"/>'
        )

    def rect(self, x: float, y: float, width: float, height: float, color: str, opacity: float = 1.0) -> None:
        """Add a filled rectangle.

        Args:
            x: Left side in px.
            y: Upper side in px.
            width: Width in px.
            height: Height in px.
            color: CSS color.
            opacity: 1 for opaque.
        """
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}" opacity="{opacity}"/>'
        )

    def circle(self, x: float, y: float, radius: float, color: str) -> None:
        """Add a filled circle.

        Args:
            x: Center in px.
            y: Center in px.
            radius: Radius in px.
            color: CSS color.
        """
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"/>')

    def polyline(self, points: Sequence[tuple[float, float]], color: str, *, width: float) -> None:
        """Add a faint line through several points.

        Args:
            points: (x, y) in px.
            color: CSS color.
            width: Line width in px.
        """
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" opacity="0.7"/>')

    def whisker(self, x0: float, x1: float, y: float) -> None:
        """Add a horizontal error bar.

        Args:
            x0: Left end in px.
            x1: Right end in px.
            y: Height in px.
        """
        for a, b, c, d in ((x0, y, x1, y), (x0, y - 5, x0, y + 5), (x1, y - 5, x1, y + 5)):
            self.line(a, b, c, d, width=1.5)

    def curve(self, x: np.ndarray, y: np.ndarray, index: int, opacity: float = 1.0) -> None:
        """Add a curve, which is broken where a value is not finite.

        Args:
            x: (N,) positions in px.
            y: (N,) positions in px.
            index: Number of the series; it decides color and dashes.
            opacity: 1 for opaque.
        """
        commands, pen_down = [], False
        for px, py in _thinned(x, y):
            if math.isfinite(px) and math.isfinite(py):
                commands.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
                pen_down = True
            else:
                pen_down = False
        dashes = _DASHES[index // len(PALETTE) % len(_DASHES)]
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(
            f'<path d="{"".join(commands)}" fill="none" stroke="{color_of(index)}" stroke-width="2" stroke-linejoin="round" '
            f'opacity="{opacity}"{dash}/>'
        )

    def done(self) -> str:
        """Finish the picture: the SVG element as text."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img" '
        head += f'aria-label={quoteattr(_printable(self.label))} font-family="system-ui, sans-serif" color="currentColor">'
        return "\n".join([head, *self.parts, "</svg>"])


class Plot:
    """The framed area of a chart and its axes. Its sides are in pixels; left, right and bottom are given as margins."""

    def __init__(self, svg: Svg, *, left: float, right: float, bottom: float, head: float = 0.0) -> None:
        self.svg, self.left, self.right = svg, left, WIDTH - right
        self.top, self.bottom = svg.top + head, svg.height - bottom

    def x_axis(self, ticks: Sequence[float], limits: tuple[float, float], label: str) -> Callable[[np.ndarray], np.ndarray]:
        """Draw the horizontal axis with its ticks and its label.

        Args:
            ticks: Values that get a grid line and a number.
            limits: Lowest and highest value of the axis.
            label: What the axis shows, with its unit.

        Returns:
            A function from values to positions in px.
        """
        low, high = limits if limits[1] > limits[0] else (limits[0] - 0.5, limits[1] + 0.5)
        scale = (self.right - self.left) / (high - low)
        for tick in ticks:
            if low <= tick <= high:
                x = self.left + (tick - low) * scale
                self.svg.line(x, self.top, x, self.bottom, opacity=0.12)
                self.svg.text(x, self.bottom + 17, _tick_text(tick), anchor="middle", size=12)
        self.svg.line(self.left, self.bottom, self.right, self.bottom, opacity=0.6)
        self.svg.text((self.left + self.right) / 2, self.bottom + 38, label, anchor="middle")
        return lambda x: self.left + (x - low) * scale

    def y_axis(self, low: float, high: float, log: bool) -> Callable[[np.ndarray], np.ndarray]:
        """Draw the vertical axis with round ticks.

        Args:
            low: Lowest value to show.
            high: Highest value to show.
            log: Whether the axis is logarithmic; `low` is then above 0.

        Returns:
            A function from values to positions in px.
        """
        ticks = _log_ticks(low, high) if log else linear_ticks(low, high, 5)
        low, high = min(low, ticks[0]), max(high, ticks[-1])
        if high <= low:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        warp: Callable[[np.ndarray], np.ndarray] = np.log10 if log else np.asarray
        base = float(warp(np.asarray(low)))
        scale = (self.bottom - self.top) / (float(warp(np.asarray(high))) - base)
        for tick in ticks:
            y = self.bottom - (float(warp(np.asarray(tick))) - base) * scale
            self.svg.line(self.left, y, self.right, y, opacity=0.12)
            self.svg.text(self.left - 7, y + 4, _tick_text(tick), anchor="end", size=12)
        return lambda y: self.bottom - (warp(y) - base) * scale

    def empty(self, x_label: str) -> str:
        """Finish a chart that has no data, and say so in it.

        Args:
            x_label: What the horizontal axis would show.

        Returns:
            The SVG element as text.
        """
        self.svg.line(self.left, self.bottom, self.right, self.bottom, opacity=0.6)
        middle = (self.left + self.right) / 2
        self.svg.text(middle, (self.top + self.bottom) / 2 + 4, "no data", anchor="middle", opacity=0.75)
        self.svg.text(middle, self.bottom + 38, x_label, anchor="middle")
        return self.svg.done()


class Rows:
    """A chart of named horizontal rows over one value axis."""

    def __init__(
        self, labels: Sequence[str], title: str, value_label: str, row: int, *, notes: Sequence[str] = (), head: float = 0.0,
        room_right: float = 58,
    ) -> None:  # fmt: skip
        self.row, self.value_label = row, value_label
        wrapped = [textwrap.wrap(label, 22, max_lines=2, placeholder="\u2026") or [""] for label in labels]
        left = 20 + max((text_width(line) for lines in wrapped for line in lines), default=40)
        self.svg = Svg(title, notes, round(36 + head + row * max(1, len(labels)) + 56))
        self.plot = Plot(self.svg, left=left, right=room_right, bottom=52, head=head)
        for index, lines in enumerate(wrapped):
            for k, line in enumerate(lines):
                y = self.middle(index) + 4 + 13 * (k - (len(lines) - 1) / 2)
                self.svg.text(left - 8, y, line, anchor="end", size=FONT if len(lines) == 1 else 12)

    def middle(self, index: int) -> float:
        """Height of a row.

        Args:
            index: Number of the row, from the top.

        Returns:
            Middle of the row in px.
        """
        return self.plot.top + 2 + self.row * (index + 0.5)

    def axis(self, low: float, high: float) -> Callable[[float], float]:
        """Draw the value axis.

        Args:
            low: Lowest value.
            high: Highest value.

        Returns:
            A function from a value to its position in px.
        """
        high = high if high > low else low + 1.0
        scale = self.plot.x_axis(linear_ticks(low, high, 5), (low, high), self.value_label)
        return lambda value: float(scale(np.asarray(value)))


# ---- arithmetic ----------------------------------------------------------------------------------------------------------


def color_of(index: int) -> str:
    """Color of a series; after the sixth the palette starts again.

    Args:
        index: Number of the series.

    Returns:
        CSS color.
    """
    return PALETTE[index % len(PALETTE)]


def text_width(text: str) -> float:
    """Estimate how wide a text is; the letters are a little over half as wide as high.

    Args:
        text: The text.

    Returns:
        Width in px.
    """
    return 0.56 * FONT * len(text)


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(c if c >= " " and not 0xD800 <= ord(c) <= 0xDFFF and c not in "\ufffe\uffff" else " " for c in text)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Choose round numbers for an axis: 1, 2 or 5 times a power of ten.

    Args:
        low: Lowest value to show.
        high: Highest value to show.
        count: About how many ticks to give.

    Returns:
        Ticks from just below `low` to just above `high`.
    """
    span = high - low if high > low else max(1e-6, abs(low) or 1.0)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(f * power for f in (1, 2, 5, 10) if f * power * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """From just below `low` to just above `high`: 1, 2 and 5 times powers of ten, or fewer where those would crowd."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1  # one to spare: log10 rounds
    stride = -(-(last - first) // 6)
    factors = (1, 2, 5) if last - first <= 6 else (1,)
    ticks = [float(f"{f}e{k}") for k in range(first, last + stride, stride) for f in factors]
    below, above = max(i for i, t in enumerate(ticks) if t <= low), min(i for i, t in enumerate(ticks) if t >= high)
    inside = ticks[below : above + 1]
    return inside if len(inside) <= 7 else [t for t in inside if t in (inside[0], inside[-1]) or "1e" in f"{t:.0e}"]


def _tick_text(value: float) -> str:
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e\u2212").replace("e+0", "e").replace("-", "\u2212")
    return f"{value:,.6g}".replace(",", "\u2009").replace("-", "\u2212")


def _thinned(x: np.ndarray, y: np.ndarray, columns: int = 200) -> list[tuple[float, float]]:
    """At most about two points per column, its lowest and highest, so that a long run keeps its spikes and a small file."""
    if len(x) <= 2 * columns:
        return list(zip(x.tolist(), y.tolist(), strict=True))
    keep: list[int] = []
    for part in np.array_split(np.arange(len(x)), columns):
        ok = part[np.isfinite(y[part])]
        keep += sorted({int(ok[np.argmin(y[ok])]), int(ok[np.argmax(y[ok])])}) if len(ok) else [int(part[0])]
    return [(float(x[i]), float(y[i])) for i in keep]
