"""The pictures of `app`: a student's one step and its teacher's many, with their times."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from lightning_modules.drawing import OFF, Guidance, Model
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.student import LoadedStudent, load_student, student_path
from lightning_modules.pipelines import multistep_scheduler, stock_pipeline
from reports.sheets import to_pil

TEACHER_STEPS, TEACHER_GUIDANCE = 25, 4.5  # as in the reports


@dataclass(frozen=True)
class Picture:
    """A picture and the wall time it took, texts encoded and latents decoded."""

    image: Image.Image
    milliseconds: float


class SideBySide:
    """A student and its teacher, loaded once; one picture is drawn at a time, so that times mean something.

    Args:
        model: the student, a .ckpt file or a Stable Diffusion folder.
        teacher: a Stable Diffusion folder; None is the one that the student names.

    Raises:
        UserError: a model can't be loaded, or the student names no teacher.
    """

    def __init__(self, model: str, teacher: str | None = None) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        student = load_student(student_path(model))
        self._teacher = _teacher(model, student, teacher, device)
        self._student = Model(student, 1, device)
        self._guided = Guidance("cfg", TEACHER_GUIDANCE)
        self._lock = threading.Lock()
        self._last: tuple[tuple[str, str | None, int], Picture] | None = None
        # the first calls also set up kernels and memory
        self.student("", "", "none", 0.0, 0)
        self._teacher.draw([""], [0], self._guided)

    def default_scale(self, method: str) -> float:
        """Scale of NASA or NAG that suits the student; 0 without a method."""
        rule = _guidance(method).rule(self._student.network)
        return rule.scale if rule is not None else 0.0

    def student(self, prompt: str, negative: str, method: str, scale: float, seed: int | None) -> Picture:
        """One step; the negative prompt acts by `method` ("none", "nasa", "nag") with that scale.

        Raises:
            UserError: the seed or the scale is out of range.
        """
        guidance, number = _guidance(method, scale), _checked(seed)
        return self._timed(lambda: self._student.draw([prompt], [number], guidance, negative))

    def teacher(self, prompt: str, negative: str, method: str, seed: int | None) -> Picture:
        """The guided teacher; a negative prompt takes the place of the empty one, if there is a method.

        The last picture is kept, since the student's scale does not change it.

        Raises:
            UserError: the seed is out of range.
        """
        text = (negative.strip() or None) if _guidance(method) != OFF else None
        key = (prompt, text, _checked(seed))
        if self._last is None or self._last[0] != key:
            draw = self._teacher.draw
            self._last = key, self._timed(lambda: draw([prompt], [key[2]], self._guided, text))
        return self._last[1]

    def _timed(self, draw: Callable[[], Tensor]) -> Picture:
        with self._lock:
            start = time.perf_counter()
            pixels = draw().cpu()  # waits for the GPU
            return Picture(to_pil(pixels[0]), 1000 * (time.perf_counter() - start))


def _teacher(model: str, student: LoadedStudent, path: str | None, device: str) -> Model:
    """The teacher as a pipeline with DDIM sampling."""
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


def _checked(seed: int | None) -> int:
    if seed is None or not 0 <= seed < 2**63:
        raise UserError("The seed must be a whole number of at least 0 and below 2^63. Give e.g. 0.")
    return int(seed)
