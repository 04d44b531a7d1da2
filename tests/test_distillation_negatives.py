"""NASA-T in the distillation module: who gets the negative prompts of a batch."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from common.errors import UserError
from datamodules.prompts import PromptDataModule
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.guidance import negative_attention
from lightning_modules.guidance.methods import Nasa
from lightning_modules.guidance.scales import UniformGuidance
from lightning_modules.objectives.base import Networks, StudentSample, Terms
from lightning_modules.objectives.swiftbrush import SwiftBrush
from tests.tiny_distillation import PROMPTS, changed, distillation, fit, snapshot, trainer

NEGATIVES = ["blurry", "a red cat", "green"]


class Watch(SwiftBrush):
    """NASA-T that keeps the samples of both turns."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(teacher_negatives=True, student_negatives=UniformGuidance(0, 1), **settings)
        self.seen: list[StudentSample] = []

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        self.seen.append(sample)
        return super().student_loss(sample, networks, random)

    def fake_score_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        self.seen.append(sample)
        return super().fake_score_loss(sample, networks, random)


def data(**settings: Any) -> PromptDataModule:
    return PromptDataModule(
        PROMPTS, batch_size=4, eval_captions=PROMPTS, eval_size=2, negative_prompts=NEGATIVES, **settings
    )


def test_the_student_draws_with_the_negative_prompts_of_its_batch(tiny_sd: Path, tmp_path: Path) -> None:
    """Both turns get the latents of NASA at this step's alpha, part by part, and the encoded negatives."""
    objective = Watch()
    module = distillation(tiny_sd, objective)
    L.seed_everything(0, verbose=False)
    trainer(tmp_path, 1).fit(module, data(micro_batch_size=2))
    batch = next(iter(data().train_dataloader()))
    fresh = distillation(tiny_sd)
    fresh.configure_model()
    encode = fresh.generator.prompt_encoder.encode
    condition, negative = encode(batch["prompts"]), encode(batch["negative_prompts"])
    random = StepRandom(0, 0, torch.arange(4))
    alpha = objective.student_negative_scale(random)
    assert alpha is not None and 0 < alpha < 1 and fresh.student is not None
    noise = random.normal("start", fresh.generator.latent_shape)
    with torch.no_grad(), negative_attention(fresh.student, negative, Nasa(alpha)):
        expected = fresh.generator.latents(noise, condition)
    plain = fresh.generator.latents(noise, condition)
    turns = objective.seen
    assert [len(sample.x0) for sample in turns] == [2, 2, 2, 2]
    for first, second in (turns[:2], turns[2:]):
        drawn = torch.cat([first.x0, second.x0]).detach()
        # float32: parts of two sum in another order than four
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
        texts = [sample.negative.tensors["encoder_hidden_states"] for sample in (first, second)]  # type: ignore[union-attr]
        torch.testing.assert_close(torch.cat(texts), negative.tensors["encoder_hidden_states"])
    assert (expected - plain).abs().max() > 1e-2


def test_the_steps_before_go_away_from_the_negative_prompts_too(tiny_sd: Path) -> None:
    """What the drawn step is given is what NASA at the same alpha makes of the noise."""
    module = distillation(tiny_sd, timesteps=[625, 300], step_noise="none")
    module.configure_model()
    encode, random = module.generator.prompt_encoder.encode, StepRandom(0, 0, torch.arange(2))
    while (at := module._sampler.arrive(encode(PROMPTS[:2]), random)).k == 0:
        random = StepRandom(0, random.step + 1, torch.arange(2))
    condition, negative = encode(PROMPTS[:2]), encode(NEGATIVES[:2])
    start = random.normal("start", module.generator.latent_shape)
    with torch.no_grad(), negative_attention(module.student, negative, Nasa(0.8)):
        said = module.networks.student(start, module.steps.at(0, start), condition)
    expected = module.steps.next_input(0, said, module.networks.schedule, start)
    found = module._sampler.arrive(condition, random, negative, 0.8)
    torch.testing.assert_close(found.x_t, expected, rtol=1e-4, atol=1e-4)
    assert found.k == 1 and (found.x_t - at.x_t).abs().max() > 1e-2


def test_gradient_checkpointing_changes_nothing(tiny_sd: Path, tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        module = distillation(tiny_sd, Watch(), gradient_checkpointing=checkpointing)
        L.seed_everything(0, verbose=False)
        trainer(tmp_path, 2).fit(module, data())
        states.append(snapshot(module.student))  # type: ignore[arg-type]
    assert not changed(*states)


def test_without_negative_prompts_in_the_data_it_says_what_to_set(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.negative_prompts"):
        fit(distillation(tiny_sd, Watch()), tmp_path, 1)


def test_a_file_of_empty_negative_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "negatives.txt"
    path.write_text("\n  \n\t\n")
    with pytest.raises(UserError, match=r"negatives\.txt.*(empty|no prompt)"):
        PromptDataModule(PROMPTS, batch_size=4, eval_captions=PROMPTS, negative_prompts=str(path))
