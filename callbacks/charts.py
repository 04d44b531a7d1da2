"""Plots of several runs as inline SVG: any axes, any number of colours; no library, no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from callbacks.curves import HEIGHT, NUM_COLORS, WIDTH, Point, _number, _thinned, _ticks

_LEFT, _TOP = 58, 12
_RIGHT, _FLOOR = WIDTH - 22, HEIGHT - 40
_GOLDEN_ANGLE = 137.508  # degrees; neighbouring hues are as far apart as can be, however many there are
_LANE, _PARALLEL_HEIGHT = 150, 300


@dataclass(frozen=True)
class Curve:
    """Points of one name.

    Attributes:
        name: shown when the pointer rests on it.
        points: (x, y), in order; values that are not finite are left out.
        color: a CSS colour.
        line: whether neighbours are joined.
        dots: whether each point is marked.
        group: a CSS class, by which a page can find all that belongs to one run.
    """

    name: str
    points: Sequence[Point]
    color: str = "var(--accent)"
    line: bool = True
    dots: bool = False
    group: str = ""


@dataclass(frozen=True)
class Axis:
    """One axis: its ends, ticks and, for values that are no numbers, the names of the ticks."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool = False
    names: Mapping[float, str] = field(default_factory=dict)

    @classmethod
    def around(
        cls, title: str, values: Sequence[float], logarithmic: bool | None = None, whole: bool = False
    ) -> Axis:
        """An axis that holds all values.

        Args:
            title: shown beside it.
            values: finite numbers, at least one.
            logarithmic: None: where all are positive and span more than two and a half powers of ten.
            whole: ticks at whole numbers only, and none beyond the last value.
        """
        low, high = min(values), max(values)
        if logarithmic is None:
            logarithmic = low > 0 and high / low > 300
        if logarithmic and high > low:
            return cls(title, low, high, _log_ticks(low, high), True)
        ticks = _ticks(low, high, 5, whole=whole)
        low, high = min(low, *ticks), max(high, *ticks)
        return cls(title, low, high, ticks) if high > low else cls(title, low - 0.5, high + 0.5, ticks)

    @classmethod
    def of_names(cls, title: str, names: Sequence[str]) -> Axis:
        """An axis of named places 0, 1, ..."""
        places = {float(i): name for i, name in enumerate(names)}
        return cls(title, -0.5, len(names) - 0.5, list(places), names=places)

    def place(self, value: float) -> float:
        """Where a value lies between the ends: 0 at the low one, 1 at the high one."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def label(self, tick: float, letters: int = 24) -> str:
        """What stands at a tick."""
        text = self.names.get(tick) or _number(tick)
        return text if len(text) <= letters else text[: letters - 1] + "…"


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with their twofolds and fivefolds where the range is short; at least the two ends."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if last - first > 3 else (1, 2, 5)
    ticks = [m * 10.0**k for k in range(first, last + 1) for m in factors]
    inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return inside if len(inside) > 1 else [low, high]


def color(index: int) -> str:
    """The CSS colour of a run: the page's own for the first few, then hues far from each other."""
    if index < NUM_COLORS:
        return f"var(--curve-{index})"
    return f"hsl({index * _GOLDEN_ANGLE % 360:.0f} 60% 52%)"


def xy_plot(curves: Sequence[Curve], x: Axis, y: Axis) -> str:
    """Curves and dots in one frame, as an ``<svg>`` element.

    Series of thousands of points are thinned to what a pixel column shows.
    """
    body = _frame(x, y)
    for curve in curves:
        finite = [(a, b) for a, b in curve.points if math.isfinite(a) and math.isfinite(b)]
        placed = _thinned([
            (_LEFT + x.place(a) * (_RIGHT - _LEFT), _FLOOR - y.place(b) * (_FLOOR - _TOP)) for a, b in finite
        ])  # fmt: skip
        body.append(_marks(curve, placed))
    label = escape(f"{y.title} against {x.title}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'


def _frame(x: Axis, y: Axis) -> list[str]:
    body = []
    for tick in x.ticks:
        at = _LEFT + x.place(tick) * (_RIGHT - _LEFT)
        body.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_FLOOR}"/>')
        text = escape(x.label(tick, 14))
        body.append(f'<text x="{at:.1f}" y="{_FLOOR + 16}" text-anchor="middle">{text}</text>')
    for tick in y.ticks:
        at = _FLOOR - y.place(tick) * (_FLOOR - _TOP)
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        body.append(
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(y.label(tick))}</text>'
        )
    middle_x, middle_y = (_LEFT + _RIGHT) / 2, (_TOP + _FLOOR) / 2
    turn = f'transform="rotate(-90 12 {middle_y})"'
    titles = [axis.title + (" (log)" if axis.logarithmic else "") for axis in (x, y)]
    return [
        *body,
        f'<path class="axis" d="M{_LEFT} {_TOP}V{_FLOOR}H{_RIGHT}"/>',
        f'<text x="{middle_x}" y="{HEIGHT - 6}" text-anchor="middle">{escape(titles[0])}</text>',
        f'<text x="12" y="{middle_y}" text-anchor="middle" {turn}>{escape(titles[1])}</text>',
    ]


def _marks(curve: Curve, points: Sequence[Point]) -> str:
    style = f'style="--c:{curve.color}"'
    marks = [f"<title>{escape(curve.name)}</title>"]
    if curve.line and len(points) > 1:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        marks.append(f'<polyline class="curve" {style} points="{path}"/>')
    if curve.dots or (curve.line and len(points) == 1):
        marks += [f'<circle class="dot" {style} cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in points]
    return f'<g class="{escape(("run " + curve.group).strip(), quote=True)}">{"".join(marks)}</g>'


def parallel_plot(axes: Sequence[Axis], rows: Sequence[tuple[Curve, Sequence[float]]]) -> str:
    """Parallel coordinates: one upright axis for each value of a row, one broken line for each row.

    Args:
        axes: from left to right.
        rows: name, colour and group of each line (its points are not used), and its value on every axis.
            Later ones are drawn over earlier ones.
    """
    width = _LANE * (len(axes) - 1) + 190
    top, floor = 40, _PARALLEL_HEIGHT - 16
    across = [80 + _LANE * i for i in range(len(axes))]
    body = []
    for curve, values in rows:
        heights = [floor - axis.place(value) * (floor - top) for axis, value in zip(axes, values)]
        body.append(_marks(curve, list(zip(across, heights))))
    for x, axis in zip(across, axes):
        body.append(f'<path class="axis" d="M{x} {top}V{floor}"/>')
        title = escape(axis.title + (" (log)" if axis.logarithmic else ""))
        body.append(f'<text class="name" x="{x}" y="22" text-anchor="middle">{title}</text>')
        for tick in axis.ticks:
            y = floor - axis.place(tick) * (floor - top)
            body.append(f'<path class="axis" d="M{x - 4} {y:.1f}H{x}"/>')
            text = escape(axis.label(tick, 12))
            body.append(f'<text x="{x - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    # of a few axes the letters would grow with the page
    limits = f"min-width:{min(width, 900)}px;max-width:{1.5 * width:.0f}px"
    size = f'viewBox="0 0 {width} {_PARALLEL_HEIGHT}" style="{limits}"'
    return f'<svg {size} role="img" aria-label="parallel coordinates">{"".join(body)}</svg>'


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest tail of each dotted key that no other key has."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        names[key] = next((t for t in tails if not any(o.endswith(f".{t}") for o in others)), key)
    return names
