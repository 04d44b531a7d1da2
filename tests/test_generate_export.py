"""The commands `generate` and `export`, run as the command line runs them."""

import functools
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler, UNet2DConditionModel
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from PIL import Image
from torch import Tensor

import cli
from commands import export, generate
from commands.options import parse
from common.errors import UserError
from lightning_modules.generator import load_generator, make_generator
from lightning_modules.guidance import negative_prompting
from lightning_modules.guidance.methods import Nasa
from lightning_modules.networks.cards import RunNotes, model_card
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.pipeline_folder import MARKER, export_student, one_step_scheduler
from lightning_modules.networks.student import architecture, resolve_checkpoint, student_path
from lightning_modules.pipelines import pipeline_images, stock_pipeline
from reports.sheets import labelled_grid
from tests.backbones import moved

PROMPTS, SEEDS = ["a red cat", "a dog"], [5, 6]


def call(command: str, *words: Any) -> None:
    """Run a command line."""
    cli.main([command, *(str(word) for word in words)])


@functools.cache
def other_unet(path: Path, seed: int) -> UNet2DConditionModel:
    """The folder's UNet with every weight moved at random; shared, not to be changed."""
    return moved(path, seed)


def write_checkpoint(file: Path, teacher: Path, start: int = 625, ema: bool = True, **changes: Any) -> Path:
    """A checkpoint as training writes it: online weights with seed 1, averaged ones with seed 2."""
    online = other_unet(teacher, 1)
    content: dict[str, Any] = {
        "state_dict": {f"student.{n}": p for n, p in online.state_dict().items()},
        "one_step": {
            "teacher": str(teacher),
            "start_timestep": start,
            "architecture": architecture(online),
            "weights": ema,
            "student_steps": 40,
        },
    }
    if ema:
        shadow = {n: p.detach() for n, p in other_unet(teacher, 2).named_parameters()}
        content["ema"] = {"shadow": shadow, "decay": 0.9999, "num_updates": 40}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**content, **changes}, file)
    return file


