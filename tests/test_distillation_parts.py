"""What a distillation is built of, what it stores, and what it draws."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.checkpoint import RunCheckpoint
from common.errors import UserError
from lightning_modules.diffusion.condition import Condition
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.generator import load_generator
from lightning_modules.networks.loading import load_parts
from lightning_modules.objectives.base import StudentSample, Terms
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.optimization import RoleOptimization
from tests.tiny_distillation import (
    PROMPTS,
    Hooks,
    Pull,
    changed,
    distillation,
    fit,
    prompt_data,
    snapshot,
)

# --- construction


def test_full_copy_as_fake_score(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, lora=None)
    before: dict[str, Tensor] = {}
    fit(module, tmp_path, 2, Hooks(on_start=lambda m: before.update(snapshot(m))))
    moved = changed(before, snapshot(module))
    assert {name.split(".")[0:2][-1] if name.startswith("scores") else "student" for name in moved} == {
        "full_copy", "student",
    }  # fmt: skip
    assert set(module.memory_parts()) >= {"fake score (full copy)", "teacher"}
    assert {key.split(".")[0] for key in module.state_dict()} == {"student", "scores"}
    assert all(key.startswith("scores.full_copy.") for key in module.state_dict() if key.startswith("scores"))


def test_objective_that_does_not_fit_the_schedule(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, SwiftBrush(max_timestep=1001))
    with pytest.raises(
        UserError, match=f"SwiftBrush does not fit {tiny_sd}: max_timestep is 1001.*only 1000"
    ):
        fit(module, tmp_path, 1)


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_sd: Path, tmp_path: Path) -> None:
    modules = [distillation(tiny_sd, gradient_checkpointing=checkpointing) for checkpointing in (False, True)]
    for module in modules:
        fit(module, tmp_path, 2)
    assert modules[1].student.is_gradient_checkpointing and modules[1].scores.base.is_gradient_checkpointing
    assert not changed(snapshot(modules[0]), snapshot(modules[1]))


def test_score_views(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd)
    fit(module, tmp_path, 2)
    views = module.score_views(PROMPTS[:3], [4, 5, 6])
    assert list(views) == ["student", "teacher x0", "fake score x0"]
    assert all(
        images.shape == (3, 3, 16, 16) and 0 <= images.min() <= images.max() <= 1 for images in views.values()
    )
    with module.evaluation_weights():
        torch.testing.assert_close(views["student"], module.generator.images(PROMPTS[:3], [4, 5, 6]))
    assert not torch.equal(views["teacher x0"], views["fake score x0"])


def test_memory_parts(tiny_sd: Path, tmp_path: Path) -> None:
    sgd = RoleOptimization(functools.partial(torch.optim.SGD, lr=0.1))
    module = distillation(tiny_sd, fake_score=sgd)
    fit(module, tmp_path, 1)
    parts = module.memory_parts()
    unet = sum(p.numel() for p in load_parts(tiny_sd).denoiser.parameters())
    adapter = sum(p.numel() for name, p in module.named_parameters() if "lora_" in name)
    assert parts["student"] == (unet, 4 * unet, True) and parts["teacher"] == (unet, 4 * unet, False)
    assert parts["fake score (LoRA adapter)"] == (adapter, 4 * adapter, True)
    assert parts["student's moving average"][:2] == parts["gradients"][:2] == (unet, 4 * unet)
    assert parts["optimizer states (estimate)"][:2] == (2 * unet, 8 * unet)  # Adam, and plain SGD's none
    assert not any(trained for name, (_, _, trained) in parts.items() if name not in {
        "student", "fake score (LoRA adapter)"
    })  # fmt: skip


# --- checkpoints


@pytest.fixture(scope="module")
def trained(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[OneStepDistillation, Path]:
    """A module after three steps, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    module = distillation(tiny_sd)
    fit(module, folder, 3, RunCheckpoint(), enable_checkpointing=True)
    return module, folder / "checkpoints" / "last.ckpt"


