"""Weights read from their files one tensor at a time, or a process's own rows of it.

A network in shards (FSDP2) is made without weights, and each process reads its rows of each of them. So no
process ever holds more of a teacher than its share.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a network's .safetensors files by name, in float32 (integers as they are)."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._places: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                    self._places[name] = file
                    self.shapes[name] = opened.get_slice(name).get_shape()

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._places[name], "pt") as opened:
            return _in_float32(opened.get_tensor(name))

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Those of one tensor along its first dimension."""
        with safe_open(self._places[name], "pt") as opened:
            return _in_float32(opened.get_slice(name)[start:end])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def fit(self, network: nn.Module) -> bool:
        """Whether they are the network's state, by name and shape (old names are for its own loader)."""
        return self.shapes == {name: list(x.shape) for name, x in network.state_dict().items()}


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def fill_shards(network: nn.Module, files: WeightFiles) -> None:
    """Give the parameters of a network in shards that are on the meta device their rows.

    Layers under an adapter have the names that they had without it.
    """
    for path, layer in network.named_modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                key = f"{path}.{name}".replace(".base_layer.", ".").removeprefix(".")
                assert isinstance(parameter, DTensor)
                setattr(layer, name, nn.Parameter(_shard(parameter, files, key), parameter.requires_grad))


def _shard(like: DTensor, files: WeightFiles, name: str) -> DTensor:
    """As `torch.chunk` cuts along the first dimension."""
    mesh, length = like.device_mesh, like.shape[0]
    size = -(-length // mesh.size())
    start = min(mesh.get_local_rank() * size, length)
    local = files.rows(name, start, min(start + size, length)).to(mesh.device_type, like.dtype)
    assert local.shape == like.to_local().shape
    return DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
