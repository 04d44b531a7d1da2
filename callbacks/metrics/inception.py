"""Inception features as clean-fid defines them: the eyes of ``fid``, ``precision`` and ``recall``.

The network is the TorchScript file of StyleGAN2-ADA; resizing is clean-fid's own (Parmar et al. 2022), one
picture at a time, on 8-bit pictures.
"""

import hashlib
import logging
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from cleanfid.downloads_helper import check_download_inception, inception_url
from cleanfid.resize import build_resizer
from torch import Tensor

from callbacks.metrics.extractors import FeatureExtractor, in_threads
from common.errors import UserError, first_line
from common.files import user_cache_dir
from common.hashing import hash_file, to_uint8
from common.processes import from_every_rank, from_rank_zero, rank_and_world_size
from lightning_modules.networks.model_names import asset_path

log = logging.getLogger(__name__)
FILE = "inception-2015-12-05.pt"
WIDTH = 2048
MODES = ("clean", "legacy_tensorflow")
CLEANFID_CACHE = Path("./" if platform.system() == "Windows" else "/tmp")


class InceptionPreprocessing:
    """clean-fid's resizing: bicubic by PIL in floating point (``clean``), or inside the network.

    Args:
        mode: "clean" or "legacy_tensorflow".
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._resize = build_resizer(mode)

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] to [B, 3, 299, 299] or [B, 3, H, W] in [0, 255]."""
        pixels = to_uint8(images)
        if self.mode == "legacy_tensorflow":
            return pixels.float() / 255 * 255  # not always the same number: clean-fid's way through [0, 1]
        resized = in_threads(self._resize, list(pixels.permute(0, 2, 3, 1).cpu().numpy()))
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)

    def describe(self) -> str:
        return f"8-bit, clean-fid mode {self.mode}, 299x299"


class InceptionExtractor(FeatureExtractor):
    """The frozen Inception network, on one device, in fp32.

    Args:
        path: its TorchScript file. ``mode``: clean-fid's, "clean" or "legacy_tensorflow".

    Raises:
        UserError: the file is no TorchScript network, or (when used) not this one.
    """

    width = WIDTH

    def __init__(self, path: Path, mode: str = "clean") -> None:
        super().__init__()
        self.path, self.mode = path, mode
        self.name = f"Inception v3 ({path.stem}), mode {mode}"
        try:
            with warnings.catch_warnings():
                # The network exists as TorchScript only, whatever torch thinks of the format.
                warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
                self.model = torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"{str(path)!r} can't be loaded as a TorchScript network: {first_line(error)} "
                f"Fetch {inception_url} again."
            ) from error
        self.preprocessing = InceptionPreprocessing(mode)
        self.content_hash = hashlib.sha256(f"{hash_file(path)} {mode}".encode()).hexdigest()

    def _image_features(self, images: Tensor) -> Tensor:
        pixels = self.preprocessing(images).to(self.device)
        if self.mode == "legacy_tensorflow":
            features = self.model(pixels, return_features=True)
        else:
            features = self.model.layers.forward((pixels - 128) / 128)
        features = features.flatten(1).float()
        if features.shape[1] != self.width:
            raise UserError(
                f"{str(self.path)!r} gives {features.shape[1]} features, FID's Inception gives {self.width}: "
                f"fetch {inception_url}"
            )
        return features


@dataclass(frozen=True)
class InceptionNetwork:
    """Inception as a specification.

    Attributes:
        path: its file, or a folder that holds it; None: clean-fid's cache, ours, or downloaded by clean-fid.
        mode: clean-fid's, "clean" or "legacy_tensorflow".

    Raises:
        UserError: the mode is unknown.
    """

    path: Path | None = None
    mode: str = "clean"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r} of clean-fid is unknown: choose one of {', '.join(MODES)}")

    def load(self) -> InceptionExtractor:
        """Find and load it, on the CPU; collective where it must be downloaded."""
        return InceptionExtractor(find_inception(self.path), self.mode)


def inception_network(path: str | None, mode: str) -> InceptionNetwork:
    """The specification from a metric's settings.

    Raises:
        UserError: the mode is unknown.
    """
    return InceptionNetwork(None if path is None else asset_path(path), mode)


def find_inception(path: Path | None = None) -> Path:
    """The network's file: the given one, else that in clean-fid's cache or ours, else downloaded. Collective.

    Raises:
        UserError: it is not at the given path, or can't be downloaded.
    """
    if path is not None:
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"no Inception network at {str(file)!r}: fetch {inception_url}")
        return file
    places = [CLEANFID_CACHE / FILE, user_cache_dir() / FILE]
    found = next((place for place in places if place.is_file()), None)
    if any(from_every_rank(found is None)):
        # One process fetches it; those of another machine, which still lack it, do so afterwards.
        rank, _ = rank_and_world_size()
        failure = from_rank_zero(_download(places) if rank == 0 and found is None else None)
        found = next((place for place in places if place.is_file()), None)
        if failure is None and found is None:
            failure = _download(places)
            found = places[-1]
        if failure is not None:
            raise UserError(failure)
    assert found is not None
    return found


def _download(places: list[Path]) -> str | None:
    """Fetch the network into the last of the places, whole or not at all; returns what went wrong."""
    target = places[-1]
    log.warning("downloading the Inception network to %s", target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent) as folder:
            Path(check_download_inception(folder)).replace(target)
    except OSError as error:
        looked = " and ".join(str(place) for place in places)
        return (
            f"no Inception network: it is not at {looked}, and can't be downloaded ({first_line(error)}). "
            f"Fetch {inception_url} on another machine and name the file as `inception`"
        )
    return None
