"""Weight interpolation: exact where it must be, and refused where a mixture would mean nothing."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError
from lightning_modules.diffusion.steps import Steps
from lightning_modules.networks.interpolation import (
    check_mergeable,
    interpolate,
    merge_students,
    merged_weights,
    stored_dtype,
)
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.lora import StudentLoraSettings
from lightning_modules.networks.pipeline_folder import export_student
from lightning_modules.networks.student import LoadedStudent, load_student, student_path
from tests.conftest import WIDTH
from tests.test_generate_export import other_unet, write_checkpoint
from tests.tiny_distillation import adam, distillation, fit

FACTS = {"teacher": "assets/some", "student_steps": 40}


@pytest.fixture
def student(tiny_sd: Path) -> Callable[..., LoadedStudent]:
    """Students of the tiny teacher whose weights depend on a seed."""

    def make(seed: int, start: int = 625, **facts: Any) -> LoadedStudent:
        parts = load_parts(tiny_sd)
        parts.denoiser = copy.deepcopy(other_unet(tiny_sd, seed))
        return LoadedStudent(parts, Steps((start,)), "ema", {**FACTS, **facts})

    return make


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def same_bits(first: Any, second: Any) -> bool:
    """Whether two state dicts are equal bit for bit, the sign of zero included."""
    assert first.keys() == second.keys()
    return all(torch.equal(bits(first[name]), bits(second[name])) for name in first)


def with_odd_values(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The smallest and largest values, zeros of both signs, and a wide range of sizes in one weight."""
    flat = unet.conv_in.weight.data.view(-1)
    flat[:6] = torch.tensor([-0.0, 0.0, 1e-45, -3e38, 3e38, 1.1754944e-38])
    flat[6:206] = torch.logspace(-40, 38, 200) * torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0)
    return unet


# --- the formula --------------------------------------------------------------------------------------


def test_formula_and_order() -> None:
    first, second = torch.tensor([1.0, -2.0]), torch.tensor([5.0, 2.0])
    assert interpolate(first, second, 0.25).tolist() == [4.0, 1.0]
    assert interpolate(first, second, 1.5).tolist() == [-1.0, -4.0]
    # in float64: the sum in float32 would lose the difference of 2^-30
    tiny = interpolate(torch.tensor([1.0]), torch.tensor([-1.0 + 2.0**-24]), 0.5)
    assert tiny.item() == 2.0**-25


def test_every_weight_is_mixed(student: Callable[..., LoadedStudent]) -> None:
    first, second = student(1), student(2)
    before = copy.deepcopy([side.parts.denoiser.state_dict() for side in (first, second)])
    merged = merge_students(first, second, 0.25)
    weights = merged.parts.denoiser.state_dict()
    for name, tensor in before[0].items():
        assert not torch.equal(weights[name], tensor)
        expected = (0.25 * tensor.double() + 0.75 * before[1][name].double()).float()
        assert torch.equal(weights[name], expected)
    assert all(
        same_bits(side.parts.denoiser.state_dict(), state) for side, state in zip((first, second), before)
    )
    assert merged.start_timestep == 625 and merged.weights == "merged" and not merged.parts.denoiser.training
    assert len(merged.parts.scheduler.betas) == 626
    assert merged.facts == {
        "teacher": "assets/some", "weights": "merged", "merged": "0.25 * first + 0.75 * second",
        "merge_weight": 0.25, "first_weights": "ema", "first_student_steps": 40, "second_weights": "ema",
        "second_student_steps": 40,
    }  # fmt: skip


def test_ends_are_the_models_bit_for_bit(student: Callable[..., LoadedStudent]) -> None:
    first, second = student(1), student(2)
    with_odd_values(first.parts.denoiser)
    assert same_bits(
        merge_students(first, second, 1.0).parts.denoiser.state_dict(), first.parts.denoiser.state_dict()
    )
    assert same_bits(
        merge_students(first, second, 0).parts.denoiser.state_dict(), second.parts.denoiser.state_dict()
    )
    assert not same_bits(first.parts.denoiser.state_dict(), second.parts.denoiser.state_dict())


