"""The order of prompts: pure functions of the seed and the place in the stream, in constant memory.

Place p of the endless stream (p = 0, 1, 2, … over the whole run) lies in epoch p // size, and shows entry
p mod size of that epoch's permutation. Nothing is kept from one place to the next, so a run continues from
one stored number, with any number of processes and workers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UserError

LISTED_SIZE = 2**16
"""Up to this size a permutation is drawn as a list (512 KiB); above, its entries are computed one by one: for
100 million prompts a list would take 800 MB in each process."""
_ROUNDS = 8

Places = NDArray[np.int64]
_Words = NDArray[Any]  # of uint64, which the type stubs of shifts don't keep


@lru_cache(maxsize=64)
def permutation(seed: int, epoch: int, size: int) -> Places:
    """Return the order of one epoch of at most `LISTED_SIZE` prompts: int64 [size]."""
    generator = torch.Generator().manual_seed(
        (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9) % 2**63
    )
    return torch.randperm(size, generator=generator).numpy()


def feistel(seed: int, epoch: int, size: int, places: Places) -> Places:
    """Return entries of a pseudo-random permutation of [0, size) that is never written down.

    A Feistel network permutes the numbers of 2h bits, 4^h being at most 4 times ``size``. It is applied to a
    number until the result lies in [0, size) again ("cycle walking", Black and Rogaway 2002, "Ciphers with
    Arbitrary Finite Domains"), which permutes [0, size).

    Args:
        seed: Any integer; with ``epoch`` (at least 0) it selects the permutation.
        places: int64 [n], each in [0, size).
    """
    half = ((size - 1).bit_length() + 1) // 2 or 1
    keys = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(_ROUNDS, np.uint64)
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _network(values[outside], half, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _network(values: _Words, half: int, keys: _Words) -> _Words:
    bits, rest, mask = np.uint64(half), np.uint64(64 - half), np.uint64(2**half - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) >> rest)
    return left << bits | right


def _mixed(values: _Words) -> _Words:
    """The finaliser of SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators")."""
    values = (values ^ (values >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> 27)) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> 31)


def derived_seed(seed: int, name: str) -> int:
    """Return a seed, in [0, 2^63), for another stream of random numbers beside that of ``seed``."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:8], "big") >> 1


def entries(seed: int, size: int, places: Places) -> Places:
    """Return the entries in [0, size) at any places of the endless stream, epoch after epoch."""
    result, epochs = np.empty_like(places), places // size
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        within = places[chosen] % size
        if size <= LISTED_SIZE:
            result[chosen] = permutation(seed, epoch, size)[within]
        else:
            result[chosen] = feistel(seed, epoch, size, within)
    return result


def epoch_shares(weights: Sequence[float], epoch_size: int) -> list[int]:
    """Share ``epoch_size`` draws out in proportion to the weights; the largest remainders are rounded up.

    Raises:
        UserError: a weight is not a positive number, or so small that its source is never drawn.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"the weights {list(weights)} of data.prompts must be positive numbers")
    exact = [epoch_size * weight / math.fsum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for source in by_remainder[: epoch_size - sum(shares)]:
        shares[source] += 1
    if 0 in shares:
        raise UserError(
            f"the weight {weights[shares.index(0)]} of a source in data.prompts gives it no draw in an epoch "
            f"of {epoch_size}; raise the weight or data.epoch_size"
        )
    return shares


class Texts:
    """Numbered texts.

    Args:
        texts: A list, or a ``datasets.Dataset`` with the column "prompt", which takes no memory.
    """

    def __init__(self, texts: Any) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Places) -> list[str]:
        """Return the texts of these rows."""
        if isinstance(self.texts, list):
            return [self.texts[row] for row in rows.tolist()]
        return list(self.texts[rows.tolist()]["prompt"])


class PromptDraws:
    """Which text stands at each place of the endless stream.

    One source: an epoch shows each text once. Several sources with ``shares``: an epoch is ``sum(shares)``
    draws, ``shares[s]`` of them from source s, mixed at random; each source goes through its own
    permutations, so that no text of it comes for the n+1st time before all have come n times (the n+1st
    round may begin within the epoch in which the nth ends).

    Args:
        sources: The texts, not empty.
        seed: Seed of the order.
        shares: Draws from each source in an epoch, for several sources.
    """

    def __init__(self, sources: Sequence[Texts], seed: int, shares: Sequence[int] | None = None) -> None:
        self.sources, self.seed = list(sources), seed
        self.shares = np.array(shares if shares is not None else [len(source) for source in sources])
        self.ends = np.cumsum(self.shares)
        self.epoch_size = int(self.ends[-1])

    def at(self, places: Places) -> list[str]:
        """Return the texts at these places (int64 [n]) of the stream."""
        if len(self.sources) == 1:
            return self.sources[0].take(entries(self.seed, len(self.sources[0]), places))
        slots = entries(self.seed, self.epoch_size, places)
        numbers = np.searchsorted(self.ends, slots, side="right")
        # how many draws from its source come before this one, counted slot by slot
        draws = places // self.epoch_size * self.shares[numbers] + slots - (self.ends - self.shares)[numbers]
        texts = [""] * len(places)
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            source, seed = self.sources[number], derived_seed(self.seed, f"source {number}")
            found = source.take(entries(seed, len(source), draws[chosen]))
            for place, text in zip(chosen.tolist(), found, strict=True):
                texts[place] = text
        return texts