def stock_images(folder: Path, latents: Tensor, steps: int = 1) -> Tensor:
    """What a user gets from the folder with the card's call, from the given start noise."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=1.0, latents=latents, output_type="pt"
    ).images


# --- export ------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "start"),
    [("tiny_sd", 999), ("tiny_sd", 625), ("tiny_sd", 0), ("tiny_sd_v", 999), ("tiny_sd_v", 625)],
)
def test_stock_diffusers_reproduces_the_student(
    kind: str, start: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    teacher: Path = request.getfixturevalue(kind)
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", teacher, start)
    call("export", "--checkpoint", checkpoint, "--output", tmp_path / "out")
    ours = make_generator(load_parts(teacher), start, student=other_unet(teacher, 2))
    expected = ours.images(PROMPTS, SEEDS)
    torch.testing.assert_close(stock_images(tmp_path / "out", ours.noise(SEEDS)), expected, rtol=0, atol=1e-4)
    for path in (tmp_path / "out", checkpoint):
        again = load_generator(path)
        assert again.start_timestep == start
        torch.testing.assert_close(again.images(PROMPTS, SEEDS), expected, rtol=0, atol=1e-4)


def test_the_start_timestep_makes_a_difference(tiny_sd: Path, tmp_path: Path) -> None:
    a, b = (make_generator(load_parts(tiny_sd), start).images(PROMPTS, SEEDS) for start in (999, 625))
    assert (a - b).abs().mean() > 0.01


def test_weights_are_chosen(tiny_sd: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", tiny_sd)
    for option, seed in (("ema", 2), ("online", 1)):
        call("export", "--checkpoint", checkpoint, "--output", tmp_path / option, "--weights", option)
        written = load_parts(tmp_path / option).denoiser.state_dict()
        expected = other_unet(tiny_sd, seed).state_dict()
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[n], expected[n]) for n in expected)
        assert json.loads((tmp_path / option / MARKER).read_text())["weights"] == option
    plain = write_checkpoint(tmp_path / "b.ckpt", tiny_sd, ema=False)
    with pytest.raises(UserError, match="no EMA weights"):
        call("export", "--checkpoint", plain, "--output", tmp_path / "x", "--weights", "ema")
    call("export", "--checkpoint", plain, "--output", tmp_path / "x")
    assert json.loads((tmp_path / "x" / MARKER).read_text())["weights"] == "online"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_export_opens_without_and_with_a_dtype(
    tiny_sd: Path, tmp_path: Path, dtype: str
) -> None:
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", tiny_sd)
    call("export", "--checkpoint", checkpoint, "--output", tmp_path / "out", "--dtype", dtype)
    wanted = getattr(torch, dtype)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=wanted)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {wanted}
    full = load_generator(checkpoint)
    half = stock_images(tmp_path / "out", full.noise(SEEDS))
    assert half.dtype == torch.float32
    expected = full.images(PROMPTS, SEEDS)
    assert 0 < (half - expected).abs().mean() < 0.02
    assert (
        tmp_path / "out/unet/diffusion_pytorch_model.safetensors"
    ).stat().st_size < 130_000  # 52,004 weights


def test_export_changes_none_of_its_inputs(tiny_sd: Path, tmp_path: Path) -> None:
    parts, unet = load_parts(tiny_sd), other_unet(tiny_sd, 1)
    before = {n: p.clone() for n, p in unet.named_parameters()}
    export_student(unet, parts, 625, tmp_path / "out", torch.float16)
    assert all(torch.equal(p, before[n]) for n, p in unet.named_parameters())
    assert parts.vae.dtype == parts.text_encoders[0].dtype == torch.float32
    assert len(parts.scheduler.betas) == 1000


def test_card_opens_with_a_snippet_that_runs(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", tiny_sd)
    call("export", "--checkpoint", checkpoint, "--output", "exports/mine", "--dtype", "float16")
    card = (tmp_path / "exports/mine/README.md").read_text()
    text = ModelCard(card).text.strip()  # what is read, after the data for the hub
    assert "one step\n\n```python\nfrom diffusers import DiffusionPipeline\n" in text
    snippet = text.split("```python\n")[1].split("```")[0]
    assert "num_inference_steps=1, guidance_scale=1.0" in snippet
    exec(snippet, {})
    assert Image.open(tmp_path / "apple.png").size == (16, 16)
    for fact in (
        f"| teacher | {tiny_sd.name} |",
        "| start timestep | 625 |",
        "| student steps | 40 |",
        "| weights | ema |",
    ):
        assert fact in card
    assert "ema weights" in capsys.readouterr().out


def test_best_and_last_are_those_of_the_newest_run(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {}
    for age, run in enumerate(("a/version_0", "b/version_3", "a/version_1")):
        for name in ("best", "last"):
            file = write_checkpoint(
                tmp_path / f"runs/{run}/checkpoints/{name}.ckpt", tiny_sd, start=900 + age
            )
            os.utime(file, (1000 + age, 1000 + age))
            files[run, name] = file
    files["a/version_1", "best"].unlink()
    assert resolve_checkpoint("last").resolve() == files["a/version_1", "last"]
    assert resolve_checkpoint("best").resolve() == files["b/version_3", "best"]
    call("export", "--checkpoint", "last", "--output", "out")
    assert json.loads((tmp_path / "out" / MARKER).read_text())["start_timestep"] == 902
    assert "a/version_1/checkpoints/last.ckpt (not finished, beside runs of b)" in capsys.readouterr().out
    (tmp_path / "runs/a/version_0/report.json").write_text("{}")
    (tmp_path / "runs/b/version_3/report.json").write_text('{"finished": false}')
    (tmp_path / "runs/a/version_1/report.json").write_text("damaged")
    for name in ("best", "last"):  # whatever is newer is still in progress
        assert Path(student_path(name)).resolve() == files["a/version_0", name]
    assert "version_0/checkpoints/last.ckpt (finished, beside" in capsys.readouterr().out
    for name in ("runs/b/version_3", "~/b/version_3", "best"):
        monkeypatch.setenv("HOME", str(tmp_path / "runs"))
        call("export", "--checkpoint", name, "--output", "run")
        start = 900 if name == "best" else 901
        assert json.loads((tmp_path / "run" / MARKER).read_text())["start_timestep"] == start
    call("export", "--checkpoint", "run", "--output", "again", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "again" / MARKER).read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match=r"The checkpoint runn does not exist\. Did you mean run\?"):
        call("export", "--checkpoint", "runn", "--output", "none")


def test_newest_run_of_a_distillation_is_taken(tiny_sd: Path, tmp_path: Path) -> None:
    """A pretraining run that ended later is passed over, a damaged checkpoint is reported."""
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match="no last.ckpt of a distillation under"):
        resolve_checkpoint("last", runs)
    student = write_checkpoint(runs / "a/version_0/checkpoints/last.ckpt", tiny_sd)
    later = runs / "b/version_0/checkpoints/last.ckpt"
    later.parent.mkdir(parents=True)
    torch.save({"state_dict": {"clip.weight": torch.zeros(1)}, "global_step": 5}, later)
    for age, file in enumerate((student, later)):
        os.utime(file, (1000 + age, 1000 + age))
    assert resolve_checkpoint("last", runs) == student
    student.unlink()
    with pytest.raises(UserError, match="no last.ckpt of a distillation under"):
        resolve_checkpoint("last", runs)
    later.write_text("cut short")
    with pytest.raises(UserError, match="b/version_0/checkpoints/last.ckpt can't be read"):
        resolve_checkpoint("last", runs)


def test_exports_tell_nothing_of_the_machine(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No absolute path in any file; a relative path to the teacher stays."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "a.ckpt", tiny_sd)
    call("export", "--checkpoint", "a.ckpt", "--output", tmp_path / "absolute")
    (tmp_path / "models").symlink_to(tiny_sd.parent)
    content = torch.load("a.ckpt", weights_only=True)
    relative = f"models/{tiny_sd.name}"
    torch.save({**content, "one_step": {**content["one_step"], "teacher": relative}}, "b.ckpt")
    call("export", "--checkpoint", "b.ckpt", "--output", "relative")
    for name, teacher in (("absolute", tiny_sd.name), ("relative", relative)):
        assert json.loads((tmp_path / name / MARKER).read_text())["teacher"] == teacher
        assert f"| teacher | {teacher} |" in (tmp_path / name / "README.md").read_text()
        files = [file for file in (tmp_path / name).rglob("*") if file.suffix in (".json", ".md", ".txt")]
        assert len(files) >= 8
        for file in files:
            for place in (tiny_sd.parent, tmp_path):
                assert str(place) not in file.read_text(encoding="utf-8"), file


def write_run(run: Path, teacher: Path, **report: Any) -> Path:
    """A run's folder as training leaves it; returns its checkpoint, at step 40 with both weights."""
    checkpoint = write_checkpoint(run / "checkpoints" / "last.ckpt", teacher)
    config = {
        "trainer": {"default_root_dir": str(run), "logger": {"init_args": {"api_key": "hush"}}},
        "model": {"teacher": str(teacher), "rate": 1e-6, "prompts": ["a größer/cat", str(run / "x.txt")]},
        "data": "assets/captions.txt",
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "manifest.json").write_text(json.dumps({"guidance": {"steps_25": 4.5, "student": None}}))
    judge = {"extractor": "a|clip", "reference": "1,024 real pictures (8ab387d9da6d)"}
    content = {
        "step": 40, "weights": "ema", "model": str(checkpoint),
        "metrics": {
            "frechet_distance": {"value": 22.401986661, "num_images": 1024, "details": judge},
            "clip_score": {"value": 0.5291290813, "num_images": 512, "details": {}},
        },
        "teacher_metrics": {"steps_25": {"clip_score": {"value": 0.25, "num_images": 512, "details": {}}}},
    }  # fmt: skip
    (run / "report.json").write_text(json.dumps({**content, **report}))
    return checkpoint


