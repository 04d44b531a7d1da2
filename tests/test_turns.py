"""Turns that objectives plan: batches, further roles, features, direct terms, no fake score."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.objectives.base import (
    Inputs,
    Networks,
    Objective,
    Sampler,
    StudentSample,
    TeacherFacts,
    Terms,
    Turn,
)
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.parallel import FullySharded
from tests.distributed_runs import run_processes
from tests.test_distributed import adam_roles, notes, relative_distance, train
from tests.tiny_distillation import (
    PROMPTS,
    Hooks,
    adam,
    changed,
    distillation,
    fit,
    snapshot,
    watch_batches,
    watch_updates,
)

MID, DOWN = "mid_block", "down_blocks.0"


class Adversarial(SwiftBrush):
    """A head on the fake score's middle block, its own role; three fake-score turns on three batches."""

    roles = ("student", "fake_score", "discriminator")

    def __init__(self, layer: str = MID) -> None:
        super().__init__()
        self.layer = layer
        self.seen: list[tuple[str, list[float]]] = []

    def build(self, facts: TeacherFacts) -> None:
        super().build(facts)
        channels = facts.feature_shape(self.layer)[0]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Linear(channels, 1)

    def turns(self, step: int) -> Sequence[Turn]:
        fake = [Turn("fake_score", batch) for batch in range(3)]
        return [Turn("student"), *fake, Turn("discriminator")]

    def logit(self, sample: StudentSample, networks: Networks) -> Tensor:
        t = torch.full((len(sample.x0),), 100)
        prediction = networks.fake_score(sample.x0, t, sample.condition, 2.0, features=[self.layer])
        return self.head(prediction.features[self.layer].mean((2, 3)))

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        losses, numbers = super().student_loss(sample, networks, random)
        return Terms(losses | {"fool": F.softplus(-self.logit(sample, networks)).mean()}, numbers)

    def discriminator_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        return Terms({"detect": F.softplus(self.logit(sample, networks)).mean()})

    def loss(self, role: str, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        self.seen.append((role, sample.x0.detach().flatten().tolist()))
        return super().loss(role, sample, networks, random)

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        return [*self.head.parameters()] if role == "discriminator" else []


def adversarial(teacher: Path, **settings: Any) -> Any:
    roles = {"further_roles": {"discriminator": adam(1e-2)}}
    return distillation(teacher, settings.pop("objective", Adversarial()), **(roles | settings))


def test_turns_batches_and_whose_weights_move(tiny_sd: Path, tmp_path: Path) -> None:
    """Steps count student updates; each turn's gradient is in its own role's weights alone."""
    module = adversarial(tiny_sd)
    turns: list[tuple[str, set[str]]] = []

    def watcher(role: str, update: Callable[[], bool]) -> bool:
        before = snapshot(module)
        result = update()
        turns.append((role, {n.partition(".")[0] for n in changed(before, snapshot(module))}))
        assert all(p.grad is None for p in module.parameters())
        return result

    batches = watch_batches(module)
    watch_updates(module, watcher)
    run = fit(module, tmp_path, 2)
    step = [("student", {"student"}), *[("fake_score", {"scores"})] * 3, ("discriminator", {"objective"})]
    assert turns == step * 2
    assert run.global_step == 2 and run.callback_metrics["counts/fake_score_steps"] == 6
    assert module.updates == {"student": 2, "fake_score": 6, "discriminator": 2}
    assert [len(batch) for batch in batches] == [12, 12]
    assert [len(optimizer.param_groups) for optimizer in run.optimizers] == [1, 1, 1]
    assert {"objective.head.weight", "objective.head.bias"} <= module.state_dict().keys()
    # turns on one batch share its samples; other batches have prompts and noise of their own
    samples = [values for _, values in module.objective.seen[:5]]
    assert samples[0] == samples[1] == samples[4]
    assert samples[1] != samples[2] != samples[3] != samples[1]
    assert len(set(batches[0])) == 9, "a step's batches follow one another in the stream of prompts"


def test_batches_of_a_step_have_their_own_random_numbers() -> None:
    places = torch.arange(3)
    first, zero, second = (StepRandom(0, 5, places, batch=k) for k in (0, 0, 1))
    plain = StepRandom(0, 5, places)
    for draw in (lambda r: r.normal("a", (2,)), lambda r: r.uniform("a"), lambda r: r.shared_uniform("a")):
        assert torch.equal(torch.as_tensor(draw(first)), torch.as_tensor(draw(zero)))
        assert torch.equal(torch.as_tensor(draw(first)), torch.as_tensor(draw(plain)))
        assert not torch.equal(torch.as_tensor(draw(first)), torch.as_tensor(draw(second)))


def test_features_are_those_of_the_pass_with_text(tiny_sd: Path) -> None:
    """With guidance, too, where the network sees twice the batch; of the role that is asked."""
    module = adversarial(tiny_sd)
    module.configure_model()
    nn.init.normal_(next(p for n, p in module.scores.named_parameters() if "lora_B" in n), std=0.5)
    condition = module.generator.prompt_encoder.encode(PROMPTS[:2])
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 600])
    caught: list[Tensor] = []
    hook = module.scores.base.mid_block.register_forward_hook(lambda _, __, output: caught.append(output))
    with torch.no_grad():
        plain = module.networks.fake_score(x_t, t, condition, features=[MID, DOWN])
        guided = module.networks.fake_score(x_t, t, condition, 3.0, features=[MID])
        teacher = module.networks.teacher(x_t, t, condition, features=[MID])
    hook.remove()
    assert torch.equal(plain.features[MID], caught[0])
    torch.testing.assert_close(guided.features[MID], caught[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(teacher.features[MID], plain.features[MID], atol=1e-4)
    facts = module.objective.head.in_features
    assert plain.features[MID].shape == (2, facts, *plain.features[MID].shape[2:])
    assert len(plain.features[DOWN]) == 2 and not module.networks.teacher(x_t, t, condition).features


def test_a_layer_that_is_not_there(tiny_sd: Path) -> None:
    module = adversarial(tiny_sd, objective=Adversarial("midblock"))
    with pytest.raises(UserError, match="no layer 'midblock'; near it are mid_block"):
        module.configure_model()


def check_resume(teacher: Path, folder: Path, objective: Callable[[], Objective], **further: Any) -> set[str]:
    """A run of three steps, and one continued after the second: the same bits; names of weights."""

    def run(name: str, steps: int, ckpt: Path | None = None) -> dict[str, Any]:
        train(
            teacher, folder / name, steps=steps, ckpt=ckpt, save=True, every=1, objective=objective(),
            **adam_roles(), **further,
        )  # fmt: skip
        return notes(folder / name)

    whole = run("whole", 3)
    resumed = run("resumed", 3, folder / "whole" / "checkpoints" / "step_2.ckpt")
    assert [s["prompts"] for s in whole["steps"][2:]] == [s["prompts"] for s in resumed["steps"]]
    for kind in ("weights", "ema"):
        assert not changed(whole[kind], resumed[kind])
    return set(whole["weights"])


def check_processes(
    teacher: Path, folder: Path, strategy: str, objective: Callable[[], Objective], **further: Any
) -> None:
    """Two processes, with or without shards, have the losses of one; in float64, which training refuses."""

    def run(name: str, **more: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_modules.distillation.check_trainer", lambda trainer: None)
            train(teacher, folder / name, objective=objective(), double=True, **more, **further)

    chosen = FullySharded() if strategy == "shards" else "ddp"
    run_processes(2, lambda: run("two", strategy=chosen, devices=2), folder / "log")
    run("one")
    one, ranks = notes(folder / "one"), [notes(folder / "two", rank) for rank in (0, 1)]
    assert relative_distance(ranks[0]["weights"], ranks[1]["weights"]) == 0
    first, second = ([step["losses"] for step in run["steps"]] for run in (one, ranks[0]))
    assert len(first) == len(second) and first[0].keys() == second[0].keys()
    for name in first[0]:
        values = [losses[name] for losses in first]
        assert max(map(abs, values)) > 1e-4, f"{name} is too small to be compared"
        assert [losses[name] for losses in second] == pytest.approx(values, rel=1e-6, abs=1e-9), name


def test_resume_is_the_uninterrupted_run(tiny_sd: Path, tmp_path: Path) -> None:
    """Heads and their optimizer, the prompts and random numbers of all batches."""
    further = {"discriminator": adam(1e-2)}
    names = check_resume(tiny_sd, tmp_path, Adversarial, further_roles=further)
    assert "objective.head.weight" in names


@pytest.mark.parametrize("strategy", ["ddp", "shards"])
def test_two_processes_are_one(strategy: str, tiny_sd: Path, tmp_path: Path) -> None:
    further = {"discriminator": adam(1e-2)}
    check_processes(tiny_sd, tmp_path, strategy, Adversarial, further_roles=further)


class Consistent(Objective):
    """No fake score; a term that calls the student itself, beside one on its samples."""

    roles = ("student",)

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        t = torch.full((len(sample.x0),), 300)
        noised = networks.schedule.add_noise(sample.x0.detach(), random.normal("n", sample.x0.shape[1:]), t)
        direct = networks.student(noised, t, sample.condition).x0
        return Terms({"near": sample.x0.square().mean(), "same": (direct - 1).square().mean()})


@pytest.mark.parametrize("micro", [None, 2])
def test_a_term_that_calls_the_student_reaches_its_weights(
    micro: int | None, tiny_sd: Path, tmp_path: Path
) -> None:
    """The update's gradient is that of the sum of both terms, by autograd without any leaf in between."""
    module = distillation(tiny_sd, Consistent(), fake_score=None)
    compared: list[float] = []

    def watcher(role: str, update: Callable[[], bool]) -> bool:
        random = StepRandom(module.seed, module.student_steps, torch.arange(4))
        condition = module.generator.prompt_encoder.encode(batches[-1])
        x0 = module.generator.latents(random.normal("start", (4, 8, 8)), condition)
        t = torch.full((4,), 300)
        noised = module.networks.schedule.add_noise(x0.detach(), random.normal("n", (4, 8, 8)), t)
        loss = x0.square().mean() + (module.networks.student(noised, t, condition).x0 - 1).square().mean()
        expected = torch.autograd.grad(loss, list(module.student.parameters()))
        for (name, p), gradient in zip(module.student.named_parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-10, msg=name)
        compared.append(max(gradient.abs().max().item() for gradient in expected))
        return update()

    batches = watch_batches(module)
    watch_updates(module, watcher)
    fit(
        module, tmp_path, 2, Hooks(on_start=lambda m: m.double()), micro_batch_size=micro, log_every_n_steps=1
    )
    assert len(compared) == 2 and min(compared) > 1e-6


def test_a_role_that_is_not_named_is_not_built(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, Consistent(), fake_score=None)
    run = fit(module, tmp_path, 1)
    assert len(run.optimizers) == 1
    assert not [name for name in module.state_dict() if not name.startswith("student.")]
    assert not [name for name, _ in module.named_parameters() if "lora" in name]
    assert "fake score x0" not in module.score_views(PROMPTS[:1], [0])
    with pytest.raises(ValueError, match="does not name fake_score"):
        module.networks.fake_score(torch.zeros(1, 4, 8, 8), torch.tensor([1]), None)  # type: ignore[arg-type]


class TwoSteps(SwiftBrush):
    """Samples in two steps, the gradient in the last; mixes the fake score towards the student afterwards."""

    def sample(self, student: Sampler, inputs: Inputs, random: StepRandom, role: str) -> StudentSample:
        noise = random.normal("start", student.latent_shape)
        with torch.no_grad():
            rough = student(noise, inputs.condition)
        t = torch.full((len(rough),), 300)
        x_t = self.schedule.add_noise(rough, random.normal("again", student.latent_shape), t)
        return StudentSample(student(x_t, inputs.condition, t), inputs.condition, x_t=x_t, t=t, k=1)

    def build(self, facts: TeacherFacts) -> None:
        self.schedule, self.updated = facts.schedule, list[str]()

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        assert sample.k == 1 and sample.x0.is_leaf and sample.x_t is not None and not sample.x_t.requires_grad
        self.seen = sample
        return super().student_loss(sample, networks, random)

    def after_update(self, role: str, networks: Networks) -> None:
        self.updated.append(role)


def test_the_objective_says_how_the_student_is_sampled(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, TwoSteps())
    before: dict[str, Tensor] = {}
    fit(module, tmp_path, 2, Hooks(on_start=lambda m: before.update(snapshot(m))))
    seen = module.objective.seen
    fresh = distillation(tiny_sd, TwoSteps())
    assert module.objective.updated == ["student", "fake_score"] * 2
    assert any(name.startswith("student.") for name in changed(before, snapshot(module)))
    assert seen.t.tolist() == [300] * 4 and fresh.objective.roles == ("student", "fake_score")


class Wrong(SwiftBrush):
    def __init__(self, turns: list[Turn], roles: tuple[str, ...] = ("student", "fake_score")) -> None:
        super().__init__()
        self.planned, self.roles = turns, roles

    def turns(self, step: int) -> Sequence[Turn]:
        return self.planned


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (Wrong([Turn("fake_score")]), {}, "plans the turns fake_score: exactly one must be the student's"),
        (Wrong([Turn("student"), Turn("student", 1)]), {}, "exactly one must be the student's"),
        (Wrong([Turn("student"), Turn("judge")]), {}, "turns of judge, which its roles don't name"),
        (Adversarial(), {}, "trains discriminator, and further_roles gives the optimization of none"),
        (SwiftBrush(), {"further_roles": {"judge": adam()}}, "gives the optimization of judge"),
        (SwiftBrush(), {"fake_score": None}, "trains a fake_score: give model.fake_score"),
    ],
)
def test_plans_that_cannot_be_followed(
    objective: Objective, settings: dict[str, Any], message: str, tiny_sd: Path
) -> None:
    with pytest.raises(UserError, match=message):
        distillation(tiny_sd, objective, **settings)


def test_a_role_without_weights(tiny_sd: Path, tmp_path: Path) -> None:
    objective = Wrong([Turn("student"), Turn("judge")], ("student", "fake_score", "judge"))
    module = distillation(tiny_sd, objective, further_roles={"judge": adam()})
    with pytest.raises(UserError, match="names the role judge, but gives it no weights"):
        fit(module, tmp_path, 1)


def test_an_objectives_weight_that_no_role_trains(tiny_sd: Path, tmp_path: Path) -> None:
    objective = SwiftBrush()
    objective.idle = nn.Linear(2, 1)
    objective.parameters_of = lambda role: [objective.idle.bias]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="a weight that no role trains, idle.weight"):
        fit(distillation(tiny_sd, objective), tmp_path, 1)
    objective.idle.weight.requires_grad = False
    fit(distillation(tiny_sd, objective), tmp_path, 1)
