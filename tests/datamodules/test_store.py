"""Stores of prompts: the same texts as in memory, made once, complete or not at all."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.trainer.states import TrainerFn

from common.errors import UserError
from common.files import user_cache_dir
from datamodules import sources
from datamodules.order import Texts
from datamodules.prompts import PromptDataModule
from datamodules.sources import Cleaning, PromptPools, PromptSource, SeenTexts, open_store

PROMPTS = [f"prompt {number}" for number in range(1000)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and stores for sources of any size."""
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def opened(path: Path, cleaning: Cleaning | None = None) -> Path:
    """The file of the store of a source."""
    return open_store([(path, None)], cleaning or Cleaning())[2]


def stored(path: Path) -> list[str]:
    """The texts in the store of a source."""
    return texts_of(open_store([(path, None)], Cleaning())[0])


def texts_of(prompts: Texts) -> list[str]:
    return prompts.take(np.arange(len(prompts)))


def left_in(cache: Path) -> list[str]:
    """What is in the folder of stores, besides locks and counts."""
    return sorted(
        path.name for path in (cache / "prompts").iterdir() if path.suffix not in (".lock", ".json")
    )


def test_a_store_holds_the_texts_and_their_counts(file: Path) -> None:
    made, counts, place = open_store([(file, None)], Cleaning())
    assert texts_of(made) == PROMPTS and len(made) == 1000
    assert made.take(np.array([999, 0, 0])) == ["prompt 999", "prompt 0", "prompt 0"]
    assert (counts["read"], counts["kept"], counts["empty"]) == (1000, 1000, 0)
    assert texts_of(pickle.loads(pickle.dumps(made))) == PROMPTS
    assert place.parent == user_cache_dir() / "prompts"


def test_a_store_and_a_list_are_drawn_in_the_same_order(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.arange(1500)
    stored = PromptPools(str(file)).draws(seed=5)
    assert not isinstance(stored.sources[0].texts, list)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 10**6)
    listed = PromptPools(str(file)).draws(seed=5)
    assert isinstance(listed.sources[0].texts, list)
    assert stored.at(places) == listed.at(places) == PromptPools(PROMPTS).draws(seed=5).at(places)


# --- made once ----------------------------------------------------------------------------------------------


