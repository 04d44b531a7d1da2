"""The Evaluation callback in a real fit: what it logs, what it stores, what it computes only once."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.evaluated import evaluation_set, shown_set
from callbacks.evaluation import Evaluation
from callbacks.loggers import MetricsCSV
from callbacks.metrics import teacher as teacher_module
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.frechet import FID, FrechetDistance
from callbacks.metrics.inception import InceptionExtractor
from callbacks.metrics.measure import evaluate_model, measure_set
from callbacks.metrics.reference import ReferenceFolder, compute_reference, framed_reference
from callbacks.metrics.teacher import Teacher
from common.errors import UserError
from common.hashing import hash_texts
from datamodules.evaluation_sets import EvaluationSet
from datamodules.picture_files import Frame
from tests.callbacks.networks import inception_file, pictures, save
from tests.callbacks.standin import CAPTIONS, StandIn, StandInData

CHOOSING = [f"{caption}, at night" for caption in CAPTIONS]  # of validations


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def reference(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    compute_reference([images], CAPTIONS, ClipExtractor(tiny_clip), "noise").save(path)
    return str(path)


def evaluation(tiny_clip: Path, reference: str | None, **settings: Any) -> Evaluation:
    defaults = {"final_size": 8, "batch_size": 3, "teacher_steps": 2, "timing_batch_size": 2}
    return Evaluation(str(tiny_clip), reference, **(defaults | settings))


def trainer(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    defaults = {
        "max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "num_sanity_val_steps": 1, "val_check_interval": 2,
        "log_every_n_steps": 1,
        "check_val_every_n_epoch": None, "logger": MetricsCSV(folder), "default_root_dir": folder,
    }  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **(defaults | settings))


@pytest.fixture(scope="module")
def fitted(
    tiny_sd: Path, tiny_clip: Path, reference: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, StandIn, L.Trainer, Path]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONE_STEP_CACHE", str(folder / "cache"))
        callback, module = evaluation(tiny_clip, reference), StandIn(tiny_sd)
        run = trainer(folder, callback)
        data = StandInData()
        data.val_captions = CHOOSING
        run.fit(module, data)
    return callback, module, run, folder


Fitted = tuple[Evaluation, StandIn, L.Trainer, Path]


def test_validation_logs_every_picture_once_without_padding(fitted: Fitted, tiny_clip: Path) -> None:
    _, module, run, _ = fitted
    metric = ClipScore().bind(ClipExtractor(tiny_clip))
    expected = evaluate_model(module.generator.images, CHOOSING[:7], [metric], 7)["clip_score"]
    assert run.callback_metrics["val/clip_score"].item() == pytest.approx(expected["value"], abs=1e-5)
    assert run.callback_metrics["val/frechet_distance"].item() > 0


def test_validations_have_captions_of_their_own_and_groups_only_where_they_belong() -> None:
    data = SimpleNamespace(eval_captions=CAPTIONS, val_captions=CHOOSING, eval_groups=["a"] * len(CAPTIONS))
    run: Any = SimpleNamespace(datamodule=data, validating=True, sanity_checking=False)
    validation = evaluation_set(run, 3)
    assert (validation.captions, validation.groups) == (CHOOSING[:3], None)
    run.validating = False
    report = evaluation_set(run, 3)
    assert (report.captions, report.groups) == (CAPTIONS[:3], ["a"] * 3)


def test_of_grouped_captions_as_many_of_each_are_measured() -> None:
    """Places in validations are those in the captions shown, not in the whole list."""
    groups = ["a"] * 6 + ["b"] * 6
    shown = [*CAPTIONS[:2], *CAPTIONS[6:8]]
    chosen = EvaluationSet("x", CAPTIONS, list(range(12)), groups=groups).first(4)
    data = SimpleNamespace(eval_captions=CAPTIONS, eval_groups=groups, val_set=chosen)
    run: Any = SimpleNamespace(datamodule=data, validating=True, sanity_checking=False)
    validation = shown_set(run)
    assert (validation.captions, validation.groups) == (shown, ["a", "a", "b", "b"])
    assert validation.seeds == [0, 1, 2, 3]
    run.validating = False
    assert (shown_set(run).captions, shown_set(run).groups) == (CAPTIONS, groups)
    last = evaluation_set(run, 6, seed=5)
    assert last.captions == [*CAPTIONS[:3], *CAPTIONS[6:9]] and last.groups == ["a"] * 3 + ["b"] * 3
    assert last.seeds == [5, 6, 7, 8, 9, 10] and evaluation_set(run, 99).captions == CAPTIONS
    with pytest.raises(UserError, match="Evaluation.final_size is 7, .* a multiple of 2"):
        evaluation_set(run, 7)
    data.val_set, run.validating = None, True
    assert shown_set(run).captions == CAPTIONS


def test_final_results_hold_student_and_teacher(fitted: Fitted, tiny_clip: Path) -> None:
    callback, module, _, folder = fitted
    final = callback.final
    assert final is not None and final.step == 2 and final.weights == "ema" and module.swapped >= 1
    assert set(final.metrics) == {"frechet_distance", "clip_score", "milliseconds_per_image"}
    assert set(final.teacher_metrics) == {"steps_2", "steps_1"}
    for results in (final.metrics, *final.teacher_metrics.values()):
        assert set(results) == set(final.metrics)
        for result in results.values():
            assert set(result) == {"value", "num_images", "details"}
        assert results["clip_score"]["num_images"] == results["frechet_distance"]["num_images"] == 8
        assert "fewer than 8 x 16" in results["frechet_distance"]["details"]["note"]
        assert results["milliseconds_per_image"]["value"] > 0
    # The untrained student is the teacher, so one step of both gives the same numbers; many steps do not.
    single, many = final.teacher_metrics["steps_1"], final.teacher_metrics["steps_2"]
    for name in ("frechet_distance", "clip_score"):
        assert single[name]["value"] == pytest.approx(final.metrics[name]["value"], rel=1e-4, abs=1e-6)
        assert many[name]["value"] != pytest.approx(final.metrics[name]["value"], rel=1e-3)
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("test/frechet_distance")]
    assert len(rows) == 1
    assert float(rows[0]["test/clip_score"]) == pytest.approx(final.metrics["clip_score"]["value"])


def test_manifest_says_what_to_keep_the_same(fitted: Fitted) -> None:
    callback, _, _, _ = fitted
    assert callback.final is not None and callback.extractor is not None
    manifest = callback.final.manifest
    assert manifest["captions"]["count"] == 8 and manifest["captions"]["hash"] == hash_texts(CAPTIONS[:8])
    assert manifest["reference"]["num_images"] == 12
    assert manifest["reference"]["captions_are_those_of_the_evaluation"] is True
    sight = {"name": callback.extractor.name, "hash": callback.extractor.content_hash}
    assert manifest["extractors"] == {"frechet_distance": sight, "clip_score": sight}
    assert not {"references_of_metrics", "metric_settings"} & manifest.keys()
    assert manifest["guidance"] == {"student": None, "steps_2": 4.5, "steps_1": None}
    assert manifest["seeds"]["count"] == 8 and manifest["metric_versions"]["clip_score"] == 1
    assert "centre crop" in manifest["crop_and_resize"]


def test_manifest_names_every_network_and_reference(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the scoring CLIP those of metrics that have their own; of folders the hash of their pictures."""
    monkeypatch.setattr(InceptionExtractor, "width", 48)
    inception = inception_file(tmp_path, width=48)
    common, own = (save(pictures(4, seed=seed), tmp_path / str(seed)) for seed in (1, 2))
    metrics = [ClipScore(), FrechetDistance(), FID(inception=str(inception), reference=str(own))]
    callback = evaluation(tiny_clip, str(common), metrics=metrics)
    run: Any = SimpleNamespace(
        datamodule=StandInData(), strategy=SimpleNamespace(root_device=torch.device("cpu")),
        validating=False, sanity_checking=False,
    )  # fmt: skip
    callback.setup(run, StandIn.__new__(StandIn), "test")
    manifest = callback.manifest(run, evaluation_set(run, 8), 0, {}, "ema")
    clip, network = ClipExtractor(tiny_clip), InceptionExtractor(inception)
    sight = {"name": clip.name, "hash": clip.content_hash}
    assert manifest["extractors"] == {
        "clip_score": sight, "frechet_distance": sight,
        "fid": {"name": network.name, "hash": network.content_hash},
    }  # fmt: skip
    hashes = [ReferenceFolder(folder).content_hash for folder in (common, own)]
    assert hashes[0] != hashes[1]
    assert manifest["reference"] == {"folder": "1", "files": 4, "content_hash": hashes[0]}
    assert manifest["references_of_metrics"].keys() == {"fid"}
    assert manifest["references_of_metrics"]["fid"]["pictures_hash"] == hashes[1]
    assert manifest["metric_settings"] == {"fid": {"mode": "clean"}}


