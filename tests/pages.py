"""Reads the pages of reports in tests: tags in balance, tables as text, figures as plotly gets them."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Checks that tags are balanced and collects every address and all text."""

    VOID = {"meta", "img", "br", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] not in (["script"], ["style"]):
            self.text += data


def without_scripts(page: str) -> str:
    """A page without what runs in it; the data of its figures stays."""
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def figures(page: str) -> list[dict[str, Any]]:
    """The figures of a page: ``data`` and ``layout`` of each."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    return [json.loads(text) for text in found]


def cells(page: str, title: str) -> list[list[str]]:
    """The table under a heading, as text; ★ marks the best."""
    table = page.partition(f">{title}</h")[2].partition("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", table)
    marked = [re.sub(r'<td[^>]* class="best">', "<td>★", row) for row in rows]
    return [
        [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(?:<span[^>]*></span>)?(.*?)</t[hd]>", row)]
        for row in marked
    ]
