"""The teacher's two rows in every report: many guided steps, and one step as the student takes it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.measure import Generate, Results, measure_set, results_of
from callbacks.metrics.result_cache import ResultCache
from common.hashing import hash_texts
from common.processes import from_rank_zero, rank_and_world_size
from datamodules.evaluation_sets import EvaluationSet
from lightning_modules.generator import OneStepGenerator, make_generator
from lightning_modules.networks.loading import (
    TextToImageParts,
    is_flow,
    load_parts,
    load_scheduler,
    model_hash,
    noise_schedule,
)
from lightning_modules.pipelines import multistep_images

PROTOCOL = 1
"""Raised when the way the teacher's pictures are drawn changes, so that cached rows are made again."""


class Teacher:
    """An untouched copy of the teacher, read from its folder when first needed and dropped by ``release``.

    Args:
        path: a diffusers folder.
        device: where to run it.
        steps: of the first row, by DDIM, or Euler's method on rectified flow.
        guidance_scale: of the first row.
    """

    def __init__(
        self, path: str, device: torch.device | str = "cpu", steps: int = 25, guidance_scale: float = 4.5
    ) -> None:
        self.path, self.device = path, torch.device(device)
        self.steps, self.guidance_scale = steps, guidance_scale
        self._parts: TextToImageParts | None = None
        self._one_step: OneStepGenerator | None = None

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the folder's weights and settings, and of the variant."""
        return model_hash(self.path)

    @property
    def rows(self) -> dict[str, tuple[Generate, dict[str, Any]]]:
        """Name of each row, how its pictures are drawn, and the settings that belong in cache keys."""
        sampler = "euler" if is_flow(load_scheduler(self.path)) else "ddim"
        guided = {"sampler": sampler, "steps": self.steps, "guidance_scale": self.guidance_scale}
        single = {"sampler": "one_step", "steps": 1, "guidance_scale": 1.0, "start_timestep": "last"}
        return {f"steps_{self.steps}": (self.multistep, guided), "steps_1": (self.one_step, single)}

    def multistep(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Guided pictures of many steps [B, 3, H, W] in [0, 1]."""
        return multistep_images(
            self.parts, prompts, seeds, steps=self.steps, guidance_scale=self.guidance_scale
        )

    def one_step(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """One step from the last timestep without guidance, by the student's own conversion to x0."""
        if self._one_step is None:
            parts = self.parts
            schedule = noise_schedule(parts.scheduler, parts.image_tokens, parts.backbone)
            self._one_step = make_generator(parts, schedule.num_timesteps - 1).to(self.device).eval()
        return self._one_step.images(prompts, seeds)

    @property
    def parts(self) -> TextToImageParts:
        """The networks, on the device."""
        if self._parts is None:
            self._parts = load_parts(self.path)
            for network in self._parts.networks:
                network.to(self.device).requires_grad_(False)
        return self._parts

    def release(self) -> None:
        """Give the memory back."""
        self._parts = self._one_step = None


def teacher_metrics(
    teacher: Teacher,
    drawn: EvaluationSet,
    metrics: Sequence[ImageMetric],
    batch_size: int,
    cache: ResultCache,
    precision: str = "32-true",
) -> dict[str, Results]:
    """Both rows ``{"steps_25": {name: result}, "steps_1": {...}}``, cached or measured now. Collective.

    A value is found again only if teacher, captions, seeds, sampler, precision, metric and everything the
    metric depends on are the same, by content.
    """
    told = {
        "groups": drawn.groups and hash_texts(drawn.groups),
        "negatives": drawn.negatives and hash_texts(drawn.negatives),
        "frame": drawn.frame and drawn.frame.describe(),
    }
    common = {
        "teacher": teacher.content_hash,
        "captions": hash_texts(drawn.captions),
        "seeds": hash_texts([str(seed) for seed in drawn.seeds]),
        "precision": precision,
        "protocol": PROTOCOL,
    } | {name: value for name, value in told.items() if value is not None}
    rows, rank = {}, rank_and_world_size()[0]
    for row, (generate, settings) in teacher.rows.items():
        keys = {metric.name: settings | common | metric.key() for metric in metrics}
        # Rank zero decides what is cached: a process that saw other files would wait for the others for ever.
        results = from_rank_zero(_cached(cache, row, keys) if rank == 0 else None)
        missing = [metric for metric in metrics if metric.name not in results]
        if missing:
            label = "teacher, 1 step" if row == "steps_1" else f"teacher, {teacher.steps} steps"
            fresh = measure_set(generate, drawn, missing, batch_size, label)
            for metric in missing if rank == 0 else ():
                # one entry for a metric: its own result, and in it those of its parts (hpsv2/anime)
                parts = results_of(metric.name, fresh)
                entry = parts.pop(metric.name) | ({"parts": parts} if parts else {})
                cache.put(f"teacher-{row}-{metric.name}", keys[metric.name], entry)
            results = results | fresh
        rows[row] = {k: v for metric in metrics for k, v in results_of(metric.name, results).items()}
    return rows


def _cached(cache: ResultCache, row: str, keys: Mapping[str, Mapping[str, Any]]) -> Results:
    found: Results = {}
    for name, key in keys.items():
        entry = cache.get(f"teacher-{row}-{name}", key)
        if entry is not None:
            result = dict(entry.value)
            found |= {name: result, **result.pop("parts", {})}
    return found
