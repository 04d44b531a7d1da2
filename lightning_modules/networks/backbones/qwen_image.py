"""Qwen-Image (Wu et al., arXiv 2508.02324): joint attention on rectified flow, text by Qwen 2.5 VL.

Its autoencoder is one of videos, with a mean and a deviation for each channel. Guidance keeps the norm that
each token has with text.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from lightning_modules.diffusion.guided import Rescale
from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.calling import call_denoiser, rescale
from lightning_modules.networks.backbones.codec import codes_of, decoded, encoded, latents_of
from lightning_modules.networks.backbones.flux import pack, unpack
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder

MAX_TOKENS = 512  # the stock pipeline's default
DROPPED = 34  # tokens of the template before the prompt
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


class QwenImage(Backbone):
    """Latents are packed, 2 x 2 places to a token; the network predicts ε − x0 and is told σ."""

    pipeline_class = QwenImagePipeline
    denoiser = ("transformer", QwenImageTransformer2DModel)
    vae = AutoencoderKLQwenImage
    text_encoders = {"text_encoder": Qwen2_5_VLForConditionalGeneration}
    tokenizers = {"tokenizer": Qwen2Tokenizer}
    packing = 2
    side = 128
    names_size = True
    conditions = {
        "guidance_embeds": (False, None), "zero_cond_t": (False, None),
        "use_additional_t_cond": (False, None), "use_layer3d_rope": (False, None),
    }  # fmt: skip

    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        return QwenVlPromptEncoder(parts.tokenizers, parts.text_encoders, MAX_TOKENS)

    def text_width(self, parts: TextToImageParts) -> tuple[int, int | None]:
        text = parts.text_encoders[0].config.get_text_config()
        return text.hidden_size, parts.denoiser.config.joint_attention_dim

    def vae_factor(self, vae: Any) -> int:
        return int(2 ** len(vae.config.temperal_downsample))

    def latent_channels(self, vae: Any) -> int:
        return int(vae.config.z_dim)

    def patch(self, denoiser: Any) -> int:
        return self.packing

    def guidance_options(self, kappa: float) -> dict[str, Any]:
        return {"true_cfg_scale": kappa} | ({"negative_prompt": " "} if kappa > 1 else {})


class QwenVlPromptEncoder(PromptEncoder):
    """Last hidden states [B, 512, D] behind the template's start, zeros behind a prompt's end; mask [B, 512].

    No prompt is a blank, as in the examples of the pipeline: without a prompt against it, it isn't guided.
    """

    no_prompt = " "

    def __init__(self, tokenizers: list[Any], text_encoders: list[Any], max_length: int) -> None:
        super().__init__(tokenizers, text_encoders, max_length)
        tokenizers[0].padding_side = "right"

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        texts = [TEMPLATE.format(prompt) for prompt in prompts]
        ids, mask = self.tokens(texts, max_length=self.max_length + DROPPED)
        longest = int(mask.sum(1).max())
        ids, mask = (x.narrow(1, 0, longest) for x in (ids, mask))
        output = self.text_encoders[0](
            input_ids=ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1
        )
        more = self.max_length + DROPPED - longest
        hidden = F.pad(output.hidden_states[-1] * mask[..., None], (0, 0, 0, more))
        mask = F.pad(mask, (0, more))
        return {"encoder_hidden_states": hidden[:, DROPPED:], "encoder_attention_mask": mask[:, DROPPED:]}


@call_denoiser.register
def _(network: QwenImageTransformer2DModel, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    batch, _, height, width = x_t.shape
    mask = tensors["encoder_attention_mask"].bool()
    # the rest is padding for all; without values there are shapes alone to be found
    longest = mask.shape[1] if mask.is_meta else int(mask.sum(1).max())
    tokens: Tensor = network(
        hidden_states=pack(x_t),
        timestep=t / 1000,
        encoder_hidden_states=tensors["encoder_hidden_states"][:, :longest],
        encoder_hidden_states_mask=mask[:, :longest],
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


@rescale.register
def _(network: QwenImageTransformer2DModel) -> Rescale | None:
    return keep_norms


def keep_norms(guided: Tensor, with_text: Tensor) -> Tensor:
    """The guided output with the norm of that with text in each token (2 x 2 places), as in the pipeline."""
    _, _, height, width = guided.shape
    tokens, like = pack(guided), pack(with_text)
    norms = [x.norm(dim=-1, keepdim=True) for x in (tokens, like)]
    return unpack(tokens * (norms[1] / norms[0]), height, width)


def _statistics(vae: AutoencoderKLQwenImage, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of codes, [C, 1, 1, 1]."""
    mean, deviation = (like.new_tensor(x) for x in (vae.config.latents_mean, vae.config.latents_std))
    return mean[:, None, None, None], deviation[:, None, None, None]


@codes_of.register
def _(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    mean, deviation = _statistics(vae, latents)
    return latents.unsqueeze(2) * deviation + mean  # of one frame


@latents_of.register
def _(vae: AutoencoderKLQwenImage, codes: Tensor) -> Tensor:
    mean, deviation = _statistics(vae, codes)
    return ((codes - mean) / deviation).squeeze(2)


@decoded.register
def _(vae: AutoencoderKLQwenImage, codes: Tensor) -> Tensor:
    pictures: Tensor = vae.decode(codes, return_dict=False)[0]
    return pictures[:, :, 0]


@encoded.register
def _(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    codes: Tensor = vae.encode(pictures.unsqueeze(2)).latent_dist.mode()
    return codes
