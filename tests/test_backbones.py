"""Every family from teacher to student: training, resuming, export, stock pipeline, the LoRA by itself."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import lightning as L
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torchvision.transforms.functional import to_tensor

import cli
from callbacks.metrics.teacher import Teacher
from commands.app_pictures import SideBySide
from common.errors import UserError
from datamodules.prompts import PromptDataModule
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.drawing import Guidance, Recipe, model_drawer, open_model
from lightning_modules.generator import OneStepGenerator, load_generator
from lightning_modules.guidance import negative_prompting
from lightning_modules.guidance.methods import Nasa
from lightning_modules.guidance.scales import UniformGuidance
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.lora import StudentLoraSettings
from lightning_modules.networks.student import load_student
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.pipelines import multistep_scheduler
from reports.sheets import to_pil
from tests.backbones import FLOWS, TRAINED, call_options, stock_pipeline_of
from tests.conftest import PICTURE
from tests.tiny_distillation import PROMPTS, Hooks, adam, distillation, prompt_data, snapshot, trainer

TEXTS, SEEDS = ["a Red cat ", "a dog"], [5, 6]
STARTS = dict.fromkeys(("sd21_v", "zero_snr", *FLOWS), 999)  # the others at 625
PIPELINES = {
    "sdxl": "StableDiffusionXLPipeline",
    "pixart": "PixArtAlphaPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "sana": "SanaPipeline",
    "zimage": "ZImagePipeline",
    "klein": "Flux2KleinPipeline",
    "qwen": "QwenImagePipeline",
}
GUIDED = {"zimage": {"guidance_scale": 3.5}, "qwen": {"true_cfg_scale": 4.5, "negative_prompt": [" ", " "]}}
UNGUIDED = {"zimage": {"guidance_scale": 0.0}, "qwen": {"true_cfg_scale": 1.0}}
"""How the stock pipeline is told kappa 4.5 and 1, where it isn't guidance_scale."""
SIDES = {"sana": 32}  # in pixels; the others' pictures have PICTURE
LORA = StudentLoraSettings(rank=2, alpha=6.0, targets=["to_q", "to_k", "to_v", "to_out.0"])


@dataclass
class Run:
    """A student after three updates, and a LoRA student after two.

    Attributes:
        views: what student, teacher and fake score see as x0, as pictures.
        final, resumed: all weights of the uninterrupted run and of one that went on after two updates.
        checkpoint, folder: of the student; lora_checkpoint, lora_folder: of the LoRA student.
    """

    name: str
    teacher: Path
    views: dict[str, Tensor]
    final: dict[str, Tensor]
    resumed: dict[str, Tensor]
    checkpoint: Path
    folder: Path
    lora_checkpoint: Path
    lora_folder: Path


def call(command: str, *words: Any) -> None:
    """Run a command line."""
    cli.main([command, *(str(word) for word in words)])


def train(module: OneStepDistillation, place: Path, steps: int, data: Any = None, **options: Any) -> Path:
    """Fit and save what it comes to; also after two updates, in two.ckpt."""
    place.mkdir(exist_ok=True)

    def after_step(m: Any) -> None:
        if m.student_steps == 2:
            m.trainer.save_checkpoint(place / "two.ckpt")

    L.seed_everything(0, verbose=False)
    run = trainer(place, steps, [Hooks(after_step=after_step)])
    run.fit(module, data or prompt_data(), **options)
    run.save_checkpoint(place / "last.ckpt")
    return place / "last.ckpt"


