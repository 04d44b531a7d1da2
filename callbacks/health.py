"""Whether the student's pictures keep within what its teacher draws, looked at between validations."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from callbacks.evaluated import as_student, evaluating, evaluation_captions
from callbacks.logging_media import Table, log_media
from callbacks.samples import teacher_pictures
from common.errors import UserError
from common.processes import from_rank_zero, say

SIGNS = {
    "saturation": ("pale colours", "glaring colours, as of a guidance scale that is too large"),
    "contrast": ("flat pictures", "hard contrasts, as of a guidance scale that is too large"),
    "latent_mean": ("a shift of the latents", "a shift of the latents"),
    "latent_std": ("latents that shrink: blurred pictures", "latents that grow: noise or glaring colours"),
    "diversity": ("pictures that become alike: collapse", "pictures further apart than the teacher's: noise"),
}
"""What is looked at, and what it means to be below and above the teacher's range."""
_SIDE = 16
"""Pictures are compared with each other at this size, where noise doesn't count."""


class Health(Callback):
    """Logs five numbers of a few of the student's pictures, and raises an alarm where one leaves its range.

    ``health/NAME/student`` beside ``health/NAME/low`` and ``/high``, the teacher's range: from the mean over
    its pictures of the same prompts and seeds to where the student starts from, and ``tolerance`` times the
    deviation of its pictures beyond both. (The mean of eight pictures varies by a third of that deviation.)
    An alarm is a warning, ``health/alarms`` (how many numbers are outside) and a table in the loggers, and
    stands in the report; it comes once for each number until that is back.

    Args:
        num_images: pictures; more of them than evaluation captions are drawn from further seeds. The
            teacher's of as many as SampleGrid has are SampleGrid's.
        every_n_steps: student updates between two looks.
        tolerance: width of the range.
        stop: end the training at an alarm, with checkpoint and report.
        seed: picture i is drawn from seed ``seed + i``.
        teacher_steps, teacher_guidance: of the teacher's pictures, which are made once and cached.
    """

    def __init__(
        self,
        num_images: int = 8,
        every_n_steps: int = 500,
        tolerance: float = 1.0,
        stop: bool = False,
        seed: int = 0,
        teacher_steps: int = 25,
        teacher_guidance: float = 4.5,
    ) -> None:
        if num_images < 4 or every_n_steps < 1 or tolerance <= 0:
            raise UserError(
                f"Health: num_images is {num_images} (at least 4), every_n_steps {every_n_steps} (at least "
                f"1), tolerance {tolerance} (above 0)"
            )
        self.num_images, self.every_n_steps, self.tolerance = num_images, every_n_steps, tolerance
        self.stop, self.seed = stop, seed
        self.teacher_steps, self.teacher_guidance = teacher_steps, teacher_guidance
        self.ranges: dict[str, tuple[float, float]] = {}
        self.outside: set[str] = set()
        self.alarms: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the range, unless the run continues with one."""
        if self.ranges or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        student = as_student(pl_module)
        prompts, seeds = self._asked(trainer)
        with evaluating(trainer, pl_module):
            pictures = teacher_pictures(
                trainer, student.parts.path, prompts, seeds, self.teacher_steps, self.teacher_guidance
            )
            latents = student.generator.decoder.encode(pictures.to(trainer.strategy.root_device))
        found = measures(pictures, latents)
        start = self._student_values(trainer, pl_module)
        for name, values in found.items():
            ends, width = (float(values.mean()), start[name]), self.tolerance * float(values.std())
            self.ranges[name] = (min(ends) - width, max(ends) + width)
        self._log(trainer, student.student_steps, start)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look, log and raise the alarm."""
        step = as_student(pl_module).student_steps
        if not self.ranges or step % self.every_n_steps:
            return
        values = self._student_values(trainer, pl_module)
        self._log(trainer, step, values)
        outside = {
            name
            for name, (low, high) in self.ranges.items()
            if not low <= values[name] <= high  # NaN too
        }
        for name in [name for name in SIGNS if name in outside - self.outside]:
            self._raise_alarm(trainer, step, name, values[name])
        self.outside = outside
        if outside and self.stop and not trainer.should_stop:
            say(f"Health.stop is true: the training ends at step {step:,}")
            trainer.should_stop = True

    def _raise_alarm(self, trainer: Trainer, step: int, name: str, value: float) -> None:
        low, high = self.ranges[name]
        sign = SIGNS[name][0 if value < low else 1]
        text = f"{name} {value:.3g} has left the teacher's range, {low:.3g} to {high:.3g}: {sign}"
        self.alarms.append(f"step {step:,}: {text}")
        rank_zero_warn(f"ALARM at step {step:,}: {text}")
        if trainer.is_global_zero:
            rows = [alarm.split(": ", 1) for alarm in self.alarms]
            for logger in trainer.loggers:
                log_media(logger, "health/alarm", Table(["at", "what"], rows), step)

    def _log(self, trainer: Trainer, step: int, values: dict[str, float]) -> None:
        outside = [name for name, (low, high) in self.ranges.items() if not low <= values[name] <= high]
        logged = {"health/alarms": float(len(outside))}
        for name, (low, high) in self.ranges.items():
            logged |= {f"health/{name}/student": values[name], f"health/{name}/low": low,
                       f"health/{name}/high": high}  # fmt: skip
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)

    def _asked(self, trainer: Trainer) -> tuple[list[str], list[int]]:
        captions = evaluation_captions(trainer)
        prompts = [captions[i % len(captions)] for i in range(self.num_images)]
        return prompts, [self.seed + i for i in range(self.num_images)]

    def _student_values(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """The means over the student's pictures. All processes draw, rank zero's numbers count."""
        student = as_student(module)
        with evaluating(trainer, module):
            images = student.generator.images(*self._asked(trainer))
            found = measures(images.cpu(), student.generator.decoder.encode(images))
        values: dict[str, float] = from_rank_zero({name: float(each.mean()) for name, each in found.items()})
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return range and alarms."""
        return {"ranges": self.ranges, "outside": sorted(self.outside), "alarms": self.alarms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the range: the student of a run that continues isn't where it started from."""
        self.ranges = {name: tuple(ends) for name, ends in state_dict["ranges"].items()}
        self.outside, self.alarms = set(state_dict["outside"]), state_dict["alarms"]


def measures(images: Tensor, latents: Tensor) -> dict[str, Tensor]:
    """Five numbers of each picture, [B].

    Args:
        images: [B, 3, H, W] in [0, 1]; ``latents``: theirs [B, C, h, w], as the autoencoder gives them.

    Returns:
        ``saturation``, the mean over the pixels of max(R, G, B) − min(R, G, B), in [0, 1]; ``contrast``, the
        deviation of the luma 0.299 R + 0.587 G + 0.114 B; ``latent_mean``, ``latent_std``; ``diversity``, the
        mean distance (root mean square over 16 × 16 averaged pixels) from the other pictures.
    """
    images, latents = images.float(), latents.float().flatten(1).cpu()
    luma = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    small = F.adaptive_avg_pool2d(images, _SIDE).flatten(1)
    distances = torch.cdist(small, small) / small.shape[1] ** 0.5
    return {
        "saturation": (images.amax(1) - images.amin(1)).mean((1, 2)),
        "contrast": luma.flatten(1).std(1),
        "latent_mean": latents.mean(1),
        "latent_std": latents.std(1),
        "diversity": distances.sum(1) / (len(images) - 1),
    }
