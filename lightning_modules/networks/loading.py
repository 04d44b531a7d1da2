"""Reads the parts of a diffusers folder and says which one is wrong when one is.

Folder layout: diffusers' (model_index.json; unet/ or transformer/, vae/, text_encoder/ …, scheduler/).
"""

import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging as transformers_logging

from common.errors import UserError, first_line
from common.files import missing_advice
from common.hashing import hash_folder, hash_texts
from datamodules.tables import read_json as read_json
from lightning_modules.diffusion.schedule import NoiseSchedule, RectifiedFlow
from lightning_modules.networks.backbones import Backbone, TextToImageParts, backbone_of
from lightning_modules.networks.model_names import ModelName, may_be_hub_name, model_name
from lightning_modules.networks.model_names import asset_path as asset_path
from lightning_modules.networks.weight_files import WeightFiles

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
WEIGHT_SUFFIXES = {".safetensors", ".bin"}
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # no picture is drawn by them


def find_model(given: str | Path) -> ModelName:
    """A model as a folder of this machine; one of the hub comes from the local cache, or else is fetched.

    Raises:
        UserError: there is no such folder, hub model or variant (says how to get it), or it is no pipeline.
    """
    wanted = model_name(given)
    folder = asset_path(wanted.name)
    if not folder.exists():
        folder = _hub_folder(wanted)
    elif not folder.is_dir():
        raise UserError(f"{folder} is a file, not a model folder. Give a diffusers pipeline folder.")
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"model_index.json is missing in {folder}, so it is not a diffusers pipeline folder. "
            "Give the one that holds it, beside vae/, text_encoder/, tokenizer/, scheduler/ …"
        )
    if not isinstance(read_json(folder / "model_index.json"), dict):
        raise UserError(f"{folder / 'model_index.json'} names no parts. Export or download it again.")
    variant = wanted.variant
    if variant is not None and not any(_marked(part, variant) for part in folder.iterdir()):
        raise UserError(
            f"{folder} has no weights of the variant {variant!r}. Leave #{variant} behind {wanted.name} out."
        )
    return ModelName(str(folder), variant=variant)


def pipeline_folder(path: str | Path) -> Path:
    """The folder alone of what `find_model` finds."""
    return Path(find_model(path).name)


def model_hash(path: str | Path) -> str:
    """A hash of all that a model's pictures depend on: its folder's contents, and the variant, if any."""
    model = find_model(path)
    content = hash_folder(model.name)
    return content if model.variant is None else hash_texts([content, model.variant])


def _hub_folder(wanted: ModelName) -> Path:
    """A hub model's snapshot: the cached one if nothing is missing there, else what the hub gives."""
    if not may_be_hub_name(wanted.name):
        raise UserError(f"The model folder {wanted.name} does not exist. {missing_advice(wanted.name)}")
    cached = try_to_load_from_cache(wanted.name, "model_index.json", revision=wanted.revision)
    missing = "it is not in the local Hugging Face cache"
    if isinstance(cached, str):
        folder = Path(cached).parent
        try:
            model = find_model(str(ModelName(str(folder), variant=wanted.variant)))
            index = read_json(folder / "model_index.json")
            _check_files(model, [name for name in index if _is_part(index[name]) and name not in OPTIONAL])
            return folder
        except UserError as error:
            missing = f"the local Hugging Face cache has a part of it only: {error}"
    try:
        return Path(DiffusionPipeline.download(wanted.name, **wanted.options))
    except Exception as error:  # the hub client raises many kinds; the cause stays attached
        revision = f" --revision {wanted.revision}" if wanted.revision else ""
        raise UserError(
            f"The model folder {wanted.name} does not exist here, and as a Hugging Face hub name it can't be "
            f"fetched: {first_line(error)} {missing_advice(wanted.name)} Without a network: "
            f"{missing.rstrip('.')}. On a machine that has one: hf download {wanted.name}{revision}"
        ) from error


def load_parts(
    path: str | Path,
    denoiser: nn.Module | None = None,
    without: Collection[str] = (),
    in_shards: bool = False,
) -> TextToImageParts:
    """Load the parts of a text-to-image folder, in float32 and evaluation mode, on the CPU.

    Args:
        path: a local folder (relative paths: working directory first, then the repository) or a hub name,
            each with a revision or variant, if any (see `model_names`).
        denoiser: use this network instead of the folder's (whose weights are then not read).
        without: which of "denoiser", "vae" and "text_encoders" to make without weights, on the meta device;
            they say how they are configured and take no memory.
        in_shards: leave the denoiser's weights in their files for `fill_shards`, if these are .safetensors
            with its present names; the parameters are on the meta device then, and `weights` says where from.

    Raises:
        UserError: path, model_index.json or a part is missing, corrupt or of another kind; names which.
    """
    model = find_model(path)
    folder = Path(model.name)
    index = read_json(folder / "model_index.json")
    backbone = backbone_of(index, folder)
    own = [backbone.denoiser[0]] if denoiser is None else []
    encoders, tokenizers = (backbone.present(index, x) for x in (backbone.text_encoders, backbone.tokenizers))
    _check_files(model, ["vae", *encoders, *own, *tokenizers, "scheduler"])
    load = {part: _empty if part in without else _network for part in ("denoiser", "vae", "text_encoders")}
    unread = _unread(model, *backbone.denoiser) if in_shards and denoiser is None else None
    if unread is not None:
        denoiser = unread[0]
    parts = TextToImageParts(
        backbone=backbone,
        denoiser=load["denoiser"](model, *backbone.denoiser) if denoiser is None else denoiser,
        vae=load["vae"](model, "vae", backbone.vae),
        text_encoders=[load["text_encoders"](model, *named) for named in encoders.items()],
        tokenizers=[_tokenizer(folder, name, kind) for name, kind in tokenizers.items()],
        scheduler=load_scheduler(folder),
        index=index,
        path=str(model),
        weights=None if unread is None else unread[1],
    )
    backbone.check_fit(parts)
    backbone.prepare(parts)
    return parts


