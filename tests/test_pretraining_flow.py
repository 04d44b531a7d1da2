"""Pretraining of the miniature Stable Diffusion 3: the exported folder in the stock pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from lightning_modules.generator import load_generator
from lightning_modules.pretraining import AutoencoderPretraining
from lightning_modules.pretraining.flow import StableDiffusion3Pretraining
from tests.conftest import make_tokenizer
from tests.fake_emoji import make_artwork
from tests.test_pretraining import AUTOENCODER, TEXT, train

TRANSFORMER = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 40, "pooled_projection_dim": 20,
    "caption_projection_dim": 16, "pos_embed_max_size": 4, "qk_norm": "rms_norm",
}  # fmt: skip
TEXTS = [{**TEXT, "projection_dim": width, "num_hidden_layers": 2} for width in (8, 12)]


def test_the_folder_draws_in_the_stock_pipeline_what_training_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_artwork(tmp_path / "data" / "emoji")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    train(AutoencoderPretraining("vae", AUTOENCODER, warmup_steps=1), tmp_path)
    make_tokenizer().save_pretrained("words")
    latents = {"shift_factor": 0.2, "scaling_factor": 0.5}
    module: Any = StableDiffusion3Pretraining(
        "sd3", "vae", "words", TRANSFORMER, TEXTS, 1.5, latents, warmup_steps=1
    )
    train(module, tmp_path)
    raw = module.autoencoder.encode(module.trainer.datamodule.source.composite(
        module.trainer.datamodule.keys[:2]) * 2 - 1).latent_dist.mean  # fmt: skip
    torch.testing.assert_close(module.latents[:2], (raw - 0.2) * 0.5, rtol=1e-4, atol=1e-4)
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained("sd3", text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    captions, noise = ["A Cat ", "an egg"], torch.randn(2, 4, 8, 8)
    drawn = pipeline(captions, latents=noise, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    module.transformer = pipeline.transformer
    module.text_encoders = torch.nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
    with torch.no_grad():  # one Euler step: x0 = z - v
        x0 = noise - module.denoise(noise, torch.tensor([1000.0, 1000.0]), captions)
    pictures = pipeline.vae.decode(x0 / 0.5 + 0.2).sample / 2 + 0.5
    torch.testing.assert_close(drawn.images, pictures.clamp(0, 1), rtol=0, atol=1e-4)
    generator = load_generator("sd3")
    ours = generator.decoder.decode(generator.latents(noise, generator.prompt_encoder.encode(captions)))
    torch.testing.assert_close(ours, drawn.images, rtol=0, atol=1e-4)
