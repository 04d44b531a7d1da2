"""SVG plots of the sweep page until it is drawn with plotly; nothing else uses this file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 250
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


Point = tuple[float, float]

_END, _FLOOR = WIDTH - 14, HEIGHT - 40
UPDATES = "student updates"
NUM_COLORS = 5
"""Colours come from the page's CSS variables ``--curve-0`` ..., so that they fit light and dark."""
_MOST_POINTS = 4 * WIDTH


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


STYLE = """
:root { color-scheme: light dark; --paper:#fbfbfa; --card:#fff; --ink:#1d1f23; --faint:#646a73;
  --line:#dfe1e5;
  --accent:#1f63c4; --mark:#eaf1fc; --curve-0:#1f63c4; --curve-1:#c2410c; --curve-2:#15803d;
  --curve-3:#7e22ce;
  --curve-4:#a16207; }
@media (prefers-color-scheme: dark) { :root { --paper:#15171a; --card:#1e2125; --ink:#e7e9ec; --faint:#9aa1ab;
  --line:#34393f; --accent:#7fb0ff; --mark:#22304a; --curve-0:#7fb0ff; --curve-1:#ff9a66; --curve-2:#6fd58f;
  --curve-3:#c99bff; --curve-4:#e6c34d; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 system-ui, sans-serif; }
main { max-width:1120px; margin:0 auto; padding:2rem 1.1rem 4rem; }
h1 { font-size:1.75rem; line-height:1.2; margin:0 0 .2rem; overflow-wrap:anywhere; }
h2 { font-size:1.2rem; margin:2.4rem 0 .8rem; }
p { margin:.4rem 0; max-width:75ch; } .faint, figcaption, .note { color:var(--faint); font-size:.9rem; }
.findings { display:grid; grid-template-columns:repeat(auto-fit,minmax(230px,1fr)); gap:.8rem; padding:0;
  margin:1.4rem 0;
  list-style:none; }
.findings li { background:var(--card); border:1px solid var(--line); border-left:4px solid var(--accent);
  border-radius:8px; padding:.7rem .9rem; }
.wide { overflow-x:auto; background:var(--card); border:1px solid var(--line); border-radius:8px; }
table { border-collapse:collapse; width:100%; }
th, td { padding:.55rem .9rem; text-align:right; border-bottom:1px solid var(--line);
  font-variant-numeric:tabular-nums;
  white-space:nowrap; }
th:first-child, td:first-child { text-align:left; } tr:last-child td { border-bottom:0; }
thead th { color:var(--faint); font-weight:600; font-size:.87rem; } tr.student td { background:var(--mark);
  font-weight:600; }
.words td, .words th { white-space:normal; text-align:left; vertical-align:top; min-width:5rem; }
figure { margin:0 0 1rem; } figure img { display:block; max-width:100%; height:auto; border:1px solid
  var(--line);
  border-radius:8px; } figcaption { margin:.3rem 0; }
.plots { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr)); gap:.8rem; }
.plot { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:.6rem; min-width:0; }
svg { display:block; width:100%; height:auto; } svg text { fill:var(--faint); font:12px system-ui, sans-serif;
  }
svg .grid { stroke:var(--line); stroke-width:1; } svg .axis { fill:none; stroke:var(--faint); stroke-width:1;
  }
svg .curve { fill:none; stroke:var(--c); stroke-width:1.8; stroke-linejoin:round; } svg .dot { fill:var(--c);
  }
svg .level { stroke:var(--ink); stroke-width:1.2; stroke-dasharray:5 4; opacity:.65; } svg .name {
  fill:var(--ink); font-size:11px; }
.legend { list-style:none; margin:.3rem 0 0; padding:0; font-size:.8rem; overflow-wrap:anywhere; }
.legend li::before { content:""; display:inline-block; width:14px; height:3px; margin-right:6px;
  vertical-align:middle;
  background:var(--c); }
details { margin:.5rem 0; } summary { cursor:pointer; color:var(--accent); padding:.2rem 0; }
dl { display:grid; grid-template-columns:minmax(9rem,max-content) 1fr; gap:.15rem 1rem; margin:.4rem 0;
  font-size:.92rem; }
dt { color:var(--faint); } dd { margin:0; overflow-wrap:anywhere; min-width:0; } dl dl { grid-column:1/-1;
  margin-left:1rem; }
@media (max-width:560px) { dl { grid-template-columns:1fr; } dd { margin-bottom:.4rem; } }
"""
