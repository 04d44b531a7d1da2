"""CLIPs as the eyes of ``frechet_distance``, ``clip_score`` and others, transformers' and open_clip's.

Pictures are judged as the 8-bit files a user would save, so that a folder of PNGs and the tensors they were
saved from score the same.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from callbacks.metrics.extractors import (
    ExtractorSpec,
    FeatureExtractor,
    Preprocessing,
    in_threads,
)
from common.errors import UserError
from common.hashing import hash_file, hash_folder, to_uint8
from lightning_modules.networks.clip_models import SCHEMES, Clip, OpenClip, TransformersClip
from lightning_modules.networks.model_names import asset_path

# Pillow's numbers, which image processors store.
_RESAMPLING = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class TextImageExtractor(FeatureExtractor):
    """A CLIP: features of texts too, in the space of its image features; projected, not normalised.

    Args:
        clip: the network.
        preprocessing: pictures to pixel values.
        name: of architecture and weights. ``path``: where the weights are; ``content_hash``: what they are.
    """

    def __init__(
        self, clip: Clip, preprocessing: Preprocessing, name: str, path: Path, content_hash: str
    ) -> None:
        super().__init__()
        self.clip, self.model, self.preprocessing = clip, clip.model, preprocessing
        self.name, self.path, self.content_hash = name, path, content_hash
        self.max_length = clip.max_length
        self.width = self.text_features(["a"]).shape[1]

    def _image_features(self, images: Tensor) -> Tensor:
        return self.clip.encode_pixels(self.preprocessing(images).to(self.device))

    def text_features(self, texts: list[str]) -> Tensor:
        """Features [B, D], fp32, not normalised. Longer texts are cut and keep their end token."""
        with torch.autocast(self.device.type, enabled=False):
            return self.clip.encode_texts(texts)

    def count_truncated(self, texts: list[str]) -> int:
        """How many of the texts are longer than ``max_length`` tokens."""
        return sum(length > self.max_length for length in self.clip.lengths(texts))


class ClipPreprocessing:
    """A folder's image processor (resize, crop, rescale, normalise), on 8-bit pictures.

    Args:
        processor: transformers' ``AutoImageProcessor``.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] to the model's pixel values [B, 3, h, w]."""
        pixels = self.processor(
            to_uint8(images), input_data_format="channels_first", disable_grouping=False, return_tensors="pt"
        )["pixel_values"]
        return pixels.float()

    def describe(self) -> str:
        """One line for manifests, e.g. ``8-bit, resize shortest_edge=64 bicubic, centre crop 64x64``."""
        settings, parts = self.processor.to_dict(), ["8-bit"]
        if settings.get("do_resize", True):
            sizes = [
                f"{name}={value}" for name, value in sorted(settings["size"].items()) if value is not None
            ]
            parts.append(f"resize {' '.join(sizes)} {_RESAMPLING[int(settings['resample'])]}")
        if settings.get("do_center_crop", False):
            parts.append(f"centre crop {settings['crop_size']['height']}x{settings['crop_size']['width']}")
        return ", ".join(parts)


class ClipExtractor(TextImageExtractor):
    """A CLIP in transformers' format.

    Args:
        path: a folder that ``CLIPModel``, ``AutoTokenizer`` and ``AutoImageProcessor`` load.

    Raises:
        UserError: the folder is missing, is not such a folder, is damaged or lacks weights.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"no CLIP model in {str(path)!r} (config.json is missing): give a folder that CLIPModel loads"
            )
        clip = TransformersClip(str(folder))
        super().__init__(clip, ClipPreprocessing(clip.processor), folder.name, folder, hash_folder(folder))

    def _image_features(self, images: Tensor) -> Tensor:
        return super()._image_features(images.to(self.device))


@dataclass(frozen=True)
class ClipFolder:
    """A CLIP folder as a specification: equal folders are one network."""

    path: Path

    def load(self) -> ClipExtractor:
        """Load it, on the CPU."""
        return ClipExtractor(self.path)


class OpenClipPreprocessing:
    """An open_clip network's own transform, applied to 8-bit pictures one at a time."""

    def __init__(self, clip: OpenClip) -> None:
        self.transform, self.settings = clip.transform, clip.settings

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] to the model's pixel values [B, 3, h, w]."""
        pixels = list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
        return torch.stack(in_threads(lambda values: self.transform(Image.fromarray(values)), pixels))

    def describe(self) -> str:
        """One line for manifests."""
        size, mode = self.settings["size"], self.settings["resize_mode"]
        return f"8-bit, open_clip resize {mode} to {size} {self.settings['interpolation']}"


@dataclass(frozen=True)
class OpenClipNetwork:
    """An open_clip model as a specification.

    Attributes:
        model: architecture known to open_clip, or ``local-dir:<folder>``, or ``hf-hub:<owner>/<name>``.
        pretrained: open_clip's tag of the weights, or their file; None with a folder or a hub name.
    """

    model: str
    pretrained: str | None = None

    def load(self) -> TextImageExtractor:
        """Load it, on the CPU.

        Raises:
            UserError: open_clip is not installed, or it can't load the model.
        """
        clip = OpenClip(self.model, self.pretrained)
        path = Path(self.pretrained or self.model.split(":", 1)[-1])
        if self.model.startswith(SCHEMES[0]):
            weights = hash_folder(self.model.removeprefix(SCHEMES[0]))
        elif path.is_file():
            weights = f"{self.model} {hash_file(path)}"
        else:  # a tag names weights that never change
            weights = f"{self.model} {self.pretrained}"
        content = hashlib.sha256(f"open_clip {weights}".encode()).hexdigest()
        return TextImageExtractor(clip, OpenClipPreprocessing(clip), clip.name, path, content)


def clip_network(model: str | None, pretrained: str | None = None) -> ExtractorSpec | None:
    """What a metric's settings name: an open_clip model, or a CLIP folder in transformers' format.

    Args:
        model: open_clip's name with ``pretrained``, ``local-dir:<folder>``, ``hf-hub:<name>``; else a folder;
            None: no network of its own.
        pretrained: open_clip's tag of the weights, or their file.
    """
    if model is None:
        return None
    if pretrained is None and not model.startswith(SCHEMES):
        return ClipFolder(asset_path(model))
    file = None if pretrained is None else asset_path(pretrained)
    return OpenClipNetwork(model, str(file) if file is not None and file.is_file() else pretrained)
