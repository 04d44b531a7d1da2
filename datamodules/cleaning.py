"""Which texts of a source are kept, and how many are dropped for which reason."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError


@dataclass(frozen=True)
class Cleaning:
    """What is dropped from a source, besides empty texts.

    Attributes:
        min_length: Texts with fewer characters are dropped. None: none.
        max_length: Texts with more characters are dropped. None: none.
        deduplicate: Texts that have come before are dropped.
    """

    min_length: int | None = None
    max_length: int | None = None
    deduplicate: bool = False

    def __post_init__(self) -> None:
        shortest, longest = self.min_length or 1, self.max_length
        if shortest < 1 or (longest is not None and longest < shortest):
            raise UserError(
                f"data.min_length {self.min_length} and data.max_length {longest} leave no length; they are "
                "numbers of characters, at least 1, the second not below the first"
            )

    def kept(self, chunks: Iterable[list[str]], counts: Counter[str]) -> Iterator[list[str]]:
        """Yield the texts to keep of each chunk, in their order.

        Args:
            counts: gets the numbers of texts ``read``, ``kept``, and dropped as ``empty``, ``short``,
                ``long`` or ``repeated``.
        """
        shortest, longest = self.min_length or 1, self.max_length or float("inf")
        seen = SeenTexts()
        for texts in chunks:
            counts["read"] += len(texts)
            kept = [text for text in texts if shortest <= len(text) <= longest]
            if len(kept) < len(texts):
                counts["empty"] += texts.count("")
                counts["short"] += sum(0 < len(text) < shortest for text in texts)
                counts["long"] += sum(len(text) > longest for text in texts)
            if self.deduplicate and kept:
                is_first = seen.first_times(kept).tolist()
                counts["repeated"] += is_first.count(False)
                kept = [text for text, first in zip(kept, is_first, strict=True) if first]
            counts["kept"] += len(kept)
            yield kept

    def describe(self, counts: Mapping[str, int]) -> str:
        """One sentence of these counts, like "3 of 5 prompts kept (dropped: 1 empty, 1 repeated)"."""
        words = {
            "empty": "empty",
            "long": f"above {self.max_length} characters",
            "repeated": "repeated",
            "short": f"below {self.min_length} characters",
        }
        parts = ", ".join(f"{counts[key]:,} {word}" for key, word in words.items() if counts.get(key))
        return f"{counts['kept']:,} of {counts['read']:,} prompts kept (dropped: {parts or 'none'})"

    def check(self, counts: Mapping[str, int], name: str) -> None:
        """Refuse the source of this name if nothing of it is kept.

        Raises:
            UserError: it was empty, or is after cleaning.
        """
        if not counts.get("read"):
            raise UserError(f"prompts file {name} is empty; write one prompt a line into it")
        if not counts["kept"]:
            said = self.describe(counts)
            raise UserError(f"prompts file {name} is empty after cleaning: {said}; add prompts or drop less")


class SeenTexts:
    """Recognises texts by 64-bit hashes, 8 bytes each, in sorted arrays of growing length.

    Among 100 million different texts one is taken for a repeat, and dropped, with a probability of 0.03 %.
    """

    def __init__(self) -> None:
        self.runs: list[NDArray[np.uint64]] = []

    def first_times(self, texts: list[str]) -> NDArray[np.bool_]:
        """Return for each text whether it has not come before: bool [n]."""
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
        hashes, places = np.unique(np.frombuffer(digests, "<u8"), return_index=True)
        is_new = np.ones(len(hashes), bool)
        for run in self.runs:
            nearest = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            is_new &= run[nearest] != hashes
        result = np.zeros(len(texts), bool)
        result[places[is_new]] = True
        new = hashes[is_new]
        # runs shrink by half at least from one to the next, so there are few, and each hash moves seldom
        while self.runs and len(self.runs[-1]) < 2 * len(new):
            new = np.concatenate([self.runs.pop(), new])
            new.sort(kind="stable")  # two sorted halves: merged, in half the memory of a copy
        if len(new):
            self.runs.append(new)
        return result
