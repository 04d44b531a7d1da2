"""What a report says, whatever it is written as: its tables, findings and notes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reports.text import format_value, text_table

_LOWER = ("fid", "frechet_distance", "milliseconds_per_image", "clip_score_negative")
_HIGHER = (
    "clip_score", "hpsv2", "precision", "recall", "negative_removal_rate", "diversity_lpips", "vendi",
    "pick_score", "image_reward", "aesthetic", "geneval", "emoji_geneval",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a report says and shows.

    Attributes:
        content: report.json: ``experiment, step, weights, model, metrics, teacher_metrics, timing,
            environment, config_path, command, commit``, of a run ``finished`` and ``run`` (teacher, method,
            batch, hardware, alarms) and ``evaluation_set``, too.
        manifest: what a comparable measurement must share with this one.
        pictures: titles to PNG files, shown in this order, the first one large, the others folded.
        curves: a metrics.csv, or None.
        row: what was measured, for the table.
        published: (metric, model, value, source) of publications that measured the same way.
        sheets: of a run, sheets of samples by student updates, shown as a strip.
    """

    content: dict[str, Any]
    manifest: dict[str, Any]
    pictures: dict[str, Path] = field(default_factory=dict)
    curves: Path | None = None
    row: str = "Student, 1 step"
    published: tuple[tuple[str, str, float, str], ...] = ()
    sheets: dict[int, Path] = field(default_factory=dict)


def headline(report: Report) -> str:
    """Title of the report: what, and after how many student updates where that is known."""
    step = report.content["step"]
    return str(report.content["experiment"]) + ("" if step is None else f", step {step:,}")


def subtitle(report: Report) -> str:
    """What it is the report of, in one line: of a run method, teacher, batch and hardware."""
    content = report.content
    run = content.get("run") or {}
    parts = [f"{name} {run[name]}" for name in ("method", "teacher", "batch") if run.get(name)]
    parts += [f"on {run['hardware']}"] if run.get("hardware") else []
    measured = content.get("evaluation_set") or "run"  # "run": captions of its own
    parts += [] if measured == "run" else [f"measured on {measured}"]
    return " · ".join([*parts, f"{content['weights']} weights", str(content["model"])])


def told(report: Report) -> dict[str, str]:
    """How to make it again, and of a run what it was trained and measured on."""
    content = report.content
    data: dict[str, str] = (content.get("run") or {}).get("data", {})
    return data | {key: content[key] for key in ("command", "commit") if content.get(key)}


def row_title(row: str, report: Report) -> str:
    """``steps_25`` as ``Teacher, 25 steps, guidance 4.5``."""
    guidance = report.manifest.get("guidance") or {}
    told = f"guidance {guidance[row]:g}" if guidance.get(row) else "unguided"
    return f"Teacher, {steps_in_words(row)}" + (f", {told}" if row in guidance else "")


def student_row(steps: int) -> str:
    """Title of a student's row."""
    return f"Student, {steps_in_words(str(steps))}"


def steps_in_words(row: str) -> str:
    """``steps_25`` as ``25 steps``."""
    steps = row.removeprefix("steps_")
    return f"{steps} step{'' if steps == '1' else 's'}"


def result_rows(report: Report) -> list[tuple[str, dict[str, Any]]]:
    """The rows of the table: the teacher's, the longest first, the student's in fewer steps, and its own."""
    teacher = report.content["teacher_metrics"]
    ordered = sorted(teacher, key=lambda row: -int(row.removeprefix("steps_")))
    rows = [(row_title(row, report), teacher[row]) for row in ordered]
    fewer = report.content.get("student_metrics", {})
    rows += [(student_row(int(row.removeprefix("steps_"))), fewer[row]) for row in sorted(fewer)]
    return [*rows, (report.row, report.content["metrics"])]


def result_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of results; a missing value is an en dash.

    The picture counts stand beside the values: in a column of their own where all values of a row share one
    count.
    """
    rows = result_rows(report)
    names = list(dict.fromkeys(name for _, results in rows for name in results))
    names.sort(key=lambda name: name == "milliseconds_per_image")
    measured = report.content["metrics"]
    header = ["", *(_column(name, measured.get(name)) for name in names), "images measured"]
    cells = []
    for title, results in rows:
        values = [_with_spread(results[name]) if name in results else "–" for name in names]
        counts = {r["num_images"] for name, r in results.items() if name != "milliseconds_per_image"}
        cells.append([title, *values, ", ".join(f"{count:,}" for count in sorted(counts)) or "–"])
    return header, cells


def _with_spread(result: Mapping[str, Any]) -> str:
    """A value, and from where to where a time has spread."""
    ends = result["details"].get("spread")
    text = f" ({' to '.join(map(format_value, ends))})" if ends else ""
    return format_value(result["value"]) + text


def _column(name: str, result: Mapping[str, Any] | None) -> str:
    """Name of a metric, as FID-5k where that is told, and which way is better."""
    return with_arrow(name, name if result is None else result["details"].get("label", name))


def direction(metric: str) -> int:
    """-1 where lower values are better, 1 where higher ones are, 0 where nobody says."""
    kind = metric.removeprefix("val/").removeprefix("test/").partition("/")[0]  # hpsv2/anime as hpsv2
    return (kind in _HIGHER) - (kind in _LOWER)


def with_arrow(metric: str, label: str | None = None) -> str:
    """A metric's name or label, and which way is better."""
    return (label or metric) + ("", " ↑", " ↓")[direction(metric)]


