"""The command `app`: its pictures are those of `generate` and of the teacher; its page stays local."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from PIL import ImageChops

import cli
from commands import app
from commands.app_page import METHOD_CHOICES, build_page, choosing, drawing, slider
from commands.app_pictures import SideBySide, local_students
from commands.options import parse
from common.errors import UserError
from lightning_modules.generator import load_generator
from lightning_modules.guidance import negative_prompting
from lightning_modules.guidance.methods import Nag, Nasa
from lightning_modules.networks.loading import load_parts
from lightning_modules.pipelines import multistep_images, pipeline_images, stock_pipeline
from reports.sheets import to_pil

PROMPT, NEGATIVE, SEED = "a red cat", "a dog", 5
KINDS = {
    "Blocks", "Row", "Column", "Textbox", "Radio", "Slider", "Number", "Checkbox", "Image", "Markdown",
    "Dropdown", "Examples",
}  # fmt: skip


class Component:
    """A component, a layout or a page of Gradio: keeps what it was made with and what listens to it."""

    def __init__(self, gradio: "Gradio", kind: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.gradio, self.kind, self.args, self.options = gradio, kind, args, options
        self.blocked = False

    def __enter__(self) -> "Component":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, event: str) -> Callable[..., "Component"]:
        if event not in ("change", "input", "then", "load"):
            raise AttributeError(event)

        def listen(fn: Any, inputs: Any = None, outputs: Any = None, **options: Any) -> "Component":
            self.gradio.listeners[self.options.get("elem_id"), event] = (fn, inputs, outputs, options)
            return self

        listen.__qualname__ = f"{self.options.get('elem_id') or self.kind}.{event}"
        return listen

    def launch(self, **options: Any) -> None:
        if options["server_port"] == 7999:
            raise OSError("Cannot find empty port in range: 7999-7999")
        self.gradio.launched = options

    def block_thread(self) -> None:
        self.blocked = True


class Gradio(ModuleType):
    """The part of Gradio 6 that the page uses, recorded."""

    def __init__(self) -> None:
        super().__init__("gradio")
        self.components: dict[str, Component] = {}
        self.listeners: dict[tuple[Any, str], tuple[Any, ...]] = {}
        self.launched: dict[str, Any] = {}

    def __getattr__(self, kind: str) -> Callable[..., Component]:
        if kind not in KINDS:
            raise AttributeError(kind)

        def make(*args: Any, **options: Any) -> Component:
            made = Component(self, kind, args, options)
            self.components[options.get("elem_id", kind)] = made
            return made

        return make

    def on(self, triggers: list[Any], fn: Any, inputs: Any, outputs: Any, **options: Any) -> None:
        self.listeners["page", "on"] = (fn, inputs, outputs, options)
        self.triggers = [trigger.__qualname__ for trigger in triggers]

    def update(self, **options: Any) -> dict[str, Any]:
        return options

    def skip(self) -> str:
        return "as it is"


@pytest.fixture(scope="module")
def models(tiny_sd: Path, tiny_sd_v: Path) -> SideBySide:
    """A student in one step, and another model in its teacher's place."""
    return SideBySide(str(tiny_sd), str(tiny_sd_v))


def same(picture: Any, pixels: torch.Tensor) -> bool:
    return ImageChops.difference(picture, to_pil(pixels[0])).getbbox() is None


@pytest.mark.parametrize(("name", "rule"), [("nasa", Nasa(0.75)), ("nag", Nag(3.0, 2.5, 0.375))])
def test_student_draws_as_generate_does(models: SideBySide, tiny_sd: Path, name: str, rule: Any) -> None:
    generator = load_generator(tiny_sd)
    plain = models.student(PROMPT, NEGATIVE, "none", rule.scale, SEED)
    assert same(plain.image, generator.images([PROMPT], [SEED])), "without a method nothing is avoided"
    steered = models.student(PROMPT, f" {NEGATIVE} ", name, rule.scale, SEED)
    expected = generator.images([PROMPT], [SEED], negative_prompt=NEGATIVE, negative_method=rule)
    assert same(steered.image, expected) and not same(plain.image, expected)
    for negative, scale in ((" ", rule.scale), (NEGATIVE, 0.0)):
        assert models.student(PROMPT, negative, name, scale, SEED).image == plain.image
    assert models.student(PROMPT, NEGATIVE, name, 2 * rule.scale, SEED).image != steered.image
    assert models.student(PROMPT, "", name, rule.scale, SEED + 1).image != plain.image
    assert plain.milliseconds > 0