@pytest.mark.parametrize("weight", [0.0, 1e-9, 0.1, 1 / 3, 0.5, 1 - 1e-9, 1.0, -0.5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_with_itself_is_itself(tiny_sd: Path, weight: float, dtype: torch.dtype) -> None:
    unet = copy.deepcopy(other_unet(tiny_sd, 1))
    if dtype == torch.float32:
        with_odd_values(unet)
    stored = {name: tensor.to(dtype) for name, tensor in unet.state_dict().items()}
    unet.load_state_dict(stored)  # as a half-precision folder is loaded
    merged = merged_weights(unet, unet, weight, dtype)
    assert same_bits({name: tensor.to(dtype) for name, tensor in merged.items()}, stored)


def test_the_second_is_rounded_to_the_dtype_of_the_first(tiny_sd: Path) -> None:
    first, second = other_unet(tiny_sd, 1), other_unet(tiny_sd, 2)
    merged = merged_weights(first, second, 0.0, torch.float16)
    for name, tensor in second.state_dict().items():
        assert torch.equal(merged[name], tensor.half().float())


def test_extrapolation_is_warned_and_nonsense_refused(student: Callable[..., LoadedStudent]) -> None:
    first, second = student(1), student(2)
    with pytest.warns(UserWarning, match=r"1\.5 lies outside \[0, 1\]"):
        merged = merge_students(first, second, 1.5)
    name = "conv_in.weight"
    a, b = (side.parts.denoiser.state_dict()[name].double() for side in (first, second))
    assert torch.equal(merged.parts.denoiser.state_dict()[name], (1.5 * a - 0.5 * b).float())
    for weight in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="must be a finite number"):
            merge_students(first, second, weight)
    with (
        pytest.warns(UserWarning, match="outside"),
        pytest.raises(UserError, match=r"merged conv_in\.weight is not finite in float16"),
    ):
        merge_students(first, second, 1e9, torch.float16)


def test_a_trained_lora_student_is_folded_first(tiny_sd: Path, tmp_path: Path) -> None:
    lora = StudentLoraSettings(rank=2, alpha=4.0)
    module = distillation(tiny_sd, student=adam(1e-2), student_lora=lora)
    fit(module, tmp_path, 2).save_checkpoint(tmp_path / "lora.ckpt")
    trained = load_student(tmp_path / "lora.ckpt", "online")
    teacher = load_parts(tiny_sd).denoiser
    for weight in (0.0, 0.25):
        first = load_student(write_checkpoint(tmp_path / "full.ckpt", tiny_sd), "online")
        merged = merge_students(first, trained, weight)
        assert merged.parts.denoiser.state_dict().keys() == teacher.state_dict().keys()
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        a, b = (unet.state_dict()[name].double() for unet in (first.parts.denoiser, trained.parts.denoiser))
        assert torch.equal(merged.parts.denoiser.state_dict()[name], (weight * a + (1 - weight) * b).float())
    with torch.no_grad():
        plain, expected, found = (
            unet.eval()(*_inputs(), return_dict=False)[0]
            for unet in (
                teacher,
                module.generator.student,
                merge_students(first, trained, 0.0).parts.denoiser,
            )
        )
    assert (expected - plain).norm() > 1e-3 * plain.norm()  # the adapter has learned something
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return latents, torch.tensor([625, 625]), torch.randn(2, 16, WIDTH, generator=generator)


# --- what fits together -------------------------------------------------------------------------------


def rebuilt(student: LoadedStudent, **settings: Any) -> LoadedStudent:
    """The student with other settings of its UNet, and the same weights where their shapes allow it."""
    unet = UNet2DConditionModel.from_config({**student.parts.denoiser.config, **settings})
    if [p.shape for p in unet.parameters()] == [p.shape for p in student.parts.denoiser.parameters()]:
        unet.load_state_dict(student.parts.denoiser.state_dict())
    student.parts.denoiser = unet.eval()
    return student


def test_other_architectures_are_named(student: Callable[..., LoadedStudent]) -> None:
    wide = rebuilt(student(2), block_out_channels=(8, 32))
    with pytest.raises(UserError, match=r"down_blocks\.0\.downsamplers|down_blocks\.1") as caught:
        check_mergeable(student(1), wide)
    assert "[16, 8, 3, 3] in the first and has shape [32, 8, 3, 3] in the second" in str(caught.value)
    deep = rebuilt(student(2), layers_per_block=2)
    with pytest.raises(UserError, match=r"\S+ has shape .* in the first and .* in the second"):
        check_mergeable(deep, student(1))
    heads = rebuilt(student(2), attention_head_dim=4)  # equal shapes, another function
    with pytest.raises(UserError, match="attention_head_dim is 2 in the first and 4 in the second"):
        check_mergeable(student(1), heads)
    same = rebuilt(student(2), attention_head_dim=(2, 2), upcast_attention=True)  # the same function
    assert check_mergeable(student(1), same) == Steps((625,))
    with pytest.warns(UserWarning, match=r"latents of 8 \(first\) and 16"):
        check_mergeable(student(1), rebuilt(student(2), sample_size=16))


def test_other_meanings_of_the_weights_are_refused(
    student: Callable[..., LoadedStudent], tiny_sd_v: Path
) -> None:
    first, second = student(1), student(2)
    second.parts.scheduler = load_parts(tiny_sd_v).scheduler
    with pytest.raises(
        UserError, match="prediction_type is epsilon in the first and v_prediction in the second"
    ):
        merge_students(first, second, 0.5)
    with pytest.raises(UserError, match="first model starts at timestep 625, the second at 999"):
        merge_students(first, student(2, start=999), 0.5)
    second = student(2)
    second.parts.scheduler = type(second.parts.scheduler).from_config(
        second.parts.scheduler.config, beta_end=0.02
    )
    with pytest.raises(UserError, match=r"alpha_bar at timestep \d+ is .* in the first"):
        merge_students(first, second, 0.5)


def test_other_text_encoders_are_refused_and_rounded_ones_accepted(
    student: Callable[..., LoadedStudent],
) -> None:
    first = student(1)
    rounded = student(2)
    rounded.parts.text_encoders[0].bfloat16().float()
    rounded.parts.vae.half().float()
    assert check_mergeable(first, rounded) == Steps((625,))
    trained = student(2)
    next(trained.parts.text_encoders[0].parameters()).data[3] += 0.1
    with pytest.raises(
        UserError, match=r"different text encoders, where .*token_embedding.* differs by up to 0\.1"
    ):
        check_mergeable(first, trained)
    longer = student(2)
    longer.parts.tokenizers[0].model_max_length = 8
    with pytest.raises(UserError, match=r"model_max_length \(tokenizer\) is 16 in the first and 8"):
        check_mergeable(first, longer)
    worded = student(2)
    worded.parts.tokenizers[0].add_tokens(["<new>"])
    with pytest.raises(UserError, match="hash of the vocabulary"):
        check_mergeable(first, worded)


def test_other_autoencoders(student: Callable[..., LoadedStudent]) -> None:
    first, tuned, scaled = student(1), student(2), student(2)
    next(tuned.parts.vae.decoder.parameters()).data += 0.1
    with pytest.warns(UserWarning, match="The merged one keeps the first's"):
        merged = merge_students(first, tuned, 0.5)
    assert merged.parts.vae is first.parts.vae
    scaled.parts.vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(UserError, match=r"scaling_factor is 0\.7 in the first and 0\.5"):
        merge_students(first, scaled, 0.5)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_teacher_starts_where_the_student_does(
    student: Callable[..., LoadedStudent], tiny_sd: Path, swapped: bool
) -> None:
    pair = [student(1), load_student(tiny_sd)]
    first, second = reversed(pair) if swapped else pair
    with pytest.warns(
        UserWarning, match=f"The {'first' if swapped else 'second'} model is a multi-step model"
    ):
        merged = merge_students(first, second, 0.5)
    assert merged.start_timestep == 625 and len(merged.parts.scheduler.betas) == 626
    assert merge_students(load_student(tiny_sd), load_student(tiny_sd), 0.5).start_timestep == 999


# --- what the user names ------------------------------------------------------------------------------


def test_stored_dtype(tiny_sd: Path, own_sd: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert stored_dtype(str(export_student(parts.denoiser, parts, 625, tmp_path / "out", dtype))) == dtype
    assert stored_dtype(str(write_checkpoint(tmp_path / "a.ckpt", tiny_sd))) == torch.float32
    parts.denoiser.half().save_pretrained(own_sd / "unet", max_shard_size="50KB")
    (own_sd / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert len(list((own_sd / "unet").glob("*.safetensors"))) > 1
    assert stored_dtype(str(own_sd)) == torch.float16
    pickled = shutil.copytree(tiny_sd, tmp_path / "pickled")
    file = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    torch.save(weights, file.with_suffix(".bin"))
    file.unlink()
    assert stored_dtype(str(pickled)) == torch.bfloat16


def test_a_run_folder_stands_for_its_checkpoint(tiny_sd: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/x/version_3"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps({}))
    with pytest.raises(UserError, match="holds no checkpoints/best.ckpt or last.ckpt yet"):
        student_path(str(run))
    with pytest.raises(UserError, match=r"holds the runs version_3\. Give one of them"):
        student_path(str(run.parent))
    (run / "checkpoints").mkdir()
    (run / "checkpoints/last.ckpt").touch()
    assert student_path(str(run)) == str(run / "checkpoints/last.ckpt")
    (run / "checkpoints/best.ckpt").mkdir()  # as it is in shards
    assert student_path(str(run)) == str(run / "checkpoints/best.ckpt")
    for name in (str(tiny_sd), "owner/model", "./nowhere", str(run / "checkpoints/last.ckpt")):
        assert student_path(name) == name
