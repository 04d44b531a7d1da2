"""Training steps a second and peak memory, against a plain loop that works as the public SwiftBrush script.

    python benchmarks/train_step.py                                    bundled models, batch 16: minutes
    python benchmarks/train_step.py --batch 1 4 16 64                  how the cost grows; also --rank
    python benchmarks/train_step.py --model outputs/sd21 --batch 1 2 4 8 16
                                                                       for a GPU; bf16 (benchmarks/models.py)

This project runs as `fit` does: its module under a Lightning Trainer, with the settings of
configs/experiment/emoji_swiftbrush_official.yaml. The plain loop (benchmarks/reference_loop.py) has the same
weights, prompts, random draws, batch and precision. Both take turns on the same machine, this project first
in one round and the plain loop in the next, each in a process of its own that rests meanwhile; a ratio is the
median of the rounds' ratios, with the order statistics that hold it with 95 % beside it. Losses of the first
20 steps are compared, relative to the curve's largest value. Peak memory is that of each alone in a process
of its own, above what the imports take (on a GPU: allocated there).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.benchmark import timer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import MIB, alone, interval, parser, table, times, write
from benchmarks.models import ROOT
from benchmarks.reference_loop import ReferenceLoop
from commands.config_files import content_of
from common.environment import peak_resident_bytes
from datamodules.sources import CAPTIONS
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.networks.loading import asset_path

CONFIG = ROOT / "configs" / "experiment" / "emoji_swiftbrush_official.yaml"
LOSSES = {"student": "train/student_vsd", "lora": "train/fake_score_denoising"}
SIDES = ("project", "reference")
COMPARED = 20  # steps whose losses are compared
MEMORY_STEPS = 3
Step = tuple[dict[str, Tensor], int, int, Tensor]  # encoded prompts, seed, number, places in the batch


def configuration(options: dict[str, Any]) -> dict[str, Any]:
    """Model and data of the configuration, changed by the options, as plain data."""
    config = content_of(CONFIG)
    model = config["model"]["init_args"]
    model |= {"teacher": options["folder"], **options["changes"]}
    model["fake_score"]["lora"]["rank"] = options["rank"]
    config["data"]["init_args"] |= {"prompts": str(CAPTIONS), "batch_size": options["batch"]}
    return {"model": config["model"], "data": config["data"]}


def train(options: dict[str, Any], callback: L.Callback, steps: int) -> None:
    """A run of `fit` without checkpoints, validation and progress bar; it logs as often as configured."""
    reader = ArgumentParser()
    reader.add_subclass_arguments(L.LightningModule, "model")
    reader.add_subclass_arguments(L.LightningDataModule, "data")
    made = reader.instantiate(reader.parse_object(configuration(options)))
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator="auto", devices=1, max_steps=steps, max_epochs=-1, precision=options["precision"],
            logger=L.pytorch.loggers.CSVLogger(folder), log_every_n_steps=5, limit_val_batches=0,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, callbacks=[callback], strategy=options.get("strategy", "auto"),
        ).fit(made.model, made.data)  # fmt: skip


class Rounds(L.Callback):
    """Has the plain loop make the updates of the project's run, a few at a time; keeps times and losses.

    The project's clock runs from the end of one hook to the beginning of the next, so that data, logging and
    the Trainer's own work count. The plain loop makes two rounds at once after every other of the project's:
    the first one again, then the next one before the project does.
    """

    def __init__(self, options: dict[str, Any], executor: Executor) -> None:
        self.options, self.executor = options, executor
        self.seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        self.losses: dict[str, dict[str, list[float]]] = {side: {n: [] for n in LOSSES} for side in SIDES}
        self.bar = tqdm(total=options["steps"], desc=f"batch {options['batch']}", unit="step")

    def on_train_start(self, trainer: L.Trainer, pl_module: OneStepDistillation) -> None:
        """Build the plain loop with the adapter's first weights."""
        trained = {n: p for n, p in pl_module.scores.base.named_parameters() if p.requires_grad}
        start = on_cpu({"null": pl_module.generator.prompt_encoder.null(), "adapter": trained})
        self.texts = {"null": start["null"]}
        self.executor.submit(open_plain_loop, self.options, start).result()
        self.upcoming = self._steps(pl_module, trainer.datamodule.train_dataloader())
        self.done, self.began = 0, timer()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: OneStepDistillation, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note one update of the project; at the end of a round, perhaps the plain loop's turns."""
        ended = timer()
        for name, key in LOSSES.items():
            self.losses["project"][name].append(float(trainer.callback_metrics[key]))
        self.done += 1
        self.bar.update()
        if self.done % self.options["per_round"]:
            return
        self.seconds["project"].append((ended - self.began) / self.options["per_round"])
        if len(self.seconds["project"]) % 2:
            for _ in range(1 if self.done == self.options["steps"] else 2):
                self._plain_turn()
        self.began = timer()

    def _plain_turn(self) -> None:
        steps = on_cpu(list(itertools.islice(self.upcoming, self.options["per_round"])))
        self.texts.setdefault("text", steps[0][0])
        seconds, losses = self.executor.submit(plain_turn, steps).result()
        self.seconds["reference"].append(seconds / len(steps))
        for name in LOSSES:
            self.losses["reference"][name] += [one[name] for one in losses]

    @staticmethod
    def _steps(module: OneStepDistillation, loader: Iterable[dict[str, Any]]) -> Iterator[Step]:
        """What the project's steps are given, read by a loader of its own."""
        for number, batch in enumerate(loader):
            text = module.generator.prompt_encoder.embed(batch["prompts"])
            yield text, module.seed, number, batch["indices"]


