"""The network of HPSv2: open_clip's ViT-H-14 with the weights of Wu et al. 2023, and its preprocessing."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.transforms.v2.functional import InterpolationMode

from callbacks.metrics.extractors import file_hash
from callbacks.metrics.open_clip_features import OpenClipExtractor, import_open_clip, open_clip_parts
from common.errors import UserError
from common.hashing import to_uint8

REPOSITORY = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


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
        """One line for manifests."""
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
        if self.version not in FILES:
            raise UserError(
                f"hpsv2: version {self.version!r} is unknown: choose one of {', '.join(FILES)} (their scores "
                "can't be compared with each other)"
            )

    def load(self) -> OpenClipExtractor:
        """Find and load it, on the CPU.

        Raises:
            UserError: open_clip is not installed, the checkpoint is missing or no such checkpoint.
        """
        constants = import_open_clip().constants
        file = find_checkpoint(self.version, self.checkpoint)
        model, _, tokenizer = open_clip_parts(self.architecture, str(file))
        size = model.visual.image_size  # type: ignore[union-attr]
        preprocessing = LongestSidePreprocessing(
            int(size[0] if isinstance(size, tuple | list) else size),  # type: ignore[arg-type]
            constants.OPENAI_DATASET_MEAN,
            constants.OPENAI_DATASET_STD,
        )
        name = f"HPS{self.version} (open_clip {self.architecture})"
        content = hashlib.sha256(f"hps {self.architecture} {file_hash(file)}".encode()).hexdigest()
        return OpenClipExtractor(model, tokenizer, preprocessing, name, file, content)


def find_checkpoint(version: str, path: Path | None = None) -> Path:
    """The checkpoint's file: the given one, else that in HPSv2's folder or the hub's cache.

    Raises:
        UserError: it is in none of these places; they are named, and how to get it.
    """
    name = FILES[version]
    folder = Path(os.environ.get("HPS_ROOT") or Path.home() / ".cache" / "hpsv2")
    if path is not None:
        places = [path / name if path.is_dir() else path]
    else:
        hub = try_to_load_from_cache(REPOSITORY, name)
        places = [folder / name, *([Path(hub)] if isinstance(hub, str) else [])]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        looked = str(places[0]) + ("" if path is not None else f" and the hub's cache of {REPOSITORY}")
        raise UserError(
            f"hpsv2 {version}: no checkpoint; looked for {looked}. Get it with "
            f"`hf download {REPOSITORY} {name} --local-dir {folder}`, or name its file as `checkpoint`"
        )
    return found
