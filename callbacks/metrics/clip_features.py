"""CLIPs as the eyes of ``frechet_distance``, ``clip_score`` and others, transformers' and open_clip's.

Pictures are judged as the 8-bit files a user would save, so that a folder of PNGs and the tensors they were
saved from score the same.
"""

import hashlib
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from callbacks.metrics.extractors import ExtractorSpec, FeatureExtractor, in_threads
from common.errors import UserError
from common.hashing import hash_file, hash_folder, hash_texts, to_uint8
from lightning_modules.networks.clip_models import SCHEMES, Clip, OpenClip, TransformersClip
from lightning_modules.networks.model_names import asset_path

# Pillow's numbers, which image processors store.
_RESAMPLING = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class TextImageExtractor(FeatureExtractor):
    """A CLIP: features of texts too, in the space of its image features; projected, not normalised.

    Args:
        clip: the network. The others as for ``FeatureExtractor``.
    """

    def __init__(self, clip: Clip, name: str, path: Path, content_hash: str, preprocessing: str) -> None:
        super().__init__(name, path, content_hash, preprocessing)
        self.clip, self.model, self.max_length = clip, clip.model, clip.max_length
        self.width = self.text_features(["a"]).shape[1]

    @abstractmethod
    def pixels(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] to what the network reads, [B, 3, h, w]."""

    def _image_features(self, images: Tensor) -> Tensor:
        return self.clip.encode_pixels(self.pixels(images).to(self.device))

    def text_features(self, texts: list[str]) -> Tensor:
        """Features [B, D], fp32, not normalised. Longer texts are cut and keep their end token."""
        with torch.autocast(self.device.type, enabled=False):
            return self.clip.encode_texts(texts)

    def count_truncated(self, texts: list[str]) -> int:
        """How many of the texts are longer than ``max_length`` tokens."""
        return sum(length > self.max_length for length in self.clip.lengths(texts))


class ClipExtractor(TextImageExtractor):
    """A CLIP in transformers' format.

    Args:
        path: a folder that ``CLIPModel``, ``AutoTokenizer`` and ``AutoImageProcessor`` load.
        processor: the folder of the latter two; None: the same.

    Raises:
        UserError: the folder is missing, is not such a folder, is damaged or lacks weights.
    """

    clip: TransformersClip

    def __init__(self, path: str | Path, processor: Path | None = None) -> None:
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"no CLIP model in {str(path)!r} (config.json is missing): give a folder that CLIPModel loads"
            )
        clip = TransformersClip(str(folder), None if processor is None else str(processor))
        content = hash_folder(folder)
        if processor is not None:
            content = hash_texts([content, hash_folder(processor)])
        super().__init__(clip, folder.name, folder, content, _in_words(clip.processor))

    def pixels(self, images: Tensor) -> Tensor:
        return processed(self.clip.processor, images.to(self.device))


def processed(processor: Any, images: Tensor) -> Tensor:
    """Pixel values [B, 3, h, w] that transformers' image processor makes of the 8-bit pictures."""
    pixels: Tensor = processor(
        to_uint8(images), input_data_format="channels_first", disable_grouping=False, return_tensors="pt"
    )["pixel_values"]
    return pixels.float()


def _in_words(processor: Any) -> str:
    """One line for manifests, e.g. ``8-bit, resize shortest_edge=64 bicubic, centre crop 64x64``."""
    settings, parts = processor.to_dict(), ["8-bit"]
    if settings.get("do_resize", True):
        sizes = [f"{name}={value}" for name, value in sorted(settings["size"].items()) if value is not None]
        parts.append(f"resize {' '.join(sizes)} {_RESAMPLING[int(settings['resample'])]}")
    if settings.get("do_center_crop", False):
        parts.append(f"centre crop {settings['crop_size']['height']}x{settings['crop_size']['width']}")
    return ", ".join(parts)


class OpenClipExtractor(TextImageExtractor):
    """A network of open_clip with its own transform, applied to 8-bit pictures one at a time.

    Args:
        model: architecture known to open_clip, or ``local-dir:<folder>``, or ``hf-hub:<owner>/<name>``.
        pretrained: open_clip's tag of the weights, or their file; None with a folder or a hub name.

    Raises:
        UserError: open_clip is not installed, or it can't load the model.
    """

    clip: OpenClip

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        clip = OpenClip(model, pretrained)
        path = Path(pretrained or model.split(":", 1)[-1])
        if model.startswith(SCHEMES[0]):
            weights = hash_folder(model.removeprefix(SCHEMES[0]))
        elif path.is_file():
            weights = f"{model} {hash_file(path)}"
        else:  # a tag names weights that never change
            weights = f"{model} {pretrained}"
        content = hashlib.sha256(f"open_clip {weights}".encode()).hexdigest()
        size, mode, filter_ = (clip.settings[key] for key in ("size", "resize_mode", "interpolation"))
        words = f"8-bit, open_clip resize {mode} to {size} {filter_}"
        super().__init__(clip, clip.name, path, content, words)

    def pixels(self, images: Tensor) -> Tensor:
        values = list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
        return torch.stack(in_threads(lambda pixels: self.clip.transform(Image.fromarray(pixels)), values))


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
        return ClipExtractor, asset_path(model)
    file = None if pretrained is None else asset_path(pretrained)
    return OpenClipExtractor, model, str(file) if file is not None and file.is_file() else pretrained
