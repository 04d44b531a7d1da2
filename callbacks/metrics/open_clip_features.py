"""Image and text features of open_clip's models, exactly as open_clip makes them from saved pictures."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from callbacks.metrics.clip_features import ClipFolder
from callbacks.metrics.extractors import (
    ExtractorSpec,
    Preprocessing,
    TextImageExtractor,
    file_hash,
    in_threads,
)
from common.errors import UserError, first_line
from common.hashing import hash_folder, to_uint8
from lightning_modules.networks.loading import asset_path

LOCAL = "local-dir:"
_SCHEMES = (LOCAL, "hf-hub:")


class OpenClipPreprocessing:
    """An open_clip transform, applied to 8-bit pictures one at a time.

    Args:
        transform: PIL picture to pixel values [3, h, w].
        settings: open_clip's preprocessing settings of the model.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], settings: dict[str, Any]) -> None:
        self.transform, self.settings = transform, settings

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] to the model's pixel values [B, 3, h, w]."""
        pixels = list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
        return torch.stack(in_threads(lambda values: self.transform(Image.fromarray(values)), pixels))

    def describe(self) -> str:
        """One line for manifests."""
        size, mode = self.settings["size"], self.settings["resize_mode"]
        return f"8-bit, open_clip resize {mode} to {size} {self.settings['interpolation']}"


class OpenClipExtractor(TextImageExtractor):
    """A frozen open_clip model; features are projected and not normalised.

    Args:
        model, tokenizer: as open_clip makes them.
        preprocessing: pictures to pixel values.
        name: of architecture and weights. ``path``: where the weights are; ``content_hash``: what they are.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        preprocessing: Preprocessing,
        name: str,
        path: Path,
        content_hash: str,
    ) -> None:
        super().__init__()
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer, self.preprocessing = tokenizer, preprocessing
        self.name, self.path, self.content_hash = name, path, content_hash
        self.max_length = int(tokenizer.context_length)
        self.width = self.text_features(["a"]).shape[1]

    def _image_features(self, images: Tensor) -> Tensor:
        return self.model.encode_image(self.preprocessing(images).to(self.device))

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Projected features [B, D], fp32, not normalised. Longer texts are cut and keep their end token."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model.encode_text(self.tokenizer(texts).to(self.device))

    def count_truncated(self, texts: list[str]) -> int:
        """How many of the texts are longer than ``max_length`` tokens."""
        if hasattr(self.tokenizer, "encode"):  # open_clip's own tokenizer: without the start and end tokens
            lengths = [len(self.tokenizer.encode(text)) + 2 for text in texts]
        else:  # a transformers tokenizer in open_clip's wrapping
            cleaned = [self.tokenizer.clean_fn(text) for text in texts]
            lengths = [len(ids) for ids in self.tokenizer.tokenizer(cleaned, truncation=False).input_ids]
        return sum(length > self.max_length for length in lengths)


@dataclass(frozen=True)
class OpenClipNetwork:
    """An open_clip model as a specification.

    Attributes:
        model: architecture known to open_clip, or ``local-dir:<folder>``, or ``hf-hub:<owner>/<name>``.
        pretrained: open_clip's tag of the weights, or their file; None with a folder or a hub name.
    """

    model: str
    pretrained: str | None = None

    def load(self) -> OpenClipExtractor:
        """Load it, on the CPU.

        Raises:
            UserError: open_clip is not installed, or it can't load the model.
        """
        model, transform, tokenizer = open_clip_parts(self.model, self.pretrained)
        settings = import_open_clip().get_model_preprocess_cfg(model)
        return OpenClipExtractor(
            model,
            tokenizer,
            OpenClipPreprocessing(transform, settings),
            " ".join(part for part in ("open_clip", self.model, self.pretrained) if part),
            Path(self.pretrained or self.model.split(":", 1)[-1]),
            self._content_hash(),
        )

    def _content_hash(self) -> str:
        if self.model.startswith(LOCAL):
            weights = hash_folder(self.model.removeprefix(LOCAL))
        elif self.pretrained is not None and Path(self.pretrained).is_file():
            weights = f"{self.model} {file_hash(Path(self.pretrained))}"
        else:  # a tag names weights that never change
            weights = f"{self.model} {self.pretrained}"
        return hashlib.sha256(f"open_clip {weights}".encode()).hexdigest()


def clip_network(model: str, pretrained: str | None = None) -> ExtractorSpec:
    """What a metric's settings name: an open_clip model, or a CLIP folder in transformers' format.

    Args:
        model: open_clip's name with ``pretrained``, ``local-dir:<folder>``, ``hf-hub:<name>``; else a folder.
        pretrained: open_clip's tag of the weights, or their file.
    """
    if pretrained is None and not model.startswith(_SCHEMES):
        return ClipFolder(asset_path(model))
    file = None if pretrained is None else asset_path(pretrained)
    return OpenClipNetwork(model, str(file) if file is not None and file.is_file() else pretrained)


def open_clip_parts(model: str, pretrained: str | None) -> tuple[torch.nn.Module, Any, Any]:
    """Model with its weights, its transform for evaluation, and its tokenizer, on the CPU in fp32.

    Raises:
        UserError: open_clip is not installed, or it can't load them.
    """
    open_clip = import_open_clip()
    try:
        # OpenAI's weights were trained with another GELU, which the library only warns about.
        weights = open_clip.get_pretrained_cfg(model, pretrained or "")
        network, transform = open_clip.create_model_from_pretrained(
            model, pretrained=pretrained, force_quick_gelu=bool(weights.get("quick_gelu", False))
        )
        return network, transform, open_clip.get_tokenizer(model)
    except Exception as error:  # RuntimeError, OSError, KeyError, UnpicklingError, hub errors …
        raise UserError(
            f"open_clip can't load the model {model!r} with the weights {pretrained!r}: {first_line(error)} "
            "Check both names (`open_clip.list_pretrained()`), or fetch the file of weights and name it"
        ) from error


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
