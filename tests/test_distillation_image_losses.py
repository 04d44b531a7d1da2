"""Image losses and given pictures in real fits of a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.checkpoint import RunCheckpoint
from common.errors import UserError
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.image_losses.clip import ClipLoss
from lightning_modules.image_losses.schedules import LinearWeight
from lightning_modules.image_losses.terms import ImageLossSettings
from lightning_modules.objectives.base import Terms
from tests.test_distillation_runs import assert_identical, checkpoint
from tests.test_distillation_runs import fit as fit_config
from tests.tiny_distillation import (
    PROMPTS,
    Hooks,
    Pull,
    adam,
    changed,
    distillation,
    fit,
    snapshot,
    watch_batches,
    watch_updates,
    write_config,
)
from tests.tiny_judges import CLIP, NoDistillation, clip_settings, copied_clip


def test_gradient_reaches_the_student_by_finite_differences(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """The student's gradient of the CLIP term alone, two micro-batches, a capped number of pictures."""
    settings = clip_settings(tiny_clip, weight=0.7, images_per_update=3)
    module = distillation(tiny_sd, NoDistillation(), image_losses=settings)
    batches = watch_batches(module)
    slopes: list[tuple[Tensor, Tensor]] = []

    def value(prompts: list[str]) -> Tensor:
        random = StepRandom(module.seed, module.student_steps, torch.arange(4))
        condition = module.generator.prompt_encoder.encode(prompts)
        x0 = module.generator.latents(random.normal("start", (4, 8, 8)), condition)
        return module.image_terms.judge(x0, prompts, random, 4, 2)[0]["clip"]  # type: ignore[misc]

    @torch.no_grad()
    def watcher(role: str, update: Callable[[], bool]) -> bool:
        if role == "student":
            generator = torch.Generator().manual_seed(0)
            parameters = list(module.student.parameters())
            way = [torch.randn(p.shape, generator=generator).double() for p in parameters]
            along = torch.stack([(p.grad * w).sum() for p, w in zip(parameters, way)]).sum()
            ends = []
            for step in (1e-6, -2e-6, 1e-6):  # ahead, behind, and back
                for parameter, direction in zip(parameters, way):
                    parameter += step * direction
                ends.append(value(batches[-1]))
            slopes.append((along, (ends[0] - ends[1]) / 2e-6))
        return update()

    watch_updates(module, watcher)
    run = fit(
        module, tmp_path, 2, Hooks(on_start=lambda m: m.double()), micro_batch_size=2, log_every_n_steps=1
    )
    assert len(slopes) == 2
    for along, slope in slopes:
        torch.testing.assert_close(along, slope, rtol=1e-4, atol=1e-7)
        assert abs(slope) > 1e-3
    numbers = run.callback_metrics
    cosine = numbers["image_losses/cosine_clip"]
    torch.testing.assert_close(numbers["train/student_clip"], 0.7 * (0.9 - cosine), rtol=1e-4, atol=1e-6)
    assert numbers["image_losses/weight_clip"] == pytest.approx(0.7)
    assert numbers["image_losses/below_tau_clip"] == pytest.approx(1.0)
    assert numbers["gradient_at_output/clip"] > 0 and numbers["image_losses/truncated_prompts_clip"] == 0
    judges = {id(p): p for part in (module.image_terms, module.parts.vae) for p in part.parameters()}  # type: ignore[union-attr]
    assert judges and all(p.grad is None and not p.requires_grad for p in judges.values())


