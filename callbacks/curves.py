"""Line plots as inline SVG, from a CSV file of metrics: no library, no script, nothing fetched."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

Point = tuple[float, float]

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 40
NUM_COLORS = 5
"""Colours come from the page's CSS variables ``--curve-0`` ..., so that they fit light and dark."""
_MOST_POINTS = 4 * WIDTH


@dataclass
class Series:
    """Values of one name against student updates; ``not_finite`` of them can't be drawn."""

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
    """Which series share a plot: ``val/x`` with ``test/x``; ``a/b/x`` with ``a/b/y``; any other stands alone."""
    groups: dict[str, list[Series]] = {}
    for name, one in series.items():
        head, _, rest = name.partition("/")
        if head in ("val", "test") and rest:
            title = rest
        elif name.count("/") > 1:
            title = name.rpartition("/")[0]
        else:
            title = name
        groups.setdefault(title, []).append(one)
    return groups


def line_plot(title: str, series: Sequence[Series], levels: Mapping[str, float] | None = None) -> str:
    """One plot with axes, labels and legend as an ``<svg>`` element.

    Every finite point is in it; only series of thousands of points are thinned to the first, lowest, highest and last
    of each pixel column, which looks the same.

    Args:
        title: label of the vertical axis.
        series: what to draw; x is student updates.
        levels: name to height of dashed horizontal lines.
    """
    levels = {name: value for name, value in (levels or {}).items() if math.isfinite(value)}
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    xs = _ticks(min(x for x, _ in points), max(x for x, _ in points), 5, whole=True)
    heights = [y for _, y in points] + list(levels.values())
    ys = _ticks(min(heights), max(heights), 5)
    left, right = _range([x for x, _ in points], xs)
    low, high = _range(heights, ys)

    def place(point: Point) -> Point:
        x = _LEFT + (point[0] - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (point[1] - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return x, y

    body = _axes(title, xs, ys, place)
    for name, value in levels.items():
        y = place((left, value))[1]
        body.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(
            f'<text class="note" x="{WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    for i, one in enumerate(series):
        body += _curve(_thinned([place(point) for point in one.points]), i % NUM_COLORS)
    label = escape(f"{title} against student updates", quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'
        + _legend(series)
    )


def _axes(title: str, xs: list[float], ys: list[float], place) -> list[str]:  # type: ignore[no-untyped-def]
    bottom, body = HEIGHT - _BOTTOM, []
    for x in xs:
        px = place((x, ys[0]))[0]
        body.append(f'<line class="grid" x1="{px:.1f}" x2="{px:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        body.append(f'<text x="{px:.1f}" y="{bottom + 16}" text-anchor="middle">{_number(x)}</text>')
    for y in ys:
        py = place((xs[0], y))[1]
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        body.append(f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    body.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{WIDTH - _RIGHT}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    body.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">student updates</text>')
    centre = (_TOP + bottom) / 2
    body.append(
        f'<text x="12" y="{centre}" text-anchor="middle" transform="rotate(-90 12 {centre})">{escape(title)}</text>'
    )
    return body


def _curve(points: list[Point], color: int) -> list[str]:
    style = f'style="--c:var(--curve-{color})"'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    body = [f'<polyline class="curve" {style} points="{path}"/>'] if len(points) > 1 else []
    if len(points) <= 30:
        body += [f'<circle class="dot" {style} cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points]
    return body


def _legend(series: Sequence[Series]) -> str:
    items = []
    for i, one in enumerate(series):
        lost = f" ({one.not_finite} not finite, not drawn)" if one.not_finite else ""
        items.append(f'<li style="--c:var(--curve-{i % NUM_COLORS})">{escape(one.name + lost)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _thinned(points: list[Point]) -> list[Point]:
    """First, lowest, highest and last of each pixel column, in their order, if there are more than anyone can see."""
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
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{round(value, 4):,.10g}"
