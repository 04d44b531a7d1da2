"""The teacher and the fake score on one set of weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from lightning_modules.diffusion.condition import Condition
from lightning_modules.networks.loading import load_parts, noise_schedule
from lightning_modules.networks.lora import LoraSettings
from lightning_modules.networks.roles import ScoreModels

TARGETS = ["to_q", "to_v"]


def batch(size: int = 2) -> tuple[Tensor, Tensor, Condition]:
    """Noised latents, timesteps and random text for the tiny UNet."""
    g = torch.Generator().manual_seed(3)
    text = torch.randn(size, 16, 16, generator=g)
    condition = Condition({"encoder_hidden_states": text}, {"encoder_hidden_states": torch.zeros(1, 16, 16)})
    return torch.randn(size, 4, 8, 8, generator=g), torch.arange(1, size + 1) * 300, condition


def models(path: Path, lora: LoraSettings | None = None, full: bool = False) -> ScoreModels:
    parts = load_parts(path)
    torch.manual_seed(0)  # for the adapter's start
    settings = None if full else (lora or LoraSettings(rank=4, alpha=8, targets=TARGETS))
    schedule = noise_schedule(parts.scheduler, parts.image_tokens, parts.backbone)
    return ScoreModels(parts.denoiser, schedule, settings)


def disturb(scores: ScoreModels) -> None:
    """Give the fake score other weights than its start, where LoRA equals the teacher."""
    with torch.no_grad():
        for parameter in scores.fake_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("full", [False, True])
def test_the_teacher_is_the_original_bit_for_bit(tiny_sd: Path, full: bool) -> None:
    x, t, condition = batch()
    unet = load_parts(tiny_sd).denoiser
    original = unet(x, t, condition.tensors["encoder_hidden_states"]).sample
    scores = models(tiny_sd, full=full)
    assert torch.equal(scores.fake_score(x, t, condition).epsilon, original)  # B = 0, or a copy
    disturb(scores)
    scores.train()
    assert torch.equal(scores.teacher(x, t, condition).epsilon, original)
    assert (scores.fake_score(x, t, condition).epsilon - original).abs().max() > 1e-3
    assert torch.equal(scores.teacher(x, t, condition).epsilon, original)


@pytest.mark.parametrize("full", [False, True])
def test_fifty_steps_of_the_fake_score_leave_the_teacher_alone(tiny_sd: Path, full: bool) -> None:
    x, t, condition = batch()
    scores = models(tiny_sd, full=full)
    fake = {id(p) for p in scores.fake_parameters()}
    before = {n: p.detach().clone() for n, p in scores.named_parameters() if id(p) not in fake}
    original = scores.teacher(x, t, condition).epsilon.clone()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    optimizer = torch.optim.Adam(scores.fake_parameters(), lr=1e-2)
    losses = []
    for step in range(50):
        if step % 10 == 0:
            scores.teacher(x, t, condition, guidance_scale=4.5)
        loss = (scores.fake_score(x, t, condition).epsilon - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = dict(scores.named_parameters())
    assert before and all(torch.equal(after[n], p) and after[n].grad is None for n, p in before.items())
    assert torch.equal(scores.teacher(x, t, condition).epsilon, original)


def test_exactly_the_adapter_is_trainable(tiny_sd: Path) -> None:
    scores = models(tiny_sd)
    trainable = {n for n, p in scores.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in scores.named_parameters() if ".lora_" in n} and trainable
    # 2 matrices for each of 2 targets, in self- and cross-attention of 1 (down) + 1 (middle) + 2 (up) blocks
    assert len(trainable) == 2 * 2 * 2 * 4 == len(scores.fake_parameters())
    assert {id(p) for p in scores.parameters() if p.requires_grad} == {
        id(p) for p in scores.fake_parameters()
    }


@pytest.mark.parametrize("frozen", [False, True])
def test_switching_keeps_every_requires_grad_flag(tiny_sd: Path, frozen: bool) -> None:
    x, t, condition = batch()
    scores = models(tiny_sd)
    for parameter in scores.fake_parameters():
        parameter.requires_grad_(not frozen)  # as Lightning's toggle_optimizer does in the student's turn
    flags = {n: p.requires_grad for n, p in scores.named_parameters()}
    for _ in range(2):
        with scores.teacher_network():
            assert {n: p.requires_grad for n, p in scores.named_parameters()} == flags
        scores.teacher(x, t, condition)
        scores.fake_score(x, t, condition)
        assert {n: p.requires_grad for n, p in scores.named_parameters()} == flags


def test_the_adapter_state_survives_exceptions_and_nesting(tiny_sd: Path) -> None:
    x, t, condition = batch()
    scores = models(tiny_sd)
    disturb(scores)
    on, off = scores.fake_score(x, t, condition).epsilon, scores.teacher(x, t, condition).epsilon

    def now() -> Tensor:
        return scores.base(x, t, condition.tensors["encoder_hidden_states"]).sample

    assert torch.equal(now(), on)
    with pytest.raises(RuntimeError, match="inside"), scores.adapter(False):
        raise RuntimeError("inside")
    assert torch.equal(now(), on)
    with pytest.raises(ValueError, match="prompts"):
        scores.teacher(x, t, condition[:1])
    assert torch.equal(now(), on)
    with scores.adapter(False):
        with scores.adapter(True):
            assert torch.equal(now(), on)
        assert torch.equal(scores.fake_score(x, t, condition).epsilon, on)
        assert torch.equal(now(), off)
    assert torch.equal(now(), on)


def test_gradients_reach_the_input_through_both_roles(tiny_sd: Path) -> None:
    x, t, condition = batch()
    scores = models(tiny_sd)
    disturb(scores)
    for role in (scores.teacher, scores.fake_score):
        leaf = x.clone().requires_grad_()
        role(leaf, t, condition).x0.sum().backward()
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    assert all(p.grad is not None for p in scores.fake_parameters())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("role", ["teacher", "fake_score"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_sd: Path, role: str, full: bool) -> None:
    """Blocks are recomputed as the role they were called as, whatever is switched on by then."""
    x, t, condition = batch()
    found = []
    for checkpointing in (False, True):
        scores = models(tiny_sd, full=full)
        disturb(scores)
        if checkpointing:
            scores.enable_gradient_checkpointing()
        leaf = x.clone().requires_grad_()
        loss = getattr(scores, role)(leaf, t, condition, guidance_scale=2.0).x0.square().mean()
        for _ in range(2):  # a graph that is kept is recomputed every time
            with scores.adapter(role == "teacher"):
                loss.backward(retain_graph=True)
        trained = [p.grad for p in scores.fake_parameters() if p.grad is not None]
        assert len(trained) == (0 if role == "teacher" else len(scores.fake_parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in (leaf.grad, *trained)]))
        assert scores.full_copy is not None or not scores._adapter_layers[0].disable_adapters
    assert found[0].abs().max() > 0 and torch.equal(*found)


def test_gradient_checkpointing_keeps_fewer_activations(tiny_sd: Path) -> None:
    x, t, condition = batch()
    kept = []
    for checkpointing in (False, True):
        scores, saved = models(tiny_sd), 0
        if checkpointing:
            scores.enable_gradient_checkpointing()

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            scores.fake_score(x, t, condition)
        kept.append(saved)
    assert kept[1] < 0.5 * kept[0]


def test_guidance_is_in_kappa_form(tiny_sd: Path) -> None:
    x, t, condition = batch()
    scores = models(tiny_sd)
    with_text = scores.teacher(x, t, condition).epsilon
    without = scores.teacher(x, t, condition.without_text()).epsilon
    guided = scores.teacher(x, t, condition, guidance_scale=4.5).epsilon
    torch.testing.assert_close(guided, without + 4.5 * (with_text - without), rtol=1e-4, atol=1e-5)


def test_dropout_touches_the_adapter_only(tiny_sd: Path) -> None:
    x, t, condition = batch()
    scores = models(tiny_sd, LoraSettings(rank=4, alpha=8, targets=TARGETS, dropout=0.5)).train()
    disturb(scores)
    assert not scores.base.training
    assert torch.equal(scores.teacher(x, t, condition).epsilon, scores.teacher(x, t, condition).epsilon)
    assert not torch.equal(
        scores.fake_score(x, t, condition).epsilon, scores.fake_score(x, t, condition).epsilon
    )
    scores.eval()
    assert torch.equal(scores.fake_score(x, t, condition).epsilon, scores.fake_score(x, t, condition).epsilon)


def test_folding_the_adapter_in_computes_the_same(tiny_sd: Path) -> None:
    """Without gradients; the base's tensors return bit for bit, also when the call raises."""
    x, t, condition = batch()
    scores = models(tiny_sd)
    disturb(scores)
    layer = scores._adapter_layers[0]
    before = {name: p.detach().clone() for name, p in scores.named_parameters()}
    teacher = scores.teacher(x, t, condition).epsilon
    with_gradient = scores.fake_score(x, t, condition).epsilon
    seen: list[Tensor] = []
    handle = scores.base.register_forward_pre_hook(
        lambda *_: seen.append(layer.get_base_layer().weight.clone())
    )
    with torch.no_grad():
        folded = scores.fake_score(x, t, condition).epsilon
        with pytest.raises(ValueError, match="prompts"):
            scores.fake_score(x, t, condition[:1])
        handle.remove()
        handle = scores.base.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scores.fake_score(x, t, condition)
    handle.remove()
    torch.testing.assert_close(folded, with_gradient, rtol=1e-4, atol=1e-6)
    assert (folded - teacher).abs().max() > 1e-3
    assert not torch.equal(seen[0], layer.get_base_layer().weight), "the adapter was not folded in"
    assert all(torch.equal(p, before[name]) for name, p in scores.named_parameters())
    assert torch.equal(scores.fake_score(x, t, condition).epsilon, with_gradient)


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_that_drops_inputs_is_not_folded_in(tiny_sd: Path, training: bool) -> None:
    x, t, condition = batch()
    scores = models(tiny_sd, LoraSettings(rank=4, alpha=8, targets=TARGETS, dropout=0.5)).train(training)
    disturb(scores)
    weight = scores._adapter_layers[0].get_base_layer().weight
    original, folded = weight.detach().clone(), []
    scores.base.register_forward_pre_hook(lambda *_: folded.append(not torch.equal(weight, original)))
    with torch.no_grad():
        first, second = (scores.fake_score(x, t, condition).epsilon for _ in range(2))
    assert folded == [not training] * 2
    assert torch.equal(first, second) is not training


