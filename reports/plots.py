"""Plots of several runs as inline SVG: any axes, any number of colours; no library, no script."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

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


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest tail of each dotted key that no other key has."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        names[key] = next((t for t in tails if not any(o.endswith(f".{t}") for o in others)), key)
    return names


Point = tuple[float, float]

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
    def around(cls, xs: list[float], ys: list[float], whole: bool = True) -> _Frame:
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


_SCALE = 2  # drawn at twice the size of the SVG, so that lines and letters stay sharp
_HEAD = 26  # room for the title above a plot
_LEGEND = 18  # height of a line of the legend below it
_PAPER, _INK, _FAINT, _GRID = (255, 255, 255), (29, 31, 35), (100, 106, 115), (223, 225, 229)
_COLORS = [(31, 99, 196), (194, 65, 12), (22, 128, 82), (124, 58, 190), (176, 137, 0)]
_Color = tuple[int, int, int]


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Attributes:
        name: what the legend calls it; "" for no entry.
        points: finite, from left to right.
        spread: lowest and highest value at each point, drawn as a band; none if empty.
    """

    name: str
    points: Sequence[Point]
    spread: Sequence[tuple[float, float]] = ()


def plot_image(plots: Mapping[str, list[Point]], x_name: str) -> Image.Image:
    """Plots of one line each side by side, with axes of their own.

    Args:
        plots: title to finite points, from left to right; at least one plot and one point in each.
        x_name: label of the horizontal axes.
    """
    panels = [
        _panel(title, [Line("", points)], x_name, [_COLORS[i % 2]])
        for i, (title, points) in enumerate(plots.items())
    ]
    return _sheet(panels, len(panels))


def lines_image(plots: Mapping[str, Sequence[Line]], x_name: str, columns: int = 2) -> Image.Image:
    """Plots of several lines, with legends; one without any point says so.

    Args:
        plots: title to lines; at least one plot.
        x_name: label of the horizontal axes.
        columns: plots side by side.
    """
    return _sheet([_panel(title, lines, x_name, _COLORS) for title, lines in plots.items()], columns)


def _sheet(panels: list[Image.Image], columns: int) -> Image.Image:
    rows = -(-len(panels) // columns)
    width, height = panels[0].width, max(panel.height for panel in panels)
    sheet = Image.new("RGB", (width * columns, height * rows), _PAPER)
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % columns * width, i // columns * height))
    return sheet


def _panel(title: str, lines: Sequence[Line], x_name: str, colors: Sequence[_Color]) -> Image.Image:
    names = [line.name for line in lines if line.name]
    floor = (HEIGHT + _HEAD) * _SCALE
    image = Image.new("RGB", (WIDTH * _SCALE, floor + len(names) * _LEGEND * _SCALE), _PAPER)
    draw = ImageDraw.Draw(image)
    large, middle = ImageFont.load_default(size=13 * _SCALE), image.width / 2
    spots = [point for line in lines for point in line.points]
    if not spots:
        draw.text((middle, 8 * _SCALE), title, _INK, font=large, anchor="ma")
        draw.text((middle, floor / 2), "no result", _FAINT, font=large, anchor="mm")
        return image
    heights = [y for _, y in spots] + [y for line in lines for pair in line.spread for y in pair]
    frame = _Frame.around([x for x, _ in spots], heights, whole=False)
    _axes(draw, frame, title, x_name)
    colored = [(line, colors[i % len(colors)]) for i, line in enumerate(lines)]
    for line, color in colored:
        image = _with_band(image, frame, line, color)
        _draw_curve(ImageDraw.Draw(image), [_place(frame, *point) for point in line.points], color)
    draw, small = ImageDraw.Draw(image), ImageFont.load_default(size=11 * _SCALE)
    for i, (line, color) in enumerate((line, color) for line, color in colored if line.name):
        down = floor + (i + 0.5) * _LEGEND * _SCALE
        draw.line([(60 * _SCALE, down), (80 * _SCALE, down)], color, width=3 * _SCALE)
        draw.text((88 * _SCALE, down), line.name, _INK, font=small, anchor="lm")
    return image


def _place(frame: _Frame, x: float, y: float) -> Point:
    across, down = frame.place((x, y))
    return across * _SCALE, (down + _HEAD) * _SCALE


def _axes(draw: ImageDraw.ImageDraw, frame: _Frame, title: str, x_name: str) -> None:
    """Grid, numbers, title and the horizontal axis' name."""
    small, large = (ImageFont.load_default(size=size * _SCALE) for size in (11, 13))
    left, right = frame.xs[0], frame.xs[-1]
    low, high = min(frame.ys), max(frame.ys)
    for x in frame.xs:
        draw.line([_place(frame, x, low), _place(frame, x, high)], _GRID, width=_SCALE)
        across, down = _place(frame, x, low)
        draw.text((across, down + 5 * _SCALE), _number(x), _FAINT, font=small, anchor="ma")
    for y in frame.ys:
        draw.line([_place(frame, left, y), _place(frame, right, y)], _GRID, width=_SCALE)
        across, down = _place(frame, left, y)
        draw.text((across - 5 * _SCALE, down), _number(y), _FAINT, font=small, anchor="rm")
    middle = (_place(frame, left, low)[0] + _place(frame, right, low)[0]) / 2
    draw.text((middle, 8 * _SCALE), title, _INK, font=large, anchor="ma")
    draw.text((middle, (HEIGHT + _HEAD - 4) * _SCALE), x_name, _FAINT, font=small, anchor="md")


def _with_band(image: Image.Image, frame: _Frame, line: Line, color: _Color) -> Image.Image:
    """The picture with the line's spread in a pale tone."""
    if len(line.points) < 2 or not line.spread:
        return image
    pairs = list(zip(line.points, line.spread, strict=True))
    edge = [_place(frame, x, high) for (x, _), (_, high) in pairs]
    edge += [_place(frame, x, low) for (x, _), (low, _) in reversed(pairs)]
    band = Image.new("RGBA", image.size, (*color, 0))
    ImageDraw.Draw(band).polygon(edge, fill=(*color, 45))
    return Image.alpha_composite(image.convert("RGBA"), band).convert("RGB")


def _draw_curve(draw: ImageDraw.ImageDraw, spots: list[Point], color: _Color) -> None:
    if len(spots) > 1:
        draw.line(spots, color, width=2 * _SCALE, joint="curve")
    for across, down in spots:
        radius = 3.5 * _SCALE
        draw.ellipse((across - radius, down - radius, across + radius, down + radius), fill=color)
