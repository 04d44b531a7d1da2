"""Reads a student of one step or a few from a training checkpoint, an exported folder, any model folder or
one file, and makes the one that a training starts from.

Files with one network are published to be put into the place of a multi-step model's: DMD2
(arXiv 2405.14867) does so with SDXL's UNet, which starts at timestep 399.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from common.errors import UserError, first_line
from common.files import nearest_path
from common.hashing import hash_tensors
from common.processes import say
from lightning_modules.checkpoints import check_format, is_sharded
from lightning_modules.checkpoints import read as read_content
from lightning_modules.diffusion.schedule import RectifiedFlow
from lightning_modules.diffusion.steps import Steps, steps_of
from lightning_modules.networks.backbones import BACKBONES
from lightning_modules.networks.loading import (
    TextToImageParts,
    asset_path,
    is_flow,
    load_parts,
    noise_schedule,
    pipeline_folder,
    read_json,
    read_weights,
    scheduler_of,
)
from lightning_modules.networks.lora import (
    LoraSettings,
    StudentAdapter,
    StudentBase,
    StudentLoraSettings,
    add_adapter,
    fold,
)
from lightning_modules.networks.model_names import lasting_name
from lightning_modules.networks.pipeline_folder import MARKER, is_own_export, student_scheduler
from lightning_modules.networks.step_counts import add_step_counts, folded
from lightning_modules.networks.weights import content_hash, difference, other_value, own_weights

Weights = Literal["ema", "online"]
PREFIX = "student."
CLASS = "_class_name"
NETWORK_FILES = (".safetensors", ".bin", ".pth", ".pt")  # what others publish beside whole pipelines
DENOISERS = {kind.__name__: kind for _, kind in (backbone.denoiser for backbone in BACKBONES)}


@dataclass
class LoadedStudent:
    """A student as a complete set of parts.

    Attributes:
        parts: `denoiser` is the student, `scheduler` the one it starts with, the rest the teacher's.
        steps: where it is called.
        weights: "ema" or "online" for a checkpoint, what the card says for an export, "as stored" otherwise.
        facts: what is known about its origin (teacher, student_steps …), plain data.
        adapter: of a LoRA student's checkpoint, what was folded into its network; None for all others.
    """

    parts: TextToImageParts
    steps: Steps
    weights: str
    facts: dict[str, Any]
    adapter: StudentAdapter | None = None

    @property
    def start_timestep(self) -> int:
        """Where it starts."""
        return self.steps.start


def is_network_file(path: str | Path) -> bool:
    """Whether the name is that of a file with the weights of one network."""
    return Path(path).suffix in NETWORK_FILES


def is_checkpoint(path: str | Path) -> bool:
    """Whether the path names a checkpoint file rather than a model folder."""
    return Path(path).suffix == ".ckpt" or asset_path(path).is_file()


def student_path(name: str, runs: str | Path = "runs") -> str:
    """What `load_student` reads: the one way in which all commands name a model.

    Of a run folder it is its best.ckpt (or else last.ckpt), of `best` and `last` that of the newest run under
    `runs` (see `resolve_checkpoint`), of a .ckpt, a pipeline's folder or a hub name the name itself.
    """
    folder = asset_path(name)
    if name in ("best", "last") and not folder.exists():
        return str(resolve_checkpoint(name, runs))
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return name
    for file in ("best.ckpt", "last.ckpt"):
        if (folder / "checkpoints" / file).exists():  # a folder where it is in shards
            return str(folder / "checkpoints" / file)
    if versions := sorted(folder.glob("version_*")):
        raise UserError(
            f"{name} holds the runs {', '.join(run.name for run in versions[:8])}. Give one of them, "
            f"e.g. {versions[-1]}."
        )
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"The run folder {name} holds no checkpoints/best.ckpt or last.ckpt yet. "
            "Give a run that has saved one."
        )
    return name


def load_student(
    path: str | Path, weights: Weights | None = None, teacher: str | None = None
) -> LoadedStudent:
    """Load a student in float32 on the CPU.

    Args:
        path: a .ckpt file of a training run, a folder written by `export`, or any model's folder or hub name
            (a teacher, say), which then starts from the last timestep of its own schedule.
        weights: which weights of a checkpoint; None takes the average (EMA) if there is one.
        teacher: where the teacher of a checkpoint lies now; None: where it was in training.

    Raises:
        UserError: the path is missing or not such a thing, or has no such weights.
    """
    if is_checkpoint(path):
        return _from_checkpoint(asset_path(path), weights, teacher)
    if weights is not None:
        raise UserError(
            f"{path} is a folder, which has one set of weights. Choose weights={weights!r} of a .ckpt only."
        )
    if teacher is not None:
        raise UserError(f"{path} is a folder with all its parts; leave --teacher out.")
    folder = pipeline_folder(path)
    parts = load_parts(path)
    facts = read_json(folder / MARKER) if is_own_export(folder) else {}
    flow = parts.scheduler.config.get("num_train_timesteps", 1)
    start = (len(parts.scheduler.betas) if hasattr(parts.scheduler, "betas") else flow) - 1
    steps = steps_of({**facts, "start_timestep": start})
    return LoadedStudent(parts, steps, str(facts.get("weights", "as stored")), facts)


def load_network_file(
    path: Path,
    base: str,
    steps: Steps,
    prediction_type: str | None = None,
    schedule: Path | None = None,
) -> LoadedStudent:
    """The student whose network is in the file, with all other parts, and the schedule, of `base`.

    The file has weights by diffusers' names, also in wrappings and under a prefix; `base` is a folder or hub
    name of a model with the same network.

    Args:
        steps: where the network is called.
        prediction_type: what the network predicts, where that is not what `base` does.
        schedule: a scheduler_config.json, where its schedule is not that of `base`.
    """
    parts = load_parts(base)
    if schedule is not None:
        parts.scheduler = scheduler_of(schedule)
    if prediction_type is not None:
        parts.scheduler.register_to_config(prediction_type=prediction_type)
    noise_schedule(parts.scheduler, parts.image_tokens, parts.backbone)
    try:
        expected = parts.denoiser.state_dict()
        weights = own_weights(read_weights(path), expected, path)
        found = difference(weights, expected, ("file", "base"))
    except UserError:
        raise
    except Exception as error:  # OSError, SafetensorError, pickle and zip errors; other things than tensors
        raise UserError(f"{path} can't be read: {first_line(error)} Fetch it again.") from error
    if found:
        raise UserError(f"{path} does not hold the network of {base}: {found}. Give another --base.")
    parts.denoiser.load_state_dict(weights)
    parts.scheduler = student_scheduler(parts.scheduler, steps)
    return LoadedStudent(parts, steps, "as stored", {"teacher": base, "network": path.name})


def resolve_checkpoint(name: str, runs: str | Path = "runs") -> Path:
    """A checkpoint file by its path, or the newest best.ckpt or last.ckpt of the distillations under `runs`.

    Finished runs go before others. Runs of other modules (pretraining) are passed over; a damaged file is
    not, so that no older one is taken in its place unnoticed. Says which it is.
    """
    if name not in ("best", "last"):
        path = asset_path(name)
        if not (path.is_file() or is_sharded(path)):
            what = "is neither a checkpoint nor an exported student." if path.exists() else "does not exist."
            hint = (
                "" if path.exists() else nearest_path(name)
            ) or "Give a .ckpt, a run folder, best or last."
            raise UserError(f"The checkpoint {name} {what} {hint}")
        return path
    # Two files can carry the same time on coarse clocks; the higher version is the later run then.
    files = sorted(
        Path(runs).glob(f"*/version_*/checkpoints/{name}.ckpt"),
        key=lambda file: (_is_finished(file), file.stat().st_mtime_ns, _version(file), str(file)),
        reverse=True,
    )
    newest = next((file for file in files if _is_distillation(read_content(file, whole=False))), None)
    if newest is None:
        raise UserError(
            f"There is no {name}.ckpt of a distillation under {runs}/*/version_*/checkpoints. "
            "Run `fit` first, or give a .ckpt file."
        )
    state = "finished" if _is_finished(newest) else "not finished"
    others = sorted({file.parents[2].name for file in files} - {newest.parents[2].name})
    say(f"{name}: {newest} ({state}{', beside runs of ' + ', '.join(others) if others else ''})")
    return newest


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a training checkpoint of this project, tensors on the CPU; runs no code from the file."""
    resolve_checkpoint(str(path))
    if is_network_file(path):
        raise UserError(
            f"{path} is a network alone. Make a model folder of it first: export --checkpoint {path} --base "
            "MODEL --start-timestep T, with the model whose other parts it needs and the T it was trained at."
        )
    content = read_content(path)
    if not _is_distillation(content):
        raise UserError(f"{path} is not a checkpoint of a one-step distillation. Give one that `fit` wrote.")
    check_format(content, path)
    return dict(content)


