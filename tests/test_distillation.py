"""OneStepDistillation in real fits of a tiny model: who is trained when, by what gradient, what is kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.networks.loading import load_parts
from lightning_modules.objectives.base import StudentSample
from tests.tiny_distillation import (
    PROMPTS,
    Hooks,
    Pull,
    changed,
    distillation,
    fit,
    snapshot,
    watch_batches,
    watch_updates,
)

# --- whose turn it is


def test_each_turn_changes_its_own_role_only(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd)
    moved: dict[str, list[set[str]]] = {"student": [], "fake_score": []}

    def watcher(role: str, update: Callable[[], bool]) -> bool:
        with_gradient = {name for name, p in module.named_parameters() if p.grad is not None}
        before = snapshot(module)
        result = update()
        names = changed(before, snapshot(module))
        assert names <= with_gradient
        moved[role].append(with_gradient)
        assert all(p.grad is None for p in module.parameters())
        return result

    watch_updates(module, watcher)
    before: dict[str, Tensor] = {}
    fit(module, tmp_path, 3, Hooks(on_start=lambda m: before.update(snapshot(m))))
    student = {f"student.{name}" for name, _ in module.student.named_parameters()}
    adapter = {name for name in before if "lora_" in name}
    assert student and adapter
    assert moved == {"student": [student] * 3, "fake_score": [adapter] * 3}
    assert changed(before, snapshot(module)) >= adapter and changed(before, snapshot(module)) & student


def test_fifty_steps_leave_the_teacher_bit_for_bit(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd)
    steps: list[tuple[int, int]] = []
    count = Hooks(after_step=lambda m: steps.append((m.trainer.global_step, m.student_steps)))
    run = fit(module, tmp_path, 50, count, batch_size=2)
    assert steps == [(n, n) for n in range(1, 51)] and run.global_step == 50
    assert (module.student_steps, module.updates["fake_score"], module.skipped_updates) == (50, 50, 0)
    original = load_parts(tiny_sd).denoiser
    base = {n.replace(".base_layer", ""): p for n, p in module.scores.base.named_parameters()}
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, base[name]), name
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    text = module.generator.prompt_encoder.encode(PROMPTS[:2])
    with torch.no_grad():
        expected = original(x_t, t, text.tensors["encoder_hidden_states"]).sample
        # the same weights, but channels last: to rounding
        torch.testing.assert_close(module.scores.teacher(x_t, t, text).epsilon, expected, rtol=0, atol=1e-5)
        assert (module.scores.fake_score(x_t, t, text).epsilon - expected).abs().max() > 1e-4


# --- the gradient


def gradients_of(
    teacher: Path, folder: Path, micro_batch_size: int | None, steps: int = 2
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], OneStepDistillation]:
    """In float64: the gradients that each update saw, the logged numbers, the module."""
    module = distillation(teacher)
    seen: list[dict[str, Tensor]] = []

    def watcher(role: str, update: Callable[[], bool]) -> bool:
        seen.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
        return update()

    watch_updates(module, watcher)
    run = fit(module, folder, steps, Hooks(on_start=lambda m: m.double()), micro_batch_size=micro_batch_size)
    return seen, dict(run.callback_metrics), module


def test_accumulation_gives_the_gradients_of_the_whole_batch(tiny_sd: Path, tmp_path: Path) -> None:
    """Micro-batches of one and of all four; in float64, where rounding is far below the tolerance."""
    whole, numbers, _ = gradients_of(tiny_sd, tmp_path, None)
    parts, summed, _ = gradients_of(tiny_sd, tmp_path, 1)
    assert len(whole) == len(parts) == 4  # two steps of two turns
    for first, second in zip(whole, parts, strict=True):
        assert first.keys() == second.keys()
        for name, gradient in first.items():
            torch.testing.assert_close(second[name], gradient, rtol=1e-6, atol=1e-10, msg=name)
    assert max(gradient.abs().max() for gradient in whole[2].values()) > 1e-6  # the student's, second step
    assert numbers.keys() == summed.keys() >= {"train/student_vsd", "gradient_norm/student"}
    independent_of_split = {"train/student_vsd", "train/fake_score_denoising", "latents/mean",
                            "gradient_norm/student", "gradient_norm/fake_score",
                            "objective/student_timestep", "objective/dropped_prompts"}  # fmt: skip
    for name in independent_of_split:
        torch.testing.assert_close(summed[name], numbers[name], rtol=1e-5, atol=1e-7, msg=name)
    assert summed["latents/std"] == pytest.approx(float(numbers["latents/std"]), rel=0.5), "a mean, no sum"


def test_gradient_is_that_of_the_pseudo_loss(tiny_sd: Path, tmp_path: Path) -> None:
    """No leaf in between: autograd straight through the objective's loss into the student, sign included."""
    module = distillation(tiny_sd)
    compared: list[float] = []

    def watcher(role: str, update: Callable[[], bool]) -> bool:
        if role == "student":
            seen = {n: p.grad.clone() for n, p in module.student.named_parameters()}
            step, places = module.student_steps, torch.arange(4)
            random = StepRandom(module.seed, step, places)
            condition = module.generator.prompt_encoder.encode(batches[step])
            x0 = module.generator.latents(random.normal("start", (4, 8, 8)), condition)
            loss = sum(
                module.objective.student_loss(
                    StudentSample(x0, condition), module.networks, random
                ).losses.values()
            )
            expected = torch.autograd.grad(loss, list(module.student.parameters()))
            for (name, gradient), other in zip(seen.items(), expected, strict=True):
                torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-12, msg=name)
            compared.append(max(gradient.abs().max().item() for gradient in expected))
        return update()

    batches = watch_batches(module)
    watch_updates(module, watcher)
    run = fit(module, tmp_path, 2, Hooks(on_start=lambda m: m.double()))
    assert len(compared) == 2 and compared[1] > 1e-6
    # the gradient is g / numel; times sqrt(B) its norm is that of one sample
    rms, size = run.callback_metrics["objective/score_gradient_rms"], 4 * 8 * 8
    torch.testing.assert_close(run.callback_metrics["gradient_at_output/vsd"], rms / size**0.5)


