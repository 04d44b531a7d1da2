"""Tiny CLIPs, decoders and settings of image losses, for tests."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPModel

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.image_losses.clip import ClipLoss
from lightning_modules.image_losses.terms import ImageLossSettings
from lightning_modules.objectives.base import Networks, StudentSample, Terms
from lightning_modules.objectives.swiftbrush import SwiftBrush

CLIP = "lightning_modules.image_losses.clip.ClipLoss"


class NoDistillation(SwiftBrush):
    """Asks nothing of the student, so that image losses alone move it."""

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        return Terms({"vsd": 0 * sample.x0.sum()})


def clip_settings(clip: Path, tau: float = 0.9, weight: Any = 1.0, **rest: Any) -> ImageLossSettings:
    """One CLIP loss; the tiny CLIPs' cosines are far below 0.9."""
    return ImageLossSettings([ClipLoss(str(clip), tau=tau, weight=weight)], **rest)


def copied_clip(clip: Path, folder: Path, seed: int = 5) -> Path:
    """A CLIP of the same shape with other weights, in another folder."""
    model = CLIPModel.from_pretrained(clip)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    for file in clip.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def tiny_decoder(folder: Path, latent_channels: int = 4) -> Path:
    """An AutoencoderTiny that doubles the sides, as the tiny Stable Diffusion's own does."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoencoderTiny(
            latent_channels=latent_channels, encoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
            decoder_block_out_channels=(4, 4), num_decoder_blocks=(1, 1),
        ).save_pretrained(folder)  # fmt: skip
    return folder


def open_clip_network(folder: Path, name: str = "tiny-open-clip") -> tuple[str, Path]:
    """Register a miniature architecture with open_clip; returns its name and a checkpoint as HPSv2's are."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = open_clip.create_model(name)
    file = folder / "hps.pt"
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, file)
    return name, file
