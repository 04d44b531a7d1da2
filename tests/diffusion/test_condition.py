"""Conditions: dropping text, joining, slicing, moving."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.diffusion.condition import Condition


def condition(batch_size: int = 3) -> Condition:
    states = torch.arange(1.0, batch_size + 1)[:, None, None].expand(batch_size, 4, 2)
    mask = torch.ones(batch_size, 4, dtype=torch.bool)
    null = {"states": torch.full((1, 4, 2), -1.0), "mask": torch.tensor([[True, False, False, False]])}
    return Condition({"states": states, "mask": mask}, null)


def test_without_text_everywhere() -> None:
    empty = condition().without_text()
    assert empty.batch_size == 3
    assert (empty.tensors["states"] == -1).all()
    assert empty.tensors["mask"].tolist() == [[True, False, False, False]] * 3


def test_without_text_where_the_mask_is_true() -> None:
    dropped = condition().without_text(torch.tensor([False, True, False]))
    assert dropped.tensors["states"][:, 0, 0].tolist() == [1, -1, 3]
    assert dropped.tensors["mask"].sum(1).tolist() == [4, 1, 4]
    with pytest.raises(ValueError, match="boolean"):
        condition().without_text(torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="one value per sample"):
        condition().without_text(torch.tensor([True]))


def test_concat_keeps_the_order() -> None:
    joined = condition().without_text().concat(condition(2))
    assert joined.tensors["states"][:, 0, 0].tolist() == [-1, -1, -1, 1, 2]
    with pytest.raises(ValueError, match="different keys"):
        condition().concat(Condition({"other": torch.zeros(1, 2)}, {"other": torch.zeros(1, 2)}))


def test_indexing() -> None:
    assert condition()[1:3].tensors["states"][:, 0, 0].tolist() == [2, 3]
    assert condition()[torch.tensor([2, 0])].tensors["states"][:, 0, 0].tolist() == [3, 1]
    assert condition()[1:3].without_text().batch_size == 2


def test_expand_one_prompt() -> None:
    assert condition(1).expand(5).tensors["states"].shape == (5, 4, 2)
    assert condition(3).expand(3).batch_size == 3
    with pytest.raises(ValueError, match="3 prompts does not fit a batch of 5"):
        condition(3).expand(5)


def test_to_casts_floating_tensors_only() -> None:
    half = condition().to(dtype=torch.bfloat16)
    assert half.tensors["states"].dtype == half.null["states"].dtype == torch.bfloat16
    assert half.tensors["mask"].dtype == half.null["mask"].dtype == torch.bool
    assert condition().to("meta").tensors["mask"].is_meta


def test_mismatched_parts_are_refused() -> None:
    states = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="share their keys"):
        Condition({"a": states}, {"b": states[:1]})
    with pytest.raises(ValueError, match="share their keys"):
        Condition({}, {})
    with pytest.raises(ValueError, match="share their batch size"):
        Condition({"a": states, "b": states[:1]}, {"a": states[:1], "b": states[:1]})
    with pytest.raises(ValueError, match=r"not \(1, 4\)"):
        Condition({"a": states}, {"a": states})
