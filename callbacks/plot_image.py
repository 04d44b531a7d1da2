"""The plots of `curves` as one PNG, by Pillow alone, for where a page can't be shown."""

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from callbacks.curves import HEIGHT, WIDTH, Point, _Frame, _number

_SCALE = 2  # drawn at twice the size of the SVG, so that lines and letters stay sharp
_HEAD = 26  # room for the title above a plot
_PAPER, _INK, _FAINT, _GRID = (255, 255, 255), (29, 31, 35), (100, 106, 115), (223, 225, 229)
_COLORS = [(31, 99, 196), (194, 65, 12)]


def plot_image(plots: Mapping[str, list[Point]], x_name: str) -> Image.Image:
    """Plots side by side, each with axes of its own.

    Args:
        plots: title to finite points, from left to right; at least one plot and one point in each.
        x_name: label of the horizontal axes.
    """
    sheet = Image.new("RGB", (WIDTH * len(plots) * _SCALE, (HEIGHT + _HEAD) * _SCALE), _PAPER)
    for i, (title, points) in enumerate(plots.items()):
        panel = _panel(title, points, x_name, _COLORS[i % len(_COLORS)])
        sheet.paste(panel, (i * WIDTH * _SCALE, 0))
    return sheet


def _panel(title: str, points: list[Point], x_name: str, color: tuple[int, int, int]) -> Image.Image:
    frame = _Frame.around([x for x, _ in points], [y for _, y in points], whole=False)
    image = Image.new("RGB", (WIDTH * _SCALE, (HEIGHT + _HEAD) * _SCALE), _PAPER)
    draw = ImageDraw.Draw(image)
    small, large = (ImageFont.load_default(size=size * _SCALE) for size in (11, 13))

    def place(x: float, y: float) -> tuple[float, float]:
        across, down = frame.place((x, y))
        return across * _SCALE, (down + _HEAD) * _SCALE

    left, right = frame.xs[0], frame.xs[-1]
    low, high = min(frame.ys), max(frame.ys)
    for x in frame.xs:
        draw.line([place(x, low), place(x, high)], _GRID, width=_SCALE)
        across, down = place(x, low)
        draw.text((across, down + 5 * _SCALE), _number(x), _FAINT, font=small, anchor="ma")
    for y in frame.ys:
        draw.line([place(left, y), place(right, y)], _GRID, width=_SCALE)
        across, down = place(left, y)
        draw.text((across - 5 * _SCALE, down), _number(y), _FAINT, font=small, anchor="rm")
    middle = (place(left, low)[0] + place(right, low)[0]) / 2
    draw.text((middle, 8 * _SCALE), title, _INK, font=large, anchor="ma")
    draw.text((middle, (HEIGHT + _HEAD - 4) * _SCALE), x_name, _FAINT, font=small, anchor="md")
    spots = [place(*point) for point in points]
    if len(spots) > 1:
        draw.line(spots, color, width=2 * _SCALE, joint="curve")
    for across, down in spots:
        radius = 3.5 * _SCALE
        draw.ellipse((across - radius, down - radius, across + radius, down + radius), fill=color)
    return image
