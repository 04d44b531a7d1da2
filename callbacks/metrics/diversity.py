"""Diversity within a prompt: how much pictures of one prompt from several seeds differ.

Two values, each a mean over the prompts: mean pairwise LPIPS, and the Vendi score. Both need several pictures
of each prompt, one after the other in the list (``images_per_prompt`` of the evaluation set).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_features import clip_network
from callbacks.metrics.extractors import ExtractorSpec
from callbacks.metrics.lpips import lpips_network, squared_distances
from common.errors import UserError
from common.processes import from_every_rank
from datamodules.evaluation_sets import runs_of


class WithinPrompt(ImageMetric):
    """The mean over the prompts of what ``of_prompt`` tells of a prompt's pictures.

    A prompt is a run of equal captions. Features are kept until its last picture has been seen; what is still
    open at the end, because several processes hold parts of it, is gathered.
    """

    minimum_images = 2

    total: Tensor
    prompts: Tensor

    def __init__(self, spec: ExtractorSpec | None) -> None:
        super().__init__(spec)
        self._prompt_of: list[int] = []
        self.images_per_prompt = 0
        self.complete = 0
        self._open: dict[int, Tensor] = {}

    @abstractmethod
    def of_prompt(self, features: Tensor) -> Tensor:
        """The value of one prompt, a scalar, from the features [N, D] of its N ≥ 2 pictures."""

    def prepare(
        self,
        captions: Sequence[str],
        groups: Sequence[str] | None = None,
        negatives: Sequence[str] | None = None,
    ) -> None:
        """Learn which pictures belong together.

        Raises:
            UserError: a prompt has one picture, or another number of them than the others.
        """
        runs = runs_of(captions)
        least, most = min(runs), max(runs)
        if least != most or least < 2:
            place = runs.index(least)
            raise UserError(
                f"{self.name} compares the pictures of each prompt with one another, and "
                f"{captions[sum(runs[:place])]!r} has {least}"
                + (
                    ""
                    if least == most
                    else f", others {most}: every prompt needs the same number, at least 2"
                )
                + ". Set --data.images_per_prompt 8 (or repeat each caption), and a multiple of it as --count"
            )
        self.images_per_prompt = least
        self._prompt_of = [place // least for place in range(len(captions))]

    def setup_states(self, width: int) -> None:
        """Sum over the complete prompts, and their number."""
        self.add_sum("total")
        self.add_sum("prompts", dtype=torch.long)

    def reset(self) -> None:
        super().reset()
        self._open = {}

    def snapshot(self) -> dict[str, Tensor]:
        """The sums, and the pictures of prompts that are not complete."""
        names = [torch.full((len(rows),), prompt) for prompt, rows in self._open.items()]
        rows = list(self._open.values())
        return super().snapshot() | (
            {"open_prompts": torch.cat(names), "open_features": torch.cat(rows)} if rows else {}
        )

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        super().restore(snapshot)
        if "open_prompts" in snapshot:
            self._take(snapshot["open_prompts"].tolist(), snapshot["open_features"])

    def _add(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
        if positions is None or not self._prompt_of:
            raise ValueError(f"{self.name} needs prepare() and the positions of the pictures")
        self._take([self._prompt_of[place] for place in positions], features)

    def _take(self, prompts: list[int], features: Tensor) -> None:
        for prompt in dict.fromkeys(prompts):
            rows = features[[i for i, other in enumerate(prompts) if other == prompt]]
            if prompt in self._open:
                rows = torch.cat([self._open.pop(prompt).to(rows.device), rows])
            if len(rows) == self.images_per_prompt:
                self.total += self.of_prompt(rows).to(self.total.device)
                self.prompts += 1
            else:
                self._open[prompt] = rows.cpu()

    def _value(self) -> Tensor:
        shared: dict[int, list[Tensor]] = {}
        for rows in from_every_rank(self._open):
            for prompt, part in rows.items():
                shared.setdefault(prompt, []).append(part)
        joined = [
            rows for parts in shared.values() if len(rows := torch.cat(parts)) == self.images_per_prompt
        ]
        total = self.total.cpu() + sum(self.of_prompt(rows).cpu() for rows in joined)
        self.complete = int(self.prompts) + len(joined)
        if not self.complete:
            raise UserError(
                f"{self.name} saw no prompt with all of its {self.images_per_prompt} pictures: raise the "
                "number of pictures that are measured"
            )
        return total / self.complete

    def details(self) -> dict[str, Any]:
        """How many pictures of how many prompts; those that lack pictures at the end don't count."""
        return super().details() | {"prompts": self.complete, "images_per_prompt": self.images_per_prompt}


class DiversityLpips(WithinPrompt):
    """Mean LPIPS over all pairs of pictures of a prompt. Higher is more diverse.

    Args:
        network: ``alex``, ``vgg`` or ``squeeze``.
        weights: torchvision's file of the classifier (default: folder of judges, torchvision's cache).
        judges: folder of judges.
        size: larger pictures are reduced to this shortest side first; None: never.

    Raises:
        UserError: the network is unknown.
    """

    name = "diversity_lpips"
    version = 1

    def __init__(
        self,
        network: str = "alex",
        weights: str | None = None,
        judges: str | None = None,
        size: int | None = 256,
    ) -> None:
        super().__init__(lpips_network(network, weights, judges, size))

    def of_prompt(self, features: Tensor) -> Tensor:
        return squared_distances(features).mean()


class Vendi(WithinPrompt):
    """Vendi score of the pictures of a prompt: their effective number, 1 (all alike) to N. Higher is better.

    Friedman and Dieng 2022 (arXiv 2210.02410), with the cosine of CLIP's picture features as kernel.

    Args:
        model: None for the scoring CLIP of the evaluation; a CLIP folder in transformers' format; an
            open_clip architecture (with ``pretrained``) or ``local-dir:<folder>``.
        pretrained: open_clip's tag or file of weights.
    """

    name = "vendi"
    version = 1

    def __init__(self, model: str | None = None, pretrained: str | None = None) -> None:
        super().__init__(clip_network(model, pretrained))

    def of_prompt(self, features: Tensor) -> Tensor:
        return vendi_score(features)


def vendi_score(features: Tensor) -> Tensor:
    """exp of the entropy of the eigenvalues of K / N, K the cosines of rows [N, D]; a scalar, float64."""
    # VS = exp(−Σ λ_i log λ_i), with λ the eigenvalues of K / n                    definition 3.1
    rows = F.normalize(features.double().cpu(), dim=-1)
    values = torch.linalg.eigvalsh(rows @ rows.T / len(rows)).clamp_min(0)
    return torch.special.entr(values).sum().exp()
