"""A student that is a low-rank adapter on frozen weights (arXiv 2106.09685; SwiftBrush v2, arXiv 2408.14176).

Checkpoints hold the adapter alone, a few per cent of the network. The base is named by its path, together
with a hash of its weights: a base that has changed since is refused rather than used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_modules.errors import UserError
from lightning_modules.networks.fitting import difference
from lightning_modules.networks.frozen import hide_from_state_dict
from lightning_modules.networks.roles import LoraSettings, inject_adapter

ADAPTER = "student"


@dataclass
class StudentLoraSettings(LoraSettings):
    """Low-rank adapter of the student, in the size of SwiftBrush v2.

    The paper doesn't name the layers; these are all projections of the attentions.
    """

    rank: int = 256
    alpha: float = 512.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


@dataclass(frozen=True)
class StudentBase:
    """The frozen weights under a LoRA student.

    Attributes:
        path: what ``load_student`` reads them from.
        hash: ``content_hash`` of the network.
    """

    path: str
    hash: str

    def check(self, hash_now: str, owner: str) -> None:
        """Make sure that these are the weights the adapter was trained on.

        Raises:
            UserError: they are not.
        """
        if hash_now != self.hash:
            raise UserError(
                f"{owner} holds a LoRA adapter trained on the weights of {self.path}, which are others now "
                f"(hash {hash_now[:12]}, then {self.hash[:12]}): put the former model back there"
            )


@dataclass(frozen=True)
class StudentAdapter:
    """The adapter of a LoRA student by itself.

    Attributes:
        base: the weights it belongs on.
        settings: its size and place.
        weights: by the names that they have in the network.
    """

    base: StudentBase
    settings: LoraSettings
    weights: Mapping[str, Tensor]


def add_adapter(network: nn.Module, lora: LoraSettings) -> None:
    """Freeze the network and put a trained adapter into it; at the start it computes what it did before.

    Only the adapter stays in state dicts.

    Raises:
        UserError: a LoRA target matches no layer.
    """
    network.requires_grad_(False)
    inject_adapter(network, lora, ADAPTER)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    hide_from_state_dict(network, lambda name: name not in trained)


@torch.no_grad()
def fold(network: nn.Module, lora: LoraSettings, weights: Mapping[str, Tensor], owner: str) -> None:
    """Add an adapter's update alpha / rank * B A to the weights of a plain network, in place.

    Args:
        network: the base, without adapters; stays a plain network.
        lora: settings of the adapter.
        weights: of the adapter, by the names they have in the network.
        owner: where they are from, for messages.

    Raises:
        UserError: the weights are not those of such an adapter on this network.
    """
    wrapper = inject_adapter(network, lora, ADAPTER)
    adapter = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if found := difference(weights, adapter):
        raise UserError(f"The adapter in {owner} does not fit its base: {found}. Give another checkpoint.")
    for name, parameter in adapter.items():
        parameter.copy_(weights[name])
    wrapper.merge_and_unload()
    network.requires_grad_(False)
