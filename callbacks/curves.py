"""Line plots as inline SVG, from a CSV file of metrics: no library, no script, nothing fetched."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

Point = tuple[float, float]

WIDTH, HEIGHT = 460, 250
_LEFT, _TOP = 58, 12
_END, _FLOOR = WIDTH - 14, HEIGHT - 40
UPDATES = "student updates"
NUM_COLORS = 5
"""Colours come from the page's CSS variables ``--curve-0`` ..., so that they fit light and dark."""
_MOST_POINTS = 4 * WIDTH


@dataclass
class Series:
    """Values of one name against student updates (or else); ``not_finite`` of them can't be drawn."""

    name: str
    points: list[Point] = field(default_factory=list)
    not_finite: int = 0


def read_series(path: Path) -> dict[str, Series]:
    """All numeric columns of a metrics.csv (columns ``step`` and ``epoch`` aside), empty cells left out."""
    series: dict[str, Series] = {}
    if not path.is_file():
        return series
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name in (None, "step", "epoch") or not text:
                    continue
                one = series.setdefault(name, Series(name))
                value = float(text)
                if math.isfinite(value):
                    one.points.append((float(row["step"]), value))
                else:
                    one.not_finite += 1
    return series


def grouped(series: Mapping[str, Series]) -> dict[str, list[Series]]:
    """Which series share a plot: ``val/x`` with ``test/x``, ``a/x`` with ``a/y``; ``train/x`` is alone."""
    groups: dict[str, list[Series]] = {}
    for name, one in series.items():
        head, _, rest = name.partition("/")
        if head in ("val", "test") and rest:
            title = rest
        elif head == "train" and "/" not in rest:
            title = name
        else:
            title = name.rpartition("/")[0] or name
        groups.setdefault(title, []).append(one)
    return groups


def line_plot(
    title: str, series: Sequence[Series], levels: Mapping[str, float] | None = None, x_name: str = UPDATES
) -> str:
    """One plot with axes, labels and legend as an ``<svg>`` element.

    Every finite point is in it; only series of thousands of points are thinned to the first, lowest, highest
    and last of each pixel column, which looks the same. Values that are all positive and span more than two
    and a half powers of ten get a logarithmic axis.

    Args:
        title: label of the vertical axis.
        series: what to draw.
        levels: name to height of dashed horizontal lines.
        x_name: label of the horizontal axis; other quantities than student updates need not be whole.
    """
    levels = {name: value for name, value in (levels or {}).items() if math.isfinite(value)}
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    heights = [y for _, y in points] + list(levels.values())
    frame = _Frame.around([x for x, _ in points], heights, whole=x_name == UPDATES)
    body = frame.axes(title + (" (log)" if frame.logarithmic else ""), x_name)
    for name, value in levels.items():
        y = frame.place((frame.left, value))[1]
        body.append(f'<line class="level" x1="{_LEFT}" x2="{_END}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text_y = y - 4 if y > _TOP + 14 else y + 13
        body.append(
            f'<text class="name" x="{_END - 8}" y="{text_y:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    for i, one in enumerate(series):
        body += _curve(_thinned([frame.place(point) for point in one.points]), i % NUM_COLORS)
    label = escape(f"{title} against {x_name}", quote=True)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'
    return svg + _legend(series)


@dataclass
class _Frame:
    """The ranges of both axes and their ticks, in the values' own units."""

    left: float
    right: float
    low: float
    high: float
    xs: list[float]
    ys: list[float]
    logarithmic: bool

    @classmethod
    def around(cls, xs: list[float], ys: list[float], whole: bool = True) -> "_Frame":
        """A frame that holds all points; with `whole`, numbers on the horizontal axis are whole."""
        logarithmic = min(ys) > 0 and max(ys) / min(ys) > 300
        x_ticks = _ticks(min(xs), max(xs), 5, whole)
        if logarithmic:
            first, last = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
            y_ticks = [10.0**k for k in range(first, last + 1, max(1, -(-(last - first) // 5)))]
        else:
            y_ticks = _ticks(min(ys), max(ys), 5)
        return cls(*_range(xs, x_ticks), *_range(ys, y_ticks), x_ticks, y_ticks, logarithmic)

    def place(self, point: Point) -> Point:
        """Where a point lies in the picture."""
        x = (point[0] - self.left) / (self.right - self.left)
        if self.logarithmic:
            y = math.log(point[1] / self.low) / math.log(self.high / self.low)
        else:
            y = (point[1] - self.low) / (self.high - self.low)
        return _LEFT + x * (_END - _LEFT), _FLOOR - y * (_FLOOR - _TOP)

    def axes(self, title: str, x_name: str) -> list[str]:
        """Grid, numbers and names of the axes."""
        body = []
        for value in self.xs:
            x = self.place((value, self.ys[0]))[0]
            body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_FLOOR}"/>')
            body.append(f'<text x="{x:.1f}" y="{_FLOOR + 16}" text-anchor="middle">{_number(value)}</text>')
        for value in self.ys:
            y = self.place((self.left, value))[1]
            body.append(f'<line class="grid" x1="{_LEFT}" x2="{_END}" y1="{y:.1f}" y2="{y:.1f}"/>')
            body.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        body.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_FLOOR}H{_END}"/>')
        x, y = (_LEFT + _END) / 2, (_TOP + _FLOOR) / 2
        body.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
        turn = f'transform="rotate(-90 12 {y})"'
        body.append(f'<text x="12" y="{y}" text-anchor="middle" {turn}>{escape(title)}</text>')
        return body


def _curve(points: list[Point], color: int) -> list[str]:
    style = f'style="--c:var(--curve-{color})"'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    body = [f'<polyline class="curve" {style} points="{path}"/>'] if len(points) > 1 else []
    if len(points) <= 30:
        radius = 2.6 if len(points) > 1 else 4
        body += [f'<circle class="dot" {style} cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in points]
    return body


def _legend(series: Sequence[Series]) -> str:
    items = []
    for i, one in enumerate(series):
        lost = f" ({one.not_finite} not finite, not drawn)" if one.not_finite else ""
        items.append(f'<li style="--c:var(--curve-{i % NUM_COLORS})">{escape(one.name + lost)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _thinned(points: list[Point]) -> list[Point]:
    """First, lowest, highest and last of each pixel column, if there are more points than anyone can see."""
    if len(points) <= _MOST_POINTS:
        return points
    columns: dict[int, list[tuple[int, Point]]] = {}
    for i, point in enumerate(points):
        columns.setdefault(int(point[0]), []).append((i, point))
    kept: dict[int, Point] = {}
    for column in columns.values():
        by_height = sorted(column, key=lambda item: item[1][1])
        kept.update([column[0], column[-1], by_height[0], by_height[-1]])
    return [kept[i] for i in sorted(kept)]


def _range(values: list[float], ticks: list[float]) -> tuple[float, float]:
    low, high = min(*values, *ticks), max(*values, *ticks)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """About so many round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose low and high."""
    span = high - low if high > low else (abs(high) or 1.0)
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if whole:  # updates are shown as far as they go, values up to the next round number
        last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, max(last, first) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e+")
    return f"{round(value, 4):,.10g}"
