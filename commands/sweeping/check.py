"""Tries a sweep's keys on the real parser before the first trial."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from commands.fit import TrainerCLI
from commands.sweeping.settings import SweepSettings
from common.errors import UserError


class ParseOnly(TrainerCLI):
    """Reads and checks a command line of `fit`; builds and runs nothing."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Take no beginning of a key for the key."""
        return super().init_parser(**kwargs, allow_abbrev=False)

    def _set_seed(self) -> None:
        """Seed nothing, and say nothing of it."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def check_keys(settings: SweepSettings) -> None:
    """Parse a `fit` for the ends of every range and each value of every list.

    Raises:
        UserError: a key is no config key (the nearest one is named), a value does not fit it, or the base
            config itself is wrong.
    """
    _parse(settings, {}, "the base config")
    dimensions: dict[str, Any] = dict(settings.space)
    samples = {key: getattr(one, "choices", None) or (one.low, one.high) for key, one in dimensions.items()}
    for i in range(max(map(len, samples.values()))):
        point = {key: values[min(i, len(values) - 1)] for key, values in samples.items()}
        _parse(settings, point, f"the point {point}")


def _parse(settings: SweepSettings, point: dict[str, Any], what: str) -> None:
    try:
        ParseOnly(["fit", *settings.options(point)])
    except UserError as error:
        raise UserError(f"{settings.path}: {what}: {error}") from error
