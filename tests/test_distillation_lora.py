"""The LoRA student: what is trained, averaged, stored, and rebuilt from a small checkpoint."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from torch import Tensor

import cli
from callbacks.checkpoint import RunCheckpoint
from callbacks.start_summary import memory_table
from common.errors import UserError
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.generator import load_generator
from lightning_modules.networks.backbones.flux2 import Flux2Klein
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.lora import (
    StudentAdapter,
    StudentBase,
    StudentLoraSettings,
    add_adapter,
    write_lora,
)
from lightning_modules.networks.pipeline_folder import export_student
from lightning_modules.networks.student import load_student
from tests.tiny_distillation import (
    PROMPTS,
    Hooks,
    changed,
    distillation,
    fit,
    snapshot,
    watch_updates,
)

LORA = StudentLoraSettings(rank=2, alpha=4.0, targets=["to_q", "to_v", "conv1"])


def lora_student(teacher: Path, **settings: object) -> OneStepDistillation:
    return distillation(teacher, student_lora=LORA, **settings)


def own_latents(module: OneStepDistillation) -> Tensor:
    condition = module.generator.prompt_encoder.encode(PROMPTS[:2])
    with torch.no_grad():
        return module.generator.latents(module.generator.noise([7, 8]), condition)


@pytest.fixture(scope="module")
def trained(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[OneStepDistillation, Path]:
    """A module after three steps, and its checkpoint."""
    folder = tmp_path_factory.mktemp("lora")
    module = lora_student(tiny_sd)
    fit(module, folder, 3, RunCheckpoint(), enable_checkpointing=True)
    return module, folder / "checkpoints" / "last.ckpt"


def test_paper_settings() -> None:
    settings = StudentLoraSettings()
    assert (settings.rank, settings.alpha) == (256, 512.0)
    with pytest.raises(UserError, match="LoRA rank is 0: it must be 1 to"):
        StudentLoraSettings(rank=0)


def test_starts_as_its_base_bit_for_bit(tiny_sd: Path) -> None:
    modules = [distillation(tiny_sd), lora_student(tiny_sd)]
    for module in modules:
        module.configure_model()
    assert torch.equal(own_latents(modules[0]), own_latents(modules[1]))


def test_only_adapters_have_gradients_and_move(tiny_sd: Path, tmp_path: Path) -> None:
    module = lora_student(tiny_sd)
    with_gradient: list[set[str]] = []

    def watcher(role: str, update: Callable[[], bool]) -> bool:
        if role == "student":
            with_gradient.append({name for name, p in module.named_parameters() if p.grad is not None})
        return update()

    watch_updates(module, watcher)
    before: dict[str, Tensor] = {}
    history: list[dict[str, Tensor]] = []
    hooks = Hooks(lambda m: before.update(snapshot(m)), lambda m: history.append(snapshot(m.student)))
    run = fit(module, tmp_path, 3, hooks, micro_batch_size=2)
    layers = [n for n, _ in load_parts(tiny_sd).denoiser.named_modules()]
    adapted = [n for n in layers if n.endswith((".to_q", ".to_v", ".conv1"))]
    names = {f"student.{n}.lora_{x}.student.weight" for n in adapted for x in "AB"}
    assert with_gradient == [names] * 3
    moved = changed(before, snapshot(module))
    assert moved == names | {n for n in before if ".fake_score." in n}
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-3
    # the average is of the adapter alone, by the usual rule
    assert module.ema is not None
    short = {name.removeprefix("student.") for name in names}
    assert set(module.ema.shadow) == short
    expected = {name: history[0][name] for name in short}
    for number, weights in enumerate(history[1:], start=2):
        decay = min(0.5, number / (9 + number))
        expected = {n: decay * expected[n] + (1 - decay) * weights[n] for n in short}
    for name in short:
        torch.testing.assert_close(module.ema.shadow[name], expected[name], rtol=0, atol=1e-6)
    own = snapshot(module.student)
    with module.evaluation_weights():
        assert changed(own, snapshot(module.student)) == changed(
            {n: own[n] for n in short}, dict(module.ema.shadow)
        )
    assert not changed(own, snapshot(module.student))


def test_checkpoint_is_small_and_names_its_base(
    trained: tuple[OneStepDistillation, Path], tiny_sd: Path
) -> None:
    module, path = trained
    content = torch.load(path, weights_only=True)
    adapter = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(content["state_dict"]) == adapter
    assert content["one_step"]["student_lora"] == {
        "rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v", "conv1"], "dropout": 0.0,
    }  # fmt: skip
    assert content["one_step"]["student_base"]["path"] == str(tiny_sd)
    student = {n: p for n, p in content["state_dict"].items() if n.startswith("student.")}
    unet = sum(p.numel() for p in load_parts(tiny_sd).denoiser.parameters())
    assert 0 < sum(p.numel() for p in student.values()) < unet / 4


@pytest.mark.parametrize("weights", ["ema", "online"])
def test_folded_is_unfolded(weights: str, trained: tuple[OneStepDistillation, Path], tiny_sd: Path) -> None:
    """The prediction of a plain UNet with the adapter folded in, relative to its size; and by hand."""
    module, path = trained
    loaded = load_student(path, weights)  # type: ignore[arg-type]
    assert set(loaded.parts.denoiser.state_dict()) == set(load_parts(tiny_sd).denoiser.state_dict())
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([625, 625]), torch.randn(2, 16, 16)
    assert module.ema is not None and module.student is not None
    with torch.no_grad():
        folded = loaded.parts.denoiser(x, t, text).sample
        with module.ema.swapped():
            average = module.student(x, t, text).sample
            shadow = copy.deepcopy(module.ema.shadow)
        unfolded = average if weights == "ema" else module.student(x, t, text).sample
        start = load_parts(tiny_sd).denoiser(x, t, text).sample
    assert (folded - unfolded).norm() < 1e-5 * unfolded.norm()
    assert (folded - start).norm() > 1e-3 * start.norm()
    if weights == "ema":  # W + alpha / rank * B A
        name = next(n.removesuffix(".lora_A.student.weight") for n in shadow if ".to_q.lora_A" in n)
        b, a = (shadow[f"{name}.lora_{x}.student.weight"] for x in "BA")
        base = load_parts(tiny_sd).denoiser.state_dict()[f"{name}.weight"]
        torch.testing.assert_close(loaded.parts.denoiser.state_dict()[f"{name}.weight"], base + 2.0 * b @ a)


def test_commands_read_it(trained: tuple[OneStepDistillation, Path], tmp_path: Path) -> None:
    module, path = trained
    batch = {"prompts": PROMPTS[:2], "indices": torch.tensor([7, 8]), "is_padding": torch.zeros(2).bool()}
    images = module.eval().validation_step(batch, 0)["images"]
    torch.testing.assert_close(load_generator(path).images(PROMPTS[:2], [7, 8]), images, rtol=0, atol=1e-5)
    cli.main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "out")])
    torch.testing.assert_close(
        load_generator(tmp_path / "out").images(PROMPTS[:2], [7, 8]), images, rtol=0, atol=1e-5
    )
    pictures = tmp_path / "pictures"
    for model in (path, path.parents[1]):  # the checkpoint, the run folder
        cli.main(["generate", "--model", str(model), "--prompt", PROMPTS[0], "--seed", "7",
                  "--output", str(pictures / model.name)])  # fmt: skip
        drawn = torch.from_numpy(np.array(Image.open(pictures / model.name / "0000.png"))) / 255
        torch.testing.assert_close(drawn.permute(2, 0, 1), images[0], rtol=0, atol=0.6 / 255)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")  # stock diffusers knows nothing of adapters
    noise = load_generator(path).noise([7, 8])
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": noise, "output_type": "pt"}
    torch.testing.assert_close(pipe(PROMPTS[:2], **settings).images, images, rtol=0, atol=1e-4)


def test_a_base_that_changed_is_refused(
    trained: tuple[OneStepDistillation, Path], own_sd: Path, tmp_path: Path
) -> None:
    module = lora_student(own_sd)
    fit(module, tmp_path, 1, RunCheckpoint(), enable_checkpointing=True)
    path = tmp_path / "checkpoints" / "last.ckpt"
    parts = load_parts(own_sd)
    with torch.no_grad():
        parts.denoiser.conv_out.bias += 1
    parts.denoiser.save_pretrained(own_sd / "unet")
    with pytest.raises(UserError, match=f"{path} holds a LoRA adapter .* weights of {own_sd}.*others now"):
        load_student(path)
    other = lora_student(own_sd)
    other.configure_model()
    with pytest.raises(UserError, match="the checkpoint holds a LoRA adapter"):
        other.on_load_checkpoint(torch.load(path, weights_only=True))
    shutil.rmtree(own_sd / "unet")
    with pytest.raises(UserError, match=f"The base of the LoRA student in {path} can't be loaded: .*unet"):
        load_student(path)


def test_lora_on_an_exported_student_and_on_another_checkpoint(tiny_sd: Path, tmp_path: Path) -> None:
    """The base is the initial student: first an export, then the LoRA checkpoint itself, folded."""
    parts = load_parts(tiny_sd)
    with torch.no_grad():
        parts.denoiser.conv_out.bias += 0.1
    start = export_student(parts.denoiser, parts, 625, tmp_path / "start", card={"teacher": "tiny"})
    for number in range(2):
        module = lora_student(tiny_sd, student_init=str(start))
        module.configure_model()
        expected = own_latents(module)
        folded = load_generator(start)
        with torch.no_grad():
            condition = folded.prompt_encoder.encode(PROMPTS[:2])
            assert torch.equal(folded.latents(folded.noise([7, 8]), condition), expected)
        fit(module, tmp_path / str(number), 2, RunCheckpoint(), enable_checkpointing=True)
        start = tmp_path / str(number) / "checkpoints" / "last.ckpt"
        with module.evaluation_weights():
            after = own_latents(module)
        again = load_generator(start)
        with torch.no_grad():
            torch.testing.assert_close(
                again.latents(again.noise([7, 8]), condition), after, rtol=0, atol=1e-4
            )
        assert (after - expected).abs().max() > 1e-3
        assert load_student(start).facts["student_init"] == module.network_settings.student_init


def test_a_full_students_checkpoint_does_not_fit(
    trained: tuple[OneStepDistillation, Path], tiny_sd: Path
) -> None:
    full = distillation(tiny_sd)
    full.configure_model()
    with pytest.raises(UserError, match="does not fit this distillation: .*student_lora"):
        full.on_load_checkpoint(torch.load(trained[1], weights_only=True))


def test_targets_that_match_nothing(tiny_sd: Path) -> None:
    module = distillation(tiny_sd, student_lora=StudentLoraSettings(targets=["to_x"]))
    with pytest.raises(UserError, match=r"LoRA targets \['to_x'\] match no layer"):
        module.configure_model()


def test_flux2_by_its_makers_names(tmp_path: Path) -> None:
    """What ComfyUI reads, read back by diffusers' converter: the same update of every layer."""
    torch.manual_seed(0)
    network = Flux2Transformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    targets = [
        "to_q",
        "to_v",
        "add_k_proj",
        "to_out.0",
        "single_transformer_blocks.0.attn.to_out",
        "to_qkv_mlp_proj",
        "linear_in",
        "x_embedder",
    ]
    lora = StudentLoraSettings(rank=2, alpha=6.0, targets=targets)
    add_adapter(network, lora)
    weights = {n: torch.randn_like(p) for n, p in network.named_parameters() if p.requires_grad}
    adapter = StudentAdapter(StudentBase("base", ""), lora, weights)
    write_lora(adapter, Flux2Klein(), tmp_path, torch.float32, {})
    read = [
        Flux2KleinPipeline.lora_state_dict(tmp_path, weight_name=name)
        for name in ("pytorch_lora_weights.safetensors", "comfyui.safetensors")
    ]
    layers = {n.removeprefix("transformer.").partition(".lora_")[0] for n in read[0]}
    absent = {"transformer_blocks.0.attn.to_k", *(f"transformer_blocks.0.attn.add_{x}_proj" for x in "qv")}
    assert {n.removeprefix("transformer.").partition(".lora_")[0] for n in read[1]} == layers | absent
    for layer in layers | absent:
        updates = [
            part[f"transformer.{layer}.lora_B.weight"] @ part[f"transformer.{layer}.lora_A.weight"]
            for part in read if f"transformer.{layer}.lora_A.weight" in part
        ]  # fmt: skip
        if layer in absent:
            assert not updates[0].any()
        else:
            b, a = (weights[f"{layer}.lora_{side}.student.weight"] for side in "BA")
            for update in updates:
                torch.testing.assert_close(update, 3.0 * b @ a)


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_sd: Path, tmp_path: Path) -> None:
    modules = [lora_student(tiny_sd, gradient_checkpointing=on) for on in (False, True)]
    for module in modules:
        fit(module, tmp_path, 2)
    assert not changed(snapshot(modules[0].student), snapshot(modules[1].student))


