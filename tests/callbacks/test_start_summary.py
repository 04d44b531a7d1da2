"""What a run prints when it starts, in a real fit and with made-up parts."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from callbacks import start_summary
from callbacks.start_summary import StartSummary, duration, effective_batch, estimated_time, memory_table
from common.errors import UserError
from lightning_modules.memory import EMA, GRADIENTS
from tests.tiny_distillation import distillation, fit
from tests.tiny_run import TinyData, TinyModule


def test_table_of_parts() -> None:
    parts = {
        "student": (2_500_000, 10 * 2**20, True),
        "teacher": (2_500_000, 5 * 2**20, False),
        EMA: (1, 2**20, False),
        GRADIENTS: (1, 2**20, False),
    }
    lines = memory_table(parts).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["Memory", "by", "part", "M", "MiB"],
        ["student", "2.500", "10.0", "trained"],
        ["teacher", "2.500", "5.0", "frozen"],
    ]
    assert not any(word in line for line in lines[3:] for word in ("trained", "frozen"))
    assert lines[-1].split() == ["sum,", "without", "activations", "17.0"]
    assert len({line.index(".") for line in lines[1:3]}) == 1  # numbers stand under each other


@pytest.mark.parametrize(
    ("processes", "micro", "local", "total", "text"),
    [
        (1, 48, 48, 48, "1 process x micro-batch 48 x accumulation 1 = 48"),
        (8, 2, 6, 48, "8 processes x micro-batch 2 x accumulation 3 = 48"),
    ],
)
def test_effective_batch(processes: int, micro: int, local: int, total: int, text: str) -> None:
    data = SimpleNamespace(batch_size=total, micro_batch_size=micro, local_batch_size=local)
    trainer: Any = SimpleNamespace(world_size=processes, datamodule=data)
    assert effective_batch(trainer) == [f"Prompts per student update: {text}"]
    trainer.datamodule = object()
    assert effective_batch(trainer) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7320, "2 h 02 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_estimate_multiplies_by_the_number_of_updates() -> None:
    text = estimated_time(0.5, 300, 60)
    assert text.startswith("0.5 s per student update: 300 take about 2 min 30 s, 2 min 00 s to go;")
    assert text.endswith("validations and the final evaluation are extra")
    assert "to go" not in estimated_time(0.5, 300, 300)


def test_a_fit_prints_table_batch_and_one_estimate(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes 100 s in the first update, which is not counted, and 3 s in each of the others."""
    ticks = iter([0, 100, 100, 103, 110, 113, 120, 123])
    monkeypatch.setattr(start_summary, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    module = distillation(tiny_sd)
    fit(module, tmp_path, 5, StartSummary(timed_updates=3), micro_batch_size=2)
    printed = capsys.readouterr().out
    for name, (values, _, _) in module.memory_parts().items():
        assert re.search(rf"^{re.escape(name)} +{values / 1e6:.3f} ", printed, re.MULTILINE), name
    assert "1 process x micro-batch 2 x accumulation 2 = 4" in printed
    assert printed.count("to go;") == 1
    assert "3 s per student update: 5 take about 15 s, 3 s to go" in printed


def test_modules_without_parts_are_refused(tmp_path: Path) -> None:
    trainer = L.Trainer(max_steps=1, callbacks=[StartSummary()], logger=False, default_root_dir=tmp_path,
                        enable_checkpointing=False, accelerator="cpu")  # fmt: skip
    with pytest.raises(UserError, match="memory_parts.*TinyModule has not"):
        trainer.fit(TinyModule(), TinyData())
    with pytest.raises(UserError, match="timed_updates is 0"):
        StartSummary(timed_updates=0)
