"""Saves the pictures that ``predict`` draws."""

import json
from itertools import chain
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.run_folder import run_dir
from common.files import write_text_atomically
from common.processes import from_every_rank
from reports.sheets import save_png, to_pil


class PredictionFiles(Callback):
    """``predictions/<index>.png`` in the run folder, one for each prompt, and ``predictions.json`` there.

    That is a list of ``{"index", "prompt", "file"}``. Padding is left out; pictures of an earlier call are
    replaced.

    For modules whose ``predict_step`` returns ``images`` [B, 3, H, W] in [0, 1], ``prompts``, ``indices`` and
    ``is_padding``; nothing is saved of others, and that is said.
    """

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the pictures of an earlier call, of which there may have been more."""
        self._entries = []
        if trainer.is_global_zero:
            for path in (run_dir(trainer) / "predictions").glob("*.png"):
                if path.stem.isdigit():
                    path.unlink()
        trainer.strategy.barrier("prediction-files")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Save this process's pictures of a batch."""
        if not isinstance(outputs, dict) or outputs.get("images") is None:
            if batch_idx == 0:
                name = type(pl_module).__name__
                rank_zero_warn(f"predict_step of {name} returns no images, so none are saved")
            return
        indices, is_padding = outputs["indices"].tolist(), outputs["is_padding"].tolist()
        for image, index, prompt, padding in zip(outputs["images"], indices, outputs["prompts"], is_padding):
            if not padding:
                name = f"{index}.png"
                save_png(to_pil(image), run_dir(trainer) / "predictions" / name)
                self._entries.append({"index": index, "prompt": prompt, "file": name})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the list of all processes' pictures, in the order of the prompts, and say where it lies."""
        entries = sorted(chain(*from_every_rank(self._entries)), key=lambda entry: entry["index"])
        if entries and trainer.is_global_zero:
            folder = run_dir(trainer) / "predictions"
            text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
            write_text_atomically(folder / "predictions.json", text)
            rank_zero_info(f"{len(entries)} pictures: {folder}")
