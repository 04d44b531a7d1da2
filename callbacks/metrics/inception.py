"""Inception features as clean-fid defines them: the eyes of ``fid``, ``precision`` and ``recall``.

The network is the TorchScript file of StyleGAN2-ADA; resizing is clean-fid's own (Parmar et al. 2022), one
picture at a time, on 8-bit pictures.
"""

import hashlib
import logging
import platform
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from cleanfid.downloads_helper import check_download_inception, inception_url
from cleanfid.resize import build_resizer
from torch import Tensor

from callbacks.metrics.extractors import ExtractorSpec, FeatureExtractor, in_threads
from common.errors import UserError, first_line
from common.files import user_cache_dir
from common.hashing import hash_file, to_uint8
from common.processes import from_every_rank, rank_and_world_size
from lightning_modules.networks.model_names import asset_path

log = logging.getLogger(__name__)
FILE = "inception-2015-12-05.pt"
MODES = ("clean", "legacy_tensorflow")
CLEANFID_CACHE = Path("./" if platform.system() == "Windows" else "/tmp")


class InceptionExtractor(FeatureExtractor):
    """The frozen Inception network, on one device, in fp32.

    Args:
        path: its TorchScript file, or a folder that holds it; None: as ``find_inception`` does.
        mode: clean-fid's: "clean" (bicubic by PIL, in floating point) or "legacy_tensorflow" (inside the
            network).

    Raises:
        UserError: the file is no TorchScript network, or (when used) not this one.
    """

    width = 2048

    def __init__(self, path: Path | None = None, mode: str = "clean") -> None:
        path = find_inception(path)
        content = hashlib.sha256(f"{hash_file(path)} {mode}".encode()).hexdigest()
        name, words = f"Inception v3 ({path.stem}), mode {mode}", f"8-bit, clean-fid mode {mode}, 299x299"
        super().__init__(name, path, content, words)
        self.mode, self._resize = mode, build_resizer(mode)
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

    def _image_features(self, images: Tensor) -> Tensor:
        pixels = to_uint8(images)
        if self.mode == "legacy_tensorflow":
            values = pixels.float() / 255 * 255  # not always the same number: clean-fid's way through [0, 1]
            features = self.model(values.to(self.device), return_features=True)
        else:
            resized = in_threads(self._resize, list(pixels.permute(0, 2, 3, 1).cpu().numpy()))
            values = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(self.device)
            features = self.model.layers.forward((values - 128) / 128)
        features = features.flatten(1).float()
        if features.shape[1] != self.width:
            raise UserError(
                f"{str(self.path)!r} gives {features.shape[1]} features, FID's Inception gives {self.width}: "
                f"fetch {inception_url}"
            )
        return features


def inception_network(path: str | None, mode: str) -> ExtractorSpec:
    """What a metric's settings name.

    Raises:
        UserError: the mode is unknown.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} of clean-fid is unknown: choose one of {', '.join(MODES)}")
    return InceptionExtractor, None if path is None else asset_path(path), mode


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
    rank = rank_and_world_size()[0]
    # One process fetches it; those of another machine, which still lack it, do so afterwards.
    for is_my_turn in (rank == 0, rank > 0):
        missing = is_my_turn and not any(place.is_file() for place in places)
        for failure in filter(None, from_every_rank(_download(places) if missing else None)):
            raise UserError(failure)
    return next(place for place in places if place.is_file())


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
