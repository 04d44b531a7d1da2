"""Negative prompts for one- and few-step models, by attention instead of a second network call.

``negative_prompting`` is for stock diffusers pipelines, ``negative_attention`` for a network alone, in
training too. Both put attention processors into the network and take them out again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
)
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common.errors import UserError
from lightning_modules.diffusion.condition import Condition
from lightning_modules.guidance.methods import Method, make_method
from lightning_modules.guidance.processors import (
    NegativeCrossAttention,
    NegativeJointFlux,
    NegativeJointQwen,
    NegativeJointSD3,
    NegativeParallelFlux2,
    NegativeProcessor,
    NegativeSingleZImage,
    NegativeText,
)

# what else than the prompt a pipeline may be given to encode
_OTHER_TEXTS = (
    "prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask",
    "prompt_embeds_mask",
    "negative_prompt", "negative_prompt_2", "negative_prompt_3", "negative_prompt_embeds",
    "negative_pooled_prompt_embeds", "negative_prompt_attention_mask",
)  # fmt: skip

Processor = type[NegativeProcessor]
Layers = list[tuple[Any, Processor]]
STOCK: dict[Processor, tuple[type, ...]] = {
    NegativeCrossAttention: (AttnProcessor2_0, SanaAttnProcessor2_0),
    NegativeJointSD3: (JointAttnProcessor2_0,),
    NegativeJointFlux: (FluxAttnProcessor, Flux2AttnProcessor),
    NegativeParallelFlux2: (Flux2ParallelSelfAttnProcessor,),
    NegativeJointQwen: (QwenDoubleStreamAttnProcessor2_0,),
    NegativeSingleZImage: (ZSingleStreamAttnProcessor,),
}
"""The processors of diffusers that each of ours stands in for."""


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
def negative_prompting(
    pipe: Any,
    negative_prompt: str | None | Sequence[str | None],
    method: str = "nasa",
    scale: float | None = None,
    *,
    tau: float | None = None,
    alpha: float | None = None,
    steps: int | None = None,
) -> Iterator[None]:
    """Calls of the pipeline inside this context draw away from the negative prompt.

        with negative_prompting(pipe, "blurry", method="nasa", scale=0.2):
            pipe(prompt, num_inference_steps=1)

    Works with pipelines whose network is a UNet2DConditionModel (Stable Diffusion 1, 2, XL) or a transformer
    of PixArt, SANA, Stable Diffusion 3, FLUX.1, FLUX.2 klein, Qwen-Image or Z-Image. The negative prompt is
    encoded as the pipeline encodes the call's prompts; pooled embeddings stay the prompt's. Guidance of the
    pipeline is off inside (unless there is nothing to do, and it is left as it is). Scheduler and number of
    steps do not matter. Leaving restores network and pipeline, also after an exception; nesting is
    refused. With cross-attention, keys and values of the negative text are computed once per call of the
    pipeline.

    The cost: on cross-attention models one attention more in each such layer (no projections, no other
    layers). With joint attention the negative text passes all blocks, and image tokens attend twice.
    Z-Image, whose text and picture are one stream, computes twice the pictures, as under guidance.

    Args:
        pipe: the pipeline.
        negative_prompt: one for all images, or a list with one per image (or per prompt); None and "" are
            none, and such images are as the stock pipeline draws them: bit for bit with cross-attention, up
            to rounding beside images that have one with joint attention.
        method: "nasa" (SNOOPI, arXiv 2412.02687) or "nag" (arXiv 2505.21179).
        scale: α of NASA, ϕ of NAG; 0 is off, None the network's default (`guidance.methods`).
        tau: τ of NAG, the largest growth of an attention output's norm.
        alpha: α of NAG, the share of the steered output.
        steps: only in so many of the first network calls of each call of the pipeline; None: in all.

    Raises:
        UserError: the network has no layer to act on or has other processors than diffusers' default ones, a
            value is out of range, the prompts' numbers do not fit, or the call asks for guidance.
    """
    network = pipeline_network(pipe)
    layers = attention_layers(network)
    rule = make_method(method, network, scale, tau, alpha)
    negatives = NegativePrompts(negative_prompt)
    if rule.scale == 0 or negatives.empty:
        yield
        return
    text = NegativeText(rule, _text_projection(network))
    with (
        _installed(layers, text),
        _first_calls(network, text, steps),
        _behind_the_prompt(network, text, layers),
        _encoded_with_prompts(pipe, negatives, text),
        _unguided(pipe, network),
    ):
        yield


@contextmanager
def negative_attention(
    network: nn.Module,
    negative: Condition,
    method: Method,
    present: Tensor | None = None,
    calls: int | None = None,
) -> Iterator[None]:
    """Calls of a network inside this context draw away from encoded negative prompts.

    With gradients on, keys and values of the negative text are computed at every call and carry gradients
    (a network's projection of captions once per context); with gradients off they are computed once, so that
    weights must not change inside. If the network recomputes
    activations (gradient checkpointing), the backward pass must happen inside, too, or it raises.

    Args:
        network: takes `encoder_hidden_states`.
        negative: negative prompts of B images, or one for all.
        method: see `guidance.methods`; scale 0 changes nothing.
        present: boolean [B], false for images without a negative prompt.
        calls: only in so many of the first calls; None: in all.

    Raises:
        UserError: as `negative_prompting`.
    """
    network = getattr(network, "_orig_mod", network)
    layers = attention_layers(network)
    if method.scale == 0 or (present is not None and not present.any()):
        yield
        return
    text = NegativeText(method, _text_projection(network))
    embeddings = negative.tensors["encoder_hidden_states"].to(next(network.parameters()).dtype)
    text.set(embeddings, negative.tensors.get("encoder_attention_mask"), present)
    # Outside the blocks, so that checkpointing them does not recompute it in one and reuse it in others.
    text.hidden_states(embeddings)
    with (
        _installed(layers, text),
        _first_calls(network, text, calls),
        _behind_the_prompt(network, text, layers),
    ):
        yield


@contextmanager
def _first_calls(network: nn.Module, text: NegativeText, calls: int | None) -> Iterator[None]:
    """After so many calls since the prompts changed the network is the stock one.

    Raises:
        UserError: not even the first call.
    """
    if calls is None:
        yield
        return
    if calls < 1:
        raise UserError(f"Negative prompts in the first {calls} steps have no effect: give at least 1.")

    def count(network: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        text.calls += 1
        text.active = text.calls <= calls

    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _behind_the_prompt(network: nn.Module, text: NegativeText, layers: Layers) -> Iterator[None]:
    """A network with joint attention gets the negative text, and its mask, behind the prompt's tokens."""

    def append(network: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not text.active:
            return args, kwargs
        positive = kwargs["encoder_hidden_states"]
        negative, more = text.hidden_states(positive).expand(len(positive), -1, -1), {}
        if "txt_ids" in kwargs:
            more["txt_ids"] = torch.cat([ids := kwargs["txt_ids"], _positions(ids, negative.shape[1])], -2)
        if "encoder_hidden_states_mask" in kwargs:  # Qwen-Image's
            masks = [
                x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.to(x.device).bool()
                for x, mask in zip(
                    (positive, negative), (kwargs["encoder_hidden_states_mask"], text.mask), strict=True
                )
            ]
            longest = int(masks[1].sum(1).max())  # the rest is padding for all
            masks[1] = masks[1][:, :longest].expand(len(positive), -1)
            negative, more["encoder_hidden_states_mask"] = negative[:, :longest], torch.cat(masks, 1)
        text.lengths = positive.shape[1], negative.shape[1]
        return args, {**kwargs, **more, "encoder_hidden_states": torch.cat([positive, negative], 1)}

    if layers[0][1] is NegativeCrossAttention:
        yield
        return
    if layers[0][1] is NegativeSingleZImage:
        with _beside_the_prompt(network, text):
            yield
        return
    handle = network.register_forward_pre_hook(append, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _beside_the_prompt(network: nn.Module, text: NegativeText) -> Iterator[None]:
    """Z-Image gets its pictures twice, with the negative text the second time, and gives the first half."""

    def double(network: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not text.active:
            return args, kwargs
        pictures, t, captions = args
        embeddings = text.hidden_states(captions[0])
        each, rest = divmod(len(pictures), len(embeddings))  # pictures of one prompt stand together
        if rest:
            raise UserError(f"{len(embeddings)} negative prompts do not fit {len(pictures)} images.")
        masks = embeddings.new_ones(embeddings.shape[:2]) if text.mask is None else text.mask
        negatives = [
            row[mask.bool()] for row, mask in zip(embeddings, masks, strict=True) for _ in range(each)
        ]
        if text.present is not None:
            text.present = text.present.repeat_interleave(len(pictures) // len(text.present))
        patches = pictures[0][0].numel() // network.config.all_patch_size[0] ** 2  # type: ignore[union-attr, index]
        text.size = -(-patches // SEQ_MULTI_OF) * SEQ_MULTI_OF
        return ([*pictures, *pictures], torch.cat([t, t]), [*captions, *negatives]), kwargs

    def share(layer: nn.Module, args: Any) -> Any:
        if not text.active:
            return args
        # behind how many words a picture stands matters to its padding
        first, second = args[0].chunk(2)
        second = torch.cat([first[:, : text.size], second[:, text.size :]], 1)
        return torch.cat([first, second]), *args[1:]

    def halve(network: nn.Module, args: Any, output: Any) -> Any:
        return (output[0][: len(output[0]) // 2],) if text.active else output

    handles = [
        network.register_forward_pre_hook(double, with_kwargs=True),
        network.layers[0].register_forward_pre_hook(share),  # type: ignore[union-attr, index]
        network.register_forward_hook(halve),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _positions(ids: Tensor, length: int) -> Tensor:
    """Those of so many tokens of text beside `ids` [..., L, axes]: all zero in FLUX.1, counted in FLUX.2."""
    found = ids.new_zeros(*ids.shape[:-2], length, ids.shape[-1])
    if ids.shape[-1] == 4:
        found[..., 3] = torch.arange(length, device=ids.device)
    return found


def pipeline_network(pipe: Any) -> nn.Module:
    """The pipeline's denoising network, without the wrapper of torch.compile.

    Raises:
        UserError: it has none.
    """
    for name in ("unet", "transformer"):
        network = getattr(pipe, name, None)
        if isinstance(network, nn.Module):
            return getattr(network, "_orig_mod", network)
    raise UserError(f"{type(pipe).__name__} has neither a unet nor a transformer for a negative prompt.")


def attention_layers(network: nn.Module) -> Layers:
    """The layers in which image tokens attend to text, each with the processor class that is to act there.

    Raises:
        UserError: there are none, their processors are not diffusers' default ones, or are ours already.
    """
    found = [(module, kind) for module in network.modules() if (kind := _processor_of(network, module))]
    if not found or (NegativeCrossAttention in (kinds := {kind for _, kind in found}) and len(kinds) > 1):
        raise UserError(
            f"{type(network).__name__} has no cross-attention or joint attention to text in which a negative "
            "prompt could act. Use a Stable Diffusion, PixArt, SANA, FLUX, Qwen-Image or Z-Image model."
        )
    for layer, kind in found:
        if isinstance(layer.processor, kind):
            raise UserError("A negative prompt acts on this network already: leave that context first.")
        if not isinstance(layer.processor, STOCK[kind]) or getattr(layer, "fused_projections", False):
            raise UserError(
                f"{type(network).__name__} attends with {type(layer.processor).__name__}, but negative "
                f"prompts need {STOCK[kind][0].__name__} without fused projections: undo attention slicing, "
                "xformers, fusing or image adapters."
            )
    return found


def _processor_of(network: nn.Module, module: Any) -> Processor | None:
    """What is to act in a layer of the network; None where no text is attended to."""
    if isinstance(network, ZImageTransformer2DModel):
        return NegativeSingleZImage if any(module is one.attention for one in network.layers) else None
    if isinstance(module, Flux2ParallelSelfAttention):
        return NegativeParallelFlux2
    if isinstance(module, (FluxAttention, Flux2Attention)):
        return NegativeJointFlux
    if isinstance(module, Attention) and module.added_kv_proj_dim is not None:
        return NegativeJointQwen if isinstance(network, QwenImageTransformer2DModel) else NegativeJointSD3
    if isinstance(module, Attention) and module.is_cross_attention:
        return NegativeCrossAttention
    return None


@contextmanager
def _installed(layers: Layers, text: NegativeText) -> Iterator[None]:
    """Our processors in these layers, and the former ones again at the end."""
    former = [layer.processor for layer, _ in layers]
    try:
        for index, (layer, kind) in enumerate(layers):
            layer.set_processor(kind(text, layer.processor, index))
        yield
    finally:
        for (layer, _), processor in zip(layers, former, strict=True):
            layer.set_processor(processor)


def _text_projection(network: nn.Module) -> Any:
    """What the network does to text before its cross-attention layers; joint ones do it to all text alike."""
    if (projection := getattr(network, "caption_projection", None)) is not None:
        norm = getattr(network, "caption_norm", nn.Identity())  # SANA's
        return lambda text: norm(projection(text))
    if getattr(network, "encoder_hid_proj", None) is None:
        return None
    if (kind := network.config.encoder_hid_dim_type) != "text_proj":  # type: ignore[union-attr]
        raise UserError(f"Negative prompts do not work with this UNet's encoder_hid_dim_type {kind!r}.")
    return network.encoder_hid_proj


@contextmanager
def _unguided(pipe: Any, network: nn.Module) -> Iterator[None]:
    """Calls without `guidance_scale` get 1.0, which is off; a call that asks for guidance is an error.

    Only where `guidance_scale` means classifier-free guidance: networks that take the number as an input
    keep it. Python looks `__call__` up in the class, so the pipeline gets a subclass for the time.
    """
    kind = type(pipe)
    signature = inspect.signature(kind.__call__)
    embedded = getattr(network, "config", {}).get("time_cond_proj_dim") is not None
    off = 0.0 if isinstance(network, ZImageTransformer2DModel) else 1.0
    name = "true_cfg_scale" if embedded or "true_cfg_scale" in signature.parameters else "guidance_scale"

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if (value := given.get(name)) is not None and value > off:
            raise UserError(
                f"{name} is {value}, but inside negative_prompting the pipeline's own guidance is off: "
                "leave it out."
            )
        if name in signature.parameters and value is None:
            kwargs[name] = off
        return kind.__call__(self, *args, **kwargs)

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    try:
        yield
    finally:
        pipe.__class__ = kind


@contextmanager
def _encoded_with_prompts(pipe: Any, negatives: NegativePrompts, text: NegativeText) -> Iterator[None]:
    """Whenever the pipeline encodes prompts, encode the negative ones the same way and put them in `text`.

    Raises:
        UserError: the pipeline encodes no prompts.
    """
    if not hasattr(pipe, "encode_prompt"):
        raise UserError(f"{type(pipe).__name__} has no encode_prompt, so no negative prompt can be encoded.")
    stock = pipe.encode_prompt
    signature = inspect.signature(stock)
    masked = not {"prompt_attention_mask", "prompt_embeds_mask"}.isdisjoint(signature.parameters)

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
        embeddings, mask = encoded[0], encoded[1] if masked else None
        if isinstance(embeddings, list):  # Z-Image's, of different lengths
            mask = pad_sequence([x.new_ones(len(x)) for x in embeddings], batch_first=True)
            embeddings = pad_sequence(embeddings, batch_first=True)
        text.set(embeddings[rows], None if mask is None else mask[rows], present)
        return output

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
