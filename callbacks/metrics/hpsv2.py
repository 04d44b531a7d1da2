"""HPSv2: how much people would like a picture for its prompt, as a CLIP tuned on their choices says.

Wu et al. 2023 (arXiv 2306.09341); the benchmark has four styles of 800 prompts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_score import cosines, text_extractor
from callbacks.metrics.hpsv2_features import HPSNetwork
from lightning_modules.networks.loading import asset_path

TENTHS = 10
"""The spread is the standard deviation over the means of this many consecutive parts of each style."""


class HPSv2(ImageMetric):
    """100 x mean cosine, of each style and over the styles. Higher is better.

    ``prepare(captions, groups)`` tells the style of every prompt, and ``update`` then needs ``positions``;
    without it there is one mean over all pictures and no spread.

    Args:
        version: "v2.0" or "v2.1" of the weights; their scores can't be compared with each other.
        checkpoint: file of the weights, or its folder (default: ``$HPS_ROOT``, ``~/.cache/hpsv2``, the hub's
            cache).
        architecture: open_clip's name of the network.

    Raises:
        UserError: the version is unknown.
    """

    name = "hpsv2"
    version = 1
    higher_is_better = True

    totals: Tensor
    counts: Tensor
    truncated: Tensor
    count: Tensor

    def __init__(self, version: str, checkpoint: str | None = None, architecture: str = "ViT-H-14") -> None:
        path = None if checkpoint is None else asset_path(checkpoint)
        super().__init__(HPSNetwork(version, path, architecture))
        self.hps_version = version
        self.styles: list[str] = []
        self.num_truncated = 0
        self._cells: list[tuple[int, int]] = []
        self._style_results: dict[str, dict[str, Any]] = {}
        self._spread: float | None = None

    def prepare(
        self,
        captions: Sequence[str],
        groups: Sequence[str] | None = None,
        negatives: Sequence[str] | None = None,
    ) -> None:
        """Learn the style of every prompt (one style if there are no groups); forgets earlier pictures.

        Raises:
            ValueError: numbers of captions and groups differ.
        """
        names = list(groups) if groups is not None else ["all"] * len(captions)
        if len(names) != len(captions):
            raise ValueError(f"{len(captions)} captions, but {len(names)} groups")
        self.styles = list(dict.fromkeys(names))
        sizes, seen = Counter(names), dict.fromkeys(self.styles, 0)
        self._cells = []
        for name in names:
            # Prompt i of n in its style is in tenth 10 i / n: for 800, ten runs of 80 as in the repository.
            self._cells.append((self.styles.index(name), seen[name] * TENTHS // sizes[name]))
            seen[name] += 1
        if "count" in self._defaults:
            self.setup_states(self.extractor.width)
            self.reset()

    def setup_states(self, width: int) -> None:
        """Sums and numbers of cosines by style and tenth, and how many prompts were cut."""
        shape = (max(1, len(self.styles)), TENTHS)
        for name, size, dtype in [
            ("totals", shape, torch.float64),
            ("counts", shape, torch.long),
            ("truncated", (), torch.long),
            ("count", (), torch.long),
        ]:
            zeros = torch.zeros(size, dtype=dtype, device=self.device)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def _add(self, features: Tensor, prompts: list[str]) -> None:
        self._add_at(features, prompts, None)

    def _add_at(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
        if self._cells and positions is None:
            raise ValueError("hpsv2 was told the styles of the prompts: update() needs their positions")
        extractor = text_extractor(self.extractor, self.name)
        values = cosines(features, extractor.text_features(prompts)).to(self.totals.device)
        cells = [self._cells[i] for i in positions] if self._cells and positions else [(0, 0)] * len(prompts)
        index = tuple(torch.tensor(cells, device=self.totals.device).T)
        self.totals.index_put_(index, values, accumulate=True)
        self.counts.index_put_(index, torch.ones_like(values, dtype=torch.long), accumulate=True)
        self.truncated += extractor.count_truncated(prompts)

    def _value(self) -> Tensor:
        self.num_truncated = int(self.truncated)
        totals, counts = 100 * self.totals.cpu(), self.counts.cpu()
        used = counts.sum(1) > 0
        means, tenths = totals.sum(1) / counts.sum(1), totals / counts
        spreads = tenths.std(1, correction=0)  # not a number where a tenth is empty
        self._style_results = {
            style: {
                "value": float(means[i]),
                "num_images": int(counts[i].sum()),
                "spread": _number(spreads[i]),
            }
            for i, style in enumerate(self.styles)
            if used[i]
        }
        self._spread = _number(tenths[used].mean(0).std(correction=0))
        return means[used].mean()

    def settings(self) -> dict[str, Any]:
        """Version of the weights. (The styles belong to the captions, which caches know as groups.)"""
        return {"hps_version": self.hps_version}

    def details(self) -> dict[str, Any]:
        """Means of the styles, spreads, and what differs from the repository's own evaluation."""
        return super().details() | {
            "styles": self._style_results,
            "spread": self._spread,
            "spread_is": f"standard deviation over {TENTHS} consecutive parts of each style",
            "scale": 100,
            "truncated_prompts": self.num_truncated,
            "differs": "fp32 on pictures in memory; HPSv2's own script reads JPEG files in mixed precision",
        }

    def results(self) -> dict[str, dict[str, Any]]:
        """``hpsv2``, the mean over the styles, and ``hpsv2/<style>`` of each. Collective."""
        overall = self.result()
        shared = {k: v for k, v in overall["details"].items() if k not in ("styles", "spread")}
        styles = {
            f"{self.name}/{style}": {
                "value": found["value"],
                "num_images": found["num_images"],
                "details": shared | {"spread": found["spread"]},
            }
            for style, found in self._style_results.items()
        }
        return {self.name: overall} | (styles if len(styles) > 1 else {})


def _number(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None
