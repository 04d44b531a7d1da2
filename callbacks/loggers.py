"""Loggers that a resumed run can continue: metrics.csv and TensorBoard, against student updates."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor


class MetricsCSV(Logger):
    """Writes `metrics.csv`: one row per step with all that was logged at that step.

    Lightning's CSVLogger deletes the file of an earlier session; this one keeps it. The file is only appended
    to, except that it is rewritten (atomically) when a new column appears, rows are dropped, or a step gets
    more values after its row has been written. A row waits in memory until the next step begins or `flush`,
    which comes before each checkpoint, so that a killed run loses none.

    Args:
        folder: The run folder.
        resume_step: Rows after this step are dropped, earlier ones stay. None: the file goes on as it is.
        filename: Name of the file in the folder.
    """

    def __init__(self, folder: Path, resume_step: int | None = None, filename: str = "metrics.csv") -> None:
        super().__init__()
        self.folder, self.path, self.resume_step = folder, folder / filename, resume_step
        self._columns: list[str] = ["step"]
        self._pending: dict[str, str] = {}
        self._last_step: str | None = None  # step of the file's last row
        self._opened = False

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self.folder.parent.name

    @property
    def version(self) -> str:
        """Name of the run folder."""
        return self.folder.name

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: `config.yaml` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add values at a step; values of the same step share a row."""
        self.open()
        step_text = str(int(step or 0))
        if metrics and self._pending.get("step", step_text) != step_text:
            self.flush()
        if metrics:
            self._pending |= {"step": step_text, **{name: _text(value) for name, value in metrics.items()}}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is pending."""
        self.flush()

    @rank_zero_only
    def open(self) -> None:
        """Continue an existing file (dropping rows after `resume_step`), or begin one; once."""
        if self._opened:
            return
        self._opened = True
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = self._read()
        if self.resume_step is not None:  # a kill may have cut the last row short
            rows = [row for row in rows if row["step"].isdigit() and int(row["step"]) <= self.resume_step]
            self._last_step = rows[-1]["step"] if rows else None
        self._rewrite(rows)

    @rank_zero_only
    def flush(self) -> None:
        """Write the row in progress now; the file is rewritten if more values of its step come."""
        if not self._opened or not self._pending:
            return
        again = self._pending["step"] == self._last_step
        if again or not self._pending.keys() <= set(self._columns):
            rows = self._read()
            self._columns = list(dict.fromkeys([*self._columns, *self._pending]))
            earlier = rows.pop() if again and rows else {}  # none if the file has gone
            self._rewrite([*rows, {**earlier, **self._pending}])
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, restval="").writerow(self._pending)
        self._last_step, self._pending = self._pending["step"], {}

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, restval="")
                rows = [{name: value for name, value in row.items() if name} for row in reader]
                columns = list(reader.fieldnames or [])
            if columns and columns[0] != "step":
                raise ValueError(f"its first column is {columns[0]!r}")
        except (OSError, ValueError, csv.Error) as error:
            aside = self.path.with_suffix(f".damaged-{int(time.time())}")
            os.replace(self.path, aside)
            rank_zero_warn(f"{self.path} can't be continued ({error}): it is kept as {aside.name}")
            return []
        self._columns = list(dict.fromkeys([*self._columns, *columns]))
        return rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


class RunTensorBoard(TensorBoardLogger):
    """TensorBoard events straight in the run folder; no `hparams.yaml`, which would repeat `config.yaml`."""

    def __init__(self, folder: str | Path, resume_step: int | None = None) -> None:
        purge = None if resume_step is None else resume_step + 1
        super().__init__(str(folder), name="", version="", purge_step=purge, default_hp_metric=False)

    @rank_zero_only
    def save(self) -> None:
        """Write out the events; a run that is killed keeps its curves."""
        self.experiment.flush()


def log_now(trainer: Trainer, loggers: Iterable[Logger]) -> None:
    """Hand a training step's values to loggers before Lightning does, if it will: from the last callback.

    Lightning logs after all callbacks, so after the checkpoint of the step.
    """
    connector = trainer._logger_connector
    if not trainer.training or not connector.should_update_logs:
        return
    values = {name: value.item() if isinstance(value, Tensor) else value
              for name, value in connector.metrics["log"].items()}  # fmt: skip
    step = int(values.pop("step", trainer.global_step))
    for logger in loggers:
        logger.log_metrics(values, step=step)


class StepAxis(Callback):
    """Makes every logger's x-axis the number of student updates done.

    Lightning counts batches from zero, and an evaluation after update n would stand one beside the training
    values of update n. A logged value called "step" replaces Lightning's own count in all loggers.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Training values of the n-th update stand at n."""
        pl_module.log("step", float(trainer.global_step), batch_size=1)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Values of a validation after n updates stand at n."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # the same on all processes; reduced only because Lightning warns about values that are not
            pl_module.log("step", float(trainer.global_step), batch_size=1, sync_dist=True, reduce_fx="max")


def run_loggers(folder: Path, resume_step: int | None, command: str = "fit") -> list[Logger]:
    """Return the loggers every run has: metrics.csv and, for `fit`, TensorBoard events, in the run folder.

    `resume_step` is that of the checkpoint that is continued in this folder, if any. `validate`, `test` and
    `predict` write `metrics_<command>.csv`, so that the curves of the training stay as they are.
    """
    if command != "fit":
        return [MetricsCSV(folder, filename=f"metrics_{command}.csv")]
    return [MetricsCSV(folder, resume_step), RunTensorBoard(folder, resume_step)]


def _text(value: Any) -> str:
    """Return a value as it is written: numbers in full precision, so that curves can be compared exactly."""
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float) and math.isfinite(value) and value == int(value) and abs(value) < 2**53:
        return str(int(value))
    return repr(value) if isinstance(value, float) else str(value)