@pytest.fixture(scope="module", params=TRAINED)
def run(request: pytest.FixtureRequest, backbone_folder: Callable[[str], Path], tmp_path_factory: Any) -> Run:
    name, place = request.param, tmp_path_factory.mktemp(request.param)
    teacher, start = backbone_folder(name), STARTS.get(name, 625)
    modules = [distillation(teacher, start_timestep=start) for _ in range(2)]
    checkpoint = train(modules[0], place / "run", 3)
    train(modules[1], place / "again", 3, ckpt_path=place / "run" / "two.ckpt", weights_only=True)
    # NASA-T, so that negative prompts and recomputed activations go through each family's attention
    # (guidance that is distilled into the teacher has no place for them)
    objective = SwiftBrush(teacher_negatives=name != "flux", student_negatives=UniformGuidance(0, 1))
    negatives = PromptDataModule(
        PROMPTS, batch_size=4, eval_captions=PROMPTS, eval_size=2, negative_prompts=["a blue mat", "tea"]
    )
    lora = distillation(
        teacher, objective, start_timestep=start, student_lora=LORA, student=adam(0.02), ema_decay=None,
        gradient_checkpointing=True,
    )  # fmt: skip
    lora_checkpoint = train(lora, place / "lora", 2, negatives)
    for kind, path in (("student", checkpoint), ("lora_student", lora_checkpoint)):
        call("export", "--checkpoint", path, "--output", place / kind)
    return Run(
        name, teacher, modules[0].score_views(TEXTS, SEEDS), snapshot(modules[0]), snapshot(modules[1]),
        checkpoint, place / "student", lora_checkpoint, place / "lora_student",
    )  # fmt: skip


def card_call(folder: Path) -> dict[str, Any]:
    """Arguments of the calls in the card of an export, which are one and the same, as they stand there."""
    found = set(re.findall(r'pipe\(prompt="a red apple", (.*)\)\.images', (folder / "README.md").read_text()))
    assert len(found) == 1
    options: dict[str, Any] = eval(f"dict({found.pop()})", {})
    return options


def one_step(folder: Path, generator: OneStepGenerator, pipe: Any = None) -> Tensor:
    """What the card's call draws from the seeds, which give the generator's noise."""
    pipe = pipe or stock_pipeline_of(folder)
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pictures: Tensor = pipe(prompt=list(TEXTS), generator=noise, output_type="pt", **card_call(folder)).images
    return pictures


def test_a_resumed_run_is_the_uninterrupted_one(run: Run) -> None:
    assert run.final.keys() == run.resumed.keys()
    assert all(torch.equal(value, run.resumed[name]) for name, value in run.final.items())
    start = dict(load_parts(run.teacher).denoiser.named_parameters())
    moved = [name for name in start if not torch.equal(start[name], run.final[f"student.{name}"])]
    assert len(moved) > len(start) / 2
    for pictures in run.views.values():
        assert pictures.shape[:2] == (2, 3) and bool(pictures.isfinite().all())


