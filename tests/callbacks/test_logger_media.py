"""Pictures, tables, files and settings in every kind of logger.

W&B, MLflow and Comet are optional. Their objects are stood in for by classes with the signatures of the real
ones (wandb 0.31.0, mlflow 3.17.2, comet_ml 3.58.8), so that a wrong argument fails.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers import (
    CometLogger,
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from callbacks.loggers import MetricsCSV
from callbacks.logging_media import Table, log_config, log_media, log_report
from callbacks.report import RunReport
from callbacks.run_folder import RunFolder
from callbacks.samples import SampleGrid
from reports.run_report import Report
from reports.write import write_report
from tests.callbacks.standin import StandIn, StandInData
from tests.callbacks.test_evaluation import own_cache, trainer  # noqa: F401 - a fixture

Calls = list[tuple[Any, ...]]
PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
TABLE = Table(["", "clip_score ↑"], [["Student, 1 step", "0.65"], ["a | b", "0.7"]])
CONFIG = {
    "model": {"class_path": "M", "init_args": {"lr": 1e-4, "betas": [0.0, 0.99], "init": None}},
    "trainer": {"callbacks": [{"class_path": "A"}, {"class_path": "B"}]},
}


class Run:
    """wandb.Run"""

    id = "run7"

    def __init__(self) -> None:
        self.calls: Calls = []
        self.config = SimpleNamespace(update=self._update)

    def _update(self, d: Any, allow_val_change: bool | None = None) -> None:
        self.calls.append(("config", d))

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        self.calls.append(("log", data))

    def log_artifact(
        self,
        artifact_or_path: Any,
        name: str | None = None,
        type: str | None = None,
        aliases: list[str] | None = None,
        tags: list[str] | None = None,
    ) -> None:
        self.calls.append(("artifact", artifact_or_path, name))


class Client:
    """mlflow.MlflowClient"""

    def __init__(self) -> None:
        self.calls: Calls = []
        self.params: dict[str, str] = {}

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params=dict(self.params)))

    def log_batch(
        self,
        run_id: str,
        metrics: Any = (),
        params: Any = (),
        tags: Any = (),
        synchronous: bool | None = None,
    ) -> None:
        for param in params:
            assert self.params.get(param.key, param.value) == param.value, "MLflow refuses other values"
            self.params[param.key] = param.value

    def log_image(
        self,
        run_id: str,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
        synchronous: bool | None = None,
    ) -> None:
        assert synchronous, "or the picture may be lost with the process"
        self.calls.append(("image", run_id, image, key, step))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.calls.append(("text", run_id, text, artifact_file))

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        self.calls.append(("artifact", run_id, local_path))


class Experiment:
    """comet_ml.CometExperiment"""

    def __init__(self) -> None:
        self.calls: Calls = []

    def log_image(
        self,
        image_data: Any,
        name: str | None = None,
        overwrite: bool = False,
        image_format: str = "png",
        image_scale: float = 1.0,
        image_shape: Any = None,
        image_colormap: str | None = None,
        image_minmax: Any = None,
        image_channels: str = "last",
        copy_to_tmp: bool = True,
        step: int | None = None,
    ) -> None:
        self.calls.append(("image", image_data, name, step))

    def log_table(self, filename: str, tabular_data: Any = None, headers: Any = False, **_: Any) -> None:
        self.calls.append(("table", filename, tabular_data, headers))

    def log_asset(
        self,
        file_data: Any,
        file_name: str | None = None,
        overwrite: bool = False,
        copy_to_tmp: bool = True,
        step: int | None = None,
        metadata: Any = None,
    ) -> None:
        self.calls.append(("asset", file_data, file_name, step))


def wandb_logger(monkeypatch: pytest.MonkeyPatch) -> WandbLogger:
    module: Any = ModuleType("wandb")
    module.Image = lambda image: ("image", image)
    module.Table = lambda columns, data, dataframe: ("table", columns, data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    monkeypatch.setattr(WandbLogger, "experiment", run := Run())
    logger = WandbLogger()
    assert logger.experiment is run
    return logger


def mlflow_logger(monkeypatch: pytest.MonkeyPatch) -> MLFlowLogger:
    package: Any = ModuleType("mlflow")
    package.tracking, package.entities = ModuleType("mlflow.tracking"), ModuleType("mlflow.entities")
    package.tracking.MlflowClient = lambda uri: None
    package.entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)
    package.entities.Metric = SimpleNamespace
    for module in (package, package.tracking, package.entities):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    monkeypatch.setattr(MLFlowLogger, "experiment", Client())
    monkeypatch.setattr(MLFlowLogger, "run_id", "run7")
    return MLFlowLogger()


def comet_logger(monkeypatch: pytest.MonkeyPatch) -> CometLogger:
    module: Any = ModuleType("comet_ml")
    module.ExperimentConfig = lambda **options: None
    monkeypatch.setitem(sys.modules, "comet_ml", module)
    monkeypatch.setattr("lightning.pytorch.loggers.comet._COMET_AVAILABLE", True)
    monkeypatch.setattr(CometLogger, "_create_experiment", lambda self: None)
    monkeypatch.setattr(CometLogger, "experiment", experiment := Experiment())
    monkeypatch.setattr(
        CometLogger, "log_hyperparams", lambda self, params: experiment.calls.append(("params", params))
    )
    return CometLogger()


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def text(found: EventAccumulator, name: str) -> str:
    (event,) = found.Tensors(f"{name}/text_summary")
    return str(event.tensor_proto.string_val[0].decode())


def test_tensorboard_shows_pictures_tables_and_markdown(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    (tmp_path / "report.md").write_text("# Ergebnis ≥ 1", encoding="utf-8")
    (tmp_path / "report.json").write_text("{}")
    files = {name: tmp_path / name for name in ("report.md", "report.json")}
    for name, media in {"samples": PICTURE.convert("RGBA"), "results": TABLE, **files}.items():
        log_media(logger, name, media, 40)
    logger.save()
    found = events(tmp_path)
    (picture,) = found.Images("samples")
    assert (picture.step, picture.width, picture.height) == (40, 4, 4)
    assert "| Student, 1 step | 0.65 |" in text(found, "results") and "a \\| b" in text(found, "results")
    assert text(found, "report.md") == "# Ergebnis ≥ 1"
    assert not any("report.json" in name for name in found.Tags()["tensors"])


def test_wandb_takes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = wandb_logger(monkeypatch)
    for media in (PICTURE, TABLE, tmp_path / "report.html"):
        log_media(logger, "my report", media, 40)
    assert logger.experiment.calls == [
        ("log", {"my report": [("image", PICTURE)], "trainer/global_step": 40}),
        ("log", {"my report": ("table", TABLE.columns, TABLE.rows), "trainer/global_step": 40}),
        ("artifact", str(tmp_path / "report.html"), "my-report-run7"),
    ]


def test_mlflow_takes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = mlflow_logger(monkeypatch)
    for media in (PICTURE, TABLE, tmp_path / "report.html"):
        log_media(logger, "after 1,040 steps", media, 40)
    assert logger.experiment.calls == [
        ("image", "run7", PICTURE, "after 1-040 steps", 40),
        ("text", "run7", ',clip_score ↑\r\n"Student, 1 step",0.65\r\na | b,0.7\r\n', "after 1-040 steps.csv"),
        ("artifact", "run7", str(tmp_path / "report.html")),
    ]


def test_comet_takes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = comet_logger(monkeypatch)
    for media in (PICTURE, TABLE, tmp_path / "report.html"):
        log_media(logger, "report", media, 40)
    assert logger.experiment.calls == [
        ("image", PICTURE, "report", 40),
        ("table", "report.csv", TABLE.rows, TABLE.columns),
        ("asset", str(tmp_path / "report.html"), "report", 40),
    ]


def test_the_configuration_becomes_hyper_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    loggers: list[Any] = [wandb_logger(monkeypatch), mlflow_logger(monkeypatch), comet_logger(monkeypatch)]
    log_config(loggers, path)
    assert not any(logger.experiment.calls for logger in loggers), "there is no file"
    path.write_text(yaml.safe_dump(CONFIG))
    wandb, mlflow, comet = loggers
    mlflow.experiment.params = {"model.init_args.lr": "0.5"}  # a continued run
    log_config(loggers, path)
    expected = {
        "model.class_path": "M", "model.init_args.lr": 1e-4, "model.init_args.betas": [0.0, 0.99],
        "model.init_args.init": None, "trainer.callbacks.0.class_path": "A",
        "trainer.callbacks.1.class_path": "B",
    }  # fmt: skip
    assert wandb.experiment.calls == [("config", expected), ("artifact", str(path), "config.yaml-run7")]
    assert comet.experiment.calls == [("params", expected), ("asset", str(path), "config.yaml", 0)]
    assert mlflow.experiment.params == {key: str(value) for key, value in expected.items()} | {
        "model.init_args.lr": "0.5"
    }
    assert mlflow.experiment.calls == [("artifact", "run7", str(path))]


def report(metrics: dict[str, float]) -> Report:
    results = {name: {"value": value, "num_images": 8, "details": {}} for name, value in metrics.items()}
    content = {
        "experiment": "e", "step": 40, "weights": "ema", "model": "m", "metrics": results,
        "teacher_metrics": {}, "timing": {}, "environment": {}, "config_path": "config.yaml",
    }  # fmt: skip
    return Report(content, {})


def hparams(found: EventAccumulator) -> tuple[dict[str, Any], set[str]]:
    """Hyper-parameters and metrics of the HParams page."""
    content = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content)
        for tag in found.PluginTagToContent("hparams")
    }
    start = content["_hparams_/session_start_info"].session_start_info.hparams
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.items()}
    infos = content["_hparams_/experiment"].experiment.metric_infos
    return values, {info.name.tag for info in infos}


def test_the_report_and_the_final_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    board, wandb = TensorBoardLogger(str(tmp_path), name="", version=""), wandb_logger(monkeypatch)
    final = report({"clip_score": 0.65, "hpsv2/anime": 0.25, "milliseconds_per_image": 4.0})
    write_report(final, tmp_path)
    log_report([board, wandb], final, tmp_path)
    found = events(tmp_path)
    values, metrics = hparams(found)
    assert metrics == {"test/clip_score", "test/hpsv2/anime"}, "the times are no scalars of the run"
    assert values == {
        "model.class_path": "M", "model.init_args.lr": 1e-4, "model.init_args.betas": "[0.0, 0.99]",
        "trainer.callbacks.0.class_path": "A", "trainer.callbacks.1.class_path": "B",
    }  # fmt: skip
    assert "0.65" in text(found, "results") and "# e, step 40" in text(found, "report.md")
    names = [name for kind, *_, name in wandb.experiment.calls if kind == "artifact"]
    assert names == [f"{file}-run7" for file in ("report.md", "report.html", "report.json", "manifest.json")]
    assert wandb.experiment.calls[0][1]["results"][2][0][:2] == ["Student, 1 step", "0.6500"]


def test_a_report_without_metrics_has_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = wandb_logger(monkeypatch)
    write_report(report({}), tmp_path)
    log_report([logger], report({}), tmp_path)
    assert {call[0] for call in logger.experiment.calls} == {"artifact"}


def test_loggers_that_hold_no_media_get_none(tmp_path: Path) -> None:
    for logger in (MetricsCSV(tmp_path), CSVLogger(str(tmp_path))):
        for media in (PICTURE, TABLE, tmp_path / "report.html"):
            log_media(logger, "x", media, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_run_hands_all_of_it_over(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: Any = wandb_logger(monkeypatch)
    loggers: list[Logger] = [TensorBoardLogger(str(tmp_path), name="", version=""), wandb]
    grid = SampleGrid(num_images=1, every_n_steps=1, teacher_steps=2)
    # the report stands first, and yet speaks last
    callbacks = [RunFolder(tmp_path, yaml.safe_dump(CONFIG)), RunReport(), grid]
    trainer(tmp_path, *callbacks, max_steps=1, logger=loggers).fit(StandIn(tiny_sd), StandInData())
    calls = wandb.experiment.calls
    settings = [given for kind, given, *_ in calls if kind == "config"]
    assert any(found.get("model.class_path") == "M" for found in settings)
    assert [given["trainer/global_step"] for kind, given, *_ in calls if "samples" in given] == [0, 1]
    names = [rest[-1] for kind, *rest in calls if kind == "artifact"]
    files = ("config.yaml", "report.md", "report.html", "report.json", "manifest.json")
    assert names == [f"{name}-run7" for name in files]
    found = events(tmp_path)
    assert hparams(found)[0]["model.class_path"] == "M"
    assert [event.step for event in found.Images("samples")] == [0, 1]
