"""Miniatures of the published models, with random weights: their classes, file formats and configurations.

Only sizes differ. Configurations (scheduler, text encoder, tokenizer files) are those of the models named.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import sentencepiece
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from lightning_modules.networks.loading import load_parts
from tests.conftest import PICTURE, TOKENS, make_tokenizer, make_vae

SD_BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "trained_betas": None, "steps_offset": 1,
}  # fmt: skip
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("PNDMScheduler", SD_BETAS | {
        "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}),
    "sd21_v": ("DDIMScheduler", SD_BETAS | {
        "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
        "prediction_type": "v_prediction"}),
    "zero_snr": ("DDIMScheduler", SD_BETAS | {
        "clip_sample": False, "set_alpha_to_one": True, "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    "sd_turbo": ("EulerDiscreteScheduler", SD_BETAS | {
        "interpolation_type": "linear", "prediction_type": "epsilon", "timestep_spacing": "trailing",
        "use_karras_sigmas": False}),
    "lcm": ("LCMScheduler", SD_BETAS | {
        "clip_sample": False, "original_inference_steps": 50, "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False, "set_alpha_to_one": True, "timestep_spacing": "leading"}),
    "sdxl": ("EulerDiscreteScheduler", SD_BETAS | {
        "clip_sample": False, "interpolation_type": "linear", "prediction_type": "epsilon",
        "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
        "timestep_spacing": "leading", "use_karras_sigmas": False}),
    "sdxl_turbo": ("EulerAncestralDiscreteScheduler", SD_BETAS | {
        "prediction_type": "epsilon", "timestep_spacing": "trailing"}),
    "pixart": ("DPMSolverMultistepScheduler", {
        "algorithm_type": "dpmsolver++", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "solver_order": 2,
        "solver_type": "midpoint", "lower_order_final": True, "thresholding": False, "steps_offset": 0,
        "timestep_spacing": "linspace"}),
}  # fmt: skip
SCHEDULERS["sd3"] = ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0})
SCHEDULERS["pixart_1024"] = SCHEDULERS["pixart"]
SCHEDULERS["flux"] = ("FlowMatchEulerDiscreteScheduler", {
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 256,
    "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15})  # fmt: skip
SCHEDULERS["sana"] = ("DPMSolverMultistepScheduler", {
    "algorithm_type": "dpmsolver++", "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
    "solver_order": 2, "solver_type": "midpoint", "use_flow_sigmas": True, "flow_shift": 3.0,
    "final_sigmas_type": "zero", "timestep_spacing": "linspace"})  # fmt: skip
SCHEDULERS["zimage"] = ("FlowMatchEulerDiscreteScheduler", {
    "num_train_timesteps": 1000, "shift": 6.0, "use_dynamic_shifting": False})  # fmt: skip
SCHEDULERS["klein"] = (
    "FlowMatchEulerDiscreteScheduler",
    {**SCHEDULERS["flux"][1], "time_shift_type": "exponential"},
)
SCHEDULERS["qwen"] = ("FlowMatchEulerDiscreteScheduler", {
    "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": True, "base_image_seq_len": 256,
    "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02,
    "time_shift_type": "exponential"})  # fmt: skip
FLOWS = ("sd3", "flux", "sana", "zimage", "klein", "qwen")
SIZED = ("FluxPipeline", "ZImagePipeline", "Flux2KleinPipeline", "QwenImagePipeline")
"""Pipelines whose calls name a size: their own default is 1024."""
TRAINED = ("sd15", "sd21_v", "zero_snr", "sdxl", "pixart", "pixart_1024", *FLOWS)
"""Models that teach."""


def write_backbone(name: str, folder: Path) -> Path:
    """Write one of `SCHEDULERS`' models as a folder; the weights are the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name.startswith("sdxl"):
            _sdxl(folder, name)
        elif name.startswith("pixart"):
            _pixart(folder, name)
        elif name == "sd3":
            _sd3(folder)
        elif name == "flux":
            _flux(folder)
        elif name == "sana":
            _sana(folder)
        elif name == "zimage":
            _zimage(folder)
        elif name == "klein":
            _klein(folder)
        elif name == "qwen":
            _qwen(folder)
        else:
            _sd(folder, name)
    kind, settings = SCHEDULERS[name]
    _json(folder / "scheduler" / "scheduler_config.json", {"_class_name": kind, **settings})
    return folder


