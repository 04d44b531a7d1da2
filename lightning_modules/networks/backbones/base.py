"""What a family of text-to-image models says about itself, and the parts that a model of it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from torch import nn
from transformers import CLIPTokenizer

from common.errors import UserError
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder
from lightning_modules.networks.weight_files import WeightFiles


@dataclass
class TextToImageParts:
    """What a text-to-image pipeline is made of.

    Attributes:
        backbone: the family it belongs to.
        denoiser: UNet2DConditionModel, PixArtTransformer2DModel …
        vae: autoencoder between latents and pictures.
        text_encoders, tokenizers: in the order of the backbone's names for them, without those left out.
        scheduler: the model's own; its constants are those it was trained with.
        index: content of model_index.json.
        path: the folder it was read from.
        weights: of a denoiser on the meta device, what it is to be filled from.
    """

    backbone: Backbone
    denoiser: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: SchedulerMixin
    index: dict[str, Any]
    path: str
    weights: WeightFiles | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one latent, from the network's configuration, or else the autoencoder's."""
        size = self.denoiser.config.get("sample_size") or self._side_of_vae or self.backbone.side
        assert size is not None  # `check_fit`
        height, width = (size, size) if isinstance(size, int) else size
        channels = self.denoiser.config.in_channels // self.backbone.packing**2
        return int(channels), int(height), int(width)

    @property
    def _side_of_vae(self) -> int:
        return int(self.vae.config.get("sample_size") or 0) // self.vae_factor

    @property
    def vae_factor(self) -> int:
        """Pixels per place of a latent, along a side."""
        return self.backbone.vae_factor(self.vae)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        return self.latent_shape[1] * self.vae_factor, self.latent_shape[2] * self.vae_factor

    @property
    def left_out(self) -> list[str]:
        """Optional parts that the model has not."""
        mine, index = self.backbone, self.index
        present = mine.present(index, mine.text_encoders) | mine.present(index, mine.tokenizers)
        return [name for name in mine.optional if name not in present]

    @property
    def image_tokens(self) -> int:
        """How many patches of a latent a transformer sees (a resolution-dependent shift follows them)."""
        return self.latent_shape[1] * self.latent_shape[2] // self.backbone.patch(self.denoiser) ** 2

    @property
    def networks(self) -> list[nn.Module]:
        """All of them."""
        return [self.denoiser, self.vae, *self.text_encoders]


