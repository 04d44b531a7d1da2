"""Grids and score views: the right pictures in their places, at their steps, the teacher's made once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.metrics.teacher import Teacher
from callbacks.samples import SampleGrid, ScoreViews
from common.errors import UserError
from reports.sheets import labelled_grid, to_pil
from tests.callbacks.standin import CAPTIONS, StandIn, StandInData
from tests.callbacks.test_evaluation import own_cache, trainer  # noqa: F401 - a fixture


def holds(sheet: Image.Image, picture: Image.Image) -> bool:
    """Whether the picture is somewhere in the sheet, pixel for pixel."""
    big, small = np.asarray(sheet).astype(int), np.asarray(picture).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(big[..., 0], small.shape[:2])
    rows, columns = np.nonzero(windows[:, :, 0, 0] == small[0, 0, 0])
    height, width = small.shape[:2]
    places = zip(rows, columns, strict=True)
    return any((big[y : y + height, x : x + width] == small).all() for y, x in places)


def enlarged(image: torch.Tensor, size: int = 128) -> Image.Image:
    return to_pil(image).resize((size, size), Image.Resampling.NEAREST)


def test_grid_holds_every_picture_beside_its_prompt() -> None:
    generator = torch.Generator().manual_seed(0)
    views = {name: torch.rand(5, 3, 16, 16, generator=generator) for name in "ab"}
    prompts = ["short", "a very long prompt indeed, " * 12, "日本語 ümlaut", "", "x" * 200]
    sheet = labelled_grid(views, prompts, columns=2)
    for images in views.values():
        assert all(holds(sheet, enlarged(image)) for image in images)
    assert not holds(sheet, enlarged(torch.rand(3, 16, 16, generator=generator)))
    assert sheet.width == 2 * (2 * 128 + 4) + 3 * 14
    with pytest.raises(ValueError, match="for 4 prompts"):
        labelled_grid(views, prompts[:4])
    large = labelled_grid({"one": torch.rand(1, 3, 300, 200)}, ["x"])
    assert large.width == 200 + 2 * 14


def test_student_and_teacher_in_the_run(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = Teacher.multistep

    def multistep(self: Teacher, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        calls.append((prompts, seeds))
        return original(self, prompts, seeds)

    monkeypatch.setattr(Teacher, "multistep", multistep)
    board = TensorBoardLogger(str(tmp_path / "board"), name="", version="")
    module, grid = StandIn(tiny_sd), SampleGrid(num_images=2, seed=5, every_n_steps=2, teacher_steps=2)
    views = ScoreViews(prompts=["a cup"])
    run = trainer(tmp_path, grid, views, max_steps=5, logger=board, val_check_interval=4)
    run.fit(module, StandInData())
    samples = tmp_path / "board" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == sorted(
        [f"step_{n}.png" for n in (0, 2, 4, 5)] + [f"score_views_step_{n}.png" for n in (0, 4, 5)]
    )
    assert calls == [(CAPTIONS[:2], [5, 6])]
    with Image.open(samples / "step_4.png") as file:
        sheet = file.convert("RGB")
    student = module.generator.images(CAPTIONS[:2], [5, 6])
    teacher = original(Teacher(str(tiny_sd), steps=2), CAPTIONS[:2], [5, 6])
    assert all(holds(sheet, enlarged(image)) for image in (*student, *teacher))
    with Image.open(samples / "score_views_step_5.png") as file:
        sheet = file.convert("RGB")
    assert all(holds(sheet, enlarged(images[0])) for images in module.score_views(["a cup"], [0]).values())
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [0, 2, 4, 5]
    assert [event.step for event in events.Images("score_views")] == [0, 4, 5]
    # Another run of the same teacher takes its pictures from the cache.
    other = trainer(tmp_path / "other", SampleGrid(num_images=2, seed=5, teacher_steps=2), max_steps=1)
    other.fit(StandIn(tiny_sd), StandInData())
    assert len(calls) == 1
    with Image.open(tmp_path / "other" / "samples" / "step_1.png") as file:
        assert all(holds(file.convert("RGB"), enlarged(image)) for image in teacher)


def test_modes_are_left_as_they_were(tiny_sd: Path, tmp_path: Path) -> None:
    class Watching(StandIn):
        def training_step(self, batch: dict[str, object], batch_idx: int) -> torch.Tensor:
            assert self.training and torch.is_grad_enabled()
            return super().training_step(batch, batch_idx)

    module = Watching(tiny_sd)
    module.train()
    run = trainer(tmp_path, SampleGrid(num_images=1, every_n_steps=1, teacher_steps=2), max_steps=3)
    run.fit(module, StandInData())
    assert module.training and not module.generator.decoder.training


def test_bad_settings_are_named() -> None:
    for settings in ({"num_images": 0}, {"every_n_steps": 0}, {"prompts": []}):
        with pytest.raises(UserError, match="SampleGrid"):
            SampleGrid(**settings)  # type: ignore[arg-type]
