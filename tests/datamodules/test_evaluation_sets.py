"""Evaluation sets: the right captions with the right seeds, and clear words about every wrong file."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from common.errors import UserError
from datamodules import published_sets
from datamodules.evaluation_sets import CaptionFile, EvaluationSet, PromptPairs
from datamodules.picture_files import Frame
from datamodules.prompts import PromptDataModule
from datamodules.published_sets import (
    HPSV2_STYLES,
    Coco30kDMD2,
    Coco30kSwiftBrush,
    CocoCaptions,
    DPGBench,
    GenEval2,
    HPSv2Prompts,
    MJHQ30k,
    PartiPrompts,
)
from datamodules.tables import read_column

ROWS = [{"id": 7, "prompt": f'a "red" cat, number {i}', "negative_prompt": f"blur {i}"} for i in range(4)]
PROMPTS = [row["prompt"] for row in ROWS]
NEGATIVES = [row["negative_prompt"] for row in ROWS]


def write(path: Path) -> Path:
    """The four rows in the format that the suffix names."""
    if path.suffix == ".txt":
        path.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".tsv":
        lines = ["\t".join(ROWS[0]), *("\t".join(map(str, row.values())) for row in ROWS)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_captions_come_from_any_file(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"mine{suffix}")
    found = CaptionFile(str(path), seed=5).load()
    assert found.captions == PROMPTS and found.seeds == [5, 6, 7, 8] and found.name == "mine"
    assert found.facts["md5"] == hashlib.md5(path.read_bytes()).hexdigest()
    assert found.frame is None and found.negatives is None


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_pairs_keep_prompt_and_negative_together(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"pairs{suffix}")
    pairs = PromptPairs(str(path)).load()
    assert pairs.captions == PROMPTS and pairs.negatives == NEGATIVES
    drawn = PromptPairs(str(path), sample=3, sample_seed=1).load()
    assert drawn.negatives == [NEGATIVES[PROMPTS.index(text)] for text in drawn.captions]


def test_a_table_names_the_files_of_existing_pictures(tmp_path: Path) -> None:
    path = tmp_path / "generation.json"
    entries = [{"prompt": f"prompt {i}", "file": f"{9 - i}.png"} for i in range(5)]
    path.write_text(json.dumps(entries))
    assert CaptionFile(str(path)).file_names() == ["9.png", "8.png", "7.png", "6.png", "5.png"]
    drawn = CaptionFile(str(path), sample=3)
    assert drawn.file_names() == [f"{9 - int(text[-1])}.png" for text in drawn.load().captions]
    assert CaptionFile(str(write(tmp_path / "a.txt"))).file_names() is None
    with pytest.raises(UserError, match="no column 'file'; it has 'id', 'prompt'"):
        CaptionFile(str(write(tmp_path / "a.csv"))).file_names()


def test_a_random_sample_is_a_function_of_its_seed(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"caption {i}" for i in range(100)))

    def drawn(seed: int) -> list[str]:
        return CaptionFile(str(path), sample=20, sample_seed=seed).load().captions

    assert drawn(0) == drawn(0) != drawn(1) and len(set(drawn(0))) == 20
    assert drawn(0) != sorted(drawn(0))
    assert CaptionFile(str(path), sample=20).load().name == "many, 20 at random"


def coco(path: Path, count: int = 6) -> Path:
    entries = [{"image_id": i // 2, "id": i, "caption": f"caption {i} \n"} for i in range(count)]
    path.write_text(json.dumps({"images": [], "annotations": entries}))
    return path


def test_coco_annotations_in_their_order(tmp_path: Path) -> None:
    path = str(coco(tmp_path / "captions_val2014.json"))
    assert CocoCaptions(path).load().captions == [f"caption {i}" for i in range(6)]
    assert CocoCaptions(path, one_per_image=True).load().captions == ["caption 0", "caption 2", "caption 4"]
    assert len(CocoCaptions(path, sample=4).load()) == 4


def released(path: Path, captions: list[Any]) -> str:
    """The captions in the form of SwiftBrush v2's dataset.json."""
    labels = [[f"00000/img{i:08d}.png", caption] for i, caption in enumerate(captions)]
    path.write_text(json.dumps({"labels": labels}) + "\n")
    return str(path)


