"""CLIPs in transformers' format and of open_clip: metrics score with them, image losses learn from them.

Gradients reach the pictures through `Clip.image_features`. Metrics put the 8-bit pixels of saved pictures
through the network instead (`encode_pixels`), so that their numbers are those of a folder of PNG files.
"""

import warnings
from abc import ABC, abstractmethod
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF
from transformers import AutoImageProcessor, AutoTokenizer, CLIPImageProcessor, CLIPModel

from common.errors import UserError, first_line
from common.files import missing_advice
from lightning_modules.diffusion.broadcast import at_least_float32
from lightning_modules.networks.loading import no_progress_bars, read_json
from lightning_modules.networks.model_names import asset_path, may_be_hub_name, model_name

OPEN_CLIP = "open_clip:"
SCHEMES = ("local-dir:", "hf-hub:")
"""Prefixes of open_clip's names that bring their weights."""
_FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers of resampling filters that have a differentiable form; Lanczos (1) has none."""

HPS_REPOSITORY = "xswu/HPSv2"
HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
"""Weights of the hub's HPSv2 by version."""


class Clip(nn.Module, ABC):
    """A frozen CLIP in float32; features are projected and not normalised.

    Attributes:
        name: for messages.
        model, tokenizer: as the library makes them.
        processor: transformers' image processor that prepares pictures for it.
        max_length: longest text in tokens, start and end included.
        truncated_prompts: texts so far that `text_features` has cut.
    """

    processor: Any

    def __init__(self, name: str, model: nn.Module, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.name, self.tokenizer, self.max_length = name, tokenizer, max_length
        self.model = model.float().requires_grad_(False).eval()
        self.truncated_prompts = 0

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def image_features(self, images: Tensor) -> Tensor:
        """Features [B, D] of pictures [B, 3, H, W] in [0, 1]; the gradient flows to the pictures."""
        pixels = differentiable_pixels(self.processor, images)
        return self.encode_pixels(pixels.to(next(self.model.parameters()).dtype))

    def text_features(self, texts: list[str]) -> Tensor:
        """Features [B, D]; longer texts are cut, counted, and the first is named in a warning."""
        long = [text for text, n in zip(texts, self.lengths(texts), strict=True) if n > self.max_length]
        if long and not self.truncated_prompts:
            warnings.warn(
                f"A prompt has more than the {self.max_length} tokens that {self.name} takes, and is cut to "
                f"them (told once; the log counts them): {long[0]!r}",
                stacklevel=2,
            )
        self.truncated_prompts += len(long)
        return self.encode_texts(texts)

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Features [B, D] of prepared pixels [B, 3, h, w]."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Features [B, D], without gradient. Longer texts are cut and keep their end token."""

    @abstractmethod
    def lengths(self, texts: list[str]) -> list[int]:
        """Number of tokens of each text, start and end included, before any cut."""


class TransformersClip(Clip):
    """A folder (or hub name) that CLIPModel, AutoTokenizer and AutoImageProcessor load.

    Args:
        path: the folder.
        processor: folder of tokenizer and image processor; None: the same.

    Raises:
        UserError: it is missing, damaged, no CLIP, or a CLIP without an image tower.
    """

    model: CLIPModel

    def __init__(self, path: str, processor: str | None = None) -> None:
        wanted = model_name(path)
        folder = asset_path(wanted.name)
        source, version = str(folder), {"revision": wanted.revision or "main", "trust_remote_code": False}
        if folder.is_dir():
            _check_towers(path, read_json(folder / "config.json"))
        elif not may_be_hub_name(wanted.name):
            raise UserError(
                f"the CLIP {path} can't be loaded: there is no such folder. {missing_advice(wanted.name)}"
            )
        try:
            with no_progress_bars():
                model, info = CLIPModel.from_pretrained(source, output_loading_info=True, **wanted.options)
                tokenizer = AutoTokenizer.from_pretrained(processor or source, **version)
                images = AutoImageProcessor.from_pretrained(processor or source, **version)
        except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, KeyError …
            raise UserError(
                f"the CLIP {path} can't be loaded: {first_line(error)} Give a folder of CLIPModel with its "
                "tokenizer and image processor, or a network of open_clip."
            ) from error
        if missing := sorted(info["missing_keys"]):  # they would be random numbers, and so would the scores
            raise UserError(
                f"the CLIP {path} lacks the weights {missing[0]} ({len(missing)} missing): make or fetch it "
                "again"
            )
        limits = int(tokenizer.model_max_length), int(model.config.text_config.max_position_embeddings)
        super().__init__(path, model, tokenizer, min(limits))
        self.processor = images

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        features: Tensor = self.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        return features

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, truncation=False, verbose=False).input_ids]


