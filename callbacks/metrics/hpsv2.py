"""HPSv2: how much people would like a picture for its prompt, as a CLIP tuned on their choices says.

Wu et al. 2023 (arXiv 2306.09341); the benchmark has four styles of 800 prompts.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_features import TextImageExtractor
from callbacks.metrics.clip_score import cosines, text_extractor
from common.errors import UserError
from common.hashing import hash_file, to_uint8
from lightning_modules.networks.clip_models import HPS_FILES, HPS_REPOSITORY, OpenClip
from lightning_modules.networks.model_names import asset_path

TENTHS = 10
"""The spread is the standard deviation over the means of this many consecutive parts of each style."""


class LongestSidePreprocessing:
    """Resize the longest side, centre on black, normalise: on pictures in [0, 1], not on 8-bit ones.

    Args:
        size: side of the square that the network reads.
        mean, std: of the three channels.
    """

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.size = size
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] to pixel values [B, 3, size, size]."""
        values = to_uint8(images).float() / 255
        height, width = values.shape[-2:]
        scale = self.size / max(height, width)
        if scale != 1:
            height, width = round(height * scale), round(width * scale)
            values = TF.resize(values, [height, width], InterpolationMode.BICUBIC, antialias=True)
        left, top = (self.size - width) // 2, (self.size - height) // 2
        padding = [left, top, self.size - width - left, self.size - height - top]
        values = TF.pad(values, padding, fill=0)
        return (values - self.mean.to(values.device)) / self.std.to(values.device)

    def describe(self) -> str:
        return f"8-bit in memory (no JPEG), longest side to {self.size} by antialiased bicubic, padded"


@dataclass(frozen=True)
class HPSNetwork:
    """The network of HPSv2 as a specification.

    Attributes:
        version: "v2.0" or "v2.1".
        checkpoint: its file, or a folder that holds it; None: HPSv2's folder, or the hub's cache.
        architecture: open_clip's name.
    """

    version: str
    checkpoint: Path | None = None
    architecture: str = "ViT-H-14"

    def __post_init__(self) -> None:
        if self.version not in HPS_FILES:
            raise UserError(
                f"hpsv2: version {self.version!r} is unknown: choose one of {', '.join(HPS_FILES)} (their "
                "scores can't be compared with each other)"
            )

    def load(self) -> TextImageExtractor:
        """Find and load it, on the CPU.

        Raises:
            UserError: open_clip is not installed, the checkpoint is missing or no such checkpoint.
        """
        file = find_checkpoint(self.version, self.checkpoint)
        clip = OpenClip(self.architecture, str(file))
        size, mean, std = (clip.settings[name] for name in ("size", "mean", "std"))
        preprocessing = LongestSidePreprocessing(size if isinstance(size, int) else size[0], mean, std)
        name = f"HPS{self.version} (open_clip {self.architecture})"
        content = hashlib.sha256(f"hps {self.architecture} {hash_file(file)}".encode()).hexdigest()
        return TextImageExtractor(clip, preprocessing, name, file, content)


def find_checkpoint(version: str, path: Path | None = None) -> Path:
    """The checkpoint's file: the given one, else that in HPSv2's folder or the hub's cache.

    Raises:
        UserError: it is in none of these places; they are named, and how to get it.
    """
    name = HPS_FILES[version]
    folder = Path(os.environ.get("HPS_ROOT") or Path.home() / ".cache" / "hpsv2")
    if path is not None:
        places = [path / name if path.is_dir() else path]
    else:
        hub = try_to_load_from_cache(HPS_REPOSITORY, name)
        places = [folder / name, *([Path(hub)] if isinstance(hub, str) else [])]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        looked = str(places[0]) + ("" if path is not None else f" and the hub's cache of {HPS_REPOSITORY}")
        raise UserError(
            f"hpsv2 {version}: no checkpoint; looked for {looked}. Get it with "
            f"`hf download {HPS_REPOSITORY} {name} --local-dir {folder}`, or name its file as `checkpoint`"
        )
    return found


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
