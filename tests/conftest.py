"""Fixtures shared by all tests: tiny genuine model folders with random weights, made once per session."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

TOKENS = 16  # longest prompt in tokens; short, so that truncation is easy to reach
WIDTH = 16  # width of the text encoder and of the UNet's cross-attention
PICTURE = 16  # side of the pictures in pixels; the autoencoder halves it


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors run fastest on one thread, and a fixed number of threads keeps sums reproducible."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format: 256 bytes, their word ends, a few merges, two specials."""
    letters = sorted(ByteLevel.alphabet())
    merges = [
        ("r", "e"),
        ("re", "d</w>"),
        ("c", "a"),
        ("ca", "t</w>"),
        ("o", "n</w>"),
        ("d", "o"),
        ("do", "g</w>"),
    ]
    words = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Configuration of a text encoder of one layer that fits `tokenizer`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_unet() -> UNet2DConditionModel:
    """A UNet of two levels (8 and 16 channels) on 4 x 8 x 8 latents."""
    return UNet2DConditionModel(
        sample_size=PICTURE // 2,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )


def make_vae() -> AutoencoderKL:
    """An autoencoder that halves height and width, with 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=PICTURE,
        scaling_factor=0.7,
    )


def make_pipeline() -> StableDiffusionPipeline:
    """A whole miniature Stable Diffusion with random weights (seed 0)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
            steps_offset=1,
        )
        return StableDiffusionPipeline(
            vae=make_vae(),
            text_encoder=CLIPTextModel(text_config(tokenizer)),
            tokenizer=tokenizer,
            unet=make_unet(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny epsilon-prediction Stable Diffusion. Shared: do not write into it."""
    folder: Path = tmp_path_factory.mktemp("tiny_sd")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_v(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder declared as a v-prediction model. Shared: do not write into it."""
    folder: Path = tmp_path_factory.mktemp("tiny_sd_v") / "model"
    shutil.copytree(tiny_sd, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    return folder


@pytest.fixture(scope="session")
def smaller_sd(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One attention block, for tracing and sharding take long for each. Shared: do not write into it."""
    folder: Path = tmp_path_factory.mktemp("smaller_sd") / "model"
    shutil.copytree(tiny_sd, folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=PICTURE // 2, in_channels=4, out_channels=4, layers_per_block=1,
            block_out_channels=(8,), norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",), mid_block_type=None, cross_attention_dim=WIDTH,
            attention_head_dim=2,
        ).save_pretrained(folder / "unet")  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a miniature by its name in `tests.backbones`. Shared: do not write into it."""
    from tests.backbones import write_backbone

    root: Path = tmp_path_factory.mktemp("backbones")
    return functools.cache(lambda name: write_backbone(name, root / name))


@pytest.fixture
def own_sd(tiny_sd: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny Stable Diffusion folder, to be damaged at will."""
    folder = tmp_path / "own_sd"
    shutil.copytree(tiny_sd, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny CLIP (CLIPModel, tokenizer, image processor). Shared: do not write into it."""
    folder: Path = tmp_path_factory.mktemp("tiny_clip")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = make_tokenizer()
        vision = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=PICTURE,
            patch_size=4,
            projection_dim=WIDTH,
        )
        config = CLIPConfig(
            text_config=text_config(tokenizer).to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=WIDTH,
        )
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sides = {"height": PICTURE, "width": PICTURE}
    CLIPImageProcessor(size={"shortest_edge": PICTURE}, crop_size=sides).save_pretrained(folder)
    return folder