def test_teacher_takes_the_negative_prompt_by_guidance(models: SideBySide, tiny_sd_v: Path) -> None:
    parts = load_parts(tiny_sd_v)
    plain = models.teacher(PROMPT, NEGATIVE, "none", SEED)
    assert same(plain.image, multistep_images(parts, [PROMPT], [SEED], 25, 4.5))
    guided = models.teacher(PROMPT, NEGATIVE, "nag", SEED)
    assert same(guided.image, multistep_images(parts, [PROMPT], [SEED], 25, 4.5, negative_prompt=NEGATIVE))
    assert guided.image != plain.image
    assert models.teacher(PROMPT, NEGATIVE, "nasa", SEED) is guided, "no drawing for another scale or method"
    assert models.teacher(PROMPT, NEGATIVE, "nasa", SEED + 1) is not guided


def test_a_student_with_a_sampler_of_its_own(own_sd: Path) -> None:
    scheduler = LCMScheduler.from_config(load_parts(own_sd).scheduler.config)
    scheduler.save_pretrained(own_sd / "scheduler")
    index = own_sd / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "LCMScheduler"))
    models = SideBySide(str(own_sd), str(own_sd))
    pipeline = stock_pipeline(load_parts(own_sd))
    expected = pipeline_images(pipeline, [PROMPT], [SEED], 1, 1.0)
    assert same(models.student(PROMPT, "", "nasa", 0.5, SEED).image, expected)
    with negative_prompting(pipeline, NEGATIVE, "nag", 3.0):
        expected = pipeline_images(pipeline, [PROMPT], [SEED], 1, 1.0)
    assert same(models.student(PROMPT, NEGATIVE, "nag", 3.0, SEED).image, expected)


def test_models_that_do_not_load(tiny_sd: Path, own_sd: Path) -> None:
    with pytest.raises(UserError, match="does not say what its teacher is. Give --teacher"):
        SideBySide(str(tiny_sd))
    with pytest.raises(UserError, match="teacher can't be loaded.*model_index.json"):
        SideBySide(str(tiny_sd), str(own_sd / "unet"))
    (own_sd / "one_step.json").write_text(f'{{"teacher": "{own_sd / "vae"}"}}')
    with pytest.raises(UserError, match="the one that .* names; --teacher gives another"):
        SideBySide(str(own_sd))


def test_every_change_draws_student_then_teacher(models: SideBySide) -> None:
    gradio = Gradio()
    draw = drawing(gradio, models)
    first, second = draw(PROMPT, NEGATIVE, "nasa", 0.5, SEED, True)
    student = models.student(PROMPT, NEGATIVE, "nasa", 0.5, SEED)
    assert first[0] == student.image and first[1].startswith("Student, 1 step: ") and first[1].endswith(" ms")
    assert first[2:] == ("as it is",) * 2 and second[:2] == ("as it is",) * 2
    assert second[2] is models.teacher(PROMPT, NEGATIVE, "nasa", SEED).image
    assert second[3].startswith("Teacher, 25 steps, guidance 4.5: ") and "times the student's" in second[3]
    (alone,) = draw(PROMPT, NEGATIVE, "nasa", 0.5, SEED, False)
    assert alone[2:] == (None, "Teacher: not drawn")
    for seed in (None, -1, 2**63):
        (told,) = draw(PROMPT, "", "none", 0.0, seed, True)
        assert "seed must be a whole number" in told[1] and {told[0], *told[2:]} == {"as it is"}


def test_slider_follows_the_method(models: SideBySide) -> None:
    assert slider("nasa", models) == {"maximum": 2.0, "step": 0.05, "value": 0.4, "interactive": True}
    assert slider("nag", models)["value"] == 2.0 < slider("nag", models)["maximum"]
    assert slider("none", models) == {"interactive": False}


