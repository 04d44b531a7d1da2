"""OneStepDistillation in real fits of a tiny model: who is trained when, by what gradient, what is kept."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from callbacks.checkpoint import RunCheckpoint
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.errors import UserError
from lightning_modules.generator import load_generator
from lightning_modules.networks.loading import load_parts
from lightning_modules.objectives.base import Objective, Scores, StudentSample
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.optimization import RoleOptimization
from lightning_modules.trainer_settings import cast_frozen, check_trainer, frozen_dtype
from tests.tiny_distillation import LORA, PROMPTS, adam, changed, distillation, fit, prompt_data, snapshot


class Hooks(L.Callback):
    """Calls `on_start` when training starts and `after_step` after each batch, with the module."""

    def __init__(
        self, on_start: Callable[..., Any] | None = None, after_step: Callable[..., Any] | None = None
    ):
        self.on_start, self.after_step = on_start, after_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.on_start is not None:
            self.on_start(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.after_step is not None:
            self.after_step(pl_module)


def watch_updates(module: OneStepDistillation, watcher: Callable[[str, Callable[[], bool]], bool]) -> None:
    """Put `watcher(role, update)` in place of every optimizer update; it must call `update()`."""
    update = module._update

    def watched(optimizer: Any, optimization: RoleOptimization, role: str) -> bool:
        return watcher(role, lambda: update(optimizer, optimization, role))

    module._update = watched  # type: ignore[method-assign]


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
    assert (module.student_steps, module.fake_score_steps, module.skipped_updates) == (50, 50, 0)
    original = load_parts(tiny_sd).unet
    base = {n.replace(".base_layer", ""): p for n, p in module.scores.base_unet.named_parameters()}
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, base[name]), name
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    text = module.generator.prompt_encoder.encode(PROMPTS[:2])
    with torch.no_grad():
        expected = original(x_t, t, text.tensors["encoder_hidden_states"]).sample
        assert torch.equal(module.scores.teacher(x_t, t, text).epsilon, expected)
        assert not torch.equal(module.scores.fake_score(x_t, t, text).epsilon, expected)


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
                module.objective.student_loss(StudentSample(x0, condition), module.scores, random).values()
            )
            expected = torch.autograd.grad(loss, list(module.student.parameters()))
            for (name, gradient), other in zip(seen.items(), expected, strict=True):
                torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-12, msg=name)
            compared.append(max(gradient.abs().max().item() for gradient in expected))
        return update()

    batches: list[list[str]] = []
    micro_batches = module._micro_batches
    module._micro_batches = lambda batch: batches.append(batch["prompts"]) or micro_batches(batch)  # type: ignore[method-assign, func-returns-value]
    watch_updates(module, watcher)
    fit(module, tmp_path, 2, Hooks(on_start=lambda m: m.double()))
    assert len(compared) == 2 and compared[1] > 1e-6


# --- objectives of one's own


class Pull(Objective):
    """Draws the student's latents to one value, by way of a trained number of its own."""

    def __init__(self, target: float = 0.0) -> None:
        super().__init__()
        self.target = target
        self.own = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.own.weight)

    def student_loss(self, sample: StudentSample, scores: Scores, random: StepRandom) -> dict[str, Tensor]:
        touched = self.own(torch.ones(1, 1)).sum()  # a way into the objective's network, never to be taken
        return {"near": (sample.x0 - self.target).square().mean(), "own": touched * sample.x0.mean()}

    def fake_score_loss(self, sample: StudentSample, scores: Scores, random: StepRandom) -> dict[str, Tensor]:
        assert not sample.x0.requires_grad
        t = torch.full((len(sample.x0),), 100)
        prediction = scores.fake_score(sample.x0, t, sample.condition).epsilon
        return {"fit": prediction.square().mean(), "own": (self.own.weight - 1).square().sum()}

    def extra_parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [*self.own.parameters()], "lr": 0.25}]


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


# --- what is not finite


