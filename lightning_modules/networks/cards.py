"""The model card of an exported student: how to draw, what is known of it, and of the run that trained it."""

import csv
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData

from common.errors import UserError
from lightning_modules.networks.loading import read_json
from lightning_modules.networks.model_names import may_be_hub_name, model_name

PICTURE = "samples.png"  # a sheet of samples in the exported folder
SECRET = re.compile(r"(api_key|password|secret|token)$")  # settings of loggers that nobody else should see


class RunNotes(NamedTuple):
    """What a card says of the run: Markdown, the names of what was measured, a sheet of samples."""

    markdown: str = ""
    metrics: Sequence[str] = ()
    picture: Path | None = None


def without_place(value: Any) -> Any:
    """The value, but an absolute path without its folders: exports are passed on, and they tell of a machine.

    Relative paths (`assets/...`) and hub names stay as they are.
    """
    if isinstance(value, (str, Path)) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return value


def shown_name(output: Path) -> str:
    """What the card calls its own folder: no place on a machine."""
    return output.name if output.is_absolute() else output.as_posix()


def model_card(
    name: str, facts: dict[str, Any], call: str, source: Path, more: RunNotes, load: str = ""
) -> str:
    """The text of README.md: data for the hub, title, picture, the snippet that draws one, facts as a table.

    Args:
        name: what the model is loaded by: the exported folder, or its name on the hub.
        facts: name to value.
        call: arguments of the pipeline's call, as Python text.
        source: folder of the model that gave the other parts; a licence named in its card is this one's, too.
        more: what else the card says.
        load: further arguments with which the folder is opened, as Python text.
    """
    rows = "\n".join(f"| {_cell(name.replace('_', ' '))} | {_cell(value)} |" for name, value in facts.items())
    steps = facts.get("timesteps") or [facts.get("start_timestep")]
    count = "one step" if len(steps) == 1 else f"{len(steps)} steps"
    picture = ""
    if more.picture is not None:
        step = int(more.picture.stem.removeprefix("step_"))
        picture = (
            f"![samples]({PICTURE})\nThe student's {count} beside its teacher, after {step:,} updates.\n\n"
        )
    return f"""---
{_hub_data(facts, source, more.metrics).to_yaml()}
---

# {Path(name).name}: a text-to-image model of {count}

{picture}```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}"{load})
image = pipe(prompt="a red apple", {call}).images[0]
image.save("apple.png")
```

A student distilled from a multi-step diffusion model. {_steps_in_words(steps, facts)}
always use the numbers of that call (other values give worse pictures), and keep the scheduler of this
folder, which holds the timestep the student starts from. A negative prompt has no guidance to act by
there; it acts in cross-attention instead, by the code of the project that trained this model
(`one-step-distillation`, which has to be installed for it):

```python
from lightning_modules.guidance import negative_prompting

with negative_prompting(pipe, "blurry", method="nasa"):
    image = pipe(prompt="a red apple", {call}).images[0]
```

| | |
|---|---|
{rows}

The licence is that of the teacher it was distilled from.
{more.markdown}"""


def _steps_in_words(steps: Sequence[Any], facts: dict[str, Any]) -> str:
    if len(steps) == 1:
        return "It draws a picture in **one** network evaluation:"
    noise = {"fresh": "with new noise before each", "none": "without new noise between them"}
    return (
        f"It draws a picture in **{len(steps)}** network evaluations, at the timesteps "
        f"{', '.join(map(str, steps))}, {noise[facts['step_noise']]}, without guidance:"
    )


def _cell(value: Any) -> str:
    """The text of a cell of a table: what others named or wrote stays text, and in its cell."""
    return " ".join(html.escape(str(value), quote=False).replace("|", "\\|").split())


def _hub_data(facts: dict[str, Any], source: Path, metrics: Sequence[str]) -> ModelCardData:
    """What the hub shows and searches; a teacher that is no model of the hub is no `base_model` there."""
    teacher = str(facts.get("teacher", ""))
    licence = _licence(source / "README.md")
    return ModelCardData(
        base_model=model_name(teacher).name if may_be_hub_name(teacher) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence or "other",
        license_name=None if licence else "that-of-the-teacher",
        metrics=list(metrics) or None,
        tags=[
            "few-step" if "timesteps" in facts else "one-step",
            "distillation",
            *([str(facts["method"]).lower()] if "method" in facts else []),
        ],
    )


def _licence(card: Path) -> str | None:
    """The licence in the data of a model's card; None where there is no card, or none is named."""
    if not card.is_file():
        return None
    try:
        licence = ModelCard(card.read_text(encoding="utf-8")).data.get("license")
    except (ValueError, yaml.YAMLError):  # others wrote it; nothing else depends on it
        return None
    return licence if isinstance(licence, str) else None


