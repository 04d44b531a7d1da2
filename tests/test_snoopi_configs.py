"""The SNOOPI experiments have the paper's numbers, and take a step on tiny models."""

import csv
import json
from pathlib import Path

import pytest

from commands.config_files import content_of
from tests.backbones import write_backbone
from tests.test_sbv2_configs import EXPERIMENTS, step
from tests.tiny_judges import CLIP, tiny_decoder

# largest kappa, prompts per update and updates, by backbone (version 3 of the paper)
PAPER = {"sd15": (4.0, 64, 60000), "sd21": (4.0, 64, 40000), "pixart": (3.0, 32, 50000)}
NEGATIVES = ["blurry", "a red cat", "green"]


def values(root: Path, name: str) -> dict[str, float]:
    """The numbers of the run's only update."""
    lines = (root / name / "version_0" / "metrics.csv").read_text().splitlines()
    return {key: float(value) for row in csv.DictReader(lines) for key, value in row.items() if value}


def check_update(root: Path, name: str, high: float) -> None:
    """One kappa for both scores, within the range; alpha of NASA only in NASA-T."""
    found = values(root, name)
    kappa = found["objective/guidance_scale/teacher"]
    assert 0.5 <= kappa <= high and kappa == found["objective/guidance_scale/fake_score"]
    alpha = found.get("objective/student_negative_scale")
    assert (alpha is not None) == name.endswith("nasat")
    assert alpha is None or 0 < alpha < 1


@pytest.mark.parametrize("kind", ["pgsb", "nasat"])
@pytest.mark.parametrize("backbone", PAPER)
def test_real_backbones_have_the_papers_numbers(backbone: str, kind: str) -> None:
    content = content_of(EXPERIMENTS / f"{backbone}_{kind}.yaml")
    model, high = content["model"]["init_args"], PAPER[backbone][0]
    objective, data = model["objective"]["init_args"], content["data"]["init_args"]
    assert objective["guidance_scale"]["init_args"] == {"low": 0.5, "high": high, "per_sample": False}
    assert (data["batch_size"], content["trainer"]["max_steps"]) == PAPER[backbone][1:]
    rates = [model[role]["optimizer"]["init_args"]["lr"] for role in ("student", "fake_score")]
    assert rates == [1e-6, 1e-3] and tuple(model["fake_score"]["lora"][key] for key in ("rank", "alpha")) == (
        64,
        128,
    )
    loss = model["image_losses"]["losses"][0]["init_args"]
    assert loss["tau"] == 0.37 and loss["weight"]["init_args"] == {"start": 0.1, "end": 0.0}
    alpha = {"init_args": {"low": 0.0, "high": 1.0}} if kind == "nasat" else None
    assert ("negative_prompts" in data) == (alpha is not None) == objective.get("teacher_negatives", False)
    assert not objective.get("fake_score_negatives", False)
    found = objective.get("student_negatives")
    assert (found and {"init_args": found["init_args"]}) == alpha


def miniature(teacher: Path, negatives: bool) -> list[str]:
    """Options that put a tiny teacher and few prompts in the place of the real ones."""
    options = [
        f"--model.teacher={teacher}", "--data.batch_size=2", "--data.micro_batch_size=1",
        f"--data.prompts={json.dumps([f'a red cat {number}' for number in range(4)])}",
    ]  # fmt: skip
    return [*options, f"--data.negative_prompts={json.dumps(NEGATIVES)}"] if negatives else options


@pytest.mark.parametrize("kind", ["pgsb", "nasat"])
def test_bundled(kind: str, tiny_sd: Path, tmp_path: Path) -> None:
    step(f"emoji_{kind}", tmp_path, *miniature(tiny_sd, kind == "nasat"))
    check_update(tmp_path, f"emoji_{kind}", 4.0)


@pytest.mark.parametrize(("backbone", "kind"), [("sd15", "nasat"), ("sd21", "pgsb"), ("pixart", "nasat")])
def test_real_backbones(backbone: str, kind: str, tiny_clip: Path, tmp_path: Path) -> None:
    name = f"{backbone}_{kind}"
    teacher = write_backbone({"sd21": "sd15"}.get(backbone, backbone), tmp_path / "teacher")
    loss = {"class_path": CLIP, "init_args": {"clip": str(tiny_clip)}}
    options = [
        *miniature(teacher, kind == "nasat"), "--model.student_init=null",
        f"--model.image_losses.losses={json.dumps([loss])}",
        f"--model.image_losses.decoder={tiny_decoder(tmp_path / 'taesd')}",
    ]  # fmt: skip
    content = step(name, tmp_path, *options)
    check_update(tmp_path, name, PAPER[backbone][0])
    assert "train/student_clip" in content["columns"]
