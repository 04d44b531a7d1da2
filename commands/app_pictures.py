"""The pictures of `app`: a student's one step and its teacher's many, with their times."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from commands.generate import has_few_step_sampler, to_pillow
from common.errors import UserError
from lightning_modules.generator import ddim_scheduler, make_generator, pipeline_images, stock_pipeline
from lightning_modules.guidance.methods import METHODS, Method, make_method
from lightning_modules.guidance.prompting import negative_prompting
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.student import LoadedStudent, load_student, student_path

TEACHER_STEPS, TEACHER_GUIDANCE = 25, 4.5  # as in the reports

# prompt, seed, negative prompt or None, how it acts -> picture [1, 3, H, W] in [0, 1]
OneStep = Callable[[str, int, str | None, Method | None], Tensor]


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
        self._pipeline = _teacher(model, student, teacher).to(device)
        self._one_step, self._network = _one_step(student, device)
        self._lock = threading.Lock()
        self._last: tuple[tuple[str, str | None, int], Picture] | None = None
        # the first calls also set up kernels and memory
        self.student("", "", "none", 0.0, 0)
        pipeline_images(self._pipeline, [""], [0], 1, TEACHER_GUIDANCE)

    def default_scale(self, method: str) -> float:
        """Scale of NASA or NAG that suits the student; 0 without a method."""
        return make_method(method, self._network).scale if method in METHODS else 0.0

    def student(self, prompt: str, negative: str, method: str, scale: float, seed: int | None) -> Picture:
        """One step; the negative prompt acts by `method` ("none", "nasa", "nag") with that scale.

        Raises:
            UserError: the seed or the scale is out of range.
        """
        rule = make_method(method, self._network, scale) if method in METHODS else None
        text = (negative.strip() or None) if rule else None
        return self._timed(lambda: self._one_step(prompt, _checked(seed), text, rule))

    def teacher(self, prompt: str, negative: str, method: str, seed: int | None) -> Picture:
        """The guided teacher; a negative prompt takes the place of the empty one, if there is a method.

        The last picture is kept, since the student's scale does not change it.

        Raises:
            UserError: the seed is out of range.
        """
        text = (negative.strip() or None) if method in METHODS else None
        key = (prompt, text, _checked(seed))
        if self._last is None or self._last[0] != key:
            picture = self._timed(lambda: pipeline_images(
                self._pipeline, [prompt], [key[2]], TEACHER_STEPS, TEACHER_GUIDANCE, negative_prompt=text
            ))  # fmt: skip
            self._last = key, picture
        return self._last[1]

    def _timed(self, draw: Callable[[], Tensor]) -> Picture:
        with self._lock:
            start = time.perf_counter()
            pixels = draw().cpu()  # waits for the GPU
            return Picture(to_pillow(pixels[0]), 1000 * (time.perf_counter() - start))


def _teacher(model: str, student: LoadedStudent, path: str | None) -> DiffusionPipeline:
    """The teacher as a pipeline with DDIM sampling."""
    named = path or student.facts.get("teacher")
    if not named:
        raise UserError(f"{model} does not say what its teacher is. Give --teacher FOLDER.")
    try:
        parts = load_parts(named)
    except UserError as error:
        hint = "" if path else f" It is the one that {model} names; --teacher gives another."
        raise UserError(f"The teacher can't be loaded: {error}{hint}") from error
    return stock_pipeline(parts, ddim_scheduler(parts.scheduler))


def _one_step(student: LoadedStudent, device: str) -> tuple[OneStep, nn.Module]:
    """How the student draws, as `generate` does, and its network."""
    if has_few_step_sampler(student.parts.scheduler):
        pipeline = stock_pipeline(student.parts).to(device)

        def by_pipeline(prompt: str, seed: int, negative: str | None, rule: Method | None) -> Tensor:
            if negative is None or rule is None:
                return pipeline_images(pipeline, [prompt], [seed], 1, 1.0)
            with negative_prompting(pipeline, negative, type(rule).__name__.lower(), rule.scale):
                return pipeline_images(pipeline, [prompt], [seed], 1, 1.0)

        return by_pipeline, student.parts.denoiser
    generator = make_generator(student.parts, student.start_timestep).eval().to(device)

    def by_generator(prompt: str, seed: int, negative: str | None, rule: Method | None) -> Tensor:
        return generator.images([prompt], [seed], negative_prompt=negative, negative_method=rule)

    return by_generator, generator.student


def _checked(seed: int | None) -> int:
    if seed is None or not 0 <= seed < 2**63:
        raise UserError("The seed must be a whole number of at least 0 and below 2^63. Give e.g. 0.")
    return int(seed)