def card_of(checkpoint: Path, output: Path, *words: Any) -> str:
    call("export", "--checkpoint", checkpoint, "--output", output, *words)
    return (output / "README.md").read_text(encoding="utf-8")


def test_the_card_has_the_runs_metrics_and_configuration(tiny_sd: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/mine/version_0"
    card = card_of(write_run(run, tiny_sd), tmp_path / "out")
    assert "of the ema weights at student step 40:" in card
    assert "| metric | this student | teacher, 25 steps, guidance 4.5 | images |" in card
    assert "| frechet distance | 22.402 | – | 1024 |" in card
    assert "| clip score | 0.529129 | 0.25 | 512 |" in card
    assert "- frechet distance: by the features of a\\|clip, against 1,024 real pictures (8ab" in card
    folded = "## Configuration\n\n<details><summary>config.yaml</summary>\n\n```yaml\n"
    config = yaml.safe_load(card.split(folded)[1].split("```")[0])
    assert config == {
        "trainer": {"default_root_dir": "version_0", "logger": {"init_args": {"api_key": "(not shown)"}}},
        "model": {"teacher": tiny_sd.name, "rate": 1e-6, "prompts": ["a größer/cat", "x.txt"]},
        "data": "assets/captions.txt",
    }
    assert str(tmp_path) not in card and str(tiny_sd.parent) not in card
    assert "a größer/cat" in card and "![" not in card
    assert 'with negative_prompting(pipe, "blurry", method="nasa"):' in card
    (run / "samples").mkdir()
    for step in (0, 38, 300):
        Image.new("RGB", (step + 1, 1)).save(run / f"samples/step_{step}.png")
    card = card_of(run / "checkpoints/last.ckpt", tmp_path / "out")
    body = card.split("---\n", 2)[2].strip()
    assert body.startswith(
        "# out: a text-to-image model of one step\n\n![samples](samples.png)\n"
        "The student's one step beside its teacher, after 38 updates."
    )
    assert Image.open(tmp_path / "out/samples.png").width == 39


def test_the_card_has_what_the_validation_said_where_nothing_else_was_measured(
    tiny_sd: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    checkpoint = write_run(run, tiny_sd, step=60)
    (run / "metrics.csv").write_text(
        "step,train/loss,val/clip_score,val/fid\n20,1,0.1,9\n40,1,,\n40,,0.25,7.5\n60,1,0.3,1\n"
    )
    card = card_of(checkpoint, tmp_path / "out")
    assert "validation of the run at student step 40" in card
    assert "| clip_score | 0.25 |\n| fid | 7.5 |\n" in card and "not measured" not in card
    assert ModelCard(card).data.metrics == ["clip_score", "fid"]


def test_a_student_is_pushed_to_the_hub(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub stands in for itself; nothing is written where nobody is logged in or the name is none."""
    calls: list[Any] = []
    hub = "huggingface_hub.HfApi."
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", tiny_sd)
    out, words = tmp_path / "out", ("export", "--checkpoint", checkpoint, "--output", tmp_path / "out")
    monkeypatch.setattr(hub + "whoami", lambda *_, **__: calls.append("asked"))
    monkeypatch.setattr(hub + "create_repo", lambda _, *given, **more: calls.append((given, more)))
    monkeypatch.setattr(hub + "upload_folder", lambda _, **more: calls.append(more))
    with pytest.raises(UserError, match="no name of the hub: give owner/name"):
        call(*words, "--push-to-hub", "mine")
    call(*words, "--push-to-hub", "me/mine")
    assert calls[:2] == ["asked", (("me/mine",), {"private": True, "exist_ok": True})]
    assert calls[2]["repo_id"] == "me/mine" and calls[2]["folder_path"] == out
    assert 'from_pretrained("me/mine")' in (out / "README.md").read_text()
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out

    def fails(error: Exception) -> Any:
        return mock.Mock(side_effect=error)

    monkeypatch.setattr(hub + "upload_folder", fails(RuntimeError("no\nnetwork")))
    with pytest.raises(UserError, match="is written, but can't be pushed to me/mine: no"):
        call(*words, "--push-to-hub", "me/mine")
    shutil.rmtree(out)
    for error, message in (
        (LocalTokenNotFoundError(), "hf auth login"),
        (OSError("off"), "can't be asked: off"),
    ):
        monkeypatch.setattr(hub + "whoami", fails(error))
        with pytest.raises(UserError, match=message):
            call(*words, "--push-to-hub", "me/mine")
    assert not out.exists()


def test_other_weights_than_the_reports_are_not_measured(tiny_sd: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint, missing = write_run(run, tiny_sd), "not measured at this step"
    cards = [card_of(checkpoint, tmp_path / "out", "--weights", "online")]
    for report in ({"step": 41}, {"metrics": {}}):
        write_run(run, tiny_sd, **report)
        cards.append(card_of(checkpoint, tmp_path / "out"))
    (run / "report.json").unlink()
    cards.append(card_of(checkpoint, tmp_path / "out"))
    for card in cards:
        assert missing in card and "| frechet" not in card and "## Configuration" in card
    (run / "report.json").write_text('{"step": 40, "weights": "ema", "metrics": {"fid": 3}}')
    with pytest.raises(UserError, match=r"report.json is damaged"):
        card_of(checkpoint, tmp_path / "out")
    (run / "config.yaml").write_text("a: [")
    (run / "report.json").unlink()
    with pytest.raises(UserError, match=r"config.yaml can't be read as YAML"):
        card_of(checkpoint, tmp_path / "out")
    (run / "config.yaml").unlink()  # no run's folder
    assert "## " not in card_of(checkpoint, tmp_path / "out")


def test_a_former_export_is_replaced_and_other_folders_are_not(tiny_sd: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", tiny_sd)
    for weights in ("ema", "online"):
        call("export", "--checkpoint", checkpoint, "--output", tmp_path / "out", "--weights", weights)
    assert json.loads((tmp_path / "out" / MARKER).read_text())["weights"] == "online"
    (tmp_path / "out/notes.txt").touch()
    with pytest.raises(UserError, match=r"other files \(notes.txt\)"):
        call("export", "--checkpoint", checkpoint, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="other files"):
        call("export", "--checkpoint", checkpoint, "--output", tiny_sd)


def test_bad_checkpoints_are_named_and_nothing_is_written(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = torch.load(write_checkpoint(tmp_path / "good.ckpt", tiny_sd), weights_only=True)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save({**good, "one_step": {**good["one_step"], "teacher": "gone"}}, tmp_path / "orphan.ckpt")
    narrow = {**good["one_step"]["architecture"], "block_out_channels": (4, 8)}
    torch.save({**good, "one_step": {**good["one_step"], "architecture": narrow}}, tmp_path / "narrow.ckpt")
    torch.save({**good, "checkpoint_format": 2}, tmp_path / "later.ckpt")
    for name, message in {
        "missing.ckpt": "missing.ckpt does not exist",
        "later.ckpt": "later.ckpt was written by a later version",
        "best": "There is no best.ckpt of a distillation under runs",
        "text.ckpt": "text.ckpt can't be read as a checkpoint",
        "other.ckpt": "not a checkpoint of a one-step distillation",
        "orphan.ckpt": "teacher of orphan.ckpt can't be loaded: .*gone does not exist",
        "narrow.ckpt": "another architecture than the checkpoint says",
    }.items():
        with pytest.raises(UserError, match=message):
            call("export", "--checkpoint", name, "--output", "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        call("export", "--checkpoint", "good.ckpt", "--output", "file")
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    with pytest.raises(UserError, match="start_timestep 1000 is not one of"):
        one_step_scheduler(load_parts(tiny_sd).scheduler, 1000)


# --- generate ------------------------------------------------------------


def pixels(file: Path) -> Tensor:
    """Picture [3, H, W] in 0 … 255."""
    image = Image.open(file)
    return torch.tensor(list(image.convert("RGB").tobytes())).reshape(*image.size[::-1], 3).permute(2, 0, 1)


def png(image: Image.Image) -> bytes:
    """The file that Pillow makes of it."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def test_pictures_prompts_and_seeds_belong_together(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\ngrößer\n", encoding="utf-8")
    out = tmp_path / "out"
    call("generate", "--model", tiny_sd, "--prompt", "a red cat", "--prompt", "a dog", "--prompts-file",
        tmp_path / "prompts.txt", "--num-images", 3, "--seed", 40, "--output", out,
    )  # fmt: skip
    entries = json.loads((out / "generation.json").read_text(encoding="utf-8"))
    prompts = [p for p in ("a red cat", "a dog", "a cat", "größer") for _ in range(3)]
    assert [entry["prompt"] for entry in entries] == prompts
    assert [entry["seed"] for entry in entries] == list(range(40, 52))
    assert [entry["file"] for entry in entries] == [f"{i:04d}.png" for i in range(12)]
    assert all(entry["milliseconds"] > 0 for entry in entries)
    assert {p.name for p in out.iterdir()} == {
        "grid.png",
        "generation.json",
        *(f"{i:04d}.png" for i in range(12)),
    }
    expected = make_generator(load_parts(tiny_sd), 999).images(prompts, list(range(40, 52)))
    for entry, picture in zip(entries, expected, strict=True):
        # half a level from rounding to 8 bits, and half for another batch size
        assert (pixels(out / entry["file"]) - picture * 255).abs().max() <= 1.0
    shown = torch.stack([pixels(out / entry["file"]) / 255 for entry in entries])
    sheet = labelled_grid({"": shown}, prompts, columns=4)
    assert (out / "grid.png").read_bytes() == png(sheet), "each picture beside its prompt, 4 columns, 3 rows"


def test_checkpoint_and_export_draw_the_same(tiny_sd: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", tiny_sd)
    call("export", "--checkpoint", checkpoint, "--output", tmp_path / "folder")
    for name, model in (("x", checkpoint), ("y", tmp_path / "folder")):
        call("generate", "--model", model, "--prompt", "a cat", "--output", tmp_path / name)
    assert torch.equal(pixels(tmp_path / "x/0000.png"), pixels(tmp_path / "y/0000.png"))


def test_several_steps_use_the_stock_pipeline(tiny_sd: Path, tmp_path: Path) -> None:
    call("generate", "--model", tiny_sd, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1],
         "--seed", SEEDS[0], "--steps", 3, "--output", tmp_path / "out")  # fmt: skip
    expected = stock_images(tiny_sd, load_generator(tiny_sd).noise(SEEDS), steps=3) * 255
    for i in range(2):
        assert (pixels(tmp_path / f"out/000{i}.png") - expected[i]).abs().max() <= 0.6


@pytest.mark.parametrize("kind", [LCMScheduler, EulerDiscreteScheduler])
def test_few_step_models_keep_their_own_sampler(own_sd: Path, tmp_path: Path, kind: Any) -> None:
    scheduler = kind.from_config(load_parts(own_sd).scheduler.config)
    scheduler.save_pretrained(own_sd / "scheduler")
    index = own_sd / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", kind.__name__]}))
    call(
        "generate",
        "--model",
        own_sd,
        "--prompt",
        PROMPTS[0],
        "--seed",
        SEEDS[0],
        "--output",
        tmp_path / "out",
    )
    latents = load_generator(own_sd).noise(SEEDS)
    expected = stock_images(own_sd, latents)[0] * 255
    assert (pixels(tmp_path / "out/0000.png") - expected).abs().max() <= 0.6


def test_cfg_guidance_moves_away_from_the_negative_prompt(tiny_sd: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_sd, "--prompt", "a cat", "--negative-guidance", "cfg", "--negative-scale", 3)
    call("generate", *options, "--negative-prompt", "red", "--output", tmp_path / "out")
    expected = (
        load_generator(tiny_sd).images(["a cat"], [0], guidance_scale=3.0, negative_prompt="red")[0] * 255
    )
    assert (pixels(tmp_path / "out/0000.png") - expected).abs().max() <= 0.6
    call("generate", *options, "--steps", 2, "--output", tmp_path / "two")
    assert (tmp_path / "two/0000.png").is_file()


def test_negative_prompts_by_attention(tiny_sd: Path, tmp_path: Path) -> None:
    """nasa if nothing else is said, with the model's scale; the stock pipeline draws the same in one step."""
    prompt = ("--model", tiny_sd, "--prompt", PROMPTS[0], "--seed", SEEDS[0])
    call("generate", *prompt, "--negative-prompt", "red", "--output", tmp_path / "a")
    entry = json.loads((tmp_path / "a/generation.json").read_text())[0]
    del entry["milliseconds"]
    assert entry == {
        "prompt": PROMPTS[0], "seed": 5, "file": "0000.png",
        "negative_prompt": "red", "negative_guidance": "nasa", "negative_scale": 0.4,
    }  # fmt: skip
    generator = load_generator(tiny_sd)
    plain = generator.images(PROMPTS[:1], SEEDS[:1])
    steered = generator.images(PROMPTS[:1], SEEDS[:1], negative_prompt="red", negative_method=Nasa(0.4))
    assert (steered - plain).abs().max() > 0.003
    assert (pixels(tmp_path / "a/0000.png") - steered[0] * 255).abs().max() <= 0.6
    some = generator.images(
        PROMPTS, SEEDS, batch_size=1, negative_prompt=["red", None], negative_method=Nasa(0.4)
    )
    torch.testing.assert_close(some[:1], steered)
    assert torch.equal(some[1:], generator.images(PROMPTS[1:], SEEDS[1:]))
    nag = ("--negative-prompt", "red", "--negative-guidance", "nag", "--negative-scale", 6)
    call("generate", *prompt, *nag, "--steps", 2, "--output", tmp_path / "b")
    entry = json.loads((tmp_path / "b/generation.json").read_text())[0]
    assert (entry["negative_scale"], entry["negative_tau"], entry["negative_alpha"]) == (6.0, 2.5, 0.375)
    pipeline = stock_pipeline(load_parts(tiny_sd))
    with negative_prompting(pipeline, "red", method="nag", scale=6):
        expected = pipeline_images(pipeline, PROMPTS[:1], SEEDS[:1], 2, 1.0)
    assert (pixels(tmp_path / "b/0000.png") - expected[0] * 255).abs().max() <= 0.6
    assert not torch.equal(expected, pipeline_images(pipeline, PROMPTS[:1], SEEDS[:1], 2, 1.0))


def test_own_results_are_replaced_and_other_files_are_kept_safe(tiny_sd: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for count in (3, 1):
        call("generate", "--model", tiny_sd, "--prompt", "a cat", "--num-images", count, "--output", out)
    assert {p.name for p in out.iterdir()} == {"0000.png", "grid.png", "generation.json"}
    (out / "holiday.png").touch()
    with pytest.raises(UserError, match=r"other files \(holiday.png\)"):
        call("generate", "--model", tiny_sd, "--prompt", "a cat", "--output", out)
    (out / "generation.json").write_text("{")
    with pytest.raises(UserError, match="other files"):
        call("generate", "--model", tiny_sd, "--prompt", "a cat", "--output", out)


def test_bad_input_has_one_message_and_leaves_nothing(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "latin").write_bytes("gut\ngrün\n".encode("latin-1"))
    cat = ("--prompt", "a cat")
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((), "There is no prompt"),
        (("--prompt", " "), "A --prompt is empty"),
        (("--prompts-file", tmp_path / "nofile"), "nofile does not exist"),
        (("--prompts-file", tmp_path / "file"), "file is empty"),
        (("--prompts-file", tmp_path / "latin"), "row 2"),
        ((*cat, "--model", tmp_path / "gone"), "gone does not exist"),
        ((*cat, "--model", tmp_path / "gone.ckpt"), "gone.ckpt does not exist"),
        ((*cat, "--num-images", 0), "--num-images 0: must be >=1"),
        ((*cat, "--seed", -1), "--seed -1: must be >=0"),
        ((*cat, "--negative-prompt", "red", "--negative-guidance", "none"), "no effect without guidance"),
        ((*cat, "--negative-scale", 2), "no effect without guidance"),
        ((*cat, "--negative-prompt", " "), "--negative-prompt is empty"),
        ((*cat, "--negative-guidance", "nasa"), "nasa needs --negative-prompt"),
        ((*cat, "--negative-guidance", "nag", "--negative-scale", 2), "nag needs --negative-prompt"),
        (
            (*cat, "--negative-prompt", "red", "--negative-scale", "inf"),
            "--negative-scale inf: must be >=0 and <inf",
        ),
        ((*cat, "--negative-prompt", "red", "--negative-scale", -1), "--negative-scale -1: must be >=0"),
        ((*cat, "--negative-guidance", "cfg"), "cfg needs --negative-scale"),
        (
            (*cat, "--negative-guidance", "cfg", "--negative-scale", "nan"),
            "--negative-scale nan: must be >=0",
        ),
        ((*cat, "--negative-guidance", "cfg", "--negative-scale", 1, "--steps", 2), "no effect with --steps"),
        ((*cat, "--output", tmp_path / "file"), "is a file. Give a folder"),
        ((*cat, "--steps", "many"), "--steps: .*'many'"),
        ((*cat, "--negative-guidance", "naz"), "--negative-guidance naz: must be one of 'none', 'nasa'"),
        ((*cat, "--num-image", 2), "num-image'; did you mean 'num-images'"),
        (("--prompt",), "--prompt: expected at least one argument"),
    ]
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            call("generate", "--model", tiny_sd, "--output", tmp_path / "out", *words)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "latin"}


def test_the_default_output_and_model_are_the_documented_ones() -> None:
    options = parse(generate.Options, [])
    assert (options.model, options.output) == ("assets/emoji-sd-swiftbrush", Path("outputs/generate"))


def test_options_are_written_with_hyphens_or_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num_images=2", "--negative_prompt", "a_b", "--prompt", "x_y", "z", "--prompt", "1"]
    options = parse(generate.Options, words)
    assert (options.num_images, options.negative_prompt, options.prompt) == (2, "a_b", ["x_y", "z", "1"])
    assert parse(generate.Options, []).prompt == []
    with pytest.raises(SystemExit):
        parse(generate.Options, ["--help"])
    shown = capsys.readouterr().out
    assert "--num-images" in shown and "pictures per prompt" in shown and "_images" not in shown
    with pytest.raises(UserError, match="checkpoint"):
        parse(export.Options, ["--output", "x"])


def test_the_cards_data_for_the_hub(tiny_sd: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    card = ModelCard(card_of(write_run(run, tiny_sd), tmp_path / "out"))
    assert card.data.to_dict() == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "license": "other",
        "license_name": "that-of-the-teacher", "tags": ["one-step", "distillation"],
        "metrics": ["frechet_distance", "clip_score"],
    }  # fmt: skip
    text = model_card("o", {"teacher": "owner/sd@main", "method": "SwiftBrush"}, "", tmp_path, RunNotes())
    data = ModelCard(text).data
    assert data.base_model == "owner/sd" and "swiftbrush" in data.tags and data.metrics is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A teacher\n")
    text = model_card("o", {}, "", tmp_path, RunNotes())
    assert ModelCard(text).data.license == "mit"
    (tmp_path / "README.md").write_text("---\n- a: [\n---\n# A teacher\n")
    assert ModelCard(model_card("o", {}, "", tmp_path, RunNotes())).data.license == "other"


def test_what_others_wrote_is_text_in_the_card(tiny_sd: Path, tmp_path: Path) -> None:
    """Names and values come from a checkpoint, which may be anybody's."""
    name = "<img src=x>\n| a | b |"
    text = model_card("o", {"teacher": name}, "", tmp_path, RunNotes())
    assert "| teacher | &lt;img src=x&gt; \\| a \\| b \\| |" in text.splitlines()
    run = tmp_path / "run"
    checkpoint = write_run(run, tiny_sd)
    (run / "config.yaml").write_text(json.dumps({"model": "x\n```\n<script>"}))
    lines = card_of(checkpoint, tmp_path / "out").splitlines()
    assert lines.index("````") > next(i for i, line in enumerate(lines) if "script" in line)
