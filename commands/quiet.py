"""Silence for messages of Lightning that ask nothing of the user."""

from __future__ import annotations

import logging
import warnings

_QUIET_WARNINGS = (
    ".*does not have many workers.*",  # batches here are a few lines of text
    ".*LightningCLI's args parameter is intended to run.*",  # main(args) is part of the interface
    ".*in eval mode at the start of training.*",  # frozen parts are in eval mode on purpose
    ".*LeafSpec.*is deprecated.*",  # inside Lightning
    ".*IterableDataset.* has `__len__` defined.*",  # its workers do share the work
)


def quieten() -> None:
    """Silence warnings, advertisements and the list of accelerators that are not there; all else stays."""
    for pattern in _QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)  # the same one only once


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("litlogger" in message or "Tip:" in message or message.startswith("TPU available"))
