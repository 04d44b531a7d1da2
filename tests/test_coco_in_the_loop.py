"""Recipes at full size measure on COCO while they train, and go on without it; all models are miniatures."""

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cli
from callbacks.evaluation_share import EvaluationShare
from callbacks.metrics import inception
from commands.config_files import content_of
from common.errors import UserError
from datamodules import published_sets
from datamodules.published_sets import Coco30kSwiftBrush
from tests.callbacks.networks import inception_file, pictures, save
from tests.callbacks.standin import StandIn, StandInData
from tests.callbacks.test_evaluation import trainer
from tests.distributed_runs import run_processes
from tests.test_experiments import EXPERIMENTS, MEASURED, REAL, check_update, part, substitutes
from tests.tiny_judges import copied_clip, open_clip_network

METRICS = "callbacks.metrics"
ON_PICTURES = {"fid", "precision", "recall"}
ALL = ON_PICTURES | {"clip_score", "hpsv2"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference statistics and teacher's pictures of this test alone; features of which roots are quick."""
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inception.InceptionExtractor, "width", 32)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A folder in the layout of COCO: six captions of three pictures of different shapes."""
    folder = tmp_path / "COCO"
    names = [f"COCO_val2014_{number:012d}.jpg" for number in (42, 73, 136)]
    images = [{"id": number, "file_name": name} for number, name in zip((42, 73, 136), names, strict=True)]
    captions = [{"id": i, "image_id": (42, 73, 136)[i % 3], "caption": f"A red cat {i}. "} for i in range(6)]
    (folder / "annotations").mkdir(parents=True)
    content = {"images": images, "annotations": captions}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    drawn = save(pictures(3, height=20, width=28), folder / "val2014")
    for path, name in zip(sorted(drawn.iterdir()), names, strict=True):
        path.rename(drawn / name)
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """Inception's file; name and weights of HPSv2's network."""
    folder: Path = tmp_path_factory.mktemp("judges")
    return str(inception_file(folder, 32)), *open_clip_network(folder)


@pytest.fixture
def metrics(networks: tuple[str, str, Path], tiny_clip: Path) -> list[dict[str, Any]]:
    """The recipes' metrics with miniature networks."""
    eyes = {"inception": networks[0]}
    hps = {"version": "v2.0", "architecture": networks[1], "checkpoint": str(networks[2])}
    return [
        {"class_path": f"{METRICS}.frechet.FID", "init_args": eyes},
        {"class_path": f"{METRICS}.precision_recall.Precision", "init_args": {**eyes, "k": 1}},
        {"class_path": f"{METRICS}.precision_recall.Recall", "init_args": {**eyes, "k": 1}},
        {
            "class_path": f"{METRICS}.clip_score.ClipScore",
            "init_args": {"model": str(tiny_clip), "pretrained": None},  # else the recipe's
        },
        {"class_path": f"{METRICS}.hpsv2.HPSv2", "init_args": hps},
    ]


def fit(
    name: str,
    models: list[str],
    root: Path,
    metrics: list[dict[str, Any]],
    *options: str,
    whole: bool = False,
) -> Path:
    """One update of a recipe, a validation after it, and the evaluation at the end; returns its folder.

    Of the recipe's callbacks those that measure and keep checkpoints, unless it's to be the ``whole``.
    """
    changed: dict[str, dict[str, Any]] = {
        "RunCheckpoint": {}, "Evaluation": {"metrics": metrics, "timing_batch_size": 1},
        "EvaluationShare": {},
    }  # fmt: skip
    if whole:
        drawn = {"num_images": 1}
        changed |= {"StartSummary": {}, "SampleGrid": drawn | {"teacher_steps": 2}, "ScoreViews": drawn,
                    "Health": {"num_images": 4, "teacher_steps": 2}, "RunReport": {}}  # fmt: skip
    own = {
        one["class_path"].rpartition(".")[2]: one
        for one in content_of(EXPERIMENTS / f"{name}.yaml")["trainer"]["callbacks"]
    }
    assert not whole or own.keys() == changed.keys()
    callbacks = [
        {"class_path": one["class_path"], "init_args": one.get("init_args", {}) | changed[kind]}
        for kind, one in own.items()
        if kind in changed
    ]
    cli.main([
        "fit", "--config", str(EXPERIMENTS / f"{name}.yaml"), "--config", "configs/data/own_prompts.yaml",
        *models, f"--trainer.callbacks={json.dumps(callbacks)}",
        "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={root}", *options,
    ])  # fmt: skip
    return root / name / "version_0"


def with_coco(coco: Path, captions_of: str = "annotations/captions_val2014.json") -> list[str]:
    captions = {"captions": str(coco / captions_of), "count": 6}
    data = {"eval_set": {"init_args": captions}, "eval_set_size": 5, "eval_reference": str(coco / "val2014")}
    return part(coco.parent / "data" / "coco.yaml", data={"init_args": data})


