"""On what a run ran: versions, machine, memory, without names of people, hosts or folders."""

import os
import platform
import resource
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from common.files import ROOT

_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "torchmetrics")


def environment() -> dict[str, Any]:
    """Versions of Python and the packages that decide numbers, the processor or GPUs, and threads."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def command_line() -> str | None:
    """The command line of this process, as it may be typed again; None where it is none of this project."""
    name = Path(sys.argv[0]).stem
    if name not in ("cli", "one-step-distillation"):
        return None
    return shlex.join([*(["python", "cli.py"] if name == "cli" else [name]), *sys.argv[1:]])


def commit() -> str | None:
    """The checkout's commit, with a + if files differ from it; None outside of a repository."""
    found = [_git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")]
    return None if found[0] is None else found[0] + ("+" if found[1] else "")


def _git(*words: str) -> str | None:
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def peak_memory_gib() -> float:
    """Most memory so far: allocated on the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_bytes() / 2**30


def peak_resident_bytes() -> int:
    """Most memory of this process so far (on Linux getrusage would tell its parent's, if that was larger)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
