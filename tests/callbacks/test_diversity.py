"""Diversity within a prompt against other implementations, and which pictures belong together."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torchmetrics.functional.image.lpips import _LPIPS

from callbacks.evaluation import Evaluation
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.diversity import DiversityLpips, Vendi, vendi_score
from callbacks.metrics.measure import measure_set
from callbacks.metrics.unfinished import Unfinished
from common.errors import UserError
from datamodules.evaluation_sets import CaptionFile, EvaluationSet
from datamodules.picture_files import Frame
from tests.callbacks.networks import pictures
from tests.callbacks.standin import StandIn, StandInData
from tests.callbacks.test_evaluation import trainer

PROMPTS = [f"number {i // 3}" for i in range(12)]


def classifier_file(folder: Path) -> str:
    """Random weights of the smallest of the classifiers, as torchvision saves them."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = torchvision.models.squeezenet1_1(weights=None)
    torch.save(model.state_dict(), folder / "squeezenet.pth")
    return str(folder / "squeezenet.pth")


def test_lpips_is_that_of_torchmetrics(tmp_path: Path) -> None:
    file = classifier_file(tmp_path)
    metric = DiversityLpips("squeeze", file)
    metric.bind()
    images = pictures(3, height=64, width=80)
    metric.prepare(["a"] * 3)
    metric.update(images, ["a"] * 3, None, range(3))
    with torch.no_grad():
        other = _LPIPS(net="squeeze", pnet_rand=True).eval()  # the package's code, with torchvision's layers
        theirs = torchvision.models.squeezenet1_1(weights=None)
        theirs.load_state_dict(torch.load(file, weights_only=True))
        for parameter, stored in zip(other.net.parameters(), theirs.features.parameters(), strict=True):
            parameter.copy_(stored)
        pairs = [other(images[i, None], images[j, None], normalize=True) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert metric.result()["value"] == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-4)


def test_vendi_counts_what_differs() -> None:
    assert float(vendi_score(torch.eye(5))) == pytest.approx(5)
    assert float(vendi_score(torch.ones(5, 3))) == pytest.approx(1)
    assert float(vendi_score(torch.eye(4)[[0, 0, 1, 1]])) == pytest.approx(2)
    rows = np.random.default_rng(0).normal(size=(6, 4))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values = np.linalg.eigvals(unit @ unit.T / 6).real  # another algorithm, and the formula as it stands
    values = values[values > 1e-12]
    expected = np.exp(-(values * np.log(values)).sum())
    assert float(vendi_score(torch.from_numpy(rows))) == pytest.approx(expected, rel=1e-9)


def test_prompts_are_measured_each_by_itself(tiny_clip: Path) -> None:
    extractor, images = ClipExtractor(tiny_clip), pictures(12)
    metric = Vendi()
    metric.bind(extractor)
    drawn = EvaluationSet("set", PROMPTS, list(range(12)))
    assert drawn.images_per_prompt == 3

    def draw(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        return images[seeds]

    found = {size: measure_set(draw, drawn, [metric], size)["vendi"] for size in (2, 5, 12)}
    features = extractor.image_features(images)
    expected = torch.stack([vendi_score(features[i : i + 3]) for i in range(0, 12, 3)]).mean()
    for result in found.values():
        assert result["value"] == pytest.approx(float(expected)) and result["num_images"] == 12
        assert (result["details"]["prompts"], result["details"]["images_per_prompt"]) == (4, 3)


def test_open_prompts_survive_an_interruption(tiny_clip: Path, tmp_path: Path) -> None:
    whole, first, second = (Vendi(str(tiny_clip)) for _ in range(3))
    images = pictures(12)
    for metric in (whole, first, second):
        metric.bind()
        metric.prepare(PROMPTS)
    whole.update(images, PROMPTS, None, range(12))
    first.update(images[:7], PROMPTS[:7], None, range(7))  # the last prompt is open
    unfinished = Unfinished(tmp_path / "unfinished", {}, 1)
    unfinished.save([first], 7)
    unfinished.load([second])
    second.update(images[7:], PROMPTS[7:], None, range(7, 12))
    assert second.result()["value"] == pytest.approx(whole.result()["value"])
    first.reset()
    with pytest.raises(UserError, match="at least 2 pictures"):
        first.result()
    first.update(images[:2], PROMPTS[:2], None, range(2))
    with pytest.raises(UserError, match="saw no prompt with all of its 3 pictures"):
        first.result()


def test_one_picture_a_prompt_and_uneven_numbers_are_refused(tmp_path: Path) -> None:
    metric = Vendi("nowhere")
    with pytest.raises(UserError, match="'a' has 1. Set --data.images_per_prompt 8"):
        metric.prepare(["a", "b"])
    with pytest.raises(UserError, match="'b' has 2, others 3: every prompt needs the same number"):
        metric.prepare(["a"] * 3 + ["b"] * 2)
    (tmp_path / "captions.txt").write_text("a\nb\n")
    drawn = CaptionFile(str(tmp_path / "captions.txt"), images_per_prompt=3, seed=5).load()
    assert drawn.captions == ["a"] * 3 + ["b"] * 3 and drawn.seeds == list(range(5, 11))
    with pytest.raises(UserError, match="images_per_prompt is 0"):
        CaptionFile(str(tmp_path / "captions.txt"), images_per_prompt=0).load()


def test_missing_and_wrong_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match=r"alexnet-owt-7be5be79.pth is missing; looked for .*judges.* and .*hub"
    ):
        DiversityLpips(judges=str(tmp_path / "judges")).bind()
    with pytest.raises(UserError, match="can't be loaded as torchvision's alexnet"):
        DiversityLpips("alex", classifier_file(tmp_path)).bind()
    with pytest.raises(UserError, match="'vgg19' is unknown: choose one of alex, vgg, squeeze"):
        DiversityLpips("vgg19")


def test_in_a_training_run(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a validation of seven pictures of three prompts, one of them incomplete, and of six at the end."""
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    file, module, data = classifier_file(tmp_path), StandIn(tiny_sd), StandInData(PROMPTS)

    def run(size: int) -> Evaluation:
        metrics = [Vendi(), DiversityLpips("squeeze", file)]
        callback = Evaluation(
            str(tiny_clip), None, metrics, size, teacher_rows=False, timing_batch_size=1, frame=frame
        )
        trainer(tmp_path / str(size), callback).fit(module, data)
        return callback

    frame = Frame(64, crop=False)
    callback = run(6)
    drawn = EvaluationSet("x", PROMPTS[:6], list(range(6)), frame=frame)
    expected = measure_set(module.generator.images, drawn, callback.metrics, 6)
    assert callback.final is not None and 1 < expected["vendi"]["value"] < 3
    for name, result in expected.items():
        assert (result["num_images"], result["details"]["prompts"]) == (6, 2)
        for found in (callback.final.metrics[name], callback.measured[name]):
            assert found["value"] == pytest.approx(result["value"], rel=1e-4)
            assert found["details"]["prompts"] == 2
    with pytest.raises(UserError, match=r"'number 2' has 1, others 3"):  # before any training
        run(7)
