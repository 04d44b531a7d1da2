"""Operations counted, images a second and utilization, against counts made by hand."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import throughput
from callbacks.throughput import Throughput, matmul_rate
from common.errors import UserError

BATCH, WIDTH = 3, 5


class Linear(LightningModule):
    """One matrix product a step; a step takes a tenth of a second by the clock of the test."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.layer, self.clock, self.logged = nn.Linear(WIDTH, WIDTH, bias=False), clock, []  # type: ignore[var-annotated]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.clock[0] += 0.1
        return self.layer(torch.ones(len(batch["prompts"]), WIDTH)).sum()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.clock[0] += 7  # what lies between steps does not count
        self.logged.append(dict(self.trainer.callback_metrics))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Prompts(LightningDataModule):
    """Batches of prompts."""

    micro_batch_size = BATCH

    def __init__(self, batch: int = BATCH) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([{"prompts": ["a cat"] * self.batch} for _ in range(9)], batch_size=None)  # type: ignore[arg-type]


def run(
    callback: Throughput, module: Linear, steps: int, data: Prompts, checkpoint: Path | None = None
) -> Trainer:  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_numbers(clock: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback, module = Throughput(peak_tflops=1e-9), Linear(clock)
    trainer = run(callback, module, 4, Prompts())
    # forward B x W x W multiply-adds, and the same for the gradient of the weights; the input needs none
    flops = 2 * 2 * BATCH * WIDTH * WIDTH
    assert callback.flops == flops
    values = trainer.callback_metrics
    # on_train_batch_start of the module comes after the callback's, so 7.1 s a step
    assert values["throughput/images_per_second"] == pytest.approx(BATCH / 7.1)
    assert values["throughput/model_flops_utilization"] == pytest.approx(flops / 7.1 / 1000)
    assert values["counts/images_seen"] == 4 * BATCH and values["memory/peak_gib"] > 0
    assert "1e-09 TFLOP/s (as configured)" in caplog.text
    trainer.save_checkpoint(tmp_path / "x.ckpt")

    resumed = Throughput(peak_tflops=1e-9)
    trainer = run(resumed, Linear(clock), 5, Prompts(), tmp_path / "x.ckpt")
    assert trainer.callback_metrics["counts/images_seen"] == 5 * BATCH and resumed.flops == flops
    assert "throughput/images_per_second" not in trainer.callback_metrics, "one update is no measurement"
    larger = Throughput(peak_tflops=1.0)
    run(larger, Linear(clock), 5, Prompts(2 * BATCH), tmp_path / "x.ckpt")
    assert larger.flops == 2 * flops, "another batch is counted again"


def test_the_measured_rate_is_that_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.perf_counter()
    rate = matmul_rate(torch.device("cpu"), torch.float32, repeats=2)
    assert 2 * 1024**3 / (time.perf_counter() - start) < rate < 1e15
    before = torch.get_rng_state()
    matmul_rate(torch.device("cpu"), torch.float32, repeats=1)
    assert torch.equal(before, torch.get_rng_state())


def test_an_error_in_a_counted_step_leaves_no_counter_on(clock: list[float]) -> None:
    class Broken(Linear):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            raise OSError("gone")

    callback = Throughput(peak_tflops=1.0)
    with pytest.raises(OSError, match="gone"):
        run(callback, Broken(clock), 1, Prompts())
    torch.ones(2, 2) @ torch.ones(2, 2)
    assert callback.flops is None and callback._counter is None


@pytest.mark.parametrize("setting", [{"window": 0}, {"peak_tflops": 0.0}])
def test_bad_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="Throughput.window"):
        Throughput(**setting)
