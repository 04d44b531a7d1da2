"""The families of text-to-image models that can be teachers and students."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from common.errors import UserError
from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.flux import Flux
from lightning_modules.networks.backbones.flux2 import Flux2Klein
from lightning_modules.networks.backbones.pixart import PixArtAlpha, plain_call
from lightning_modules.networks.backbones.qwen_image import QwenImage
from lightning_modules.networks.backbones.sana import Sana
from lightning_modules.networks.backbones.stable_diffusion import StableDiffusion, StableDiffusionXL
from lightning_modules.networks.backbones.stable_diffusion_3 import StableDiffusion3
from lightning_modules.networks.backbones.z_image import ZImage

__all__ = [
    "BACKBONES", "Backbone", "TextToImageParts", "backbone_of", "call_options", "guidance_options",
    "is_own_class",
]  # fmt: skip
BACKBONES: tuple[Backbone, ...] = (
    StableDiffusion(),
    StableDiffusionXL(),
    PixArtAlpha(),
    StableDiffusion3(),
    Flux(),
    Sana(),
    ZImage(),
    Flux2Klein(),
    QwenImage(),
)


_BY_PIPELINE = {backbone.pipeline_class.__name__: backbone for backbone in BACKBONES}


def is_own_class(index: dict[str, Any]) -> bool:
    """Whether a model_index.json names a pipeline that is built here from its parts."""
    return index.get("_class_name", "StableDiffusionPipeline") in _BY_PIPELINE


def backbone_of(index: dict[str, Any], folder: Path) -> Backbone:
    """The family of a model_index.json: by its class, or for another class (LCM's, say) by its parts."""
    name = index.get("_class_name", "StableDiffusionPipeline")
    if name in _BY_PIPELINE:
        return _BY_PIPELINE[name]
    for backbone in BACKBONES:
        own = {backbone.denoiser[0], *backbone.text_encoders}
        others = {part for part in index if part.startswith(("text_encoder", "transformer", "unet"))}
        if backbone.denoiser[0] == "unet" and own == others:
            return backbone
    raise UserError(
        f"{folder} is a {name} (model_index.json), which can't be distilled here. "
        f"Give a model of: {', '.join(_BY_PIPELINE)}."
    )


def call_options(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Further arguments with which a stock pipeline draws as its model was trained."""
    backbone = _BY_PIPELINE.get(type(pipeline).__name__)
    if backbone is None:
        return plain_call(pipeline)
    network = getattr(pipeline, backbone.denoiser[0])
    parts = TextToImageParts(backbone, network, pipeline.vae, [], [], pipeline.scheduler, {}, "")
    return backbone.call_options(parts)


def guidance_options(pipeline: DiffusionPipeline, kappa: float) -> dict[str, Any]:
    """Arguments by which a call of a stock pipeline is guided with this κ."""
    backbone = _BY_PIPELINE.get(type(pipeline).__name__)
    return {"guidance_scale": kappa} if backbone is None else backbone.guidance_options(kappa)
