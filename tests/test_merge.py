"""The command `merge`, run as the command line runs it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cli
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.frechet import FrechetDistance
from callbacks.metrics.measure import evaluate_model
from callbacks.metrics.reference import ReferenceStatistics, compute_reference
from commands import merge
from common.errors import UserError
from lightning_modules.generator import load_generator
from lightning_modules.networks.loading import load_parts
from tests.pages import figures, without_scripts
from tests.test_generate_export import call, other_unet, stock_images, write_checkpoint

CAPTIONS = [f"a {color} {thing}" for color in ("red", "blue") for thing in ("cat", "dog", "cup", "sun")]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tiny_sd: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a half-precision export `a` (EMA, seed 2), a run `runs/b/version_0` and what judges."""
    folder: Path = tmp_path_factory.mktemp("inputs")
    checkpoint = write_checkpoint(folder / "runs/b/version_0/checkpoints/best.ckpt", tiny_sd)
    call("export", "--checkpoint", checkpoint, "--output", folder / "a", "--dtype", "float16")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clip = ClipExtractor(tiny_clip)
    compute_reference([images], CAPTIONS, clip, "noise").save(folder / "reference.safetensors")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What is stored, as it is stored."""
    stored: dict[str, torch.Tensor] = load_file(folder / UNET)
    return stored


def judged(inputs: Path, tiny_clip: Path) -> list[str]:
    """Options of the evaluation."""
    return ["--captions", str(inputs / "captions.txt"), "--scoring-clip", str(tiny_clip),
            "--reference", str(inputs / "reference.safetensors")]  # fmt: skip


def test_merge_writes_one_usable_folder(inputs: Path, tiny_sd: Path, tmp_path: Path, capsys: Any) -> None:
    run, out = inputs / "runs/b/version_0", tmp_path / "out"
    call("merge", "--first", inputs / "a", "--second", run, "--weights", "online", "--weight", 0.25,
         "--output", out)  # fmt: skip
    assert (
        "first model is stored in float16, the second in float32: the result is float16"
        in capsys.readouterr().out
    )
    assert [file.name for file in (out / "unet").iterdir() if file.suffix != ".json"] == [Path(UNET).name]
    a, b = weights(inputs / "a"), other_unet(tiny_sd, 1).state_dict()
    merged = weights(out)
    for name in a:
        assert merged[name].dtype == torch.float16
        assert torch.equal(merged[name], (0.25 * a[name].double() + 0.75 * b[name].double()).half())
    facts = json.loads((out / "one_step.json").read_text())
    assert facts["start_timestep"] == 625 and facts["weights"] == "merged" and facts["merge_weight"] == 0.25
    assert (facts["first"], facts["second"], facts["second_weights"]) == ("a", "version_0", "online")
    assert str(tmp_path.parent) not in (out / "README.md").read_text() + json.dumps(facts)
    noise = load_generator(out).noise([5, 6])
    expected = load_generator(out).images(["a red cat", "a dog"], [5, 6])
    torch.testing.assert_close(stock_images(out, noise), expected, rtol=0, atol=1e-4)


def test_ends_and_self_are_bit_for_bit(inputs: Path, tiny_sd: Path, tmp_path: Path) -> None:
    run = inputs / "runs/b/version_0/checkpoints/best.ckpt"
    for first, second, weight, expected in [
        (inputs / "a", run, 1, weights(inputs / "a")),
        (run, inputs / "a", 1, other_unet(tiny_sd, 2).state_dict()),
        (run, inputs / "a", 0, {name: tensor.float() for name, tensor in weights(inputs / "a").items()}),
        (inputs / "a", inputs / "a", 0.3, weights(inputs / "a")),
    ]:
        call("merge", "--first", first, "--second", second, "--weight", weight, "--output", tmp_path / "out")
        stored = weights(tmp_path / "out")
        assert stored.keys() == expected.keys()
        for name, tensor in stored.items():
            assert tensor.dtype == expected[name].dtype
            assert tensor.numpy().tobytes() == expected[name].numpy().tobytes()


def test_evaluation_over_a_grid(
    inputs: Path, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = inputs / "runs/b/version_0", tmp_path / "out"
    for weight in (0.5, 0.3):  # the second time it replaces its own result
        words = ["--first", inputs / "a", "--second", run, "--weights", "online", "--output", out]
        words += ["--weight", weight, "--evaluate", "0:1:0.5", "--seed", 4, *judged(inputs, tiny_clip)]
        cli.main(["merge", *map(str, words)])
    assert "Lowest Fréchet distance" in capsys.readouterr().out
    content = json.loads((out / "merge.json").read_text())
    assert [point["weight"] for point in content["points"]] == [0.0, 0.3, 0.5, 1.0]
    assert content["merge_weight"] == 0.3 and content["dtype"] == "float16"
    assert content["manifest"]["captions"]["count"] == 8 and content["manifest"]["seeds"]["first"] == 4
    assert content["manifest"]["reference"]["captions_are_those_of_the_evaluation"] is True

    # what is measured is what is stored, and the end is the plain model
    extractor = ClipExtractor(tiny_clip)
    reference = ReferenceStatistics.load(inputs / "reference.safetensors")
    metrics = [metric.bind(extractor, reference) for metric in (FrechetDistance(), ClipScore())]
    for model, point in ((inputs / "a", content["points"][3]), (out, content["points"][1])):
        generate = load_generator(model).images
        expected = evaluate_model(generate, CAPTIONS, metrics, 64, range(4, 12))
        assert point["metrics"].keys() == {"frechet_distance", "clip_score"}
        for name, result in expected.items():
            assert point["metrics"][name]["value"] == pytest.approx(result["value"], rel=1e-6)
            assert point["metrics"][name]["num_images"] == 8
    values = [point["metrics"]["frechet_distance"]["value"] for point in content["points"]]
    assert len(set(values)) == 4

    table = (out / "merge.md").read_text()
    assert "| 0 (second model) |" in table and "| 0.3 (written) |" in table and "| 1 (first model) |" in table
    page = (out / "merge.html").read_text()
    assert [len(one["data"][0]["x"]) for one in figures(page)] == [4, 4]
    assert "student updates" not in page
    assert not re.search(r"(src|href)=\"(?!data:)|https?://", without_scripts(page))
    assert str(tmp_path.parent) not in page + table + json.dumps(content)
    sheet = Image.open(out / "merge_samples.png")
    assert sheet.width < sheet.height  # four columns of pictures, six rows


def test_extrapolation_is_said_in_one_line(
    inputs: Path, tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = inputs / "runs/b/version_0"
    call("merge", "--first", run, "--second", tiny_sd, "--weight", -0.5, "--output", tmp_path / "out")
    told = capsys.readouterr().err.splitlines()
    assert [line[:45] for line in told if line.startswith("warning: ")] == [
        "warning: The merging weight -0.5 lies outside",
        "warning: The second model is a multi-step mod",
    ]
    a, b = other_unet(tiny_sd, 2).state_dict(), load_parts(tiny_sd).denoiser.state_dict()
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, (1.5 * b[name].double() - 0.5 * a[name].double()).float())


def test_grid() -> None:
    assert merge.parse_grid("0:1:0.1", 0.5) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert merge.parse_grid("0 : 1 : 1", 0.25) == [0.0, 0.25, 1.0]
    assert merge.parse_grid("0.5:0.5:1", 0.5) == [0.5]
    with pytest.warns(UserWarning, match=r"leaves \[0, 1\]"):
        assert merge.parse_grid("-0.5:1.5:0.5", 1.0) == [-0.5, 0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    "grid", ["0:1", "", "a:b:c", "0:1:0.3", "0:1:0", "1:0:0.5", "0:inf:1", "0:nan:1", "0:1:0.001"]
)
def test_grid_mistakes(grid: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(repr(grid))} is no grid. Give START:STOP:STEP"):
        merge.parse_grid(grid, 0.5)


def test_mistakes_are_told_before_any_work(
    inputs: Path, tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    a, run, out = inputs / "a", inputs / "runs/b/version_0", tmp_path / "out"
    judge = judged(inputs, tiny_clip)
    both = ["--first", a, "--second", run, "--output", out]
    evaluate = [*both, "--evaluate", "0:1:0.5"]
    monkeypatch.setattr(merge, "evaluate_model", None)  # never reached
    for words, message in [
        (["--first", a, "--second", run, "--output", foreign], "holds other files"),
        (["--first", a, "--second", run, "--output", a], "would be replaced"),
        ([*both, "--weight", "nan"], "--weight nan: must be"),
        (["--first", a, "--second", tmp_path / "none", "--output", out], "does not exist"),
        (["--first", a, "--second", inputs / "runs/b", "--output", out], "holds the runs version_0"),
        (["--first", a, "--second", tiny_clip, "--output", out], "model_index.json is missing"),
        (["--first", a, "--second", tiny_sd, "--output", out, "--weights", "ema"], "both models are folders"),
        ([*evaluate, *judge, "--num-images", 9], "has 8 captions"),
        ([*evaluate, *judge, "--num-images", 1], "at least 2 pictures"),
        ([*evaluate, *judge, "--seed", -1], "--seed -1: must be"),
        ([*evaluate, *judge[:4], "--reference",
          inputs / "captions.txt"], "holds no reference statistics"),
        ([*evaluate, *judge[2:], "--captions",
          inputs / "none"], "does not exist"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=re.escape(message)):
            call("merge", *words)
    assert not out.exists() and [file.name for file in foreign.iterdir()] == ["thesis.txt"]


def test_an_evaluation_that_fails_leaves_the_former_result(
    inputs: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--first", inputs / "a", "--second", inputs / "runs/b/version_0", "--output", tmp_path / "out"]
    call("merge", *words)
    before = (tmp_path / "out" / UNET).read_bytes()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(merge, "evaluate_model", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        call("merge", *words, "--weight", 0.25, "--evaluate", "0:1:1", *judged(inputs, tiny_clip))
    assert (tmp_path / "out" / UNET).read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_other_text_in_the_measured_captions_is_said(inputs: Path, tiny_clip: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("a bee\na key\n")
    judge = judged(inputs, tiny_clip)
    judge[1] = str(other)
    call("merge", "--first", inputs / "a", "--second", inputs / "a", "--output", tmp_path / "out",
         "--evaluate", "0.5:0.5:1", *judge)  # fmt: skip
    text = (tmp_path / "out" / "merge.md").read_text()
    assert "captions are not those of the reference pictures" in text and "biased upwards" in text
    assert load_parts(tmp_path / "out").denoiser.config.sample_size == 8
