"""Folders of pictures as the scripts of GenEval, GenEval 2 and DPG-Bench read them.

geneval      00000/metadata.jsonl, 00000/samples/00000.png …: a folder for each prompt
geneval2     pictures.json: prompt to the path of its picture
dpg_bench    NAME.png: the pictures of a prompt in one, side by side in two rows
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from common.errors import UserError
from common.files import write_text_atomically, written_whole

if TYPE_CHECKING:
    from commands.kept_pictures import KeptPictures
    from datamodules.evaluation_sets import EvaluationSet

LAYOUTS = ("geneval", "geneval2", "dpg_bench")


def check_layout(layout: str, drawn: EvaluationSet) -> None:
    """Refuse a set that a layout is not made for, before anything is drawn.

    Raises:
        UserError: it is another benchmark's, or has a number of pictures that its script does not read.
    """
    if layout == "geneval2":
        if len(set(drawn.captions)) < len(drawn):
            raise UserError("--layout geneval2 has one picture for each prompt: give each prompt once")
    elif drawn.name != layout:
        raise UserError(
            f"--layout {layout} is that of the prompts of {layout} (configs/eval/{layout}.yaml), not of "
            f"{drawn.name}"
        )
    if layout == "dpg_bench" and drawn.images_per_prompt not in (1, 4):
        raise UserError(
            f"--layout dpg_bench takes 1 or 4 pictures of each prompt, and there are "
            f"{drawn.images_per_prompt}: set --data.images_per_prompt, and a --count that divides by it"
        )


def write_layout(layout: str, kept: KeptPictures, drawn: EvaluationSet, folder: Path) -> None:
    """Arrange the kept pictures anew; a former folder is replaced.

    Args:
        kept: the pictures, by their places in ``drawn``.
        folder: where to.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if layout == "geneval2":
        paths = {caption: str(kept.path(i).resolve()) for i, caption in enumerate(drawn.captions)}
        write_text_atomically(
            folder / "pictures.json", json.dumps(paths, indent=1, ensure_ascii=False) + "\n"
        )
        return
    run, told = drawn.images_per_prompt, drawn.told or []
    for number, start in enumerate(range(0, len(drawn), run)):
        files = [kept.path(place) for place in range(start, min(start + run, len(drawn)))]
        if layout == "geneval":
            samples = folder / f"{number:05d}" / "samples"
            samples.mkdir(parents=True)
            write_text_atomically(samples.parent / "metadata.jsonl", json.dumps(told[start]) + "\n")
            for i, file in enumerate(files):
                shutil.copyfile(file, samples / f"{i:05d}.png")
        else:
            with written_whole(folder / f"{told[start]['item']}.png") as partial:
                in_rows([Image.open(file) for file in files]).save(partial, format="PNG")


def in_rows(pictures: list[Image.Image]) -> Image.Image:
    """One picture, or four as two rows of two, in reading order."""
    width, height = pictures[0].size
    columns = 1 if len(pictures) == 1 else 2
    sheet = Image.new("RGB", (columns * width, columns * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
