"""Commands `fit`, `validate`, `test` and `predict`: LightningCLI plus run folders, resuming, clear errors."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException

from callbacks.checkpoint import RunCheckpoint, why_not_written
from callbacks.loggers import StepAxis, run_loggers
from callbacks.predictions import PredictionFiles
from callbacks.progress import StepProgressBar
from callbacks.resume import ConfigWins, explain_mismatch, print_differences
from callbacks.run_folder import RunFolder, find_checkpoint, new_version, read_checkpoint
from commands.config_errors import explain
from commands.config_files import (
    DATA,
    MODEL,
    expand,
    experiment_name,
    keep_references,
    with_callback_settings,
)
from commands.quiet import quieten
from common.errors import UserError, check_range, first_line
from common.files import claimed
from common.processes import say
from lightning_modules.networks.student import student_path
from lightning_modules.trainer_settings import is_slow_in_bf16

COMMANDS = ("fit", "validate", "test", "predict")
# One step is one student update, and validation counts steps: no epochs anywhere.
TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs",
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1000,
    "num_sanity_val_steps": 0,  # a metric of two batches means nothing
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # the module prints its own, by role
}


def import_components() -> None:
    """Import every module of the framework, so that YAML files may give class names without their module."""
    for name in ("lightning_modules", "datamodules", "callbacks"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, prefix=f"{name}."):
            importlib.import_module(module.name)


def spelled(args: list[str]) -> list[str]:
    """A command line in jsonargparse's spelling.

    Hyphens in an option's name are underscores, `--help-all` is its help, and `--model.help` and
    `--data.help` without a class mean the usual one.
    """
    words = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in args]
    words = ["--help" if word == "--help_all" else word for word in words]
    usual = {"--model.help": MODEL, "--data.help": DATA}
    return [
        text
        for word, after in zip(words, [*words[1:], "--"])
        for text in ([word, usual[word]] if word in usual and after.startswith("--") else [word])
    ]


def _refuse_epochs(trainer: Any) -> None:
    """The stream of prompts has no end, so that what is counted in epochs would never come."""
    counted = {"max_epochs": (None, -1), "min_epochs": (None, 0), "check_val_every_n_epoch": (None,),
               "reload_dataloaders_every_n_epochs": (None, 0)}  # fmt: skip
    for name, unused in counted.items():
        if (value := trainer.get(name)) not in unused:
            raise UserError(
                f"trainer.{name} is {value}, but the stream of prompts has no epochs: count in student "
                "updates, by trainer.max_steps and trainer.val_check_interval"
            )
    check_range("trainer.log_every_n_steps", trainer.log_every_n_steps, 0, 10**12)
    check_range("trainer.max_steps", trainer.max_steps, -1, 10**12)
    every = trainer.val_check_interval
    if isinstance(every, bool) or not isinstance(every, int | None) or every == 0:
        raise UserError(f"trainer.val_check_interval is {every!r}: give a number of steps, 1 or more")


def _of_the_machine(error: BaseException, folder: Path | None) -> str | None:
    """What to do about an error that is the machine's: no memory, a killed worker, a folder that has gone."""
    text = str(error)
    if "DataLoader worker (pid" in text:  # not what one raised, which says "in DataLoader worker process"
        return f"a process that prepares prompts has ended ({first_line(error)}): set data.num_workers to 0"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return (
            f"memory ran out ({first_line(error)}): lower data.micro_batch_size or eval_batch_size, or see "
            "docs/performance.md for what needs less"
        )
    name = getattr(error, "filename", None)
    if isinstance(error, OSError) and folder is not None and name and folder in Path(name).parents:
        return f"the run folder can't be used: {why_not_written(error)}"
    return None


