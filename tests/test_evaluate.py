"""`evaluate` end to end on tiny models: what it writes, how it goes on, what it refuses."""

import errno
import importlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cli
from callbacks.metrics import unfinished as unfinished_module
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.reference import compute_reference
from commands.evaluate import Options
from commands.kept_pictures import KeptPictures
from commands.options import parse
from common.errors import UserError
from tests.callbacks.standin import CAPTIONS

ROOT = Path(__file__).resolve().parents[1]
Evaluate = Callable[..., dict[str, Any]]
SET = """
data:
  class_path: datamodules.evaluation_sets.CaptionFile
  init_args: {captions: "${captions}"}
metrics:
  - class_path: callbacks.metrics.frechet.FrechetDistance
  - class_path: callbacks.metrics.clip_score.ClipScore
"""


@pytest.fixture(scope="module")
def reference(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    compute_reference([images], CAPTIONS, ClipExtractor(tiny_clip), "noise").save(path)
    return path


@pytest.fixture
def arguments(tiny_sd: Path, tiny_clip: Path, reference: Path, tmp_path: Path) -> dict[str, str]:
    """Options of a complete evaluation of the tiny model."""
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    (tmp_path / "set.yaml").write_text(SET)
    return {
        "config": str(tmp_path / "set.yaml"), "model": str(tiny_sd), "scoring_clip": str(tiny_clip),
        "reference": str(reference), "captions": str(tmp_path / "captions.txt"), "batch_size": "5",
        "output": str(tmp_path / "out"), "device": "cpu",
    }  # fmt: skip


@pytest.fixture
def evaluate(arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Evaluate:
    """Run the command with some options changed (None: left out); returns report.json."""
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))

    def run(**changed: Any) -> dict[str, Any]:
        settings = {k: v for k, v in {**arguments, **changed}.items() if v is not None}
        cli.main(["evaluate", *(f"--{name}={value}" for name, value in settings.items())])
        report: dict[str, Any] = json.loads((Path(str(settings["output"])) / "report.json").read_text())
        return report

    return run


def values(report: dict[str, Any]) -> dict[str, float]:
    return {name: result["value"] for name, result in report["metrics"].items()}