def test_checkpoint_is_plain_and_holds_nothing_frozen(
    trained: tuple[OneStepDistillation, Path], tiny_sd: Path
) -> None:
    module, path = trained
    content = torch.load(path, weights_only=True)
    student = {f"student.{name}" for name in load_parts(tiny_sd).denoiser.state_dict()}
    layers = {
        n.removesuffix(".base_layer.weight")
        for n, _ in module.scores.base.named_parameters()
        if "base_layer" in n
    }
    adapter = {f"scores.base.{n}.lora_{x}.fake_score.weight" for n in layers for x in "AB"}
    assert set(content["state_dict"]) == student | adapter
    assert set(content["ema"]) == {"shadow", "decay", "num_updates"}
    assert content["counters"] == {"student_steps": 3, "fake_score_steps": 3, "skipped_updates": 0}
    assert content["global_step"] == 3 and len(content["optimizer_states"]) == 2
    assert content["one_step"] | {"architecture": None} == {
        "method": "SwiftBrush", "teacher": str(tiny_sd), "start_timestep": 625, "weights": True,
        "student_steps": 3, "architecture": None,
    }  # fmt: skip
    assert content["hyper_parameters"]["teacher"] == str(tiny_sd)
    assert content["hyper_parameters"]["start_timestep"] == 625


def test_checkpoint_draws_the_modules_own_pictures(trained: tuple[OneStepDistillation, Path]) -> None:
    module, path = trained
    batch = {
        "prompts": PROMPTS[:2],
        "indices": torch.tensor([7, 8]),
        "is_padding": torch.tensor([False, True]),
    }
    output = module.eval().validation_step(batch, 0)
    assert output["prompts"] == PROMPTS[:2] and output["is_padding"].tolist() == [False, True]
    again = load_generator(path).images(PROMPTS[:2], [7, 8])  # channels first: to rounding
    torch.testing.assert_close(again, output["images"], rtol=0, atol=1e-5)
    online = load_generator(path, weights="online").images(PROMPTS[:2], [7, 8])
    own = module.generator.images(PROMPTS[:2], [7, 8])
    torch.testing.assert_close(online, own, rtol=0, atol=1e-5)
    assert (online - output["images"]).abs().max() > 1e-4


def test_an_average_can_be_added_to_a_run_without(tiny_sd: Path, tmp_path: Path) -> None:
    first = distillation(tiny_sd, ema_decay=None)
    fit(first, tmp_path, 1, RunCheckpoint(), enable_checkpointing=True)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    second = distillation(tiny_sd)
    second.configure_model()
    second.on_load_checkpoint(content)
    assert second.student_steps == 1 and second.ema is not None
    assert not changed(snapshot(first.student), second.ema.shadow)


def test_prompts_and_noise_do_not_depend_on_the_split(tiny_sd: Path, tmp_path: Path) -> None:
    """Two micro-batches hold the samples of the whole batch: the student's latents are the same."""
    latents: list[Tensor] = []

    class Watch(Pull):
        def student_loss(self, sample: StudentSample, *rest: Any) -> Terms:
            latents.append(sample.x0.detach())
            return super().student_loss(sample, *rest)

    for micro_batch_size in (4, 2):
        fit(distillation(tiny_sd, Watch()), tmp_path, 1, micro_batch_size=micro_batch_size)
    assert [len(part) for part in latents] == [4, 2, 2]
    # float32: another batch size sums in another order
    torch.testing.assert_close(torch.cat(latents[1:]), latents[0], rtol=0, atol=1e-4)


def test_condition_reaches_the_objective(tiny_sd: Path, tmp_path: Path) -> None:
    """The objective sees the prompts of the samples, in their order."""
    seen: list[Condition] = []

    class Watch(Pull):
        def student_loss(self, sample: StudentSample, *rest: Any) -> Terms:
            seen.append(sample.condition)
            return super().student_loss(sample, *rest)

    module = distillation(tiny_sd, Watch())
    fit(module, tmp_path, 1)
    batch = next(iter(prompt_data().train_dataloader()))
    expected = module.generator.prompt_encoder.encode(batch["prompts"])
    torch.testing.assert_close(
        seen[0].tensors["encoder_hidden_states"], expected.tensors["encoder_hidden_states"]
    )
