"""HTML pages: one shell, one style, one kind of table and of plot, as templates that escape all text."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from common.files import write_text_atomically
from reports.plots import color
from reports.text import said

if TYPE_CHECKING:
    import plotly.graph_objects as go

SCRIPT_NAME = "plotly.min.js"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        cells: texts, the row's name first; a `Markup` stands as it is.
        kind: "marked" for what the page is about, "faint" for what stands beside it for comparison.
        best: the columns whose values get a star.
        number: of a run: its colour stands before its name, and resting on the row lights up its curves.
    """

    cells: Sequence[str]
    kind: str = ""
    best: Collection[int] = ()
    number: int | None = None


@dataclass(frozen=True)
class Table:
    """A table; on a narrow screen every row becomes a card, so that all of it can be seen.

    Attributes:
        header: names of the columns.
        rows: what stands below; more than thirty scroll by themselves.
        kind: "sorts" for numbers that a click on the column's name sorts, "text" for words, "" for numbers.
    """

    header: Sequence[str]
    rows: Sequence[Row] = field(default_factory=list)
    kind: str = ""


def figure_json(figure: go.Figure) -> Markup:
    """Data and layout of a figure as JSON that may stand in a page, without plotly's own colours."""
    content = json.loads(figure.to_json())
    content["layout"].pop("template", None)
    return Markup(json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))  # noqa: S704


def data_address(data: bytes, kind: str) -> str:
    """A file's bytes as an address, so that it lies in the page; ``kind`` as ``text/csv``."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_source(data: bytes, kind: str = "png") -> str:
    """The same of a picture."""
    return data_address(data, f"image/{kind}")


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_TEMPLATES.filters |= {"said": said, "figure_json": figure_json}
_TEMPLATES.globals |= {"color": color, "plotly_script": lambda: Markup(get_plotlyjs())}  # noqa: S704


def render(template: str, title: str, script: str | None = None, **values: Any) -> str:
    """A page from a template in ``templates/``.

    Args:
        template: name of the file; it extends ``shell.html``.
        title: of the page.
        script: where plotly's script lies, seen from the page (see `shared_script`). None: it is put into the
            page (5 MB), if it holds plots, so that the page can be sent around as one file.
        values: what the template shows; tables as `Table`, plots as plotly figures.
    """
    return _TEMPLATES.get_template(template).render(title=title, script=script, **values)


def plots_page(title: str, figures: Sequence[go.Figure]) -> str:
    """A page of plots alone, in one file; the camera above each plot saves it as PNG."""
    return render("plots.html", title, figures=figures)


def shared_script(folder: Path) -> str:
    """Make sure that plotly's script lies once beside all experiments; its address from a run's folder.

    That is ``runs/`` of ``runs/<experiment>/version_<n>/``; the folder itself where it has another name, or
    where nothing may be written there.
    """
    run = next((path for path in (folder, folder.parent) if path.name.startswith("version_")), None)
    root = run.parent.parent if run is not None else folder
    root = root if os.access(root, os.W_OK) else folder
    path, script = root / SCRIPT_NAME, get_plotlyjs()
    if not path.is_file() or path.stat().st_size != len(script.encode()):
        write_text_atomically(path, script)
    return Path(os.path.relpath(path, folder)).as_posix()