def test_swiftbrush_takes_the_first_captions_of_the_release(tmp_path: Path) -> None:
    captions = [f"{published_sets.SWIFTBRUSH_FIRST} ", *(f"caption {i} \n" for i in range(1, 40_504))]
    found = Coco30kSwiftBrush(path := released(tmp_path / "dataset.json", captions)).load()
    assert found.captions == [text.strip() for text in captions[:30_000]]
    assert found.seeds == list(range(30_000)) and found.frame == Frame(256)
    assert (found.published_count, found.published_references) == (30_000, 40_504)
    assert "differs" not in found.facts and Coco30kSwiftBrush(path).file_names() is None
    assert Coco30kSwiftBrush(path, count=4, seed=7).load().seeds == [7, 8, 9, 10]
    said = "not the dataset.json of SwiftBrush v2, whose `labels` are 40,504 pairs"
    for wrong in (captions[:30_000], captions[1:] + captions[:1], [*captions[:-1], 3], [], [*captions, "x"]):
        with pytest.raises(UserError, match=said):
            Coco30kSwiftBrush(released(tmp_path / "dataset.json", wrong)).load()
    for labels in (None, 3, [["a"]], {"a": "b"}):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(UserError, match=rf"{said} .*\(it has 0 such pairs\)"):
            Coco30kSwiftBrush(path).load()
    with pytest.raises(UserError, match="give --captions dataset.json"):
        Coco30kSwiftBrush().load()


@pytest.mark.parametrize("name", ["captions_val2014.json", "mine.txt", "mine.jsonl"])
def test_other_captions_of_swiftbrush_are_a_deviation(name: str, tmp_path: Path) -> None:
    path = coco(tmp_path / name)
    if name.startswith("mine"):
        path.write_text("\n".join(json.dumps(f"caption {i}").strip('"' * (".txt" in name)) for i in range(6)))
    found = Coco30kSwiftBrush(str(path), count=4).load()
    assert found.captions == [f"caption {i}" for i in range(4)] and found.seeds == [0, 1, 2, 3]
    assert found.frame == Frame(256) and found.published_count == 30_000
    assert found.facts["differs"] == f"captions of {name} instead of the release's dataset.json"
    with pytest.raises(UserError, match="6 captions, fewer than the first 30,000"):
        Coco30kSwiftBrush(str(path)).load()


def test_dmd2_knows_its_list_by_md5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("a cat\na dog\na cat\n")  # duplicates are part of the real list, too
    with pytest.raises(UserError, match="not the caption list of coco30k_dmd2: its md5 is .*3 captions"):
        Coco30kDMD2(str(path)).load()
    monkeypatch.setattr(published_sets, "DMD2_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    found = Coco30kDMD2(str(path)).load()
    assert found.captions == ["a cat", "a dog", "a cat"] and found.seeds == [0, 1, 2]
    assert found.frame == Frame(256, crop=True)
    with pytest.raises(UserError, match="give --captions captions_coco14_test.txt"):
        Coco30kDMD2().load()


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    for style in HPSV2_STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(800)]))
    return tmp_path


def test_hpsv2_has_four_styles_of_800(benchmark: Path) -> None:
    found = HPSv2Prompts(str(benchmark)).load()
    assert len(found) == 3200 and found.groups is not None
    assert found.captions[800] == "concept-art 0" and found.groups[800] == "concept-art"
    assert found.seeds[799] == 799 and found.seeds[800] == 0
    small = found.first(8)
    assert small.captions == [f"{style} {i}" for style in HPSV2_STYLES for i in range(2)]
    assert small.seeds == [0, 1] * 4 and small.groups is not None and small.groups[2] == "concept-art"
    with pytest.raises(UserError, match="a multiple of 4 .its groups: anime"):
        found.first(10)


