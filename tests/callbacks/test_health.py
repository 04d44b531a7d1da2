"""Health: what it measures, when it raises the alarm, and what a run does then."""

import csv
import json
import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cli
from callbacks import health as health_module
from callbacks.health import SIGNS, Health, measures
from callbacks.report import RunReport
from common.errors import UserError
from tests.callbacks.standin import StandIn, StandInData
from tests.callbacks.test_evaluation import own_cache, trainer  # noqa: F401 - a fixture
from tests.pages import figures


def test_what_is_measured() -> None:
    """Closed forms: a grey picture, a red one, and one that is half black and half white."""
    images = torch.zeros(3, 3, 32, 32)
    images[0], images[1, 0], images[2, :, :, 16:] = 0.5, 1.0, 1.0
    latents = torch.tensor([0.0, 1.0, -1.0]).reshape(3, 1, 1, 1) * torch.tensor([[[1.0, 3.0]]])
    found = measures(images, latents)
    assert found["saturation"].tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    assert found["contrast"].tolist() == pytest.approx([0, 0, 0.5], abs=1e-3)
    assert found["latent_mean"].tolist() == pytest.approx([0, 2, -2], abs=1e-6)
    assert found["latent_std"].tolist() == pytest.approx([0, 2**0.5, 2**0.5], abs=1e-6)
    grey_red, grey_half, red_half = 0.5, 0.5, 0.5**0.5
    assert found["diversity"].tolist() == pytest.approx(
        [(grey_red + grey_half) / 2, (grey_red + red_half) / 2, (grey_half + red_half) / 2]
    )
    halves = torch.zeros(3, 3, 32, 32)
    for channel in range(3):
        halves[channel, channel, :, 16:] = 1.0
    weights = [0.299, 0.587, 0.114]  # of the luma: red, green, blue
    assert measures(halves, latents)["contrast"].tolist() == pytest.approx([w / 2 for w in weights], abs=1e-3)


def test_the_range_and_its_alarms_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's pictures have 1 and 3; the student starts at 5, with a latent mean at -1."""
    health, values = Health(4, 1, tolerance=2.0), dict.fromkeys(SIGNS, 5.0) | {"latent_mean": -1.0}
    monkeypatch.setattr(health_module, "evaluating", lambda *_: nullcontext())
    monkeypatch.setattr(health_module, "teacher_pictures", lambda *_: torch.zeros(()))
    monkeypatch.setattr(health_module, "measures", lambda *_: dict.fromkeys(SIGNS, torch.tensor([1.0, 3.0])))
    monkeypatch.setattr(health, "_student_values", lambda *_: values)
    run: Any = SimpleNamespace(
        fast_dev_run=False, strategy=SimpleNamespace(root_device="cpu"), loggers=[], is_global_zero=True,
        datamodule=SimpleNamespace(eval_captions=["a"]), should_stop=False,
    )  # fmt: skip
    student: Any = SimpleNamespace(
        parts=SimpleNamespace(path=""), student_steps=0,
        generator=SimpleNamespace(decoder=SimpleNamespace(encode=lambda images: images)),
    )  # fmt: skip
    health.on_train_start(run, student)
    width = 2 * 2**0.5
    for name, ends in health.ranges.items():
        assert ends == pytest.approx(
            (-1 - width, 2 + width) if name == "latent_mean" else (2 - width, 5 + width)
        )
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in (7.8, 7.9, 9.0, 5.0, math.nan, -0.9):  # inside, outside, still, back, outside, still
            values["contrast"] = value
            health.on_train_batch_end(run, student)
            seen.append(len(health.alarms))
    assert seen == [0, 1, 1, 1, 2, 2]


class Drifting(StandIn):
    """From the second update on its pictures are all of one colour."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.student_steps == 2:
            draw = self.generator.images

            def images(*asked: Any) -> torch.Tensor:
                assert self.is_swapped, "of the average, not of the online weights"
                return 0 * draw(*asked)

            self.generator.images = images  # type: ignore[method-assign]
        return loss


@pytest.mark.parametrize("stop", [False, True])
def test_an_alarm_comes_once_and_may_end_the_run(
    stop: bool,
    tiny_sd: Path,
    tmp_path: Path,
    own_cache: Path,  # noqa: F811
) -> None:
    folder = tmp_path / "run" / "version_0"
    health = Health(num_images=4, every_n_steps=1, teacher_steps=2, stop=stop)
    run = trainer(folder, health, RunReport(), max_steps=4, limit_val_batches=0)
    module = Drifting(tiny_sd)
    with pytest.warns(UserWarning, match="ALARM at step 2: diversity 0 has left .* collapse"):
        run.fit(module, StandInData())
    assert module.student_steps == (2 if stop else 4)
    named = [alarm.split()[2] for alarm in health.alarms]
    assert "diversity" in named and len(named) == len(set(named))
    assert all(alarm.startswith("step 2: ") for alarm in health.alarms)
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    rows = [row for row in rows if row["health/alarms"]]
    assert [float(row["health/alarms"]) > 0 for row in rows] == [False, False, True, True, True][: len(rows)]
    low, high = (float(rows[-1][f"health/diversity/{end}"]) for end in ("low", "high"))
    assert low <= float(rows[0]["health/diversity/student"]) <= high
    assert json.loads((folder / "report.json").read_text())["run"]["alarms"] == health.alarms
    page = (folder / "report.html").read_text()
    assert "Alarm, step 2: " in page
    drawn = {one["layout"]["title"]["text"]: one["data"] for one in figures(page)}
    names = [trace["name"] for trace in drawn["health/diversity"]]
    assert names == ["health/diversity/student", "teacher's range, low", "teacher's range, high"]
    assert drawn["health/diversity"][1]["y"] == pytest.approx([low, low])
    again = Health(num_images=4)
    again.load_state_dict(health.state_dict())
    assert (again.ranges, again.outside, again.alarms) == (health.ranges, health.outside, health.alarms)


@pytest.mark.parametrize(("guidance", "is_raised"), [(4.0, False), (100.0, True)])
def test_a_guidance_scale_that_is_too_large(
    guidance: float, is_raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of four, by plain gradient steps: Adam and clipping divide the scale out."""
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    health = {"class_path": "callbacks.health.Health", "init_args": {"every_n_steps": 2, "teacher_steps": 8}}
    plain = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
    cli.main([
        "fit", "--config", "configs/base/emoji.yaml", f"--trainer.callbacks={json.dumps([health])}",
        f"--model.objective.guidance_scale={guidance}", "--model.objective.fake_guidance_scale=1",
        f"--model.student.optimizer={json.dumps(plain)}", "--model.student.warmup_steps=0",
        "--model.student.clip_norm=null", "--model.ema_decay=null", "--trainer.max_steps=4",
        "--data.batch_size=4", "--trainer.limit_val_batches=0", "--trainer.precision=32-true",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
    ])  # fmt: skip
    text = (tmp_path / "emoji" / "version_0" / "metrics.csv").read_text()
    alarms = [float(row["health/alarms"] or 0) for row in csv.DictReader(text.splitlines())]
    assert any(alarms) == is_raised


def test_bad_settings() -> None:
    for settings in ({"num_images": 3}, {"every_n_steps": 0}, {"tolerance": 0.0}):
        with pytest.raises(UserError, match="Health"):
            Health(**settings)  # type: ignore[arg-type]
