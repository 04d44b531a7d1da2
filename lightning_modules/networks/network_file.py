"""One-step networks that are published as one file, to be put into the place of a multi-step model's.

DMD2 (arXiv 2405.14867) does so: SDXL's UNet, which starts at timestep 399.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError, first_line
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.pipeline_folder import one_step_scheduler
from lightning_modules.networks.student import NETWORK_FILES, LoadedStudent
from lightning_modules.networks.weights import difference


def is_network_file(path: str | Path) -> bool:
    """Whether the name is that of a file with the weights of one network."""
    return Path(path).suffix in NETWORK_FILES


def load_network_file(path: Path, base: str, start_timestep: int) -> LoadedStudent:
    """The student whose network is in the file, with all other parts, and the schedule, of `base`.

    Args:
        path: weights by diffusers' names, .safetensors or .bin.
        base: folder or hub name of a model with the same network.
        start_timestep: where the student starts.

    Raises:
        UserError: a model can't be read, the weights are not of such a network, or the timestep is none.
    """
    parts = load_parts(base)
    weights = _read(path)
    if found := difference(weights, parts.denoiser.state_dict(), ("file", "base")):
        raise UserError(f"{path} does not hold the network of {base}: {found}. Give another --base.")
    parts.denoiser.load_state_dict(weights)
    parts.scheduler = one_step_scheduler(parts.scheduler, start_timestep)
    return LoadedStudent(parts, start_timestep, "as stored", {"teacher": base, "network": path.name})


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = (
            load_file(path) if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )  # fmt: skip
    except Exception as error:  # OSError, SafetensorError, pickle and zip errors
        raise UserError(f"{path} can't be read: {first_line(error)} Fetch it again.") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} does not hold the weights of a network by name.")
    return content
