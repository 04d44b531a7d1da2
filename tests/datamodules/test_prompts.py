"""The order, the sharing and the resuming of prompt streams, and the messages of bad files."""

from collections.abc import Iterable
from itertools import combinations, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import UserError
from datamodules.order import PromptDraws, Texts
from datamodules.prompts import EvaluationPrompts, PromptDataModule, PromptStream, read_prompts
from datamodules.sources import CAPTIONS

PROMPTS = [f"prompt {number}" for number in range(10)]


def stream_of(
    batch_size: int, seed: int, position: int = 0, rank: int = 0, world_size: int = 1
) -> PromptStream:
    return PromptStream(PromptDraws([Texts(PROMPTS)], seed), batch_size, position, rank, world_size)


def take(stream: PromptStream, count: int) -> list[list[str]]:
    return [batch["prompts"] for batch in islice(stream, count)]


def test_each_pass_holds_every_prompt_once_in_its_own_order() -> None:
    flat = sum(take(stream_of(4, seed=3), 5), [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == sorted(PROMPTS)
    assert flat[:10] != flat[10:]
    assert flat[:10] != PROMPTS


@pytest.mark.parametrize("position_in_batches", [1, 3, 7])
def test_resumed_stream_equals_the_uninterrupted_one(position_in_batches: int) -> None:
    whole = take(stream_of(4, seed=0), 12)
    resumed = take(stream_of(4, seed=0, position=4 * position_in_batches), 12 - position_in_batches)
    assert resumed == whole[position_in_batches:]


def test_processes_share_the_batch_of_one_process() -> None:
    whole = list(islice(stream_of(6, seed=0), 4))
    parts = [list(islice(stream_of(6, seed=0, rank=rank, world_size=3), 4)) for rank in range(3)]
    for step in range(4):
        assert sum((parts[rank][step]["prompts"] for rank in range(3)), []) == whole[step]["prompts"]
        indices = torch.cat([parts[rank][step]["indices"] for rank in range(3)])
        assert indices.tolist() == list(range(6)) == whole[step]["indices"].tolist()


def test_loader_workers_keep_the_order() -> None:
    alone = PromptDataModule(PROMPTS, batch_size=4, eval_captions=PROMPTS, eval_size=None, eval_batch_size=3)
    helped = PromptDataModule(PROMPTS, batch_size=4, eval_captions=PROMPTS, eval_size=None, eval_batch_size=3,
                              num_workers=2)  # fmt: skip
    for name in ("train_dataloader", "val_dataloader"):
        first = [batch["prompts"] for batch in islice(getattr(alone, name)(), 4)]
        assert [batch["prompts"] for batch in islice(getattr(helped, name)(), 4)] == first


@pytest.mark.parametrize("size", [1, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_evaluation_prompt_is_counted_once(size: int, world_size: int) -> None:
    prompts = [f"p{number}" for number in range(size)]
    shards = [list(EvaluationPrompts(prompts, 4, rank, world_size)) for rank in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1, "every process must take part in every pass"
    assert len(shards[0]) == len(EvaluationPrompts(prompts, 4, 0, world_size))
    counted, padding = [], 0
    for step in zip(*shards, strict=True):
        assert len({len(batch["prompts"]) for batch in step}) == 1
        for batch in step:
            assert batch["prompts"] == [prompts[index] for index in batch["indices"].tolist()]
            counted += batch["indices"][~batch["is_padding"]].tolist()
            padding += int(batch["is_padding"].sum())
    assert sorted(counted) == list(range(size))
    assert padding < world_size


def test_module_counts_used_batches_not_fetched_ones() -> None:
    module = PromptDataModule(PROMPTS, batch_size=4, eval_captions=PROMPTS, eval_size=None)
    module.trainer = SimpleNamespace(global_rank=0, world_size=1, training=True)  # type: ignore[assignment]
    loader = iter(module.train_dataloader())
    fetched = [next(loader) for _ in range(3)]
    module.on_before_batch_transfer(fetched[0], 0)
    assert module.state_dict() == {"position": 4}
    evaluation = next(iter(module.val_dataloader()))
    module.on_before_batch_transfer(evaluation, 0)
    again = PromptDataModule(PROMPTS, batch_size=4, eval_captions=PROMPTS, eval_size=None)
    again.load_state_dict(module.state_dict())
    assert next(iter(again.train_dataloader()))["prompts"] == fetched[1]["prompts"]


def test_places_of_a_training_batch_stay_on_the_cpu() -> None:
    """They seed random numbers there: on a GPU, reading them would wait for it in every micro-batch."""
    module = PromptDataModule(PROMPTS, batch_size=4, eval_captions=PROMPTS, eval_size=None)
    places = []
    for loader in (module.train_dataloader(), module.val_dataloader()):
        moved = module.transfer_batch_to_device(next(iter(loader)), torch.device("meta"), 0)
        places.append(moved["indices"].device.type)
    assert places == ["cpu", "meta"]


def test_batch_sizes_are_shared_and_split() -> None:
    module = PromptDataModule(PROMPTS, batch_size=8, micro_batch_size=2, eval_captions=PROMPTS, eval_size=3)
    module.trainer = SimpleNamespace(global_rank=1, world_size=2, training=True)  # type: ignore[assignment]
    assert (module.local_batch_size, module.micro_batch_size, len(module.eval_prompts)) == (4, 2, 3)
    module.trainer = SimpleNamespace(global_rank=1, world_size=3, training=True)  # type: ignore[assignment]
    with pytest.raises(UserError, match="3 processes"):
        module.train_dataloader()
    odd = PromptDataModule(PROMPTS, batch_size=8, micro_batch_size=3, eval_captions=PROMPTS, eval_size=3)
    with pytest.raises(UserError, match="micro_batch_size 3"):
        odd.setup("fit")


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa café\r\n\n  a ship  \n日本の山".encode())
    assert read_prompts(file) == ["a café", "a ship", "日本の山"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"good\nbad \xff\n", "row 2 .*0xff"),
    ],
)
def test_bad_files_have_one_clear_message(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        PromptDataModule(str(file), eval_captions=PROMPTS)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(("owner", "name"), [(Path, "is_file"), (Path, "open")])
def test_files_that_may_not_be_read_have_one_clear_message(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *rest: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "prompts.txt").write_text("a ship")
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(UserError, match=r"prompts\.txt: row 1 can't be read .*Permission denied"):
        read_prompts(tmp_path / "prompts.txt")


def test_validation_and_predict_use_the_first_captions_and_test_all() -> None:
    module = PromptDataModule(PROMPTS, batch_size=2, eval_captions=PROMPTS, eval_size=3, eval_batch_size=2)

    def places(loader: Iterable[dict[str, Any]]) -> list[int]:
        return [index for batch in loader for index in batch["indices"].tolist()]

    assert places(module.val_dataloader()) == places(module.predict_dataloader()) == [0, 1, 2]
    assert places(module.test_dataloader()) == list(range(10))


def test_what_chooses_is_not_what_is_reported_on() -> None:
    """Bundled captions: the pictures of the two files are others, and no student trains on either."""
    module = PromptDataModule(batch_size=4)
    assert (len(module.val_captions), len(module.eval_captions), len(module.val_prompts)) == (371, 1024, 256)
    files = [set(module.val_captions), set(module.eval_captions), set(read_prompts(CAPTIONS))]
    assert not any(one & other for one, other in combinations(files, 2))
    batch = next(iter(module.val_dataloader()))
    assert batch["prompts"] == module.val_captions[:64]
    own = PromptDataModule(PROMPTS, 2, eval_captions=PROMPTS, val_captions=["a cup", "a ship"], eval_size=1)
    assert next(iter(own.val_dataloader()))["prompts"] == ["a cup"]
    assert next(iter(own.predict_dataloader()))["prompts"] == PROMPTS[:1]
    assert "validations: others, 1" in own.describe()["Evaluation captions"]
    with pytest.raises(UserError, match=r"data\.val_captions"):
        PromptDataModule(PROMPTS, 2, eval_captions=PROMPTS, eval_size=2, val_captions=["a", ""])


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="10 prompts, fewer than one batch"):
        PromptDataModule(PROMPTS, batch_size=11, eval_captions=PROMPTS)
    with pytest.raises(UserError, match="eval_size is 256"):
        PromptDataModule(PROMPTS, batch_size=2, eval_captions=PROMPTS)
    with pytest.raises(UserError, match="batch_size is 0"):
        PromptDataModule(PROMPTS, batch_size=0)
    with pytest.raises(UserError, match="empty prompt"):
        PromptDataModule(["a", " "], batch_size=1)
