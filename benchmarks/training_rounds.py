"""Training steps of this project and of the plain loop in turns, and the memory of each alone."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.reference_loop import ReferenceLoop, Settings
from benchmarks.shapes import ROOT
from callbacks.throughput import matmul_rate
from commands import encode_prompts
from datamodules.prompts import PromptDataModule
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.networks.loading import load_parts

CONFIG = ROOT / "configs" / "experiment" / "emoji_swiftbrush_official.yaml"
LOSSES = {"student": "train/student_vsd", "lora": "train/fake_score_denoising"}
MIB = 2**20
Given = tuple[dict[str, Tensor], int, int, Tensor]  # encoded prompts, seed, step, places in the batch


def build(folder: Path, batch: int, **changes: Any) -> tuple[OneStepDistillation, PromptDataModule]:
    """Module and data of the configuration, as `fit` builds them; changes are `init_args` of the model."""
    config = configuration(folder, **changes)
    config["data"]["init_args"]["batch_size"] = batch
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningModule, "model")
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    made = parser.instantiate_classes(parser.parse_object(config))
    return made.model, made.data


def configuration(folder: Path, **changes: Any) -> dict[str, Any]:
    """Model and data of the configuration, with another teacher."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["model"]["init_args"] |= {"teacher": str(folder), **changes}
    return {"model": config["model"], "data": config["data"]}


def write_prompt_cache(folder: Path, cache: Path) -> str:
    """What `encode-prompts` makes of the configuration's prompts, in float32."""
    files = [str(ROOT / "assets" / name) for name in ("captions.txt", "eval_captions.txt")]
    options = encode_prompts.Options(model=str(folder), prompts=files, output=cache, dtype="float32")
    encode_prompts.run(options)
    return str(cache)


def train(
    module: OneStepDistillation, data: PromptDataModule, callback: L.Callback, steps: int, precision: str,
    processes: int = 1,
) -> None:  # fmt: skip
    """A run of `fit` without checkpoints, validation and progress bar; it logs as often as configured."""
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator="auto", devices=processes, max_steps=steps, max_epochs=-1, precision=precision,  # type: ignore[arg-type]
            logger=L.pytorch.loggers.CSVLogger(folder), log_every_n_steps=5, limit_val_batches=0,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, callbacks=[callback],
        ).fit(module, data)  # fmt: skip


def reference(
    folder: Path, null: dict[str, Tensor], changes: dict[str, Any], device: torch.device, precision: str
) -> ReferenceLoop:
    """The plain loop on the weights of a folder."""
    settings = Settings.of(configuration(folder, **changes)["model"]["init_args"])
    parts = load_parts(folder)
    student = load_parts(folder).denoiser
    kind = torch.float32 if precision == "32-true" else torch.bfloat16
    table = parts.scheduler.alphas_cumprod
    loop = ReferenceLoop(student, parts.denoiser, table, null, settings, device, kind)
    loop.autoencoder = parts.vae.to(device)
    return loop


class Rounds(L.Callback):
    """Has the plain loop repeat the updates of the project's run, a few at a time; keeps times and losses."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.loop: PlainLoop | PlainLoopApart | None = None
        self.todo: list[Given] = []
        self.elapsed = self.began = 0.0
        self.done = 0
        self.seconds: dict[str, list[float]] = {"project": [], "reference": []}
        self.losses: dict[str, dict[str, list[float]]] = {
            side: {name: [] for name in LOSSES} for side in self.seconds
        }
        self.rates: list[float] = []
        self.operations = {"project": 0}
        self.counter: FlopCounterMode | None = None
        self.bar = tqdm(total=options["steps"], desc=f"batch {options['batch']}", unit="step")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Build the plain loop with the adapter's first weights."""
        options, scores = self.options, pl_module.scores
        start = {
            "null": pl_module.generator.prompt_encoder.null(),
            "adapter": {n: p for n, p in scores.base.named_parameters() if p.requires_grad},
        }
        self.loop = (PlainLoopApart if options["apart"] else PlainLoop)(options, packed(start))
        if not options["compile"]:  # counting looks into every operation, and so would compile anew
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()
        self.began = self._now()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note one update of the project; after a few, the plain loop's turn on the same prompts and draws.

        The clock runs from here to here, so that data, logging and the Trainer's own work count.
        """
        self.elapsed += self._now() - self.began
        self._stop_counting()
        for name, key in LOSSES.items():
            self.losses["project"][name].append(float(trainer.callback_metrics[key]))
        text = pl_module.generator.prompt_encoder.embed(batch["prompts"])
        self.todo.append((text, pl_module.seed, self.done, batch["indices"]))
        self.done += 1
        if self.done == 1 or len(self.todo) == self.options["per_round"]:
            self._reference_turn(pl_module.device)
        self.bar.update()
        self.began = self._now()

    def _reference_turn(self, device: torch.device) -> None:
        assert self.loop is not None
        seconds, found, operations = self.loop.turn(packed(self.todo), count=self.done == 1)
        for values in found:
            for name, value in values.items():
                self.losses["reference"][name].append(value)
        self.operations |= operations
        if self.done > 1 + self.options["per_round"]:  # the first round warms up
            self.seconds["project"].append(self.elapsed / len(self.todo))
            self.seconds["reference"].append(seconds / len(self.todo))
            self.rates.append(self._matrix_rate(device))
        self.elapsed, self.todo = 0.0, []

    def _matrix_rate(self, device: torch.device) -> float:
        if self.options["clock"] == "wall":
            kind = torch.float32 if self.options["precision"] == "32-true" else torch.bfloat16
            return matmul_rate(device, kind)
        matrix, best = torch.ones(1024, 1024), float("inf")
        for _ in range(5):
            began = self._now()
            torch.mm(matrix, matrix)
            best = min(best, self._now() - began)
        return 2 * 1024**3 / best

    def _stop_counting(self) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.operations["project"], self.counter = self.counter.get_total_flops(), None

    def _now(self) -> float:
        return now(self.options["clock"])


def now(clock: str) -> float:
    """Seconds by the wall clock, or of processor time, when the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() if clock == "cpu" else time.perf_counter()


