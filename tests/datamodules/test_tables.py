"""Every kind of file gives the same texts; damaged ones give one message that says where."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from datamodules.tables import describe, is_table, read_files, read_texts

zstd = partial(pa.compress, codec="zstd", asbytes=True)
TEXTS = ["a café, at night", "", "日本の山", 'the words "Fly away"', "a ship"]


def write_txt(path: Path) -> None:
    path.write_bytes(("\ufeff" + "\r\n".join(f"  {text}" for text in TEXTS)).encode())


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "Caption"], *enumerate(TEXTS)])


def write_tsv(path: Path) -> None:
    path.write_text("Caption\tNote\n" + "".join(f"{text}\t\n" for text in TEXTS), encoding="utf-8")


def write_jsonl(path: Path) -> None:
    rows = [{"id": i, "caption": text or None} for i, text in enumerate(TEXTS)]
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def write_parquet(path: Path) -> None:
    table = pa.table({"id": range(5), "caption": [text or None for text in TEXTS]})
    pq.write_table(table, path, row_group_size=2)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".txt": write_txt, ".csv": write_csv, ".tsv": write_tsv, ".jsonl": write_jsonl, ".parquet": write_parquet,
}  # fmt: skip


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_gives_the_same_texts(suffix: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    WRITERS[suffix](path)
    if compression:
        pack = gzip.compress if compression == ".gz" else zstd
        path = tmp_path / f"file{suffix}{compression}"
        path.write_bytes(pack((tmp_path / f"file{suffix}").read_bytes()))
    assert list(read_texts(path)) == TEXTS


def test_dataset_folders(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"id": list(range(5)), "text": TEXTS})
    data.save_to_disk(tmp_path / "data")
    assert list(read_texts(tmp_path / "data")) == TEXTS
    data.select([4, 0]).save_to_disk(tmp_path / "some")
    assert list(read_texts(tmp_path / "some", "text")) == [TEXTS[4], TEXTS[0]]
    with pytest.raises(UserError, match="no column 'caption'; it has 'id', 'text'"):
        list(read_texts(tmp_path / "data", "caption"))
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="several splits.*splits/train"):
        list(read_texts(tmp_path / "splits"))
    with pytest.raises(UserError, match="neither a `Dataset` directory nor"):
        list(read_texts(tmp_path))
    arrow = next((tmp_path / "data").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:300])
    with pytest.raises(UserError, match="row 1 can't be read"):
        list(read_texts(tmp_path / "data"))


def test_columns_are_chosen_by_name_or_when_it_is_clear(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text("prompt,Text\na,b\n")
    assert list(read_texts(path, "Text")) == ["b"]
    with pytest.raises(UserError, match=r"file\.csv has the columns 'prompt', 'Text'; name the one"):
        list(read_texts(path))
    with pytest.raises(UserError, match=r"no column 'text'; it has 'prompt', 'Text'"):
        list(read_texts(path, "text"))
    path.write_text("words\na\n")
    assert list(read_texts(path)) == ["a"]


BAD = {
    "encoding.txt": (b"good\nbad \xff\n", "row 2 can't be read .*0xff"),
    "encoding.csv": (b"prompt\ngood\nbad \xe9\n", "row 2 can't be read .*0xe9"),
    "fields.csv": (b"id,prompt,style\n1,a,b\n2,a sh", "row 2 can't be read .it has 2 fields, the header 3"),
    "quote.csv": (b'id,prompt\n1,"a ship"\n2,"a sh', "row 2 can't be read .*cut off"),
    "fields.tsv": (b"prompt\tnote\na\tb\na sh", "row 2 can't be read .it has 1 fields, the header 2"),
    "cut.jsonl": (b'{"prompt": "a"}\n\n{"prompt": "b', "row 2 can't be read .*cut off"),
    "list.jsonl": (b'["a"]\n', "row 1 holds a list where a text is needed"),
    "key.jsonl": (b'{"prompt": "a"}\n{"caption": "b"}\n', "row 2 has no column 'prompt'; it has 'caption'"),
    "number.jsonl": (b'{"prompt": 3}\n', "row 1 holds a int"),
    "half.jsonl": (
        b'{"prompt": "\\ud83d\\ude00"}\n{"prompt": "a \\ud83d"}\n',
        "row 2 can't be read .*surrogates",
    ),
    "one.json": (b"{}", "a list of texts or objects is needed"),
    "cut.txt.gz": (gzip.compress(b"a ship\n" * 99)[:-12], "can't be read .*cut off"),
    "no.csv.gz": (b"prompt\na\n", "row 1 can't be read"),
    "cut.txt.zst": (zstd(b"a ship\n" * 99)[:-4], "can't be read .*cut off"),
    "no.jsonl.zst": (b"prompt", "row 1 can't be read"),
    "cut.parquet": (b"PAR1\x15\x04", "row 1 can't be read"),
    "cut.parquet.gz": (gzip.compress(b"PAR1" * 9)[:-9], "row 1 can't be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_one_message_with_the_place(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_texts(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_wrong_bytes_and_types_in_parquet_are_found_by_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"bad \xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": texts, "id": [1, 2]}), tmp_path / "file.parquet")
    with pytest.raises(UserError, match="row 2 can't be read .*0xff"):
        list(read_texts(tmp_path / "file.parquet", "prompt"))
    with pytest.raises(UserError, match="row 1 holds a int"):
        list(read_texts(tmp_path / "file.parquet", "id"))


def test_reading_holds_one_block_at_a_time(tmp_path: Path) -> None:
    line = "a ship at sea " * 5 + "at night"
    (tmp_path / "file.txt").write_text(f"{line}\n" * 100_000)  # 7.9 MB
    tracemalloc.start()
    texts = read_texts(tmp_path / "file.txt")
    assert next(texts) == line
    assert sum(1 for _ in texts) == 99_999
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# --- what a file is, where its name doesn't say it ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("semicolons.csv", b'id;caption\n1;"a ship; two"\n', ["a ship; two"]),
        ("tabs.csv", b'id\tcaption\n1\t"a ship"\n', ["a ship"]),
        ("bars.csv", b"id|caption\n1|a ship, two\n", ["a ship, two"]),
        ("one_column.csv", b"words\na ship\n", ["a ship"]),
        ("table.data", b'id\tCaption\r\n1\t"a ship"\r\n', ['"a ship"']),
        ("objects", b'{"text": "a ship"}\n{"text": "a tree"}\n', ["a ship", "a tree"]),
        ("list.json", b'["a ship", {"text": "a tree"}]', ["a ship", "a tree"]),
        ("lines", b"{a ship}\na tree; text\n", ["{a ship}", "a tree; text"]),
        ("tabs.txt", b"a text\ttwo\n", ["a text\ttwo"]),
    ],
)
def test_a_table_is_known_by_its_content(name: str, content: bytes, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_texts(tmp_path / name)) == texts
    assert is_table(tmp_path / name) == (not name.startswith("lines") and not name.endswith(".txt"))


def test_a_parquet_file_is_known_without_its_suffix(tmp_path: Path) -> None:
    write_parquet(tmp_path / "shard-0")
    assert list(read_texts(tmp_path / "shard-0")) == TEXTS


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "id;prompt\n1;a, ship\n"), ("a.csv", "id\tprompt\n1\ta, ship\n"),
     ("a.csv", "id|prompt\n1|a, ship\n"), ("a.tsv", 'id,prompt\n1,"a, ship"\n'),
     ("a.tsv", "id;prompt\n1;a, ship\n"), ("a.tsv", "id\tprompt\n1\ta, ship\n"),
     ("a.csv", '"id, or none";prompt\n1;a, ship\n'), ("a", "id;prompt\n1;a, ship\n"),
     ("a.json", '{"prompt": "a, ship"}\n{"prompt": "a, ship"}\n')],
)  # fmt: skip
def test_the_separator_is_that_of_the_first_line(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert set(read_texts(tmp_path / name)) == {"a, ship"}
    assert "prompt" in describe(tmp_path / name)


def test_whole_rows_are_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("id;prompt\n1;a ship\n")
    with pytest.raises(UserError, match="looks like names of columns, separated by ';'"):
        list(read_texts(tmp_path / "a.txt"))
    (tmp_path / "b.csv").write_text("id;name\n1;a ship\n")
    with pytest.raises(UserError, match=r"\(separated by ';'\) has the columns 'id', 'name'"):
        list(read_texts(tmp_path / "b.csv"))
    (tmp_path / "c.txt").write_text("a cat, a text, red\na ship\n")
    assert len(list(read_texts(tmp_path / "c.txt"))) == 2


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.csv", "a.jsonl.gz"])
def test_lines_have_a_limit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {
        ".txt": b"x" * 2000,
        ".csv": b'prompt\n"' + b"x\n" * 1000 + b'"\n',
        ".jso": b'["' + b"x" * 2000 + b'"]',
    }
    data = content[name[1:5]]
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    monkeypatch.setenv("ONE_STEP_LONGEST_LINE", "1000")
    with pytest.raises(UserError, match="longer than 1,000 bytes|field limit"):
        list(read_texts(tmp_path / name))
    monkeypatch.setenv("ONE_STEP_LONGEST_LINE", "many")
    with pytest.raises(UserError, match="ONE_STEP_LONGEST_LINE is 'many'"):
        list(read_texts(tmp_path / name))


def test_captions_name_their_pictures(tmp_path: Path) -> None:
    """COCO's by the pictures' ids, several captions a picture, in no order; tables by a column."""
    coco = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((3, "x"), (7, "y"), (3, "z"))],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco))
    assert read_files(path) == ["a.png", "b.png", "a.png"]
    for missing in ({"annotations": coco["annotations"]}, {**coco, "images": coco["images"][:1]}):
        path.write_text(json.dumps(missing))
        with pytest.raises(UserError, match="does not say which picture a caption belongs to"):
            read_files(path)
    for name, text in {
        "t.csv": "file_name;caption\n1.png;a\n",
        "t.jsonl": '{"image": "1.png", "caption": "a"}',
    }.items():
        (tmp_path / name).write_text(text)
        assert read_files(tmp_path / name) == ["1.png"]
    (tmp_path / "t.csv").write_text("caption\na\n")
    assert read_files(tmp_path / "t.csv") is None
