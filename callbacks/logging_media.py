"""Pictures, tables, files and settings for loggers, each as the logger can hold it."""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import yaml
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch.utils.tensorboard.summary import hparams

from callbacks.resume import flatten
from reports.run_report import Report, result_table
from reports.text import markdown_table

REPORT_FILES = ("report.md", "report.html", "report.json", "manifest.json")


class Table(NamedTuple):
    """A table of texts."""

    columns: list[str]
    rows: list[list[str]]


Media: TypeAlias = Image.Image | Table | Path


def log_media(logger: Logger, name: str, media: Media, step: int) -> None:
    """Hand a picture, a table or a file to a logger. To be called on rank zero.

    TensorBoard shows pictures, and tables and Markdown files as texts; other files it can't hold. W&B, MLflow
    and Comet take everything, files as artifacts. Other loggers, metrics.csv among them, get nothing: the run
    folder has it all.

    Args:
        logger: one of a Trainer's.
        name: what it is called there; for a table or a file without step number, so that a later one
            replaces it.
        media: the picture, table or path of the file.
        step: student updates done.
    """
    for kind, send in _SENDERS.items():
        if isinstance(logger, kind):
            send(logger, name, media, step)
            return


def log_config(loggers: Iterable[Logger], path: Path) -> None:
    """Hand a run's config.yaml to its loggers: each key as a hyper-parameter named as on the command line.

    TensorBoard gets it with the final metrics (`log_report`). Nothing happens without the file.
    """
    if not path.is_file():
        return
    settings = read_settings(path)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            continue
        values = settings
        if isinstance(logger, MLFlowLogger):
            # A run that is continued (run_id) refuses other values; the file tells what they are now.
            known = logger.experiment.get_run(logger.run_id).data.params
            values = {key: value for key, value in settings.items() if key not in known}
        logger.log_hyperparams(values)
        log_media(logger, path.name, path, 0)


def log_report(loggers: Iterable[Logger], report: Report, folder: Path) -> None:
    """Hand the report that has been written to `folder` to the loggers: its table, its files and, for
    TensorBoard's HParams page, the settings beside the final metrics ``test/NAME``.
    """
    step = report.content["step"] or 0
    results = report.content["metrics"]
    # times are no scalars of the run, see Evaluation
    metrics = {f"test/{name}": r["value"] for name, r in results.items() if name != "milliseconds_per_image"}
    config = folder / "config.yaml"
    for logger in loggers:
        if results:
            log_media(logger, "results", Table(*result_table(report)), step)
        for name in REPORT_FILES:
            log_media(logger, name, folder / name, step)
        if isinstance(logger, TensorBoardLogger):
            settings = read_settings(config) if config.is_file() else {}
            known = {key: value if isinstance(value, bool | int | float | str) else str(value)
                     for key, value in settings.items() if value is not None}  # fmt: skip
            for summary in hparams(known, metrics):  # Lightning would write the metrics' scalars once more
                logger.experiment._get_file_writer().add_summary(summary, step)
            logger.experiment.flush()


def read_settings(path: Path) -> dict[str, Any]:
    """The keys of a configuration file as on the command line, and their values."""
    return dict(flatten(yaml.safe_load(path.read_text(encoding="utf-8"))))


def _to_tensorboard(logger: TensorBoardLogger, name: str, media: Media, step: int) -> None:
    board = logger.experiment
    match media:
        case Image.Image():
            board.add_image(name, torch.from_numpy(np.array(media.convert("RGB"))), step, dataformats="HWC")
        case Table():
            board.add_text(name, "\n".join(markdown_table(*media)), step)
        case Path() if media.suffix == ".md":
            board.add_text(name, media.read_text(encoding="utf-8"), step)


def _to_wandb(logger: WandbLogger, name: str, media: Media, step: int) -> None:
    match media:
        case Image.Image():
            logger.log_image(name, [media], step)
        case Table():
            logger.log_table(name, media.columns, media.rows, step=step)
        case Path():
            # Artifacts are the project's: the run's id keeps those of two runs apart.
            plain = re.sub(r"[^\w.-]+", "-", name)
            logger.experiment.log_artifact(str(media), name=f"{plain}-{logger.experiment.id}", type="report")


def _to_mlflow(logger: MLFlowLogger, name: str, media: Media, step: int) -> None:
    client, run = logger.experiment, logger.run_id
    plain = re.sub(r"[^\w. /-]+", "-", name)
    match media:
        case Image.Image():
            client.log_image(run, media, key=plain, step=step, synchronous=True)
        case Table():
            text = io.StringIO()
            csv.writer(text).writerows([media.columns, *media.rows])
            client.log_text(run, text.getvalue(), f"{plain}.csv")
        case Path():
            client.log_artifact(run, str(media))


def _to_comet(logger: CometLogger, name: str, media: Media, step: int) -> None:
    experiment = logger.experiment
    match media:
        case Image.Image():
            experiment.log_image(media, name=name, step=step)
        case Table():
            experiment.log_table(f"{name}.csv", media.rows, headers=media.columns)
        case Path():
            experiment.log_asset(str(media), file_name=name, overwrite=True, step=step)


_SENDERS: dict[type[Logger], Any] = {
    TensorBoardLogger: _to_tensorboard,
    WandbLogger: _to_wandb,
    MLFlowLogger: _to_mlflow,
    CometLogger: _to_comet,
}
