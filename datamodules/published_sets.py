"""Evaluation sets of publications: COCO-30k in two presets, HPSv2's benchmark, PartiPrompts, MJHQ-30K, and
the prompts of DPG-Bench and GenEval 2, whose own judges read the pictures.

The files come from the user; none is downloaded or shipped.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.errors import UserError
from datamodules.evaluation_sets import CaptionFile, EvaluationSet, EvaluationSource, facts_of, repeated
from datamodules.picture_files import Frame
from datamodules.tables import is_table, kind_of, read_column, read_files, read_json, read_texts

DMD2_MD5 = "20ed79e6a73d7b8fdbfb6ebc8c5c7e99"
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
HPSV2_PROMPTS = 800
VAL2014 = 40_504  # pictures of COCO's val2014
SWIFTBRUSH_FIRST = "A man with a red helmet on a small moped on a dirt road."
MJHQ = 30_000


@dataclass
class Coco30kDMD2(EvaluationSource):
    """COCO-30k as DMD2 (arXiv 2405.14867) and SiD-LSG (2406.01561) measure it.

    One fixed list of 30,000 captions, checked by md5; seed = line index; all of val2014 as reference;
    drawn and real pictures centre-cropped and LANCZOS-resized to 256; clean-fid in its mode "clean".

    Args:
        captions: the list: `captions_coco14_test.txt` of the DMD2 repository.
    """

    needs: ClassVar[str] = (
        "the list of 30,000 captions; give --captions captions_coco14_test.txt (it lies in main/coco_eval/ "
        "of the DMD2 repository)"
    )

    def load(self) -> EvaluationSet:
        """Read the list and check it."""
        path = self.path()
        captions, facts = read_column(path), facts_of(path)
        if facts["md5"] != DMD2_MD5:
            raise UserError(
                f"{path} is not the caption list of coco30k_dmd2: its md5 is {facts['md5']}, not {DMD2_MD5} "
                f"(it has {len(captions):,} captions). Give the published list, or use CaptionFile for "
                "your own"
            )
        return EvaluationSet(
            "coco30k_dmd2", captions, list(range(len(captions))), frame=Frame(256), published_count=30_000,
            published_references=VAL2014, facts=facts,
            notes=(
                "drawn pictures are rounded to 8 bits, DMD2's evaluator cuts them off",
                "a seed for each line, DMD2's evaluator has one for each batch",
            ),
        )  # fmt: skip


@dataclass
class CocoCaptions(CaptionFile):
    """Captions of a COCO annotation file (captions_val2014.json), each with seed + its place.

    Args:
        captions: the annotation file.
        one_per_image: only the first caption of every image.
        sample: this many of them at random; None: all, in the order of the file.
        sample_seed: of the draw.
        seed: of the first picture.
        frame: crop and resize before the metrics.
    """

    needs: ClassVar[str] = "COCO's annotations; give --captions captions_val2014.json"
    column: str | None = "caption"
    one_per_image: bool = False

    def load(self) -> EvaluationSet:
        """Read the annotations."""
        found = super().load()
        found.facts["one_per_image"] = self.one_per_image
        return found

    def _captions(self, path: str) -> list[str]:
        return list(read_texts(path, self.column))

    def _places(self, size: int) -> list[int]:
        if not self.one_per_image:
            return super()._places(size)
        first: dict[int, int] = {}
        for place, entry in enumerate(read_json(Path(self.path()))["annotations"]):
            first.setdefault(entry["image_id"], place)
        return list(first.values())


@dataclass
class Coco30kSwiftBrush(EvaluationSource):
    """COCO-30k as the code that SwiftBrush v2 (arXiv 2408.14176) released measures it.

    The first 30,000 captions of its own list, one for each picture of val2014; all of val2014 as reference;
    drawn and real pictures, in 8 bits, centre-cropped and LANCZOS-resized to 256; clean-fid in its mode
    "clean".

    Args:
        captions: the list: `dataset.json` of the release. Any other file (captions_val2014.json, its
            annotations in the order of the file, or a file of captions) is a deviation, and called so.
        count: captions to take.
        seed: of the first picture.
    """

    needs: ClassVar[str] = "its captions; give --captions dataset.json (of the SwiftBrush v2 repository)"
    count: int = 30_000
    seed: int = 0

    def file_names(self) -> list[str] | None:
        """Those of the annotations; lines of captions have none.

        Nor has dataset.json: the release's `infer.py` does not write the names in it, but in their order.
        """
        if _released_captions(self.path()) is not None:
            return None
        names = read_files(self.path())
        return names and names[: self.count]

    def load(self) -> EvaluationSet:
        """Read the first captions."""
        path = self.path()
        facts, captions = facts_of(path) | {"first": self.count}, _released_captions(path)
        if captions is None:
            captions = list(read_texts(path)) if is_table(path) else read_column(path)
            facts["differs"] = f"captions of {facts['file']} instead of the release's dataset.json"
        if len(captions) < self.count:
            raise UserError(
                f"{path} has {len(captions):,} captions, fewer than the first {self.count:,} that "
                "coco30k_swiftbrush takes; give all of val2014, or set --data.count"
            )
        return EvaluationSet(
            "coco30k_swiftbrush", captions[: self.count], [self.seed + i for i in range(self.count)],
            frame=Frame(256), published_count=30_000, published_references=VAL2014, facts=facts,
            notes=("a seed for each line, the release draws all noise by one generator with the seed 0",),
        )  # fmt: skip


def _released_captions(path: str) -> list[str] | None:
    """The captions of SwiftBrush v2's dataset.json, {"labels": [[file, caption], …]}; None: of another form.

    Raises:
        UserError: its captions are others.
    """
    content = read_json(Path(path)) if kind_of(path) == "json" else None
    if not isinstance(content, dict) or "labels" not in content:
        return None
    try:
        captions = [str.strip(caption) for _, caption in content["labels"]]
    except (TypeError, ValueError):
        captions = []
    if len(captions) != VAL2014 or captions[0] != SWIFTBRUSH_FIRST:
        raise UserError(
            f"{path} is not the dataset.json of SwiftBrush v2, whose `labels` are {VAL2014:,} pairs of a "
            f"file and a caption, the first {SWIFTBRUSH_FIRST!r} (it has {len(captions):,} such pairs): "
            "give the published list"
        )
    return captions


@dataclass
class HPSv2Prompts(EvaluationSource):
    """The prompts of the HPSv2 benchmark (arXiv 2306.09341): 800 for each of four styles.

    Args:
        captions: a folder with anime.json, concept-art.json, paintings.json and photo.json, each a list of
            800 texts.
        seed: of the first picture of each style, so that picture i of every style has the same noise.
    """

    needs: ClassVar[str] = (
        f"the benchmark's prompts; give --captions FOLDER, with {', '.join(HPSV2_STYLES)}, each a .json"
    )
    seed: int = 0

    def load(self) -> EvaluationSet:
        """Read the four files."""
        folder = Path(self.path())
        captions, groups = [], []
        for style in HPSV2_STYLES:
            file = folder / f"{style}.json"
            prompts = read_column(file)
            if len(prompts) != HPSV2_PROMPTS:
                raise UserError(
                    f"{file} holds {len(prompts)} prompts, the benchmark has {HPSV2_PROMPTS} per style: "
                    "fetch it again"
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


@dataclass
class PartiPrompts(EvaluationSource):
    """PartiPrompts (arXiv 2206.10789): a TSV with the columns Prompt, Category and Challenge.

    Args:
        captions: the file.
        category: only prompts of this category; None: all.
        seed: of the first picture.
    """

    needs: ClassVar[str] = "its file; give --captions PartiPrompts.tsv"
    category: str | None = None
    seed: int = 0

    def load(self) -> EvaluationSet:
        """Read the file."""
        path = self.path()
        prompts, groups = read_column(path, "Prompt"), read_column(path, "Category")
        if self.category is not None:
            if self.category not in groups:
                known = ", ".join(sorted(set(groups)))
                raise UserError(f"{path} has no category {self.category!r}; it has {known}")
            prompts = [text for text, group in zip(prompts, groups) if group == self.category]
            groups = [self.category] * len(prompts)
        return EvaluationSet(
            "parti", prompts, [self.seed + i for i in range(len(prompts))], groups=groups,
            facts=facts_of(path) | {"category": self.category},
        )  # fmt: skip


@dataclass
class MJHQ30k(EvaluationSource):
    """MJHQ-30K (Playground v2, 2023): FID of one picture for each of 30,000 prompts, at 1024x1024.

    The reference are its 30,000 pictures (`--reference`), in folders by category.

    Args:
        captions: meta_data.json: ids with `prompt` and `category`.
        seed: of the first picture.
    """

    needs: ClassVar[str] = (
        "its prompts; give --captions meta_data.json (beside mjhq30k_imgs.zip, which is the reference)"
    )
    seed: int = 0

    def load(self) -> EvaluationSet:
        """Read the file; the categories are the groups."""
        path = self.path()
        content = read_json(Path(path))
        try:
            pairs = [(str(entry["prompt"]), str(entry["category"])) for entry in content.values()]
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not MJHQ-30K's meta_data.json, which has a prompt and a category for each id"
            ) from error
        captions, groups = [prompt for prompt, _ in pairs], [category for _, category in pairs]
        return EvaluationSet(
            "mjhq30k", captions, [self.seed + i for i in range(len(captions))], groups=groups,
            frame=Frame(1024), facts=facts_of(path), published_count=MJHQ, published_references=MJHQ,
            notes=("drawn pictures of another size are resized to 1024 by LANCZOS first",),
        )  # fmt: skip


@dataclass
class DPGBench(EvaluationSource):
    """The prompts of DPG-Bench (ELLA, arXiv 2403.05135): 1,065 texts, four pictures of each.

    Its judge (mPLUG) is its own script: `--save-images true --layout dpg_bench` writes what that reads.

    Args:
        captions: the folder `dpg_bench/prompts` of the ELLA repository, a .txt for each prompt.
        images_per_prompt: pictures of each prompt; the script takes 1 or 4.
        seed: of the first picture.
    """

    needs: ClassVar[str] = "its prompts; give --captions dpg_bench/prompts (a folder of the ELLA repository)"
    images_per_prompt: int = 4
    seed: int = 0

    def load(self) -> EvaluationSet:
        """Read the folder, in the order of the names, which its judge knows the prompts by."""
        folder = Path(self.path())
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise UserError(f"{folder} holds no .txt: give DPG-Bench's dpg_bench/prompts")
        prompts = [" ".join(read_column(file)) for file in files]
        digest = hashlib.md5(json.dumps(prompts).encode(), usedforsecurity=False).hexdigest()
        captions = repeated(prompts, self.images_per_prompt)
        return EvaluationSet(
            "dpg_bench", captions, [self.seed + i for i in range(len(captions))],
            facts={"folder": folder.name, "md5_of_prompts": digest}, published_count=4 * 1065,
            told=repeated([{"item": file.stem} for file in files], self.images_per_prompt),
        )  # fmt: skip


@dataclass
class GenEval2(CaptionFile):
    """The prompts of GenEval 2 (arXiv 2512.16853): 800 texts, one picture of each.

    Its judge (Soft-TIFA) is its own script: `--save-images true --layout geneval2` writes what that reads.

    Args:
        captions: `geneval2_data.jsonl` of its repository.
        column: of the prompts. The others as for `CaptionFile`.
    """

    needs: ClassVar[str] = "its prompts; give --captions geneval2_data.jsonl (of the GenEval2 repository)"
    column: str | None = "prompt"
