"""The method of one's own in CONTRIBUTING.md, in a file outside the repository: fit, resume, export."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import cli
from tests.distributed_runs import run_processes
from tests.tiny_distillation import write_config

ROOT = Path(__file__).resolve().parents[1]


def documented(kind: str) -> str:
    """The first block of this kind in the chapter."""
    chapter = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A method of your own")[2]
    found = re.search(rf"```{kind}\n(.*?)```", chapter, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def elsewhere(tmp_path: Path, tiny_sd: Path) -> Path:
    """A folder of one's own with the documented files, made small by a base of its own."""
    (tmp_path / "sds.py").write_text(documented("python"))
    write_config(tmp_path / "small.yaml", tiny_sd, model__init_args__fake_score=None)
    own = documented("yaml").replace("/path/to/this/repository/configs/base/emoji.yaml", "small.yaml")
    assert "base: small.yaml" in own
    (tmp_path / "sds.yaml").write_text(own)
    return tmp_path


def run(folder: Path, *args: str) -> None:
    """`PYTHONPATH=. python cli.py ARGS` in a folder; forked, as importing takes longer than all the rest."""

    def work() -> None:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        cli.main(list(args))

    run_processes(1, work, folder / "log", launched=False)


def checkpoint(folder: Path) -> dict[str, object]:
    path = folder / "runs" / "sds" / "version_0" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True, map_location="cpu")


def test_it_runs_resumes_and_exports(elsewhere: Path) -> None:
    fit = ["fit", "--config", "sds.yaml", "--trainer.enable_progress_bar=false"]
    run(elsewhere, *fit, "--trainer.max_steps=2")
    assert checkpoint(elsewhere)["global_step"] == 2
    run(elsewhere, *fit, "--trainer.max_steps=3", "--ckpt_path=last")
    last = checkpoint(elsewhere)
    assert last["global_step"] == 3 and last["one_step"]["method"] == "ScoreDistillation"  # type: ignore[index]
    assert not [name for name in last["state_dict"] if not name.startswith("student.")]  # type: ignore[attr-defined]
    config = yaml.safe_load((elsewhere / "runs/sds/version_0/config.yaml").read_text())
    assert "base" not in config
    assert config["model"]["init_args"]["objective"]["class_path"] == "sds.ScoreDistillation"
    header = (elsewhere / "runs/sds/version_0/metrics.csv").read_text().splitlines()[0]
    assert "train/student_sds" in header and "objective/timestep" in header
    run(elsewhere, "export", "--checkpoint", "last", "--output", "my-student", "--weights", "online")
    exported = load_file(elsewhere / "my-student" / "unet" / "diffusion_pytorch_model.safetensors")
    weights = last["state_dict"]
    assert all(torch.equal(tensor, weights[f"student.{name}"]) for name, tensor in exported.items())  # type: ignore[index]
