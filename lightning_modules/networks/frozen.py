"""Keeps frozen weights out of checkpoints."""

from collections.abc import Callable
from typing import Any

from torch import nn


def everything(name: str) -> bool:
    """Select every key."""
    return True


def hide_from_state_dict(module: nn.Module, hidden: Callable[[str], bool] = everything) -> None:
    """Leave the entries for which `hidden(key)` is true out of the module's part of any state dict.

    Keys are relative to `module`. Works when the module is nested, and with Lightning's strategies, because
    it uses state-dict hooks rather than an overridden `state_dict`. Loading stays strict for everything else:
    the hidden entries are filled in from the module itself.
    """
    complete = False

    def drop(module_: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        if not complete:
            for key in [k for k in state if k.startswith(prefix) and hidden(k[len(prefix) :])]:
                del state[key]

    def fill_in(module_: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
        nonlocal complete
        complete = True
        try:
            own = module_.state_dict(prefix=prefix)
        finally:
            complete = False
        for key, tensor in own.items():
            if hidden(key[len(prefix) :]):
                state.setdefault(key, tensor)

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(fill_in)