def test_the_stock_class_draws_what_we_draw(run: Run) -> None:
    pipe = stock_pipeline_of(run.folder)
    assert type(pipe).__name__ == PIPELINES.get(run.name.split("_")[0], "StableDiffusionPipeline")
    # stock PixArt rewrites prompts where bs4 is installed
    of_pixart = {"use_resolution_binning": False, "clean_caption": False}
    given = of_pixart if run.name.startswith("pixart") else {}
    side = SIDES.get(run.name, PICTURE)
    given |= {"height": side, "width": side} if run.name in ("sana", *FLOWS[1:]) else {}
    given |= {"use_resolution_binning": False} if run.name == "sana" else {}
    given |= UNGUIDED.get(run.name, {"guidance_scale": 1.0})
    assert card_call(run.folder) == {"num_inference_steps": 1, **given}
    assert "| method | SwiftBrush |" in (run.folder / "README.md").read_text()
    ours = load_generator(run.checkpoint)
    expected = ours.images(TEXTS, SEEDS)
    torch.testing.assert_close(one_step(run.folder, ours, pipe), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(load_generator(run.folder).images(TEXTS, SEEDS), expected, rtol=0, atol=1e-4)
    teacher = load_generator(run.teacher)
    teacher.schedule, teacher.steps = ours.schedule, ours.steps
    assert (teacher.images(TEXTS, SEEDS) - expected).abs().max() > 1e-3


def test_the_lora_by_itself_is_the_adapter(run: Run) -> None:
    """On the untouched teacher, loaded as the card says, it draws what the folded student draws."""
    tolerance = 1e-5
    ours = load_generator(run.lora_checkpoint)
    expected = ours.images(TEXTS, SEEDS)
    folded = one_step(run.lora_folder, ours)
    torch.testing.assert_close(folded, expected, rtol=0, atol=tolerance)
    pipe: Any = stock_pipeline_of(run.teacher)
    card = (run.lora_folder / "README.md").read_text()
    kind = re.search(r"pipe.scheduler = (\w+)\.from_pretrained", card)
    assert kind is not None
    pipe.scheduler = getattr(diffusers, kind[1]).from_pretrained(run.lora_folder, subfolder="scheduler")
    without = one_step(run.lora_folder, ours, pipe)
    if run.name.startswith("pixart"):
        assert 'PeftModel.from_pretrained(pipe.transformer, "lora_student/lora")' in card
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, str(run.lora_folder / "lora"))
    else:
        assert 'pipe.load_lora_weights("lora_student/lora")' in card
        pipe.load_lora_weights(str(run.lora_folder / "lora"))
        with safe_open(run.lora_folder / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
            told = file.metadata()
        settings = json.loads(told["lora_adapter_metadata"])
        part = "transformer" if run.name in FLOWS else "unet"
        assert (settings[f"{part}.r"], settings[f"{part}.lora_alpha"]) == (2, 2)  # the scale is folded in
        assert told["trained_timesteps"] == f"[{STARTS.get(run.name, 625)}]"
        assert told["num_inference_steps"] == "1" and told["guidance_scale"] == "1.0"
        expected_shift = ours.schedule.shift if run.name in FLOWS else None
        assert told.get("shift") == (expected_shift and str(expected_shift))
        assert run.name != "sd3" or told["shift"] == "3.0"
    assert f'DiffusionPipeline.from_pretrained("{run.teacher.name}", torch' in card
    assert "right at scale 1" in card and "(alpha 6 is folded in)" in card
    loaded = one_step(run.lora_folder, ours, pipe)
    torch.testing.assert_close(loaded, expected, rtol=0, atol=tolerance)
    assert (without - expected).abs().max() > 1e-3
    assert not (run.folder / "lora").exists()
    if run.name in ("sd15", "sdxl"):  # ComfyUI's names, read by diffusers' converter
        pipe.unload_lora_weights()
        torch.testing.assert_close(one_step(run.lora_folder, ours, pipe), without)
        pipe.load_lora_weights(str(run.lora_folder / "lora"), weight_name="comfyui.safetensors")
        torch.testing.assert_close(one_step(run.lora_folder, ours, pipe), expected, rtol=0, atol=tolerance)


# --- commands, on the families that are not Stable Diffusion ----------------------------------------------


others = pytest.mark.parametrize("run", list(PIPELINES), indirect=True)


@others
def test_generate_with_a_negative_prompt(run: Run, tmp_path: Path) -> None:
    # the other text ends in a blank, which the command drops and Qwen's tokenizer reads
    words = ["--prompt", TEXTS[1], "--seed", SEEDS[1], "--negative-prompt", "a blue mat"]
    call("generate", "--model", run.folder, *words, "--negative-scale", 0.5, "--output", tmp_path / "out")
    ours = load_generator(run.folder)
    steered = ours.images(TEXTS, SEEDS, negative_prompt="a blue mat", negative_method=Nasa(0.5))
    pipe = stock_pipeline_of(run.folder)
    with negative_prompting(pipe, "a blue mat", method="nasa", scale=0.5):
        torch.testing.assert_close(one_step(run.folder, ours, pipe), steered, rtol=0, atol=1e-4)
    assert (steered - ours.images(TEXTS, SEEDS)).abs().max() > 1e-3
    picture = to_tensor(Image.open(tmp_path / "out" / "0000.png"))
    torch.testing.assert_close(picture, steered[1], rtol=0, atol=0.505 / 255)


@others
def test_evaluate_draws_the_same(run: Run) -> None:
    ours = load_generator(run.checkpoint)
    place = (TEXTS, SEEDS, None, torch.device("cpu"))
    for path in (run.checkpoint, run.folder):
        pictures = model_drawer(Recipe(str(path)), *place).draw([0, 1])
        torch.testing.assert_close(pictures, ours.images(TEXTS, SEEDS), rtol=0, atol=1e-4)
    drawer = model_drawer(Recipe(str(run.teacher), steps=2, guidance_scale=3.0), *place)
    side = SIDES.get(run.name, PICTURE)
    assert drawer.draw([1]).shape == (1, 3, side, side)


@others
def test_the_teachers_rows(run: Run) -> None:
    """Many guided steps are the stock pipeline's with DDIM, or Euler's method for flow."""
    teacher = Teacher(str(run.teacher), steps=3)
    pipe: Any = stock_pipeline_of(run.teacher)
    pipe.scheduler = multistep_scheduler(pipe.scheduler)
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"num_inference_steps": 3, "output_type": "pt", **call_options(pipe)}
    options |= GUIDED.get(run.name, {"guidance_scale": 4.5})
    expected = pipe(prompt=list(TEXTS), generator=noise, **options).images
    torch.testing.assert_close(teacher.multistep(TEXTS, SEEDS), expected, rtol=0, atol=1e-4)
    assert teacher.one_step(TEXTS, SEEDS).shape == expected.shape


