"""Caches of text embeddings: what was written is what is read, whatever happens in between."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor

import lightning_modules.networks.prompt_cache.cache as prompt_cache
from common.errors import UserError
from lightning_modules.networks.prompt_cache.cache import (
    MASK,
    TOKENS,
    Layout,
    PromptCache,
    cache_writer,
    text_keys,
)

TEXTS = [f"prompt {number}" for number in range(20)]
ENCODER = {"model": "some/model", "hash": "a" * 64}


def plain(texts: list[str]) -> dict[str, Tensor]:
    """Embeddings that depend on the text alone: hidden states [n, 4, 3] and pooled ones [n, 2]."""
    generators = [torch.Generator().manual_seed(sum(text.encode()) * 1000 + len(text)) for text in texts]
    return {
        TOKENS: torch.stack([torch.randn(4, 3, generator=generator) for generator in generators]),
        "text_embeds": torch.stack([torch.randn(2, generator=generator) for generator in generators]),
    }


def masked(texts: list[str]) -> dict[str, Tensor]:
    """Hidden states [n, 4, 3] and a mask [n, 4] of 0 to 4 tokens at either end."""
    tokens = torch.arange(4).expand(len(texts), 4)
    lengths = torch.tensor([sum(text.encode()) % 5 for text in texts])[:, None]
    at_end = torch.tensor([len(text) % 2 == 0 for text in texts])[:, None]
    return {
        TOKENS: plain(texts)[TOKENS],
        MASK: torch.where(at_end, tokens >= 4 - lengths, tokens < lengths).long(),
    }


def write(folder: Path, texts: list[str], encode: Any = plain, dtype: torch.dtype = torch.float32,
          shard_bytes: int = 200, encoder: dict[str, Any] = ENCODER) -> list[str]:  # fmt: skip
    """Encode what is missing in batches of three, a shard every few of them; return what was encoded."""
    keys, encoded = text_keys(texts), list[str]()
    with cache_writer(folder, encoder, Layout.of(encode(texts[:1]), dtype), shard_bytes) as writer:
        todo = writer.missing(keys)
        for start in range(0, len(todo), 3):
            rows = todo[start : start + 3]
            encoded += (chosen := [texts[row] for row in rows])
            writer.add(keys[rows], encode(chosen))
    return encoded


def read(folder: Path, texts: list[str]) -> dict[str, Tensor]:
    cache = PromptCache(folder)
    rows = cache.find(text_keys(texts))
    assert (rows >= 0).all()
    return cache.take(rows)


def assert_same(taken: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert taken.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(taken[name], wanted[name]), name


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


def test_each_text_comes_back_in_any_order_and_repeats_are_kept_once(tmp_path: Path) -> None:
    encoded = write(tmp_path, [*TEXTS, *TEXTS[::2]])
    assert encoded == TEXTS
    assert len(shards(tmp_path)) > 3
    asked = [TEXTS[13], TEXTS[0], TEXTS[19], TEXTS[13]]
    assert_same(read(tmp_path, asked), plain(asked))
    cache = PromptCache(tmp_path)
    assert len(cache) == len(TEXTS)
    assert cache.find(text_keys(["another", TEXTS[0], ""])).tolist()[::2] == [-1, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path, TEXTS, dtype=dtype)
    assert_same(read(tmp_path, TEXTS), {name: x.to(dtype) for name, x in plain(TEXTS).items()})


def test_of_masked_tokens_nothing_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "masked", TEXTS, masked)
    wanted = masked(TEXTS)
    assert 0 in wanted[MASK].sum(1) and 4 in wanted[MASK].sum(1)
    wanted[TOKENS] = wanted[TOKENS] * wanted[MASK][..., None]
    assert_same(read(tmp_path / "masked", TEXTS), wanted)
    cache = PromptCache(tmp_path / "masked")
    kept = sum(len(tokens.as_buffer()) for tokens in cache.table[TOKENS]) // (3 * 4)
    assert kept == int(wanted[MASK].sum()) < wanted[MASK].numel()
    mean = kept / len(TEXTS)
    assert cache.layout.bytes_per_text(mean) * len(TEXTS) == pytest.approx(cache.table.nbytes)


def test_the_size_without_a_mask_is_exact(tmp_path: Path) -> None:
    write(tmp_path, TEXTS, dtype=torch.float16, shard_bytes=10**6)
    size = Layout.of(plain(TEXTS), torch.float16).bytes_per_text()
    assert size == 2 * (4 * 3 + 2) + 16 + 8
    (shard,) = shards(tmp_path)
    assert 0 <= shard.stat().st_size - size * len(TEXTS) < 2500  # the file's table of contents


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_cache_goes_on_and_nothing_is_lost(tmp_path: Path, error: type[BaseException]) -> None:
    done: list[str] = []

    def interrupted(texts: list[str]) -> dict[str, Tensor]:
        if len(done) >= 9 and len(texts) > 1:
            raise error
        done.extend(texts if len(texts) > 1 else [])
        return plain(texts)

    with pytest.raises(error):
        write(tmp_path, TEXTS, interrupted, shard_bytes=10**6)
    assert_same(read(tmp_path, done), plain(done))
    assert write(tmp_path, TEXTS) == TEXTS[len(done) :]
    assert_same(read(tmp_path, TEXTS), plain(TEXTS))
    assert write(tmp_path, TEXTS) == []


def test_a_process_killed_while_it_writes_leaves_only_whole_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def killed(partial: Path, path: Path) -> None:
        if path.name.startswith("shard-00001"):
            partial.write_bytes(partial.read_bytes()[:50])
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process tidies nothing
            raise MemoryError
        replace(partial, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(MemoryError):
            write(tmp_path, TEXTS)
    monkeypatch.undo()
    assert [path.name for path in shards(tmp_path)] == ["shard-00000.arrow"]
    assert list(tmp_path.glob(".*.partial"))
    kept = len(PromptCache(tmp_path))
    assert write(tmp_path, TEXTS) == TEXTS[kept:]
    assert not list(tmp_path.glob(".*.partial"))
    assert_same(read(tmp_path, TEXTS), plain(TEXTS))


def test_a_full_disk_is_told_and_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(partial: Path, path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device; make room"):
            write(tmp_path, TEXTS)
    assert shards(tmp_path) == []
    assert write(tmp_path, TEXTS) == TEXTS


def test_the_space_is_checked(tmp_path: Path) -> None:
    with cache_writer(tmp_path, ENCODER, Layout.of(plain(TEXTS), torch.float16)) as writer:
        assert writer.check_space(3 * 2**20).startswith("3.0 MiB of ")
        with pytest.raises(UserError, match=r"takes 1024\.0 TiB of .* free in .*; make room"):
            writer.check_space(2**50)


def test_another_encoder_type_or_shape_is_refused(tmp_path: Path) -> None:
    write(tmp_path, TEXTS)
    other = {"model": "other/model", "hash": "b" * 64}
    with pytest.raises(UserError, match=r"made with .* some/model \(aaaa.*that of other/model \(bbbb"):
        write(tmp_path, TEXTS, encoder=other)
    with pytest.raises(UserError, match=r"keeps .* float32.*wanted .* float16.*same --dtype"):
        write(tmp_path, TEXTS, dtype=torch.float16)
    with pytest.raises(UserError, match="another --output"):
        write(tmp_path, TEXTS, masked)
    moved = {"model": "elsewhere", "hash": "a" * 64}
    assert write(tmp_path, [*TEXTS, "one more"], encoder=moved) == ["one more"]


def test_values_out_of_range_are_refused_and_the_others_are_kept(tmp_path: Path) -> None:
    def large(texts: list[str]) -> dict[str, Tensor]:
        return {name: x * (1e6 if TEXTS[7] in texts else 1) for name, x in plain(texts).items()}

    with pytest.raises(UserError, match=r"not finite in float16, whose largest number is 6\.55e\+04.*dtype"):
        write(tmp_path, TEXTS, large, torch.float16)
    assert len(PromptCache(tmp_path)) == 6


@pytest.mark.parametrize("encode", [plain, masked])
def test_a_changed_byte_anywhere_is_noticed_or_harmless(tmp_path: Path, encode: Any) -> None:
    write(tmp_path, TEXTS[:4], encode, shard_bytes=10**6)
    (shard,) = shards(tmp_path)
    whole = shard.read_bytes()
    wanted = read(tmp_path, TEXTS[:4])
    columns = [column.chunk(0) for column in PromptCache(tmp_path).table.columns]
    buffers = [buffer.to_pybytes() for column in columns for buffer in column.buffers() if buffer is not None]
    data = {whole.index(buffer) + place for buffer in buffers for place in range(len(buffer))}
    outcomes, elsewhere = Counter[str](), Counter[str]()
    for place in range(0, len(whole), 7):
        seen = outcomes if place in data else elsewhere
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            cache = PromptCache(tmp_path)
            rows = cache.find(text_keys(TEXTS[:4]))
            if not (rows >= 0).all():
                seen["another text"] += 1
                continue
            assert_same(cache.take(rows), wanted)  # where an empty text begins does not matter
            seen["harmless"] += 1
        except UserError as error:
            assert "shard-00000.arrow is damaged" in str(error) and "delete this file" in str(error)
            seen["told"] += 1
    assert elsewhere["told"] > 20  # the rest is padding, and what is written twice
    assert outcomes["told"] > 0.7 * outcomes.total() and outcomes["harmless"] <= 3


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "other"])
def test_a_damaged_file_is_named_and_made_again_once_deleted(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "cache"
    write(folder, TEXTS)
    write(tmp_path / "other", TEXTS[:3], masked)
    shard, other = shards(folder)[1], shards(tmp_path / "other")[0].read_bytes()
    whole = shard.read_bytes()
    changed = {"cut": whole[:-5], "header": whole[:-20] + b"?" + whole[-19:], "empty": b"", "other": other}
    shard.write_bytes(changed[damage])
    with pytest.raises(UserError, match=r"shard-00001.arrow is damaged .*delete this file"):
        PromptCache(folder)
    with pytest.raises(UserError, match="is damaged"):
        write(folder, TEXTS)
    shard.unlink()
    again = write(folder, TEXTS)
    assert 0 < len(again) < len(TEXTS)
    assert_same(read(folder, TEXTS), plain(TEXTS))


def test_caches_of_other_versions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    former = tmp_path / "former"
    former.mkdir()
    (former / "cache.json").write_text(json.dumps({"format": 1}))
    (former / "shard-00000.safetensors").touch()
    monkeypatch.setattr(prompt_cache, "FORMAT", 3)
    write(tmp_path / "later", TEXTS)
    monkeypatch.undo()
    for folder in (former, tmp_path / "later"):
        for use in (PromptCache, lambda folder: write(folder, TEXTS)):
            with pytest.raises(UserError, match=f"{folder} was written by another version; delete it"):
                use(folder)


def test_other_folders_are_no_caches_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no cache of prompts .*encode-prompts"):
        PromptCache(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        write(tmp_path, TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_write_at_a_time(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another process is writing"):
        write(tmp_path, TEXTS)
    assert write(tmp_path, TEXTS) == TEXTS


def test_reading_maps_the_files(tmp_path: Path) -> None:
    """Opening takes no memory for the embeddings: they lie in the mapped file."""
    write(tmp_path, TEXTS, shard_bytes=10**6)
    data = PromptCache(tmp_path).table[TOKENS].chunks[0].buffers()[-1]
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split() for line in maps if "shard-00000" in line]
    borders = [[int(end, 16) for end in span[0].split("-")] for span in spans]
    assert any(begin <= data.address < end for begin, end in borders)


def test_hashes_are_of_the_text_alone() -> None:
    keys = text_keys(["a", "b", "a", "", "\u00e9"])
    assert len(np.unique(keys)) == 4 and keys[0] == keys[2]
    assert text_keys(["a"]).tobytes().hex() == "27c35e6e9373877f29e562464e46497e"
