"""Plots as one PNG in the manner of `curves`, by Pillow alone, for where a page can't be shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from callbacks.curves import HEIGHT, WIDTH, Point, _Frame, _number

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
        _curve(ImageDraw.Draw(image), [_place(frame, *point) for point in line.points], color)
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


def _curve(draw: ImageDraw.ImageDraw, spots: list[Point], color: _Color) -> None:
    if len(spots) > 1:
        draw.line(spots, color, width=2 * _SCALE, joint="curve")
    for across, down in spots:
        radius = 3.5 * _SCALE
        draw.ellipse((across - radius, down - radius, across + radius, down + radius), fill=color)
