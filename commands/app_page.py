"""The page of `app` in Gradio's components, which are handed in: Gradio is installed only on demand."""

from collections.abc import Iterator, Sequence
from typing import Any

from commands.app_pictures import LONGEST_PROMPT, TEACHER_GUIDANCE, TEACHER_STEPS, Picture, SideBySide
from common.errors import UserError

METHOD_CHOICES = [("none", "none"), ("NASA", "nasa"), ("NAG", "nag")]
SCALE_RANGES = {"nasa": (2.0, 0.05), "nag": (12.0, 0.25)}  # largest value and step of the slider
EXAMPLES = [
    ["a red apple, noto style, on a blue background", ""],
    ["a panda face", "on a blue background"],
    ["a smiling cat, twemoji style", ""],
    ["a rocket, on a yellow background", "twemoji style"],
]
"""Prompts and negative prompts that suit the bundled models; the first is drawn at once."""
# Pictures as small as 64 x 64 are shown large, with their pixels.
CSS = ".drawing img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}"
LAUNCH: dict[str, Any] = {
    "share": False, "inbrowser": False, "prevent_thread_lock": True, "quiet": True, "show_error": True,
    "ssr_mode": False, "footer_links": [], "css": CSS, "max_file_size": "1kb", "strict_cors": True,
}  # fmt: skip
"""What keeps the page on this computer and off the network; for the `launch` of a page."""


def build_page(gr: Any, models: SideBySide, choices: Sequence[str] = ()) -> Any:
    """The page, a `gradio.Blocks`: every change draws the student, then the teacher if it has to change.

    Args:
        gr: the module `gradio`, version 6.
        models: draws the pictures.
        choices: names of students to choose from, the present one first.
    """
    # The pictures on disk that browsers fetch are removed after ten minutes.
    with gr.Blocks(title="One-step student", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown("# One-step student beside its teacher")
        title = gr.Markdown(models.title, elem_id="title")
        with gr.Row():
            with gr.Column(scale=2):
                chosen = gr.Dropdown(
                    list(choices), label="Student", elem_id="chosen", visible=len(choices) > 1,
                    info="the runs on this machine",
                )  # fmt: skip
                prompt = gr.Textbox(
                    EXAMPLES[0][0], label="Prompt", elem_id="prompt", max_length=LONGEST_PROMPT
                )
                negative = gr.Textbox(
                    "", label="Negative prompt", elem_id="negative", max_length=LONGEST_PROMPT
                )
                method = gr.Radio(
                    METHOD_CHOICES,
                    value="nasa",
                    label="Method",
                    elem_id="method",
                    info="how the negative prompt acts on the student; the teacher has it in its guidance",
                )
                scale = gr.Slider(0, label="Scale", elem_id="scale", **slider("nasa", models))
                with gr.Row():
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed")
                    count = gr.Radio([1, 4], value=4, label="Pictures", elem_id="count")
                beside = gr.Checkbox(True, label=f"Teacher, {TEACHER_STEPS} steps", elem_id="beside")
                gr.Examples(EXAMPLES, [prompt, negative])
            outputs = [part for name in ("student", "teacher") for part in _frame(gr, name)]
        draw = {
            "fn": drawing(gr, models),
            "inputs": [prompt, negative, method, scale, seed, beside, count],
            "outputs": outputs,
            "show_progress": "minimal",
            "concurrency_limit": 1,
        }
        # `always_last`: of what is typed while a picture is drawn, only the last state is drawn.
        # Texts by `change`, which also sees what is pasted; the slider not, as the method moves it, too.
        changes = [prompt.change, negative.change, scale.input, seed.input, beside.input, count.input]
        gr.on([page.load, *changes], **draw, trigger_mode="always_last")
        method.input(lambda name: gr.update(**slider(name, models)), method, scale).then(**draw)
        chosen.input(choosing(models), chosen, title).then(**draw)
    return page


def choosing(models: SideBySide) -> Any:
    """The function that takes another student; it returns its title, or why it can't be taken."""

    def choose(name: str) -> str:
        try:
            models.choose(name)
        except UserError as error:
            return f"{models.title}. {name} can't be taken: {error}"
        return models.title

    return choose


def slider(method: str, models: SideBySide) -> dict[str, Any]:
    """Range and value of the slider for a method; without one it stands still."""
    if method not in SCALE_RANGES:
        return {"interactive": False}
    largest, step = SCALE_RANGES[method]
    return {"maximum": largest, "step": step, "value": models.default_scale(method), "interactive": True}


def drawing(gr: Any, models: SideBySide) -> Any:
    """The function behind the page: it yields the student's picture and caption, then the teacher's."""

    def draw(
        prompt: str, negative: str, method: str, scale: float, seed: int | None, beside: bool, count: int = 1
    ) -> Iterator[tuple[Any, ...]]:
        together = "" if count == 1 else f", {count} pictures"
        try:
            student = models.student(prompt, negative, method, scale, seed, count)
            shown = (student.image, caption(f"Student, 1 step{together}", student))
            if not beside:
                yield *shown, None, "Teacher: not drawn"
                return
            yield *shown, gr.skip(), gr.skip()
            teacher = models.teacher(prompt, negative, method, seed, count)
        except UserError as error:
            yield gr.skip(), str(error), gr.skip(), gr.skip()  # while a number is typed it may be empty
            return
        title = f"Teacher, {TEACHER_STEPS} steps, guidance {TEACHER_GUIDANCE}{together}"
        times = f", {teacher.milliseconds / student.milliseconds:.3g} times the student's"
        yield gr.skip(), gr.skip(), teacher.image, caption(title, teacher) + times

    return draw


def caption(title: str, picture: Picture) -> str:
    """What stands under a picture."""
    digits = 1 if picture.milliseconds < 100 else 0
    return f"{title}: {picture.milliseconds:,.{digits}f} ms"


def _frame(gr: Any, name: str) -> tuple[Any, Any]:
    """A place for a picture, and one for its caption."""
    with gr.Column(scale=2):
        image = gr.Image(
            label=name.capitalize(), format="png", interactive=False, elem_id=name, elem_classes="drawing",
            height=420, buttons=["download"],
        )  # fmt: skip
        return image, gr.Markdown(elem_id=f"{name}-time")
