"""Students of several steps: roll-outs in training, drawing, exports."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from common.errors import UserError
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.randomness import StepRandom, seeded_noise
from lightning_modules.diffusion.schedule import NoiseSchedule, RectifiedFlow
from lightning_modules.diffusion.steps import Steps, as_steps, step_facts, steps_of
from lightning_modules.drawing import open_model
from lightning_modules.generator import load_generator, make_generator
from lightning_modules.guidance import negative_attention
from lightning_modules.guidance.methods import Nasa
from lightning_modules.networks.loading import load_parts, noise_schedule
from lightning_modules.networks.pipeline_folder import export_student, student_call, student_scheduler
from lightning_modules.networks.roles import RoleNetwork
from lightning_modules.networks.student import load_student
from lightning_modules.objectives.base import Networks, StudentSample, Terms
from lightning_modules.objectives.dmd2 import DMD2
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.pipelines import stock_pipeline
from tests.test_turns import check_processes, check_resume
from tests.tiny_distillation import PROMPTS, Hooks, distillation, fit, snapshot

FOUR = Steps((999, 749, 499, 249))


# --- the steps themselves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["fresh", "fixed", "none"])
@pytest.mark.parametrize(
    "schedule", [NoiseSchedule(torch.linspace(0.99, 0.01, 1000)), RectifiedFlow(shift=3.0)]
)
def test_what_the_next_step_is_given(schedule: NoiseSchedule, noise: Any) -> None:
    """Against the formulas with numbers: α' x̂ + σ' n."""
    steps, x0, epsilon = Steps((999, 300), noise), torch.full((2, 1), 0.7), torch.full((2, 1), -0.4)
    (alpha, sigma), (a, s) = (schedule.alpha_sigma(torch.tensor([t, t])) for t in (999, 300))
    start = alpha[:, None] * x0 + sigma[:, None] * epsilon
    said = Prediction(x0, "sample", start, alpha, sigma)
    asked = list[int]()
    found = steps.next_input(0, said, schedule, start, lambda k: asked.append(k) or torch.full((2, 1), 5.0))
    n = {"fresh": torch.full((2, 1), 5.0), "fixed": start, "none": epsilon}[noise]
    torch.testing.assert_close(found, a[:, None] * x0 + s[:, None] * n, rtol=1e-4, atol=1e-5)
    assert asked == [1] * (noise == "fresh")


def test_fewer_of_the_steps_are_evenly_among_them() -> None:
    assert [FOUR.fewer(k).timesteps for k in (1, 2, 3, 4)] == [
        (999,), (999, 499), (999, 749, 499), (999, 749, 499, 249)
    ]  # fmt: skip
    assert steps_of(step_facts(Steps((9, 3), "none"))) == Steps((9, 3), "none")
    assert Steps((9, 6, 3), "none").fewer(2) == Steps((9, 6), "none")
    assert step_facts(as_steps(625)) == {"start_timestep": 625} and steps_of(
        {"start_timestep": 625}
    ) == as_steps(625)
    with pytest.raises(UserError, match="from 1 to 4 steps, not 5"):
        FOUR.fewer(5)
    for wrong in ((), (500, 500), (500, 0)):
        with pytest.raises(UserError, match="from the first one down"):
            Steps(wrong)


# --- drawing ------------------------------------------------------------------------------------------------


def test_a_picture_depends_on_its_seed_alone(tiny_sd: Path) -> None:
    generator = make_generator(load_parts(tiny_sd), FOUR)
    together = generator.images(PROMPTS[:3], [7, 8, 9])
    apart = generator.images(PROMPTS[:3], [7, 8, 9], batch_size=1)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    assert (together[0] - generator.images(PROMPTS[:1], [10])[0]).abs().max() > 0.01
    noises = [seeded_noise([7, 8], (4, 8, 8), draw=k) for k in range(3)]
    torch.testing.assert_close(noises[2][1], seeded_noise([8], (4, 8, 8), draw=2)[0])
    assert not any(torch.equal(noises[a], noises[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
    with pytest.raises(ValueError, match="give `fresh`"):
        generator.latents(noises[0], generator.prompt_encoder.encode(PROMPTS[:2]))


def test_negative_prompts_in_the_first_steps(tiny_sd: Path) -> None:
    """Of a student by hand: step 0 steered, the others not; whatever the batches."""
    generator, rule = make_generator(load_parts(tiny_sd), Steps((999, 500), "none")), Nasa(0.8)
    draw = partial(generator.images, PROMPTS[:2], [7, 8], negative_prompt="a dog", negative_method=rule)
    first, every = draw(negative_steps=1), draw()
    encode, noise = generator.prompt_encoder.encode, generator.noise([7, 8])
    with torch.no_grad():
        condition, start = encode(PROMPTS[:2]), generator.steps.at(0, noise)
        role = RoleNetwork(generator.schedule, lambda: nullcontext(generator.student))
        with negative_attention(generator.student, encode(["a dog"]), rule):
            said = role(noise, start, condition)
        x_t = generator.steps.next_input(0, said, generator.schedule, noise)
        x0 = role(x_t, generator.steps.at(1, noise), condition).x0
        torch.testing.assert_close(first, generator.decoder.decode(x0), rtol=0, atol=1e-5)
    assert (first - every).abs().max() > 1e-3
    torch.testing.assert_close(draw(negative_steps=1, batch_size=1), first, rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(negative_steps=2), every, rtol=0, atol=1e-5)


@pytest.mark.parametrize("noise", ["fresh", "none"])
@pytest.mark.parametrize("timesteps", [(999, 749, 499, 249), (625, 469, 312, 156), (999, 500, 200)])
def test_the_stock_pipeline_draws_the_same(
    tiny_sd: Path, tmp_path: Path, timesteps: tuple[int, ...], noise: Any
) -> None:
    parts, steps = load_parts(tiny_sd), Steps(timesteps, noise)
    export_student(parts.denoiser, parts, steps, tmp_path / "out", card={"teacher": "tiny"})
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    call = eval(f"dict({student_call(parts, steps)})")  # noqa: S307 - our own words
    even = timesteps == FOUR.timesteps or (timesteps == (625, 469, 312, 156) and noise == "fresh")
    assert call == {"guidance_scale": 1.0} | (
        {"num_inference_steps": 4} if even else {"timesteps": list(timesteps)}
    )
    seeds = [3, 4]
    stock = pipeline(
        PROMPTS[:2], generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="pt", **call
    ).images
    ours = load_generator(tmp_path / "out")
    assert ours.steps == steps
    torch.testing.assert_close(ours.images(PROMPTS[:2], seeds), stock, rtol=0, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**{len(timesteps)}** network evaluations" in card and ", ".join(map(str, timesteps)) in card
    assert student_call(parts, steps) in card


@pytest.mark.parametrize(
    ("family", "noise"),
    [("sdxl", "fresh"), ("pixart", "none"), ("sd3", "none"), ("sd3", "fresh"), ("sana", "none")],
)
def test_other_families_stock_pipelines_draw_the_same(
    backbone_folder: Callable[[str], Path], tmp_path: Path, family: str, noise: Any
) -> None:
    """Stable Diffusion 3's pipeline takes the noise between steps from PyTorch's own generator."""
    parts = load_parts(backbone_folder(family))
    steps = Steps((999, 749, 499, 249), noise)
    pipeline = stock_pipeline(parts, student_scheduler(parts.scheduler, steps))
    call = eval(f"dict({student_call(parts, steps)})")  # our own words
    start = seeded_noise([3], parts.latent_shape)
    torch.manual_seed(11)
    generator = None if family == "sd3" else [torch.Generator().manual_seed(11)]
    stock = pipeline(PROMPTS[:1], latents=start, generator=generator, output_type="latent", **call).images
    again = torch.Generator().manual_seed(11)
    between = [torch.randn(start.shape, generator=again) for _ in range(4)]
    ours = make_generator(parts, steps)
    x0 = ours.latents(start, ours.prompt_encoder.encode(PROMPTS[:1]), fresh=lambda k: between[k - 1])
    if family == "sd3":
        assert call["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    torch.testing.assert_close(stock, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("noise", ["none", "fresh"])
@pytest.mark.parametrize("family", ["sd3", "flux", "sana", "klein", "zimage", "qwen"])
def test_a_scheduler_of_rectified_flow_keeps_the_teachers_schedule(
    backbone_folder: Callable[[str], Path], family: str, noise: Any
) -> None:
    """Also where it is made of a student's own, as by `merge` and an export of a checkpoint."""
    parts = load_parts(backbone_folder(family))
    steps = Steps((999,) if family == "qwen" else FOUR.timesteps, noise)
    teacher: Any = noise_schedule(parts.scheduler, parts.image_tokens, parts.backbone)
    once = student_scheduler(parts.scheduler, steps)
    again: Any = student_scheduler(once, steps)
    assert type(again) is type(once)
    dynamic = again.config.use_dynamic_shifting
    mu = {"mu": parts.backbone.flow_mu(again.config, parts.image_tokens)} if dynamic else {}
    again.set_timesteps(sigmas=[(t + 1) / 1000 for t in steps.timesteps], **mu)
    sigmas = teacher.alpha_sigma(torch.tensor(steps.timesteps))[1]
    torch.testing.assert_close(again.sigmas[: len(steps)], sigmas)
    assert teacher.shift > 1


