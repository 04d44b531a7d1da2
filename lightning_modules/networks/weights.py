"""Whether stored weights are those of a model, said in words."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError


def check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Make sure that a checkpoint's weights are those of a distillation.

    Raises:
        UserError: names or shapes differ; names the first.
    """
    if found := difference(given, expected):
        raise UserError(
            f"the checkpoint does not fit this distillation: {found}; give the checkpoint of a distillation "
            "with the same teacher and lora settings (also student_lora), or set them as they were there"
        )


def difference(
    given: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    words: tuple[str, str] = ("checkpoint", "model"),
) -> str | None:
    """The first weight, in the model's order, whose name or shape differs, as part of a sentence.

    Args:
        given: weights of a checkpoint by name.
        expected: the model's.
        words: what the two are called in the sentence.

    Returns:
        None if all agree, else e.g. "conv_in.weight has shape [8, 4, 3, 3] in the checkpoint and has
        shape [16, 4, 3, 3] in the model (61 of 120 weights differ)".
    """
    names = [*expected, *(name for name in given if name not in expected)]
    shapes = [{name: list(tensor.shape) for name, tensor in side.items()} for side in (given, expected)]
    odd = [name for name in names if shapes[0].get(name) != shapes[1].get(name)]
    if not odd:
        return None
    places = [
        f"has shape {side[odd[0]]} in the {word}" if odd[0] in side else f"is not in the {word}"
        for side, word in zip(shapes, words, strict=True)
    ]
    return f"{odd[0]} {' and '.join(places)} ({len(odd)} of {len(names)} weights differ)"


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


def content_hash(network: nn.Module) -> str:
    """SHA-256 of a network's weights by name, as 64 hexadecimal digits.

    Floating-point weights are read as float32, so that a half-precision copy of half-precision weights counts
    as the same.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).contiguous()
        digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
        digest.update(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
