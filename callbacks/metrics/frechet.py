"""Frechet distance between two Gaussians fitted to image features.

Dowson and Landau 1982; Heusel et al. 2017 (FID), equation 6.
With any network but Inception it is called ``frechet_distance``, never FID.
"""

from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.reference import ReferenceStatistics, mean_and_covariance

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
    # matrix root of a non-symmetric matrix and has no imaginary part. Rounding can put a zero eigenvalue a
    # little below zero.
    values, vectors = torch.linalg.eigh(covariance1)
    root1 = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root1 @ covariance2 @ root1
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
    difference = mean1 - mean2
    distance = (
        difference @ difference + covariance1.trace() + covariance2.trace() - 2 * eigenvalues.sqrt().sum()
    )
    return distance.clamp_min(0)


class FrechetDistance(ImageMetric):
    """Distance of generated pictures from real ones in the features of the scoring CLIP. Lower is better."""

    name = "frechet_distance"
    version = 1
    higher_is_better = False
    needs_reference = True
    minimum_images = 2

    total: Tensor
    outer: Tensor
    count: Tensor

    def setup_states(self, width: int) -> None:
        """Sum and sum of outer products of the features, in float64, and their number."""
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, features: Tensor, prompts: list[str]) -> None:
        rows = features.to(self.total.device).double()
        self.total += rows.sum(0)
        self.outer += rows.T @ rows

    def _value(self) -> Tensor:
        mean, covariance = mean_and_covariance(self.total.cpu(), self.outer.cpu(), int(self.count))
        reference = self._reference
        return frechet_distance(mean, covariance, reference.mean, reference.covariance)

    @property
    def _reference(self) -> ReferenceStatistics:
        reference = self.__dict__["reference"]
        if reference is None:
            raise RuntimeError("FrechetDistance.bind() must come before the first update")
        return reference

    def details(self) -> dict[str, Any]:
        """The extractor and the reference, and a note when there are too few pictures for a fair one."""
        width, reference = self.extractor.width, self._reference
        details = super().details() | {
            "feature_width": width,
            "reference_num_images": reference.num_images,
            "reference_hash": reference.content_hash,
        }
        if self.num_images < COMFORTABLE_RATIO * width:
            details["note"] = (
                f"{self.num_images} pictures are fewer than {COMFORTABLE_RATIO} x {width} features: "
                "biased upwards, comparable only at the same count"
            )
        return details
