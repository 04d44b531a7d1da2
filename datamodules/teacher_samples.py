"""The teacher's own samples as real pictures: a folder of latents that `draw-teacher` wrote.

Sample i belongs to caption i (from the start again where there are more samples than captions) and was drawn
from seed ``seed + i``, so that it is also the end of a trajectory whose noise is known. A folder holds
`samples.json`, what all samples share, and files of `SHARD` latents each with their captions.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.files import unfinished, write_text_atomically, written_whole

SHARD = 256
FACTS = "samples.json"


def shard_files(folder: Path, count: int) -> list[Path]:
    """The files that `count` samples take."""
    return [folder / f"samples-{number:05}.safetensors" for number in range(-(-count // SHARD))]


def own_names(folder: Path) -> set[str]:
    """Names of what `draw-teacher` writes."""
    return {FACTS, *(path.name for path in [*folder.glob("samples-*.safetensors"), *unfinished(folder)])}


def read_facts(folder: Path) -> dict[str, Any]:
    """What all samples share.

    Raises:
        UserError: the folder holds no samples.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no samples of a teacher (no readable {FACTS}): write them by python cli.py "
            "draw-teacher, or give data.real.captions for a folder of pictures"
        ) from error
    return facts


def keep_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write what all samples share, or compare it with what is there.

    Raises:
        UserError: the folder's samples were drawn otherwise.
    """
    if not (folder / FACTS).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / FACTS, json.dumps(facts, indent=1) + "\n")
    there = read_facts(folder)
    if other := [name for name, value in facts.items() if there.get(name) != value]:
        raise UserError(
            f"{folder} holds samples with another {other[0]} ({there.get(other[0])}, not {facts[other[0]]}): "
            "give another --output"
        )


def write_shard(path: Path, latents: Tensor, captions: list[str]) -> None:
    """Write latents [n, C, h, w] with their captions, at once."""
    with written_whole(path) as partial:
        save_file({"latents": latents.contiguous()}, partial, {"captions": json.dumps(captions)})


class TeacherSamples:
    """Samples drawn at random, read where they lie.

    Args:
        settings: `RealPictures`, whose folder `draw-teacher` wrote.
        codec: hash of the autoencoder whose latents are wanted.

    Raises:
        UserError: it holds no samples, not all of them, or those of another autoencoder.
    """

    def __init__(self, settings: Any, codec: str) -> None:
        self.settings, folder = settings, Path(settings.folder)
        facts = read_facts(folder)
        self.count, self.seed, self.teacher = facts["count"], facts["seed"], facts["teacher"]
        self.files = shard_files(folder, self.count)
        if missing := [path for path in self.files if not path.is_file()]:
            raise UserError(
                f"{folder} lacks {len(missing)} of its {len(self.files)} files of samples: give the same "
                "draw-teacher command again, which goes on where it ended"
            )
        if facts["codec"] != codec:
            raise UserError(
                f"the samples in {folder} are latents of another autoencoder than this teacher's: they are "
                f"of {self.teacher}. Draw them anew from this one, by python cli.py draw-teacher"
            )
        self._open = cache(self._read)

    @property
    def notice(self) -> str:
        """What a run prints at its start."""
        return (
            f"Beside prompts this training sees {self.count:,} samples of {self.teacher} "
            f"({self.settings.folder}, data.real), and no given pictures."
        )

    @property
    def trained_on(self) -> str:
        """What checkpoint and model card say."""
        return f"prompts and {self.count} samples of {Path(self.teacher).name}, so image-free"

    def take(self, uniform: Tensor) -> tuple[Tensor, list[str], list[int]]:
        """Latents [b, C, h, w] in float32, their captions and seeds, one for each number in [0, 1) [b]."""
        places = (uniform.double() * self.count).long().tolist()
        found = [(self._open(place // SHARD), place % SHARD) for place in places]
        latents = torch.stack([shard[0][row] for shard, row in found]).float()
        return latents, [shard[1][row] for shard, row in found], [self.seed + place for place in places]

    def _read(self, number: int) -> tuple[Any, list[str]]:
        path = self.files[number]
        try:
            shard = safe_open(path, "pt")
            return shard.get_slice("latents"), json.loads(shard.metadata()["captions"])
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path} is damaged ({error}): remove it and give draw-teacher's command again"
            ) from error
