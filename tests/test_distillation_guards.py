"""What a distillation refuses, skips or stops at, and the precision of its parts."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from datamodules.prompts import PromptDataModule
from datamodules.sources import CAPTIONS
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.networks.model_names import is_bundled
from lightning_modules.objectives.base import Networks, StudentSample, Terms
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.parallel import FullySharded
from lightning_modules.trainer_settings import cast_frozen, check_trainer, frozen_dtype
from tests.tiny_distillation import LORA, Hooks, adam, changed, distillation, fit, snapshot, trainer

# --- what is not finite


class Broken(SwiftBrush):
    """Breaks a role's loss at some of its calls: "nan" the gradient, "inf" the value alone."""

    def __init__(self, role: str, calls: range, how: str = "nan") -> None:
        super().__init__()
        self.role, self.calls, self.how, self.count = role, calls, how, 0

    def _break(self, role: str, terms: Terms) -> Terms:
        if role != self.role:
            return terms
        self.count += 1
        if self.count - 1 not in self.calls:
            return terms
        factor, offset = (float("nan"), 0.0) if self.how == "nan" else (1.0, float("inf"))
        return Terms({name: term * factor + offset for name, term in terms.losses.items()})

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        return self._break("student", super().student_loss(sample, networks, random))

    def fake_score_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        return self._break("fake_score", super().fake_score_loss(sample, networks, random))


@pytest.mark.parametrize("how", ["nan", "inf"])
@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_what_is_not_finite_skips_the_update(role: str, how: str, tiny_sd: Path, tmp_path: Path) -> None:
    """The second micro-batch of the first step is broken, so all of that update is skipped, and it counts."""
    module = distillation(
        tiny_sd, Broken(role, range(1, 2), how), student=adam(warmup_steps=2), fake_score=adam(warmup_steps=2)
    )
    record: list[tuple[int, int, int, int, int]] = []
    rates: list[float] = []

    def after(m: Any) -> None:
        record.append((m.trainer.global_step, *m.updates.values(), m.skipped_updates, m.ema.num_updates))
        rates.append(m.trainer.optimizers[0].param_groups[0]["lr"])

    before: dict[str, Tensor] = {}
    weights: list[dict[str, Tensor]] = []
    run = fit(
        module, tmp_path, 2,
        Hooks(lambda m: before.update(snapshot(m)), lambda m: (after(m), weights.append(snapshot(m)))),
        micro_batch_size=2,
    )  # fmt: skip
    if role == "student":
        assert record == [(0, 0, 1, 1, 0), (1, 1, 2, 1, 1), (2, 2, 3, 1, 2)]
        assert rates == [0.0, 0.005, 0.01]  # the learning rate waits, too
    else:
        assert record == [(1, 1, 0, 1, 1), (2, 2, 1, 1, 2)]
    assert run.callback_metrics["counts/skipped_updates"] == 1
    assert all(torch.isfinite(value).all() for value in weights[-1].values())
    other = "lora_" if role == "student" else "student."
    assert all(other in name for name in changed(before, weights[0]))


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_too_many_skipped_updates_stop_the_run(role: str, tiny_sd: Path, tmp_path: Path) -> None:
    """Although the other role's updates are fine all the time."""
    module = distillation(tiny_sd, Broken(role, range(1, 99)), max_skipped_updates=3)
    term = "vsd" if role == "student" else "denoising"
    message = f"3 updates of the {role} in a row, the last after step [0-9], .*not finite.*learning rate"
    with pytest.raises(UserError, match=message) as stopped:
        fit(module, tmp_path, 50)
    assert module.skipped_updates == 3
    three = ", ".join([r"'a \w+ \w+'"] * 3)
    assert re.search(rf"\(terms: {term}; prompts: {three} …\)", str(stopped.value))


def test_scattered_skips_do_not_stop_the_run(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, Broken("student", range(0, 9, 2)), max_skipped_updates=2)
    fit(module, tmp_path, 3)
    assert (module.student_steps, module.skipped_updates) == (3, 3)


