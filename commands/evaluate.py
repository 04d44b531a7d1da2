"""`evaluate`: one report for anything: a checkpoint, a folder, a stock pipeline, existing pictures.

    python cli.py evaluate --model PATH --output DIR
    torchrun --nproc_per_node 8 cli.py evaluate --model PATH --output DIR

Under torchrun every process measures its share; the numbers are those of one process.
"""

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from PIL import Image

from callbacks.loggers import MetricsCSV, RunTensorBoard
from callbacks.logging_media import Table, log_media
from callbacks.metrics.base import ImageMetric, bind_metrics, place_metrics, refuse_repeated
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.manifest import Subject, make_report, seeds_in_words, set_manifest
from callbacks.metrics.measure import Results, Stopwatch, measure_pictures
from callbacks.metrics.reference import ReferenceSource, describe_reference, framed_reference
from callbacks.metrics.unfinished import Unfinished
from commands.config_errors import explain
from commands.config_files import expand
from commands.kept_pictures import KeptPictures
from commands.quiet import quieten
from common.environment import peak_memory_gib
from common.errors import UserError
from common.files import ROOT, asset_path, check_output_folder, write_text_atomically
from common.processes import from_rank_zero, rank_and_world_size
from datamodules.evaluation_sets import EvaluationSet, EvaluationSource
from datamodules.picture_files import match_files
from datamodules.tables import read_json
from lightning_modules.drawing import Drawer, Recipe, given_pictures, model_drawer
from lightning_modules.networks.student import student_path
from reports.run_report import Report, render_text_table, result_table
from reports.sheets import save_png
from reports.write import write_report

DEFAULT_CONFIG = ROOT / "configs" / "eval" / "emoji.yaml"
CONFIG, GRID, IMAGES, UNFINISHED = "config.yaml", "samples.png", "images", "unfinished"
KIND = "evaluation"
"""Marks the manifests of this command."""
_FILES = {"manifest.json", "report.json", "report.md", "report.html", "metrics.csv"}
_FILES |= {CONFIG, GRID, IMAGES, UNFINISHED}


