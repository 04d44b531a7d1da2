"""CLIPs through which gradients reach the pictures: folders of transformers, or networks of open_clip."""

import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from common.errors import UserError, first_line
from lightning_modules.image_losses.pixels import PixelProcessing, processing_of
from lightning_modules.networks.loading import no_progress_bars, read_json
from lightning_modules.networks.model_names import asset_path, may_be_hub_name, model_name

OPEN_CLIP = "open_clip:"


class DifferentiableClip(nn.Module, ABC):
    """A frozen CLIP.

    Attributes:
        model: the network.
        pixels: its image processing.
        max_length: longest text in tokens, start and end included.
        truncated_prompts: texts so far that were longer, and cut.
    """

    def __init__(self, name: str, model: nn.Module, pixels: PixelProcessing, max_length: int) -> None:
        super().__init__()
        self.name = name
        self.model = model.float().requires_grad_(False).eval()
        self.pixels = pixels
        self.max_length = max_length
        self.truncated_prompts = 0

    def image_features(self, images: Tensor) -> Tensor:
        """Features [B, D] of pictures [B, 3, H, W] in [0, 1]; the gradient flows to the pictures."""
        return self._image_features(self.pixels(images).to(next(self.model.parameters()).dtype))

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Features [B, D]; longer texts are cut, counted, and the first is named in a warning."""
        long = [text for text in texts if self._length(text) > self.max_length]
        if long and not self.truncated_prompts:
            warnings.warn(
                f"A prompt has more than the {self.max_length} tokens that {self.name} takes, and is cut to "
                f"them (told once; the log counts them): {long[0]!r}",
                stacklevel=2,
            )
        self.truncated_prompts += len(long)
        return self._text_features(texts)

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """Features [B, D] of processed pixels."""

    @abstractmethod
    def _text_features(self, texts: list[str]) -> Tensor:
        """Features [B, D] of texts, cut to `max_length` tokens."""

    @abstractmethod
    def _length(self, text: str) -> int:
        """Number of tokens, start and end included, before any cut."""


class TransformersClip(DifferentiableClip):
    """A folder (or hub name) that CLIPModel, AutoTokenizer and AutoImageProcessor load.

    Raises:
        UserError: it is missing, damaged, no CLIP, or a CLIP without an image tower.
    """

    model: CLIPModel

    def __init__(self, path: str) -> None:
        wanted = model_name(path)
        folder = asset_path(wanted.name)
        source, version = str(folder), {"revision": wanted.revision or "main"}
        if folder.is_dir():
            _check_towers(path, read_json(folder / "config.json"))
        elif not may_be_hub_name(wanted.name):
            raise UserError(f"the CLIP {path} can't be loaded: there is no such folder. Check the path.")
        try:
            with no_progress_bars():
                model, info = CLIPModel.from_pretrained(source, output_loading_info=True, **wanted.options)
                self_tokenizer = AutoTokenizer.from_pretrained(source, **version)
                processor = AutoImageProcessor.from_pretrained(source, **version)
        except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, KeyError …
            raise UserError(
                f"the CLIP {path} can't be loaded: {first_line(error)} Give a folder of CLIPModel with its "
                "tokenizer and image processor, or open_clip:NAME/PRETRAINED."
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"the CLIP {path} lacks the weights {missing[0]} ({len(missing)} missing): make or fetch it "
                "again"
            )
        limits = (int(self_tokenizer.model_max_length), int(model.config.text_config.max_position_embeddings))
        super().__init__(path, model, processing_of(processor.to_dict()), min(limits))
        self.tokenizer = self_tokenizer

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def _text_features(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        return _pooled(
            self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        )

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False).input_ids)


class OpenClip(DifferentiableClip):
    """A network of the open_clip library.

    Args:
        name: of the architecture, e.g. ViT-B-32; or hf-hub:… or local-dir:….
        pretrained: name or file of its weights; None for hf-hub and local-dir, which bring them.

    Raises:
        UserError: open_clip is not installed, knows no such network, or can't read the weights.
    """

    model: Any

    def __init__(self, name: str, pretrained: str | None) -> None:
        library = _open_clip()
        spec = f"{OPEN_CLIP}{name}" + (f"/{pretrained}" if pretrained else "")
        weights = None if pretrained is None else str(asset_path(pretrained))
        try:
            quick = _quick_gelu(library, name, pretrained)
            model = library.create_model(
                name, pretrained=weights, require_pretrained=True, force_quick_gelu=quick
            )
            tokenizer = library.get_tokenizer(name)
        except Exception as error:  # the library raises many kinds; the cause stays attached
            raise UserError(f"{spec} can't be loaded: {first_line(error)}") from error
        super().__init__(spec, model, _open_clip_pixels(library, model), int(tokenizer.context_length))
        self.tokenizer = tokenizer

    def _image_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels)
        return features

    def _text_features(self, texts: list[str]) -> Tensor:
        features: Tensor = self.model.encode_text(self.tokenizer(texts).to(self.pixels.mean.device))
        return features

    def _length(self, text: str) -> int:
        encode = getattr(self.tokenizer, "encode", None)
        if encode is not None:
            return len(encode(text)) + 2  # start and end
        return len(self.tokenizer.tokenizer(text).input_ids)


def load_clip(spec: str) -> DifferentiableClip:
    """The CLIP that a setting names: a transformers folder or hub name, or ``open_clip:NAME/PRETRAINED``.

    PRETRAINED is a tag of that library (``open_clip:ViT-B-32/openai``) or a file.

    Raises:
        UserError: it can't be loaded.
    """
    if not spec.startswith(OPEN_CLIP):
        return TransformersClip(spec)
    rest = spec.removeprefix(OPEN_CLIP)
    if rest.startswith(("hf-hub:", "local-dir:")):
        return OpenClip(rest, None)
    name, _, pretrained = rest.partition("/")
    if not name or not pretrained:
        raise UserError(f"{spec} names no weights: write {OPEN_CLIP}NAME/PRETRAINED, e.g. ViT-B-32/openai")
    return OpenClip(name, pretrained)


def _check_towers(path: str, config: dict[str, Any]) -> None:
    absent = [tower for tower in ("vision", "text") if f"{tower}_config" not in config]
    if absent:
        kind = "image" if absent[0] == "vision" else "text"
        raise UserError(
            f"the CLIP {path} has no {kind} tower (its model_type is {config.get('model_type')!r}): give a "
            "whole CLIPModel folder, with a vision_config and a text_config in its config.json"
        )


def _open_clip() -> Any:
    """The library, imported when first needed: it is optional."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError('open_clip is not installed: pip install -e ".[openclip]"') from error
    return open_clip


def _quick_gelu(library: Any, name: str, pretrained: str | None) -> bool:
    """Whether the weights of this tag were trained with QuickGELU (OpenAI's were): the library warns only."""
    settings = {} if pretrained is None else library.get_pretrained_cfg(name, pretrained)
    return bool(settings.get("quick_gelu", False))


def _open_clip_pixels(library: Any, model: nn.Module) -> PixelProcessing:
    settings = library.get_model_preprocess_cfg(model)
    size, mode = settings["size"], settings.get("resize_mode", "shortest")
    sides = (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if mode not in ("shortest", "squash") or (mode == "shortest" and sides[0] != sides[1]):
        raise UserError(
            f"the open_clip network resizes pictures by {mode!r} to {sides}, which is not supported"
        )
    interpolation = settings.get("interpolation", "bicubic")
    return PixelProcessing(
        sides[0] if mode == "shortest" else sides,
        sides,
        settings["mean"],
        settings["std"],
        "bicubic" if interpolation == "random" else interpolation,
    )


def _pooled(output: Any) -> Tensor:
    """transformers < 5 returns the features, 5 an output whose ``pooler_output`` they are."""
    return output if isinstance(output, Tensor) else output.pooler_output