def measured(run: Path, stage: str) -> dict[str, float]:
    """What metrics.csv holds of a stage."""
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    found = {key: float(value) for row in rows for key, value in row.items() if value}
    return {key.removeprefix(f"{stage}/"): value for key, value in found.items() if key.startswith(stage)}


@pytest.mark.parametrize("name", REAL)
def test_every_recipe_measures_on_coco(name: str) -> None:
    """The set, the metrics and the rule of best.ckpt come from the files that all of them build on."""
    content = content_of(EXPERIMENTS / f"{name}.yaml")
    base = content_of(EXPERIMENTS.parent / "base" / "full_size.yaml")
    assert content["trainer"]["callbacks"] == base["trainer"]["callbacks"]
    data, trainer = content["data"]["init_args"], content["trainer"]
    assert data["eval_set"]["class_path"].endswith("Coco30kSwiftBrush") and data["eval_set_size"] == 5000
    assert data["eval_set"]["init_args"]["captions"] is None and data["eval_reference"] is None
    callbacks = {one["class_path"].rpartition(".")[2]: one.get("init_args") for one in trainer["callbacks"]}
    evaluation = callbacks["Evaluation"]
    assert evaluation["leave_out"] is True and evaluation["final_size"] == 30_000
    names = [one["class_path"].rpartition(".")[2] for one in evaluation["metrics"]]
    assert names == ["FID", "Precision", "Recall", "ClipScore", "HPSv2"]
    assert callbacks["RunCheckpoint"]["monitor"][0] == "val/fid" and trainer["val_check_interval"] == 2500
    assert list(callbacks)[-1] == "EvaluationShare" and callbacks["EvaluationShare"]["max_share"] == 0.1


@pytest.fixture
def models(
    backbone_folder: Callable[[str], Path], tiny_clip: Path, tmp_path: Path
) -> Callable[[str], list[str]]:
    """What puts miniatures in the place of a recipe's models, and a few prompts in that of its own."""
    return lambda name: substitutes(
        name,
        backbone_folder,
        copied_clip(tiny_clip, tmp_path / "clip"),
        tmp_path,  # not the one that judges
    )


