"""Checkpoints that are not of the distillation that is to continue."""

from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from common.errors import UserError
from tests.tiny_distillation import write_config


def run_files(run: Path) -> dict[Path, bytes]:
    """Content of every file of a run but TensorBoard's, which opens another one at each start."""
    files = [file for file in run.rglob("*") if file.is_file() and "tfevents" not in file.name]
    return {file: file.read_bytes() for file in files}


@pytest.mark.parametrize("ema_decay", [0.5, None])
def test_checkpoint_of_another_model_is_refused(
    ema_decay: float | None, tiny_sd: Path, tmp_path: Path
) -> None:
    """A narrower student, a pretraining run, another LoRA rank: one message with the weight that differs."""
    config = write_config(tmp_path / "tiny.yaml", tiny_sd, model__init_args__ema_decay=ema_decay)
    cli.main(["fit", "--config", str(config), "--trainer.max_steps=1"])
    run = tmp_path / "runs" / "tiny" / "version_0"
    path = run / "checkpoints" / "last.ckpt"
    content: dict[str, Any] = torch.load(path, weights_only=True)
    conv = "student.conv_in.weight"
    narrow = {**content["state_dict"], conv: torch.zeros(4, 4, 3, 3)}
    clip = {k: v for k, v in content.items() if k not in ("ema", "counters", "one_step")}
    clip["state_dict"] = {"clip.logit_scale": torch.zeros(())}
    cases = [
        ({**content, "state_dict": narrow}, [], rf"{conv} has shape \[4, 4, 3, 3\] .* shape \[8, 4, 3, 3\]"),
        (clip, [], rf"{conv} is not in the checkpoint"),
        (content, ["--model.fake_score.lora.rank=3"], r"lora_A.fake_score.weight has shape \[2, .* \[3, 8\]"),
    ]  # fmt: skip
    for changed, options, message in cases:
        torch.save(changed, path)
        before = run_files(run)
        with pytest.raises(UserError, match=f"the checkpoint does not fit this distillation: .*{message}"):
            cli.main(["fit", "--config", str(config), "--ckpt_path=last", *options])
        assert run_files(run) == before
        assert [folder.name for folder in run.parent.iterdir()] == ["version_0"]
