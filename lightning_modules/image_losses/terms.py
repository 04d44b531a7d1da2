"""Decodes the student's samples once for all image losses, and makes their weighted terms."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.image_losses.base import ImageLoss
from lightning_modules.networks.decoder import LatentDecoder, load_autoencoder
from lightning_modules.networks.loading import TextToImageParts
from lightning_modules.networks.weights import content_hash, hide_from_state_dict


@dataclass
class ImageLossSettings:
    """Auxiliary losses on decoded pictures.

    Attributes:
        losses: the losses; all see the same pictures.
        decoder: folder or hub name of the AutoencoderTiny (TAESD) or AutoencoderKL that decodes for them;
            null: the teacher's autoencoder.
        images_per_update: most pictures decoded for a student update, over all processes, drawn anew each
            time; null: the whole batch.
    """

    losses: list[ImageLoss] = field(default_factory=list)
    decoder: str | None = None
    images_per_update: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        names = [loss.name for loss in self.losses]
        if not names or len(set(names)) < len(names):
            raise UserError(f"image_losses.losses holds {names}: give at least one, each once")
        if self.images_per_update is not None and self.images_per_update < 1:
            raise UserError(
                f"image_losses.images_per_update is {self.images_per_update}: it must be at least 1, or null"
            )


class ImageTerms(nn.Module):
    """The terms that image losses add to the student's loss.

    Raises:
        UserError: a network can't be read, or the decoder is of other latents than the teacher's.
    """

    def __init__(self, settings: ImageLossSettings, parts: TextToImageParts) -> None:
        super().__init__()
        self.cap = settings.images_per_update
        autoencoder = parts.vae
        if settings.decoder is not None:
            autoencoder = load_autoencoder(settings.decoder)
            if (own := autoencoder.config.latent_channels) != (
                needed := parts.backbone.latent_channels(parts.vae)
            ):
                raise UserError(
                    f"the decoder {settings.decoder} has {own} latent channels, the teacher {parts.path} has "
                    f"{needed}: give a decoder that was made for the teacher's latents"
                )
        self.decoder = LatentDecoder(autoencoder)
        for loss in settings.losses:
            loss.load()
        self.losses = nn.ModuleList(settings.losses)
        self.requires_grad_(False)
        hide_from_state_dict(self)

    def weights(self, step: int, max_steps: int) -> dict[str, float]:
        """Weight of each loss after `step` student updates."""
        return {loss.name: loss.weight(step, max_steps) for loss in self._losses()}

    def judge(
        self, x0: Tensor, prompts: list[str], random: StepRandom, batch_size: int, max_steps: int
    ) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
        """Weighted terms of a micro-batch and numbers to log; nothing is decoded where all weights are zero.

        Args:
            x0: latents [B, C, h, w] at unit scale; the gradient flows to them.
            prompts: the B prompts.
            random: of the step, for these B samples.
            batch_size: samples of the whole update, over all processes.
            max_steps: student updates of the training.

        Returns:
            terms: name -> scalar; each has the mean over the batch as its expectation, also where only some
                of the pictures are decoded.
            numbers: by name; those called truncated… are counts.
        """
        weights = self.weights(random.step, max_steps)
        terms: dict[str, Tensor] = {}
        numbers: dict[str, float | Tensor] = {f"weight_{name}": value for name, value in weights.items()}
        active = [loss for loss in self._losses() if weights[loss.name] != 0]
        if not active:
            return terms, numbers
        rows, shares = chosen_samples(random, batch_size, self.cap)
        # of an autoencoder in shards each process has to be there, also where others hold the pictures
        images = self.decoder.decode(x0[rows]) if rows or self.decoder.in_shards else x0[rows]
        for loss in active:
            cut = loss.truncated_prompts
            if not rows:  # other micro-batches hold the pictures of this update
                per_image, diagnostics = images.flatten(), dict.fromkeys(loss.logged, shares)
            else:
                per_image = loss(images, [prompts[row] for row in rows])
                diagnostics = loss.diagnostics
            portions = shares.to(per_image)
            terms[loss.name] = weights[loss.name] * (portions * per_image).sum()
            for name in loss.logged:  # the same names in every process
                numbers[f"{name}_{loss.name}"] = (portions * diagnostics[name].to(per_image)).sum()
            numbers[f"truncated_prompts_{loss.name}"] = loss.truncated_prompts - cut
        return terms, numbers

    def _losses(self) -> Iterable[ImageLoss]:
        return self.losses  # type: ignore[return-value]

    def train(self, mode: bool = True) -> "ImageTerms":
        """Stay in evaluation mode: nothing here is trained."""
        return super().train(False)


def chosen_samples(random: StepRandom, batch_size: int, cap: int | None) -> tuple[list[int], Tensor]:
    """Which samples of a micro-batch are decoded, and with what share of its mean.

    The global batch is cut into `cap` blocks of neighbours, and one sample drawn from each. So every process
    and micro-batch decodes about equally many, the choice does not depend on how they are split, and with
    the size of its block as weight the sum has the mean of all samples as its expectation.

    Returns:
        rows: numbers of the chosen samples within the micro-batch.
        shares: [len(rows)], float64; over all samples of the batch they add up to one per micro-batch.
    """
    size = random.batch_size
    if cap is None or cap >= batch_size:
        return list(range(size)), torch.full((size,), 1 / size, dtype=torch.float64)
    rows, shares = [], []
    for row, index in enumerate(random.indices):
        block = index * cap // batch_size  # the block [first, last) that holds this sample
        first, last = -(-block * batch_size // cap), -(-(block + 1) * batch_size // cap)
        if index == first + int(random.shared_uniform(f"decoded_{block}") * (last - first)):
            rows.append(row)
            shares.append((last - first) / size)
    return rows, torch.tensor(shares, dtype=torch.float64)


def check_judges(losses: Iterable[ImageLoss], callbacks: Iterable[Any]) -> None:
    """Make sure that no network of a loss also scores the run, whatever its folder is called.

    Args:
        losses: loaded.
        callbacks: of the Trainer; those with an ``extractor``, or ``metrics`` that have one, score.

    Raises:
        UserError: one does.
    """
    scoring = {content_hash(model): name for name, model in _scoring_networks(callbacks)}
    for loss in losses if scoring else ():
        network = getattr(getattr(loss, "network", None), "model", None)
        if isinstance(network, nn.Module) and (judge := scoring.get(content_hash(network))):
            raise UserError(
                f"the {loss.name} loss uses the network by which {judge} scores the run, so the score would "
                "go up by construction: give the loss another network (of the bundled ones, "
                "assets/emoji-clip-train), or score by another"
            )


def _scoring_networks(callbacks: Iterable[Any]) -> Iterable[tuple[str, nn.Module]]:
    """Networks by which callbacks, or the metrics they hold, see pictures, each with its owner's name."""
    for callback in callbacks:
        for owner in (callback, *(getattr(callback, "metrics", None) or ())):
            try:
                model = getattr(getattr(owner, "extractor", None), "model", None)
            except RuntimeError:  # a metric that was given no network yet: it scores nothing
                continue
            if isinstance(model, nn.Module):
                yield type(owner).__name__, model