# --- objectives of one's own


def test_networks_of_the_objective_are_trained_in_the_fake_scores_turn(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, Pull(5.0))
    norms: list[float] = []
    weights: list[tuple[str, float]] = []

    def watcher(role: str, update: Callable[[], bool]) -> bool:
        result = update()
        weights.append((role, round(module.objective.own.weight.item(), 5)))  # type: ignore[union-attr]
        return result

    watch_updates(module, watcher)
    run = fit(
        module,
        tmp_path,
        3,
        Hooks(after_step=lambda m: norms.append(m.trainer.callback_metrics["train/student_near"])),
    )
    # Adam's first steps are of its learning rate's size, here the group's own.
    assert weights == [
        ("student", 0.0), ("fake_score", 0.25), ("student", 0.25),
        ("fake_score", pytest.approx(0.5, abs=0.01)),
        ("student", weights[3][1]), ("fake_score", weights[5][1]),
    ]  # fmt: skip
    assert norms[2] < norms[1] < norms[0]  # downhill
    assert [len(optimizer.param_groups) for optimizer in run.optimizers] == [1, 2]
    assert module.memory_parts()["objective's networks"] == (1, 4, True)


# --- average


def test_average_follows_the_rule_and_is_swapped_in_for_evaluation(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, ema_decay=0.2)
    history: list[dict[str, Tensor]] = []
    fit(module, tmp_path, 4, Hooks(after_step=lambda m: history.append(snapshot(m.student))))
    expected = history[0]
    for number, weights in enumerate(history[1:], start=2):
        decay = min(0.2, number / (9 + number))
        expected = {n: decay * expected[n] + (1 - decay) * weights[n] for n in weights}
    assert module.ema is not None
    for name, value in expected.items():
        torch.testing.assert_close(module.ema.shadow[name], value, rtol=0, atol=1e-6)
    own = snapshot(module.student)
    assert changed(own, module.ema.shadow)
    with module.evaluation_weights() as which:
        assert which == "ema" and not changed(module.ema.shadow, snapshot(module.student))
    assert not changed(own, snapshot(module.student))
    with pytest.raises(KeyError), module.evaluation_weights():
        raise KeyError
    assert not changed(own, snapshot(module.student))


def test_without_average_the_online_weights_are_evaluated(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, ema_decay=None)
    fit(module, tmp_path, 1)
    with module.evaluation_weights() as which:
        assert which == "online"
