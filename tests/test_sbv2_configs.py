"""The SwiftBrush v2 experiments take a step: on the bundled models as they are, on tiny ones for SD 2.1."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.pipeline_folder import export_student
from tests.tiny_judges import CLIP, tiny_decoder

EXPERIMENTS = Path(cli.__file__).parent / "configs" / "experiment"
ALONE = ["--trainer.callbacks=[]", "--trainer.max_steps=1", "--trainer.limit_val_batches=0",
         "--trainer.precision=32-true", "--trainer.enable_progress_bar=false",
         "--trainer.accelerator=cpu"]  # fmt: skip


def step(name: str, root: Path, *options: str) -> dict[str, Any]:
    """One update of an experiment; returns its checkpoint and the columns of its metrics."""
    command = ["fit", "--config", str(EXPERIMENTS / f"{name}.yaml"), *ALONE]
    cli.main([*command, f"--trainer.default_root_dir={root}", "--trainer.log_every_n_steps=1", *options])
    run = root / name / "version_0"
    content: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return content | {"columns": (run / "metrics.csv").read_text().splitlines()[0].split(",")}


@pytest.mark.parametrize("name", ["emoji_sbv2_full", "emoji_sbv2_lora_clip"])
def test_bundled(name: str, tmp_path: Path) -> None:
    content = step(name, tmp_path, "--data.batch_size=2")
    facts = content["one_step"]
    assert (facts["student_init"], facts["student_steps"]) == ("assets/emoji-sd-swiftbrush", 1)
    lora = name == "emoji_sbv2_lora_clip"
    assert ("train/student_clip" in content["columns"]) == lora == ("student_lora" in facts)
    assert all(".student." in key for key in content["state_dict"] if key.startswith("student.")) == lora


@pytest.mark.parametrize("name", ["sd21_sbv2_full", "sd21_sbv2_lora_clip"])
def test_sd21(name: str, tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd)
    start = export_student(parts.denoiser, parts, 999, tmp_path / "turbo", card={"teacher": "tiny"})
    prompts = json.dumps([f"a red cat {number}" for number in range(64)])
    options = [f"--model.teacher={tiny_sd}", f"--model.student_init={start}", f"--data.prompts={prompts}"]
    lora = name == "sd21_sbv2_lora_clip"
    if lora:
        loss = {"class_path": CLIP, "init_args": {"clip": str(tiny_clip)}}
        options += [
            f"--model.image_losses.losses={json.dumps([loss])}",
            f"--model.image_losses.decoder={tiny_decoder(tmp_path / 'taesd')}",
        ]
    content = step(name, tmp_path, *options)
    assert ("train/student_clip" in content["columns"]) == lora
    if lora:
        assert content["one_step"]["student_lora"]["rank"] == 256
        assert content["one_step"]["student_lora"]["alpha"] == 512
