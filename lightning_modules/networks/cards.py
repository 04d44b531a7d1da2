"""What a student's model card says of the run that trained it: what was measured, and the configuration."""

import re
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from lightning_modules.networks.loading import read_json
from lightning_modules.networks.pipeline_folder import without_place

SECRET = re.compile(r"(api_key|password|secret|token)$")  # settings of loggers that nobody else should see


def run_sections(checkpoint: Path, facts: dict[str, Any]) -> str:
    """Markdown with the metrics of the student and the configuration; "" where no run's folder is around it.

    Args:
        checkpoint: `checkpoints/*.ckpt` of a run's folder, which has a config.yaml, or any other file.
        facts: `student_steps` and `weights` of the student. Only measurements of these are shown.

    Raises:
        UserError: the run's report.json or config.yaml is damaged.
    """
    file = checkpoint.expanduser().resolve()
    run = file.parent.parent
    if file.parent.name != "checkpoints" or not (run / "config.yaml").is_file():
        return ""
    return f"\n## Metrics\n\n{_metrics(run, facts)}\n## Configuration\n\n{_configuration(run)}"


def _metrics(run: Path, facts: dict[str, Any]) -> str:
    """Table of the report's numbers, the teacher's beside the student's."""
    file = run / "report.json"
    report = read_json(file) if file.is_file() else {}
    same = (report.get("step"), report.get("weights")) == (facts["student_steps"], facts["weights"])
    if not same or not report.get("metrics"):
        return "The student was not measured at this step with these weights.\n"
    try:
        table = _table(report["metrics"], report["teacher_metrics"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error!r}. Remove it, or run `fit` again.") from error
    return (
        f"The run's own evaluation of the {facts['weights']} weights at student step "
        f"{facts['student_steps']}:\n\n{table}"
    )


def _table(metrics: dict[str, Any], teacher: dict[str, Any]) -> str:
    head = ["metric", "this student", *(f"teacher, {row.replace('_', ' ')}" for row in teacher), "images"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, result in metrics.items():
        beside = [_number(results[name]) if name in results else "–" for results in teacher.values()]
        lines.append([name.replace("_", " "), _number(result), *beside, str(result["num_images"])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
    return f"```yaml\n{text}```\n"


def _public(value: Any, name: str = "") -> Any:
    """The value with all in it, but absolute paths without their folders and secrets without their text."""
    if isinstance(value, dict):
        return {key: _public(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner, name) for inner in value]
    return "(not shown)" if isinstance(value, str) and SECRET.search(name) else without_place(value)
