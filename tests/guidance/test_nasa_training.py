"""A student turn of NASA-T: NASA in the student's forward pass, negatives in the teacher's guidance."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.generator import make_generator
from lightning_modules.guidance import negative_attention
from lightning_modules.guidance.methods import Nasa
from lightning_modules.guidance.scales import UniformGuidance
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.lora import LoraSettings
from lightning_modules.networks.roles import ScoreModels
from lightning_modules.objectives.base import StudentSample
from lightning_modules.objectives.swiftbrush import SwiftBrush
from tests.guidance import reference

PROMPTS, NEGATIVES = ["a red cat", "a dog"], ["dog", "red"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_student_turn_with_negative_prompts(tiny_sd: Path, checkpointing: bool) -> None:
    parts = load_parts(tiny_sd)
    student = copy.deepcopy(parts.denoiser).requires_grad_(True).train()
    generator = make_generator(parts, 625, student)
    scores = ScoreModels(parts.denoiser, generator.schedule, LoraSettings(rank=2))
    objective = SwiftBrush(
        UniformGuidance(0.5, 4), teacher_negatives=True, student_negatives=UniformGuidance(0, 1)
    )
    random = StepRandom(0, 3, torch.arange(2))
    condition = generator.prompt_encoder.encode(PROMPTS)
    negative = generator.prompt_encoder.encode(NEGATIVES)
    alpha = objective.student_negative_scale(random)
    assert alpha is not None
    noise = random.normal("start", generator.latent_shape)

    def gradients(x0: Tensor) -> list[Tensor]:
        terms = objective.student_loss(StudentSample(x0, condition, negative), scores, random)
        found = torch.autograd.grad(terms.losses["vsd"], list(student.parameters()))
        return [gradient.clone() for gradient in found]

    given = {"sample": noise, "timestep": torch.tensor([625, 625]), **condition.tensors}
    text = negative.tensors["encoder_hidden_states"]
    output = reference.cross_attention_network(student, given, text, None, Nasa(alpha))
    expected = generator.schedule.read(output, noise, given["timestep"]).x0
    wanted = gradients(expected)
    if checkpointing:
        student.enable_gradient_checkpointing()
    with negative_attention(student, negative, Nasa(alpha)):
        x0 = generator.latents(noise, condition)
        found = gradients(x0)
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)
    assert (x0 - generator.latents(noise, condition)).abs().max() > 0.01
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in scores.parameters())