def architecture(denoiser: Any) -> dict[str, Any]:
    """Class and configuration of a network as plain data, to be stored in a checkpoint; no paths in it."""
    config = json.loads(denoiser.to_json_string())
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    kind = next(name for name, kind in DENOISERS.items() if isinstance(denoiser, kind))  # sharding renames it
    return {CLASS: kind, **plain}


def student_weights(
    content: dict[str, Any], path: Path, weights: Weights | None
) -> tuple[dict[str, Tensor], Weights]:
    """Student tensors of a checkpoint by name, and which they are."""
    ema = (content.get("ema") or {}).get("shadow")
    chosen: Weights = weights or ("ema" if ema else "online")
    state = {k.removeprefix(PREFIX): v for k, v in content["state_dict"].items() if k.startswith(PREFIX)}
    if chosen == "ema":
        if not ema:
            raise UserError(f"{path} holds no EMA weights (the run had none). Use --weights online.")
        state = {**state, **ema}  # buffers, if any, are not averaged
    if not state:
        raise UserError(f"{path} holds no student weights. Give a checkpoint that `fit` wrote.")
    return state, chosen


def _is_distillation(content: Any) -> bool:
    """Whether the content of a checkpoint is what a one-step distillation writes."""
    return isinstance(content, dict) and {"one_step", "state_dict"} <= content.keys()


