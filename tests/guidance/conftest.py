"""Miniature stock pipelines of every supported kind, with random weights, and a recorder of network calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.conftest import WIDTH, make_pipeline, make_tokenizer, make_vae, text_config

PIPELINES = ("sd", "sdxl", "pixart", "sd3", "flux")


def make_t5() -> T5EncoderModel:
    """A text encoder of one layer, as PixArt, SD 3 and FLUX have it."""
    config = T5Config(
        vocab_size=len(make_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config)


def make_flow_vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=1.5,
        shift_factor=0.1,
    )


def make_sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    return StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"),
        add_watermarker=False,
    )


def make_pixart() -> PixArtAlphaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=WIDTH,
        use_additional_conditions=False,
    )  # fmt: skip
    return PixArtAlphaPipeline(
        make_tokenizer(),
        make_t5(),
        make_vae(),
        transformer,
        DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
    )


def make_sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH,
        out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    tokenizer = make_tokenizer()
    encoders = [CLIPTextModelWithProjection(text_config(tokenizer)) for _ in range(2)]
    config = T5Config(
        vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_flow_vae(4),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=make_tokenizer(),
        text_encoder_3=T5EncoderModel(config),
        tokenizer_3=make_tokenizer(),
    )


def make_flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    tokenizer = make_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_flow_vae(4),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=make_t5(),
        tokenizer_2=make_tokenizer(),
        transformer=transformer,
    )


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """One pipeline of each kind; weights large enough that text matters. Not to be changed for good."""
    makers: dict[str, Callable[[], Any]] = {
        "sd": make_pipeline, "sdxl": make_sdxl, "pixart": make_pixart, "sd3": make_sd3, "flux": make_flux,
    }  # fmt: skip
    made = {}
    with torch.random.fork_rng():
        for name, make in makers.items():
            torch.manual_seed(3)
            made[name] = make()
            made[name].set_progress_bar_config(disable=True)
            for part in made[name].components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()
            with torch.no_grad():
                for parameter in network_of(made[name]).parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
    return made


@pytest.fixture(params=PIPELINES)
def pipe(request: pytest.FixtureRequest, pipelines: dict[str, Any]) -> Any:
    """Each of the pipelines in turn."""
    return pipelines[request.param]


def network_of(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@contextmanager
def recorded(pipe: Any) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """The network's calls inside: (keyword arguments, output)."""
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        names = ("sample", "timestep") if hasattr(pipe, "unet") else ("hidden_states",)
        calls.append((dict(zip(names, args, strict=False)) | kwargs, output[0]))

    handle = network_of(pipe).register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def draw(pipe: Any, prompts: list[str], seeds: list[int], steps: int = 1, **options: Any) -> Tensor:
    """Latents of the pipeline's own guidance being off, one seed per image."""
    guidance = {} if isinstance(pipe, FluxPipeline) else {"guidance_scale": 1.0}
    if not hasattr(pipe, "unet"):
        options.setdefault("max_sequence_length", 12)
    if isinstance(pipe, PixArtAlphaPipeline):
        options = {"use_resolution_binning": False, "clean_caption": False, **options}
    latents: Tensor = pipe(
        prompts,
        height=16,
        width=16,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **guidance,
        **options,
    ).images
    return latents
