"""The number of steps as a condition (TDM-unify): the start, gradients, training, exports."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import cli
from common.errors import UserError
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.steps import Steps, step_facts, steps_of
from lightning_modules.generator import load_generator, make_generator
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.step_counts import add_step_counts, folded, tell
from lightning_modules.networks.student import load_student
from lightning_modules.objectives.base import Networks, StudentSample, Terms
from lightning_modules.objectives.tdm import TDM
from tests.test_distributed import sgd
from tests.test_turns import check_resume
from tests.tiny_distillation import PROMPTS, distillation, fit, snapshot, write_config

STEPS = Steps((625, 469, 312, 156), "none", (1, 2, 4))
SETTINGS: dict[str, Any] = {
    "timesteps": list(STEPS.timesteps), "step_noise": "none", "step_counts": [1, 2, 4], "lora": None,
}  # fmt: skip


def vectors(network: nn.Module) -> nn.Parameter:
    """Those of all numbers of steps, [numbers, D]."""
    (found,) = (p for name, p in network.named_parameters() if name.endswith("linear_2.by_count"))
    return found


def told(network: nn.Module) -> int:
    """The number that the network was told last."""
    (layer,) = (part for part in network.modules() if hasattr(part, "by_count"))
    return layer.counts[layer.row]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart", "sd3"])
def test_it_begins_as_the_network_without_and_folds_into_a_stock_one(
    backbone_folder: Callable[[str], Path], family: str
) -> None:
    parts = load_parts(backbone_folder(family))
    steps = Steps((999, 749, 499, 249), "none", (1, 2, 4))
    stock, counted = parts.denoiser, copy.deepcopy(parts.denoiser)
    add_step_counts(counted, steps.counts)
    plain = make_generator(parts, Steps(steps.timesteps, "none"))
    generator = make_generator(parts, steps, counted)
    draw = partial(generator.images, PROMPTS[:2], [5, 6])
    assert torch.equal(draw(), plain.images(PROMPTS[:2], [5, 6]))
    with torch.no_grad():
        vectors(counted).normal_(generator=torch.Generator().manual_seed(0))
    assert (draw() - plain.images(PROMPTS[:2], [5, 6])).abs().max() > 1e-3
    for count in (2, 4):
        alone = folded(counted, count)
        assert alone.state_dict().keys() == stock.state_dict().keys()
        one = make_generator(parts, Steps(steps.timesteps, "none").fewer(count), alone)
        with generator.taking(count):
            torch.testing.assert_close(draw(), one.images(PROMPTS[:2], [5, 6]), rtol=0, atol=1e-5)
    assert folded(stock, 2) is stock


def test_the_gradient_reaches_the_vector_of_the_told_number(tiny_sd: Path) -> None:
    """It is that of the bias of the layer that it is added to."""
    network = load_parts(tiny_sd).denoiser.requires_grad_(True)
    add_step_counts(network, (1, 2, 4))
    tell(network, 2)
    text = torch.randn(3, 5, network.config.cross_attention_dim)
    network(torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 900]), text)[0].square().mean().backward()
    gradient = vectors(network).grad
    assert torch.equal(gradient[1], network.time_embedding.linear_2.bias.grad) and gradient[1].abs().max() > 0
    assert not gradient[[0, 2]].any()


class Watching(TDM):
    """Keeps the student's samples, and what each network knew of them in either turn."""

    def loss(self, role: str, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        known = [told(net.network) for net in (self.student_, self.fake_)]
        self.__dict__.setdefault("seen", []).append((role, sample, known))
        return super().loss(role, sample, networks, random)


class Held:
    """Keeps a network out of the objective's own modules."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network


def test_student_and_fake_score_are_told_and_the_rollout_is_that_of_the_number(
    tiny_sd: Path, tmp_path: Path
) -> None:
    module = distillation(tiny_sd, Watching(4.0), **SETTINGS | {"ema_decay": None, "student": sgd(0.0)})
    module.configure_model()
    module.objective.student_, module.objective.fake_ = Held(module.student), Held(module.scores.full_copy)
    with torch.no_grad():  # so that the number matters
        vectors(module.student).normal_(generator=torch.Generator().manual_seed(0))
    before = snapshot(module)
    fit(module, tmp_path, 8)
    seen = module.objective.seen
    assert {sample.told for _, sample, _ in seen} == {1, 2, 4}  # which, follows from the seed
    assert all(known == [sample.told] * 2 for _, sample, known in seen)
    (name,) = (name for name in before if name.startswith("scores") and name.endswith("by_count"))
    assert (module.get_parameter(name) - before[name]).abs().sum(1).min() > 0
    for step, (role, sample, _) in enumerate(seen[1::2]):
        steps = STEPS.fewer(sample.told)
        assert role == "student" and sample.t.tolist() == [steps.timesteps[sample.k]] * 4
        x_t = start = StepRandom(module.seed, step, torch.arange(4)).normal("start", (4, 8, 8))
        tell(module.student, sample.told)
        with torch.no_grad():
            for k in range(sample.k):
                said = module.networks.student(x_t, steps.at(k, start), sample.condition)
                x_t = steps.next_input(k, said, module.networks.schedule, start)
        torch.testing.assert_close(sample.x_t, x_t, rtol=1e-4, atol=1e-4)


def test_intervals_follow_the_number_of_steps(tiny_sd: Path) -> None:
    module = distillation(tiny_sd, TDM(4.0), **SETTINGS)
    module.configure_model()
    spans = {n: [(r.low, r.high) for r in ranges] for n, ranges in module.objective.ranges.items()}
    assert spans == {
        0: spans[4], 1: [(20, 615)], 2: [(312, 615), (20, 302)],
        4: [(469, 615), (312, 459), (156, 302), (20, 146)],
    }  # fmt: skip


def test_resume_takes_the_same_numbers(tiny_sd: Path, tmp_path: Path) -> None:
    names = check_resume(tiny_sd, tmp_path, TDM, **SETTINGS)
    assert sum(name.endswith("by_count") for name in names) == 2


def test_from_the_command_line_to_stock_pipelines(tiny_sd: Path, tmp_path: Path) -> None:
    """A run knows its numbers; an export is for one of them, and another training starts from the largest."""
    config = write_config(
        tmp_path / "c.yaml", tiny_sd, model__init_args__timesteps=[999, 749, 499, 249],
        model__init_args__step_noise="none", model__init_args__step_counts=[1, 2, 4],
        model__init_args__objective={"class_path": "lightning_modules.objectives.tdm.TDM"},
        model__init_args__fake_score={
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}, "lora": None
        },
    )  # fmt: skip
    cli.main(["fit", "--config", str(config), "--experiment", "told"])
    last = str(tmp_path / "runs" / "told" / "version_0" / "checkpoints" / "last.ckpt")
    student, ours = load_student(last), load_generator(last)
    assert student.steps == Steps((999, 749, 499, 249), "none", (1, 2, 4))
    assert vectors(student.parts.denoiser).abs().max() > 0
    for words, count in (([], 4), (["--steps", "2"], 2)):
        folder = tmp_path / f"in-{count}"
        cli.main(["export", "--checkpoint", last, "--output", str(folder), *words])
        pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
        stock: Tensor = pipeline(
            PROMPTS[:1], generator=[torch.Generator().manual_seed(3)], num_inference_steps=count,
            guidance_scale=1.0, output_type="pt",
        ).images  # fmt: skip
        with ours.taking(count):
            torch.testing.assert_close(ours.images(PROMPTS[:1], [3]), stock, rtol=0, atol=1e-4)
        assert load_student(folder).steps == student.steps.fewer(count)
    begun = distillation(tiny_sd, start_timestep=999, student_init=last)
    begun.configure_model()
    bias = begun.student.get_parameter("time_embedding.linear_2.bias")
    whole = folded(student.parts.denoiser, 4).get_parameter("time_embedding.linear_2.bias")
    assert torch.equal(bias, whole)


def test_what_does_not_fit_is_refused(tiny_sd: Path) -> None:
    assert steps_of(step_facts(STEPS)) == STEPS
    with pytest.raises(UserError, match="trained for 1, 2, 4 steps, not for 3"):
        STEPS.fewer(3)
    for wrong in ((1, 2), (2, 1, 4), (0, 4)):
        with pytest.raises(UserError, match="from the smallest up to all 4 of timesteps"):
            Steps(STEPS.timesteps, "none", wrong)
    network = load_parts(tiny_sd).denoiser
    with pytest.raises(UserError, match="no one embedding of the timestep"):
        add_step_counts(nn.Linear(1, 1), (1, 2))
    add_step_counts(network, (1, 2, 4))
    with pytest.raises(UserError, match="trained for 1, 2, 4 steps, not for 3"):
        tell(network, 3)
    settings = {name: value for name, value in SETTINGS.items() if name != "lora"}
    with pytest.raises(UserError, match="fake_score.lora and student_lora to null"):
        distillation(tiny_sd, **settings).configure_model()