def load_scheduler(path: str | Path) -> SchedulerMixin:
    """The scheduler of a model.

    Raises:
        UserError: it is missing or corrupt.
    """
    folder = pipeline_folder(path)
    index = read_json(folder / "model_index.json")
    scheduler: SchedulerMixin = _load(
        folder,
        "scheduler",
        lambda: getattr(diffusers, index["scheduler"][1]).from_pretrained(folder, subfolder="scheduler"),
    )
    return scheduler


def flow_shift(scheduler: SchedulerMixin, tokens: int | None = None, family: Backbone | None = None) -> float:
    """The shift of a scheduler of rectified flow.

    Args:
        scheduler: any of diffusers'.
        tokens: of a latent; a shift that depends on the resolution follows them.
        family: whose pipeline says how.

    Raises:
        UserError: the shift depends on the resolution, but tokens or family are not known.
    """
    config = scheduler.config
    if "flow_shift" in config:  # SANA's DPM-Solver
        return float(config.flow_shift)
    if not config.get("use_dynamic_shifting", False):
        return float(config.shift)
    if tokens is None or family is None:
        raise UserError("The scheduler's shift depends on the resolution (use_dynamic_shifting); give it.")
    mu = family.flow_mu(config, tokens)
    return math.exp(mu) if config.time_shift_type == "exponential" else mu


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is one of rectified flow."""
    flow = scheduler.config.get("prediction_type") == "flow_prediction"
    return flow or type(scheduler).__name__.startswith("FlowMatch")


def noise_schedule(
    scheduler: SchedulerMixin, tokens: int | None = None, family: Backbone | None = None
) -> NoiseSchedule:
    """The schedule (alphas and prediction type) of a diffusers scheduler, read from it, never assumed.

    `tokens` of a latent and the `family` matter for a shift that depends on the resolution alone.
    """
    if is_flow(scheduler):
        config, shift = scheduler.config, flow_shift(scheduler, tokens, family)
        return RectifiedFlow(config.num_train_timesteps, shift, config.get("shift_terminal"))
    name = type(scheduler).__name__
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise UserError(
            f"The scheduler {name} (scheduler/scheduler_config.json) has no table of alphas and is none of "
            "rectified flow. Give a model with a DDIM, DDPM, PNDM, Euler, FlowMatchEuler … scheduler."
        )
    if not len(table) or not bool(torch.as_tensor(table).isfinite().all()):
        raise UserError(
            f"The schedule of {name} (scheduler/scheduler_config.json) has no steps, or some that are not "
            "numbers."
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


# --- what a folder lacks ----------------------------------------------------------------------------------


def weight_files(part: Path, variant: str | None) -> list[Path]:
    """The files of weights of a part that loaders take: the variant's if there are any, else those without
    such a mark; .safetensors if there are any, else .bin."""
    files = [path for path in sorted(part.glob("*")) if path.suffix in WEIGHT_SUFFIXES]
    chosen = _marked(part, variant) or [path for path in files if path.name.count(".") == 1]
    return [path for path in chosen if path.suffix == ".safetensors"] or chosen


def _marked(part: Path, variant: str | None) -> list[Path]:
    """Files of weights of a variant: `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`."""
    mark = re.compile(rf"[^.]+\.{re.escape(variant or '')}(-\d+-of-\d+)?\.(safetensors|bin)")
    return [path for path in sorted(part.glob("*.*.*")) if variant and mark.fullmatch(path.name)]


def scheduler_of(file: Path) -> DDIMScheduler:
    """A scheduler with the constants of a scheduler_config.json."""
    try:
        return DDIMScheduler.from_config(read_json(file))
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{file} is no scheduler_config.json: {first_line(error)}") from error


def read_weights(file: Path) -> dict[str, Any]:
    """The tensors of a .safetensors, .bin or .pt file by name, on the CPU; runs no code from the file."""
    if file.suffix == ".safetensors":
        return load_file(file)
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return content


def _is_part(entry: Any) -> bool:
    """Whether an entry of model_index.json names a library and a class."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def _check_files(model: ModelName, names: Collection[str]) -> None:
    """Raise unless these parts of a pipeline are there, of networks with all their weights."""
    index = read_json(Path(model.name) / "model_index.json")
    for name in names:
        part = Path(model.name) / name
        if not _is_part(index.get(name)) or not part.is_dir() or not any(part.iterdir()):
            raise UserError(
                f"The part {name!r} is missing in {model.name}: its folder, or its line in model_index.json. "
                "Export or download it again."
            )
        if (part / "config.json").is_file():
            _check_weights(part, model.variant)


