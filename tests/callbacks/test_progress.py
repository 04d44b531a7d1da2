"""The numbers of the progress bar."""

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch import Tensor

from callbacks.progress import StepProgressBar
from tests.tiny_run import TinyData, TinyModule, TinyTwoRoles


def run(module: TinyModule, steps: int, bar: StepProgressBar, checkpoint: str | None = None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[bar], val_check_interval=2, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(module, TinyData(), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("module", [TinyModule, TinyTwoRoles])
def test_it_counts_updates_and_shows_values(
    module: type[TinyModule], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trainer = run(module(), 4, StepProgressBar())
    last = capsys.readouterr().err.split("\r")[-1]
    assert "Training: 100%" in last and " 4/4 " in last
    assert re.search(r"train/loss=[\d.]+", last) and re.search(r"val/frechet_distance=[\d.]+", last)
    assert re.search(r"step/s|s/step", last) and "epoch" not in last.lower()
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    run(module(), 6, StepProgressBar(), str(tmp_path / "x.ckpt"))
    drawn = capsys.readouterr().err
    assert " 4/6 " in drawn, "a resumed run starts from its step"
    assert " 6/6 " in drawn.split("\r")[-1]


def test_what_a_distillation_logs_stands_on_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Logging(TinyModule):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("objective/guidance_scale", 4.5)
            self.log("throughput/images_per_second", 55.123456)
            self.log("memory/peak_gib", 1.25)
            self.log("counts/images_seen", 123456.0)
            return super().training_step(batch, batch_idx)

    run(Logging(), 2, StepProgressBar())
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"train/loss=[\d.]+, .*κ=4.5, images=123456, images/s=55.12, GiB=1.25", last), last


def test_values_are_read_only_when_they_are_drawn() -> None:
    """Reading one waits for the GPU; a bar that is seldom drawn must not do so at every step."""
    read = []

    class Watched(StepProgressBar):
        def get_metrics(self, *arguments: Any) -> dict[str, Any]:
            read.append(1)
            return super().get_metrics(*arguments)

    class NoValidation(TinyModule):
        validation_step = None  # type: ignore[assignment]

    run(NoValidation(), 10, Watched(refresh_seconds=3600.0))
    assert len(read) == 1, "at the end"
    read.clear()
    run(NoValidation(), 10, Watched(refresh_seconds=0.0))
    assert len(read) <= 2, "a pipe gets a line every 20 seconds"


def test_other_loops_get_a_bar_of_batches(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=[StepProgressBar()], enable_checkpointing=False
    )
    trainer.test(TinyModule(), TinyData())
    assert "Testing:" in capsys.readouterr().err


def test_it_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    bar = StepProgressBar()
    bar.disable()
    run(TinyModule(), 2, bar)
    assert "Training" not in capsys.readouterr().err
