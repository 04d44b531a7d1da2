"""Curves of runs, read from metrics.csv and drawn by plotly: zoom, values under the pointer, a legend."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import plotly.graph_objects as go

Point = tuple[float, float]

UPDATES = "student updates"
_COLORS = ("#3b82f6", "#ea580c", "#16a34a", "#a855f7", "#b7791f")  # each shows on white and on near-black
_GOLDEN_ANGLE = 137.508  # degrees; neighbouring hues are as far apart as can be, however many there are
_LEVEL = "#8a8f98"
_MOST_POINTS = 2000
_MOST_NAMES = 12
"""Of more curves the legend would be longer than the plot."""


@dataclass
class Series:
    """Values of one name against student updates (or else).

    Attributes:
        name: in the legend.
        points: (x, y), from left to right, finite.
        not_finite: how many more there were that can't be drawn.
        spread: lowest and highest value at each point, drawn as a band; none if empty.
        number: which colour it has, and which row of a table lights it up; None: its place in the plot.
    """

    name: str
    points: list[Point] = field(default_factory=list)
    not_finite: int = 0
    spread: Sequence[tuple[float, float]] = ()
    number: int | None = None


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
    """Which series share a plot: ``a/x`` with ``a/y``; ``train/x``, ``val/x`` and ``test/x`` are alone.

    The last two are measured on other captions, more of them at the end, and are no common curve. Series of
    one family whose sizes are more than three times apart have plots of their own: on one axis the small ones
    would be flat lines.
    """
    families: dict[str, list[Series]] = {}
    for name, one in series.items():
        head, _, rest = name.partition("/")
        if head in ("val", "test") or (head == "train" and "/" not in rest):
            title = name
        else:
            title = name.rpartition("/")[0] or name
        families.setdefault(title, []).append(one)
    groups: dict[str, list[Series]] = {}
    for title, family in families.items():
        sizes = [size for one in family if (size := _size(one))]
        if sizes and max(sizes) > 3 * min(sizes):
            groups |= {one.name: [one] for one in family}
        else:
            groups[title] = family
    return groups


def _size(series: Series) -> float:
    sizes = sorted(abs(y) for _, y in series.points)
    return sizes[len(sizes) // 2] if sizes else 0.0


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most so many points: first and last, and the lowest and highest of equal stretches between."""
    if len(points) <= most:
        return list(points)
    stretch = -(-2 * len(points) // (most - 2))
    kept = {points[0], points[-1]}
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept |= {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
    return sorted(kept)


def color(number: int) -> str:
    """The CSS colour of a curve: one of five for the first, then hues far from each other."""
    if number < len(_COLORS):
        return _COLORS[number]
    return f"hsl({number * _GOLDEN_ANGLE % 360:.0f}, 60%, 52%)"


def line_figure(
    title: str,
    series: Sequence[Series],
    levels: Mapping[str, float] | None = None,
    x_name: str = UPDATES,
    most: int = _MOST_POINTS,
) -> go.Figure | None:
    """Curves over one horizontal axis, with a name for each, also of those without points; None if all are.

    Values that are all positive and span more than two and a half powers of ten get a logarithmic axis.

    Args:
        title: what the vertical axis shows.
        series: what to draw; they share the axis, so they should be of one kind.
        levels: name to height of dashed horizontal lines.
        x_name: what the horizontal axis shows.
        most: points of a curve; longer ones are thinned, without losing a peak.
    """
    drawn = [one for one in series if one.points]
    if not drawn:
        return None
    levels = {name: value for name, value in (levels or {}).items() if math.isfinite(value)}
    xs = [x for one in drawn for x, _ in one.points]
    heights = [y for one in drawn for _, y in one.points]
    heights += [y for one in drawn for pair in one.spread for y in pair] + list(levels.values())
    figure = go.Figure()
    for i, one in enumerate(series):
        _add_curve(figure, one, i if one.number is None else one.number, most)
    ends = [min(xs), max(xs)] if max(xs) > min(xs) else [xs[0] - 1, xs[0] + 1]
    for (name, value), dash in zip(levels.items(), cycle(("dash", "dot", "dashdot")), strict=False):
        line = {"color": _LEVEL, "dash": dash, "width": 1.5}
        figure.add_scatter(x=ends, y=[value, value], name=name, mode="lines", line=line)
    logarithmic = min(heights) > 0 and max(heights) / min(heights) > 300
    names = len(series) + len(levels)
    figure.update_layout(
        title={"text": title + (" (log)" if logarithmic else ""), "font": {"size": 14}},
        height=300 + (18 * names if 1 < names <= _MOST_NAMES else 0),
        showlegend=(names > 1 or drawn[0].name != title) and names <= _MOST_NAMES,
        hovermode="x unified" if len(drawn) <= 5 else "closest",
    )
    figure.update_xaxes(title=x_name)
    figure.update_yaxes(type="log" if logarithmic else "linear")
    return figure


def _add_curve(figure: go.Figure, one: Series, number: int, most: int) -> None:
    """A curve, and its spread as a pale band behind it."""
    paint = color(number)
    points: Sequence[tuple[float | None, float | None]] = thinned(one.points, most)
    if one.spread:
        edge = [(x, high) for (x, _), (_, high) in zip(one.points, one.spread, strict=True)]
        edge += [(x, low) for (x, _), (low, _) in zip(one.points[::-1], one.spread[::-1], strict=True)]
        figure.add_scatter(
            x=[x for x, _ in edge], y=[y for _, y in edge], fill="toself", fillcolor=paint, opacity=0.18,
            mode="none", showlegend=False, hoverinfo="skip", legendgroup=one.name,
        )  # fmt: skip
    lost = f" ({one.not_finite} not finite, not drawn)" if one.not_finite else ""
    points = points or [(None, None)]  # stands in the legend
    figure.add_scatter(
        x=[x for x, _ in points], y=[y for _, y in points], name=one.name + lost, legendgroup=one.name,
        mode="lines+markers" if len(points) <= 30 else "lines", line={"color": paint, "width": 1.8},
        marker={"color": paint, "size": 6}, meta=one.number,
    )  # fmt: skip
