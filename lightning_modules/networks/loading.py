"""Reads the parts of a diffusers folder and says which one is wrong when one is.

Folder layout: diffusers' (model_index.json; unet/ or transformer/, vae/, text_encoder/ …, scheduler/).
"""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin
from torch import nn
from transformers.utils import logging as transformers_logging

from common.errors import UserError, first_line
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.networks.backbones import Backbone, TextToImageParts, backbone_of
from lightning_modules.networks.model_names import asset_path as asset_path
from lightning_modules.networks.model_names import model_folder

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
WEIGHT_SUFFIXES = {".safetensors", ".bin"}
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # no picture is drawn by them


def pipeline_folder(path: str | Path) -> Path:
    """Local folder of a diffusers pipeline, named as `model_names` says.

    Raises:
        UserError: the path does not exist, is not a folder, can't be downloaded, or lacks model_index.json.
    """
    folder = model_folder(path, _check_files)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a model folder. Give a diffusers pipeline folder.")
    _check_index(folder)
    return folder


def load_parts(
    path: str | Path, denoiser: nn.Module | None = None, without: Collection[str] = ()
) -> TextToImageParts:
    """Load the parts of a text-to-image folder, in float32 and evaluation mode, on the CPU.

    Args:
        path: a local folder (relative paths: working directory first, then the repository) or a hub name,
            each with a revision or variant, if any (see `model_names`).
        denoiser: use this network instead of the folder's (whose weights are then not read).
        without: which of "denoiser", "vae" and "text_encoders" to make without weights, on the meta device;
            they say how they are configured and take no memory.

    Raises:
        UserError: path, model_index.json or a part is missing, corrupt or of another kind; names which.
    """
    folder = pipeline_folder(path)
    index = read_json(folder / "model_index.json")
    backbone = backbone_of(index, folder)
    _check_complete(folder, index, backbone, denoiser is None)
    scheduler_class = getattr(diffusers, index["scheduler"][1], None)
    if scheduler_class is None:
        raise UserError(
            f"The scheduler {index['scheduler'][1]!r} named in {folder}/model_index.json is unknown."
        )
    load = {part: _empty if part in without else _network for part in ("denoiser", "vae", "text_encoders")}
    parts = TextToImageParts(
        backbone=backbone,
        denoiser=load["denoiser"](folder, *backbone.denoiser) if denoiser is None else denoiser,
        vae=load["vae"](folder, "vae", AutoencoderKL),
        text_encoders=[load["text_encoders"](folder, *named) for named in backbone.text_encoders.items()],
        tokenizers=[_tokenizer(folder, name, kind) for name, kind in backbone.tokenizers.items()],
        scheduler=_load(
            folder, "scheduler", lambda: scheduler_class.from_pretrained(folder, subfolder="scheduler")
        ),
        index=index,
        path=str(folder),
    )
    backbone.check_fit(parts)
    return parts


