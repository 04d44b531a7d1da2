"""Pretraining of the miniature PixArt: the exported folder in the stock pipeline, and its tokenizer."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AutoTokenizer

from lightning_modules.pretraining import AutoencoderPretraining
from lightning_modules.pretraining.transformer import PixArtPretraining, word_tokenizer
from tests.fake_emoji import make_artwork
from tests.test_pretraining import AUTOENCODER, train

TRANSFORMER = {
    "sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 8, "num_layers": 1,
    "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8,
}  # fmt: skip
TEXT = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def test_pixart_opens_in_the_stock_pipeline_and_draws_what_training_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_artwork(tmp_path / "data" / "emoji")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    train(AutoencoderPretraining("vae", AUTOENCODER, warmup_steps=1), tmp_path)
    module = PixArtPretraining("pixart", "vae", TRANSFORMER, TEXT, warmup_steps=1)
    train(module, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained("pixart")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "PixArtAlphaPipeline"
    captions, noise = ["A Cat ", "an egg"], torch.randn(2, 4, 8, 8)
    options = {"use_resolution_binning": False, "clean_caption": False, "output_type": "latent"}
    drawn = pipeline(
        captions, latents=noise, num_inference_steps=1, guidance_scale=1.0, **options
    ).images  # one DDIM step: x0 = (z - sigma eps) / alpha
    pipeline_module = PixArtPretraining("unused", "vae", TRANSFORMER, TEXT)
    pipeline_module.transformer, pipeline_module.text_encoder = pipeline.transformer, pipeline.text_encoder
    with torch.no_grad():  # training pads to 24 tokens and the pipeline to 120: the mask hides the difference
        epsilon = pipeline_module.denoise(noise, torch.tensor([999, 999]), captions)
    alpha_squared = pipeline.scheduler.alphas_cumprod[999]
    expected = (noise - (1 - alpha_squared).sqrt() * epsilon) / alpha_squared.sqrt()
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-2)  # 1 / alpha is 158 here


def test_words_are_pieces_and_other_words_are_spelt(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(["a red apple, noto style", "Apple pie on a blue background"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a red apple, qux")["input_ids"])
    assert tokens == ["\u2581a", "\u2581red", "\u2581apple", ",", "\u2581", "q", "u", "x", "</s>"]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a blue pie")["input_ids"] == tokenizer("a blue pie")["input_ids"]
    padded = again("", padding="max_length", max_length=3)
    assert padded["input_ids"] == [1, 0, 0] and padded["attention_mask"] == [1, 0, 0]
