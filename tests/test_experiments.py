"""Every experiment builds and takes a step with miniature models in the place of its own."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from commands.config_files import content_of
from tests.test_configs import command_for
from tests.test_draw_teacher import draw
from tests.test_sbv2_configs import EXPERIMENTS, step
from tests.tiny_judges import CLIP, tiny_decoder

ELSEWHERE = {  # in test_sbv2_configs and test_snoopi_configs
    *("emoji_sbv2_full", "emoji_sbv2_lora_clip", "sd21_sbv2_full", "sd21_sbv2_lora_clip"),
    *("emoji_pgsb", "emoji_nasat", "sd15_nasat", "sd21_pgsb", "pixart_pgsb", "pixart_nasat"),
}
NAMES = {path.stem for path in EXPERIMENTS.glob("*.yaml")}
RECIPES = [f"{backbone}_swiftbrush" for backbone in ("sd15", "sd21", "sdxl", "pixart")]
REAL = sorted(name for name in NAMES if not name.startswith(("emoji", "own")))
"""Those at full size."""


def test_the_others_are_there() -> None:
    assert ELSEWHERE <= NAMES and set(RECIPES) <= NAMES - ELSEWHERE


def substitutes(name: str, backbone_folder: Callable[[str], Path], clip: Path, folder: Path) -> list[str]:
    """Options with which an experiment runs on miniatures, and on a few prompts; all else is its own."""
    content = content_of(EXPERIMENTS / f"{name}.yaml")
    family = "sd3" if name.startswith("emoji_sd3") else name.split("_")[0]
    likes = {"emoji": "sd15", "own": "sd15", "sd21": "sd15", "sd35": "sd3"}
    teacher = backbone_folder(likes.get(family, family))
    prompts = json.dumps([f"a red cat {number}" for number in range(4)])
    options = [
        f"--model.teacher={teacher}", "--model.student_init=null", f"--data.prompts={prompts}",
        "--data.batch_size=2", "--data.micro_batch_size=1",
    ]  # fmt: skip
    if "negative_prompts" in content["data"]["init_args"]:
        options.append('--data.negative_prompts=["blurry", "green"]')
    if "image_losses" in content["model"]["init_args"]:
        loss = {"class_path": CLIP, "init_args": {"clip": str(clip)}}
        options += [
            f"--model.image_losses.losses={json.dumps([loss])}",
            f"--model.image_losses.decoder={tiny_decoder(folder / 'taesd')}",
        ]
    if "real" in content["data"]["init_args"]:
        options += [f"--data.real.folder={draw(teacher, folder / 'samples')}", "--data.real.batch_size=2"]
    return options


@pytest.mark.parametrize("name", sorted(name for name in NAMES - ELSEWHERE if name not in REAL))
def test_one_step(name: str, backbone_folder: Callable[[str], Path], tiny_clip: Path, tmp_path: Path) -> None:
    """All but those at full size, which are in test_coco_in_the_loop."""
    facts = step(name, tmp_path, *substitutes(name, backbone_folder, tiny_clip, tmp_path))["one_step"]
    assert facts["student_steps"] == 1
    lines = (tmp_path / name / "version_0" / "metrics.csv").read_text().splitlines()
    found = {key: float(value) for row in csv.DictReader(lines) for key, value in row.items() if value}
    assert found["counts/skipped_updates"] == 0
    assert all(math.isfinite(found[f"gradient_norm/{role}"]) for role in ("student", "fake_score"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_papers_numbers(name: str) -> None:
    """SwiftBrush's command; the length and the batch are those of the paper with this backbone."""
    content = content_of(EXPERIMENTS / f"{name}.yaml")
    model, data = content["model"]["init_args"], content["data"]["init_args"]
    objective = model["objective"]["init_args"]
    assert (objective["guidance_scale"], objective["prompt_dropout"]) == (4.5, 0.1)
    assert (objective["min_timestep"], objective["max_timestep"]) == (20, 980)
    assert model["fake_score"]["lora"] == {"rank": 64, "alpha": 108, "targets": ["to_q", "to_v"]}
    for role, rate in (("student", 1e-6), ("fake_score", 1e-3)):
        settings = model[role]["optimizer"]["init_args"]
        assert settings == {"lr": rate, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
        assert (model[role]["schedule"], model[role]["clip_norm"]) == ("constant", 1.0)
    start, batch, steps, average = {
        "sd15": (999, 64, 60000, 0.9999), "sd21": (999, 64, 61000, 0.9999), "sdxl": (399, 128, 24000, None),
        "pixart": (400, 32, 50000, 0.9999),
    }[name.split("_")[0]]  # fmt: skip
    assert (model["start_timestep"], model["ema_decay"]) == (start, average)
    assert (data["batch_size"], content["trainer"]["max_steps"]) == (batch, steps)
    files = command_for(f"configs/experiment/{name}.yaml")[2::2]
    assert [Path(file).parent.name for file in files] == ["experiment", "data", "trainer"]
