"""Benchmarks whose prompts say what their pictures must show: GenEval, and its twin for the bundled models.

Each line of their JSON Lines files has a prompt, its task (``tag``), and what a judge looks for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common.errors import UserError, first_line
from common.files import ROOT
from datamodules.evaluation_sets import EvaluationSet, EvaluationSource, facts_of, repeated

GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
EMOJI_TASKS = (
    "object", "style", "background", "object_style", "object_background", "object_style_background",
)  # fmt: skip
EMOJI_FILE = ROOT / "assets" / "emoji_geneval.jsonl"
Entry = dict[str, Any]
"""A line of such a file."""


def read_entries(path: str | Path, tasks: Sequence[str]) -> list[Entry]:
    """The lines of a benchmark, checked.

    GenEval's hold ``include`` and ``exclude``: lists of ``class``, ``count``, ``color`` and ``position``
    (relation and place in the list). The twin's hold what the prompt names: ``object``, ``style``,
    ``background``.

    Raises:
        UserError: there is no such file, or a line is not as the benchmark's (it is named).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"the benchmark's prompts {path} can't be read: {first_line(error)}; give its JSON Lines file"
        ) from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            entries.append(_entry(line, f"{path}, line {number}", tasks))
    if not entries:
        raise UserError(f"{path} is empty; give the benchmark's JSON Lines file")
    return entries


def _entry(line: str, where: str, tasks: Sequence[str]) -> Entry:
    try:
        entry = json.loads(line)
        tag, prompt = entry["tag"], entry["prompt"]
        if tag not in tasks:
            raise ValueError(f"its tag {tag!r} is none of {', '.join(tasks)}")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("its prompt is no text")
        if tasks == GENEVAL_TASKS:
            _check_objects(entry)
        elif missing := [field for field in tag.split("_") if not entry.get(field)]:
            raise ValueError(f"its task {tag!r} needs {missing[0]!r}")
    except KeyError as error:
        raise UserError(
            f"{where}: it has no {error}; a line is an object with tag, prompt and what the picture shows, "
            "as in GenEval's evaluation_metadata.jsonl"
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: {first_line(error)}; fetch the benchmark's file again") from error
    found: Entry = entry
    return found


def _check_objects(entry: Entry) -> None:
    """Raise an error of Python's unless ``include`` and ``exclude`` are as GenEval's."""
    for wanted in [*entry["include"], *entry.get("exclude", [])]:
        if not isinstance(wanted["class"], str) or int(wanted["count"]) < 1:
            raise ValueError("an object needs a class and a count of at least 1")
    for place, wanted in enumerate(entry["include"]):
        if "position" in wanted:
            relation, target = wanted["position"]
            if relation not in RELATIONS or not 0 <= int(target) < place:
                raise ValueError(f"its position {wanted['position']} is none of {', '.join(RELATIONS)}")


@dataclass
class GenEval(EvaluationSource):
    """The prompts of GenEval (arXiv 2310.11513): 553 in six tasks, four pictures of each.

    Args:
        captions: ``evaluation_metadata.jsonl`` of its repository (in ``prompts/``).
        images_per_prompt: pictures of each prompt.
        seed: of the first picture; picture i has ``seed + i``.
    """

    needs: ClassVar[str] = (
        "the benchmark's prompts; give --captions evaluation_metadata.jsonl (it lies in prompts/ of the "
        "geneval repository)"
    )
    tasks: ClassVar[tuple[str, ...]] = GENEVAL_TASKS
    name: ClassVar[str] = "geneval"
    prompts: ClassVar[int | None] = 553
    images_per_prompt: int = 4
    seed: int = 0

    def load(self) -> EvaluationSet:
        """Read the file; the tasks are the groups."""
        path = self.path()
        entries = repeated(read_entries(path, self.tasks), self.images_per_prompt)
        return EvaluationSet(
            self.name, [entry["prompt"] for entry in entries], [self.seed + i for i in range(len(entries))],
            groups=[entry["tag"] for entry in entries],
            facts=facts_of(path) | {"images_per_prompt": self.images_per_prompt},
            published_count=self.prompts and 4 * self.prompts, told=entries,
        )  # fmt: skip


@dataclass
class EmojiGenEval(GenEval):
    """GenEval's twin for the bundled models: object, style, background and their combinations.

    Args:
        captions: its JSON Lines file; None: the bundled one.
        images_per_prompt, seed: as for `GenEval`.
    """

    needs: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = EMOJI_TASKS
    name: ClassVar[str] = "emoji_geneval"
    prompts: ClassVar[int | None] = None

    def path(self) -> str:
        """Path of the file, the bundled one if none is given."""
        return self.captions or str(EMOJI_FILE)


def emoji_prompt(thing: str, style: str | None = None, background: str | None = None) -> str:
    """A caption of a picture of the bundled models, in one order of its parts."""
    article = "an" if thing[0] in "aeiou" else "a"
    parts = [f"{style} style"] * bool(style) + [f"on a {background} background"] * bool(background)
    return ", ".join([f"{article} {thing}", *parts])