class Backbone(ABC):
    """A family of text-to-image models. Another one is a subclass, listed in `backbones/__init__.py`.

    Attributes:
        pipeline_class: the stock pipeline of its models.
        denoiser: name and class of the denoising network.
        vae: class of the autoencoder.
        text_encoders, tokenizers: name and class of each, in the order the pipeline uses them.
        optional: those of them that a folder may leave out (null in model_index.json).
        packing: places of a latent, along a side, that the pipeline puts into one token of the network.
        side: places of a latent, along a side, where neither network nor autoencoder names a size.
        names_size: whether a call of the stock pipeline names the picture's size: its own default is another,
            whatever the folder.
        conditions: settings by which a denoising network takes further inputs, and the values whose inputs
            the family gives.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser: ClassVar[tuple[str, Any]]
    vae: ClassVar[Any] = AutoencoderKL
    text_encoders: ClassVar[dict[str, Any]]
    tokenizers: ClassVar[dict[str, Any]]
    optional: ClassVar[tuple[str, ...]] = ()
    packing: ClassVar[int] = 1
    side: ClassVar[int | None] = None
    names_size: ClassVar[bool] = False
    conditions: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def present(self, index: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
        """Those of `text_encoders` or `tokenizers` that a model has."""
        return {
            name: kind
            for name, kind in parts.items()
            if name not in self.optional or (index.get(name) or [None])[0] is not None
        }

    def prepare(self, parts: TextToImageParts) -> None:
        """What the family changes in networks that were read: nothing, or how they compute the same."""
        return

    @abstractmethod
    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        """Turns prompts into what the network is conditioned on, as the stock pipeline does."""

    @abstractmethod
    def text_width(self, parts: TextToImageParts) -> tuple[int, int | None]:
        """Width of the encoded text, and the one the network takes (None: not known)."""

    def vae_factor(self, vae: Any) -> int:
        """Pixels per place of a latent, along a side."""
        channels = vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels
        return int(2 ** (len(channels) - 1))

    def latent_channels(self, vae: Any) -> int:
        """Channels of a latent."""
        return int(vae.config.latent_channels)

    def patch(self, denoiser: Any) -> int:
        """Places of a latent, along a side, that are one token of the network."""
        return int(denoiser.config.get("patch_size", 1)) * self.packing

    def flow_mu(self, config: Mapping[str, Any], tokens: int) -> float:
        """The parameter μ of a shift that depends on the resolution: linear in the tokens of a latent."""
        slope = (config["max_shift"] - config["base_shift"]) / (
            config["max_image_seq_len"] - config["base_image_seq_len"]
        )
        return float(config["base_shift"] + slope * (tokens - config["base_image_seq_len"]))

    def guidance_options(self, kappa: float) -> dict[str, Any]:
        """Arguments by which a call of the stock pipeline is guided with this κ."""
        return {"guidance_scale": kappa}

    def extras(self, parts: TextToImageParts) -> dict[str, Any]:
        """Further arguments of the stock pipeline's constructor."""
        return {}

    def call_options(self, parts: TextToImageParts) -> dict[str, Any]:
        """Further arguments with which the stock pipeline draws as the model was trained."""
        return dict(zip(("height", "width"), parts.picture_size)) if self.names_size else {}

    def pipeline(self, parts: TextToImageParts, scheduler: SchedulerMixin | None = None) -> DiffusionPipeline:
        """The stock pipeline of the parts (shared, not copied), without progress bar."""
        texts = [(self.text_encoders, parts.text_encoders), (self.tokenizers, parts.tokenizers)]
        named: dict[str, Any] = dict.fromkeys(self.optional)
        for names, given in texts:
            named |= zip(self.present(parts.index, names), given, strict=True)
        pipeline = self.pipeline_class(
            **{self.denoiser[0]: parts.denoiser},
            **named,
            vae=parts.vae,
            scheduler=parts.scheduler if scheduler is None else scheduler,
            **self.extras(parts),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def check_fit(self, parts: TextToImageParts) -> None:
        """Raise a UserError if prompts are too long for a text encoder, widths differ, or the network takes
        inputs that the family doesn't give."""
        part, config = self.denoiser[0], parts.denoiser.config
        for name, served in self.conditions.items():
            if (value := config.get(name)) not in served:
                raise UserError(
                    f"The part {part!r} in {parts.path} has {name} {value!r} in its config.json: it takes "
                    f"inputs beside the prompt that a {self.pipeline_class.__name__} doesn't give."
                )
        # networks without positions of their own (FLUX) leave it to the autoencoder
        sizes = config if "sample_size" in config else parts.vae.config
        if sizes.get("sample_size") is None and self.side is None:
            raise UserError(
                f"The part {part!r} in {parts.path} names no picture size: set sample_size in its "
                "config.json to the side of the latents it was trained on."
            )
        names = self.present(parts.index, self.tokenizers)
        for name, tokenizer, encoder in zip(names, parts.tokenizers, parts.text_encoders, strict=True):
            longest = getattr(encoder.config, "max_position_embeddings", None)
            if tokenizer.model_max_length < 2:  # the start and end of a prompt
                raise UserError(
                    f"The part {name!r} in {parts.path} has model_max_length {tokenizer.model_max_length}: "
                    f"no prompt fits. Set it in {name}/tokenizer_config.json."
                )
            clip = names[name] is CLIPTokenizer  # others have lengths of their own
            if clip and longest is not None and tokenizer.model_max_length > longest:
                raise UserError(
                    f"The part {name!r} in {parts.path} has model_max_length {tokenizer.model_max_length}, "
                    f"but the text encoder takes {longest} tokens. "
                    f"Set model_max_length in {name}/tokenizer_config.json."
                )
        latents = self.latent_channels(parts.vae), parts.latent_shape[0]
        widths = {" and ".join(self.text_encoders): self.text_width(parts), "vae": latents}
        for name, (given, expected) in widths.items():
            if expected is not None and given != expected:
                raise UserError(
                    f"The parts of {parts.path} do not fit: {name} gives width {given}, {self.denoiser[0]} "
                    f"expects {expected}."
                )