def test_a_folder_that_nothing_is_compared_with_is_known_by_names_and_sizes(tmp_path: Path) -> None:
    """No file is read for its description; what hashes them does it with all processes."""
    folder = save(pictures(3), tmp_path / "real")
    before = ReferenceFolder(folder)
    described = before.describe()
    assert described.keys() == {"folder", "files", "hash_of_names_and_sizes"}
    assert described == ReferenceFolder(folder).describe()
    content = before.content_hash
    assert before.describe() == {"folder": "real", "files": 3, "content_hash": content}
    path = folder / "0001.png"
    path.rename(folder / "0003.png")
    renamed = ReferenceFolder(folder).describe()
    assert renamed != described
    (folder / "0003.png").write_bytes((folder / "0003.png").read_bytes() + b"!")
    assert ReferenceFolder(folder).describe() not in (described, renamed)


def test_teacher_is_measured_once(
    tiny_sd: Path, tiny_clip: Path, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []

    def counting(*arguments: Any, **keywords: Any) -> Any:
        counted.append(arguments[4])
        return measure_set(*arguments, **keywords)

    monkeypatch.setattr(teacher_module, "measure_set", counting)

    def run(**settings: Any) -> Evaluation:
        counted.clear()
        callback = evaluation(tiny_clip, reference, **settings)
        trainer(tmp_path, callback, max_steps=1, limit_val_batches=0).fit(StandIn(tiny_sd), StandInData())
        return callback

    first = run()
    assert len(counted) == 2
    second = run()
    assert counted == []
    assert first.final is not None and second.final is not None
    for row, results in first.final.teacher_metrics.items():
        assert results["clip_score"] == second.final.teacher_metrics[row]["clip_score"]
        again = second.final.teacher_metrics[row]["milliseconds_per_image"]
        assert results["milliseconds_per_image"] != again
    run(teacher_guidance=2.0)
    assert len(counted) == 1  # the single step has no guidance
    run(seed=100)
    assert len(counted) == 2
    run(final_size=6)
    assert len(counted) == 2
    run(teacher_rows=False)
    assert counted == []


def test_later_weights_of_the_teacher_are_another_teacher(own_sd: Path) -> None:
    before = Teacher(str(own_sd)).content_hash
    weights = own_sd / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert Teacher(str(own_sd)).content_hash != before


def test_finished_run_is_completed_without_training(
    tiny_sd: Path, tiny_clip: Path, reference: str, tmp_path: Path
) -> None:
    callback, module = evaluation(tiny_clip, reference, teacher_rows=False), StandIn(tiny_sd)
    module.student_steps = 5
    trainer(tmp_path, callback, max_steps=0).fit(module, StandInData())
    assert callback.final is not None and callback.final.step == 5
    assert callback.final.teacher_metrics == {}


def test_test_stage_logs_under_test(tiny_sd: Path, tiny_clip: Path, reference: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, evaluation(tiny_clip, reference))
    (values,) = run.test(StandIn(tiny_sd), StandInData(), verbose=False)
    assert set(values) == {"test/frechet_distance", "test/clip_score"}


def test_other_captions_are_not_comparable(
    tiny_sd: Path, tiny_clip: Path, reference: str, tmp_path: Path
) -> None:
    callback = evaluation(tiny_clip, reference, teacher_rows=False)
    run = trainer(tmp_path, callback, max_steps=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match="not comparable"):
        run.fit(StandIn(tiny_sd), StandInData(CAPTIONS[:9]))
    assert callback.final is not None
    assert callback.final.manifest["reference"]["captions_are_those_of_the_evaluation"] is False


def test_mistakes_are_named_before_training(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    for callback, message in [
        (evaluation(tmp_path / "none", None), "no CLIP model"),
        (evaluation(tiny_clip, str(tmp_path / "none.safetensors")), "no reference statistics"),
    ]:
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, callback).fit(StandIn(tiny_sd), StandInData())
    data = StandInData()
    del data.eval_captions
    with pytest.raises(UserError, match="StandInData.*eval_captions"):
        trainer(tmp_path, evaluation(tiny_clip, None)).fit(StandIn(tiny_sd), data)
    with pytest.raises(UserError, match="batch_size is 0"):
        evaluation(tiny_clip, None, batch_size=0)
    with pytest.raises(UserError, match="twice"):
        evaluation(tiny_clip, None, metrics=[ClipScore(), ClipScore()])
    assert [metric.name for metric in evaluation(tiny_clip, None).metrics] == ["clip_score"]


class Two(ClipScore):
    """A metric with two names, one of them a part, as hpsv2 has; it needs the groups."""

    name = "two"

    def prepare(self, captions: Any, groups: Any = None, negatives: Any = None) -> None:
        self.captions, self.groups, self.places = list(captions), groups, []

    def _add(self, features: torch.Tensor, prompts: list[str], positions: Any) -> None:
        assert [self.captions[place] for place in positions] == prompts
        self.places += positions
        super()._add(features, prompts, positions)

    def results(self) -> dict[str, Any]:
        whole = self.result()
        part = {"value": float(len(self.places)), "num_images": whole["num_images"], "details": {}}
        return {"two": whole, "two/part": part}


class GroupedData(StandInData):
    """Captions in two groups; validations show the first four of each, but for the last."""

    def __init__(self) -> None:
        super().__init__()
        self.eval_groups = ["a", "b"] * 6
        self.val_set = EvaluationSet("x", CAPTIONS, list(range(12)), groups=self.eval_groups).first(8)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self.val_set.captions)


