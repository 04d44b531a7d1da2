"""What a student may start from."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from lightning_modules.diffusion.steps import Steps
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.lora import StudentLoraSettings
from lightning_modules.networks.pipeline_folder import export_student
from lightning_modules.networks.student import make_student


def other_weights(folder: Path) -> Any:
    """The parts of a folder with other UNet weights."""
    parts = load_parts(folder)
    unet = copy.deepcopy(parts.denoiser)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return parts, unet


@pytest.fixture(scope="module")
def exported(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-step student of the tiny Stable Diffusion that starts at 625."""
    parts, unet = other_weights(tiny_sd)
    folder: Path = tmp_path_factory.mktemp("student") / "export"
    return export_student(unet, parts, 625, folder, card={"teacher": "tiny"})


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_exported_student(tiny_sd: Path, exported: Path) -> None:
    teacher = load_parts(tiny_sd)
    unet, base = make_student(teacher, "tiny", 625, str(exported))
    expected = other_weights(tiny_sd)[1].state_dict()
    assert base is None and unet.training and all(p.requires_grad for p in unet.parameters())
    assert all(torch.equal(value, expected[name]) for name, value in unet.state_dict().items())


def test_a_folder_that_knows_the_whole_schedule(tiny_sd: Path, own_sd: Path) -> None:
    """SD Turbo, say, starts at any timestep; settings that change no formula may differ."""
    edit(own_sd / "unet" / "config.json", sample_size=16, upcast_attention=None)
    unet, _ = make_student(load_parts(tiny_sd), "tiny", 400, str(own_sd))
    assert unet.config.sample_size == 16


def test_the_teacher_is_copied(tiny_sd: Path) -> None:
    parts = load_parts(tiny_sd)
    unet, _ = make_student(parts, "tiny", 625)
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    assert parts.denoiser.conv_in.weight.abs().max() > 0


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "unet",
            {"norm_eps": 1e-3},
            "norm_eps is 0.001 in the student and 1e-05 in the teacher. Give a one-step model",
        ),
        (
            "unet",
            {"flip_sin_to_cos": False},
            "flip_sin_to_cos is False in the student and True in the teacher",
        ),
        (
            "scheduler",
            {"prediction_type": "v_prediction"},
            "prediction_type is v_prediction in the student and epsilon in the teacher",
        ),
        ("scheduler", {"beta_end": 0.02}, "alpha_bar at timestep .* in the student and .* in the teacher"),
        ("scheduler", {"num_train_timesteps": 500}, "one schedule has 500 timesteps, start_timestep is 625"),
    ],
)
def test_first_difference_is_named(
    file: str, changes: dict[str, Any], message: str, tiny_sd: Path, own_sd: Path
) -> None:
    name = "config.json" if file == "unet" else "scheduler_config.json"
    edit(own_sd / file / name, **changes)
    with pytest.raises(UserError, match=f"student_init {own_sd} does not fit the teacher tiny: .*{message}"):
        make_student(load_parts(tiny_sd), "tiny", 625, str(own_sd))


@pytest.mark.parametrize("family", ["sana", "qwen", "flux"])
def test_an_export_of_rectified_flow_fits_its_teacher(
    backbone_folder: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """SANA has another class of scheduler, Qwen-Image a terminal sigma, which one step does not know."""
    parts = load_parts(folder := backbone_folder(family))
    export_student(parts.denoiser, parts, Steps((999,)), tmp_path / "out", card={"teacher": family})
    student, _ = make_student(load_parts(folder), family, 999, str(tmp_path / "out"))
    weights = parts.denoiser.state_dict()
    assert all(weight.equal(weights[name]) for name, weight in student.state_dict().items())


def test_another_architecture(tiny_sd: Path, own_sd: Path) -> None:
    wide = type(load_parts(tiny_sd).denoiser).from_config(
        {**load_parts(tiny_sd).denoiser.config, "block_out_channels": (8, 24)}
    )
    wide.save_pretrained(own_sd / "unet")
    message = r"\.weight has shape \[24, .* in the student and has shape \[16, .* in the teacher"
    with pytest.raises(UserError, match=message):
        make_student(load_parts(tiny_sd), "tiny", 625, str(own_sd))


def test_start_timestep_of_a_one_step_student(tiny_sd: Path, exported: Path) -> None:
    with pytest.raises(UserError, match="starts at timestep 625, this run at 999"):
        make_student(load_parts(tiny_sd), "tiny", 999, str(exported))
    with pytest.raises(UserError, match="nothing/there does not exist"):
        make_student(load_parts(tiny_sd), "tiny", 999, "nothing/there")


def test_lora_on_an_initial_student(tiny_sd: Path, exported: Path) -> None:
    """It computes what the initial student does, bit for bit, and names it as its base."""
    plain, _ = make_student(load_parts(tiny_sd), "tiny", 625, str(exported))
    lora = StudentLoraSettings(rank=2, alpha=4.0, targets=["to_q", "to_out.0"])
    unet, base = make_student(load_parts(tiny_sd), "tiny", 625, str(exported), lora)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([625, 625]), torch.randn(2, 16, 16)
    with torch.no_grad():
        assert torch.equal(unet(x, t, text).sample, plain(x, t, text).sample)
    assert base is not None and base.path == str(exported)
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trained == set(unet.state_dict()) and trained
    assert all(".lora_A.student." in name or ".lora_B.student." in name for name in trained)
