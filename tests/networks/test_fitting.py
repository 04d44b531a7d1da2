"""Which stored weight is not the model's."""

import pytest
import torch

from common.errors import UserError
from lightning_modules.networks.weights import check_fit, difference


def test_first_difference_is_named_in_the_models_order() -> None:
    model = {"b": torch.zeros(2, 3), "a": torch.zeros(4), "c": torch.zeros(())}
    assert difference(dict(reversed(model.items())), model) is None
    other = {**model, "b": torch.zeros(3, 2), "a": torch.zeros(1)}
    assert difference(other, model) == (
        "b has shape [3, 2] in the checkpoint and has shape [2, 3] in the model (2 of 3 weights differ)"
    )
    assert difference({"b": model["b"]}, model) == (
        "a is not in the checkpoint and has shape [4] in the model (2 of 3 weights differ)"
    )
    assert difference({**model, "d": torch.zeros(5)}, model) == (
        "d has shape [5] in the checkpoint and is not in the model (1 of 4 weights differ)"
    )
    assert difference({}, {"c": model["c"]}) is not None  # a number has a shape, too: []


def test_message_says_what_to_do() -> None:
    check_fit({}, {})
    with pytest.raises(UserError, match="checkpoint does not fit.*a is not in.*same teacher and lora"):
        check_fit({}, {"a": torch.zeros(1)})