class Last(L.Callback):
    """Asks for what the validation has measured while it lasts, as a report does."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = [one for one in trainer.callbacks if isinstance(one, Evaluation)]  # type: ignore[attr-defined]
        if found[0].measured:
            self.found = found[0].last(trainer, 1, "ema")


def test_metrics_with_parts_know_groups_and_places(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = Two()
    callback = evaluation(tiny_clip, None, metrics=[metric])
    last = Last()
    run = trainer(tmp_path, callback, last, max_steps=1, val_check_interval=1)
    run.fit(StandIn(tiny_sd), GroupedData())
    assert run.callback_metrics["val/two/part"] == 7
    shown = GroupedData().val_set.captions[:7]
    assert last.found.drawn is not None and last.found.drawn.groups == ["a"] * 4 + ["b"] * 3
    assert last.found.drawn.captions == shown and last.found.drawn.seeds == list(range(7))
    assert last.found.manifest["captions"]["hash"] == hash_texts(shown)
    assert callback.final is not None and metric.groups == ["a"] * 4 + ["b"] * 4
    assert callback.final.metrics["two/part"]["value"] == 8
    rows = callback.final.teacher_metrics
    assert {"two", "two/part"} <= set(rows["steps_1"]) and rows["steps_1"]["two/part"]["value"] == 8
    monkeypatch.setattr(teacher_module, "measure_set", None)  # everything is cached
    again = evaluation(tiny_clip, None, metrics=[Two()])
    trainer(tmp_path, again, max_steps=1, limit_val_batches=0).fit(StandIn(tiny_sd), GroupedData())
    assert again.final is not None
    assert again.final.teacher_metrics["steps_1"]["two/part"] == rows["steps_1"]["two/part"]


def test_real_pictures_get_the_frame_of_the_drawn_ones(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, reference: str
) -> None:
    real = save(pictures(9, height=40, width=24), tmp_path / "real")
    callback = evaluation(tiny_clip, str(real), frame=Frame(12), teacher_rows=False)
    run = trainer(tmp_path, callback)
    (values,) = run.test(StandIn(tiny_sd), StandInData(), verbose=False)
    metric = FrechetDistance().bind(
        ClipExtractor(tiny_clip),
        ReferenceFolder(save(Frame(12).batch(pictures(9, height=40, width=24)), tmp_path / "b")),
    )
    drawn = StandIn(tiny_sd).generator.images(CAPTIONS[:7], list(range(7)))
    metric.update(Frame(12).batch(drawn), CAPTIONS[:7])
    assert values["test/frechet_distance"] == pytest.approx(metric.result()["value"], rel=1e-5)
    statistics = callback.metrics[0].reference
    statistics.save(tmp_path / "framed.safetensors")
    assert framed_reference(tmp_path / "framed.safetensors", Frame(12)).describe() == statistics.describe()
    for frame in (None, Frame(12, crop=False)):
        with pytest.raises(UserError, match="prepared as '8-bit, centre crop, LANCZOS to 12x12; "):
            framed_reference(tmp_path / "framed.safetensors", frame)
    with pytest.raises(UserError, match="prepared as .* centre crop, LANCZOS to 12x12' is needed"):
        trainer(tmp_path, evaluation(tiny_clip, reference, frame=Frame(12))).test(
            StandIn(tiny_sd), StandInData()
        )


def test_pictures_with_nan_stop_the_evaluation(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    module = StandIn(tiny_sd)
    draw = module.generator.images
    module.generator.images = lambda *arguments: draw(*arguments) * torch.nan  # type: ignore[method-assign]
    for frame in (None, Frame(12)):
        run = trainer(tmp_path, evaluation(tiny_clip, None, frame=frame))
        with pytest.raises(UserError, match="NaN or infinity"):
            run.test(module, StandInData(), verbose=False)