# --- precision and strategy


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_other_precisions_are_refused(precision: Any, tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"trainer.precision is {precision}: use 32-true or bf16-mixed"):
        fit(distillation(tiny_sd), tmp_path, 1, precision=precision)


def test_fp16_mixed_and_other_shards_are_refused() -> None:
    """Lightning turns 16-mixed into bf16-mixed on the CPU, so there the check is called by itself."""

    def check(precision: str, strategy: Any) -> None:
        settings = {"gradient_clip_val": None, "accumulate_grad_batches": 1}
        check_trainer(SimpleNamespace(precision=precision, strategy=strategy, **settings))  # type: ignore[arg-type]

    with pytest.raises(UserError, match="16-mixed.*loss scaler"):
        check("16-mixed", None)
    strategies = L.pytorch.strategies
    for sharded in (strategies.ModelParallelStrategy(), object.__new__(strategies.FSDPStrategy)):
        with pytest.raises(UserError, match=f"{type(sharded).__name__}, which can't train two networks"):
            check("32-true", sharded)
    check("32-true", FullySharded())
    for setting in ("find_unused_parameters", "static_graph"):
        strategy = strategies.DDPStrategy(**{setting: True})
        check("32-true", strategy)
        assert strategy._ddp_kwargs == {"find_unused_parameters": False, "static_graph": False}


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("bf16-mixed", "cuda", torch.bfloat16),
        ("bf16-mixed", "cpu", torch.float32),
        ("32-true", "cuda", torch.float32),
    ],
)
def test_type_of_frozen_weights(precision: str, device: str, dtype: torch.dtype) -> None:
    strategy = SimpleNamespace(root_device=torch.device(device))
    assert frozen_dtype(SimpleNamespace(precision=precision, strategy=strategy)) is dtype  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", [LORA, None])
def test_bf16_run_with_frozen_weights_in_bf16(
    lora: Any, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: what is trained, its average and latents stay in float32; everything else is halved."""
    monkeypatch.setattr("lightning_modules.distillation.frozen_dtype", lambda *_: torch.bfloat16)
    seen: list[torch.dtype] = []

    class Watch(SwiftBrush):
        def student_loss(self, sample: StudentSample, *rest: Any) -> Terms:
            seen.append(sample.x0.dtype)
            return super().student_loss(sample, *rest)

    module = distillation(tiny_sd, Watch(), lora=lora)
    before: dict[str, Tensor] = {}
    fit(module, tmp_path, 2, Hooks(on_start=lambda m: before.update(snapshot(m))), precision="bf16-mixed")
    types = {p.dtype for p in module.parameters() if p.requires_grad}
    assert types == {torch.float32} and seen == [torch.float32] * 2
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert module.ema is not None and {p.dtype for p in module.ema.shadow.values()} == {torch.float32}
    moved = changed(before, snapshot(module))
    assert moved and all(
        name.startswith("student.") or "lora_" in name or "full_copy" in name for name in moved
    )
    assert module.skipped_updates == 0


def test_cast_frozen_leaves_trained_weights() -> None:
    layers = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
    cast_frozen([layers], torch.bfloat16)
    assert [p.dtype for p in layers.parameters()] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_the_bundled_captions_are_for_the_bundled_teachers(tiny_sd: Path, tmp_path: Path) -> None:
    """Before anything is loaded; who names them gets them."""
    data = PromptDataModule(batch_size=4)
    with pytest.raises(UserError, match=r"data\.prompts is not set.*describe emoji.*assets/captions\.txt"):
        trainer(tmp_path, 1).fit(distillation(tiny_sd), data)
    assert is_bundled("assets/emoji-sd") and not is_bundled("owner/model@main") and not is_bundled(tiny_sd)
    named = PromptDataModule(str(CAPTIONS), batch_size=4)
    assert named.has_own_prompts and named.describe() == {
        "Prompts": f"8,484 from {CAPTIONS}",
        "Evaluation captions": "1,024, the bundled ones, which describe emoji; validations: others, 256",
    }