def test_frozen_weights_may_be_bf16_and_the_adapter_stays_fp32(tiny_sd: Path) -> None:
    x, t, condition = batch()
    parts = load_parts(tiny_sd)
    scores = ScoreModels(
        parts.denoiser.bfloat16(), noise_schedule(parts.scheduler), LoraSettings(4, 8.0, TARGETS)
    )
    assert {p.dtype for p in scores.fake_parameters()} == {torch.float32}
    assert scores.fake_score(x, t, condition).x0.dtype == torch.float32


def test_unmatched_targets_are_named_with_what_there_is(tiny_sd: Path) -> None:
    with pytest.raises(UserError, match=r"\['to_qq'\] match no layer.*to_k.*to_q"):
        models(tiny_sd, LoraSettings(rank=4, alpha=8, targets=["to_q", "to_qq"]))
    with pytest.raises(UserError, match="rank"):
        LoraSettings(rank=0)


def test_every_available_target_can_be_used(tiny_sd: Path) -> None:
    x, t, condition = batch()
    scores = models(tiny_sd, LoraSettings(rank=2, alpha=2, targets=["to_k", "to_out.0", "conv1", "proj_in"]))
    assert torch.equal(scores.fake_score(x, t, condition).epsilon, scores.teacher(x, t, condition).epsilon)