def _check_weights(part: Path, variant: str | None) -> None:
    """Raise unless a network's weights are there; its loader would only warn about absent ones."""
    weights = weight_files(part, variant)
    others = [path.name for path in sorted(part.iterdir()) if path.suffix in WEIGHT_SUFFIXES]
    if not others:
        raise UserError(f"The part {part.name!r} is missing its weights: no .safetensors file in {part}.")
    if not weights:
        raise UserError(
            f"The part {part.name!r} has weights of a variant only, {others[0]} in {part}. "
            f"Name the variant behind the model: NAME#{others[0].split('.')[1].split('-')[0]}"
        )
    shards = [re.fullmatch(r"(.+-)(\d+)(-of-(\d+)\.\w+)", path.name) for path in weights]
    if shards[0] is None or None in shards:  # a file with all of them is there
        return
    start, number, end, count = shards[0].groups()
    wanted = [f"{start}{i:0{len(number)}}{end}" for i in range(1, int(count) + 1)]
    if absent := [name for name in wanted if not (part / name).is_file()]:
        raise UserError(
            f"The part {part.name!r} is missing {len(absent)} of its files of weights, {absent[0]} first, in "
            f"{part}. Export or download it again."
        )


# --- the parts --------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, name: str, kind: Any) -> Any:
    part = folder / name
    found = [file for file in VOCABULARIES if (part / file).is_file()]
    if not found:
        raise UserError(f"The part {name!r} is missing its vocabulary: no tokenizer.json in {part}.")
    # without the library transformers would take the file for something else, with a riddle of a message
    if found == ["spiece.model"] and find_spec("sentencepiece") is None:
        raise UserError(
            f"{part} has its vocabulary in spiece.model, which takes the library sentencepiece to read. "
            'Install it: pip install -e ".[pixart]"'
        )
    return _load(folder, name, lambda: kind.from_pretrained(part, trust_remote_code=False))


def _network(model: ModelName, name: str, kind: Any) -> Any:
    """A network of the folder in float32, whatever its files hold, and in evaluation mode."""
    # transformers keeps the dtype of the files unless told otherwise, under another keyword than diffusers
    options: dict[str, Any] = {"dtype" if name.startswith("text_encoder") else "torch_dtype": torch.float32}
    if _marked(Path(model.name) / name, model.variant):
        options["variant"] = model.variant
    module, info = _load(
        model.name,
        name,
        lambda: kind.from_pretrained(model.name, subfolder=name, output_loading_info=True, **options),
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"The part {name!r} in {model} lacks the weights {missing[:3]} ({len(missing)} missing). "
            "Export or download the folder again."
        )
    return module.eval()


def _empty(model: ModelName, name: str, kind: Any) -> Any:
    """A network of the folder as it is configured, without weights."""

    def make() -> Any:
        with torch.device("meta"):
            if hasattr(kind, "load_config"):  # diffusers
                return kind.from_config(kind.load_config(model.name, subfolder=name))
            return kind(kind.config_class.from_pretrained(model.name, subfolder=name))

    return _load(model.name, name, make).eval()


def _unread(model: ModelName, name: str, kind: Any) -> tuple[nn.Module, WeightFiles] | None:
    """A network of diffusers in evaluation mode with its buffers alone, and the files of its weights.

    None where they must be read by its own loader.
    """
    files = weight_files(Path(model.name) / name, model.variant)
    if any(file.suffix != ".safetensors" for file in files):
        return None

    def make() -> tuple[nn.Module, WeightFiles]:
        with init_empty_weights(include_buffers=False):  # parameters are dropped as they are made
            network = kind.from_config(kind.load_config(model.name, subfolder=name))
        return network.eval(), WeightFiles(files)

    network, weights = _load(model.name, name, make)
    if not weights.fit(network):
        return None
    for key, buffer in network.named_buffers():
        if key in weights:
            buffer.copy_(weights[key])
    return network, weights


def _load(folder: str | Path, name: str, load: Callable[[], Any]) -> Any:
    """Run a loader without its progress bar; whatever it raises becomes a message that names the part."""
    try:
        with no_progress_bars():
            return load()
    except Exception as error:  # loaders raise OSError, ValueError, RuntimeError, SafetensorError, KeyError …
        raise UserError(
            f"The part {name!r} in {folder} can't be loaded: {first_line(error)} "
            "Export or download the folder again."
        ) from error