@pytest.mark.parametrize("name", MEASURED)
def test_with_coco(
    name: str, models: Callable[[str], list[str]], metrics: list[dict[str, Any]], coco: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A recipe takes a step, measures in the loop and at the end, and keeps the best checkpoint."""
    run = fit(name, models(name), tmp_path, metrics, *with_coco(coco))
    found = [measured(run, stage) for stage in ("val", "test")]
    assert all(stage.keys() >= ALL and all(map(math.isfinite, stage.values())) for stage in found)
    assert (run / "checkpoints" / "best.ckpt").exists()
    check_update(run, name)
    assert 0 < measured(run, "throughput")["evaluation_share"] < 1
    printed = capsys.readouterr().out
    assert "Evaluation: " not in printed
    assert "Validation of step 1: " in printed and "Evaluation at the end: " in printed


def test_without_coco(
    models: Callable[[str], list[str]], metrics: list[dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What compares with pictures, and a judge that isn't found, are left out in one line."""
    monkeypatch.setenv("HPS_ROOT", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    del metrics[-1]["init_args"]["checkpoint"]
    run = fit("sd15_swiftbrush", models("sd15_swiftbrush"), tmp_path, metrics)
    assert measured(run, "val").keys() == measured(run, "test").keys() == {"clip_score"}
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("Evaluation: ")]
    assert "only the 8 of data.eval_captions drawn (no data.eval_set.captions)" in line
    assert "fid, precision, recall left out (no real pictures: data.eval_reference is not set)" in line
    assert "hpsv2 left out (hpsv2 v2.0: no checkpoint; looked for" in line and "hf download" in line
    assert "configs/data/coco.yaml" in line
    assert (run / "checkpoints" / "best.ckpt").exists()


def test_two_processes_measure_what_one_does(
    models: Callable[[str], list[str]], metrics: list[dict[str, Any]], coco: Path, tmp_path: Path
) -> None:
    """By DDP and by FSDP2: five pictures in validations, six at the end; the last place is padding."""
    name = "sd15_swiftbrush"
    ones = fit(name, models(name), tmp_path / "one", metrics, *with_coco(coco))
    expected = {stage: measured(ones, stage) for stage in ("val", "test")}
    assert expected["val"].keys() >= ALL
    sharded = json.dumps({"class_path": "lightning_modules.parallel.FullySharded"})
    for kind, strategy in (("ddp", "ddp"), ("fsdp", sharded)):
        together = [f"--trainer.strategy={strategy}", "--trainer.devices=2", "--data.micro_batch_size=1"]
        root = tmp_path / kind

        def work(root: Path = root, options: list[str] = together) -> None:
            fit(name, models(name), root, metrics, *with_coco(coco), *options)

        run_processes(2, work, tmp_path / "log")
        run = root / name / "version_0"
        for stage, values in expected.items():
            assert measured(run, stage) == pytest.approx(values, rel=1e-3, abs=1e-6)
        assert (run / "checkpoints" / "best.ckpt").exists()


def test_published_values_stand_only_beside_the_same_protocol(
    models: Callable[[str], list[str]], metrics: list[dict[str, Any]], coco: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A whole run, whose end draws the set as published (here six captions), its validation fewer."""
    monkeypatch.setattr(published_sets, "VAL2014", 6)
    first = published_sets.SWIFTBRUSH_FIRST
    labels = [[f"{i}.png", text] for i, text in enumerate([first, *(f"A red cat {i}." for i in range(1, 6))])]
    (coco / "dataset.json").write_text(json.dumps({"labels": labels}))
    load = Coco30kSwiftBrush.load
    monkeypatch.setattr(
        Coco30kSwiftBrush, "load",
        lambda self: dataclasses.replace(load(self), published_count=6, published_references=3),
    )  # fmt: skip
    name = "sd15_swiftbrush"
    run = fit(name, models(name), tmp_path, metrics, *with_coco(coco, "dataset.json"), whole=True)
    report = json.loads((run / "report.json").read_text())
    assert {report["metrics"][metric]["num_images"] for metric in ALL} == {6}
    assert 0 < report["timing"]["evaluation_share"] < 1 and report["teacher_metrics"] == {}
    assert (
        "centre crop, LANCZOS to 256x256"
        in json.loads((run / "manifest.json").read_text())["crop_and_resize"]
    )
    details = {metric: result["details"] for metric, result in report["metrics"].items()}
    assert details["fid"]["reference_num_images"] == 3 and report["evaluation_set"] == "coco30k_swiftbrush"
    assert details["fid"]["label"] == "FID-6" and details["clip_score"]["label"] == "clip_score"
    assert [text.partition(":")[0] for text in details["fid"]["differs_from_published"]] == [
        "open", "small difference",
    ]  # fmt: skip
    assert "network" in details["clip_score"]["differs_from_published"][0]
    assert "TensorFlow" in details["recall"]["differs_from_published"][0]
    page = (run / "report.md").read_text()
    assert "SwiftBrush v2, arXiv 2408.14176" in page and "measured on coco30k_swiftbrush" in page
    beside = page.partition("Published values")[2]
    assert "| FID-6 ↓ |" in beside and not any(f"| {name} ↑ |" in beside for name in ALL - {"fid"})
    cli.main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(run)])
    validated = json.loads((run / "validate" / "report.json").read_text())["metrics"]["fid"]["details"]
    assert validated["label"] == "FID-5"
    assert "5 pictures instead of 6" in validated["differs_from_published"]
    assert "arXiv 2408.14176" not in (run / "validate" / "report.md").read_text()
    other = fit(name, models(name), tmp_path / "other", metrics, *with_coco(coco), whole=True)
    found = json.loads((other / "report.json").read_text())["metrics"]["fid"]["details"]
    said = "captions of captions_val2014.json instead of the release's dataset.json"
    assert found["differs_from_published"][0] == said
    assert "arXiv 2408.14176" not in (other / "report.md").read_text()


def test_a_judge_that_is_named_must_be_there(
    models: Callable[[str], list[str]], metrics: list[dict[str, Any]], tmp_path: Path
) -> None:
    metrics[-1]["init_args"]["checkpoint"] = str(tmp_path / "hsp.pt")
    with pytest.raises(UserError, match=r"looked for .*hsp\.pt"):
        fit("sd15_swiftbrush", models("sd15_swiftbrush"), tmp_path, metrics[3:])


@pytest.mark.parametrize(("share", "validated"), [(1e-9, [1]), (1.0, [1, 2, 3, 4]), (None, [1, 2, 3, 4])])
def test_validations_that_take_too_long_are_left_out(
    share: float | None, validated: list[int], tiny_sd: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The first is measured; how long the others would take is then known, in a run that continues, too."""
    bound = EvaluationShare(share)
    trainer(tmp_path, bound, max_steps=4, val_check_interval=1).fit(StandIn(tiny_sd), StandInData())
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    found = {int(row["step"]) for row in rows if row.get("throughput/evaluation_share")}
    assert found == set(validated)
    assert capsys.readouterr().out.count("is left out: with it evaluations would take") == 4 - len(validated)
    assert bound.waited == (4 if share == 1e-9 else -1) and 0 < bound.evaluating < bound.total
    again = EvaluationShare(share)
    again.load_state_dict(bound.state_dict())
    assert again.state_dict() == bound.state_dict()


def test_shares_are_shares() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(UserError, match="max_share"):
            EvaluationShare(share)
