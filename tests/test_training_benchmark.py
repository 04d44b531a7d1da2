"""The plain loop that training is measured against computes what this project computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train_step
from benchmarks.cost_growth import teacher
from benchmarks.shapes import model_folder
from benchmarks.training_rounds import measure_speed
from lightning_modules.networks.loading import load_parts


def options(folder: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """As `main` makes them, for three steps of three prompts."""
    return {
        "folder": str(folder), "texts": str(tmp_path / "texts.pt"), "precision": "32-true", "per_round": 1,
        "threads": 1, "clock": "cpu", "compile": False, "apart": False, "changes": changes,
        "steps": 4, "batch": 3,
    }  # fmt: skip


def test_losses_operations_and_times_of_both(tiny_sd: Path, tmp_path: Path) -> None:
    found = measure_speed(options(tiny_sd, tmp_path))
    one = train_step.summary(found, 3)
    # the fake score starts as the teacher: only its update makes the student's loss grow
    assert found["losses"]["project"]["student"][0] == 0 < found["losses"]["project"]["student"][3]
    assert len(set(found["losses"]["reference"]["lora"])) == 4
    assert max(one["loss_differences"].values()) < 1e-5
    assert len(found["seconds"]["project"]) == len(found["seconds"]["reference"]) == one["rounds"] == 2
    parts = one["operations"]
    counted = sum(parts.values()) - parts["project"]
    # folding the adapter saves some, encoding the prompts takes some
    assert 0.9 * counted < parts["project"] < 1.1 * counted
    plain, adapted = parts["teacher, two evaluations"], parts["LoRA teacher, two evaluations"]
    assert plain < adapted < 2 * plain
    assert set(torch.load(tmp_path / "texts.pt")["text"]) == {"encoder_hidden_states"}


def test_transformers_train_too(tmp_path: Path) -> None:
    folder = model_folder("pixart", tmp_path / "model", small=True)
    found = measure_speed(options(folder, tmp_path) | {"steps": 3})
    assert found["losses"]["project"]["student"][2] > 0
    assert max(train_step.summary(found, 3)["loss_differences"].values()) < 1e-4


def test_a_shape_of_its_own_is_a_model_like_any(tmp_path: Path) -> None:
    parts = load_parts(model_folder("sd21", tmp_path / "model", small=True))
    assert parts.latent_shape == (4, 16, 16) and parts.tokenizers[0].model_max_length == 77
    assert load_parts(teacher(tmp_path, 16)).latent_shape == (8, 16, 16)


def test_large_shapes_need_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train_step.py", "--size", "sd21"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        train_step.arguments()
    assert "--size sd21 needs a GPU, and there is none here" in capsys.readouterr().err


def test_tables(tmp_path: Path) -> None:
    losses = {"project": {"student": [1.0, 2.0], "lora": [3.0, 4.0]}}
    losses["reference"] = {"student": [1.0, 2.5], "lora": [3.0, 4.0]}
    found = {
        "seconds": {"project": [1.0, 2.0, 2.0], "reference": [2.0, 3.0, 5.0]}, "losses": losses,
        "operations": {"project": 70, "student": 50, "LoRA": 10}, "matrix_rates": [40.0, 60.0, 60.0],
    }  # fmt: skip
    one = train_step.summary(found, 8) | {"batch": 8}
    assert one["speed_ratio"] == [1.75, 2.0, 2.25] and one["images_per_second"] == 4
    assert one["loss_differences"] == {"student": 0.2, "lora": 0.0}
    assert one["share_of_matrix_rate"]["project"] == [0.5, 0.5, 1.0]
    one["memory_mib"] = {"project": {"step": 3.0}, "reference": {"step": 4.0}}
    table = train_step.markdown([one], "command", "here")
    assert "| 8 | 0.500 | 0.333 | **2.00** (1.75–2.25) | 3 | 4 | 2e-01 | 50 % | 33 % |" in table
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- training step -->\nold\n<!-- end of training step -->\nafter\n")
    train_step.insert("new\n", page, "training step")
    assert page.read_text() == "before\n<!-- training step -->\nnew\n<!-- end of training step -->\nafter\n"
    with pytest.raises(SystemExit, match="has no lines <!-- other -->"):
        train_step.insert("new\n", page, "other")