def _from_checkpoint(path: Path, weights: Weights | None, teacher: str | None) -> LoadedStudent:
    """Build the student of a checkpoint and put it in its teacher's place."""
    content = read_checkpoint(path)
    try:
        return _assembled(content, path, weights, teacher)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} holds other entries than `fit` writes: {first_line(error)}; give another checkpoint"
        ) from error


def _assembled(
    content: dict[str, Any], path: Path, weights: Weights | None, teacher: str | None
) -> LoadedStudent:
    facts = dict(content["one_step"])
    if teacher is not None:
        base = facts.get("student_base", {})
        if base.get("path") == facts["teacher"]:
            facts["student_base"] = base | {"path": teacher}
        facts["teacher"] = teacher
    state, chosen = student_weights(content, path, weights)
    adapter = None
    if "student_lora" in facts:
        base, settings = StudentBase(**facts["student_base"]), LoraSettings(**facts["student_lora"])
        adapter = StudentAdapter(base, settings, state)
    student = _whole(facts, state, path) if adapter is None else _folded(adapter, path)
    try:
        parts = load_parts(facts["teacher"], denoiser=student.requires_grad_(False).eval())
    except UserError as error:
        raise UserError(
            f"The teacher of {path} can't be loaded: {error} If it lies elsewhere now, give --teacher FOLDER."
        ) from error
    steps = steps_of(facts)
    parts.scheduler = student_scheduler(parts.scheduler, steps)
    origin = {"teacher": facts["teacher"], "student_steps": facts.get("student_steps"), "weights": chosen}
    origin |= {name: facts[name] for name in ("method", "student_init", "trained_on") if name in facts}
    return LoadedStudent(parts, steps, chosen, origin, adapter)


def _whole(facts: dict[str, Any], state: dict[str, Tensor], path: Path) -> nn.Module:
    """The student of a checkpoint that holds all of its weights."""
    config = dict(facts["architecture"])
    student: nn.Module = DENOISERS[config.get(CLASS, "UNet2DConditionModel")].from_config(config)
    if counts := steps_of(facts).counts:
        add_step_counts(student, counts)
    if found := difference(state, student.state_dict()):
        raise UserError(
            f"The student in {path} is of another architecture than the checkpoint says: {found}. "
            "Give another checkpoint."
        )
    student.load_state_dict(state)
    return student


def _folded(adapter: StudentAdapter, path: Path) -> nn.Module:
    """The LoRA student of a checkpoint, its adapter folded into the base that the checkpoint names."""
    base = adapter.base
    try:
        student: nn.Module = load_student(base.path).parts.denoiser
    except UserError as error:
        raise UserError(f"The base of the LoRA student in {path} can't be loaded: {error}") from error
    base.check(content_hash(student), str(path))
    fold(student, adapter.settings, adapter.weights, str(path))
    return student


# --- where a training starts ------------------------------------------------------------------------------