@pytest.mark.parametrize("full", [False, True])
def test_state_dict_holds_what_is_trained_and_loads_strictly(tiny_sd: Path, full: bool) -> None:
    x, t, condition = batch()
    scores, fresh = models(tiny_sd, full=full), models(tiny_sd, full=full)
    disturb(scores)
    outer, other = torch.nn.ModuleDict({"scores": scores}), torch.nn.ModuleDict({"scores": fresh})
    state = copy.deepcopy(outer.state_dict())
    assert len(state) == len(scores.fake_parameters())
    other.load_state_dict(state)  # strict
    assert torch.equal(fresh.fake_score(x, t, condition).epsilon, scores.fake_score(x, t, condition).epsilon)
    assert torch.equal(fresh.teacher(x, t, condition).epsilon, scores.teacher(x, t, condition).epsilon)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(dict(list(state.items())[1:]))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "scores.other": torch.zeros(1)})


def test_passes_without_gradient_in_slices(tiny_sd: Path) -> None:
    """Guidance makes six samples of three; features and passes with gradient stay whole."""
    x, t, condition = batch(3)
    scores, sizes = models(tiny_sd), list[int]()
    disturb(scores)
    scores.base.register_forward_hook(lambda network, inputs, output: sizes.append(len(inputs[0])))
    for role in (scores.teacher, scores.fake_score):
        with torch.no_grad():
            whole = role(x, t, condition, guidance_scale=3.0).epsilon
            role.most_at_once = 4
            sliced = role(x, t, condition, guidance_scale=3.0).epsilon
            role(x, t, condition, guidance_scale=3.0, features=["mid_block"])
        role(x, t, condition, guidance_scale=3.0)
        torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-5)
    assert sizes == [6, 4, 2, 6, 6] * 2