def run_notes(checkpoint: Path, facts: dict[str, Any]) -> RunNotes:
    """Metrics of the student, the configuration, samples; nothing where no run's folder is around it.

    Args:
        checkpoint: `checkpoints/*.ckpt` of a run's folder, which has a config.yaml, or any other file.
        facts: `student_steps` and `weights` of the student. Only measurements of these are shown.

    Raises:
        UserError: the run's report.json or config.yaml is damaged.
    """
    file = checkpoint.expanduser().resolve()
    run = file.parent.parent
    if file.parent.name != "checkpoints" or not (run / "config.yaml").is_file():
        return RunNotes()
    measured, names = _metrics(run, facts)
    folded = f"<details><summary>config.yaml</summary>\n\n{_configuration(run)}\n</details>\n"
    return RunNotes(f"\n## Metrics\n\n{measured}\n## Configuration\n\n{folded}", names, _picture(run, facts))


def _picture(run: Path, facts: dict[str, Any]) -> Path | None:
    """The run's sheet of samples that is nearest to the student's step."""
    sheets = [path for path in (run / "samples").glob("step_*.png") if path.stem[5:].isdigit()]
    step = facts.get("student_steps") or 0
    return min(sheets, key=lambda path: (abs(int(path.stem[5:]) - step), path.name), default=None)


def _metrics(run: Path, facts: dict[str, Any]) -> tuple[str, list[str]]:
    """Table of the report's numbers, the teacher's beside the student's; and the metrics' names.

    Where the report is of another step or of other weights: what the validation at this step has logged.
    """
    file = run / "report.json"
    report = read_json(file) if file.is_file() else {}
    same = (report.get("step"), report.get("weights")) == (facts["student_steps"], facts["weights"])
    if not same or not report.get("metrics"):
        return _validation(run, facts)
    manifest = read_json(run / "manifest.json") if (run / "manifest.json").is_file() else {}
    try:
        table = _table(report["metrics"], report["teacher_metrics"], manifest.get("guidance") or {})
        table += "".join(f"\n- {_cell(line)}" for line in _circumstances(report)) + "\n"
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error!r}. Remove it, or run `fit` again.") from error
    head = f"The run's own evaluation of the {facts['weights']} weights at student step"
    return f"{head} {facts['student_steps']}:\n\n{table}", list(report["metrics"])


def _validation(run: Path, facts: dict[str, Any]) -> tuple[str, list[str]]:
    file, step = run / "metrics.csv", str(facts["student_steps"])
    found: dict[str, str] = {}
    if file.is_file():
        with file.open(newline="", encoding="utf-8", errors="replace") as lines:
            for row in csv.DictReader(lines):
                if row.get("step") == step:
                    found |= {
                        name: text for name, text in row.items() if str(name).startswith("val/") and text
                    }
    if not found:
        return "The student was not measured at this step with these weights.\n", []
    names = [name.removeprefix("val/") for name in found]
    rows = "".join(
        f"| {_cell(n)} | {float(text):.6g} |\n" for n, text in zip(names, found.values(), strict=True)
    )
    head = f"The validation of the run at student step {step}, over its validation captions only"
    return f"{head}:\n\n| metric | this student |\n| --- | ---: |\n{rows}", names


def _table(metrics: dict[str, Any], teacher: dict[str, Any], guidance: dict[str, Any]) -> str:
    head = ["metric", "this student", *(_teacher_row(row, guidance.get(row)) for row in teacher), "images"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, result in metrics.items():
        beside = [_number(results[name]) if name in results else "–" for results in teacher.values()]
        lines.append([_cell(name.replace("_", " ")), _number(result), *beside, str(result["num_images"])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _teacher_row(row: str, guidance: float | None) -> str:
    steps = row.removeprefix("steps_")
    scale = "" if guidance is None else f", guidance {guidance:g}"
    return f"teacher, {steps} {'step' if steps == '1' else 'steps'}{scale}"


def _circumstances(report: dict[str, Any]) -> list[str]:
    """What each number was measured with: network, real pictures, processor."""
    lines = []
    for name, result in report["metrics"].items():
        told = result["details"]
        if "extractor" in told:
            real = told.get("reference", "none")
            beside = "" if real == "none" else f", against {real}"
            lines.append(f"{name.replace('_', ' ')}: by the features of {told['extractor']}{beside}")
        elif "device" in told:
            machine = report.get("environment", {})
            device = ", ".join(machine.get("gpus") or [machine.get("processor", told["device"])])
            batch = f"batch {told['batch_size']}"
            lines.append(f"{name.replace('_', ' ')}: {told['statistic']}, {batch}, {device}")
    return [*lines, "captions: the evaluation captions of the run's data, a picture each"]


def _number(result: dict[str, Any]) -> str:
    return f"{result['value']:.6g}"


def _configuration(run: Path) -> str:
    """config.yaml in a fence, without places on a machine."""
    file = run / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} can't be read as YAML: {error}. Restore it, or move it away.") from error
    text = yaml.safe_dump(_public(content), sort_keys=False, allow_unicode=True, width=100)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}\n"


def _public(value: Any, name: str = "") -> Any:
    """The value with all in it, but absolute paths without their folders and secrets without their text."""
    if isinstance(value, dict):
        return {key: _public(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner, name) for inner in value]
    return "(not shown)" if isinstance(value, str) and SECRET.search(name) else without_place(value)
