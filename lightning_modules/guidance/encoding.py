"""Negative prompts of a stock diffusers pipeline, encoded as and when the pipeline encodes its prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from common.errors import UserError
from lightning_modules.guidance.processors import NegativeText

# what else than the prompt a pipeline may be given to encode
_OTHER_TEXTS = (
    "prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask",
    "negative_prompt", "negative_prompt_2", "negative_prompt_3", "negative_prompt_embeds",
    "negative_pooled_prompt_embeds", "negative_prompt_attention_mask",
)  # fmt: skip


class NegativePrompts:
    """One negative prompt for all images, or one per image; None and "" are none.

    Attributes:
        texts: the prompts, "" where there is none; one entry if it is for all.

    Raises:
        UserError: it is neither, or the list is empty.
    """

    def __init__(self, given: str | None | Sequence[str | None]) -> None:
        texts = [given] if given is None or isinstance(given, str) else list(given)
        if not texts or not all(text is None or isinstance(text, str) for text in texts):
            raise UserError(
                f"The negative prompt must be a text, or a list with one per image, but is {given!r}."
            )
        self.texts = [(text or "").strip() for text in texts]

    @property
    def empty(self) -> bool:
        """Whether no image has one."""
        return not any(self.texts)

    def per_image(self, prompts: int, images_per_prompt: int) -> list[str]:
        """The text of each image of a call; a list of one per prompt serves all images of its prompt.

        Raises:
            UserError: their number fits neither images nor prompts.
        """
        count = prompts * images_per_prompt
        if len(self.texts) in (1, count):
            return self.texts * (count // len(self.texts))
        if len(self.texts) == prompts:
            return [text for text in self.texts for _ in range(images_per_prompt)]
        raise UserError(
            f"There are {len(self.texts)} negative prompts for {count} images of {prompts} prompts. "
            "Give one for all, or one per image (or per prompt)."
        )


@contextmanager
def encoded_with_prompts(
    pipe: Any, negatives: NegativePrompts, text: NegativeText, joint: bool, positions: bool
) -> Iterator[None]:
    """Whenever the pipeline encodes prompts, encode the negative ones the same way and put them in `text`.

    With `joint` attention the negative text is handed to the network behind the prompt's tokens, together
    with its `positions` if the network takes those of text (the last thing the pipeline's encoder returns).

    Raises:
        UserError: the pipeline encodes no prompts.
    """
    if not hasattr(pipe, "encode_prompt"):
        raise UserError(f"{type(pipe).__name__} has no encode_prompt, so no negative prompt can be encoded.")
    stock = pipe.encode_prompt
    signature = inspect.signature(stock)
    masked = "prompt_attention_mask" in signature.parameters

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments.get("do_classifier_free_guidance", False):
            raise UserError("The pipeline's own guidance must be off: give it guidance_scale=1.0.")
        output = stock(*args, **kwargs)
        images = bound.arguments.get("num_images_per_prompt") or 1
        texts = negatives.per_image(len(output[0]) // images, images)
        encoded, rows = _encode(stock, bound.arguments, texts)
        present = None if all(texts) else torch.tensor([bool(entry) for entry in texts])
        text.set(encoded[0][rows], encoded[1][rows] if masked else None, present)
        if not joint:
            return output
        positive, negative = output[0], encoded[0][rows].to(output[0])
        text.lengths = positive.shape[1], negative.shape[1]
        rest = [*output[1:-1], torch.cat([output[-1], encoded[-1]])] if positions else output[1:]
        return torch.cat([positive, negative.expand(len(positive), -1, -1)], 1), *rest

    replaced = vars(pipe).get("encode_prompt")
    pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        if replaced is None:
            del pipe.encode_prompt
        else:
            pipe.encode_prompt = replaced


def _encode(stock: Any, given: dict[str, Any], texts: list[str]) -> tuple[Any, Any]:
    """What the pipeline's encoder makes of the distinct texts, and which row of it each image has.

    Images without a negative prompt have some other's row, which is not used. If all share one row, a slice
    of that row is returned, for all.
    """
    distinct = list(dict.fromkeys(entry for entry in texts if entry))
    arguments: dict[str, Any] = {
        name: None if name in _OTHER_TEXTS else value for name, value in given.items()
    }
    wanted = {"prompt": distinct, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    arguments |= {name: value for name, value in wanted.items() if name in arguments}
    output = stock(**arguments.pop("kwargs", {}), **arguments)
    if len(distinct) == 1:
        return output, slice(None)
    return output, [distinct.index(entry) if entry else 0 for entry in texts]