def make_student(
    parts: TextToImageParts,
    teacher: str,
    start_timestep: int,
    init: str | None = None,
    lora: StudentLoraSettings | None = None,
) -> tuple[nn.Module, StudentBase | None]:
    """The network to train, in float32, and for a LoRA student the frozen weights under it.

    Args:
        parts: the teacher's, without adapters; not changed. `teacher`: the name they were read by.
        start_timestep: T of the run.
        init: one-step model to start from (a .ckpt, an export, a diffusers folder); None: the teacher.
        lora: train an adapter of this kind on frozen weights, which may be the teacher's own tensors; None:
            train all weights.

    Raises:
        UserError: ``init`` can't be read, or doesn't fit the teacher; names the first difference.
    """
    if init is not None and lora is not None and lora.share_base:
        raise UserError(
            "student_lora.share_base is true, but the student starts from student_init, which has weights of "
            "its own: set one of them to null."
        )
    if init is None:
        share = lora is not None and (
            is_flow(parts.scheduler) if lora.share_base is None else lora.share_base
        )
        # what is copied already is not copied again
        kept = [*parts.denoiser.parameters(), *parts.denoiser.buffers()] if share else []
        student: nn.Module = copy.deepcopy(parts.denoiser, {id(tensor): tensor for tensor in kept})
    else:
        loaded = load_student(init)
        loaded.parts.denoiser = folded(loaded.parts.denoiser, len(loaded.steps))
        # students of this project start at one timestep; any other model is taken to know its whole schedule
        if loaded.facts and loaded.start_timestep != start_timestep:
            found: str | None = f"it starts at timestep {loaded.start_timestep}, this run at {start_timestep}"
        else:
            found = mismatch(loaded.parts, parts, start_timestep, ("student", "teacher"))
        if found:
            raise UserError(
                f"student_init {init} does not fit the teacher {teacher}: {found}. Give a one-step model of "
                "the teacher's architecture, prediction type and schedule, and its start_timestep."
            )
        student = loaded.parts.denoiser
    student.requires_grad_(True).train()
    if lora is None:
        return student, None
    unread = parts.weights if init is None else None
    base = StudentBase(
        lasting_name(init or teacher), content_hash(student) if unread is None else hash_tensors(unread)
    )
    add_adapter(student, lora)
    return student, base


def mismatch(
    own: TextToImageParts, wanted: TextToImageParts, start_timestep: int, words: tuple[str, str]
) -> str | None:
    """The first thing that makes the weights of two networks those of different functions, in words.

    Both must know the start timestep; `words` are what the two are called.
    """
    if found := difference(own.denoiser.state_dict(), wanted.denoiser.state_dict(), words):
        return found
    if odd := other_value(_settings(own.denoiser), _settings(wanted.denoiser), words):
        return odd
    sides = [noise_schedule(parts.scheduler, parts.image_tokens, parts.backbone) for parts in (own, wanted)]
    kinds = [{"prediction_type": side.prediction_type} for side in sides]
    if odd := other_value(kinds[0], kinds[1], words):
        return odd
    flows = [side for side in sides if isinstance(side, RectifiedFlow)]
    if len(flows) == 2 and (flows[0].stretch == 1) != (flows[1].stretch == 1):
        # one step needs no terminal sigma, which would be 0 / 0, so that a student's schedule has none
        sides = [RectifiedFlow(side.steps, side.shift) for side in flows]
    shared = min(side.num_timesteps for side in sides)  # an export's schedule ends where it starts
    if shared <= start_timestep:
        return f"one schedule has {shared} timesteps, start_timestep is {start_timestep}"
    bars = [side.alpha[:shared].square() for side in sides]
    close = torch.isclose(bars[0], bars[1], rtol=1e-3, atol=1e-5)
    if bool(close.all()):
        return None
    t = int((~close).nonzero()[0])
    values = [{f"alpha_bar at timestep {t}": f"{bar[t]:.4g}"} for bar in bars]
    return other_value(values[0], values[1], words)


def _settings(network: nn.Module) -> dict[str, Any]:
    """The settings that change the network's function; an absent one is false, 8 for every block is 8."""
    settings = architecture(network)
    settings.pop("upcast_attention", None)  # an old remedy for float16
    if isinstance(network, UNet2DConditionModel):
        # of pictures by default; that of a transformer changes its position codes
        settings.pop("sample_size")
    for name, value in settings.items():
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        settings[name] = value or False
    return settings


def _is_finished(checkpoint: Path) -> bool:
    """Whether the run of a checkpoint has come to its end: its report says so."""
    report = checkpoint.parents[1] / "report.json"
    try:
        return bool(read_json(report).get("finished", True)) if report.is_file() else False
    except (UserError, AttributeError):  # damaged: then it doesn't say so
        return False


def _version(checkpoint: Path) -> int:
    """The n of version_<n>, or -1."""
    digits = checkpoint.parents[1].name.removeprefix("version_")
    return int(digits) if digits.isdigit() else -1
