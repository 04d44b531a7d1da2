"""`evaluate`: one report for anything: a checkpoint, a folder, a stock pipeline, existing pictures.

    python cli.py evaluate --model PATH --output DIR
    torchrun --nproc_per_node 8 cli.py evaluate --model PATH --output DIR

Under torchrun every process measures its share; the numbers are those of one process.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.loggers import Logger
from PIL import Image

from callbacks.loggers import MetricsCSV, RunTensorBoard
from callbacks.logging_media import Table, log_media
from callbacks.metrics.base import ImageMetric, bind_metrics, place_metrics, refuse_repeated
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.manifest import make_report, seeds_in_words, set_manifest
from callbacks.metrics.measure import Results, Seconds, measure_pictures
from callbacks.metrics.reference import ReferenceSource, describe_reference, framed_reference
from callbacks.metrics.unfinished import Unfinished, how_to_go_on
from commands.judge_layouts import LAYOUTS, check_layout, write_layout
from commands.kept_pictures import KeptPictures
from commands.options import Count, Guidance, Scale
from commands.quiet import quieten
from common.environment import peak_memory_gib
from common.errors import UserError, first_line
from common.files import LOCK, ROOT, asset_path, check_output_folder, claimed, write_text_atomically
from common.processes import from_rank_zero, rank_and_world_size
from datamodules.evaluation_sets import EvaluationSet, EvaluationSource
from datamodules.picture_files import match_files
from datamodules.tables import read_json
from lightning_modules.drawing import Drawer, Recipe, given_pictures, model_drawer
from lightning_modules.networks.student import student_path
from reports.run_report import Report, render_text_table, result_table
from reports.sheets import save_png
from reports.write import write_report

CONFIG, GRID, IMAGES, UNFINISHED = "config.yaml", "samples.png", "images", "unfinished"
KIND = "evaluation"
"""Marks the manifests of this command."""
_NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_FILES = {"manifest.json", "report.json", "report.md", "report.html", "metrics.csv"}
_FILES |= {CONFIG, GRID, IMAGES, UNFINISHED, LOCK, *LAYOUTS}


@dataclass(kw_only=True)
class Options:
    """The options of `evaluate`; every one may stand in a configuration file, too.

    Args:
        model: a run folder, best or last (of the newest finished run), .ckpt, pipeline folder or hub name
        images: a folder of existing pictures, instead of a model
        captions: file (or folder) of captions, read as the set says
        reference: folder of real pictures, or a file of statistics
        inception: Inception network's file or folder, for fid
        hps: HPSv2 weights (file), for hpsv2
        judges: folder of the weights of other judges (judges/ in the user's cache folder)
        scoring_clip: CLIP folder of metrics that name no network
        output: folder to write
        steps: network steps (those the model was trained for; 1 of a multi-step model)
        negative_prompt: one for all captions
        negative_guidance: what the negative prompts (of the option, or of the set) act by
        negative_scale: its strength
        negative_steps: nasa and nag in the first so many steps only (in all)
        guidance_scale: 1 is off
        weights: of a checkpoint (ema if there is one)
        teacher: of a checkpoint, where its teacher lies now (where it was in training)
        dtype: the model runs in
        device: cuda where there is a GPU, else cpu
        count: only the first N captions: a few-sample variant
        batch_size: pictures per pass and process
        save_images: keep all pictures in images/
        layout: beside images/, a folder as a benchmark's own script reads it (with --save-images true)
        save_every: pictures between two savings, to continue from; 0 is none
        min_reference: least number of real pictures (the protocol's for a whole set, else 2)
        skip_corrupt: leave out real pictures that can't be read, with a warning
        data: the evaluation set
        metrics: what to measure
        loggers: in addition to metrics.csv and TensorBoard
    """

    default_config: ClassVar[Path] = ROOT / "configs" / "eval" / "emoji.yaml"

    model: str | None = None
    images: str | None = None
    captions: str | None = None
    reference: str | None = None
    inception: str | None = None
    hps: str | None = None
    judges: str | None = None
    scoring_clip: str | None = None
    output: Path
    steps: PositiveInt | None = None
    negative_prompt: str | None = None
    negative_guidance: Literal["none", "nasa", "nag", "cfg"] = "none"
    negative_scale: Scale | None = None
    negative_steps: PositiveInt | None = None
    guidance_scale: Guidance = 1.0
    weights: Literal["ema", "online"] | None = None
    teacher: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    count: Count | None = None
    batch_size: PositiveInt = 64
    save_images: bool = False
    layout: Literal["geneval", "geneval2", "dpg_bench"] | None = None
    save_every: NonNegativeInt = 1000
    min_reference: Count | None = None
    skip_corrupt: bool = False
    data: EvaluationSource | None = None
    metrics: list[ImageMetric] = field(default_factory=list)
    loggers: list[Logger] = field(default_factory=list)
    resolved: str = field(default="", init=False)

    def __post_init__(self) -> None:
        """Refuse options that don't go together."""
        if (self.model is None) == (self.images is None):
            raise UserError("give either --model PATH or --images DIR (with --captions F)")
        if self.images is not None and self.captions is None:
            raise UserError("--images needs --captions F: a caption for each picture")
        if self.images is not None and self.save_images:
            raise UserError("--save-images has no effect on existing pictures; leave it out")
        if self.layout is not None and not self.save_images:
            raise UserError("--layout needs --save-images true: it arranges the pictures that are kept")
        if not self.metrics and self.layout is None:
            raise UserError("the configuration names no metrics; see configs/eval/")
        refuse_repeated(self.metrics)


def run(options: Options) -> None:
    """Measure and write the report.

    Raises:
        UserError: something is missing, damaged, of another kind, or can't be written.
    """
    quieten()
    with process_group(options.device) as device:
        output = check_output_folder(options.output, own_names)
        whole = _read_set(options, output)
        chosen = whole.first(options.count)
        if options.layout is not None:
            check_layout(options.layout, chosen)
        reference = _bind(options, whole, device)
        drawer = _drawer(options, chosen, device)
        claim = claimed(output) if rank_and_world_size()[0] == 0 else nullcontext()
        with _full_disk_told(output), claim:
            _evaluate(options, whole, chosen, drawer, reference, output, device)


@contextmanager
def _full_disk_told(output: Path) -> Iterator[None]:
    """Say how to go on where a file can't be written; what else the system refuses (a connection) stays.

    Raises:
        UserError: the disk is full or read-only, or a file of the output is refused.
    """
    try:
        yield
    except OSError as error:
        of_output = Path(str(error.filename)).is_relative_to(output)
        if error.errno not in _NOT_WRITTEN and not of_output:
            raise
        raise UserError(
            f"the evaluation {output} can't be written: {error}; {how_to_go_on(output / UNFINISHED)}"
        ) from error


def own_names(folder: Path) -> set[str]:
    """Names in a folder that a former or interrupted `evaluate` wrote; none if it holds anything else."""
    names = {path.name for path in folder.iterdir()}
    manifest = folder / "manifest.json"
    ours = names == {LOCK} or UNFINISHED in names
    ours = ours or (manifest.is_file() and read_json(manifest).get("kind") == KIND)
    return _FILES | {name for name in names if name.startswith("events.out.")} if ours else set()


@contextmanager
def process_group(device: str | None) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this process's device."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # no such kind, no such number, or not in this PyTorch
        raise UserError(f"--device {name} can't be used: {first_line(error)}") from error
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        yield torch.device(name)
        return
    if name == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # objects and sums on the CPU go through gloo; a reference of 40,000 pictures may take a while to hash
    dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield torch.device(name)
    finally:
        dist.destroy_process_group()


def _read_set(options: Options, output: Path) -> EvaluationSet:
    """All captions, with the existing pictures or the negative prompt that the options give them."""
    if options.data is None:
        raise UserError("the configuration names no evaluation set (data); see configs/eval/")
    whole = options.data.load()
    if options.images is not None:
        if Path(options.images).expanduser().resolve().is_relative_to(output):
            raise UserError(
                f"the pictures in {options.images} lie in the output folder, where the report replaces "
                "former files: give another --output"
            )
        files = match_files(options.images, len(whole), options.data.file_names())
        whole = replace(whole, files=[str(path) for path in files])
    if options.negative_prompt is not None:
        whole = replace(whole, negatives=[options.negative_prompt] * len(whole))
    return whole


def _bind(options: Options, whole: EvaluationSet, device: torch.device) -> ReferenceSource | None:
    """Give every metric its network and its reference; returns the reference."""
    extractor = ClipExtractor(asset_path(options.scoring_clip)) if options.scoring_clip else None
    reference, least = None, options.min_reference
    if least is None and options.count is None:
        least = whole.published_references
    if options.reference is not None:
        reference = framed_reference(options.reference, whole.frame, least, options.skip_corrupt)
    bind_metrics(options.metrics, extractor, reference, device)
    place_metrics(options.metrics, device)
    return reference


def _drawer(options: Options, chosen: EvaluationSet, device: torch.device) -> Drawer:
    if options.model is None:
        assert options.images is not None and chosen.files is not None
        return given_pictures(options.images, [Path(path) for path in chosen.files], chosen.frame)
    given = {one.name: getattr(options, one.name) for one in fields(Recipe)}
    recipe = Recipe(**given | {"model": student_path(options.model)})
    return model_drawer(recipe, chosen.captions, chosen.seeds, chosen.negatives, device)


def _evaluate(
    options: Options,
    whole: EvaluationSet,
    chosen: EvaluationSet,
    drawer: Drawer,
    reference: ReferenceSource | None,
    output: Path,
    device: torch.device,
) -> None:
    rank, world = rank_and_world_size()
    key = set_manifest(
        chosen, {"pictures": drawer.title, "weights": drawer.weights, **drawer.identity}, options.metrics
    )
    # pictures that were not kept, or lie elsewhere, would be missing in what is written at the end;
    # a layout is not: it is made anew from all pictures
    started_with = {**key, "--save-images": options.save_images}
    unfinished = Unfinished(output / UNFINISHED, started_with, options.save_every)
    pictures = output / (IMAGES if options.save_images else f"{UNFINISHED}/{IMAGES}")
    kept = KeptPictures(pictures, options.save_images)
    if rank == 0:
        if not unfinished.exists():  # else of a former evaluation, which this one replaces
            shutil.rmtree(output / IMAGES, ignore_errors=True)
        # an evaluation that is killed before its first state is known by this folder
        unfinished.folder.mkdir(parents=True, exist_ok=True)
    from_rank_zero(None)  # nobody draws before that is done
    seconds, start = Seconds(), time.perf_counter()
    try:
        results = measure_pictures(
            drawer.draw, chosen, options.metrics, options.batch_size, drawer.title, unfinished, kept, seconds
        )
    except (UserError, OSError):
        _discard(unfinished, kept)
        raise
    total = time.perf_counter() - start
    if rank > 0:
        return
    save_png(kept.grid(chosen.captions), output / GRID)
    if options.save_images:
        kept.write_list(chosen.captions, chosen.seeds)
    if options.layout is not None:
        write_layout(options.layout, kept, chosen, output / options.layout)
    timing = {"seconds": total, "images_per_second": len(chosen) / total if total > 0 else None}
    timing |= {f"{name}_seconds": value for name, value in seconds.items()}
    manifest = {"kind": KIND, **key, "reference": describe_reference(reference, whole.captions)}
    manifest |= {"batch_size": options.batch_size, "processes": world}
    machine = {"accelerator": device.type, "processes": world}
    report = _report(drawer, chosen, results, manifest, timing, machine, output)
    _publish(options, report, output)
    unfinished.discard()


def _report(
    drawer: Drawer,
    chosen: EvaluationSet,
    results: Results,
    manifest: dict[str, Any],
    timing: dict[str, Any],
    machine: dict[str, Any],
    output: Path,
) -> Report:
    seeds = seeds_in_words(chosen.seeds) if drawer.seeded else "given pictures"
    subject = {
        "experiment": chosen.name,
        "step": drawer.step,
        "weights": drawer.weights,
        "model": drawer.model,
        "config_path": str(output / CONFIG),
    }
    return make_report(
        subject, results, manifest | {"seeds": seeds}, timing | {"peak_memory_gib": peak_memory_gib()},
        {"First pictures": output / GRID}, machine=machine, seeds=seeds, evaluation_set=chosen,
        row=drawer.title,
    )  # fmt: skip


def _publish(options: Options, report: Report, output: Path) -> None:
    """Write configuration and report, hand them to the loggers, print the table."""
    write_text_atomically(output / CONFIG, options.resolved)
    values = {f"test/{name}": result["value"] for name, result in report.content["metrics"].items()}
    step = report.content["step"] or 0
    for logger in (MetricsCSV(output), RunTensorBoard(output), *options.loggers):
        logger.log_metrics(values, step=step)
        log_media(logger, "results", Table(*result_table(report)), step)
        for title, path in report.pictures.items():
            log_media(logger, title, Image.open(path), step)
        logger.finalize("success")
    path = write_report(report, output)
    print(f"\n{render_text_table(report)}\n\nReport: {path}", flush=True)


def _discard(unfinished: Unfinished, kept: KeptPictures) -> None:
    """Remove the pictures of an evaluation that failed, unless there is something to continue from.

    Of several processes others may still be writing: there the next evaluation in this folder removes them.
    """
    if rank_and_world_size()[1] > 1 or unfinished.exists():
        return
    for folder in (unfinished.folder, kept.folder):
        shutil.rmtree(folder, ignore_errors=True)
    output = unfinished.folder.parent
    if not any(path.name != LOCK for path in output.iterdir()):
        shutil.rmtree(output)
