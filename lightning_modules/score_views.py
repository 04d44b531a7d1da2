"""Pictures of what student, teacher and fake score each make of the same samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_modules.diffusion.randomness import seeded_noise

if TYPE_CHECKING:
    from lightning_modules.distillation import OneStepDistillation


@torch.no_grad()
def score_views(
    module: OneStepDistillation, prompts: list[str], seeds: list[int], at: float
) -> dict[str, Tensor]:
    """Pictures [B, 3, H, W] in [0, 1] of what each role sees as x0: the student's sample, and what teacher
    and fake score, unguided, make of it when noised to ``at`` times the schedule's length."""
    schedule, condition = module.scores.schedule, module.generator.prompt_encoder.encode(prompts)
    with module.evaluation_weights():
        x0 = module.generator.latents(module.generator.noise(seeds), condition)
    t = torch.full((len(x0),), int(at * schedule.num_timesteps), device=x0.device)
    noise = seeded_noise([seed + 1_000_000 for seed in seeds], x0.shape[1:], x0.device)
    x_t = schedule.add_noise(x0, noise, t)
    views = {
        "student": x0,
        "teacher x0": module.scores.teacher(x_t, t, condition).x0,
        "fake score x0": module.scores.fake_score(x_t, t, condition).x0,
    }
    return {name: module.generator.decoder.decode(latents) for name, latents in views.items()}