def test_training_on_the_loss_raises_the_cosine(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """Seen on samples that training doesn't draw; neither decoder nor CLIP moves."""
    settings = clip_settings(tiny_clip)
    module = distillation(tiny_sd, NoDistillation(), image_losses=settings, student=adam(1e-2))
    before: dict[str, Tensor] = {}
    cosines: list[float] = []

    @torch.no_grad()
    def measure(m: OneStepDistillation) -> None:
        condition = m.generator.prompt_encoder.encode(PROMPTS)
        images = m.generator.decoder.decode(m.generator.latents(m.generator.noise(range(9)), condition))
        settings.losses[0](images, PROMPTS)
        cosines.append(settings.losses[0].diagnostics["cosine"].mean().item())
        before.update(snapshot(m) if not before else {})

    fit(module, tmp_path, 12, Hooks(on_start=measure))
    measure(module)
    assert cosines[1] > cosines[0] + 0.03
    moved = changed(before, snapshot(module))
    assert moved and not any(name.startswith(("image_terms", "generator.decoder")) for name in moved)
    assert not any(name.startswith("image_terms") for name in module.state_dict())


# --- weight zero


def record(module: OneStepDistillation, folder: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    rows: list[dict[str, float]] = []
    hooks = Hooks(
        after_step=lambda m: rows.append({k: v.item() for k, v in m.trainer.callback_metrics.items()})
    )
    fit(module, folder, 3, hooks, micro_batch_size=2)
    return rows, snapshot(module)


def test_at_weight_zero_it_is_plain_swiftbrush(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and neither decoder nor CLIP is called; with a weight they are."""
    plain, weights = record(distillation(tiny_sd), tmp_path)
    calls: list[str] = []
    decode = torch.nn.Module.__call__

    def counted(self: torch.nn.Module, *args: Any, **options: Any) -> Any:
        if type(self).__name__ in ("Decoder", "CLIPVisionTransformer", "CLIPTextTransformer"):
            calls.append(type(self).__name__)
        return decode(self, *args, **options)

    rows = {}
    for weight in (0.0, 0.5):
        module = distillation(tiny_sd, image_losses=clip_settings(tiny_clip, weight=weight))
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "__call__", counted)
            rows[weight], after = record(module, tmp_path)
        if weight == 0:
            assert "Decoder" not in calls
            without = set(calls)  # the prompt encoder's text network, of the teacher
            own = {name: value for name, value in after.items() if not name.startswith("image_terms")}
            assert not changed(weights, own)
            assert [{**row, "image_losses/weight_clip": 0.0} for row in plain] == rows[0.0]
    assert {"Decoder"} <= set(calls) - without
    assert rows[0.5][0]["train/student_vsd"] == plain[0]["train/student_vsd"]
    assert rows[0.5][2]["train/student_vsd"] != plain[2]["train/student_vsd"]


def test_the_schedule_ends_the_calls(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    settings = clip_settings(tiny_clip, weight=LinearWeight(0.1, 0.0, steps=2))
    module = distillation(tiny_sd, image_losses=settings)
    seen: list[int] = []
    loss = settings.losses[0]
    forward = loss.forward
    loss.forward = lambda *given: seen.append(module.student_steps) or forward(*given)  # type: ignore[method-assign, func-returns-value]
    fit(module, tmp_path, 4)
    assert seen == [0, 1]


def test_a_schedule_over_the_training_needs_its_length(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    module = distillation(tiny_sd, image_losses=clip_settings(tiny_clip, weight=None))
    with pytest.raises(UserError, match="set trainer.max_steps"):
        fit(module, tmp_path, -1, max_epochs=1)


# --- names and judges


class Namesake(Pull):
    """An objective with a term called clip."""

    def student_loss(self, *given: Any) -> Terms:
        return Terms({"clip": super().student_loss(*given).losses["near"]})


def test_two_terms_of_one_name(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, Namesake(), image_losses=clip_settings(tiny_clip))
    with pytest.raises(UserError, match="both have a term 'clip'"):
        fit(module, tmp_path, 1)


def losses(clip: Path, **rest: Any) -> dict[str, Any]:
    return {"losses": [{"class_path": CLIP, "init_args": {"clip": str(clip), "tau": 0.9}}], **rest}


def test_the_scoring_clip_may_not_train(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    evaluation = {"scoring_clip": str(tiny_clip), "reference": None, "final_size": 0}
    config = write_config(
        tmp_path / "tiny.yaml", tiny_sd, model__init_args__image_losses=losses(tiny_clip),
        trainer__callbacks=[{"class_path": "Evaluation", "init_args": evaluation}],
    )  # fmt: skip
    with pytest.raises(UserError, match="the clip loss uses the network by which .* scores the run"):
        fit_config(config)
    assert not (tmp_path / "runs").exists()
    other = copied_clip(tiny_clip, tmp_path / "other")
    other_losses = f"--model.image_losses.losses={json.dumps(losses(other)['losses'])}"
    fit_config(config, other_losses, "--trainer.max_steps=1")


# --- resuming


def test_resumed_lora_run_with_clip_loss_is_the_uninterrupted_one(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    changes = {
        "model__init_args__image_losses": losses(tiny_clip, images_per_update=2),
        "model__init_args__student_lora": {"rank": 2, "alpha": 4.0, "targets": ["to_q", "conv1"]},
        "trainer__max_steps": 4,
    }
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = fit_config(write_config(tmp_path / "whole" / "tiny.yaml", tiny_sd, **changes))
    stop = {"class_path": "tests.test_distillation_runs.Interrupt", "init_args": {"step": 2}}
    config = write_config(tmp_path / "parts" / "tiny.yaml", tiny_sd, **changes, trainer__callbacks=[stop])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit_config(config)
    write_config(config, tiny_sd, **changes)
    parts = fit_config(config, "--ckpt_path=last")
    first, second = checkpoint(whole), checkpoint(parts)
    assert first["counters"]["student_steps"] == 4 and parts.name == "version_0"
    for key in ("state_dict", "ema", "counters", "optimizer_states", "lr_schedulers", "one_step"):
        assert_identical(first[key], second[key], key)
    header, *rows = [line.split(",") for line in (whole / "metrics.csv").read_text().splitlines()]
    weights = [float(row[header.index("image_losses/weight_clip")]) for row in rows]
    assert weights == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert {"train/student_clip", "gradient_at_output/clip", "image_losses/cosine_clip"} <= set(header)


def test_checkpoint_holds_no_judges(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, image_losses=clip_settings(tiny_clip))
    fit(module, tmp_path, 1, RunCheckpoint(), enable_checkpointing=True)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in content["state_dict"]} == {"student", "scores"}
    again = distillation(tiny_sd, image_losses=clip_settings(tiny_clip))
    again.configure_model()
    again.load_state_dict(content["state_dict"])
    assert not changed(snapshot(module), snapshot(again))
    table = module.memory_parts()
    clip = sum(p.numel() for p in module.image_terms.losses.parameters())  # type: ignore[union-attr]
    assert table["image losses' networks"] == (clip, 4 * clip, False)


def test_frozen_judges_are_halved_in_bf16(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_modules.distillation.frozen_dtype", lambda *_: torch.bfloat16)
    losses = ImageLossSettings([ClipLoss(str(tiny_clip), tau=0.9, weight=1.0)])
    module = distillation(tiny_sd, image_losses=losses)
    run = fit(module, tmp_path, 2, precision="bf16-mixed", log_every_n_steps=1)
    assert {p.dtype for p in module.image_terms.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    assert module.skipped_updates == 0 and run.callback_metrics["gradient_at_output/clip"] > 0
