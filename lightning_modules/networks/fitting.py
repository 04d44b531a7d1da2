"""Whether stored weights are those of a model, said in words."""

from collections.abc import Mapping

from torch import Tensor

from lightning_modules.errors import UserError


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