def noise_schedule(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The schedule (alphas and prediction type) of a diffusers scheduler, read from it, never assumed.

    Raises:
        UserError: it has no table of alphas (flow schedulers), or its prediction type is unknown.
    """
    name = type(scheduler).__name__
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise UserError(
            f"The scheduler {name} (scheduler/scheduler_config.json) has no table of alphas. "
            "This version distils variance-preserving models; "
            "give one with a DDIM, DDPM, PNDM, Euler … scheduler."
        )
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise UserError(
            f"Unknown prediction_type {kind!r} in scheduler/scheduler_config.json ({name}). "
            f"Set it to one of {', '.join(PREDICTION_TYPES)}, as the model was trained."
        )
    if scheduler.config.get("rescale_betas_zero_snr", False):
        table = table.clone()
        table[-1] = 0.0  # what the rescaling means; some schedulers put 2^-24 there, to divide by it
    if kind == "epsilon" and float(table[-1]) == 0:
        raise UserError(
            f"The scheduler {name} has alpha 0 at its last timestep (rescale_betas_zero_snr in scheduler/"
            "scheduler_config.json), where x0 = (x - sigma * eps) / alpha can't be read off a network that "
            "predicts epsilon. Set prediction_type or rescale_betas_zero_snr as the model was trained."
        )
    return NoiseSchedule(table, kind)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every file it reads or writes."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that must hold an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} can't be read as JSON: {error}. Export or download the folder again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold one JSON object, but holds {type(content).__name__}.")
    return content


def _check_index(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"model_index.json is missing in {folder}, so it is not a diffusers pipeline folder. "
            "Give the folder that holds model_index.json, vae/, text_encoder/, tokenizer/, scheduler/ …"
        )


def _check_files(folder: Path) -> None:
    """Raise unless all parts of a pipeline of any class are there, apart from checkers of pictures."""
    _check_index(folder)
    index = read_json(folder / "model_index.json")
    for name, entry in index.items():
        if name in OPTIONAL or not (isinstance(entry, list) and all(isinstance(word, str) for word in entry)):
            continue
        # other classes than ours have vocabularies of other kinds
        _check_part(folder, name, has_weights=(folder / name / "config.json").is_file(), has_words=False)


def _check_part(folder: Path, name: str, has_weights: bool, has_words: bool) -> None:
    part = folder / name
    if not part.is_dir() or not any(part.iterdir()):
        raise UserError(
            f"The part {name!r} is missing: {part} is absent or empty. Export or download it again."
        )
    if has_words and not any(all((part / file).is_file() for file in files) for files in VOCABULARIES):
        raise UserError(f"The part {name!r} is missing its vocabulary: no tokenizer.json in {part}.")
    weights = sorted(file for file in part.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if has_weights and not weights:
        raise UserError(f"The part {name!r} is missing its weights: no .safetensors file in {part}.")
    if has_weights and all(len(file.suffixes) > 1 for file in weights):
        variant = weights[0].name.split(".")[1].split("-")[0]
        raise UserError(
            f"The part {name!r} has weights of a variant only, {weights[0].name} in {part}. "
            f"Name the variant behind the model: NAME#{variant}"
        )
    if has_weights and (absent := _absent_shards(part)):
        raise UserError(
            f"The part {name!r} is missing {len(absent)} of its files of weights, {absent[0]} first, in "
            f"{part}. Export or download it again."
        )


def _absent_shards(part: Path) -> list[str]:
    """Files that a folder's index of weights names and that are not there, as after a broken download."""
    suffix = ".safetensors" if any(part.glob("*.safetensors")) else ".bin"  # what loaders prefer
    wanted: set[str] = set()
    for index in part.glob(f"*{suffix}.index.json"):
        whole = index.name.removesuffix(".index.json")
        if whole.count(".") == 1 and not (part / whole).is_file():  # else of a variant, or not needed
            shards = read_json(index).get("weight_map")
            wanted |= set(shards.values()) if isinstance(shards, dict) else set()
    return sorted(shard for shard in wanted if not (part / shard).is_file())


def _check_complete(folder: Path, index: dict[str, Any], backbone: Backbone, with_denoiser: bool) -> None:
    """Raise unless every part is named in model_index.json and its folder is there, with its weights."""
    networks = ["vae", *backbone.text_encoders, *([backbone.denoiser[0]] if with_denoiser else [])]
    for name in (*networks, *backbone.tokenizers, "scheduler"):
        entry = index.get(name)
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
            raise UserError(
                f"The part {name!r} is missing in {folder}/model_index.json; a pipeline needs it."
            )
        _check_part(folder, name, has_weights=name in networks, has_words=name in backbone.tokenizers)


def _tokenizer(folder: Path, name: str, kind: Any) -> Any:
    if not (folder / name / "tokenizer.json").is_file() and (folder / name / "spiece.model").is_file():
        _need_sentencepiece(folder / name)
    return _load(folder, name, lambda: kind.from_pretrained(folder / name))


def _need_sentencepiece(part: Path) -> None:
    """Without the library transformers would take the file for something else, with a riddle of a message."""
    if find_spec("sentencepiece") is None:
        raise UserError(
            f"{part} has its vocabulary in spiece.model, which takes the library sentencepiece to read. "
            'Install it: pip install -e ".[pixart]"'
        )


def _network(folder: Path, name: str, kind: Any) -> Any:
    """A network of the folder in float32, whatever its files hold, and in evaluation mode."""
    # transformers keeps the dtype of the files unless told otherwise, under another keyword than diffusers
    dtype = {"dtype" if name.startswith("text_encoder") else "torch_dtype": torch.float32}
    module, info = _load(
        folder,
        name,
        lambda: kind.from_pretrained(str(folder), subfolder=name, output_loading_info=True, **dtype),
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"The part {name!r} in {folder} lacks the weights {missing[:3]} ({len(missing)} missing). "
            "Export or download the folder again."
        )
    return module.eval()


def _empty(folder: Path, name: str, kind: Any) -> Any:
    """A network of the folder as it is configured, without weights."""

    def make() -> Any:
        with torch.device("meta"):
            if hasattr(kind, "load_config"):  # diffusers
                return kind.from_config(kind.load_config(str(folder), subfolder=name))
            return kind(kind.config_class.from_pretrained(str(folder), subfolder=name))

    return _load(folder, name, make).eval()


def _load(folder: Path, name: str, load: Callable[[], Any]) -> Any:
    """Run a loader without its progress bar; whatever it raises becomes a message that names the part."""
    try:
        with no_progress_bars():
            return load()
    except Exception as error:  # loaders raise OSError, ValueError, RuntimeError, SafetensorError, KeyError …
        raise UserError(
            f"The part {name!r} in {folder} can't be loaded: {first_line(error)} "
            "Export or download the folder again."
        ) from error
