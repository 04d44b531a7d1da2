"""Image and text features of a CLIP folder: the default eyes of ``frechet_distance`` and ``clip_score``.

Pictures are judged as the 8-bit files a user would save, so that a folder of PNGs and the tensors they were
saved from score the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.transforms.v2.functional import InterpolationMode
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from callbacks.metrics.extractors import TextImageExtractor
from common.errors import UserError, first_line
from common.hashing import hash_folder, to_uint8
from lightning_modules.networks.loading import no_progress_bars

# PIL's resampling numbers, which image processors store.
_INTERPOLATION = {
    0: InterpolationMode.NEAREST_EXACT,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}


class ClipPreprocessing:
    """What the folder's ``AutoImageProcessor`` does (resize, crop, rescale, normalise), on tensors.

    Args:
        settings: the processor's ``to_dict()``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        resample = int(settings.get("resample", 3))
        if resample not in _INTERPOLATION:
            raise UserError(
                f"the image processor asks for resampling filter {resample}; known: {sorted(_INTERPOLATION)}"
            )
        self.interpolation = _INTERPOLATION[resample]
        self.size = dict(settings["size"]) if settings.get("do_resize", True) else None
        crop = settings.get("crop_size") if settings.get("do_center_crop", False) else None
        self.crop = (crop["height"], crop["width"]) if crop else None
        self.scale = float(settings["rescale_factor"]) if settings.get("do_rescale", True) else 1.0
        normalize = settings.get("do_normalize", True)
        self.mean = torch.tensor(settings["image_mean"] if normalize else [0.0, 0.0, 0.0])[:, None, None]
        self.std = torch.tensor(settings["image_std"] if normalize else [1.0, 1.0, 1.0])[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] to the model's pixel values [B, 3, h, w]."""
        pixels = to_uint8(images)
        target = self._target(pixels.shape[-2], pixels.shape[-1])
        if target != tuple(pixels.shape[-2:]):
            pixels = TF.resize(pixels, list(target), interpolation=self.interpolation, antialias=True)
        if self.crop is not None and self.crop != tuple(pixels.shape[-2:]):
            pixels = TF.center_crop(pixels, list(self.crop))
        values = pixels.float() * self.scale
        return (values - self.mean.to(values.device)) / self.std.to(values.device)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if "shortest_edge" in self.size:
            edge = int(self.size["shortest_edge"])
            if height <= width:
                return edge, int(edge * width / height)
            return int(edge * height / width), edge
        return int(self.size["height"]), int(self.size["width"])

    def describe(self) -> str:
        """One line for manifests, e.g. ``8-bit, resize shortest_edge=64 bicubic, crop 64x64``."""
        parts = ["8-bit"]
        if self.size is not None:
            sizes = " ".join(
                f"{name}={value}" for name, value in sorted(self.size.items()) if value is not None
            )
            parts.append(f"resize {sizes} {self.interpolation.value}")
        if self.crop is not None:
            parts.append(f"centre crop {self.crop[0]}x{self.crop[1]}")
        return ", ".join(parts)


class ClipExtractor(TextImageExtractor):
    """A frozen CLIP in transformers' format; features are projected and not normalised.

    Args:
        path: a folder that ``CLIPModel``, ``AutoTokenizer`` and ``AutoImageProcessor`` load.

    Raises:
        UserError: the folder is missing, is not such a folder, is damaged or lacks weights.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.name = self.path.name
        if not (self.path / "config.json").is_file():
            raise UserError(
                f"no CLIP model in {str(path)!r} (config.json is missing): give a folder that CLIPModel loads"
            )
        try:
            with no_progress_bars():
                model, info = CLIPModel.from_pretrained(
                    self.path, local_files_only=True, output_loading_info=True
                )
                self.tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
                processor = AutoImageProcessor.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, KeyError …
            raise UserError(
                f"{str(path)!r} can't be loaded as a CLIP model: {first_line(error)} "
                "Make or fetch the folder again."
            ) from error
        if missing := sorted(info["missing_keys"]):  # they would be random numbers, and so would the scores
            raise UserError(
                f"the CLIP model in {str(path)!r} lacks the weights {missing[0]} ({len(missing)} missing): "
                "make or fetch the folder again"
            )
        # transformers keeps a half-precision folder in half precision; features are wanted in fp32.
        self.model = model.float().eval().requires_grad_(False)
        self.preprocessing = ClipPreprocessing(processor.to_dict())
        self.width = int(self.model.config.projection_dim)
        self.max_length = min(
            int(self.tokenizer.model_max_length), int(self.model.config.text_config.max_position_embeddings)
        )
        self.content_hash = hash_folder(self.path)

    def _image_features(self, images: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=self.preprocessing(images.to(self.device))))

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Projected features [B, D], fp32, not normalised. Longer texts are cut and keep their end token."""
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        with torch.autocast(self.device.type, enabled=False):
            return _pooled(
                self.model.get_text_features(
                    input_ids=tokens.input_ids.to(self.device),
                    attention_mask=tokens.attention_mask.to(self.device),
                )
            )

    def count_truncated(self, texts: list[str]) -> int:
        """How many of the texts are longer than ``max_length`` tokens."""
        tokens = self.tokenizer(texts, truncation=False, verbose=False).input_ids
        return sum(len(ids) > self.max_length for ids in tokens)


@dataclass(frozen=True)
class ClipFolder:
    """A CLIP folder as a specification: equal folders are one network."""

    path: Path

    def load(self) -> ClipExtractor:
        """Load it, on the CPU."""
        return ClipExtractor(self.path)


def _pooled(output: Any) -> Tensor:
    """transformers < 5 returns the features, 5 an output whose ``pooler_output`` they are."""
    return output if isinstance(output, Tensor) else output.pooler_output