def render_text_table(report: Report) -> str:
    """The table of results in plain text, for a terminal."""
    return text_table(*result_table(report))


def measured_table(report: Report) -> tuple[list[str], list[list[str]]] | None:
    """How each number was measured and how that differs from the publication; None if nobody has said."""
    header = ["", "value", "images", "network", "reference", "seeds", "differs from the published protocol"]
    cells = []
    for name, result in report.content["metrics"].items():
        details = result["details"]
        if name == "milliseconds_per_image":
            told = (
                details.get("statistic"),
                f"batch {details.get('batch_size', '–')}",
                details.get("device"),
            )
            device = ", ".join(filter(None, told))
            ends = " to ".join(map(format_value, details.get("spread", ()))) or "–"
            cells.append([
                name, format_value(result["value"]), f"{result['num_images']:,}", device, "–", "–",
                f"wall time with prompt encoding and decoding; fastest to slowest pass: {ends}",
            ])  # fmt: skip
        if "differs_from_published" not in details:
            continue
        differs = details["differs_from_published"]
        cells.append([
            str(details.get("label", name)), format_value(result["value"]), f"{result['num_images']:,}",
            *(str(details.get(key, "–")) for key in ("extractor", "reference", "seeds")),
            "no published protocol" if differs is None else "; ".join(differs) or "in nothing known",
        ])  # fmt: skip
    return (header, cells) if cells else None


def published_table(report: Report) -> tuple[list[str], list[list[str]]] | None:
    """Published values beside ours, where the protocol is the same but for small differences, or None."""
    if not report.published:
        return None
    metrics = report.content["metrics"]
    cells = [
        [
            _column(name, metrics[name]),
            format_value(metrics[name]["value"]),
            format_value(value),
            model,
            source,
        ]
        for name, model, value, source in report.published
    ]
    return ["", "here", "published", "model", "source"], cells


def notes(report: Report) -> list[str]:
    """What a reader must know to read the numbers: notes of the metrics, captions of another set."""
    found = metric_notes(results for _, results in result_rows(report))
    if any(
        "spread" in result["details"] for _, results in result_rows(report) for result in results.values()
    ):
        found.append(
            "Brackets behind a time hold the fastest and the slowest of its passes, those behind a ratio of "
            "times what follows from them. Other work on the machine changes times."
        )
    if Path(str(report.content["model"])).name == "last.ckpt":
        found.append(
            "The table is of the last update. best.ckpt is chosen by the curves under val/, which are of "
            "fewer captions: compare them with each other only."
        )
    reference = report.manifest.get("reference") or {}
    if reference.get("captions_are_those_of_the_evaluation") is False:
        found.append(
            "frechet_distance: the captions are not those of the reference pictures, so it is not comparable."
        )
    return list(dict.fromkeys(found))


def metric_notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The notes of the metrics of several rows."""
    return [
        f"{name}: {result['details']['note']}"
        for results in rows
        for name, result in results.items()
        if "note" in result["details"]
    ]


def findings(report: Report) -> list[str]:
    """The result in sentences that begin with "Better" or "Worse", as far as both were measured."""
    teacher, student = report.content["teacher_metrics"], report.content["metrics"]
    run = report.content.get("run") or {}
    several = next((row for row in teacher if row != "steps_1"), None)
    if several is None or "steps_1" not in teacher:
        return []
    many, single = teacher[several], teacher["steps_1"]
    said = []
    if "milliseconds_per_image" in many and "milliseconds_per_image" in student:
        slow, fast = many["milliseconds_per_image"]["value"], student["milliseconds_per_image"]["value"]
        speed = f"{slow / fast:.3g} times as fast as the teacher in {several.removeprefix('steps_')} steps"
        spreads = [row["milliseconds_per_image"]["details"].get("spread") for row in (many, student)]
        if None not in spreads:
            (slow_least, slow_most), (fast_least, fast_most) = spreads
            speed += f" ({slow_least / fast_most:.3g} to {slow_most / fast_least:.3g})"
        said.append(_verdict(slow > fast) + speed)
    for name, row in (("one step", single), (f"{several.removeprefix('steps_')} steps", many)):
        if "frechet_distance" in student and "frechet_distance" in row:
            own, other = student["frechet_distance"]["value"], row["frechet_distance"]["value"]
            ratio = own / max(other, 1e-12)
            text = f"Fréchet distance {own:.3g}, {ratio:.2f} times the teacher's in {name} ({other:.3g})"
            said.append(_verdict(ratio < 1) + text)
    if "clip_score" in student and "clip_score" in many and "clip_score" in single:
        gap = many["clip_score"]["value"] - single["clip_score"]["value"]
        if gap > 0:
            own, low = student["clip_score"]["value"], single["clip_score"]["value"]
            closed = (own - low) / gap
            ends = f"one step ({low:.3f}) and {several.removeprefix('steps_')} ({low + gap:.3f})"
            text = f"CLIP score {own:.3f} has closed {100 * closed:.0f} % of the gap between "
            text += f"the teacher's {ends}"
            text += "; a CLIP loss in training helps here" if "ClipLoss" in str(run.get("method")) else ""
            said.append(_verdict(closed > 0) + text)
    return said


def _verdict(is_better: bool) -> str:
    return "Better: " if is_better else "Worse: "
