"""Which texts of a source are kept, and the report of those dropped."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

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

    def describe(self, report: dict[str, Any]) -> str:
        """One sentence of a `Cleaner.report`, like "3 of 5 prompts kept (dropped: 1 empty, 1 repeated)"."""
        words = {
            "empty": "empty",
            "short": f"below {self.min_length} characters",
            "long": f"above {self.max_length} characters",
            "repeated": "repeated",
        }
        parts = ", ".join(f"{count:,} {words[reason]}" for reason, count in report["dropped"].items())
        return f"{report['kept']:,} of {report['read']:,} prompts kept (dropped: {parts or 'none'})"


class Cleaner:
    """Keeps the texts that a `Cleaning` wants, in their order, and counts the others."""

    def __init__(self, cleaning: Cleaning) -> None:
        self.cleaning = cleaning
        self.num_read = 0
        self.num_kept = 0
        self.dropped: Counter[str] = Counter()
        self._seen = _SeenTexts()

    def keep(self, texts: list[str]) -> list[str]:
        """Return the texts to keep; repeats are recognised over all calls."""
        shortest, longest = self.cleaning.min_length or 1, self.cleaning.max_length or float("inf")
        self.num_read += len(texts)
        kept = []
        for text in texts:
            if shortest <= len(text) <= longest:
                kept.append(text)
            else:
                self.dropped["empty" if not text else "short" if len(text) < shortest else "long"] += 1
        if self.cleaning.deduplicate and kept:
            is_first = self._seen.first_times(kept).tolist()
            kept = [text for text, first in zip(kept, is_first, strict=True) if first]
            self.dropped["repeated"] += len(is_first) - len(kept)
        self.num_kept += len(kept)
        return kept

    def report(self) -> dict[str, Any]:
        """``{"read", "kept", "dropped": {reason: count}}``; reasons: empty, short, long, repeated."""
        dropped = {reason: count for reason, count in sorted(self.dropped.items()) if count}
        return {"read": self.num_read, "kept": self.num_kept, "dropped": dropped}

    def check_kept(self, name: str) -> None:
        """Refuse a source that was empty or of which nothing is kept.

        Raises:
            UserError: names the source.
        """
        if not self.num_read:
            raise UserError(f"prompts file {name} is empty; write one prompt a line into it")
        if not self.num_kept:
            kept = self.cleaning.describe(self.report())
            raise UserError(f"prompts file {name} is empty after cleaning: {kept}; add prompts or drop less")


class _SeenTexts:
    """Recognises texts by 64-bit hashes, 8 bytes each, in sorted arrays of growing length.

    Among 100 million different texts one is taken for a repeat, and dropped, with a probability of 0.03 %.
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def first_times(self, texts: list[str]) -> NDArray[np.bool_]:
        """Return for each text whether it has not come before: bool [n]."""
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
        hashes, places = np.unique(np.frombuffer(digests, "<u8"), return_index=True)
        is_new = np.ones(len(hashes), bool)
        for run in self._runs:
            nearest = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            is_new &= run[nearest] != hashes
        self._add(hashes[is_new])
        result = np.zeros(len(texts), bool)
        result[places[is_new]] = True
        return result

    def _add(self, run: NDArray[np.uint64]) -> None:
        # runs shrink by half at least from one to the next, so there are few, and each hash moves seldom
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # two sorted halves: merged, in half the memory of a copy
        if len(run):
            self._runs.append(run)
