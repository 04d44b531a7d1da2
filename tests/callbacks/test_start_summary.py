"""What a run prints when it starts, in a real fit and with made-up parts."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from PIL import Image

from callbacks import start_summary
from callbacks.samples import Pictures
from callbacks.start_summary import (
    StartSummary,
    duration,
    effective_batch,
    likely_cause,
    memory_table,
)
from callbacks.throughput import Throughput
from common.errors import UserError
from lightning_modules.memory import EMA, GRADIENTS
from tests.tiny_distillation import changed, distillation, fit, snapshot
from tests.tiny_run import TinyData, TinyModule


def test_table_of_parts() -> None:
    parts = {
        "student": (2_500_000, 10 * 2**20, True),
        "teacher": (2_500_000, 5 * 2**20, False),
        EMA: (1, 2**20, False),
        GRADIENTS: (1, 2**20, False),
    }
    header, _, *rows = memory_table(parts).splitlines()
    lines = [header, *rows]
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


def test_duration() -> None:
    assert [duration(s) for s in (0.4, 59.4, 7320)] == ["0:00:00", "0:00:59", "2:02:00"]


class Clock:
    """The first update takes 100 s, as a warm-up may, later ones 3 s, a drawing of pictures 8 s."""

    def __init__(self) -> None:
        self.ticks = iter([0, 100, 200, 203, 210, 213, 220, 223, 300, 400, 408])

    def perf_counter(self) -> float:
        return next(self.ticks)


def test_a_fit_prints_table_batch_and_one_estimate(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is the same whether pictures are drawn to see how long that takes or not."""
    monkeypatch.setattr(start_summary, "time", Clock())
    module, alone = distillation(tiny_sd), distillation(tiny_sd)
    fit(module, tmp_path, 7, StartSummary(timed_updates=3), SampleGridOfTwo(), micro_batch_size=2)
    printed = capsys.readouterr().out
    for name, (values, _, _) in module.memory_parts().items():
        assert re.search(rf"^{re.escape(name)} +{values / 1e6:.3f} ", printed, re.MULTILINE), name
    assert "1 process x micro-batch 2 x accumulation 2 = 4" in printed
    assert "Precision: 32-true" in printed and "SLOW" not in printed
    for line in (f"Run: {tmp_path}", f"Watch: {tmp_path}/report.html, renewed at each validation",
                 f"Teacher: {tiny_sd}", "Objective: SwiftBrush, guidance scale 4.5", "Device: cpu x 1",
                 "Prompts: 9 from a list", "Evaluation captions: 9; validations: the first 2"):  # fmt: skip
        assert line in printed.splitlines()
    # an update is 3 s and a grid of two pictures 4 s
    assert printed.count(" to go;") == 1
    assert "3 s per student update: 7 take about 0:00:49, 0:00:21 to go; validations" in printed
    assert re.search(r"end about 20\d\d-\d\d-\d\d \d\d:\d\d\n", printed)
    fit(alone, tmp_path, 7, micro_batch_size=2)
    assert not changed(snapshot(module), snapshot(alone))


class SampleGridOfTwo(Pictures):
    """Two pictures at every update, drawn at once."""

    def __init__(self) -> None:
        super().__init__(["a cat", "a dog"], num_images=2, every_n_steps=1)

    def draw(self, trainer: L.Trainer, module: L.LightningModule) -> Image.Image:
        return Image.new("RGB", (1, 1))


def test_a_slow_update_is_told_with_its_cause(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update's operations take a second at the machine's speed, and the clock says 3, then 6 s."""
    monkeypatch.setattr(start_summary, "_LONG", 5.0)
    for seconds, is_told in [(1.0, False), (0.5, True)]:
        counted = Throughput(peak_tflops=1.0)
        monkeypatch.setattr(start_summary, "matmul_rate", lambda *_, n=counted, s=seconds: (n.flops or 0) / s)
        monkeypatch.setattr(start_summary, "time", Clock())
        fit(distillation(tiny_sd), tmp_path, 7, counted, StartSummary(timed_updates=3))
        line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SLOW")]
        assert len(line) == is_told
    assert "takes 3 s, 6 times its operations at this processor's speed (0.5 s)" in line[0]
    assert re.search(r"would end about 20\d\d-\d\d-\d\d \d\d:\d\d\. Likely cause: \S", line[0])


def test_likely_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_summary.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(start_summary.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(start_summary, "is_slow_in_bf16", lambda _: True)
    loads = iter([9.0, 9.0, 9.0, 2.1, 9.0])
    monkeypatch.setattr(start_summary.os, "getloadavg", lambda: (next(loads), 0, 0))
    assert "without bf16 units; set --trainer.precision=32-true" in likely_cause("bf16-mixed", 1, True)
    assert "4 threads on 2 cores; set OMP_NUM_THREADS=1" in likely_cause("32-true", 2, True)
    assert "swaps" in likely_cause("32-true", 1, True)
    assert likely_cause("32-true", 1, False).startswith("none seen")
    assert "other processes on the cores (load average 9.0" in likely_cause("32-true", 1, False)


def test_modules_without_parts_are_refused(tmp_path: Path) -> None:
    trainer = L.Trainer(max_steps=1, callbacks=[StartSummary()], logger=False, default_root_dir=tmp_path,
                        enable_checkpointing=False, accelerator="cpu")  # fmt: skip
    with pytest.raises(UserError, match="memory_parts.*TinyModule has not"):
        trainer.fit(TinyModule(), TinyData())
    with pytest.raises(UserError, match="timed_updates is 0"):
        StartSummary(timed_updates=0)