def parse(args: Sequence[str], **description: Any) -> Any:
    """Read options and configuration files, and build the set and the metrics that they name.

    Without ``--config`` the bundled evaluation's is used.

    Raises:
        UserError: any mistake in options or configuration.
    """
    # "omegaconf+" resolves ${...} after the command line has been read, so that options reach interpolations.
    parser = jsonargparse.ArgumentParser(parser_mode="omegaconf+", exit_on_error=False, **description)
    add_arguments(parser)
    given = list(args)
    if not any(word == "--config" or word.startswith("--config=") for word in given):
        given = ["--config", str(DEFAULT_CONFIG), *given]
    given = expand(given)
    try:
        settings = parser.parse_args(given)
    except argparse.ArgumentError as error:
        raise UserError(explain(error, parser, given)) from error
    options = parser.instantiate(settings)
    options.resolved = parser.dump(settings)
    return options


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the options of `evaluate`; every one may stand in a configuration file, too."""
    add = parser.add_argument
    add("--config", action="config", help="YAML file; several are merged (default: configs/eval/emoji.yaml)")
    add("--model", type=str | None, default=None, help="a .ckpt file, run or pipeline folder, or hub name")
    add("--images", type=str | None, default=None, help="a folder of existing pictures, instead of a model")
    add(
        "--captions", type=str | None, default=None, help="file (or folder) of captions, read as the set says"
    )
    add("--reference", type=str | None, default=None, help="folder of real pictures, or a file of statistics")
    add("--inception", type=str | None, default=None, help="Inception network's file or folder, for fid")
    add("--hps", type=str | None, default=None, help="HPSv2 weights (file), for hpsv2")
    add("--scoring_clip", type=str | None, default=None, help="CLIP folder of metrics that name no network")
    add("--output", type=str, required=True, help="folder to write")
    add("--steps", type=int, default=1, help="network steps (default: %(default)s)")
    add("--negative_prompt", "--negative-prompt", type=str | None, default=None, help="one for all captions")
    add("--negative_guidance", "--negative-guidance", default="none",
        type=Literal["none", "nasa", "nag", "cfg"],
        help="what the negative prompts (of the option, or of the set) act by")  # fmt: skip
    add("--negative_scale", "--negative-scale", type=float | None, default=None, help="its strength")
    add(
        "--guidance_scale",
        "--guidance-scale",
        type=float,
        default=1.0,
        help="1 is off (default: %(default)s)",
    )
    add(
        "--weights", type=Literal["ema", "online"] | None, default=None, help="of a checkpoint (default: ema)"
    )
    add("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="the model runs in")
    add("--device", type=str | None, default=None, help="default: cuda where there is a GPU, else cpu")
    add("--count", type=int | None, default=None, help="only the first N captions: a few-sample variant")
    add("--batch_size", "--batch-size", type=int, default=64, help="pictures per pass and process")
    add("--save_images", "--save-images", type=bool, default=False, help="true: keep all pictures in images/")
    add("--save_every", "--save-every", type=int, default=1000,
        help="pictures between two savings, to continue from; 0: none (default: %(default)s)")  # fmt: skip
    add("--min_reference", "--min-reference", type=int | None, default=None,
        help="least number of real pictures (default: the protocol's for a whole set, else 2)")  # fmt: skip
    add("--skip_corrupt", "--skip-corrupt", type=bool, default=False,
        help="true: leave out real pictures that can't be read, with a warning")  # fmt: skip
    parser.add_subclass_arguments(EvaluationSource, "data", required=False, help="the evaluation set")
    add("--metrics", type=list[ImageMetric], default=[], help="what to measure")
    add("--loggers", type=list[Logger], default=[], help="in addition to metrics.csv and TensorBoard")


def run(options: Any) -> None:
    """Measure and write the report.

    Raises:
        UserError: something is missing, damaged, of another kind, or can't be written.
    """
    quieten()
    _check(options)
    with process_group(options.device) as device:
        output = check_output_folder(Path(options.output), own_names)
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
        chosen = whole.first(options.count)
        reference = _bind(options, whole, device)
        drawer = _drawer(options, chosen, device)
        _evaluate(options, whole, chosen, drawer, reference, output, device)


def own_names(folder: Path) -> set[str]:
    """Names in a folder that a former or interrupted `evaluate` wrote; none if it holds anything else."""
    names = {path.name for path in folder.iterdir()}
    manifest = folder / "manifest.json"
    ours = UNFINISHED in names or (manifest.is_file() and read_json(manifest).get("kind") == KIND)
    return _FILES | {name for name in names if name.startswith("events.out.")} if ours else set()


@contextmanager
def process_group(device: str | None) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this process's device."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
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


def _check(options: Any) -> None:
    if (options.model is None) == (options.images is None):
        raise UserError("give either --model PATH or --images DIR (with --captions F)")
    if options.images is not None and options.captions is None:
        raise UserError("--images needs --captions F: a caption for each picture")
    if options.images is not None and options.save_images:
        raise UserError("--save-images has no effect on existing pictures; leave it out")
    if options.data is None or not options.metrics:
        raise UserError("the configuration names no evaluation set (data) or no metrics; see configs/eval/")
    for name, least in (("steps", 1), ("batch_size", 1), ("save_every", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}: it must be at least {least}")
    refuse_repeated(options.metrics)


def _bind(options: Any, whole: EvaluationSet, device: torch.device) -> ReferenceSource | None:
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


def _drawer(options: Any, chosen: EvaluationSet, device: torch.device) -> Drawer:
    if options.images is not None:
        return given_pictures(options.images, [Path(path) for path in chosen.files or []], chosen.frame)
    given = {f.name: options[f.name] for f in fields(Recipe)}
    recipe = Recipe(**given | {"model": student_path(options.model)})
    return model_drawer(recipe, chosen.captions, chosen.seeds, chosen.negatives, device)


def _evaluate(
    options: Any,
    whole: EvaluationSet,
    chosen: EvaluationSet,
    drawer: Drawer,
    reference: ReferenceSource | None,
    output: Path,
    device: torch.device,
) -> None:
    rank, world = rank_and_world_size()
    model = {"pictures": drawer.title, "weights": drawer.weights, **drawer.identity}
    key = set_manifest(chosen, model, options.metrics)
    unfinished = Unfinished(output / UNFINISHED, key, options.save_every)
    pictures = output / (IMAGES if options.save_images else f"{UNFINISHED}/{IMAGES}")
    kept = KeptPictures(pictures, options.save_images)
    if rank == 0:
        if not unfinished.exists() and (output / IMAGES).is_dir():
            shutil.rmtree(output / IMAGES)  # of a former evaluation, which this one replaces
        unfinished.begin()
    from_rank_zero(None)  # nobody draws before that is done
    watch, start = Stopwatch(), time.perf_counter()
    try:
        results = measure_pictures(
            drawer.draw, chosen.captions, options.metrics, options.batch_size, drawer.title, chosen.groups,
            chosen.negatives, chosen.frame, unfinished, kept, watch,
        )  # fmt: skip
    except UserError:
        _discard(unfinished, kept)
        raise
    seconds = time.perf_counter() - start
    if rank > 0:
        return
    output.mkdir(parents=True, exist_ok=True)
    save_png(kept.grid(chosen.captions), output / GRID)
    if options.save_images:
        kept.write_list(chosen.captions, chosen.seeds)
    seeds = seeds_in_words(chosen.seeds) if drawer.seeded else "given pictures"
    manifest = {"kind": KIND, **key} | {
        "reference": describe_reference(reference, whole.captions), "seeds": seeds,
        "batch_size": options.batch_size, "processes": world,
    }  # fmt: skip
    subject = Subject(
        chosen.name, drawer.step, drawer.weights, drawer.model, output / CONFIG,
        {"accelerator": device.type, "processes": world}, seeds, drawer.title,
    )  # fmt: skip
    _publish(options, subject, results, manifest, _timing(watch, seconds, len(chosen)), chosen, output)
    unfinished.discard()


def _timing(watch: Stopwatch, seconds: float, count: int) -> dict[str, Any]:
    """Where the time went on this process; ``seconds`` is the wall time of all of it."""
    return {
        "seconds": seconds,
        "images_per_second": count / seconds if seconds > 0 else None,
        **{f"{name}_seconds": value for name, value in asdict(watch).items() if name != "images"},
        "peak_memory_gib": peak_memory_gib(),
    }


def _publish(
    options: Any,
    subject: Subject,
    results: Results,
    manifest: dict[str, Any],
    timing: dict[str, Any],
    chosen: EvaluationSet,
    output: Path,
) -> None:
    """Write configuration and report, hand them to the loggers, print the table."""
    pictures = {"First pictures": output / GRID}
    report = make_report(subject, results, manifest, timing, pictures, evaluation_set=chosen)
    write_text_atomically(output / CONFIG, options.resolved)
    for logger in (MetricsCSV(output), RunTensorBoard(output), *options.loggers):
        _send(report, logger)
    path = write_report(report, output)
    print(f"\n{render_text_table(report)}\n\nReport: {path}", flush=True)


def _send(report: Report, logger: Logger) -> None:
    """Scalars ``test/NAME``, the table and the pictures, if the logger takes them."""
    values = {f"test/{name}": result["value"] for name, result in report.content["metrics"].items()}
    step = report.content["step"] or 0
    logger.log_metrics(values, step=step)
    log_media(logger, "results", Table(*result_table(report)), step)
    for title, path in report.pictures.items():
        log_media(logger, title, Image.open(path), step)
    logger.finalize("success")


def _discard(unfinished: Unfinished, kept: KeptPictures) -> None:
    """Remove the pictures of an evaluation that failed, unless there is something to continue from.

    Of several processes others may still be writing: there the next evaluation in this folder removes them.
    """
    if rank_and_world_size()[1] > 1 or unfinished.exists():
        return
    unfinished.discard()
    if kept.folder.is_dir():
        shutil.rmtree(kept.folder)
    output = unfinished.folder.parent
    if not any(output.iterdir()):
        output.rmdir()