class TrainerCLI(LightningCLI):
    """LightningCLI whose runs live in numbered folders and resume there.

    Any mistake in the command line, the configuration, the data or the checkpoint is a UserError.

    Args:
        args: Command line, first word the command.
    """

    def __init__(self, args: list[str]) -> None:
        quieten()
        import_components()
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        args = spelled(args)
        self.name = experiment_name(args)
        self.args = with_callback_settings(expand(args))
        self.checkpoint_path: Path | None = None
        self.run_folder: RunFolder | None = None
        self._claims = ExitStack()
        command = self.args[0]
        kinds = super().subcommands()
        # the parser of a command takes a quarter of a second to build
        self.subcommands = lambda: {command: kinds[command]}  # type: ignore[method-assign]
        # "omegaconf+" resolves ${...} after the command line has been read: overrides reach interpolations
        parser_kwargs = {"parser_mode": "omegaconf+", "exit_on_error": False}
        try:
            super().__init__(
                args=self.args, subclass_mode_model=True, subclass_mode_data=True,
                auto_configure_optimizers=False, save_config_callback=None, trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=0,
                parser_kwargs={**parser_kwargs, command: dict(parser_kwargs)},
            )  # fmt: skip
        except BaseException:
            self._discard_folder()
            raise
        finally:
            self._claims.close()
        if self.settings.trainer.fast_dev_run:
            self._discard_folder(even_if_used=True)  # a trial of the code is not a run

    def _discard_folder(self, even_if_used: bool = False) -> None:
        if self.run_folder is not None and (even_if_used or not self.run_folder.started):
            self.run_folder.discard()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--experiment`; say in the help what `--seed_everything` means here."""
        parser.add_argument(
            "--experiment", type=str | None, default=None,
            help="Name of the run's folder under the root (default: stem of the last --config file)",
        )  # fmt: skip
        seed = next(action for action in parser._actions if action.dest == "seed_everything")
        seed.help = f"{seed.help} Also the seed of model and data, unless they are given their own."

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a mistake becomes a UserError with the nearest known name."""
        try:
            super().parse_arguments(parser, args)
        except (argparse.ArgumentError, OmegaConfBaseException) as error:
            raise UserError(explain(error, parser, self.args)) from error
        if not isinstance(self.settings.seed_everything, bool):  # false: nothing is seeded
            check_range("--seed_everything", self.settings.seed_everything, 0, 2**32 - 1)

    @property
    def settings(self) -> Any:
        """The configuration of the command that runs."""
        return self.config[self.config.subcommand]

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint; its hyper_parameters do not override the command line, as in Lightning."""
        settings = self.settings
        settings.experiment = settings.experiment or self.name
        which, root = settings.get("ckpt_path"), settings.trainer.default_root_dir
        if not which:
            return
        self.checkpoint_path = find_checkpoint(which, Path(root), settings.experiment)
        if self.checkpoint_path is None:
            none = f"--ckpt_path last: no checkpoint of {settings.experiment!r} under {root} yet"
            if self.config.subcommand != "fit":
                raise UserError(f"{none}; train it first or name a checkpoint file")
            say(f"{none}; starting afresh")

    def before_instantiate_classes(self) -> None:
        """Hand on the seed, check that the training ends, choose the precision.

        bf16-mixed where the configuration names none, unless that is slow; say so where it is asked for.
        """
        self._share_seed()
        start = (self.settings.get("model") or {}).get("init_args") or {}
        if start.get("student_init"):
            start["student_init"] = student_path(start["student_init"])  # `best` will be another one later
        trainer = self.settings.trainer
        _refuse_epochs(trainer)
        limits = (trainer.max_steps, trainer.max_epochs)
        endless = all(limit is None or limit < 0 for limit in limits) and trainer.max_time is None
        if self.subcommand == "fit" and endless and not trainer.fast_dev_run:
            raise UserError("training would never end: give --trainer.max_steps N or set it in the config")
        is_slow = is_slow_in_bf16(str(trainer.accelerator))
        if trainer.precision is None and not trainer.plugins:  # a plugin may be the precision
            # the choice becomes part of the run's configuration
            trainer.precision = "32-true" if is_slow else "bf16-mixed"
        elif is_slow and "bf16" in str(trainer.precision):
            say(
                f"trainer.precision is {trainer.precision}, but this processor has no bf16 units: that takes "
                "about 40 times as long as float32; --trainer.precision=32-true (or none at all) is fast"
            )

    def _share_seed(self) -> None:
        """Make `--seed_everything N` the seed of model and data where they take one and none is given.

        Their noise and order are functions of those seeds alone; who gives another N means other numbers.
        """
        number = self.settings.seed_everything
        if isinstance(number, bool):  # false: nothing is seeded
            return
        for part in ("model", "data"):
            takes = (self.settings.get(part) or {}).get("init_args") or {}
            if takes.get("seed", number) is None:
                takes["seed"] = number

    def instantiate_classes(self) -> None:
        """Build data, model and Trainer; errors of the parser are explained, UserErrors pass through."""
        try:
            super().instantiate_classes()
        except (argparse.ArgumentError, ValueError) as error:
            # jsonargparse wraps what a constructor raises in an error about types
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__
            if cause is not None:
                raise UserError(str(cause)) from error
            if isinstance(error, ValueError) and "Given value" not in str(error):
                raise
            raise UserError(explain(error, self.parser, self.args)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Choose the run folder, then build the Trainer with the loggers and callbacks every run has.

        Raises:
            UserError: settings the Trainer refuses, such as devices that are not there.
        """
        checkpoint = read_checkpoint(self.checkpoint_path) if self.checkpoint_path else None
        folder, resume_step = self._claim_folder(checkpoint)
        given = self._get(self.config_init, "trainer", default={})
        if folder is not None:
            kwargs["default_root_dir"] = str(folder)
        place = folder or Path(given["default_root_dir"])
        kwargs["logger"] = self._loggers(given.get("logger"), place, resume_step)
        given["callbacks"] = self._callbacks(given)
        try:
            return super().instantiate_trainer(**kwargs)
        except UserError:
            raise
        # values out of range or of a wrong type, missing packages, clusters' variables: any kind of error
        except Exception as error:
            advice = ""
            if "SLURM" in str(error):
                advice = (
                    "; on SLURM: sbatch --ntasks-per-node, and srun before the command (docs/launching.md), "
                    "or SLURM_JOB_NAME=interactive for one process without srun"
                )
            raise UserError(f"the Trainer refuses its settings: {first_line(error)}{advice}") from error

    def _claim_folder(self, checkpoint: dict[str, Any] | None) -> tuple[Path | None, int | None]:
        """Return the folder (None off rank zero, where RunFolder learns it) and the step continued in it."""
        settings, is_fit = self.settings, self.subcommand == "fit"
        config = self._resolved_config()
        if checkpoint is not None and is_fit:
            print_differences(checkpoint, yaml.safe_load(config), self.checkpoint_path)
        own = self.checkpoint_path.parent.parent if self.checkpoint_path else Path()
        continues = own.name.startswith("version_") and (not is_fit or settings.ckpt_path == "last")
        folder: Path | None = None
        if getattr(rank_zero_only, "rank", 0) == 0:
            if not continues:
                folder = new_version(Path(settings.trainer.default_root_dir), settings.experiment)
            elif os.access(own, os.W_OK | os.X_OK):
                folder = own
            else:
                raise UserError(f"the run folder {own} cannot be written; change its permissions")
            if is_fit:
                self._claims.enter_context(claimed(folder))
        self.run_folder = RunFolder(folder, config if is_fit else None, is_new=not continues)
        return folder, int(checkpoint["global_step"]) if checkpoint and continues and is_fit else None

    def _resolved_config(self) -> str:
        """Return the configuration as YAML that starts the same run (so without `last`)."""
        settings = self.settings.clone()
        if settings.get("ckpt_path") == "last":
            settings.ckpt_path = None
        # what the parser has checked, it need not check again for each nested class
        text = self._parser(self.config.subcommand).dump(settings, skip_none=False, skip_validation=True)
        return keep_references(text, self.args)

    def _dump_config(self) -> None:
        """Lightning's, without checking everything again."""
        if not hasattr(self, "config_dump"):
            text = self._parser(self.config.subcommand).dump(
                self.settings, skip_none=False, skip_link_targets=False, skip_validation=True
            )
            self.config_dump = yaml.safe_load(text)

    def _loggers(self, configured: Any, folder: Path, resume_step: int | None) -> list[Logger] | bool:
        """metrics.csv and TensorBoard, then those of the configuration; `logger: false` means none at all."""
        if configured is False:
            return False
        extra = configured if isinstance(configured, list) else [configured]
        extra = [logger for logger in extra if logger is not None and logger is not True]
        return [*run_loggers(folder, resume_step, self.subcommand or "fit"), *extra]

    def _callbacks(self, trainer: Any) -> list[Callback]:
        """Add to the configured callbacks those every run has, unless configured or switched off."""
        configured = trainer.get("callbacks") or []
        callbacks = list(configured) if isinstance(configured, list) else [configured]
        if self.run_folder is not None:
            callbacks.insert(0, self.run_folder)
        callbacks += [StepAxis(), ConfigWins()]
        own = [pkgutil.resolve_name(path) for path in getattr(self.model, "default_callbacks", ())]
        common: list[tuple[type, type[Callback], bool]] = [
            (ProgressBar, StepProgressBar, trainer.get("enable_progress_bar") is not False),
            (Checkpoint, RunCheckpoint, trainer.get("enable_checkpointing") is not False),
            (PredictionFiles, PredictionFiles, self.subcommand == "predict"),
            *((kind, kind, True) for kind in own),  # the model says what its runs bring
        ]
        for kind, default, is_wanted in common:
            if is_wanted and not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(default())
        return callbacks

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Give the Trainer the path of the checkpoint in place of `last` or `best`."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = str(self.checkpoint_path) if self.checkpoint_path else None
        if subcommand == "predict" and kwargs.get("return_predictions") is None:
            kwargs["return_predictions"] = False  # they are saved; nobody takes what would fill the memory
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; a checkpoint that does not fit the model is explained in one message."""
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException as error:
            raise SystemExit(128 + signal.SIGTERM) from error  # Lightning's own would exit with status 0
        except SystemExit as error:  # SIGTERMException, above, is one too
            begun = self.run_folder is not None and self.run_folder.started
            if isinstance(error.__context__, KeyboardInterrupt) and not begun:
                say("interrupted before the first update; a new run's folder is removed")
                raise KeyboardInterrupt from error
            raise
        except (MemoryError, OSError, RuntimeError, KeyError, ValueError) as error:
            if message := _of_the_machine(error, self.run_folder.path if self.run_folder else None):
                raise UserError(f"{message}; then continue with --ckpt_path last") from error
            if self.checkpoint_path and (message := explain_mismatch(error, self.checkpoint_path)):
                raise UserError(message) from error
            if "conditioned on metric" in str(error):  # EarlyStopping's, of one that is not logged
                raise UserError(first_line(error)) from error
            raise
