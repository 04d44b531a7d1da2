"""Prompts are encoded as stock diffusers encodes them."""

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder
from lightning_modules.networks.backbones.stable_diffusion import ClipPromptEncoder
from lightning_modules.networks.loading import load_parts
from lightning_modules.pipelines import stock_pipeline

PROMPTS = ["a red cat", "", "dog on a dog, " * 12]  # the last one is cut


@pytest.fixture
def pipeline(tiny_sd: Path) -> StableDiffusionPipeline:
    return stock_pipeline(load_parts(tiny_sd))


def encoder_of(pipeline: StableDiffusionPipeline) -> PromptEncoder:
    """The family's own encoder, on the pipeline's networks."""
    tokenizer = pipeline.tokenizer
    return ClipPromptEncoder([tokenizer], [pipeline.text_encoder], tokenizer.model_max_length)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.filterwarnings("ignore:A prompt has more than")
def test_conditions_are_the_pipelines(pipeline: StableDiffusionPipeline, mask: bool) -> None:
    pipeline.text_encoder.config.use_attention_mask = mask
    with torch.no_grad():
        text, null = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    condition = encoder_of(pipeline).encode(PROMPTS)
    assert torch.equal(condition.tensors["encoder_hidden_states"], text)
    torch.testing.assert_close(condition.null["encoder_hidden_states"].expand_as(null), null)
    assert not torch.equal(text[0], text[1])


def test_the_mask_matters_to_the_text_encoder(pipeline: StableDiffusionPipeline) -> None:
    encoder = encoder_of(pipeline)
    plain = encoder.embed(["a red cat"])["encoder_hidden_states"]
    pipeline.text_encoder.config.use_attention_mask = True
    assert not torch.equal(encoder.embed(["a red cat"])["encoder_hidden_states"], plain)


def test_truncation_is_counted_and_told_once(pipeline: StableDiffusionPipeline) -> None:
    encoder = encoder_of(pipeline)
    letters = "x " * 14  # with begin and end exactly the 16 tokens that fit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([letters, "a cat"])
    assert encoder.truncated_prompts == 0
    with pytest.warns(UserWarning, match="more than 16 tokens") as caught:
        encoder.encode([letters + "x", letters + "x x"])
        encoder.encode([letters + "x"])
    assert encoder.truncated_prompts == 3
    assert sum("more than 16" in str(w.message) for w in caught) == 1


def test_the_text_encoder_is_frozen_and_not_stored(pipeline: StableDiffusionPipeline) -> None:
    encoder = encoder_of(pipeline).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.encode(["cat"]).tensors["encoder_hidden_states"].requires_grad
    assert encoder.state_dict() == {}
    torch.nn.ModuleList([encoder]).load_state_dict({})


def test_null_is_computed_once_and_follows_the_dtype(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(pipeline)
    first = encoder.null()
    assert encoder.null() is first
    assert encoder.double().encode(["cat"]).null["encoder_hidden_states"].dtype == torch.float64
