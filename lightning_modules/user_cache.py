"""Where results and stores that outlive a run are kept."""

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """``$ONE_STEP_CACHE``, or ``~/.cache/one-step-distillation``."""
    return Path(os.environ.get("ONE_STEP_CACHE") or Path.home() / ".cache" / "one-step-distillation")
