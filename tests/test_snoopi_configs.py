"""The SNOOPI experiments have the paper's numbers (test_experiments takes their steps)."""

import pytest

from commands.config_files import content_of
from tests.test_experiments import EXPERIMENTS

# largest kappa, prompts per update and updates, by backbone (version 3 of the paper)
PAPER = {"sd15": (4.0, 64, 60000), "sd21": (4.0, 64, 40000), "pixart": (3.0, 32, 50000)}


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
