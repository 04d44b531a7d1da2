"""Turns prompts into conditions, exactly as diffusers' StableDiffusionPipeline does."""

import warnings

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.transfer import to_device
from lightning_modules.networks.frozen import hide_from_state_dict


class PromptEncoder(nn.Module):
    """Frozen tokenizer and CLIP text encoder.

    Attributes:
        truncated_prompts: how many prompts so far were longer than the text encoder takes.
    """

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.truncated_prompts = 0
        self._null: Tensor | None = None
        hide_from_state_dict(self)

    def encode(self, prompts: list[str]) -> Condition:
        """Condition with `encoder_hidden_states` [B, L, D] of B prompts, that of "" [1, L, D] as null."""
        return Condition(
            tensors={"encoder_hidden_states": self.embed(prompts)},
            null={"encoder_hidden_states": self.null()},
        )

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """Last hidden states [B, L, D] of B prompts, padded to the longest length the tokenizer allows."""
        self._count_truncated(prompts)
        inputs = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        device = self.text_encoder.device
        # Stable Diffusion attends to padding too, unless its text encoder says otherwise.
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = to_device(inputs.attention_mask, device) if masked else None
        hidden: Tensor = self.text_encoder(to_device(inputs.input_ids, device), attention_mask=mask)[0]
        return hidden

    def null(self) -> Tensor:
        """Hidden states [1, L, D] of the empty prompt; computed once per device and dtype."""
        wanted = next(self.text_encoder.parameters())
        if self._null is None or self._null.device != wanted.device or self._null.dtype != wanted.dtype:
            self._null = self.embed([""])
        return self._null

    def train(self, mode: bool = True) -> "PromptEncoder":
        """Stay in evaluation mode: the text encoder is never trained."""
        return super().train(False)

    def _count_truncated(self, prompts: list[str]) -> None:
        """Count prompts that lose words, and warn about the first."""
        longest = self.tokenizer.model_max_length
        lengths = [len(ids) for ids in self.tokenizer(prompts, verbose=False).input_ids]
        long = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > longest]
        if long and not self.truncated_prompts:
            warnings.warn(
                f"A prompt has more than {longest} tokens and is cut to them (told once): {long[0]!r}",
                stacklevel=3,
            )
        self.truncated_prompts += len(long)