def noise_pictures(folder: Path, count: int, size: int = 16) -> Path:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_a_model_is_measured_and_reported(
    evaluate: Evaluate, arguments: dict[str, str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        clock = SimpleNamespace(perf_counter=iter([100.0, 148.0]).__next__)  # around drawing and measuring
        patch.setattr("commands.evaluate.time", clock)
        report = evaluate()
    output = Path(arguments["output"])
    assert set(report["metrics"]) == {"frechet_distance", "clip_score"}
    for result in report["metrics"].values():
        assert result["num_images"] == 12
        assert result["details"]["seeds"] == "0 + place of the caption"
        assert result["details"]["differs_from_published"] is None
    assert report["metrics"]["frechet_distance"]["details"]["reference"].startswith("12 real pictures (")
    assert (report["timing"]["seconds"], report["timing"]["images_per_second"]) == (48, 0.25)
    assert report["teacher_metrics"] == {}
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["evaluation_set"]["count"] == 12 and manifest["model"]["sampler"] == "one step"
    assert manifest["reference"]["captions_are_those_of_the_evaluation"] is True
    written = {path.name.split(".out.")[0] for path in output.iterdir()}
    assert written == {
        "config.yaml", "events", "manifest.json", "metrics.csv", "report.html", "report.json", "report.md",
        "samples.png",
    }  # fmt: skip
    header, row = (output / "metrics.csv").read_text().splitlines()
    assert (
        float(dict(zip(header.split(","), row.split(",")))["test/clip_score"]) == values(report)["clip_score"]
    )
    assert "tiny_sd0, 1 step" in (output / "report.md").read_text() + capsys.readouterr().out
    assert "How each number was measured" in (output / "report.html").read_text()
    again = evaluate(config=str(output / "config.yaml"), output=str(output.parent / "again"))
    assert values(again) == values(report)


def test_saved_pictures_score_as_the_model_that_drew_them(
    evaluate: Evaluate, arguments: dict[str, str], tmp_path: Path
) -> None:
    drawn = evaluate(save_images="true")
    pictures = Path(arguments["output"]) / "images"
    assert len(list(pictures.glob("*.png"))) == 12
    found = evaluate(
        model=None,
        images=pictures,
        captions=pictures / "generation.json",
        batch_size=7,
        output=tmp_path / "given",
    )
    assert values(found) == pytest.approx(values(drawn), rel=1e-6)
    with pytest.raises(UserError, match="lie in the output folder"):  # which would be cleared
        evaluate(model=None, images=pictures, captions=pictures / "generation.json")
    assert len(list(pictures.glob("*.png"))) == 12
    assert found["weights"] == "given pictures"
    assert found["metrics"]["clip_score"]["details"]["seeds"] == "given pictures"


def test_steps_and_guidance_of_a_stock_pipeline(evaluate: Evaluate, tmp_path: Path) -> None:
    one = evaluate(count=4)
    two = evaluate(count=4, steps=2, output=tmp_path / "two")
    guided = evaluate(count=4, steps=2, **{"guidance-scale": 3}, output=tmp_path / "guided")
    assert len({report["metrics"]["clip_score"]["value"] for report in (one, two, guided)}) == 3
    manifest = json.loads((tmp_path / "guided" / "manifest.json").read_text())
    assert manifest["model"] | {"hash": "", "weights": ""} == {
        "pictures": "tiny_sd0, 2 steps, guidance 3", "sampler": "DDIMScheduler", "steps": 2,
        "guidance_scale": 3.0, "dtype": "float32", "hash": "", "weights": "", "negative_guidance": "none",
        "negative_scale": None, "negative_steps": None,
    }  # fmt: skip
    half = evaluate(count=4, dtype="bfloat16", output=tmp_path / "half")
    difference = abs(half["metrics"]["clip_score"]["value"] - one["metrics"]["clip_score"]["value"])
    assert 0 < difference < 0.02


def test_negative_prompts_of_a_set_of_pairs(evaluate: Evaluate, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    rows = [f"{caption},{CAPTIONS[-1 - i]}" for i, caption in enumerate(CAPTIONS)]
    pairs.write_text("\n".join(["prompt,negative_prompt", *rows]))
    config = tmp_path / "pairs.yaml"
    config.write_text(SET.replace("evaluation_sets.CaptionFile", "evaluation_sets.PromptPairs"))
    given = {"config": config, "captions": pairs, "count": 4}

    def score(name: str, **changed: Any) -> float:
        report = evaluate(**given, **changed, output=tmp_path / name)
        return float(report["metrics"]["clip_score"]["value"])

    plain = score("plain")
    nasa = score("nasa", negative_guidance="nasa", negative_scale=0.5)
    swapped = score("one", negative_guidance="nasa", negative_scale=0.5, negative_prompt=CAPTIONS[-1])
    guided = score("cfg", negative_guidance="cfg", negative_scale=3)
    stock = score("stock", negative_guidance="cfg", negative_scale=3, steps=2)
    assert len({plain, nasa, swapped, guided, stock}) == 5
    assert score("off", negative_guidance="nasa", negative_scale=0) == pytest.approx(plain, abs=1e-7)
    manifest = json.loads((tmp_path / "nasa" / "manifest.json").read_text())
    assert manifest["model"]["pictures"] == "tiny_sd0, 1 step, negative prompts by nasa 0.5"
    assert manifest["evaluation_set"]["hash_of_negative_prompts"]


class Killed(BaseException):
    """Stands for SIGKILL."""


def kill(evaluate: Evaluate, after: int, **settings: Any) -> None:
    """Evaluate until so many captions are saved, after every 4 of them, and no further."""
    save = unfinished_module.Unfinished.save

    def save_and_die(self: Any, metrics: Any, done: int) -> None:
        save(self, metrics, done)
        if done >= after:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfinished_module.Unfinished, "save", save_and_die)
        with pytest.raises(Killed):
            evaluate(**{"batch_size": 4, "save_every": 4} | settings)


def test_an_interrupted_evaluation_goes_on(
    evaluate: Evaluate, arguments: dict[str, str], tmp_path: Path
) -> None:
    expected = evaluate(output=tmp_path / "whole", save_images="true", batch_size=4)
    kill(evaluate, 8, save_images="true")
    output = Path(arguments["output"])
    assert [path.name for path in (output / "unfinished").glob("*.pt")] == ["done_8_rank_0_of_1.pt"]
    drawn = sorted((output / "images").glob("*.png"))
    assert len(drawn) == 8
    times = [path.stat().st_mtime_ns for path in drawn]
    for changed, named in [({"steps": 2}, "model"), ({"count": 10}, "evaluation_set")]:
        with pytest.raises(UserError, match=f"interrupted evaluation with another {named}"):
            evaluate(**changed, save_images="true")
    found = evaluate(batch_size=4, save_images="true")
    assert values(found) == pytest.approx(values(expected), rel=1e-12)
    assert found["metrics"]["clip_score"]["num_images"] == 12
    assert [path.stat().st_mtime_ns for path in drawn] == times
    assert not (output / "unfinished").exists()


def test_an_evaluation_killed_before_its_first_state_starts_again(
    evaluate: Evaluate, arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = KeptPictures.__call__

    def keep_and_die(self: Any, places: list[int], images: Any) -> None:
        keep(self, places, images)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(KeptPictures, "__call__", keep_and_die)
        with pytest.raises(Killed):
            evaluate(save_images="true")
    pictures = Path(arguments["output"]) / "images"
    assert len(list(pictures.glob("*.png"))) == 5
    # other settings are no obstacle, since nothing has been measured; what lies there is drawn again
    assert evaluate(save_images="true", count=4)["metrics"]["clip_score"]["num_images"] == 4
    assert len(list(pictures.glob("*.png"))) == 4


@pytest.mark.parametrize(("first", "then"), [("false", "true"), ("true", "false")])
def test_an_interrupted_evaluation_keeps_what_it_began_to_keep(
    first: str, then: str, evaluate: Evaluate, arguments: dict[str, str]
) -> None:
    kill(evaluate, 4, save_images=first)
    with pytest.raises(UserError, match="interrupted evaluation with another --save-images.* the same again"):
        evaluate(save_images=then)
    evaluate(save_images=first)
    manifest = json.loads((Path(arguments["output"]) / "manifest.json").read_text())
    assert not any("save" in name for name in manifest)  # it changes no number


def full_disk(monkeypatch: pytest.MonkeyPatch, module: str, refused: str) -> None:
    """Files of such a name, which this module would write whole, find no room."""
    written_whole = importlib.import_module(module).written_whole

    @contextmanager
    def limited(file: Path) -> Iterator[Path]:
        with written_whole(file) as partial:
            if re.fullmatch(refused, file.name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield partial

    monkeypatch.setattr(f"{module}.written_whole", limited)


@pytest.mark.parametrize(
    ("module", "refused", "kept"),
    [
        ("commands.kept_pictures", "00009.png", 8),  # while drawing
        ("reports.sheets", "samples.png", 8),  # the grid, after measuring
        ("common.files", "generation.json|report.json", 8),
        ("commands.kept_pictures", "00002.png", 0),
        ("callbacks.metrics.unfinished", "done_8_.*", 4),
    ],
)
def test_on_a_full_disk_what_is_measured_stays(
    module: str, refused: str, kept: int, evaluate: Evaluate, arguments: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = evaluate(output=tmp_path / "whole", save_images="true", batch_size=4)
    output = Path(arguments["output"])
    goes_on = f"goes on after the {kept} pictures" if kept else "start again: nothing that was measured"
    with monkeypatch.context() as patch:
        full_disk(patch, module, refused)
        message = rf"{output}.* can't be written: .*No space left.*; make room or .*{goes_on}"
        with pytest.raises(UserError, match=message):
            evaluate(save_every=4, batch_size=4, save_images="true")
    assert output.exists() == (kept > 0)  # pictures that nothing goes on from are no use
    drawn, draw = list[int](), KeptPictures.__call__
    monkeypatch.setattr(KeptPictures, "__call__", lambda *args: (drawn.extend(args[1]), draw(*args)))
    found = evaluate(save_every=4, batch_size=4, save_images="true")
    assert values(found) == pytest.approx(values(expected), rel=1e-12)
    assert drawn == list(range(kept, 12)) and len(list((output / "images").glob("*.png"))) == 12


def test_torchs_words_for_a_full_disk_are_translated(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 640 vs 534")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="unfinished can't be written: .*unexpected pos.* --save-every 0"):
        evaluate(save_every=4, batch_size=4)


def test_what_is_no_matter_of_the_disk_stays_as_it_is(
    evaluate: Evaluate, arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "the server of a logger")

    def closed(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", arguments["output"] + "/report.html")

    monkeypatch.setattr("commands.evaluate.write_report", refused)
    with pytest.raises(ConnectionRefusedError):
        evaluate(count=4)
    monkeypatch.setattr("commands.evaluate.write_report", closed)
    with pytest.raises(UserError, match="can't be written: .*Permission denied: .*report.html"):
        evaluate(count=4)


def test_pictures_that_were_replaced_are_refused(
    evaluate: Evaluate, arguments: dict[str, str], tmp_path: Path
) -> None:
    """Bitmaps are all of one size; the content tells them apart, the name does not matter."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (13, 16, 16, 3), dtype=np.uint8)
    for i in range(12):
        Image.fromarray(noise[i]).save(pictures / f"{i}.bmp")
    given = {"model": None, "images": pictures}

    def hash_of(name: str) -> str:
        evaluate(**given, output=tmp_path / name)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        return str(manifest["model"]["hash_of_pictures"])

    first = hash_of("first")
    kill(evaluate, 4, **given)
    Image.fromarray(noise[12]).save(pictures / "2.bmp")
    with pytest.raises(UserError, match="interrupted evaluation with another model"):
        evaluate(**given)
    assert hash_of("second") != first
    Image.fromarray(noise[2]).save(pictures / "2.bmp")
    (pictures / "11.bmp").rename(pictures / "12.bmp")
    assert hash_of("third") == first
    evaluate(**given)
    for old, new in (("0", "x"), ("1", "0"), ("x", "1")):  # the order does
        (pictures / f"{old}.bmp").rename(pictures / f"{new}.bmp")
    assert hash_of("fourth") != first


def test_an_interrupted_evaluation_may_get_a_layout(evaluate: Evaluate, arguments: dict[str, str]) -> None:
    kill(evaluate, 8, save_images="true")
    evaluate(save_images="true", layout="geneval2")
    paths = json.loads((Path(arguments["output"]) / "geneval2" / "pictures.json").read_text())
    assert list(paths) == CAPTIONS and all(Path(path).is_file() for path in paths.values())


def test_damaged_states_are_named(evaluate: Evaluate, arguments: dict[str, str]) -> None:
    kill(evaluate, 4)
    (state,) = (Path(arguments["output"]) / "unfinished").glob("*.pt")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match="done_4_rank_0_of_1.pt can't be read"):
        evaluate()


# Several processes


def process(rank: int, world: int, port: int, args: list[str]) -> None:
    """One of several processes, as torchrun starts them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cli.main(["evaluate", *args])


def in_processes(world: int, settings: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    torch.multiprocessing.start_processes(process, (world, port, args), world, start_method="fork")
    report: dict[str, Any] = json.loads((Path(str(settings["output"])) / "report.json").read_text())
    return report


@pytest.mark.parametrize("world", [2, 3])
def test_every_number_of_processes_counts_101_pictures_exactly(
    world: int, evaluate: Evaluate, arguments: dict[str, str], tmp_path: Path
) -> None:
    pictures = noise_pictures(tmp_path / "pictures", 101)
    captions = tmp_path / "captions101.txt"
    captions.write_text("\n".join(f"a {CAPTIONS[i % 12]} {i}" for i in range(101)))
    given = {"model": None, "images": pictures, "captions": captions, "batch_size": 16}
    alone = evaluate(**given, output=tmp_path / "one")
    several = in_processes(world, {**arguments, **given, "output": tmp_path / "several"})
    for name, result in several["metrics"].items():
        assert result["num_images"] == 101
        assert result["value"] == pytest.approx(alone["metrics"][name]["value"], rel=1e-6)
    assert several["environment"]["processes"] == world
    one, other = (json.loads((tmp_path / x / "manifest.json").read_text()) for x in ("one", "several"))
    assert other["model"] == one["model"]


def test_two_processes_draw_what_one_draws_and_go_on_where_it_stopped(
    evaluate: Evaluate, arguments: dict[str, str], tmp_path: Path
) -> None:
    alone = evaluate(count=11, batch_size=2)
    kill(evaluate, 4, count=11, batch_size=2, output=tmp_path / "several")
    settings = {**arguments, "count": 11, "batch_size": 2, "output": tmp_path / "several"}
    several = in_processes(2, settings)
    assert values(several) == pytest.approx(values(alone), rel=1e-3)
    assert several["metrics"]["clip_score"]["num_images"] == 11


# Layouts for the judges of others


LAYOUT = """
save_images: true
layout: {layout}
data:
  class_path: datamodules.{source}
  init_args: {{captions: "${{captions}}"}}
"""


@pytest.mark.parametrize(
    ("layout", "source", "images_per_prompt"),
    [("geneval", "task_prompts.GenEval", 4), ("dpg_bench", "published_sets.DPGBench", 4),
     ("geneval2", "published_sets.GenEval2", 1)],
)  # fmt: skip
def test_layouts_are_what_other_judges_read(
    layout: str, source: str, images_per_prompt: int, evaluate: Evaluate, tmp_path: Path
) -> None:
    entries = [
        {"tag": "colors", "prompt": text, "include": [{"class": "cat", "count": 1, "color": "red"}]}
        for text in ("a red cat", "a cat")
    ]
    captions = tmp_path / "prompts.jsonl"
    captions.write_text("\n".join(map(json.dumps, entries)))
    if layout == "dpg_bench":
        captions = tmp_path / "prompts"
        captions.mkdir()
        for name, entry in zip(("partiprompts1", "2"), entries, strict=True):
            (captions / f"{name}.txt").write_text(str(entry["prompt"]))
    (tmp_path / "layout.yaml").write_text(LAYOUT.format(layout=layout, source=source))
    settings = {"config": tmp_path / "layout.yaml", "captions": captions}
    report = evaluate(**settings, reference=None, batch_size=3)
    images, found = tmp_path / "out" / "images", tmp_path / "out" / layout
    assert report["metrics"] == {} and len(list(images.glob("*.png"))) == 2 * images_per_prompt

    def pixels(path: Path) -> Any:
        return np.array(Image.open(path))

    if layout == "geneval":
        assert json.loads((found / "00001" / "metadata.jsonl").read_text()) == entries[1]
        names = [path.name for path in sorted((found / "00001" / "samples").iterdir())]
        assert names == ["00000.png", "00001.png", "00002.png", "00003.png"]
        assert (pixels(found / "00001" / "samples" / "00002.png") == pixels(images / "00006.png")).all()
    elif layout == "dpg_bench":  # in the order of their names: "2" comes first
        assert {path.name for path in found.iterdir()} == {"2.png", "partiprompts1.png"}
        sheet, side = pixels(found / "2.png"), 16
        assert sheet.shape == (32, 32, 3)
        assert (sheet[:side, side:] == pixels(images / "00001.png")).all()
        assert (sheet[side:, :side] == pixels(images / "00002.png")).all()
    else:
        paths = json.loads((found / "pictures.json").read_text())
        assert list(paths) == ["a red cat", "a cat"] and Path(paths["a cat"]) == images / "00001.png"
    for changed, message in [
        ({"save_images": "false"}, "--layout needs --save-images true"),
        ({"layout": "geneval" if layout != "geneval" else "dpg_bench"}, "is that of the prompts of"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate(**settings, **changed, reference=None, output=tmp_path / "other")
    evaluate(**settings, reference=None, count=images_per_prompt if layout == "dpg_bench" else 1)


# Configurations


@pytest.mark.parametrize("path", sorted((ROOT / "configs/eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_parses_and_says_what_it_needs(path: Path) -> None:
    options = parse(Options, ["--config", str(path), "--model", "m", "--output", "o"], prog="evaluate")
    wanted = re.findall(r"class_path: [\w.]+\.(\w+)", path.read_text())
    assert [type(options.data).__name__, *(type(metric).__name__ for metric in options.metrics)] == wanted
    if path.stem.startswith("emoji"):
        assert (
            len(options.data.load())
            == {"emoji": 1024, "emoji_diversity": 8192, "emoji_geneval": 576}[path.stem]
        )
    else:
        with pytest.raises(UserError, match="give --captions"):
            options.data.load()
    given = parse(Options, [f"--config={path}", "--captions=x", "--model=m", "--output=o"], prog="evaluate")
    assert given.data.captions == "x"


# Mistakes


def test_pictures_with_nan_are_refused(
    evaluate: Evaluate, arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules.generator import OneStepGenerator

    images = OneStepGenerator.images

    def broken(self: Any, prompts: list[str], seeds: list[int], **keywords: Any) -> torch.Tensor:
        drawn = images(self, prompts, seeds, **keywords)
        drawn[[i for i, seed in enumerate(seeds) if seed == 7], 0, 0, 0] = torch.nan
        return drawn

    monkeypatch.setattr(OneStepGenerator, "images", broken)
    for save_images in ("false", "true"):
        with pytest.raises(UserError, match=rf"picture of caption 7 \('{CAPTIONS[7]}'\) holds NaN"):
            evaluate(save_images=save_images)
        assert not Path(arguments["output"]).exists()  # the pictures of the first batch are gone, too


def test_a_damaged_picture_is_named(evaluate: Evaluate, tmp_path: Path, arguments: dict[str, str]) -> None:
    pictures = noise_pictures(tmp_path / "pictures", 12)
    (pictures / "7.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"7.png can't be read"):
        evaluate(model=None, images=pictures)
    (pictures / "7.png").unlink()
    (pictures / "7.png").mkdir()
    with pytest.raises(UserError, match=r"7.png can't be read: .*Is a directory"):
        evaluate(model=None, images=pictures)
    assert not (Path(arguments["output"]) / "report.json").exists()


def test_real_pictures_are_checked(evaluate: Evaluate, tmp_path: Path) -> None:
    real = noise_pictures(tmp_path / "real", 6)
    assert evaluate(reference=real)["metrics"]["frechet_distance"]["details"]["reference_num_images"] == 6
    with pytest.raises(UserError, match="holds 6 readable pictures, and 7 are needed"):
        evaluate(reference=real, **{"min-reference": 7})
    (real / "2.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="2.png"):
        evaluate(reference=real)
    found = evaluate(reference=real, **{"skip-corrupt": "true"})
    assert found["metrics"]["frechet_distance"]["details"]["reference_num_images"] == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": None}, "give either --model PATH or --images DIR"),
        ({"images": "x"}, "give either --model PATH or --images DIR"),
        ({"model": None, "images": "x", "captions": None}, "--images needs --captions"),
        ({"model": "assets/none"}, "assets/none does not exist"),
        ({"captions": "none.csv"}, "none.csv does not exist"),
        ({"count": 13}, "count is 13, but captions has 12 captions"),
        ({"steps": 0}, "--steps 0: must be >0"),
        ({"dtype": "float16"}, "dtype"),
        ({"negative_guidance": "nasa"}, "needs negative prompts: give --negative_prompt"),
        ({"negative_scale": 2}, "--negative_scale has no effect"),
        ({"negative_prompt": "x", "negative_guidance": "cfg"}, "cfg needs --negative_scale"),
        ({"negative_prompt": "x", "negative_guidance": "nag", "guidance_scale": 3}, "exclude each other"),
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"config": "none.yaml"}, "none.yaml cannot be read: .*No such file"),
        ({"reference": None}, "frechet_distance needs statistics of real pictures"),
        ({"scoring_clip": None}, "frechet_distance needs a network"),
        ({"output": None}, "output"),
    ],
)
def test_mistakes_are_named(
    changed: dict[str, Any], message: str, evaluate: Evaluate, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(**changed)
    assert not (tmp_path / "out").exists()


def test_other_peoples_files_are_left_alone(evaluate: Evaluate, arguments: dict[str, str]) -> None:
    output = Path(arguments["output"])
    output.mkdir()
    (output / "report.md").write_text("of a run")
    with pytest.raises(UserError, match="holds other files"):
        evaluate()
    shutil.rmtree(output)
    evaluate(save_images="true")
    evaluate(count=3)
    assert not (output / "images").exists()  # those of the former evaluation


def test_references_and_captions_that_do_not_belong_together_are_told(
    evaluate: Evaluate, arguments: dict[str, str], tmp_path: Path, tiny_clip: Path
) -> None:
    (tmp_path / "other.txt").write_text("\n".join(CAPTIONS[::-1]))
    evaluate(captions=tmp_path / "other.txt")
    assert "not comparable" in (Path(arguments["output"]) / "report.md").read_text()


def test_clip_score_of_existing_pictures_equals_the_metric(
    evaluate: Evaluate, tmp_path: Path, tiny_clip: Path
) -> None:
    """Pictures of several sizes in one folder, each scored as it is."""
    pictures = noise_pictures(tmp_path / "pictures", 12)
    Image.open(pictures / "3.png").resize((40, 20)).save(pictures / "3.png")
    found = evaluate(model=None, images=pictures)
    metric = ClipScore().bind(ClipExtractor(tiny_clip))
    for i, caption in enumerate(CAPTIONS):
        array = np.array(Image.open(pictures / f"{i}.png").convert("RGB"))
        metric.update(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255, [caption])
    assert found["metrics"]["clip_score"]["value"] == pytest.approx(metric.result()["value"], abs=1e-6)