def test_a_run_takes_as_many_of_each_group(benchmark: Path) -> None:
    def module(size: int | None) -> PromptDataModule:
        return PromptDataModule(["a"], 1, eval_set=HPSv2Prompts(str(benchmark)), eval_set_size=size)

    data = module(8)
    drawn = [f"{style} {i}" for style in HPSV2_STYLES for i in range(2)]
    assert data.eval_prompts == data.val_prompts == drawn and len(data.eval_captions) == 3200
    assert next(iter(data.val_dataloader()))["prompts"] == drawn
    assert next(iter(data.test_dataloader()))["prompts"] == [f"anime {i}" for i in range(64)]
    assert data.describe()["Evaluation captions"] == (
        "3,200, hpsv2; validations: equally many of each group, 8"
    )
    assert data.val_set is not None and data.val_set.captions == drawn
    assert data.val_set.groups == [style for style in HPSV2_STYLES for _ in range(2)]
    assert module(None).val_prompts == data.eval_captions
    assert "validations: the first 3,200" in module(None).describe()["Evaluation captions"]
    others = PromptDataModule(
        ["a"], 1, eval_set=HPSv2Prompts(str(benchmark)), eval_set_size=8, val_captions=["b"]
    )
    assert others.val_set is None and (others.eval_prompts, others.val_prompts) == (drawn, ["b"])
    with pytest.raises(UserError, match="data.eval_set_size is 10, but hpsv2 .* a multiple of 4"):
        module(10)
    with pytest.raises(UserError, match="data.eval_set_size is 5000 .* 3200 captions; .* to null for all"):
        module(5000)


def test_hpsv2_names_what_is_wrong(benchmark: Path) -> None:
    (benchmark / "photo.json").write_text(json.dumps(["one"]))
    with pytest.raises(UserError, match=r"photo.json holds 1 prompts, the benchmark has 800"):
        HPSv2Prompts(str(benchmark)).load()
    (benchmark / "photo.json").unlink()
    with pytest.raises(UserError, match=r"photo.json does not exist"):
        HPSv2Prompts(str(benchmark)).load()


def test_parti_prompts(tmp_path: Path) -> None:
    path = tmp_path / "parti.tsv"
    path.write_text('Prompt\tCategory\tChallenge\n"hi" she said\tArts\tBasic\na dog\tAnimals\tBasic\n')
    found = PartiPrompts(str(path)).load()
    assert found.captions == ['"hi" she said', "a dog"] and found.groups == ["Arts", "Animals"]
    assert PartiPrompts(str(path), category="Animals").load().captions == ["a dog"]
    with pytest.raises(UserError, match="no category 'Cars'; it has Animals, Arts"):
        PartiPrompts(str(path), category="Cars").load()


def test_mjhq30k_has_categories_and_its_own_size(tmp_path: Path) -> None:
    entries = {f"id{i}": {"category": "ab"[i % 2], "prompt": f"prompt {i}"} for i in range(4)}
    (tmp_path / "meta_data.json").write_text(json.dumps(entries))
    found = MJHQ30k(str(tmp_path / "meta_data.json"), seed=3).load()
    assert found.captions == [f"prompt {i}" for i in range(4)] and found.groups == ["a", "b", "a", "b"]
    assert (found.seeds, found.frame, found.published_references) == ([3, 4, 5, 6], Frame(1024), 30_000)
    assert found.first(2).captions == ["prompt 0", "prompt 1"]
    (tmp_path / "meta_data.json").write_text('["a"]')
    with pytest.raises(UserError, match="is not MJHQ-30K's meta_data.json"):
        MJHQ30k(str(tmp_path / "meta_data.json")).load()