def test_it_is_found_again_as_long_as_the_source_is_the_same(
    file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(file)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_texts", None)  # nothing is read any more
        assert opened(file) == first
    assert opened(file, Cleaning(deduplicate=True)) != first
    before = file.stat()
    file.write_text(file.read_text().replace("prompt 7\n", "prompt X\n"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stored(file)[7] == "prompt X"
    assert len(left_in(own_cache)) == 3


def test_one_process_makes_it_while_others_wait(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any) -> Iterator[str]:
        reads.append(arguments)
        time.sleep(0.4)
        yield from PROMPTS

    reads: list[Any] = []
    monkeypatch.setattr(sources, "read_texts", slow)
    threads = [threading.Thread(target=opened, args=(file,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1


def test_a_killed_attempt_is_made_anew(file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> Iterator[str]:
        yield from PROMPTS * 100
        os.kill(os.getpid(), signal.SIGKILL)

    importlib.import_module("pyarrow")  # the child has nothing to import
    if (child := os.fork()) == 0:
        monkeypatch.setattr(sources, "read_texts", killed)
        opened(file)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (leftover,) = left_in(own_cache)
    assert leftover.endswith(".partial")
    assert stored(file) == PROMPTS
    assert left_in(own_cache) == [opened(file).name]


# --- cleaning -----------------------------------------------------------------------------------------------


def test_what_is_dropped_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("a red ship\nhi\n\na ship\na red ship\n" + "long " * 9 + "\na ship\nhi\na house")
    (made,) = PromptPools(str(path), cleaning=Cleaning(3, 20, deduplicate=True)).open()
    assert texts_of(made) == ["a red ship", "a ship", "a house"]
    said = capsys.readouterr().err
    assert ("3 of 9 prompts kept (dropped: 1 empty, 1 above 20 characters, 2 repeated, 2 below 3 characters)"
            in said)  # fmt: skip
    assert str(path) in said and "The first: 'a red ship'" in said


def test_lists_and_small_files_are_cleaned_alike(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 10**6)
    file.write_text("a ship\n\na house\na ship")
    cleaning = Cleaning(max_length=6, deduplicate=True)
    for given, read in ((["a ship", "a house", "a ship"], 3), (str(file), 4)):
        (kept,) = PromptPools(given, cleaning=cleaning).open()
        assert kept.take(np.arange(len(kept))) == ["a ship"]
        assert f"1 of {read} prompts kept" in capsys.readouterr().err
    with pytest.raises(UserError, match="empty after cleaning: 0 of 4 .*below 8 characters"):
        PromptPools(str(file), cleaning=Cleaning(min_length=8)).open()


def test_repeats_are_found_across_calls_and_the_first_is_kept() -> None:
    numbers = np.random.default_rng(0).integers(0, 3000, 10_000).tolist()
    every = [f"t{number}" for number in numbers]
    ends = np.cumsum([0, 1, 7, 3000, 2, 4000, 500, 2490]).tolist()
    chunks, counts = [every[start:end] for start, end in pairwise(ends)], Counter[str]()
    kept = sum(Cleaning(deduplicate=True).kept(chunks, counts), [])
    assert kept == list(dict.fromkeys(every))
    assert counts == {"read": 10_000, "kept": len(kept), "repeated": 10_000 - len(kept)}
    seen = SeenTexts()
    for start in range(0, 64_000, 1000):
        assert seen.first_times([f"u{number}" for number in range(start, start + 1000)]).all()
    assert len(seen.runs) <= 7 and sum(map(len, seen.runs)) == 64_000


@pytest.mark.parametrize(
    "cleaning", [{"min_length": 0, "max_length": -1}, {"min_length": 5, "max_length": 4}]
)
def test_lengths_that_make_no_sense(cleaning: dict[str, int]) -> None:
    with pytest.raises(UserError, match="leave no length"):
        Cleaning(**cleaning)


# --- several sources ----------------------------------------------------------------------------------------


def test_patterns_columns_and_weights(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("text,style\nb0,x\nb1,y\n")
    (tmp_path / "a.csv").write_text("text,style\na0,x\na1,x\na0,x\n")
    (tmp_path / "c.jsonl").write_text('{"words": "c0"}\n{"words": "c1"}\n{"words": "c2"}\n')
    pattern, last = str(tmp_path / "*.csv"), str(tmp_path / "c.jsonl")
    (joined,) = PromptPools([PromptSource(pattern), PromptSource(last, "words")], "text",
                            Cleaning(deduplicate=True)).open()  # fmt: skip
    assert joined.take(np.arange(len(joined))) == ["a0", "a1", "b0", "b1", "c0", "c1", "c2"]
    weighted = PromptPools([PromptSource(pattern, "text", 3), PromptSource(last, "words", 1)], epoch_size=8)
    drawn = weighted.draws(0).at(np.arange(80))
    for epoch in range(10):
        first = [text[0] == "c" for text in drawn[8 * epoch : 8 * epoch + 8]]
        assert sum(first) == 2
    assert {drawn.count(f"c{number}") for number in range(3)} == {6, 7}
    with pytest.raises(UserError, match=r"b\.csv has no column 'words'|a\.csv has no column 'words'"):
        PromptPools(pattern, "words").open()


def test_settings_of_several_sources_that_do_not_fit(file: Path, tmp_path: Path) -> None:
    path = str(file)
    with pytest.raises(UserError, match="some have none"):
        PromptPools([PromptSource(path, weight=1), PromptSource(path)], epoch_size=5)
    with pytest.raises(UserError, match=r"data\.epoch_size is None"):
        PromptPools([PromptSource(path, weight=1)])
    with pytest.raises(UserError, match=r"data\.epoch_size is 5"):
        PromptPools(path, epoch_size=5)
    with pytest.raises(UserError, match="no prompts file matches"):
        PromptPools(str(tmp_path / "*.csv"))
    with pytest.raises(UserError, match=r"is a file; write \{path: "):
        PromptPools(["a ship", path])
    with pytest.raises(UserError, match="gives 5 an epoch, fewer than one batch"):
        module_of(file, prompts=[PromptSource(path, weight=1)], epoch_size=5).setup("fit")


def test_sources_are_given_in_yaml(file: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PromptDataModule, "data")
    settings = {"batch_size": 5, "eval_captions": ["a"], "eval_size": 1, "seed": 3}
    weighted = [{"path": str(file), "weight": 1.5}, {"path": str(file), "column": None, "weight": 0.5}]
    for given, extra in (
        (weighted, {"epoch_size": 8}),
        (PROMPTS, {}),
        (str(file), {}),
        ([{"path": str(file)}], {}),
    ):
        config = parser.parse_object({"data": {"prompts": given, **settings, **extra}})
        again = parser.parse_string(parser.dump(config))  # as in a run's config.yaml
        draws, _ = parser.instantiate(again).data._draws()
        assert draws.epoch_size == extra.get("epoch_size", 1000)
        assert draws.shares.tolist() == ([6, 2] if extra else [1000])
        assert draws.at(np.arange(3))[0] in PROMPTS


def test_a_file_named_on_the_command_line_is_not_read_by_the_parser(tmp_path: Path) -> None:
    """Its lines could be YAML: the path itself must reach the data module."""
    (tmp_path / "lines.txt").write_text("- a ship\n- a tree\n")
    parser = ArgumentParser()
    parser.add_class_arguments(PromptDataModule, "data")
    config = parser.parse_args([f"--data.prompts={tmp_path / 'lines.txt'}"])
    assert config.data.prompts == str(tmp_path / "lines.txt")


def test_sources_with_unknown_keys_or_no_path(file: Path) -> None:
    for source in ({"path": str(file), "wieght": 2}, {"weight": 2}, "a ship"):
        with pytest.raises(UserError, match="source 2 is"):
            module_of(file, prompts=[{"path": str(file)}, source])


# --- in a run -----------------------------------------------------------------------------------------------


def module_of(file: Path, **settings: Any) -> PromptDataModule:
    return PromptDataModule(**{"prompts": str(file), "batch_size": 10, "eval_captions": ["a"], "eval_size": 1,
                               **settings})  # fmt: skip


def test_workers_read_the_store_and_it_outlives_its_source(file: Path) -> None:
    module = module_of(file, negative_prompts=str(file), num_workers=2)
    module.prepare_data()
    module.setup("fit")
    file.unlink()
    module.load_state_dict({"position": 500})
    batches = list(islice(module.train_dataloader(), 50))
    alone = PromptDataModule(
        PROMPTS, batch_size=10, eval_captions=["a"], eval_size=1, negative_prompts=PROMPTS
    )
    expected = list(islice(alone.train_dataloader(), 100))[50:]
    for name in ("prompts", "negative_prompts"):
        assert [batch[name] for batch in batches] == [batch[name] for batch in expected]


def test_only_training_makes_a_store(file: Path, own_cache: Path) -> None:
    module = module_of(file)
    module.trainer = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.VALIDATING), global_rank=0, world_size=1
    )  # type: ignore[assignment]
    module.prepare_data()
    module.setup("validate")
    assert len(list(module.val_dataloader())) == 1 and not own_cache.exists()
    module.trainer.state.fn = TrainerFn.FITTING
    module.prepare_data()
    assert len(left_in(own_cache)) == 1


def test_fewer_prompts_than_a_batch(file: Path) -> None:
    with pytest.raises(UserError, match=r"has 1000 prompts, fewer than one batch \(data.batch_size 1001\)"):
        module_of(file, batch_size=1001).prepare_data()


# --- trouble ------------------------------------------------------------------------------------------------


def test_a_source_that_is_gone_or_damaged_leaves_nothing(file: Path, tmp_path: Path, own_cache: Path) -> None:
    module = module_of(file)
    file.unlink()
    with pytest.raises(UserError, match=r"prompts\.txt does not exist"):
        module.prepare_data()
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(f'{{"prompt": "p{n}"}}\n' for n in range(70_000)) + '{"prompt": "p')
    with pytest.raises(UserError, match=r"cut\.jsonl: row 70001 can't be read"):
        opened(cut)
    (tmp_path / "empty.csv").write_text("prompt\n")
    with pytest.raises(UserError, match=r"empty\.csv is empty"):
        opened(tmp_path / "empty.csv")
    assert left_in(own_cache) == []


def test_a_source_that_changes_while_being_read(
    file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(*_: Any) -> Iterator[str]:
        yield from PROMPTS
        file.write_text("another prompt")

    monkeypatch.setattr(sources, "read_texts", changing)
    with pytest.raises(UserError, match=r"prompts\.txt changed while being read"):
        opened(file)
    assert left_in(own_cache) == []


def test_too_little_room(file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device; make room"):
        patch.setattr(pyarrow, "record_batch", full)
        opened(file)
    assert left_in(own_cache) == []
    assert stored(file) == PROMPTS


def test_a_cache_that_can_not_be_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_STEP_CACHE", str(file))  # a file where a folder is needed
    with pytest.raises(UserError, match="set ONE_STEP_CACHE to a folder"):
        opened(file)


def test_a_damaged_store_is_named(file: Path) -> None:
    arrow = opened(file)
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(UserError, match="delete it") as caught:
        opened(file)
    assert str(arrow) in str(caught.value)
