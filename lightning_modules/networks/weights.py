"""Whether stored weights are those of a model, said in words."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.errors import UserError
from common.hashing import hash_tensors

_WRAPPINGS = ("state_dict", "model", "module", "generator", "unet", "transformer")
_ORIGINAL = ("input_blocks.", "double_blocks.", "joint_blocks.")


def check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise a UserError unless a checkpoint's weights are those of a distillation, by name and shape."""
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
    """The first weight, in the order of `expected`, whose name or shape differs, as part of a sentence.

    E.g. "conv_in.weight has shape [8, 4, 3, 3] in the checkpoint and has shape [16, 4, 3, 3] in the model
    (61 of 120 weights differ)"; None if all agree. `words` are what the two are called.
    """
    names = [*expected, *(name for name in given if name not in expected)]
    shapes = [
        {name: list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for name, x in side.items()}
        for side in (given, expected)
    ]
    odd = [name for name in names if shapes[0].get(name) != shapes[1].get(name)]
    if not odd:
        return None
    places = [
        f"has shape {side[odd[0]]} in the {word}" if odd[0] in side else f"is not in the {word}"
        for side, word in zip(shapes, words, strict=True)
    ]
    return f"{odd[0]} {' and '.join(places)} ({len(odd)} of {len(names)} weights differ)"


def own_weights(content: Any, expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a network in what a file holds: out of wrappings, without a common prefix of names.

    Such are {"state_dict": ...}, and "module.", "_orig_mod.", "unet." before all names. `expected` are the
    network's own.

    Raises:
        UserError: the file is a LoRA, or a whole model in the original naming.
    """
    while inner := [content[name] for name in _WRAPPINGS if isinstance(content.get(name), Mapping)]:
        content = inner[0]
    names = [str(name) for name in content]
    if any("lora" in name.lower() for name in names):
        raise UserError(
            f"{path} is a LoRA, an adapter and no network: put it into its model first (diffusers: "
            "pipe.load_lora_weights, pipe.fuse_lora, pipe.save_pretrained), and name that folder."
        )
    if any(part in name for name in names for part in _ORIGINAL):
        raise UserError(
            f"{path} is a model in the original naming (a single-file checkpoint, as web UIs use): convert "
            "it (diffusers: Pipeline.from_single_file(FILE).save_pretrained(FOLDER)), and name the folder."
        )
    first = next(iter(expected))
    prefixes = [name.removesuffix(first) for name in names if name.endswith(first)]
    prefix = max(prefixes, key=lambda p: sum(p + name in content for name in expected), default="")
    return {name.removeprefix(prefix): content[name] for name in names if name.startswith(prefix)}


def other_value(given: Mapping[str, Any], expected: Mapping[str, Any], words: tuple[str, str]) -> str | None:
    """As `difference`, for settings: e.g. "norm_eps is 0.001 in the student and 1e-05 in the teacher"."""
    for name in dict.fromkeys([*given, *expected]):
        values = [side.get(name, False) for side in (given, expected)]
        if values[0] != values[1]:
            return f"{name} is {values[0]} in the {words[0]} and {values[1]} in the {words[1]}"
    return None


def hide_from_state_dict(module: nn.Module, hidden: Callable[[str], bool] = lambda key: True) -> None:
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
    state = network.state_dict().items()
    return hash_tensors({name: x.float() if x.is_floating_point() else x for name, x in state})
