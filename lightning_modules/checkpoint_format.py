"""Which checkpoints this version of the project reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_modules.errors import UserError

FORMAT = 1
"""Raised when what a checkpoint holds changes so that other versions can't read it; none in it means 1."""
KEY = "checkpoint_format"


def check_format(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another version of the project.

    Raises:
        UserError: its format is not the one of this version.
    """
    found = checkpoint.get(KEY, 1)
    if found != FORMAT:
        age = "a later" if isinstance(found, int) and found > FORMAT else "another"
        raise UserError(
            f"{path} was written by {age} version of this project (checkpoint format {found}, this one reads "
            f"{FORMAT}); continue it with that version, or export its student there and start from the folder"
        )
