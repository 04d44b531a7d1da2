"""Every experiment builds and takes a step with miniature models in the place of its own."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

import cli
from callbacks.throughput import Throughput
from commands.config_files import content_of
from tests.test_configs import class_names, command_for
from tests.test_draw_teacher import draw
from tests.tiny_judges import CLIP, tiny_decoder

EXPERIMENTS = Path(cli.__file__).parent / "configs" / "experiment"
NAMES = {path.stem for path in EXPERIMENTS.glob("*.yaml")}
RECIPES = [f"{backbone}_swiftbrush" for backbone in ("sd15", "sd21", "sdxl", "pixart")]
REAL = sorted(name for name in NAMES if not name.startswith(("emoji", "own")))
"""Those at full size."""
MEASURED = ("sd15_nasat", "sdxl_swiftbrush", "pixart_pgsb", "sd35_tdm_4step", "flux_pgsb", "sana_swiftbrush",
            "zimage_swiftbrush", "klein_swiftbrush", "qwen_swiftbrush")  # fmt: skip
"""One of each backbone; test_coco_in_the_loop takes their step."""
AS_THEY_ARE = {"emoji_sbv2_full", "emoji_sbv2_lora_clip"}
"""On the bundled models: their student begins as one of them."""
ALONE = ["--trainer.callbacks=[]", "--trainer.max_steps=1", "--trainer.limit_val_batches=0",
         "--trainer.precision=32-true", "--trainer.enable_progress_bar=false",
         "--trainer.accelerator=cpu"]  # fmt: skip


def part(path: Path, **content: Any) -> list[str]:
    """A file of settings and its option, which is read faster than many options of a model or of data.

    In a folder called data, it names no experiment.
    """
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return ["--config", str(path)]


def substitutes(name: str, backbone_folder: Callable[[str], Path], clip: Path, folder: Path) -> list[str]:
    """With these an experiment runs on miniatures, and on a few prompts; all else is its own."""
    content = content_of(EXPERIMENTS / f"{name}.yaml")
    family = "sd3" if name.startswith("emoji_sd3") else name.split("_")[0]
    likes = {"emoji": "sd15", "own": "sd15", "sd21": "sd15", "sd35": "sd3"}
    teacher = backbone_folder(likes.get(family, family))
    model: dict[str, Any] = {"teacher": str(teacher), "student_init": None}
    data: dict[str, Any] = {
        "prompts": [f"a red cat {number}" for number in range(4)], "batch_size": 2, "micro_batch_size": 2,
    }  # fmt: skip
    if "negative_prompts" in content["data"]["init_args"]:
        data["negative_prompts"] = ["blurry", "green"]
    if content["model"]["init_args"].get("image_losses"):
        loss = {"class_path": CLIP, "init_args": {"clip": str(clip)}}
        model["image_losses"] = {"losses": [loss], "decoder": str(tiny_decoder(folder / "taesd"))}
    if "real" in content["data"]["init_args"]:
        data["real"] = {"folder": str(draw(teacher, folder / "samples")), "batch_size": 2}
    return part(folder / "data" / "miniature.yaml", model={"init_args": model}, data={"init_args": data})


def check_update(run: Path, name: str) -> None:
    """All of the experiment's settings were read, and its one update leaves the numbers of its method."""
    content = content_of(EXPERIMENTS / f"{name}.yaml")
    model, resolved = content["model"]["init_args"], (run / "config.yaml").read_text()
    assert all(f".{name}\n" in resolved for name in class_names([model, content["data"]]))
    facts = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["one_step"]
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    found = {key: float(value) for row in rows for key, value in row.items() if value}
    assert facts["student_steps"] == 1 and found["counts/skipped_updates"] == 0
    assert all(math.isfinite(found[f"gradient_norm/{role}"]) for role in ("student", "fake_score"))
    assert ("train/student_clip" in found) == bool(model.get("image_losses"))
    lora = model.get("student_lora")
    assert (lora is None) == ("student_lora" not in facts)
    assert lora is None or all(facts["student_lora"][key] == lora[key] for key in ("rank", "alpha"))
    kappa = model["objective"].get("init_args", {}).get("guidance_scale")
    if isinstance(kappa, dict):  # within the range, and the fake score's unless that has one of its own
        drawn = found["objective/guidance_scale/teacher"]
        assert kappa["init_args"]["low"] <= drawn <= kappa["init_args"]["high"]
        fake = model["objective"]["init_args"].get("fake_guidance_scale")
        assert found["objective/guidance_scale/fake_score"] == (drawn if fake is None else fake)
    alpha = found.get("objective/student_negative_scale")  # of NASA, only in NASA-T
    assert (alpha is not None) == name.endswith("nasat") and (alpha is None or 0 < alpha < 1)


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting the operations of the one update takes longer than the update; tests/callbacks has it."""
    monkeypatch.setattr(Throughput, "on_train_batch_start", Callback.on_train_batch_start)
    monkeypatch.setattr(Throughput, "on_train_batch_end", Callback.on_train_batch_end)
    monkeypatch.setattr("callbacks.throughput.matmul_rate", lambda *_: 1.0)


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("name", sorted(NAMES - set(MEASURED)))
def test_one_step(name: str, backbone_folder: Callable[[str], Path], tiny_clip: Path, tmp_path: Path) -> None:
    """All but those of test_coco_in_the_loop."""
    own = ["--data.batch_size=2"]
    if name not in AS_THEY_ARE:
        own = substitutes(name, backbone_folder, tiny_clip, tmp_path)
    options = [*ALONE, f"--trainer.default_root_dir={tmp_path}", "--trainer.log_every_n_steps=1", *own]
    cli.main(["fit", "--config", str(EXPERIMENTS / f"{name}.yaml"), *options])
    run = tmp_path / name / "version_0"
    check_update(run, name)
    if name in AS_THEY_ARE:
        content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert content["one_step"]["student_init"] == "assets/emoji-sd-swiftbrush"
        adapters = [".student." in key for key in content["state_dict"] if key.startswith("student.")]
        assert all(adapters) == (name == "emoji_sbv2_lora_clip")


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
