"""The number of steps as a condition of student and fake score (TDM-unify, arXiv 2503.06674, section 3.2).

The paper gives K to both networks and does not say how. Here each number of steps has a vector that is
added to the embedding of the timestep. It is zero at the start, so that the networks begin as the teacher. As
it does not depend on the input, it is a bias: for one K it goes into the layer before, and the network is a
stock one.
"""

import copy
from collections.abc import Sequence

from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from common.errors import UserError

EMBEDDERS = ("time_embedding", "timestep_embedder")


class CountedLinear(nn.Linear):
    """y = W x + b + e_K, with e = 0 at first; K is what `tell` has said last, at first the largest.

    Args:
        layer: gives W [D, C] and b [D], the same tensors.
        counts: the numbers of steps, ascending.
    """

    def __init__(self, layer: nn.Linear, counts: Sequence[int]) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.by_count = nn.Parameter(layer.weight.new_zeros(len(counts), layer.out_features))
        self.counts, self.row = tuple(counts), len(counts) - 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] -> [B, D]."""
        return super().forward(x) + self.by_count[self.row]


def add_step_counts(network: nn.Module, counts: Sequence[int]) -> None:
    """Make the network take the number of steps as a condition; its output stays what it is.

    Raises:
        UserError: it has no embedding of the timestep of the kind that diffusers' networks have.
    """
    found = [
        part for name, part in network.named_modules()
        if name.rpartition(".")[2] in EMBEDDERS and isinstance(part, TimestepEmbedding)
    ]  # fmt: skip
    if len(found) != 1 or found[0].linear_2.bias is None or found[0].post_act is not None:
        raise UserError(
            f"model.step_counts: the {type(network).__name__} has no one embedding of the timestep to which "
            "a number of steps could be added. Leave step_counts out."
        )
    found[0].linear_2 = CountedLinear(found[0].linear_2, counts)


def tell(network: nn.Module, count: int) -> None:
    """Say in how many steps the network draws from now on; without effect on one that does not take it.

    Raises:
        UserError: it knows other numbers only.
    """
    if (layer := _counted(network)) is None:
        return
    if count not in layer.counts:
        known = ", ".join(map(str, layer.counts))
        raise UserError(f"the student was trained for {known} steps, not for {count}: give one of them")
    layer.row = layer.counts.index(count)


def folded(network: nn.Module, count: int) -> nn.Module:
    """A stock network that does what this one does in `count` steps; itself where it takes no number."""
    if _counted(network) is None:
        return network
    network = copy.deepcopy(network)
    tell(network, count)
    for part in network.modules():
        if isinstance(part, TimestepEmbedding) and isinstance(layer := part.linear_2, CountedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
            plain.weight = layer.weight
            bias = layer.bias.detach() + layer.by_count[layer.row].detach()
            plain.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
            part.linear_2 = plain
    return network


def _counted(network: nn.Module) -> CountedLinear | None:
    return next((part for part in network.modules() if isinstance(part, CountedLinear)), None)