def test_checkpoint_and_export_of_a_flow_student_draw_the_same(
    backbone_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """With new noise between the steps, at the teacher's shift of 3."""
    module = distillation(backbone_folder("sd3"), timesteps=[999, 749, 499, 249], ema_decay=None)
    trainer = fit(module, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    student = load_student(tmp_path / "student.ckpt")
    export_student(student.parts.denoiser, student.parts, student.steps, tmp_path / "out", card=student.facts)
    ours, stored = (load_generator(path) for path in (tmp_path / "student.ckpt", tmp_path / "out"))
    expected = ours.images(PROMPTS[:1], [3])
    torch.testing.assert_close(stored.images(PROMPTS[:1], [3]), expected, rtol=0, atol=1e-4)


def test_steps_of_an_opened_student(tiny_sd: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd)
    folder = str(export_student(parts.denoiser, parts, FOUR, tmp_path / "out", card={"teacher": "tiny"}))
    whole, two = open_model(folder), open_model(folder, 2)
    assert (whole.steps, two.steps) == (4, 2) and two.facts["timesteps"] == [999, 499]
    expected = make_generator(parts, Steps((999, 499))).images(PROMPTS[:1], [5])
    torch.testing.assert_close(two.draw(PROMPTS[:1], [5]), expected)
    assert open_model(str(tiny_sd)).steps == 1
    with pytest.raises(UserError, match="from 1 to 4 steps, not 8"):
        open_model(folder, 8)
    with pytest.raises(UserError, match="No stock scheduler"):
        export_student(parts.denoiser, parts, Steps((999, 499), "fixed"), tmp_path / "fixed")


def test_a_terminal_sigma_is_refused_before_any_training(backbone_folder: Callable[[str], Path]) -> None:
    """Qwen-Image's schedule ends at a sigma of its own, which depends on the number of steps."""
    folder = backbone_folder("qwen")
    scheduler = load_parts(folder).scheduler
    for noise in ("fresh", "none"):
        with pytest.raises(UserError, match="terminal sigma .shift_terminal.*leave model.timesteps out"):
            student_scheduler(scheduler, Steps((999, 499), noise))
    assert student_scheduler(scheduler, Steps((999,))).config.shift_terminal is None
    with pytest.raises(UserError, match="shift_terminal"):
        distillation(folder, timesteps=[999, 499]).configure_model()


# --- training -----------------------------------------------------------------------------------------------


def settings(**more: Any) -> dict[str, Any]:
    return {"timesteps": [625, 400, 200], "ema_decay": None, **more}


class Watching(SwiftBrush):
    """Keeps what it is given."""

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        self.__dict__.setdefault("seen", []).append(sample)
        return super().student_loss(sample, networks, random)


@pytest.mark.parametrize("noise", ["fresh", "fixed", "none"])
def test_the_drawn_step_sees_what_the_student_makes_of_noise(
    tiny_sd: Path, tmp_path: Path, noise: Any
) -> None:
    """In every turn x_t is what the generator would have there; no gradient came with it."""
    module = distillation(tiny_sd, Watching(), **settings(step_noise=noise))
    states = list[dict[str, Tensor]]()
    module.objective.seen = []
    before = Hooks(lambda m: states.append(_weights(m)), lambda m: states.append(_weights(m)))
    fit(module, tmp_path, 5, before)
    seen = module.objective.seen
    assert {sample.k for sample in seen} >= {0, 2}  # drawn: which, follows from the seed
    for step, sample in enumerate(seen):
        assert sample.t.tolist() == [(625, 400, 200)[sample.k]] * 4 and not sample.x_t.requires_grad
        module.student.load_state_dict(states[step])
        random = StepRandom(module.seed, step, torch.arange(4))
        x_t = start = random.normal("start", (4, 8, 8))
        with torch.no_grad():
            for k in range(sample.k):
                said = module.networks.student(x_t, module.steps.at(k, start), sample.condition)
                x_t = module.steps.next_input(
                    k,
                    said,
                    module.networks.schedule,
                    start,
                    lambda i, own=random: own.normal(f"step_{i}", (4, 8, 8)),
                )
            x0 = module.networks.student(x_t, sample.t, sample.condition).x0
        torch.testing.assert_close(sample.x_t, x_t, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample.x0.detach(), x0, rtol=1e-4, atol=1e-4)


def _weights(module: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.student.state_dict().items()}


def test_the_gradient_comes_through_the_drawn_step_alone(tiny_sd: Path) -> None:
    """It is that of one call on a fixed input: calls before it leave no trace in the student's gradient."""
    module = distillation(tiny_sd, **settings())
    module.configure_model()
    condition = module.generator.prompt_encoder.encode(PROMPTS[:4])
    step = next(
        s for s in range(99) if int(StepRandom(0, s, torch.arange(4)).shared_uniform("student_step") * 3) == 2
    )
    random = StepRandom(0, step, torch.arange(4))
    with module._sampler.turn() as student:
        at = student.arrive(condition, random)
        assert at.k == 2 and at.x_t.grad_fn is None and not at.x_t.requires_grad
        found = torch.autograd.grad(student(at.x_t, condition, at.t).sum(), list(module.student.parameters()))
    alone = module.networks.student(at.x_t.clone(), at.t, condition).x0.sum()
    for a, b in zip(found, torch.autograd.grad(alone, list(module.student.parameters())), strict=True):
        assert torch.equal(a, b)
    assert max(float(a.abs().max()) for a in found) > 0


@pytest.mark.parametrize("objective", [SwiftBrush, partial(DMD2, fake_updates=2)])
def test_one_timestep_is_today_s_one_step(tiny_sd: Path, tmp_path: Path, objective: Any) -> None:
    runs = [
        distillation(tiny_sd, objective(), **more) for more in ({}, {"timesteps": [625], "start_timestep": 3})
    ]
    for module in runs:
        fit(module, tmp_path, 3)
    one, other = map(snapshot, runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resume_and_two_processes_take_the_same_steps(tiny_sd: Path, tmp_path: Path) -> None:
    """The drawn step is one for the whole global batch, and follows from the number of the update."""
    several = {"timesteps": [625, 400, 200]}
    (tmp_path / "resume").mkdir(), (tmp_path / "two").mkdir()
    check_resume(tiny_sd, tmp_path / "resume", SwiftBrush, **several)
    check_processes(tiny_sd, tmp_path / "two", "ddp", SwiftBrush, **several)