def test_memory_of_both_students(trained: tuple[OneStepDistillation, Path], tiny_sd: Path) -> None:
    """The adapter is trained, its base frozen; gradients and the average are the adapter's alone."""
    module, _ = trained
    parts = module.memory_parts()
    unet = sum(p.numel() for p in load_parts(tiny_sd).denoiser.parameters())
    adapter = sum(p.numel() for n, p in module.student.named_parameters() if "lora_" in n)
    assert parts["student (LoRA adapter)"] == (adapter, 4 * adapter, True)
    assert parts["student's base"] == (unet, 4 * unet, False)
    assert parts["student's moving average"][0] == adapter
    assert parts["gradients"][0] <= max(adapter, parts["fake score (LoRA adapter)"][0]) < unet
    assert "student (LoRA adapter)" in memory_table(parts) and "student's base" in memory_table(parts)


@pytest.mark.parametrize(("name", "checkpointing"), [("sd15", False), ("sd3", True)])
def test_three_roles_on_one_base_are_three_copies(
    name: str, checkpointing: bool, backbone_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same adapters after 20 steps, with the frozen weights in memory once."""
    teacher, runs = backbone_folder(name), []
    for share in (True, False):
        lora = StudentLoraSettings(rank=2, alpha=4.0, targets=["to_q", "to_k"], share_base=share)
        module = distillation(
            teacher, student_lora=lora, start_timestep=999, gradient_checkpointing=checkpointing
        )
        fit(module, tmp_path, 20)
        runs.append(module)
    weights = [{n: p for n, p in module.named_parameters() if p.requires_grad} for module in runs]
    assert weights[0].keys() == weights[1].keys() and any("fake_score" in n for n in weights[0])
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[0][key], value, rtol=0, atol=1e-6)
        assert value.any()  # B was zero at the start
    inside = [{id(p) for p in module.scores.base.parameters()} for module in runs]
    frozen = [[p for p in module.student.parameters() if not p.requires_grad] for module in runs]
    assert all(id(p) in inside[0] for p in frozen[0]) and not any(id(p) in inside[1] for p in frozen[1])
    parts = [module.memory_parts() for module in runs]
    assert "student's base" not in parts[0] and parts[1]["student's base"][0] == parts[0]["teacher"][0]
    # the frozen weights are the folder's still
    before = dict(load_parts(teacher).denoiser.named_parameters())
    for key, value in runs[0].scores.base.named_parameters():
        if not value.requires_grad:
            assert torch.equal(value, before[key.replace(".base_layer", "")])
