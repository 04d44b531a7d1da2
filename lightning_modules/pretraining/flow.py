"""How the bundled Stable Diffusion 3 was trained: rectified flow with two CLIP text encoders."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from lightning_modules.diffusion.broadcast import expand_like
from lightning_modules.networks.backbones.calling import call_denoiser
from lightning_modules.networks.backbones.stable_diffusion_3 import MAX_TOKENS, CountedLastToken, clip_texts
from lightning_modules.pretraining import LatentDiffusionPretraining
from lightning_modules.pretraining.tools import text_config, tokenize


class StableDiffusion3Pretraining(LatentDiffusionPretraining):
    """A miniature Stable Diffusion 3 (Esser et al., arXiv 2403.03206) without T5, on rectified flow.

    σ is logit-normal (eq. 19, m = 0, s = 1), the loss the plain mean of (v − (ε − x0))² at
    x_σ = (1 − σ) x0 + σ ε (eq. 13, 14). The scheduler's shift concerns sampling alone.

    Args:
        transformer: keywords of ``diffusers.SD3Transformer2DModel``.
        texts: keywords of ``transformers.CLIPTextConfig``, for each of the two text encoders.
        tokenizer: folder of the tokenizer of both.
        shift: of the scheduler in the exported folder.
        latents: ``shift_factor`` and ``scaling_factor``, for latents of mean 0 and deviation 1.
    """

    def __init__(
        self,
        output: str,
        autoencoder: str,
        tokenizer: str,
        transformer: dict[str, Any],
        texts: list[dict[str, Any]],
        shift: float = 1.0,
        latents: dict[str, float] | None = None,
        prompt_dropout: float = 0.1,
        learning_rate: float = 1e-3,
        warmup_steps: int = 200,
        weight_decay: float = 0.01,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            autoencoder, FlowMatchEulerDiscreteScheduler(shift=shift), prompt_dropout, snr_gamma=1.0,
            output=output, learning_rate=learning_rate, warmup_steps=warmup_steps, weight_decay=weight_decay,
            seed=seed,
        )  # fmt: skip
        self.save_hyperparameters()
        self.autoencoder.register_to_config(**{"shift_factor": 0.0, **(latents or {})})
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
        torch.manual_seed(self.seed)
        configs = [CLIPTextConfig(**text_config(text, self.tokenizer)) for text in texts]
        self.text_encoders = torch.nn.ModuleList(map(CLIPTextModelWithProjection, configs))
        self.transformer = SD3Transformer2DModel(**transformer)
        self.transformer.set_attn_processor(CountedLastToken())

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        x0, noise = self.clean(batch, generator)
        sigma = torch.randn(len(x0), generator=generator).sigmoid().to(x0)
        weight = expand_like(sigma, x0)
        captions = self.captions(batch, generator)
        predicted = self.denoise((1 - weight) * x0 + weight * noise, sigma * 1000, captions).float()
        return {"flow_mse": (predicted - (noise - x0)).square().mean()}

    def denoise(self, x_t: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        ids = tokenize(self.tokenizer, captions, self.device)["input_ids"]
        width = self.transformer.config.joint_attention_dim
        hidden, pooled = clip_texts(self.text_encoders, [ids, ids], width)
        text = {"encoder_hidden_states": F.pad(hidden, (0, 0, 0, MAX_TOKENS)), "pooled_projections": pooled}
        return call_denoiser(self.transformer, x_t, t, text)

    def pipeline(self) -> StableDiffusion3Pipeline:
        first, second = self.text_encoders
        return StableDiffusion3Pipeline(
            self.transformer, self.scheduler, self.autoencoder, first, self.tokenizer, second, self.tokenizer,
            None, None,
        )  # fmt: skip