def test_what_the_page_listens_to(models: SideBySide) -> None:
    gradio = Gradio()
    build_page(gradio, models, ["a", "b"])
    assert (
        gradio.components["chosen"].args == (["a", "b"],) and gradio.components["chosen"].options["visible"]
    )
    assert gradio.components["title"].args == (models.title,)
    assert gradio.triggers == [
        "Blocks.load", "prompt.change", "negative.change", "scale.input", "seed.input", "beside.input",
        "count.input",
    ]  # fmt: skip
    _, inputs, outputs, options = gradio.listeners["page", "on"]
    names = ["prompt", "negative", "method", "scale", "seed", "beside", "count"]
    assert [part.options["elem_id"] for part in inputs] == names
    names = ["student", "student-time", "teacher", "teacher-time"]
    assert [part.options["elem_id"] for part in outputs] == names
    assert options["trigger_mode"] == "always_last" and options["concurrency_limit"] == 1
    move, given, target, _ = gradio.listeners["method", "input"]
    assert move("nag") == slider("nag", models)
    assert given is gradio.components["method"] and target is gradio.components["scale"]
    assert gradio.listeners["method", "then"][1] is inputs, "a new method draws, too"
    assert gradio.components["method"].args[0] == METHOD_CHOICES


def test_four_seeds_stand_on_one_sheet(models: SideBySide, tiny_sd: Path, tiny_sd_v: Path) -> None:
    """Two rows of two; the teacher's from the same seeds."""
    sheet = models.student(PROMPT, "", "none", 0.0, SEED, count=4).image
    one, side = models.student(PROMPT, "", "none", 0.0, SEED + 3).image, 16
    assert sheet.size == (2 * side + 3, 2 * side + 3)
    last = sheet.crop((side + 2, side + 2, 2 * side + 2, 2 * side + 2))
    difference = ImageChops.difference(last, one)
    assert max(high for _, high in difference.getextrema()) <= 1, "a batch rounds differently"
    assert models.teacher(PROMPT, "", "none", SEED, count=4).image.size == sheet.size
    assert models.teacher(PROMPT, "", "none", SEED).image.size == one.size


def test_another_student_is_chosen(tiny_sd: Path, tiny_sd_v: Path, own_sd: Path, tmp_path: Path) -> None:
    models = SideBySide(str(tiny_sd), str(tiny_sd_v))
    assert models.title == f"**{tiny_sd.name}**, distilled from **{tiny_sd_v.name}**"
    before = models.student(PROMPT, "", "none", 0.0, SEED).image
    told = choosing(models)(str(tmp_path / "nowhere"))
    assert told.startswith(models.title) and "nowhere can't be taken: The model folder" in told
    assert models.student(PROMPT, "", "none", 0.0, SEED).image == before
    assert choosing(models)(str(tiny_sd_v)) == f"**{tiny_sd_v.name}**, distilled from **{tiny_sd_v.name}**"
    assert models.student(PROMPT, "", "none", 0.0, SEED).image != before
    for age, name in enumerate(("a/version_0", "b/version_1", "b/version_2")):
        place = tmp_path / "runs" / name / "checkpoints"
        place.mkdir(parents=True)
        if age < 2:
            (place / "last.ckpt").touch()
        os.utime(place, (age, age))
    assert local_students(tmp_path / "runs") == [
        str(tmp_path / "runs" / n) for n in ("b/version_1", "a/version_0")
    ]


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch) -> Gradio:
    """The stand-in in the place of Gradio."""
    made = Gradio()
    monkeypatch.setitem(sys.modules, "gradio", made)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")  # set again by the command; undone at the end
    return made


def call(*words: str) -> None:
    cli.main(["app", *words])


def test_the_page_stays_on_this_computer(
    gradio: Gradio, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("--model", str(tiny_sd), "--teacher", str(tiny_sd), "--port", "7123")
    assert gradio.launched["server_name"] == "127.0.0.1" and gradio.launched["server_port"] == 7123
    assert gradio.launched["share"] is False, "not None, which an environment variable can change"
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    page = gradio.components["Blocks"]
    assert page.options["analytics_enabled"] is False and page.blocked
    assert "http://127.0.0.1:7123" in capsys.readouterr().out


def test_mistakes_of_the_user(gradio: Gradio, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="Port 7999 .* is taken"):
        call("--model", str(tiny_sd), "--teacher", str(tiny_sd), "--port", "7999")
    with pytest.raises(UserError, match="--port 0: must be >=1 and <=65535"):
        call("--port", "0")
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    with pytest.raises(UserError, match=r'pip install -e "\.\[app\]"'):
        call()


def test_the_defaults_are_the_bundled_models() -> None:
    options = parse(app.Options, [])
    assert (options.model, options.teacher, options.port) == ("assets/emoji-sd-swiftbrush", None, 7860)
    marker = Path(__file__).parent.parent / options.model / "one_step.json"
    assert '"teacher": "assets/emoji-sd"' in marker.read_text()