@others
def test_merge(run: Run, tmp_path: Path) -> None:
    pair = ("--first", run.checkpoint, "--second", run.lora_folder)
    call("merge", *pair, "--weight", 0.25, "--output", tmp_path / "m")
    paths = (run.checkpoint, run.lora_folder, tmp_path / "m")
    first, second, merged = (load_student(path).parts.denoiser.state_dict() for path in paths)
    for name, value in merged.items():
        torch.testing.assert_close(value, 0.25 * first[name] + 0.75 * second[name])
    ours = load_generator(tmp_path / "m")
    drawn = one_step(tmp_path / "m", ours)
    torch.testing.assert_close(drawn, ours.images(TEXTS, SEEDS), rtol=0, atol=1e-4)


@others
def test_app(run: Run, tmp_path: Path) -> None:
    page = SideBySide(str(run.folder), str(run.teacher))
    picture = page.student(TEXTS[0], "a blue mat", "nasa", 0.5, SEEDS[0]).image
    steered = load_generator(run.folder).images(
        TEXTS[:1], SEEDS[:1], negative_prompt="a blue mat", negative_method=Nasa(0.5)
    )
    assert picture.tobytes() == to_pil(steered[0]).tobytes()


def test_cfg_has_no_negative_prompts_where_guidance_is_distilled(
    backbone_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """By our generator, and by the stock pipeline in an evaluation; its scale by itself is an input."""
    teacher, place = str(backbone_folder("flux")), (TEXTS, SEEDS, ["red", ""], torch.device("cpu"))
    message = "cfg: guidance was distilled into this FluxTransformer2DModel, .* Give --negative-guidance nasa"
    asked = ("--model", teacher, "--prompt", "a cat", "--output", tmp_path / "out")
    with pytest.raises(UserError, match=message):
        call(
            "generate", *asked, "--negative-prompt", "red", "--negative-guidance", "cfg",
            "--negative-scale", 3,
        )  # fmt: skip
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        model_drawer(Recipe(teacher, 2, negative_guidance="cfg", negative_scale=3), *place)
    model = open_model(teacher)
    model.check(Guidance("cfg", 3.0), ["", None])
    model.check(Guidance("nasa"), "red")
