"""The few questions that are asked of torch.distributed, answered also where it is not in use."""

from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only


def in_use() -> bool:
    """Whether several processes take part."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if in_use() else (0, 1)


def from_rank_zero(value: Any) -> Any:
    """Rank zero's ``value`` on every process. Collective."""
    if not in_use():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_every_rank(value: Any) -> list[Any]:
    """Every process's ``value``, in the order of the ranks, on every process. Collective."""
    if not in_use():
        return [value]
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


@rank_zero_only
def say(text: str) -> None:
    """Print once, on rank zero, also before torch.distributed is in use."""
    print(text, flush=True)
