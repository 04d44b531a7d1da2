"""Writes a student as a complete diffusers pipeline folder.

Stock diffusers reproduces it: one DDIM step (arXiv 2010.02502, eq. 12) from the last timestep of the exported
schedule to alpha = 1 returns the predicted x0, which is all that a one-step generator computes; on rectified
flow one Euler step from sigma = 1 to 0. Several steps are those of the same samplers, or, with new noise
between them, of a consistency model.
"""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SchedulerMixin,
)
from torch import nn

from common.errors import UserError
from common.files import check_output_folder, written_at_once
from lightning_modules.diffusion.steps import Steps, as_steps, step_facts
from lightning_modules.networks.backbones.calling import embedded_guidance
from lightning_modules.networks.cards import PICTURE, RunNotes, model_card, shown_name, without_place
from lightning_modules.networks.loading import (
    TextToImageParts,
    flow_shift,
    is_flow,
    no_progress_bars,
    pipeline_folder,
)
from lightning_modules.networks.lora import StudentAdapter, lora_card, write_lora
from lightning_modules.networks.step_counts import folded

MARKER, LORA = "one_step.json", "lora"
_PLACES = {"_name_or_path", "name_or_path"}  # both libraries note where a part was read from
FOLDER_NAMES = {
    MARKER, LORA, PICTURE, "README.md", "model_index.json", "scheduler", "text_encoder", "text_encoder_2",
    "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "transformer", "unet", "vae",
    "merge.json", "merge.md", "merge.html", "merge_samples.png",  # of `merge --evaluate`
}  # fmt: skip


def euler_scheduler(scheduler: SchedulerMixin) -> FlowMatchEulerDiscreteScheduler:
    """Euler's method with the constants of a scheduler of rectified flow."""
    if isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler)):
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    # by keywords: what is given by position counts as a default, which `from_config` leaves out
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=scheduler.config.num_train_timesteps, shift=flow_shift(scheduler)
    )


def student_scheduler(scheduler: SchedulerMixin, steps: Steps) -> SchedulerMixin:
    """The stock scheduler that takes a student's steps; fixed noise between them none does.

    Its betas are the given scheduler's up to the start, so every alpha stays what it was; the start noise is
    unit normal whatever the timestep, as in training. Several steps with new noise between them are those of
    a consistency model, whose output is x0 alone (c_skip = 0, c_out = 1 in the limit of `timestep_scaling`);
    those without it DPM-Solver's of first order, which are DDIM's (arXiv 2206.00927, section 4.1), at any
    timesteps. On rectified flow Euler's method, or its consistency sampler.

    Raises:
        UserError: the schedule has no such steps.
    """
    if len(steps) == 1:
        return one_step_scheduler(scheduler, steps.start)
    if is_flow(scheduler):
        euler = one_step_scheduler(scheduler, steps.start)
        if euler.config.shift_terminal != euler_scheduler(scheduler).config.shift_terminal:
            raise UserError(
                "The teacher's schedule has a terminal sigma (shift_terminal), with which a student of "
                "several steps is not supported: leave model.timesteps out."
            )
        return FlowMatchLCMScheduler.from_config(euler.config) if steps.noise == "fresh" else euler
    single = one_step_scheduler(scheduler, steps.start).config
    common = {name: single[name] for name in (
        "num_train_timesteps", "trained_betas", "prediction_type", "timestep_spacing", "steps_offset"
    )}  # fmt: skip
    if steps.noise == "fresh":
        return LCMScheduler(
            **common, original_inference_steps=steps.start + 1, timestep_scaling=1e6, clip_sample=False
        )
    return DPMSolverMultistepScheduler(
        **common, solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )


def one_step_scheduler(scheduler: SchedulerMixin, start_timestep: int) -> SchedulerMixin:
    """DDIM scheduler whose single trailing step starts at `start_timestep` and ends at x0.

    On rectified flow, Euler's one step from the last timestep; a terminal sigma is left out (it would be
    0 / 0 in one step).
    """
    if is_flow(scheduler):
        if start_timestep != scheduler.config.num_train_timesteps - 1:
            raise UserError(
                f"start_timestep is {start_timestep}: a model of rectified flow starts at sigma = 1, "
                f"timestep {scheduler.config.num_train_timesteps - 1}."
            )
        euler = euler_scheduler(scheduler)
        return FlowMatchEulerDiscreteScheduler.from_config({**euler.config, "shift_terminal": None})
    steps = len(scheduler.betas)
    if not 0 <= start_timestep < steps:
        raise UserError(
            f"start_timestep {start_timestep} is not one of the teacher's timesteps 0 to {steps - 1}."
        )
    return DDIMScheduler(
        num_train_timesteps=start_timestep + 1,
        trained_betas=scheduler.betas[: start_timestep + 1].tolist(),
        prediction_type=scheduler.config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # no effect in trailing spacing, but StableDiffusionPipeline warns about any other
    )


def is_own_export(folder: Path) -> bool:
    """Whether the folder was written by `export_student`."""
    return (folder / MARKER).is_file()


def own_names(folder: Path) -> set[str]:
    """Names that a former export may have left in the folder."""
    return FOLDER_NAMES if is_own_export(folder) else set()


