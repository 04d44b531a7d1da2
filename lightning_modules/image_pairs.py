"""Regression of the student on given pictures: SwiftBrush v2's optional image regularization ("Ours*").

The paper (arXiv 2408.14176) regularizes on captioned pictures in the manner of DMD (arXiv 2311.18828), whose
pairs are (noise, the teacher's picture of it). A given picture has no noise; here it is the one that the
teacher's ODE leads back to, so that picture and noise belong together and the mean over noises is not blur.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from datamodules.picture_files import Frame, match_files, read_pictures
from datamodules.tables import read_column
from lightning_modules.diffusion.broadcast import expand_like
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.generator import OneStepGenerator
from lightning_modules.networks.loading import TextToImageParts
from lightning_modules.objectives.base import Scores


@dataclass
class ImagePairs:
    """Pictures with captions for a regression term. With them the training is no longer image-free.

    Attributes:
        folder: of the pictures.
        captions: file of captions: a table (JSON Lines, CSV …) with a column caption, prompt or text, or one
            caption a line.
        file_column: the table's column of file names; null: the pictures in the order of their names.
        weight: of the term, 0.25 in DMD.
        batch_size: pictures per student update, over all processes.
        inversion_steps: teacher evaluations that find a picture's noise.
    """

    folder: str
    captions: str
    file_column: str | None = None
    weight: float = 0.25
    batch_size: int = 4
    inversion_steps: int = 10

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not math.isfinite(self.weight) or self.weight <= 0:
            raise UserError(f"image_pairs.weight is {self.weight}: it must be above 0")
        if self.batch_size < 1 or self.inversion_steps < 1:
            raise UserError(
                f"image_pairs.batch_size={self.batch_size}, inversion_steps={self.inversion_steps}: both "
                "must be at least 1"
            )


class PairRegression:
    """The term weight * MSE(f(z, y), E(picture)), z from the teacher's ODE.

    Args:
        settings: the pictures.
        parts: of the teacher; give the size of its pictures.
        world_size: number of processes.

    Raises:
        UserError: the pictures can't be used, or the processes can't share them out.
    """

    def __init__(self, settings: ImagePairs, parts: TextToImageParts, world_size: int = 1) -> None:
        if settings.batch_size % world_size:
            raise UserError(
                f"image_pairs.batch_size is {settings.batch_size}: it must be a multiple of the {world_size} "
                "processes"
            )
        self.settings = settings
        self.share = settings.batch_size // world_size
        side = parts.latent_shape[-1] * 2 ** (len(parts.vae.config.block_out_channels) - 1)
        self.frame = Frame(side)
        self.captions = read_column(settings.captions)
        names = read_column(settings.captions, settings.file_column) if settings.file_column else None
        self.files = match_files(settings.folder, len(self.captions), names)

    @property
    def notice(self) -> str:
        """What the run prints."""
        return (
            f"This training is not image-free: it also sees {len(self.captions)} captioned pictures "
            f"of {self.settings.folder} (image_pairs)."
        )

    @property
    def trained_on(self) -> str:
        """What checkpoint and model card say."""
        return f"prompts and {len(self.captions)} captioned pictures, so not image-free"

    def places(self, rank: int) -> Tensor:
        """Places in the global batch of pictures of one process, long."""
        return torch.arange(rank * self.share, (rank + 1) * self.share)

    def loss(self, generator: OneStepGenerator, scores: Scores, random: StepRandom) -> Tensor:
        """The term over the pictures drawn by `random`, whose indices are `places`; scalar."""
        chosen = (random.uniform("image_pair").double() * len(self.captions)).long().tolist()
        with torch.no_grad():
            condition = generator.prompt_encoder.encode([self.captions[i] for i in chosen])
            images = torch.stack(read_pictures([self.files[i] for i in chosen], self.frame)).to(random.device)
            target = generator.decoder.encode(images)
            noise = ddim_inversion(target, scores, condition, self.settings.inversion_steps)
        return self.settings.weight * F.mse_loss(generator.latents(noise, condition), target)


@torch.no_grad()
def ddim_inversion(x0: Tensor, scores: Scores, condition: Condition, steps: int) -> Tensor:
    """The noise [B, C, h, w] from which the unguided teacher's ODE arrives at x0 [B, C, h, w].

    DDIM backwards (arXiv 2010.02502, section 4.3): x_s = alpha_s x0(x_t, t) + sigma_s eps(x_t, t), s > t.
    """
    timesteps = torch.linspace(0, scores.schedule.num_timesteps - 1, steps + 1).round().long().tolist()
    x = x0
    for now, then in zip(timesteps, timesteps[1:]):
        t = torch.full((len(x),), now, device=x.device)
        prediction = scores.teacher(x, t, condition)
        alpha, sigma = scores.schedule.alpha_sigma(torch.full_like(t, then))
        x = expand_like(alpha, x) * prediction.x0 + expand_like(sigma, x) * prediction.epsilon
    return x
