"""Where a run leaves its files: `<root>/<experiment>/version_<n>/`, and how a run finds them again.

The command line chooses the folder before the Trainer exists (rank zero only); `RunFolder` tells the other
processes, saves the resolved configuration and removes a folder in which nothing has been trained.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from common.errors import UserError
from common.files import nearest_path, write_text_atomically
from lightning_modules.checkpoints import check_format, read

CONFIG_NAME = "config.yaml"
REPLACED = ".old.tmp"
"""Ending of a checkpoint's folder that is being replaced, in place of ``.ckpt``."""


def versions(experiment_folder: Path) -> list[Path]:
    """Return the `version_<n>` folders of an experiment, oldest first (an empty list if there are none)."""
    return [path for path in numbered(experiment_folder, r"version_(\d+)") if path.is_dir()]


def numbered(folder: Path, pattern: str) -> list[Path]:
    """What in a folder has a name of this pattern, in the order of the number in it."""
    found = folder.iterdir() if folder.is_dir() else ()
    numbers = {path: int(match[1]) for path in found if (match := re.fullmatch(pattern, path.name))}
    return sorted(numbers, key=numbers.__getitem__)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return `last.ckpt` of a run, else its `step_<n>.ckpt` with the largest n, else None.

    A run killed while a folder of shards was being replaced has left the old one under another name.
    """
    folder = run_folder / "checkpoints"
    found = [*numbered(folder, r"step_(\d+)\.ckpt"), folder / f"last{REPLACED}", folder / "last.ckpt"]
    return next((path for path in reversed(found) if path.exists()), None)


def find_checkpoint(which: str, root: Path, experiment: str) -> Path | None:
    """Return the checkpoint that `last`, `best` or a path names; None if there is no last one.

    Args:
        which: "last" (newest version of the experiment that holds a checkpoint), "best" (the `best.ckpt` of
            the newest version that has one) or the path of a file, of a sharded checkpoint's folder, or of a
            run's folder, which means its newest.
        root: The root of all runs, `trainer.default_root_dir`.
        experiment: Name of the experiment.

    Raises:
        UserError: the path does not exist or cannot be read, or there is no best checkpoint.
    """
    place = root / experiment
    try:
        if which == "last":
            return next(filter(None, map(newest_checkpoint, versions(place)[::-1])), None)
        if which == "best":
            paths = [folder / "checkpoints" / "best.ckpt" for folder in versions(place)[::-1]]
            missing = f"no best.ckpt in any version under {place}; train with a validation metric first"
        else:
            path = Path(which).expanduser()
            in_run = newest_checkpoint(path) if (path / "checkpoints").is_dir() else None
            paths, missing = (
                [in_run or path],
                f"checkpoint not found: {which}. {nearest_path(which)}".rstrip(". "),
            )
        if (found := next((path for path in paths if path.exists()), None)) is None:
            raise UserError(f"{missing}; --ckpt_path takes an existing file, a run folder, 'last' or 'best'")
        return found
    except OSError as error:
        raise UserError(
            f"cannot look into {error.filename or place}: {error.strerror or error}; change its permissions, "
            "or choose another --trainer.default_root_dir or checkpoint"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint (but for what is in shards) without running code from it.

    Raises:
        UserError: it cannot be read, is not one of a run, or is of another version of this project.
    """
    checkpoint = read(path, whole=False)
    kinds = {"global_step": int, "callbacks": dict, "loops": dict, "optimizer_states": list,
             "lr_schedulers": list, "state_dict": dict, "ema": dict | None}  # fmt: skip
    is_run = isinstance(checkpoint, dict) and "global_step" in checkpoint
    if is_run and checkpoint.get("loops") == {}:  # Lightning's counters have gone
        is_run = False
    if not is_run or any(n in checkpoint and not isinstance(checkpoint[n], k) for n, k in kinds.items()):
        raise UserError(f"{path} is not a checkpoint of a run; give --ckpt_path one that `fit` wrote")
    check_format(checkpoint, path)
    return checkpoint


def new_version(root: Path, experiment: str) -> Path:
    """Create the next free `version_<n>` folder of an experiment and return it; a UserError if that fails."""
    folder = root / experiment
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = versions(folder)
        number = int(taken[-1].name.removeprefix("version_")) + 1 if taken else 0
        while True:  # another run may take the same number at the same moment
            try:
                (folder / f"version_{number}").mkdir()
                return folder / f"version_{number}"
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(
            f"the output folder {folder} cannot be written: {error.strerror or error}; "
            "choose another --trainer.default_root_dir or --experiment"
        ) from error


class RunFolder(Callback):
    """Holds the folder of a run on every process and saves the resolved configuration in it.

    Args:
        path: The folder on rank zero; None on other processes, which learn it in `setup`.
        config: The resolved configuration as YAML, written to `config.yaml` once training begins, and kept in
            checkpoints so that a resumed run can say what has changed. None: nothing is written.
        is_new: Whether the folder was made for this run: it is removed again if no training starts.
    """

    def __init__(self, path: Path | None = None, config: str | None = None, is_new: bool = False) -> None:
        self.path, self.config, self.is_new = path, config, is_new
        self.started = False
        self._found = set(path.iterdir()) if path is not None and path.is_dir() else None  # rank zero

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell every process the folder."""
        self.path = Path(trainer.strategy.broadcast(str(self.path)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `config.yaml`: the checkpoint fits and training begins. From here on the folder stays."""
        if not self.started and trainer.is_global_zero and self.path is not None and self.config is not None:
            write_text_atomically(self.path / CONFIG_NAME, self.config)
        self.started = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a run that was finished before and only completes its report."""
        self.on_train_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the configuration the checkpoint was made with."""
        return {"config": self.config}

    def discard(self) -> None:
        """Remove what was made for the run: its folder, with that of the experiment and the root if empty.

        In the folder of an earlier session these are the files of loggers, such as TensorBoard's, which would
        hide what that session has logged after the checkpoint.
        """
        if self._found is None or self.path is None or not self.path.is_dir():
            return
        if not self.is_new:
            for path in set(self.path.glob("events.out.tfevents*")) - self._found:
                path.unlink()
            return
        shutil.rmtree(self.path)
        for folder in (self.path.parent, self.path.parent.parent):
            if folder.name and not any(folder.iterdir()):
                folder.rmdir()


def run_dir(trainer: Trainer) -> Path:
    """Return the folder of the run; the same on every process once `setup` hooks have run.

    A Trainer built in Python without `RunFolder` uses its logger's folder, else its `default_root_dir`.
    """
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, RunFolder) and callback.path is not None:
            return callback.path
    return Path(trainer.log_dir or trainer.default_root_dir)
