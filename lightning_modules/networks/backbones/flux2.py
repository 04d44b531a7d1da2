"""FLUX.2 klein base (Black Forest Labs): joint attention on rectified flow, text from three layers of Qwen 3.

Its latents are blocks of 2 x 2 places of an autoencoder's codes, brought to unit deviation by the statistics
of a batch norm in the autoencoder.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.calling import call_denoiser
from lightning_modules.networks.backbones.codec import codes_of, latents_of
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder, chat_texts

MAX_TOKENS = 512  # the stock pipeline's defaults
LAYERS = (9, 18, 27)
STEPS = 50


class Flux2Klein(Backbone):
    """A place of a latent is a token; the network predicts ε − x0 and is told σ."""

    pipeline_class = Flux2KleinPipeline
    denoiser = ("transformer", Flux2Transformer2DModel)
    vae = AutoencoderKLFlux2
    text_encoders = {"text_encoder": Qwen3ForCausalLM}
    tokenizers = {"tokenizer": Qwen2Tokenizer}
    conditions = {"guidance_embeds": (False,)}
    names_size = True

    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        return Qwen3LayersPromptEncoder(parts.tokenizers, parts.text_encoders, MAX_TOKENS)

    def text_width(self, parts: TextToImageParts) -> tuple[int, int | None]:
        width = len(LAYERS) * parts.text_encoders[0].config.hidden_size
        return width, parts.denoiser.config.joint_attention_dim

    def vae_factor(self, vae: Any) -> int:
        return 2 * super().vae_factor(vae)

    def latent_channels(self, vae: Any) -> int:
        return 4 * super().latent_channels(vae)

    def flow_mu(self, config: Mapping[str, Any], tokens: int) -> float:
        """The stock pipeline's, which depends on the number of steps, too: as in its default of 50."""
        return compute_empirical_mu(tokens, STEPS)

    def extras(self, parts: TextToImageParts) -> dict[str, Any]:
        return {"is_distilled": bool(parts.index.get("is_distilled", False))}


class Qwen3LayersPromptEncoder(PromptEncoder):
    """Hidden states of three layers side by side [B, 512, 3 D], padding included."""

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        ids, mask = self.tokens(chat_texts(self.tokenizers[0], prompts, thinking=False))
        output = self.text_encoders[0](
            ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
        )
        return {"encoder_hidden_states": torch.cat([output.hidden_states[layer] for layer in LAYERS], dim=-1)}


@call_denoiser.register
def _(network: Flux2Transformer2DModel, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    _, _, height, width = x_t.shape
    zero, length = torch.arange(1), tensors["encoder_hidden_states"].shape[1]
    places = torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), zero)
    words = torch.cartesian_prod(zero, zero, zero, torch.arange(length))
    tokens: Tensor = network(
        hidden_states=x_t.flatten(2).mT,
        timestep=t / 1000,
        img_ids=places.to(x_t.device),
        txt_ids=words.to(x_t.device),
        **tensors,
        return_dict=False,
    )[0]
    return tokens.mT.unflatten(2, (height, width))


def _statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Mean and deviation of blocks of codes, [4 C, 1, 1]."""
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    assert mean is not None and variance is not None
    return mean[:, None, None].float(), (variance + vae.config.batch_norm_eps).sqrt()[:, None, None].float()


@codes_of.register
def _(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    mean, deviation = _statistics(vae)
    return F.pixel_shuffle(latents * deviation + mean, 2)


@latents_of.register
def _(vae: AutoencoderKLFlux2, codes: Tensor) -> Tensor:
    mean, deviation = _statistics(vae)
    return (F.pixel_unshuffle(codes, 2) - mean) / deviation