def export_student(
    denoiser: nn.Module,
    parts: TextToImageParts,
    steps: int | Steps,
    output: str | Path,
    dtype: torch.dtype = torch.float32,
    card: dict[str, Any] | None = None,
    adapter: StudentAdapter | None = None,
    notes: RunNotes | None = None,
    name: str | None = None,
) -> Path:
    """Write student and the teacher's other parts as a stock pipeline folder; returns its path.

    Raises:
        UserError: there is something else in the folder, or no stock scheduler for the student.

    Args:
        denoiser: the student; not changed. One that takes the number of its steps becomes a stock network
            that draws in so many.
        parts: the teacher's parts (its `denoiser` is not used); its scheduler gives the schedule.
        steps: where the student is called.
        output: folder to write; a former export is replaced, anything else in it is refused.
        dtype: of the written weights.
        card: facts for the model card and for one_step.json, name to value (plain data).
        adapter: of a LoRA student, which is then written by itself, too, into the folder `lora`.
        notes: what else the model card says.
        name: what the model card calls the model; the folder if None.
    """
    steps = as_steps(steps)
    if len(steps) > 1 and steps.noise == "fixed":
        raise UserError(
            "No stock scheduler adds the same noise before every step (step_noise: fixed): this student can "
            "be drawn with by generate and evaluate only."
        )
    denoiser, steps = folded(denoiser, len(steps)), dataclasses.replace(steps, counts=())
    scheduler = student_scheduler(parts.scheduler, steps)
    target = check_output_folder(Path(output), own_names)
    facts = {name: without_place(value) for name, value in (card or {}).items()}
    facts.pop("step_counts", None)
    facts |= {**step_facts(steps), "dtype": str(dtype).removeprefix("torch.")}
    with written_at_once(target) as folder:
        cast = dataclasses.replace(
            parts,
            denoiser=_cast(denoiser, dtype),
            vae=_cast(parts.vae, dtype),
            text_encoders=[_cast(encoder, dtype) for encoder in parts.text_encoders],
        )
        save_pipeline(parts.backbone.pipeline(cast, scheduler), folder)
        (folder / MARKER).write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
        load, call, notes = load_words(parts), student_call(parts, steps), notes or RunNotes()
        name = name or shown_name(Path(output))
        if notes.picture is not None:
            shutil.copyfile(notes.picture, folder / PICTURE)
        if adapter is not None:
            told = {
                "num_inference_steps": len(steps),
                "guidance_scale": embedded_guidance(parts.denoiser) or 1.0,  # κ, as ComfyUI has it
                "call": call,
                "trained_timesteps": list(steps.timesteps),
            }
            if is_flow(parts.scheduler):
                told["shift"] = flow_shift(parts.scheduler, parts.image_tokens, parts.backbone)
            write_lora(adapter, parts.backbone, folder / LORA, dtype, told)
            own = lora_card(adapter, parts.backbone, name, call, type(scheduler).__name__, load)
            notes = notes._replace(markdown=own + notes.markdown)
        text = model_card(name, facts, call, pipeline_folder(parts.path), notes, load)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return target


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline so that stock `from_pretrained(folder)` without a dtype gives one dtype, float32.

    transformers 5 loads a model in the dtype its config.json names (that of the file, as saved), diffusers in
    float32: a half-precision folder would come out mixed and fail. An explicit dtype still wins.
    """
    with no_progress_bars():
        pipeline.save_pretrained(folder)
    for path in (folder / "model_index.json", *folder.glob("*/*config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        changes = {name: without_place(config[name]) for name in _PLACES & config.keys()}
        if path.name == "config.json" and path.parent.name.startswith("text_encoder"):
            changes["dtype"] = "float32"
        if config != (changed := config | changes):
            path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def load_words(parts: TextToImageParts) -> str:
    """Further arguments of `from_pretrained`: the stock pipelines want parts that are left out named."""
    return "".join(f", {name}=None" for name in parts.left_out)


def student_call(parts: TextToImageParts, steps: Steps) -> str:
    """Arguments of the stock pipeline's call that draws one picture, as Python text.

    The number of steps, where these are what the scheduler takes in so many; else the steps themselves.
    """
    options: dict[str, Any] = {"num_inference_steps": len(steps)}
    scheduler = student_scheduler(parts.scheduler, steps)
    if len(steps) > 1 and is_flow(scheduler):
        # before the shift, which the scheduler applies: u = (t + 1) / T
        options = {"sigmas": [(t + 1) / scheduler.config.num_train_timesteps for t in steps.timesteps]}
    elif len(steps) > 1:
        scheduler.set_timesteps(len(steps))
        if scheduler.timesteps.tolist() != list(steps.timesteps):
            options = {"timesteps": list(steps.timesteps)}
    options |= parts.backbone.guidance_options(embedded_guidance(parts.denoiser) or 1.0)
    options |= parts.backbone.call_options(parts)
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _cast(module: nn.Module, dtype: torch.dtype) -> Any:
    """The module itself if it has the dtype already, else a converted copy."""
    if all(p.dtype == dtype for p in module.parameters()):
        return module
    return nn.Module.to(copy.deepcopy(module), dtype)  # diffusers' own `to` warns about nothing
