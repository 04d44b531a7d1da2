"""Several processes: averaged gradients, and networks in shards (FSDP2), with what that asks of the rest.

Student and fake score are trained in turn, so in each turn the weights of the other one have no gradient. DDP
would search the graph for them at every backward pass and send zeros in their place. Gradients are averaged
here instead, once per update: no search, and nothing is sent after the inner passes of an accumulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch._utils import _take_tensors
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from common.processes import from_every_rank, rank_and_world_size
from lightning_modules.checkpoints import check_shards, is_sharded, plain_shards, read, reason
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder
from lightning_modules.networks.weight_files import WeightFiles, fill_shards
from lightning_modules.networks.weights import check_fit

_BUCKET_BYTES = 64 * 2**20


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all processes: each holds one shard of every network in training.

    Args:
        save_distributed_checkpoint: A checkpoint is a folder to which each process writes its shard; false:
            one file, gathered on the first process.
        process_group_backend: As in Lightning.
    """

    def __init__(
        self, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None
    ) -> None:
        super().__init__("auto", "auto", save_distributed_checkpoint, process_group_backend)

    def setup_environment(self) -> None:
        """One group of all processes, rather than Lightning's tensor-parallel group on each machine."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Frozen weights are in no checkpoint; whether all the others are is checked here for files."""
        module = self.lightning_module
        assert module is not None
        if Path(checkpoint_path).is_file():
            check_fit(read(Path(checkpoint_path))["state_dict"], module.state_dict())
        strict, module.strict_loading = module.strict_loading, False
        try:
            if is_sharded(Path(checkpoint_path)):
                self._check(Path(checkpoint_path))
            with plain_shards():
                return super().load_checkpoint(checkpoint_path, weights_only)
        except CheckpointException as error:  # raised on all processes
            raise UserError(f"{checkpoint_path} can't be read: {reason(error)}; give another") from error
        finally:
            module.strict_loading = strict

    def _check(self, path: Path) -> None:
        """Check the sums of shards, each process a share; all of them raise where one is damaged."""
        failure = None
        try:
            check_shards(path, *rank_and_world_size())
        except Exception as error:
            failure = reason(error)
        if failure := next(filter(None, from_every_rank(failure)), None):
            raise UserError(f"{path} can't be read: {failure}; give another")


def without_sync(model: Any) -> AbstractContextManager[None]:
    """A context in which DDP leaves gradients alone; for other models it does nothing."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over the processes; those of shards are means already. Collective.

    All processes must have gradients of the same parameters.
    """
    if not dist.is_initialized() or (processes := dist.get_world_size()) == 1:
        return
    for bucket in _take_tensors(_plain_gradients(parameters), _BUCKET_BYTES):  # each of one type
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= processes
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest_norm: float) -> Tensor:
    """Clip gradients in place by their common norm; returns that before, a scalar tensor. Collective."""
    parameters = list(parameters)
    plain, shards = _plain_gradients(parameters), _sharded_gradients(parameters)
    if not shards:
        return torch.nn.utils.clip_grad_norm_(parameters, largest_norm)
    total = torch.nn.utils.get_total_norm(shards)
    norm = total.full_tensor() if isinstance(total, DTensor) else total
    if plain:
        norm = torch.linalg.vector_norm(torch.stack([norm, torch.nn.utils.get_total_norm(plain)]))
    factor = (largest_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ does
    for gradient in [*plain, *(shard.to_local() for shard in shards)]:
        gradient.mul_(factor)
    return norm


def _plain_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]


def _sharded_gradients(parameters: Iterable[nn.Parameter]) -> list[DTensor]:
    return [p.grad for p in parameters if isinstance(p.grad, DTensor)]


def shard_networks(
    networks: Sequence[nn.Module], mesh: DeviceMesh, weights: WeightFiles | None = None
) -> None:
    """Split each network's weights over the processes, block by block, so that one block at a time is whole.

    Frozen and trained weights share a group, so they must be of one type.

    Args:
        networks: parameters may be on the meta device.
        mesh: of one dimension.
        weights: what those on the meta device are filled from, each process reading its share.
    """
    for network in networks:
        for block in blocks(network):
            fully_shard(block, mesh=mesh)
        # by default the outermost group stays whole after a forward pass; weights are written between passes
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        if weights is not None:
            fill_shards(network, weights)


def shard_text_encoders(encoder: PromptEncoder, mesh: DeviceMesh) -> None:
    """Split the weights of text encoders, if there are any; what is in no block is whole while they encode.

    They keep their classes, by whose names transformers knows which of their layers' outputs can be had.
    """
    for network in encoder.text_encoders:
        for block in blocks(network):
            fully_shard(block, mesh=mesh)
    if len(encoder.text_encoders):
        fully_shard(encoder, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(encoder, "embed_texts")


def shard_autoencoders(autoencoders: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Split the weights of autoencoders; all processes must then encode and decode as often as each other.

    What draws pictures does so anyway, because the student is in shards; kept on the CPU instead, an image
    loss would send all of the weights to the GPU in each micro-batch.
    """
    for network in dict.fromkeys(autoencoders):
        for block in (*blocks(network.encoder), *blocks(network.decoder)):  # type: ignore[arg-type]
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        for method in ("encode", "decode"):
            register_fsdp_forward_method(network, method)


def blocks(network: nn.Module) -> list[nn.Module]:
    """What stands in lists, and what its class says is not to be split; nothing inside another of them."""
    children = list(network.named_children())
    found = [block for _, child in children if isinstance(child, nn.ModuleList) for block in child]
    found += [child for name, child in children if name == "mid_block" and child is not None]
    whole = getattr(network, "_no_split_modules", None) or ()
    found += [part for part in network.modules() if type(part).__name__ in whole]
    inside = {id(part) for block in found for part in block.modules() if part is not block}
    return [block for block in dict.fromkeys(found) if id(block) not in inside]


@torch.no_grad()
def same_on_all_processes(parameters: Iterable[nn.Parameter]) -> None:
    """Give weights that are not in shards the first process's values (DDP does so itself). Collective."""
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            dist.broadcast(parameter.data, src=0)


@torch.no_grad()
def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over the processes. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process, nothing on the others; plain ones as they are."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return dict(tensors)
    whole = {}
    for name, tensor in tensors.items():
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            whole[name] = value.cpu()
    return whole


def scatter_like(whole: Tensor, like: Tensor) -> Tensor:
    """A copy of ``whole`` (the same on all processes) with device, type and shards of ``like``."""
    value = whole.to(device=like.device, dtype=like.dtype, copy=True)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
