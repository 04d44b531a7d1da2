"""Turns prompts into conditions; how a family does it is said in its file in `backbones/`."""

import warnings
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.transfer import to_device
from lightning_modules.networks.weights import hide_from_state_dict


class TextLookup(Protocol):
    """What takes the place of text encoders: `prompt_cache.PromptCache`."""

    def embed(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What `PromptEncoder.embed_texts` gives [B, …], on this device, real numbers in this type."""


def chat_texts(tokenizer: Any, prompts: list[str], thinking: bool) -> list[str]:
    """Each prompt as a question in a chat, by the tokenizer's template; `thinking` is Qwen 3's switch."""
    template = tokenizer.apply_chat_template
    chats = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [
        template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=thinking) for chat in chats
    ]


class PromptEncoder(nn.Module, ABC):
    """Frozen tokenizers and text encoders of one family; a subclass defines `embed_texts`.

    Attributes:
        no_prompt: the text that stands for no prompt, if one does.
        truncated_prompts: how many prompts so far were longer than the text encoders take.
    """

    no_prompt = ""

    def __init__(self, tokenizers: list[Any], text_encoders: list[Any], max_length: int) -> None:
        super().__init__()
        self.tokenizers = tokenizers
        self.text_encoders = nn.ModuleList(encoder.requires_grad_(False).eval() for encoder in text_encoders)
        self.max_length = max_length
        self.truncated_prompts = 0
        self._null: dict[str, Tensor] | None = None
        self._cached: TextLookup | None = None
        hide_from_state_dict(self)

    @property
    def device(self) -> torch.device:
        """Where the text encoders are, or what a cache gives is wanted."""
        return next(self.parameters()).device

    def look_up_in(self, cached: TextLookup) -> None:
        """Take prompts from a cache from now on, and let go of the text encoders."""
        self._cached, self.text_encoders = cached, nn.ModuleList()
        # moves and is cast as the text encoders would
        self.in_their_place = nn.Parameter(torch.zeros(1), requires_grad=False)

    def encode(self, prompts: list[str]) -> Condition:
        """Condition of B prompts, with what stands for no prompt as null."""
        return Condition(tensors=self.embed(prompts), null=self.null())

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the network takes for B prompts, by its keywords, each [B, …]; as in the stock pipeline."""
        if self._cached is None:
            texts = self.embed_texts(prompts)
        else:
            texts = self._cached.embed(prompts, self.device, next(self.parameters()).dtype)
        return {**texts, **self.picture_conditions(len(prompts))}

    @abstractmethod
    def embed_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The part of it that depends on the prompts, by the text encoders; a cache keeps it."""

    def picture_conditions(self, count: int) -> dict[str, Tensor]:
        """The part that says how large the picture is, for so many prompts; nothing in most families."""
        return {}

    def null(self) -> dict[str, Tensor]:
        """The same for no prompt, each [1, …]; computed once per device and dtype."""
        wanted = next(self.parameters())
        held = None if self._null is None else next(iter(self._null.values()))
        if held is None or held.device != wanted.device or held.dtype != wanted.dtype:
            self._null = self.embed_null()
        assert self._null is not None
        return self._null

    def embed_null(self) -> dict[str, Tensor]:
        """What stands for no prompt: the text that does, unless a family says otherwise."""
        return self.embed([self.no_prompt])

    def train(self, mode: bool = True) -> "PromptEncoder":
        """Stay in evaluation mode: text encoders are never trained."""
        return super().train(False)

    def tokens(
        self, prompts: list[str], place: int = 0, max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token numbers and attention mask, both [B, L], of one tokenizer, padded to the full length."""
        tokenizer = self.tokenizers[place]
        if place == 0:
            self._count_truncated(prompts, max_length or self.max_length)
        inputs = tokenizer(
            prompts, padding="max_length", max_length=max_length or self.max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        return to_device(inputs.input_ids, self.device), to_device(inputs.attention_mask, self.device)

    def _count_truncated(self, prompts: list[str], max_length: int) -> None:
        """Count prompts that lose words, and warn about the first."""
        lengths = [len(ids) for ids in self.tokenizers[0](prompts, verbose=False).input_ids]
        long = [prompt for prompt, n in zip(prompts, lengths, strict=True) if n > max_length]
        if long and not self.truncated_prompts:
            warnings.warn(
                f"A prompt has more than {max_length} tokens and is cut to them (told once): {long[0]!r}",
                stacklevel=4,
            )
        self.truncated_prompts += len(long)
