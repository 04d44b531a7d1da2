"""The order of the stream: permutations that are computed, weights, and what processes and workers get."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import UserError
from datamodules import order, prompts
from datamodules.order import PromptDraws, Texts, entries, epoch_shares, feistel, permutation
from datamodules.prompts import PromptDataModule, PromptStream

PINNED_LISTED = [3, 6, 5, 1, 7, 2, 4, 0]
PINNED_COMPUTED = [6275309, 7285196, 3431358, 3411099]


def texts(count: int, name: str = "p") -> Texts:
    return Texts([f"{name}{number}" for number in range(count)])


# --- permutations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 4097, 70_001])
def test_the_computed_permutation_holds_every_number_once(size: int) -> None:
    for seed, epoch in ((0, 0), (-5, 3), (2**70, 10**9)):
        assert np.array_equal(np.sort(feistel(seed, epoch, size, np.arange(size))), np.arange(size))


def test_its_entries_do_not_depend_on_what_is_asked_beside_them() -> None:
    whole = feistel(1, 2, 1000, np.arange(1000))
    assert [int(feistel(1, 2, 1000, np.array([place]))[0]) for place in (0, 7, 999)] == whole[
        [0, 7, 999]
    ].tolist()


def test_it_is_as_random_as_a_shuffle() -> None:
    """Counts of the first value, and of the first two, over many epochs; to 5 standard deviations."""
    drawn = [tuple(feistel(0, epoch, 7, np.arange(2)).tolist()) for epoch in range(4200)]
    pairs, firsts = Counter(drawn), Counter(first for first, _ in drawn)
    assert len(firsts) == 7 and all(abs(count - 600) < 5 * 23 for count in firsts.values())
    assert len(pairs) == 42 and all(abs(count - 100) < 5 * 10 for count in pairs.values())
    large = feistel(3, 0, 10**6, np.arange(100_000))
    assert abs(np.corrcoef(large, np.arange(100_000))[0, 1]) < 5 / 100_000**0.5
    assert abs(np.corrcoef(large[1:], large[:-1])[0, 1]) < 5 / 100_000**0.5


def test_the_order_of_runs_that_have_begun_does_not_change() -> None:
    """Values taken down once: another order would break the resuming of every unfinished run."""
    assert permutation(3, 1, 8).tolist() == PINNED_LISTED
    assert entries(3, 8, np.arange(8, 16)).tolist() == PINNED_LISTED
    assert entries(3, 10**7, np.array([0, 1, 9_000_000, 10**7])).tolist() == PINNED_COMPUTED


def test_seeds_and_epochs_have_their_own_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    for listed_size in (50, 49):
        monkeypatch.setattr(order, "LISTED_SIZE", listed_size)
        drawn = {
            tuple(entries(seed, 50, np.arange(50 * e, 50 * e + 50))) for seed in range(4) for e in range(4)
        }
        assert len(drawn) == 16


def test_a_place_far_on_is_reached_at_once() -> None:
    draws = PromptDraws([Numbers(10**9)], seed=0)
    assert len(set(draws.at(np.arange(9 * 10**8, 9 * 10**8 + 64)))) == 64


class Numbers:
    """As many texts as wanted."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def take(self, rows: order.Places) -> list[str]:
        return [str(row) for row in rows]


# --- weights ------------------------------------------------------------------------------------------------


def test_an_epoch_of_weighted_sources_has_the_stated_draws() -> None:
    sources = [texts(7, "a"), texts(50, "b"), texts(3, "c")]
    draws = PromptDraws(sources, seed=1, shares=epoch_shares([0.5, 0.3, 0.2], 20))
    assert draws.epoch_size == 20
    counts: Counter[str] = Counter()
    orders = set()
    for epoch in range(35):
        drawn = draws.at(np.arange(20 * epoch, 20 * epoch + 20))
        assert Counter(text[0] for text in drawn) == {"a": 10, "b": 6, "c": 4}
        orders.add(tuple(text[0] for text in drawn))
        counts.update(drawn)
        for source in sources:  # no text comes again before all others have come
            times = [counts[text] for text in source.texts]
            assert max(times) - min(times) <= 1
    assert len(orders) == 35
    assert counts["a0"] == 50 and counts["c0"] in (46, 47)


