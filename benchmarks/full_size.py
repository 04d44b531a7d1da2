"""Memory of distilling a full-size Stable Diffusion 2.1 on the CPU: 865 million weights at random, batch 1.

    python benchmarks/full_size.py --student lora --output lora.json     a LoRA student
    python benchmarks/full_size.py --student full --output full.json     all weights, without average
    python benchmarks/full_size.py --student full --eight-bit            the same with bitsandbytes' Adam8bit
    python benchmarks/full_size.py --student full --small                tries the code on any machine

Two updates by the project's module under a Lightning Trainer, with configs/experiment/sd21_swiftbrush.yaml
(LoRA teacher of rank 64, gradient checkpointing in all trained networks) and batch 1 at 512 px. The frozen
weights are in bfloat16 and the precision is bf16-mixed, as on a GPU; --precision 32-true has all in float32.
The text encoder and the autoencoder are tiny (see benchmarks/shapes.py): a training step decodes nothing, and
prompts can be encoded beforehand. Peaks are the largest resident set of the process (VmHWM, Linux) in each
phase, of which the first line is what the imports take.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import ROOT, model_folder
from callbacks.start_summary import memory_table
from common.environment import environment
from datamodules.prompts import PromptDataModule
from lightning_modules.distillation import OneStepDistillation

CONFIG = ROOT / "configs" / "experiment" / "sd21_swiftbrush.yaml"
LORA = {"rank": 256, "alpha": 512}  # SwiftBrush v2's LoRA student
STATUS = Path("/proc/self/status")


def resident_gib(name: str = "VmRSS") -> float:
    """Resident set of this process now (VmRSS) or at its largest (VmHWM), in GiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


class Phases:
    """Peak and duration of each phase of a run; `peak` is the largest of all."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._started = time.perf_counter()

    def end(self, name: str) -> None:
        """End a phase that began with the last one's end."""
        now = time.perf_counter()
        row = {"phase": name, "peak_gib": resident_gib("VmHWM"), "after_gib": resident_gib()}
        self.rows.append({**row, "seconds": now - self._started})
        print(
            f"{name:<42} peak {row['peak_gib']:6.2f} GiB, {row['after_gib']:6.2f} after, "
            f"{now - self._started:6.0f} s", flush=True,
        )  # fmt: skip
        forget_peak()
        self._started = now

    @property
    def peak(self) -> float:
        return max(row["peak_gib"] for row in self.rows)

    def watch(self, owner: Any, method: str, name: Callable[..., str]) -> None:
        """Make each call of a method of `owner` the end of a phase."""
        call = getattr(owner, method)

        @wraps(call)
        def watched(*arguments: Any) -> Any:
            result = call(*arguments)
            self.end(name(*arguments))
            return result

        setattr(owner, method, watched)


def build(folder: Path, student: str, eight_bit: bool) -> tuple[OneStepDistillation, PromptDataModule]:
    """Module and data of the configuration, as `fit` builds them."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    model = config["model"]["init_args"]
    model |= {"teacher": str(folder), "ema_decay": None}
    if student == "lora":
        model["student_lora"] = LORA
    if eight_bit:
        model["student"]["optimizer"]["class_path"] = "bitsandbytes.optim.Adam8bit"
    config["data"]["init_args"] |= {"batch_size": 1, "micro_batch_size": 1, "eval_size": 1}
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningModule, "model", fail_untyped=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    made = parser.instantiate_classes(parser.parse_object({k: config[k] for k in ("model", "data")}))
    return made.model, made.data


class Report(L.Callback):
    """Memory by part, once the networks are there."""

    parts: dict[str, Any] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, OneStepDistillation)
        self.parts = pl_module.memory_parts()
        print(memory_table(self.parts), flush=True)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Two updates; what they took."""
    phases, report = Phases(), Report()
    phases.end("imports")
    L.seed_everything(0, verbose=False)
    module, data = build(folder, options.student, options.eight_bit)
    module.frozen_weights = "float32" if options.precision == "32-true" else "bfloat16"
    phases.watch(module, "configure_model", lambda: "loading")
    phases.watch(module, "_student_turn", lambda part, step: f"update {step + 1}: student's turn")
    phases.watch(module, "_fake_score_turn", lambda *_: f"update {module.student_steps}: fake score's turn")
    phases.watch(module, "_update", lambda optimizer, settings, role: f"optimizer of the {role}")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=2, max_epochs=-1, precision=options.precision, logger=False,
        limit_val_batches=0, enable_checkpointing=False, enable_progress_bar=False, callbacks=[report],
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data)
    assert module.student_steps == module.fake_score_steps == 2, "an update was skipped"
    return {
        "student": options.student, "eight_bit": options.eight_bit, "small": options.small,
        "precision": options.precision, "peak_gib": phases.peak, "phases": phases.rows,
        "environment": environment(),
        "parts": {name: {"values": part[0], "bytes": part[1]} for name, part in (report.parts or {}).items()},
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", choices=["lora", "full"], default="lora")
    parser.add_argument("--eight-bit", action="store_true", help='needs pip install -e ".[8bit]"')
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument("--small", action="store_true", help="few channels and 128 px, to try the code")
    parser.add_argument("--folder", type=Path, help="where to make the model, or where it is (3.5 GB)")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "sd21"
        if not (folder / "model_index.json").is_file():
            print(f"making {folder}; run again with --folder to leave this out of the peak", flush=True)
            model_folder("sd21", folder, options.small)
        torch.manual_seed(0)
        found = measure(folder, options)
    print(f"Peak of all phases: {found['peak_gib']:.2f} GiB")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