def stock_pipeline_of(folder: Path, **parts: Any) -> DiffusionPipeline:
    """The folder as users open it, without progress bar."""
    if (folder / "safety_checker").is_dir():
        parts = {"safety_checker": None, "requires_safety_checker": False, **parts}
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_options(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What calls of miniatures need that are not of the size their pipeline takes or knows by itself."""
    if type(pipeline).__name__ in SIZED:
        return {"height": PICTURE, "width": PICTURE}
    if type(pipeline).__name__ == "SanaPipeline":  # it draws nothing smaller
        return {"height": 32, "width": 32, "use_resolution_binning": False}
    pixart = type(pipeline).__name__.startswith("PixArt")
    return {"use_resolution_binning": False, "clean_caption": False} if pixart else {}


# --- Stable Diffusion -------------------------------------------------------------------------------------


def _sd(folder: Path, name: str) -> None:
    """SD 1.5 and LCM (OpenAI's CLIP), or SD 2.1, SD Turbo and models fine-tuned from them (OpenCLIP)."""
    openai = name in ("sd15", "lcm")
    network: dict[str, Any] = {"attention_head_dim": 2, "cross_attention_dim": 16}
    if not openai:
        network |= {"attention_head_dim": [2, 4], "use_linear_projection": True}
    if name == "lcm":
        network["time_cond_proj_dim"] = 6
    unet = _unet(("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D"), **network)
    _save(folder, unet=unet, vae=make_vae())
    _clip(folder / "text_encoder", CLIPTextModel, 16, "quick_gelu" if openai else "gelu")
    _tokenizer(folder / "tokenizer", "<|endoftext|>" if openai else "!")
    pipeline = "LatentConsistencyModelPipeline" if name == "lcm" else "StableDiffusionPipeline"
    index = {"unet": UNet2DConditionModel, "vae": "AutoencoderKL", "text_encoder": CLIPTextModel}
    _index(folder, pipeline, name, **index, tokenizer="CLIPTokenizer")
    if name == "sd15":  # its checker lies in the folder, with weights that nobody needs here
        _json(folder / "safety_checker" / "config.json", {"model_type": "clip"})
        content = json.loads((folder / "model_index.json").read_text())
        content["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        _json(folder / "model_index.json", content)


def _sdxl(folder: Path, name: str) -> None:
    unet = _unet(
        ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[2, 4], cross_attention_dim=16 + 24, transformer_layers_per_block=[1, 2],
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )  # fmt: skip
    _save(folder, unet=unet, vae=make_vae())
    _clip(folder / "text_encoder", CLIPTextModel, 16, "quick_gelu")
    _clip(folder / "text_encoder_2", CLIPTextModelWithProjection, 24, "gelu", projection_dim=12)
    _tokenizer(folder / "tokenizer", "<|endoftext|>")
    _tokenizer(folder / "tokenizer_2", "!")
    _index(
        folder, "StableDiffusionXLPipeline", name, unet=UNet2DConditionModel, vae="AutoencoderKL",
        text_encoder=CLIPTextModel, text_encoder_2=CLIPTextModelWithProjection, tokenizer="CLIPTokenizer",
        tokenizer_2="CLIPTokenizer", force_zeros_for_empty_prompt=True,
    )  # fmt: skip


def _unet(down: tuple[str, str], up: tuple[str, str], **settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=down, up_block_types=up, **settings,
    )  # fmt: skip


def _clip(folder: Path, kind: Any, width: int, activation: str, projection_dim: int = 16) -> None:
    """A text encoder of two layers; the special tokens' numbers are those in all published configurations."""
    config = CLIPTextConfig(
        vocab_size=len(make_tokenizer()), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, hidden_act=activation,
        projection_dim=projection_dim, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    kind(config).save_pretrained(folder)


def _tokenizer(folder: Path, padding: str) -> None:
    """vocab.json and merges.txt, as published; SD 2 and SDXL's second encoder pad with "!"."""
    model = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    _json(folder / "vocab.json", model["vocab"])
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    marks = {
        name: {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for name, text in special.items()
    }
    _json(folder / "special_tokens_map.json", {**marks, "pad_token": padding})
    settings = {name: {"__type": "AddedToken", **mark} for name, mark in marks.items()}
    _json(folder / "tokenizer_config.json", {
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": TOKENS,
        "pad_token": padding, "tokenizer_class": "CLIPTokenizer", **settings})  # fmt: skip


# --- Stable Diffusion 3 -----------------------------------------------------------------------------------


def _sd3(folder: Path) -> None:
    """Stable Diffusion 3.5 medium: normed queries and keys, a second attention in the first block."""
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=20,
        pos_embed_max_size=6, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    vae = make_vae()
    vae.register_to_config(shift_factor=0.06)
    _save(folder, transformer=transformer, vae=vae)
    _clip(folder / "text_encoder", CLIPTextModelWithProjection, 16, "quick_gelu", projection_dim=8)
    _clip(folder / "text_encoder_2", CLIPTextModelWithProjection, 24, "gelu", projection_dim=12)
    _tokenizer(folder / "tokenizer", "<|endoftext|>")
    _tokenizer(folder / "tokenizer_2", "!")
    _t5(folder, "_3", 48)
    _index(
        folder, "StableDiffusion3Pipeline", "sd3", transformer=SD3Transformer2DModel, vae="AutoencoderKL",
        text_encoder=CLIPTextModelWithProjection, text_encoder_2=CLIPTextModelWithProjection,
        text_encoder_3=T5EncoderModel, tokenizer="CLIPTokenizer", tokenizer_2="CLIPTokenizer",
        tokenizer_3="T5Tokenizer",
    )  # fmt: skip


def _flux(folder: Path) -> None:
    """FLUX.1-dev: guidance distilled into it; latents packed 2 x 2."""
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    vae = make_vae()
    vae.register_to_config(shift_factor=0.1)
    _save(folder, transformer=transformer, vae=vae)
    _clip(folder / "text_encoder", CLIPTextModel, 16, "quick_gelu")
    _tokenizer(folder / "tokenizer", "<|endoftext|>")
    _t5(folder, "_2", 24)
    _index(
        folder, "FluxPipeline", "flux", transformer=FluxTransformer2DModel, vae="AutoencoderKL",
        text_encoder=CLIPTextModel, text_encoder_2=T5EncoderModel, tokenizer="CLIPTokenizer",
        tokenizer_2="T5Tokenizer",
    )  # fmt: skip


def _sana(folder: Path) -> None:
    """SANA 1.5, whose queries and keys are normed over all heads."""
    transformer = SanaTransformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=24, qk_norm="rms_norm_across_heads", timestep_scale=0.5,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, scaling_factor=0.41, encoder_layers_per_block=(1, 1),
        encoder_block_types="ResBlock", decoder_block_types="ResBlock", decoder_layers_per_block=(1, 1),
        encoder_block_out_channels=(4, 8), decoder_block_out_channels=(4, 8),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    _save(folder, transformer=transformer, vae=vae)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["\u2581", *(chr(code) for code in range(33, 127)), "\n"]
    words = {word: place for place, word in enumerate(special + letters)}
    GemmaTokenizer(vocab=words).save_pretrained(folder / "tokenizer")
    text = Gemma2Config(
        vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip
    Gemma2Model(text).save_pretrained(folder / "text_encoder")
    _index(
        folder, "SanaPipeline", "sana", transformer=SanaTransformer2DModel, vae="AutoencoderDC",
        text_encoder=Gemma2Model, tokenizer="GemmaTokenizer",
    )  # fmt: skip


def _zimage(folder: Path) -> None:
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 4, 4], axes_lens=[640, 16, 16],
    )  # fmt: skip
    vae = make_vae()
    vae.register_to_config(shift_factor=0.1)
    _save(folder, transformer=transformer, vae=vae)
    _qwen_tokenizer(folder / "tokenizer")
    Qwen3Model(_qwen3(2)).save_pretrained(folder / "text_encoder")
    _index(
        folder, "ZImagePipeline", "zimage", transformer=ZImageTransformer2DModel, vae="AutoencoderKL",
        text_encoder=Qwen3Model, tokenizer="Qwen2Tokenizer",
    )  # fmt: skip


def _klein(folder: Path) -> None:
    """FLUX.2-klein-base: blocks of 2 x 2 codes, text from the 9th, 18th and 27th layer."""
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
        sample_size=PICTURE,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    _save(folder, transformer=transformer, vae=vae)
    _qwen_tokenizer(folder / "tokenizer")
    Qwen3ForCausalLM(_qwen3(27, heads=1)).save_pretrained(folder / "text_encoder")
    _index(
        folder, "Flux2KleinPipeline", "klein", transformer=Flux2Transformer2DModel, vae="AutoencoderKLFlux2",
        text_encoder=Qwen3ForCausalLM, tokenizer="Qwen2Tokenizer", is_distilled=False,
    )  # fmt: skip


def _qwen(folder: Path) -> None:
    """Qwen-Image; the published network names no picture size."""
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    transformer.register_to_config(sample_size=8)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075], latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
    )  # fmt: skip
    _save(folder, transformer=transformer, vae=vae)
    _qwen_tokenizer(folder / "tokenizer")
    text: dict[str, Any] = {
        **_qwen3(1).to_dict(), "model_type": "qwen2_5_vl_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    _index(
        folder, "QwenImagePipeline", "qwen", transformer=QwenImageTransformer2DModel,
        vae="AutoencoderKLQwenImage", text_encoder=Qwen2_5_VLForConditionalGeneration,
        tokenizer="Qwen2Tokenizer",
    )  # fmt: skip


def _qwen3(layers: int, heads: int = 2) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(_qwen_words()) + 3, hidden_size=8 * heads, intermediate_size=16,
        num_hidden_layers=layers, head_dim=8, num_attention_heads=heads, num_key_value_heads=1,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip


def _qwen_words() -> dict[str, int]:
    return {letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}


def _qwen_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes in Qwen's format, with the frame of its chat template."""
    tokenizer = Qwen2Tokenizer(vocab=_qwen_words(), merges=[], model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{%- for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
        "{%- endif %}{%- endif %}"
    )
    tokenizer.save_pretrained(folder)


# --- PixArt-alpha -----------------------------------------------------------------------------------------


def _pixart(folder: Path, name: str) -> None:
    """PixArt-alpha; at a sample size of 128 the network asks for the picture's size and shape."""
    large = name == "pixart_1024"
    sizes = {"sample_size": 128, "patch_size": 16} if large else {"sample_size": 8, "patch_size": 2}
    # pictures of 128 x 128: a larger autoencoder, or one with attention between all places, takes seconds
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    narrow = {"mid_block_add_attention": False, "block_out_channels": (2,), **blocks} if large else {}
    vae = AutoencoderKL.from_config({**make_vae().config, **narrow})
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=16, **sizes,
    )  # fmt: skip
    _save(folder, transformer=transformer, vae=vae)
    _t5(folder, "", 16)
    _index(
        folder, "PixArtAlphaPipeline", name, transformer=PixArtTransformer2DModel, vae="AutoencoderKL",
        text_encoder=T5EncoderModel, tokenizer="T5Tokenizer",
    )  # fmt: skip


def _t5(folder: Path, place: str, width: int) -> None:
    text = T5Config(
        vocab_size=320, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.1,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(text).save_pretrained(folder / f"text_encoder{place}")
    write_spiece(folder / f"tokenizer{place}")


def write_spiece(folder: Path) -> None:
    """T5's tokenizer as published: a sentencepiece model, no tokenizer.json."""
    folder.mkdir(parents=True)
    text = "a red cat and the dog sat on a blue mat with two green cups of tea in an old house"
    words = text.split()
    lines = [" ".join(words[i : i + 6]) for i in range(len(words))] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", hard_vocab_limit=False, minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    extra = [f"<extra_id_{i}>" for i in range(100)]
    _json(folder / "added_tokens.json", {token: size + 99 - i for i, token in enumerate(extra)})
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _json(folder / "special_tokens_map.json", {"additional_special_tokens": extra, **special})
    _json(folder / "tokenizer_config.json", {
        "additional_special_tokens": extra, "clean_up_tokenization_spaces": True, "extra_ids": 100,
        "legacy": True, "model_max_length": 512, "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer",
        **special})  # fmt: skip


# --- files ------------------------------------------------------------------------------------------------


def _save(folder: Path, **networks: nn.Module) -> None:
    for name, network in networks.items():
        save: Callable[..., Any] = network.save_pretrained  # type: ignore[assignment]
        save(folder / name)


def _index(folder: Path, pipeline: str, name: str, **parts: Any) -> None:
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.20.0"}
    for part, kind in parts.items():
        if isinstance(kind, bool):
            index[part] = kind
            continue
        kind = kind if isinstance(kind, str) else kind.__name__
        library = "diffusers" if hasattr(diffusers, kind) else "transformers"
        index[part] = [library, kind]
    index["scheduler"] = ["diffusers", SCHEDULERS[name][0]]
    if pipeline in ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"):
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    _json(folder / "model_index.json", index)


def _json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def private_copy(folder: Path, place: Path) -> Path:
    """A copy to be changed at will."""
    shutil.copytree(folder, place)
    return place


def without_t5(folder: Path, place: Path) -> Path:
    """A copy of the miniature Stable Diffusion 3 as its users without memory for T5 load it."""
    index = json.loads((private_copy(folder, place) / "model_index.json").read_text())
    index |= {name: [None, None] for name in ("text_encoder_3", "tokenizer_3")}
    _json(place / "model_index.json", index)
    return place


def moved(folder: Path, seed: int) -> Any:
    """The folder's network with every weight moved at random."""
    network = load_parts(folder).denoiser
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network
