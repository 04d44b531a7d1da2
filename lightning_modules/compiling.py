"""Compiled networks (torch.compile), in training steps only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from common.errors import UserError

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
BACKEND = "inductor"


class CompiledNetworks:
    """The networks of a training step, compiled when they are first called inside `active`.

    Outside they run as they are: evaluations draw batches of many sizes, and each would be compiled anew,
    which takes minutes. A network has one graph for each of its uses; guidance scale, prompts and timesteps
    are no part of it. A negative prompt's scale is, see `StudentSampler`. Names in state dicts stay as
    they are.

    Args:
        networks: student and scores.
        mode: false for none; true or a mode of `torch.compile`. "reduce-overhead" and "max-autotune" replay
            CUDA graphs on GPUs.
    """

    def __init__(self, networks: Sequence[nn.Module] = (), mode: bool | str = False) -> None:
        name = "default" if mode is True else mode
        if name and name not in MODES:
            raise UserError(f"compile is {mode!r}: set it to true, false or one of {', '.join(MODES)}")
        if name and any(isinstance(p, DTensor) for network in networks for p in network.parameters()):
            raise UserError("compile does not work with networks in shards: set it to false or use no shards")
        self._calls: list[tuple[nn.Module, Any]] = [
            # as nn.Module.compile does; dynamic=False keeps sizes numbers where a second batch size comes
            (network, torch.compile(network._call_impl, backend=BACKEND, mode=str(name), dynamic=False))
            for network in (networks if name else ())
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Calls of the networks are compiled inside."""
        if self._calls:
            torch.compiler.cudagraph_mark_step_begin()
        for network, call in self._calls:
            network._compiled_call_impl = call
        try:
            yield
        finally:
            for network, _ in self._calls:
                network._compiled_call_impl = None