def test_shares_are_rounded_by_the_largest_remainder() -> None:
    assert epoch_shares([1, 1, 1], 10) == [4, 3, 3]
    assert epoch_shares([2, 1], 10) == [7, 3]
    assert epoch_shares([5], 3) == [3]


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1, 0], "positive"), ([1, -1], "positive"), ([1, float("nan")], "positive"), ([1000, 1], "no draw")],
)
def test_weights_that_make_no_sense(weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        epoch_shares(weights, 10)


# --- processes and workers ----------------------------------------------------------------------------------


def shard(draws: PromptDraws, batch_size: int, rank: int, world_size: int, workers: int, steps: int,
          monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:  # fmt: skip
    """The batches of one process whose loader has several workers, in the order in which it takes them."""
    iterators = []
    for number in range(workers):
        info = SimpleNamespace(id=number, num_workers=workers)
        monkeypatch.setattr(prompts, "get_worker_info", lambda info=info: info)
        stream = iter(PromptStream(draws, batch_size, 0, rank, world_size))
        iterators.append([batch["prompts"] for batch in islice(stream, -(-steps // workers))])
    return [iterators[step % workers][step // workers] for step in range(steps)]


@pytest.mark.parametrize("listed_size", [10, 2**16])
@pytest.mark.parametrize(
    ("size", "batch_size", "world_size", "workers"),
    [(13, 2, 2, 1), (13, 4, 2, 3), (50, 6, 3, 2), (29, 12, 4, 3), (7, 1, 1, 2)],
)
def test_processes_and_workers_together_draw_each_prompt_once_an_epoch(
    size: int,
    batch_size: int,
    world_size: int,
    workers: int,
    listed_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(order, "LISTED_SIZE", listed_size)
    draws, steps = PromptDraws([texts(size)], seed=2), -(-3 * size // batch_size)
    shards = [
        shard(draws, batch_size, rank, world_size, workers, steps, monkeypatch) for rank in range(world_size)
    ]
    stream = [text for step in range(steps) for rank in range(world_size) for text in shards[rank][step]]
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == sorted(
            draws.sources[0].take(np.arange(size))
        )
    assert stream[: 3 * size] == draws.at(np.arange(3 * size))


def module_of(rank: int, world_size: int, **settings: object) -> PromptDataModule:
    prompts = [f"p{number}" for number in range(25)]
    module = PromptDataModule(prompts, batch_size=6, eval_captions=prompts, eval_size=None, seed=4,
                              negative_prompts=["blurry", "grey", "text", "hands"], **settings)  # type: ignore[arg-type]  # fmt: skip
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, training=True)  # type: ignore[assignment]
    return module


def updates(world_size: int, count: int, state: dict[str, int] | None = None) -> tuple[list, dict[str, int]]:
    """(prompt, negative prompt, place) of ``count`` updates by all processes, and the state after them."""
    drawn = []
    modules = [module_of(rank, world_size) for rank in range(world_size)]
    for module in modules:
        module.load_state_dict(state or {"position": 0})
    loaders = [iter(module.train_dataloader()) for module in modules]
    for _ in range(count):
        for module, loader in zip(modules, loaders):
            batch = module.on_before_batch_transfer(next(loader), 0)
            drawn += zip(batch["prompts"], batch["negative_prompts"], batch["indices"].tolist(), strict=True)
    states = [module.state_dict() for module in modules]
    assert all(state == states[0] == {"position": states[0]["position"]} for state in states)
    return drawn, states[0]


@pytest.mark.parametrize("world_size", [1, 3, 6])
def test_a_run_resumed_on_other_processes_goes_on_in_the_same_order(world_size: int) -> None:
    whole, _ = updates(1, 9)
    before, state = updates(2, 4)
    after, end = updates(world_size, 5, state)
    assert before + after == whole
    assert (state, end) == ({"position": 24}, {"position": 54})


# --- negative prompts ---------------------------------------------------------------------------------------


def test_negative_prompts_have_an_order_of_their_own() -> None:
    drawn, _ = updates(1, 9)
    negatives = [negative for _, negative, _ in drawn]
    assert all(sorted(negatives[i : i + 4]) == ["blurry", "grey", "hands", "text"] for i in range(0, 52, 4))
    assert len({tuple(negatives[i : i + 4]) for i in range(0, 52, 4)}) > 4
    plain = PromptDataModule(
        [f"p{n}" for n in range(25)], batch_size=6, eval_captions=["a"], eval_size=1, seed=4
    )
    batch = next(iter(plain.train_dataloader()))
    assert set(batch) == {"prompts", "indices"}
    assert batch["prompts"] == [prompt for prompt, _, _ in drawn[:6]]
    words = ["blurry", "grey", "text", "hands"]
    alike = PromptDataModule(words, batch_size=4, eval_captions=["a"], eval_size=1, negative_prompts=words)
    pairs = list(islice(alike.train_dataloader(), 8))
    assert any(batch["prompts"] != batch["negative_prompts"] for batch in pairs)
    assert all(torch.equal(batch["indices"], torch.arange(4)) for batch in pairs)
