"""The byte-pair tokenizer in CLIP's format."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from lightning_modules.pretraining.tokenizer import END, START, train_tokenizer

CAPTIONS = [
    "a red apple, noto style, on a blue background",
    "twemoji style, a picture of a jack-o-lantern",
    "t-rex, on a white background",
    "a piñata",
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS * 3, vocabulary_size=700, max_length=24)


@pytest.mark.parametrize("text", [*CAPTIONS, "zebra quartz 42", "Ünïcode ☂ 漢字", "don't! (really?)"])
def test_no_text_is_unknown_and_all_comes_back(text: str, tokenizer: CLIPTokenizer) -> None:
    """Also words, signs and scripts that were not in the training text; lower case, as CLIP's."""
    long = train_tokenizer(CAPTIONS, 700, 77)
    for each in (tokenizer, long):
        ids = each(text).input_ids
        assert each.unk_token_id not in ids[1:-1]
        decoded = each.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_start_end_and_padding(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("a red apple", padding="max_length", truncation=True).input_ids
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (start, end, end)
    assert len(ids) == tokenizer.model_max_length == 24
    assert ids[0] == start and ids[4:] == [end] * 20
    assert start not in ids[1:] and end not in ids[1:4]
    long = tokenizer("apple " * 50, padding="max_length", truncation=True).input_ids
    assert len(long) == 24 and long[0] == start and long[-1] == end


def test_frequent_words_are_single_tokens(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.tokenize("a red background") == ["a</w>", "red</w>", "background</w>"]
    assert len(tokenizer.tokenize("zebra")) > 1


def test_ids_are_dense_and_training_is_deterministic(tokenizer: CLIPTokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert vocabulary == train_tokenizer(CAPTIONS * 3, 700, 24).get_vocab()


def test_another_process_writes_the_same_files(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """Python's hashes, and with them the order of sets, differ from process to process."""
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    code = (  # the file alone, as its package imports far more
        "import runpy, sys; own = runpy.run_path('lightning_modules/pretraining/tokenizer.py'); "
        f"own['train_tokenizer']({CAPTIONS!r} * 3, 700, 24).save_pretrained(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other")], check=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": other},
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "own")
    own, others = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("own", "other")
    )
    assert len(own) >= 2 and own == others


def test_saved_folder_reads_back(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 24
    for text in [*CAPTIONS, "zebra ☂"]:
        assert again(text).input_ids == tokenizer(text).input_ids