def test_qwens_guidance_keeps_the_norm_of_each_token_in_both_roles(
    backbone_folder: Callable[[str], Path],
) -> None:
    """As in its pipeline: 2 x 2 places of all channels have the norm that they have with text."""
    parts = load_parts(backbone_folder("qwen"))
    scores = models(backbone_folder("qwen"))
    disturb(scores)
    x, t = torch.randn(2, *parts.latent_shape), torch.tensor([300, 700])
    condition = parts.backbone.prompt_encoder(parts).encode(["a red cat", "a dog"])

    def norms(v: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(v.square().sum(1, keepdim=True), 2).mul(4).sqrt()

    for role in (scores.teacher, scores.fake_score):
        with torch.no_grad():
            with_text, without = (role(x, t, c).output for c in (condition, condition.without_text()))
            guided = role(x, t, condition, guidance_scale=4.5).output
        plain = without + 4.5 * (with_text - without)
        scale = norms(with_text) / norms(plain)
        assert (scale - 1).abs().max() > 1e-2
        expected = plain * torch.nn.functional.interpolate(scale, scale_factor=2)
        torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-5)


def test_a_distilled_scale_reaches_flux_in_both_roles(
    backbone_folder: Callable[[str], Path],
) -> None:
    """κ is an input of one pass with text, a number or one per sample."""
    parts = load_parts(backbone_folder("flux"))
    scores, calls = models(backbone_folder("flux")), list[Tensor]()
    disturb(scores)
    scores.base.register_forward_pre_hook(
        lambda network, args, inputs: calls.append(inputs["guidance"]), with_kwargs=True
    )
    x, t = torch.randn(2, *parts.latent_shape), torch.tensor([300, 700])
    condition = parts.backbone.prompt_encoder(parts).encode(["a red cat", "a dog"])
    for role in (scores.teacher, scores.fake_score):
        with torch.no_grad():
            outputs = [role(x, t, condition, kappa).output for kappa in (1.0, 4.5, torch.tensor([1.0, 4.5]))]
        expected = torch.stack([outputs[0][0], outputs[1][1]])
        torch.testing.assert_close(outputs[2], expected, rtol=1e-4, atol=1e-5)
        assert (outputs[1] - outputs[0]).abs().max() > 1e-4
    assert [kappa.tolist() for kappa in calls] == 2 * [[1.0, 1.0], [4.5, 4.5], [1.0, 4.5]]
