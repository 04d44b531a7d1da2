"""Judges: networks that give every picture a number; and where their weights lie.

The weights are in one folder for all judges, or in the hub's cache; none is downloaded.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from common.errors import UserError, first_line
from common.files import user_cache_dir
from lightning_modules.networks.model_names import asset_path


def find_judge(
    metric: str,
    name: str,
    how: str,
    given: str | None = None,
    judges: str | None = None,
    others: Sequence[Path] = (),
) -> Path:
    """The file or folder of a judge.

    Args:
        metric: who asks, for the message.
        name: of the file or folder among the judges.
        how: the command that gets it; ``{place}`` in it stands for where it belongs.
        given: the user's own path, which alone is looked at then.
        judges: the folder of judges; None: ``judges`` in the user's cache folder.
        others: further places.

    Raises:
        UserError: it is in none of these places; they are named, and how to get it.
    """
    folder = user_cache_dir() / "judges" if judges is None else Path(judges).expanduser()
    places = [asset_path(given)] if given is not None else [folder / name, *others]
    for place in places:
        if place.exists():
            return place
    raise UserError(
        f"{metric}: {name} is missing; looked for {' and '.join(map(str, places))}. Get it with "
        f"`{how.format(place=folder / name)}`, or name where it is"
    )


def in_hub_cache(repository: str, file: str = "config.json") -> list[Path]:
    """The folder of a model in the local cache of the hub, if it holds this file."""
    found = try_to_load_from_cache(repository, file)
    return [Path(found).parent] if isinstance(found, str) else []


class JudgedMetric(ImageMetric):
    """The mean over all pictures of a judge's number. Higher is better."""

    total: Tensor

    def setup_states(self, width: int) -> None:
        """The sum of the numbers."""
        self.add_sum("total")

    def _add(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
        self.total += self.judge(features, prompts).double().sum().to(self.total.device)

    def _value(self) -> Tensor:
        return self.total / self.count

    @abstractmethod
    def judge(self, features: Tensor, prompts: list[str]) -> Tensor:
        """Numbers [B] of pictures, by their features and prompts."""


def read_weights(path: Path, metric: str) -> dict[str, Tensor]:
    """The tensors of a ``torch.save`` file.

    Raises:
        UserError: it is damaged, or holds anything else.
    """
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
        return {str(name): tensor.float() for name, tensor in found.items()}
    except Exception as error:  # each kind of damage raises another type
        raise UserError(
            f"{metric}: {path} can't be read as weights ({first_line(error)}); fetch it again"
        ) from error


def linear_head(weights: Mapping[str, Tensor], width: int, metric: str) -> tuple[Tensor, Tensor]:
    """Weight [D] and bias [] of linear layers with nothing between them, which are one linear map; float64.

    Args:
        weights: ``weight`` and ``bias`` of each layer behind its name, in order of the numbers in these.
        width: D.

    Raises:
        UserError: they do not lead from D numbers to one.
    """
    matrix, offset = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    layers = [name for name in weights if name.rpartition(".")[2] == "weight"]
    for name in sorted(layers, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()]):
        weight, bias = weights[name].double(), weights[name.removesuffix("weight") + "bias"].double()
        if weight.shape[1] != len(matrix):
            raise UserError(
                f"{metric}: the head takes {weight.shape[1]} numbers where {len(matrix)} come: it belongs to "
                "another network"
            )
        matrix, offset = weight @ matrix, weight @ offset + bias
    if len(matrix) != 1:
        raise UserError(f"{metric}: the head gives {len(matrix)} numbers instead of one: it is another's")
    return matrix[0], offset[0]
