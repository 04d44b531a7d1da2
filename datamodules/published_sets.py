"""Evaluation sets of publications: COCO-30k in two presets, HPSv2's benchmark, PartiPrompts.

The files come from the user; none is downloaded or shipped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from datamodules.evaluation_sets import (
    EvaluationSet,
    EvaluationSource,
    md5,
    sample,
    second_column,
)
from datamodules.picture_files import Frame
from datamodules.tables import keys_of, read_column, read_json

DMD2_MD5 = "20ed79e6a73d7b8fdbfb6ebc8c5c7e99"
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
HPSV2_PROMPTS = 800
VAL2014 = 40_504  # pictures of COCO's val2014


class Coco30kDMD2(EvaluationSource):
    """COCO-30k as DMD2 (arXiv 2405.14867) and SiD-LSG (2406.01561) measure it.

    One fixed list of 30,000 captions, checked by md5; seed = line index; all of val2014 as reference;
    drawn and real pictures centre-cropped and LANCZOS-resized to 256; clean-fid in its mode "clean".

    Args:
        captions: the list: `captions_coco14_test.txt` of the DMD2 repository.
    """

    def __init__(self, captions: str | None = None) -> None:
        self.captions = captions

    def load(self) -> EvaluationSet:
        """Read the list and check it."""
        if self.captions is None:
            raise UserError(
                "coco30k_dmd2 needs the list of 30,000 captions; give --captions "
                "captions_coco14_test.txt (it lies "
                "in main/coco_eval/ of the DMD2 repository)"
            )
        captions = read_column(self.captions)
        if (found := md5(self.captions)) != DMD2_MD5:
            raise UserError(
                f"{self.captions} is not the caption list of coco30k_dmd2: its md5 is {found}, not "
                f"{DMD2_MD5} "
                f"(it has {len(captions):,} captions). Give the published list, or use CaptionFile for "
                "your own"
            )
        return EvaluationSet(
            "coco30k_dmd2", captions, list(range(len(captions))), frame=Frame(256), published_count=30_000,
            published_references=VAL2014,
            facts={"file": Path(self.captions).name, "md5": DMD2_MD5},
            notes=(
                "drawn pictures are rounded to 8 bits, DMD2's evaluator cuts them off",
                "a seed for each line, DMD2's evaluator has one for each batch",
            ),
        )  # fmt: skip


class CocoCaptions(EvaluationSource):
    """Captions of a COCO annotation file (captions_val2014.json), each with seed + its place.

    Args:
        captions: the annotation file.
        sample: this many of them at random; None: all, in the order of the file.
        one_per_image: only the first caption of every image.
        sample_seed: of the draw; ``seed``: of the first picture.
        frame: crop and resize before the metrics.
    """

    def __init__(
        self,
        captions: str | None = None,
        sample: int | None = None,
        one_per_image: bool = False,
        sample_seed: int = 0,
        seed: int = 0,
        frame: Frame | None = None,
    ) -> None:
        self.captions, self.sample, self.one_per_image = captions, sample, one_per_image
        self.sample_seed, self.seed, self.frame = sample_seed, seed, frame

    def load(self) -> EvaluationSet:
        """Read the annotations."""
        if self.captions is None:
            raise UserError("CocoCaptions needs COCO's annotations; give --captions captions_val2014.json")
        captions = read_coco(self.captions, self.one_per_image)
        facts: dict[str, Any] = {
            "file": Path(self.captions).name, "md5": md5(self.captions), "one_per_image": self.one_per_image,
        }  # fmt: skip
        name = Path(self.captions).stem
        if self.sample is not None:
            chosen = sample(len(captions), self.sample, self.sample_seed, self.captions)
            captions = [captions[i] for i in chosen]
            facts |= {"sampled": self.sample, "sample_seed": self.sample_seed}
            name = f"{name}, {self.sample} at random"
        seeds = [self.seed + i for i in range(len(captions))]
        return EvaluationSet(name, captions, seeds, frame=self.frame, facts=facts)


class Coco30kSwiftBrush(EvaluationSource):
    """COCO-30k as SwiftBrush v2 (arXiv 2408.14176) re-evaluates: the first 30,000 captions, 256x256 pictures.

    Args:
        captions: captions_val2014.json (its annotations in the order of the file), or a file of captions.
        count: captions to take.
        seed: of the first picture.
    """

    def __init__(self, captions: str | None = None, count: int = 30_000, seed: int = 0) -> None:
        self.captions, self.count, self.seed = captions, count, seed

    def load(self) -> EvaluationSet:
        """Read the first captions."""
        if self.captions is None:
            raise UserError("coco30k_swiftbrush needs COCO's captions; give --captions captions_val2014.json")
        if Path(self.captions).suffix.lower() == ".json":
            captions = read_coco(self.captions)
        else:
            captions = read_column(self.captions)
        if len(captions) < self.count:
            raise UserError(
                f"{self.captions} has {len(captions):,} captions, fewer than the first {self.count:,} that "
                "coco30k_swiftbrush takes; give all of val2014, or set --data.count"
            )
        return EvaluationSet(
            "coco30k_swiftbrush", captions[: self.count], [self.seed + i for i in range(self.count)],
            frame=Frame(256, crop=False), published_count=30_000,
            published_references=VAL2014,
            facts={"file": Path(self.captions).name, "md5": md5(self.captions), "first": self.count},
            notes=("the papers state no seeds and no filter of the 256x256 resize (here LANCZOS, no crop)",),
        )  # fmt: skip


class HPSv2Prompts(EvaluationSource):
    """The prompts of the HPSv2 benchmark (arXiv 2306.09341): 800 for each of four styles.

    Args:
        captions: a folder with anime.json, concept-art.json, paintings.json and photo.json, each a list of
            800 texts.
        seed: of the first picture of each style, so that picture i of every style has the same noise.
    """

    def __init__(self, captions: str | None = None, seed: int = 0) -> None:
        self.captions, self.seed = captions, seed

    def load(self) -> EvaluationSet:
        """Read the four files."""
        if self.captions is None:
            raise UserError(
                "HPSv2Prompts needs the benchmark's prompts; give --captions FOLDER with "
                + ", ".join(f"{style}.json" for style in HPSV2_STYLES)
            )
        folder = Path(self.captions)
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the one that holds the benchmark's JSON files")
        captions, groups = [], []
        for style in HPSV2_STYLES:
            file = folder / f"{style}.json"
            if not file.is_file():
                there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
                raise UserError(f"{file} is missing; {folder} holds {there}")
            prompts = read_column(file)
            if len(prompts) != HPSV2_PROMPTS:
                raise UserError(
                    f"{file} holds {len(prompts)} prompts, the benchmark has {HPSV2_PROMPTS} per style"
                )
            captions += prompts
            groups += [style] * len(prompts)
        seeds = [self.seed + i % HPSV2_PROMPTS for i in range(len(captions))]
        digest = hashlib.md5(json.dumps(captions).encode(), usedforsecurity=False).hexdigest()
        return EvaluationSet(
            "hpsv2", captions, seeds, groups=groups, published_count=len(captions),
            facts={"folder": folder.name, "md5_of_prompts": digest},
            notes=("pictures go to the scorer from memory, the reference reads JPEG files",),
        )  # fmt: skip


class PartiPrompts(EvaluationSource):
    """PartiPrompts (arXiv 2206.10789): a TSV with the columns Prompt, Category and Challenge.

    Args:
        captions: the file.
        category: only prompts of this category; None: all.
        seed: of the first picture.
    """

    def __init__(self, captions: str | None = None, category: str | None = None, seed: int = 0) -> None:
        self.captions, self.category, self.seed = captions, category, seed

    def load(self) -> EvaluationSet:
        """Read the file."""
        if self.captions is None:
            raise UserError("PartiPrompts needs its file; give --captions PartiPrompts.tsv")
        prompts = second_column(self.captions, "Prompt")
        groups = second_column(self.captions, "Category")
        if self.category is not None:
            if self.category not in groups:
                known = ", ".join(sorted(set(groups)))
                raise UserError(f"{self.captions} has no category {self.category!r}; it has {known}")
            prompts = [text for text, group in zip(prompts, groups) if group == self.category]
            groups = [self.category] * len(prompts)
        return EvaluationSet(
            "parti", prompts, [self.seed + i for i in range(len(prompts))], groups=groups,
            facts={"file": Path(self.captions).name, "md5": md5(self.captions), "category": self.category},
        )  # fmt: skip


def read_coco(path: str | Path, one_per_image: bool = False) -> list[str]:
    """Captions of a COCO annotation file in its order, blanks at the ends removed.

    Raises:
        UserError: the file is missing, no JSON, or has other keys (those it has are named).
    """
    content = read_json(Path(path))
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError(
            f"{path} has no list 'annotations' as captions_val2014.json has; it holds {keys_of(content)}"
        )
    captions, seen = [], set()
    for number, entry in enumerate(content["annotations"]):
        if not isinstance(entry, dict) or not {"caption", "image_id"} <= entry.keys():
            raise UserError(
                f"{path}: annotation {number} lacks 'caption' or 'image_id'; it holds {keys_of(entry)}"
            )
        if one_per_image and entry["image_id"] in seen:
            continue
        seen.add(entry["image_id"])
        captions.append(str(entry["caption"]).strip())
    return captions
