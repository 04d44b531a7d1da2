"""HPSv2: how much people would like a picture for its prompt, as a CLIP tuned on their choices says.

Wu et al. 2023 (arXiv 2306.09341); the benchmark has four styles of 800 prompts.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_features import TextImageExtractor
from callbacks.metrics.clip_score import cosines, text_extractor
from callbacks.metrics.judges import in_hub_cache
from common.errors import UserError
from common.hashing import hash_file, to_uint8
from lightning_modules.networks.clip_models import HPS_FILES, HPS_REPOSITORY, OpenClip
from lightning_modules.networks.model_names import asset_path

TENTHS = 10
"""The spread is the standard deviation over the means of this many consecutive parts of each style."""


class HPSExtractor(TextImageExtractor):
    """The network of HPSv2, which sees the whole picture: longest side resized, padded to a square.

    Args:
        version: "v2.0" or "v2.1".
        checkpoint: its file, or a folder that holds it; None: HPSv2's folder, or the hub's cache.
        architecture: open_clip's name.

    Raises:
        UserError: open_clip is not installed, the checkpoint is missing or no such checkpoint.
    """

    def __init__(self, version: str, checkpoint: Path | None, architecture: str) -> None:
        file = find_checkpoint(version, checkpoint)
        clip = OpenClip(architecture, str(file))
        size, self.mean, self.std = (clip.settings[name] for name in ("size", "mean", "std"))
        self.size: int = size if isinstance(size, int) else size[0]
        name = f"HPS{version} (open_clip {architecture})"
        content = hashlib.sha256(f"hps {architecture} {hash_file(file)}".encode()).hexdigest()
        words = f"8-bit in memory (no JPEG), longest side to {self.size} by antialiased bicubic, padded"
        super().__init__(clip, name, file, content, words)

    def pixels(self, images: Tensor) -> Tensor:
        """Resized and centred on black in [0, 1], not in 8 bits, then normalised."""
        values = to_uint8(images).float() / 255
        height, width = values.shape[-2:]
        scale = self.size / max(height, width)
        if scale != 1:
            height, width = round(height * scale), round(width * scale)
            values = TF.resize(values, [height, width], InterpolationMode.BICUBIC, antialias=True)
        left, top = (self.size - width) // 2, (self.size - height) // 2
        padding = [left, top, self.size - width - left, self.size - height - top]
        return TF.normalize(TF.pad(values, padding, fill=0), list(self.mean), list(self.std))


def find_checkpoint(version: str, path: Path | None = None) -> Path:
    """The checkpoint's file: the given one, else that in HPSv2's folder or the hub's cache.

    Raises:
        UserError: it is in none of these places; they are named, and how to get it.
    """
    name = HPS_FILES[version]
    folder = Path(os.environ.get("HPS_ROOT") or Path.home() / ".cache" / "hpsv2")
    if path is not None:
        places, looked = [path / name if path.is_dir() else path], str(path)
    else:
        places = [folder / name, *(found / name for found in in_hub_cache(HPS_REPOSITORY, name))]
        looked = f"{places[0]} and the hub's cache of {HPS_REPOSITORY}"
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"hpsv2 {version}: no checkpoint; looked for {looked}. Get it with "
        f"`hf download {HPS_REPOSITORY} {name} --local-dir {folder}`, or name its file as `checkpoint`"
    )


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

    totals: Tensor
    counts: Tensor
    truncated: Tensor

    def __init__(self, version: str, checkpoint: str | None = None, architecture: str = "ViT-H-14") -> None:
        if version not in HPS_FILES:
            raise UserError(
                f"hpsv2: version {version!r} is unknown: choose one of {', '.join(HPS_FILES)} (their "
                "scores can't be compared with each other)"
            )
        path = None if checkpoint is None else asset_path(checkpoint)
        super().__init__((HPSExtractor, version, path, architecture))
        self.hps_version = version
        self.styles: list[str] = []
        self._cells: list[tuple[int, int]] = []
        self._told: dict[str, Any] = {}
        self._style_results: dict[str, dict[str, Any]] = {}

    def prepare(
        self,
        captions: Sequence[str],
        groups: Sequence[str] | None = None,
        negatives: Sequence[str] | None = None,
    ) -> None:
        """Learn the style of every prompt (one style if there are no groups); forgets earlier pictures."""
        names = list(groups) if groups is not None else ["all"] * len(captions)
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
        shape = max(1, len(self.styles)), TENTHS
        self.add_sum("totals", *shape)
        self.add_sum("counts", *shape, dtype=torch.long)
        self.add_sum("truncated", dtype=torch.long)

    def _add(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
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
        spread = _number(tenths[used].mean(0).std(correction=0))
        self._told = {
            "styles": self._style_results,
            "spread": spread,
            "truncated_prompts": int(self.truncated),
        }
        return means[used].mean()

    def settings(self) -> dict[str, Any]:
        """Version of the weights. (The styles belong to the captions, which caches know as groups.)"""
        return {"hps_version": self.hps_version}

    def details(self) -> dict[str, Any]:
        """Means of the styles, spreads, and what differs from the repository's own evaluation."""
        return super().details() | self._told | {
            "spread_is": f"standard deviation over {TENTHS} consecutive parts of each style",
            "scale": 100,
            "differs": "fp32 on pictures in memory; HPSv2's own script reads JPEG files in mixed precision",
        }  # fmt: skip

    def results(self) -> dict[str, dict[str, Any]]:
        """``hpsv2``, the mean over the styles, and ``hpsv2/<style>`` of each. Collective."""
        overall = self.result()
        return self.with_parts(overall, self._style_results if len(self._style_results) > 1 else {}, "styles")


def _number(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None
