"""The pictures of `app`: a student's one step and its teacher's many, with their times."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from common.errors import UserError
from lightning_modules.drawing import OFF, Guidance, Model
from lightning_modules.networks.cards import without_place
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.student import LoadedStudent, load_student, student_path
from lightning_modules.pipelines import multistep_scheduler, stock_pipeline
from reports.sheets import to_pil

LONGEST_PROMPT = 4000  # characters; encoders see some hundred, and longer ones would only keep others waiting
TEACHER_STEPS, TEACHER_GUIDANCE = 25, 4.5  # as in the reports


@dataclass(frozen=True)
class Picture:
    """A picture, or a sheet of several, and the wall time it took, texts encoded and latents decoded."""

    image: Image.Image
    milliseconds: float


class SideBySide:
    """A student and its teacher, loaded once; one picture is drawn at a time, so that times mean something.

    Args:
        model: the student, as all commands name it.
        teacher: a model's folder; None is the one that the student names.

    Raises:
        UserError: a model can't be loaded, or the student names no teacher.
    """

    def __init__(self, model: str, teacher: str | None = None) -> None:
        self._guided, self._lock = Guidance("cfg", TEACHER_GUIDANCE), threading.Lock()
        self._named_teacher = teacher
        self.choose(model)

    def choose(self, model: str) -> None:
        """Take another student, and its teacher; the former stay if they can't be loaded."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        student = load_student(path := student_path(model))
        drawing = _teacher(model, student, self._named_teacher, device)
        with self._lock:
            names = map(without_place, (path, self._named_teacher or student.facts["teacher"]))
            self.title = "**{}**, distilled from **{}**".format(*names)
            self._teacher, self._student = drawing, Model(student, None, device)
            self._last: tuple[tuple[Any, ...], Picture] | None = None
        # the first calls also set up kernels and memory
        self.student("", "", "none", 0.0, 0)
        self._teacher.draw([""], [0], self._guided)

    def default_scale(self, method: str) -> float:
        """Scale of NASA or NAG that suits the student; 0 without a method."""
        rule = _guidance(method).rule(self._student.network)
        return rule.scale if rule is not None else 0.0

    def student(
        self, prompt: str, negative: str, method: str, scale: float, seed: int | None, count: int = 1
    ) -> Picture:
        """In its own steps; the negative prompt acts by `method` ("none", "nasa", "nag") with that scale.

        Of `count` above 1 a sheet, from seeds that follow each other.

        Raises:
            UserError: the seed or the scale is out of range.
        """
        _check_length(prompt, negative)
        guidance, number = _guidance(method, scale), _checked(seed)
        seeds = list(range(number, number + count))
        return self._timed(lambda: self._student.draw([prompt] * count, seeds, guidance, negative))

    def teacher(self, prompt: str, negative: str, method: str, seed: int | None, count: int = 1) -> Picture:
        """The guided teacher; a negative prompt takes the place of the empty one, if there is a method.

        The last picture is kept, since the student's scale does not change it.

        Raises:
            UserError: the seed is out of range.
        """
        _check_length(prompt, negative)
        text = (negative.strip() or None) if _guidance(method) != OFF else None
        key = (prompt, text, number := _checked(seed), count)
        if self._last is None or self._last[0] != key:
            draw, seeds = self._teacher.draw, list(range(number, number + count))
            self._last = key, self._timed(lambda: draw([prompt] * count, seeds, self._guided, text))
        return self._last[1]

    def _timed(self, draw: Callable[[], Tensor]) -> Picture:
        with self._lock:
            start = time.perf_counter()
            pixels = draw().cpu()  # waits for the GPU
            seconds = time.perf_counter() - start
        sheet = pixels[0] if len(pixels) == 1 else make_grid(pixels, 2, padding=1, pad_value=1.0)
        return Picture(to_pil(sheet), 1000 * seconds)


def local_students(runs: str | Path = "runs") -> list[str]:
    """Run folders that hold a student, the newest first."""
    found = [path for path in Path(runs).glob("*/version_*/checkpoints") if any(path.glob("*.ckpt"))]
    return [str(path.parent) for path in sorted(found, key=lambda path: -path.stat().st_mtime)]


def _teacher(model: str, student: LoadedStudent, path: str | None, device: str) -> Model:
    """The teacher as a pipeline with DDIM sampling, or Euler's method on rectified flow."""
    named = path or student.facts.get("teacher")
    if not named:
        raise UserError(f"{model} does not say what its teacher is. Give --teacher FOLDER.")
    try:
        parts = load_parts(named)
    except UserError as error:
        hint = "" if path else f" It is the one that {model} names; --teacher gives another."
        raise UserError(f"The teacher can't be loaded: {error}{hint}") from error
    return Model(stock_pipeline(parts, multistep_scheduler(parts.scheduler)), TEACHER_STEPS, device)


def _guidance(method: Any, scale: float | None = None) -> Guidance:
    """By a method of the page; none if it is no method."""
    return Guidance(method, scale) if Guidance(method).by_attention else OFF


def _check_length(*texts: str) -> None:
    if any(len(text) > LONGEST_PROMPT for text in texts):  # of a call that doesn't come from the page
        raise UserError(f"A prompt is longer than {LONGEST_PROMPT:,} characters. Give a shorter one.")


def _checked(seed: int | None) -> int:
    if seed is None or not 0 <= seed < 2**63:
        raise UserError("The seed must be a whole number of at least 0 and below 2^63. Give e.g. 0.")
    return int(seed)