def open_plain_loop(options: dict[str, Any], start: dict[str, Any]) -> None:
    """Build the plain loop in this process, for `plain_turn`."""
    global plain_loop
    torch.set_num_threads(options["threads"])
    plain_loop = make_plain_loop(options, start["null"])
    plain_loop.copy_adapter(start["adapter"])


def make_plain_loop(options: dict[str, Any], null: dict[str, Tensor]) -> ReferenceLoop:
    """The plain loop with the settings of the configuration."""
    precision = torch.float32 if options["precision"] == "32-true" else torch.bfloat16
    return ReferenceLoop(configuration(options)["model"]["init_args"], null, device(), precision)


def plain_turn(steps: list[Step]) -> tuple[float, list[dict[str, float]]]:
    """Seconds and losses of some steps."""
    draws = [StepRandom(seed, number, places, device()) for _, seed, number, places in steps]
    began = timer()
    losses = [plain_loop.step(text, random) for (text, *_), random in zip(steps, draws, strict=True)]
    return timer() - began, losses


def measure_speed(options: dict[str, Any], executor: Executor | None = None) -> dict[str, Any]:
    """Times of both, the first round left out, their losses, and encoded prompts."""
    torch.set_num_threads(options["threads"])
    with executor or ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        rounds = Rounds(options, apart)
        train(options, rounds, options["steps"])
    return {
        "seconds": {side: seconds[1:] for side, seconds in rounds.seconds.items()}, "losses": rounds.losses,
        "texts": rounds.texts,
    }  # fmt: skip


def measure_memory(options: dict[str, Any], side: str, texts: dict[str, dict[str, Tensor]]) -> float:
    """Most memory of one of the two in a few steps, in MiB, above that of the imports."""
    torch.set_num_threads(options["threads"])
    before = psutil.Process().memory_info().rss
    if side == "project":
        train(options, L.Callback(), MEMORY_STEPS)
    else:
        loop, places = make_plain_loop(options, texts["null"]), torch.arange(options["batch"])
        for step in range(MEMORY_STEPS):
            loop.step(texts["text"], StepRandom(0, step, places, device()))
    on_gpu = torch.cuda.is_available()
    return (torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes() - before) / MIB


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Everything about one setting."""
    found = alone(measure_speed, options)
    memory = {side: alone(measure_memory, options, side, found["texts"]) for side in SIDES}
    setting = {name: options[name] for name in ("batch", "rank")}
    return {**setting, "memory_mib": memory, **summary(found)}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios, differences of losses."""
    seconds = found["seconds"]
    return {
        "seconds": {side: interval(values) for side, values in seconds.items()},
        "speed_ratio": interval([b / a for a, b in zip(*(seconds[side] for side in SIDES), strict=True)]),
        "loss_differences": {name: difference(found["losses"], name) for name in LOSSES},
        "losses": found["losses"],
    }


def difference(losses: dict[str, dict[str, list[float]]], name: str) -> float:
    """Largest difference of the two curves in the first 20 steps, relative to the curve's largest value."""
    ours, plain = (losses[side][name][:COMPARED] for side in SIDES)
    return max(abs(a - b) for a, b in zip(ours, plain, strict=True)) / max(plain)


def markdown(results: list[dict[str, Any]]) -> str:
    """A row for each setting."""
    head = [
        "batch", "LoRA rank", "steps/s", "plain loop", "ratio (95 %)",
        "memory of the step, MiB", "plain loop", "largest loss difference",
    ]  # fmt: skip
    rows = [
        [
            f"{one['batch']}", f"{one['rank']}",
            *(f"{1 / one['seconds'][side][1]:.3f}" for side in SIDES), times(one["speed_ratio"]),
            *(f"{one['memory_mib'][side]:.0f}" for side in SIDES),
            f"{max(one['loss_differences'].values()):.0e}",
        ]
        for one in results
    ]  # fmt: skip
    return table(head, rows)


def on_cpu(content: Any) -> Any:
    """The same with its tensors on the CPU, to be sent to another process."""
    return tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, content)


def device() -> torch.device:
    """Where both train."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arguments() -> argparse.Namespace:
    """The command line."""
    reader = parser(__doc__)
    add = reader.add_argument
    add("--model", default="assets/emoji-sd", help="the teacher's folder (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[16], help="prompts per step (default: 16)")
    add("--rank", type=int, nargs="+", default=[64], help="of the LoRA teacher (default: 64)")
    add("--precision", choices=("32-true", "bf16-mixed"), help="default: bf16-mixed on a GPU")
    add("--rounds", type=int, default=10, help="(default: %(default)s)")
    add("--per-round", type=int, default=2, help="steps of each in a round (default: %(default)s)")
    add("--threads", type=int, default=1, help="of PyTorch on the CPU (default: %(default)s)")
    changes = "options of this project's module, e.g. compile=true prompt_cache=DIR"
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help=changes)
    return reader.parse_args()


def main() -> None:
    """Measure and print."""
    given = arguments()
    precision = given.precision or ("bf16-mixed" if torch.cuda.is_available() else "32-true")
    changes = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in given.set)}
    options = {
        "folder": str(asset_path(given.model)), "changes": changes, "precision": precision,
        "threads": given.threads, "per_round": given.per_round,
        "steps": given.per_round * (given.rounds + 1),  # the first round warms up
    }  # fmt: skip
    settings = itertools.product(given.batch, given.rank)
    results = [measure(options | {"batch": batch, "rank": rank}) for batch, rank in settings]
    rounds = f"{precision}, threads: {given.threads}, {given.rounds} rounds of {given.per_round} steps"
    write(markdown(results), results, given.output, rounds)


if __name__ == "__main__":
    main()
