"""Pictures of what a model under pretraining has learnt so far."""

from typing import Any, cast

import lightning as L
from torchvision.utils import save_image

from callbacks.run_folder import run_dir


class Preview(L.Callback):
    """Save ``module.preview()`` as ``samples/step_<n>.png`` every N steps.

    Args:
        every_n_steps: optimizer steps between pictures.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0 and trainer.is_global_zero:
            folder = run_dir(trainer) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            save_image(cast(Any, module).preview(), folder / f"step_{trainer.global_step}.png", nrow=8)
