"""Samples over training for a page: each prompt's pictures at several steps, beside the teacher's."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from reports.html import image_source
from reports.sheets import Cards, read_cards

_MOST_STEPS = 12
_LARGEST = 512
"""Side of a picture in the page; the sheets hold them whole."""


@dataclass(frozen=True)
class Strip:
    """What the page shows.

    Attributes:
        steps: student updates after which the frames were drawn.
        views: the student's name and, if they are there, that of what stands beside it, all over the cards.
        cards: prompt, the student's frames (addresses, one for each step), and the pictures beside the last.
    """

    steps: list[int]
    views: list[str]
    cards: list[tuple[str, list[str], list[str]]]


def read_strip(sheets: Mapping[int, Path]) -> Strip | None:
    """The pictures of the sheets of a run by their steps; None where they don't tell where these are.

    Of many steps some are left out, evenly, first and last kept; sheets of other prompts than the last one's
    are left out, too.
    """
    steps = sorted(sheets)
    if len(steps) > _MOST_STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (_MOST_STEPS - 1))] for i in range(_MOST_STEPS)]
    found = {step: sheet for step in steps if (sheet := read_cards(sheets[step])) is not None}
    if not steps or steps[-1] not in found:
        return None
    last = found[steps[-1]]
    same: dict[int, Cards] = {step: one for step, one in found.items() if one.prompts == last.prompts}
    own, *others = last.views
    cards: list[tuple[str, list[str], list[str]]] = []
    for i, prompt in enumerate(last.prompts):
        frames = [_address(next(iter(one.views.values()))[i]) for one in same.values()]
        cards.append((prompt, frames, [_address(last.views[name][i]) for name in others]))
    return Strip(list(same), [own, *others], cards)


def _address(picture: Image.Image) -> str:
    picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=90)
    return image_source(stream.getvalue(), "webp")