def test_prompts_of_other_judges(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: a long\nprompt\n")
    found = DPGBench(str(tmp_path)).load()
    assert found.captions == ["a: a long prompt"] * 4 + ["b: a long prompt"] * 4
    assert found.told is not None and found.told[4] == {"item": "b"} and found.images_per_prompt == 4
    with pytest.raises(UserError, match="holds no .txt"):
        DPGBench(str(tmp_path / "nothing")).load()
    (tmp_path / "data.jsonl").write_text('{"prompt": "four cows", "atom_count": 2}\n')
    assert GenEval2(str(tmp_path / "data.jsonl")).load().captions == ["four cows"]


def test_few_sample_variants() -> None:
    whole = EvaluationSet("x", ["a", "b", "c"], [4, 5, 6], negatives=["n", "o", "p"])
    part = whole.first(2)
    assert part.captions == ["a", "b"] and part.seeds == [4, 5] and part.negatives == ["n", "o"]
    assert part.facts == {"first_of": 3} and whole.first(None) is whole is whole.first(3)
    with pytest.raises(UserError, match="choose 1 to 3"):
        whole.first(4)
    uneven = EvaluationSet("x", list("abcde"), list(range(5)), groups=["u", "u", "v", "u", "u"])
    assert uneven.first(2).captions == ["a", "c"]
    with pytest.raises(UserError, match="choose 2 to 2, a multiple of 2"):
        uneven.first(4)
    with pytest.raises(UserError, match="a multiple of 2"):
        uneven.first(3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,title\n1,x\n", "has the columns 'id', 'title'"),
        ("a.csv", "id,caption\n1,x\n2, \n", "row 2 has no text"),
        ("a.csv", "caption\n", "is empty"),
        ("a.jsonl", '{"caption": "x"}\n{"caption": \n', "row 2 can't be read"),
        ("a.json", '{"images": [], "info": 1}', "holds the keys 'images', 'info'; a list of texts"),
        ("a.json", '["x", 3]', "row 2 holds a int where a text is needed"),
        (
            "a.json",
            '[{"caption": "x"}, {"id": 1, "title": "y"}]',
            "row 2 has no column 'caption'",
        ),
        ("a.json", "[1", "can't be read as JSON"),
        ("a.parquet", "no parquet", "row 1 can't be read"),
        ("a.txt", "\n \n", "is empty"),
    ],
)
def test_a_wrong_file_is_described(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        CaptionFile(str(tmp_path / name)).load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [], "info": 1}, "holds the keys 'images', 'info'; .* or COCO's list 'annotations'"),
        ([1], "row 1 holds a int where a text is needed"),
        (
            {"annotations": [{"image_id": 1, "bbox": []}]},
            "row 1 has no column 'caption'; it has 'image_id', 'bbox'",
        ),
    ],
)
def test_other_annotations_are_described(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "instances_val2014.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        CocoCaptions(str(path)).load()


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_column(tmp_path / "none.csv")
    with pytest.raises(UserError, match="does not exist"):
        CocoCaptions(str(tmp_path / "none.json")).load()
    path = write(tmp_path / "pairs.csv")
    with pytest.raises(UserError, match="no column 'bad'; it has 'id', 'prompt', 'negative_prompt'"):
        PromptPairs(str(path), negative_column="bad").load()
    with pytest.raises(UserError, match="is a text file"):
        PromptPairs(str(write(tmp_path / "pairs.txt"))).load()
    with pytest.raises(UserError, match="sample is 9, but .* has 4 captions"):
        CaptionFile(str(path), sample=9).load()


def test_coco_pairs_pictures_by_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    annotations = [{"image_id": i, "caption": f"{i}"} for i in (2, 1, 2, 3)]
    images = [{"id": i, "file_name": f"{i}.png"} for i in (1, 2, 3)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    for found in (CocoCaptions(str(path), one_per_image=True), CocoCaptions(str(path), sample=3),
                  Coco30kSwiftBrush(str(path), count=3)):  # fmt: skip
        assert found.file_names() == [f"{caption}.png" for caption in found.load().captions]