class PlainLoop:
    """The plain loop and its clock.

    Args:
        options: as `measure_speed` takes them.
        start: packed encoded empty prompt and first weights of the adapter.
    """

    def __init__(self, options: dict[str, Any], start: bytes) -> None:
        given, self.clock = unpacked(start), options["clock"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.loop = reference(
            options["folder"], given["null"], options["changes"], self.device, options["precision"]
        )
        self.loop.copy_adapter(given["adapter"])

    def turn(self, todo: bytes, count: bool) -> tuple[float, list[dict[str, float]], dict[str, int]]:
        """Seconds, losses and, if wanted, operations of some steps (packed texts, seeds, numbers, places)."""
        steps = [
            (text, StepRandom(seed, step, places, self.device)) for text, seed, step, places in unpacked(todo)
        ]
        self.loop.operations = {} if count else None
        began = now(self.clock)
        losses = [self.loop.step(*step) for step in steps]
        return now(self.clock) - began, losses, self.loop.operations or {}


class PlainLoopApart:
    """The same in a process of its own, which rests while it is not its turn."""

    def __init__(self, options: dict[str, Any], start: bytes) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        context.Process(target=_serve, args=(other, options, start), daemon=True).start()
        other.close()  # so that the end of the process is the end of the pipe
        self._pipe.recv()

    def turn(self, todo: bytes, count: bool) -> tuple[float, list[dict[str, float]], dict[str, int]]:
        """See `PlainLoop`."""
        self._pipe.send((todo, count))
        result: tuple[float, list[dict[str, float]], dict[str, int]] = self._pipe.recv()
        return result


def _serve(pipe: Connection, options: dict[str, Any], start: bytes) -> None:
    """Take turns until the other side is gone."""
    torch.set_num_threads(options["threads"])
    loop = PlainLoop(options, start)
    pipe.send("ready")
    while True:
        try:
            todo, count = pipe.recv()
        except EOFError:
            return
        pipe.send(loop.turn(todo, count))


def packed(content: Any) -> bytes:
    """Tensors and plain data as bytes, tensors on the CPU."""
    buffer = io.BytesIO()
    torch.save(tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, content), buffer)
    return buffer.getvalue()


def unpacked(content: bytes) -> Any:
    """What `packed` was given."""
    return torch.load(io.BytesIO(content), weights_only=True)


def measure_speed(options: dict[str, Any]) -> dict[str, Any]:
    """Times, losses and operations of both; leaves encoded prompts for the plain loop alone."""
    torch.set_num_threads(options["threads"])
    module, data = build(Path(options["folder"]), options["batch"], **options["changes"])
    rounds = Rounds(options)
    train(module, data, rounds, options["steps"], options["precision"])
    encoder = module.generator.prompt_encoder
    prompts = data.eval_captions[: options["batch"]]
    texts = {
        "null": encoder.null(),
        "text": encoder.embed([prompts[i % len(prompts)] for i in range(options["batch"])]),
    }
    torch.save(
        {name: {k: v.cpu() for k, v in text.items()} for name, text in texts.items()}, options["texts"]
    )
    return {
        "seconds": rounds.seconds, "losses": rounds.losses, "matrix_rates": rounds.rates,
        "operations": rounds.operations,
    }  # fmt: skip


class Clock(L.Callback):
    """Seconds of each step, from the end of one to the end of the next; none for the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.ended: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        """Read the clock."""
        now = time.perf_counter()
        if self.ended is not None:
            self.seconds.append(now - self.ended)
        self.ended = now


def measure_memory(options: dict[str, Any], side: str) -> dict[str, float]:
    """Most memory of one of the two in a few steps, in MiB: of the process, and above that of the imports."""
    torch.set_num_threads(options["threads"])
    before = psutil.Process().memory_info().rss
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if side == "project":
        module, data = build(Path(options["folder"]), options["batch"], **options["changes"])
        train(module, data, Clock(), options["memory_steps"], options["precision"])
    else:
        texts = torch.load(options["texts"], weights_only=True)
        loop = reference(options["folder"], texts["null"], options["changes"], device, options["precision"])
        for step in range(options["memory_steps"]):
            loop.step(texts["text"], StepRandom(0, step, torch.arange(options["batch"]), device))
    if device.type == "cuda":
        return {"step": torch.cuda.max_memory_allocated() / MIB}
    peak = peak_resident_bytes()
    return {"process": peak / MIB, "step": (peak - before) / MIB}


def peak_resident_bytes() -> int:
    """Most memory of this process so far (getrusage would give a parent's, if that was larger)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that has a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
