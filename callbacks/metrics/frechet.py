"""Frechet distance between two Gaussians fitted to image features.

Dowson and Landau 1982; Heusel et al. 2017 (FID), equation 6.
With clean-fid's resizing and Inception it is ``fid``; with any other network ``frechet_distance``, never FID.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_features import clip_network
from callbacks.metrics.inception import inception_network
from callbacks.metrics.reference import mean_and_covariance
from common.processes import rank_and_world_size

COMFORTABLE_RATIO = 8
"""Below this many pictures per feature the estimate is dominated by its bias."""


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of two Gaussians, as a float64 scalar.

    Args:
        mean1, mean2: [D]; covariance1, covariance2: [D, D], symmetric and positive semi-definite.
    """
    mean1, covariance1, mean2, covariance2 = (x.double() for x in (mean1, covariance1, mean2, covariance2))
    # d^2 = |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))           Heusel et al. 2017, eq. 6
    # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), so the trace of the root needs no
    # matrix root of a non-symmetric matrix and has no imaginary part. Few samples leave C1 with eigenvalues
    # that are zero but for rounding: with R R^T = C1 over the others, R^T C2 R has all that matter.
    values, vectors = torch.linalg.eigh(covariance1)
    alive = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    root1 = vectors[:, alive] * values[alive].sqrt()
    product = root1.T @ covariance2 @ root1
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
    difference = mean1 - mean2
    distance = (
        difference @ difference + covariance1.trace() + covariance2.trace() - 2 * eigenvalues.sqrt().sum()
    )
    return distance.clamp_min(0)


class GaussianDistance(ImageMetric):
    """Frechet distance of generated pictures from real ones, from sums that any number of processes share."""

    needs_reference = True
    minimum_images = 2

    total: Tensor
    outer: Tensor

    def setup_states(self, width: int) -> None:
        """Sum and sum of outer products of the features, in float64."""
        self.add_sum("total", width)
        self.add_sum("outer", width, width)

    def _add(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
        rows = features.to(self.total.device).double()
        self.total += rows.sum(0)
        self.outer += rows.T @ rows

    def _value(self) -> Tensor:
        mean, covariance = mean_and_covariance(self.total.cpu(), self.outer.cpu(), int(self.count))
        reference, width = self.reference, len(mean)
        for count, what in [(self.num_images, "pictures"), (reference.num_images, "real pictures")]:
            if count < width and rank_and_world_size()[0] == 0:
                warnings.warn(
                    f"{self.name} of {count} {what} with {width} features: fewer pictures than features, so "
                    "the value is dominated by its bias and comparable only at the same counts",
                    stacklevel=2,
                )
        return frechet_distance(mean, covariance, reference.mean, reference.covariance)

    def details(self) -> dict[str, Any]:
        """The extractor and the reference, and a note when there are too few pictures for a fair one."""
        width = self.extractor.width
        details = super().details() | {"feature_width": width}
        if self.num_images < COMFORTABLE_RATIO * width:
            details["note"] = (
                f"{self.num_images} pictures are fewer than {COMFORTABLE_RATIO} x {width} features: "
                "biased upwards, comparable only at the same count"
            )
        return details


class FrechetDistance(GaussianDistance):
    """Distance of generated pictures from real ones in the features of a CLIP. Lower is better.

    Args:
        model: None for the scoring CLIP of the evaluation; a CLIP folder in transformers' format; an
            open_clip architecture (with ``pretrained``) or ``local-dir:<folder>``.
        pretrained: open_clip's tag or file of weights.
        reference: statistics file or folder of real pictures (default: that of the evaluation).
    """

    name = "frechet_distance"
    version = 1

    def __init__(
        self, model: str | None = None, pretrained: str | None = None, reference: str | None = None
    ) -> None:
        super().__init__(clip_network(model, pretrained), reference)


class FID(GaussianDistance):
    """Frechet inception distance with clean-fid's resizing and network (Parmar et al. 2022). Lower is better.

    Equal to ``cleanfid.fid.compute_fid`` on the same pictures saved as PNG files.

    Args:
        mode: clean-fid's: "clean", or "legacy_tensorflow" (the resizing of the first implementation).
        inception: file of the network, or its folder (default: clean-fid's cache, ours, or downloaded).
        reference: statistics file or folder of real pictures (default: that of the evaluation).

    Raises:
        UserError: the mode is unknown.
    """

    name = "fid"
    version = 1

    def __init__(
        self, mode: str = "clean", inception: str | None = None, reference: str | None = None
    ) -> None:
        super().__init__(inception_network(inception, mode), reference)
        self.mode = mode

    def settings(self) -> dict[str, Any]:
        """clean-fid's mode."""
        return {"mode": self.mode}