class Broken(SwiftBrush):
    """Breaks a role's loss at some of its calls: "nan" the gradient, "inf" the value alone."""

    def __init__(self, role: str, calls: range, how: str = "nan") -> None:
        super().__init__()
        self.role, self.calls, self.how, self.count = role, calls, how, 0

    def _break(self, role: str, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if role != self.role:
            return terms
        self.count += 1
        if self.count - 1 not in self.calls:
            return terms
        factor, offset = (float("nan"), 0.0) if self.how == "nan" else (1.0, float("inf"))
        return {name: term * factor + offset for name, term in terms.items()}

    def student_loss(self, sample: StudentSample, scores: Scores, random: StepRandom) -> dict[str, Tensor]:
        return self._break("student", super().student_loss(sample, scores, random))

    def fake_score_loss(self, sample: StudentSample, scores: Scores, random: StepRandom) -> dict[str, Tensor]:
        return self._break("fake_score", super().fake_score_loss(sample, scores, random))


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
        record.append(
            (m.trainer.global_step, m.student_steps, m.fake_score_steps, m.skipped_updates, m.ema.num_updates)
        )
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
    with pytest.raises(UserError, match=f"3 updates of the {role} in a row.*not finite.*learning rate"):
        fit(module, tmp_path, 50)
    assert module.skipped_updates == 3


def test_scattered_skips_do_not_stop_the_run(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, Broken("student", range(0, 9, 2)), max_skipped_updates=2)
    fit(module, tmp_path, 3)
    assert (module.student_steps, module.skipped_updates) == (3, 3)


# --- precision and strategy


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_other_precisions_are_refused(precision: Any, tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"trainer.precision is {precision}: use 32-true or bf16-mixed"):
        fit(distillation(tiny_sd), tmp_path, 1, precision=precision)


def test_fp16_mixed_and_static_graphs_are_refused() -> None:
    """Lightning turns 16-mixed into bf16-mixed on the CPU, so there the check is called by itself."""

    def check(precision: str, strategy: Any) -> None:
        settings = {"gradient_clip_val": None, "accumulate_grad_batches": 1}
        check_trainer(SimpleNamespace(precision=precision, strategy=strategy, **settings))  # type: ignore[arg-type]

    with pytest.raises(UserError, match="16-mixed.*loss scaler"):
        check("16-mixed", None)
    with pytest.raises(UserError, match="static_graph"):
        check("32-true", L.pytorch.strategies.DDPStrategy(static_graph=True))
    strategy = L.pytorch.strategies.DDPStrategy()
    check("32-true", strategy)
    assert strategy._ddp_kwargs["find_unused_parameters"] is True


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
    monkeypatch.setattr("lightning_modules.distillation.frozen_dtype", lambda trainer: torch.bfloat16)
    seen: list[torch.dtype] = []

    class Watch(SwiftBrush):
        def student_loss(self, sample: StudentSample, *rest: Any) -> dict[str, Tensor]:
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
    assert modules[1].student.is_gradient_checkpointing
    assert not changed(snapshot(modules[0].student), snapshot(modules[1].student))


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
    unet = sum(p.numel() for p in load_parts(tiny_sd).unet.parameters())
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
    student = {f"student.{name}" for name in load_parts(tiny_sd).unet.state_dict()}
    layers = {
        n.removesuffix(".base_layer.weight")
        for n, _ in module.scores.base_unet.named_parameters()
        if "base_layer" in n
    }
    adapter = {f"scores.base_unet.{n}.lora_{x}.fake_score.weight" for n in layers for x in "AB"}
    assert set(content["state_dict"]) == student | adapter
    assert set(content["ema"]) == {"shadow", "decay", "num_updates"}
    assert content["counters"] == {"student_steps": 3, "fake_score_steps": 3, "skipped_updates": 0}
    assert content["global_step"] == 3 and len(content["optimizer_states"]) == 2
    assert content["one_step"] | {"architecture": None} == {
        "teacher": str(tiny_sd), "start_timestep": 625, "weights": True, "student_steps": 3,
        "architecture": None,
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
    assert torch.equal(load_generator(path).images(PROMPTS[:2], [7, 8]), output["images"])
    online = load_generator(path, weights="online").images(PROMPTS[:2], [7, 8])
    assert torch.equal(online, module.generator.images(PROMPTS[:2], [7, 8]))
    assert not torch.equal(online, output["images"])


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
        def student_loss(self, sample: StudentSample, *rest: Any) -> dict[str, Tensor]:
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
        def student_loss(self, sample: StudentSample, *rest: Any) -> dict[str, Tensor]:
            seen.append(sample.condition)
            return super().student_loss(sample, *rest)

    module = distillation(tiny_sd, Watch())
    fit(module, tmp_path, 1)
    batch = next(iter(prompt_data().train_dataloader()))
    expected = module.generator.prompt_encoder.encode(batch["prompts"])
    torch.testing.assert_close(
        seen[0].tensors["encoder_hidden_states"], expected.tensors["encoder_hidden_states"]
    )
