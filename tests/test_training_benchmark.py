"""The plain loop that training is measured against computes what this project computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_step
from benchmarks.train_step import Rounds, measure_speed
from tests.backbones import write_backbone


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """As `main` makes them, for four rounds of one step of three prompts, the first to warm up."""
    return {
        "folder": str(folder), "precision": "32-true", "per_round": 1, "threads": 1, "steps": 4, "batch": 3,
        "rank": 64, "changes": {}, **changes,
    }  # fmt: skip


def measured(given: dict[str, Any]) -> dict[str, Any]:
    """Both in this process, which has everything imported."""
    return measure_speed(given, ThreadPoolExecutor(1))


def test_losses_and_times_of_both(tiny_sd: Path) -> None:
    found = measured(options(tiny_sd))
    one = train_step.summary(found)
    # the fake score starts as the teacher: only its update makes the student's loss grow
    assert found["losses"]["project"]["student"][0] == 0 < found["losses"]["project"]["student"][3]
    assert len(set(found["losses"]["reference"]["lora"])) == 4
    assert max(one["loss_differences"].values()) < 1e-5
    assert len(found["seconds"]["project"]) == len(found["seconds"]["reference"]) == 3
    assert set(found["texts"]["text"]) == {"encoder_hidden_states"}


def test_transformers_train_too(tmp_path: Path) -> None:
    folder = write_backbone("pixart", tmp_path / "model")
    found = measured(options(folder, rank=4, per_round=2, steps=6))
    assert found["losses"]["project"]["student"][2] > 0
    assert len(found["losses"]["reference"]["student"]) == 6
    assert max(train_step.summary(found)["loss_differences"].values()) < 1e-4


def test_who_is_first_changes_from_round_to_round(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, hook, turn = [], Rounds.on_train_batch_end, train_step.plain_turn

    def ours(self: Rounds, *given: Any) -> None:
        order.append("ours")
        hook(self, *given)

    def plain(steps: Any) -> Any:
        order.append("plain")
        return turn(steps)

    monkeypatch.setattr(Rounds, "on_train_batch_end", ours)
    monkeypatch.setattr(train_step, "plain_turn", plain)
    measured(options(tiny_sd, steps=5))
    assert order == ["ours", "plain", "plain", "ours", "ours", "plain", "plain", "ours", "ours", "plain"]


def test_table() -> None:
    losses = {"project": {"student": [1.0, 2.0], "lora": [3.0, 4.0]}}
    losses["reference"] = {"student": [1.0, 2.5], "lora": [3.0, 4.0]}
    seconds = {"project": [1.0, 2.0, 2.0], "reference": [2.0, 3.0, 5.0]}
    one = train_step.summary({"seconds": seconds, "losses": losses}) | {"batch": 8, "rank": 4}
    assert one["speed_ratio"] == [1.5, 2.0, 2.5]
    assert one["loss_differences"] == {"student": 0.2, "lora": 0.0}
    one["memory_mib"] = {"project": 3.0, "reference": 4.0}
    assert "| 8 | 4 | 0.500 | 0.333 | 2.00 (1.50–2.50) | 3 | 4 | 2e-01 |" in train_step.markdown([one])