class OpenClip(Clip):
    """A network of the open_clip library.

    Args:
        architecture: e.g. ViT-B-32; or local-dir:… or hf-hub:…, which bring their weights.
        pretrained: tag or file of the weights.

    Attributes:
        transform: open_clip's own preparation of a Pillow picture.
        settings: what that does, in open_clip's words.

    Raises:
        UserError: open_clip is not installed, knows no such network, or can't read the weights.
    """

    model: Any

    def __init__(self, architecture: str, pretrained: str | None = None) -> None:
        library = import_open_clip()
        try:
            # OpenAI's weights were trained with another GELU, which the library only warns about.
            trained = library.get_pretrained_cfg(architecture, pretrained or "")
            model, self_transform = library.create_model_from_pretrained(
                architecture,
                pretrained=None if pretrained is None else str(asset_path(pretrained)),
                force_quick_gelu=bool(trained.get("quick_gelu", False)),
            )
            tokenizer = library.get_tokenizer(architecture)
        except Exception as error:  # RuntimeError, OSError, KeyError, UnpicklingError, hub errors …
            raise UserError(
                f"open_clip can't load the model {architecture!r} with the weights {pretrained!r}: "
                f"{first_line(error)} Check both names (`open_clip.list_pretrained()`), or fetch the file of "
                "weights and name it"
            ) from error
        name = " ".join(part for part in ("open_clip", architecture, pretrained) if part)
        super().__init__(name, model, tokenizer, int(tokenizer.context_length))
        self.transform, self.settings = self_transform, library.get_model_preprocess_cfg(model)

    @cached_property
    def processor(self) -> CLIPImageProcessor:
        """The same preparation as an image processor.

        Raises:
            UserError: it has none.
        """
        size, mode = self.settings["size"], self.settings.get("resize_mode", "shortest")
        height, width = (size, size) if isinstance(size, int) else size
        interpolation = self.settings.get("interpolation", "bicubic")
        if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
            raise UserError(f"{self.name} resizes pictures by {mode!r} to {size}, which is not supported")
        whole = {"height": height, "width": width}
        return CLIPImageProcessor(
            size={"shortest_edge": height} if mode == "shortest" else whole,
            crop_size=whole,
            resample=_FILTERS["bicubic" if interpolation == "random" else interpolation],
            image_mean=self.settings["mean"],
            image_std=self.settings["std"],
        )

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels)
        return features

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        features: Tensor = self.model.encode_text(self.tokenizer(texts).to(self.device))
        return features

    def lengths(self, texts: list[str]) -> list[int]:
        if hasattr(self.tokenizer, "encode"):  # open_clip's own tokenizer: without the start and end tokens
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        # a transformers tokenizer in open_clip's wrapping
        cleaned = [self.tokenizer.clean_fn(text) for text in texts]
        return [len(ids) for ids in self.tokenizer.tokenizer(cleaned, truncation=False).input_ids]


def differentiable_pixels(processor: Any, images: Tensor) -> Tensor:
    """What an image processor makes of pictures, with gradients (so without the 8-bit rounding of a file).

    Args:
        processor: transformers' image processor; antialiased resizing, centre crop, normalisation.
        images: [B, 3, H, W] in [0, 1].

    Returns:
        [B, 3, h, w], in at least float32.
    """
    pixels = processor(
        at_least_float32(images), do_rescale=False, do_normalize=False, input_data_format="channels_first",
        disable_grouping=False, return_tensors="pt",
    )["pixel_values"]  # fmt: skip
    # cubic filters overshoot; 8-bit pictures are cut off in the same way
    values = pixels.clamp(0, 1) * (255 * float(processor.rescale_factor) if processor.do_rescale else 255.0)
    if not processor.do_normalize:
        return values
    return TF.normalize(values, list(processor.image_mean), list(processor.image_std))


def require_differentiable(processor: Any) -> None:
    """Refuse an image processor whose resizing has no gradient.

    Raises:
        UserError: it asks for another filter than nearest, bilinear or bicubic.
    """
    if processor.do_resize and int(processor.resample) not in _FILTERS.values():
        raise UserError(
            f"the image processor resamples by Pillow's filter {int(processor.resample)}, which is not "
            "differentiable here: set resample to 3 (bicubic) in preprocessor_config.json"
        )


def load_clip(spec: str) -> Clip:
    """The CLIP that a setting of a loss names: a transformers folder or hub name, or
    ``open_clip:NAME/PRETRAINED``, where PRETRAINED is a tag of that library or a file.

    Raises:
        UserError: it can't be loaded.
    """
    if not spec.startswith(OPEN_CLIP):
        return TransformersClip(spec)
    rest = spec.removeprefix(OPEN_CLIP)
    if rest.startswith(SCHEMES):
        return OpenClip(rest)
    name, _, pretrained = rest.partition("/")
    if not name or not pretrained:
        raise UserError(f"{spec} names no weights: write {OPEN_CLIP}NAME/PRETRAINED, e.g. ViT-B-32/openai")
    return OpenClip(name, pretrained)


def import_open_clip() -> ModuleType:
    """The open_clip package, which is an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError('open_clip is not installed: pip install -e ".[openclip]"') from error
    return open_clip


def _check_towers(path: str, config: dict[str, Any]) -> None:
    absent = [tower for tower in ("vision", "text") if f"{tower}_config" not in config]
    if absent:
        kind = "image" if absent[0] == "vision" else "text"
        raise UserError(
            f"the CLIP {path} has no {kind} tower (its model_type is {config.get('model_type')!r}): give a "
            "whole CLIPModel folder, with a vision_config and a text_config in its config.json"
        )
