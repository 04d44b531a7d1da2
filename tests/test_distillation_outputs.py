"""What the commands leave of a distillation whose configuration names no callbacks."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from callbacks.report import RunReport
from tests.tiny_distillation import PROMPTS, write_config


def test_fit_reports_and_predict_draws_without_being_asked(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "tiny.yaml", tiny_sd, trainer__max_steps=1, seed_everything=5)
    cli.main(["fit", "--config", str(config), "--data.seed=2"])
    run = tmp_path / "runs" / "tiny" / "version_0"
    assert "Memory by part" in capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    assert report["step"] == 1 and report["timing"]["seconds_per_step"] > 0
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["model"]["init_args"]["seed"] == 5 and settings["data"]["init_args"]["seed"] == 2

    (run / "report.json").unlink()
    cli.main(["fit", "--config", str(config), "--data.seed=2", "--ckpt_path=last"])
    again = json.loads((run / "report.json").read_text())
    assert again["timing"]["seconds_per_step"] == report["timing"]["seconds_per_step"]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*callbacks used to create the checkpoint.*")
        cli.main(["predict", "--config", str(config), "--ckpt_path=last", "--data.eval_batch_size=2"])
    listed: list[dict[str, Any]] = json.loads((run / "predictions" / "predictions.json").read_text())
    assert [entry["prompt"] for entry in listed] == PROMPTS[:2]
    assert all((run / "predictions" / entry["file"]).stat().st_size > 50 for entry in listed)


def test_a_configured_report_is_not_doubled(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[RunReport] = []
    original = RunReport.__init__

    def note(self: RunReport) -> None:
        made.append(self)
        original(self)

    monkeypatch.setattr(RunReport, "__init__", note)
    callbacks = [{"class_path": "RunReport"}, {"class_path": "StartSummary"}]
    config = write_config(tmp_path / "tiny.yaml", tiny_sd, trainer__max_steps=1, trainer__callbacks=callbacks)
    cli.main(["fit", "--config", str(config)])
    assert len(made) == 1
