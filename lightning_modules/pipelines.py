"""Pictures of stock diffusers pipelines: a multi-step teacher, a few-step model, any other class."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, SchedulerMixin, TCDScheduler
from torch import Tensor

from common.errors import UserError, first_line
from lightning_modules.networks.backbones import call_options, guidance_options, is_own_class
from lightning_modules.networks.backbones.calling import embedded_guidance
from lightning_modules.networks.loading import (
    TextToImageParts,
    find_model,
    is_flow,
    pipeline_folder,
    read_json,
)
from lightning_modules.networks.pipeline_folder import euler_scheduler


def is_own_family(model: str) -> bool:
    """Whether a folder's pipeline is one whose student we draw with ourselves."""
    return is_own_class(read_json(pipeline_folder(model) / "model_index.json"))


def has_few_step_sampler(scheduler: SchedulerMixin) -> bool:
    """Whether the folder's own scheduler takes the one step (LCM, SD-Turbo …) rather than our conversion.

    The schedulers of multi-step models are made for many steps: in one, most of them start near t = 1.
    """
    trailing = scheduler.config.get("timestep_spacing") == "trailing"
    return isinstance(scheduler, (LCMScheduler, TCDScheduler)) or (
        trailing and not isinstance(scheduler, DDIMScheduler)
    )


def load_any_pipeline(model: str) -> DiffusionPipeline:
    """A stock pipeline of any class, in float32, as all models here.

    Raises:
        UserError: it can't be loaded.
    """
    try:
        # cast here: transformers keeps the dtype of the files, diffusers does not
        found = find_model(model)
        pipeline = DiffusionPipeline.from_pretrained(
            found.name, variant=found.variant, trust_remote_code=False
        ).to(torch.float32)
    except UserError:
        raise
    except Exception as error:  # loaders raise many kinds; the cause stays attached
        raise UserError(
            f"The pipeline {model} can't be loaded: {first_line(error)}; fetch it again, or give another"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_pipeline(parts: TextToImageParts, scheduler: SchedulerMixin | None = None) -> DiffusionPipeline:
    """Stock diffusers pipeline of the parts (shared, not copied), without safety checker and progress bar."""
    sampler = copy.deepcopy(parts.scheduler if scheduler is None else scheduler)
    if sampler.config.get("timestep_spacing") == "trailing":
        # has no effect in trailing spacing, but the pipeline insists
        sampler.register_to_config(steps_offset=1)
    return parts.backbone.pipeline(parts, sampler)


def multistep_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """DDIM, or Euler's method on rectified flow, with the constants of another scheduler.

    One that samples so already keeps its settings.
    """
    if is_flow(scheduler):
        return euler_scheduler(scheduler)
    if isinstance(scheduler, DDIMScheduler):
        return DDIMScheduler.from_config(scheduler.config)
    # Latents have no fixed range, so they are not clipped; trailing spacing starts at the last timestep.
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, timestep_spacing="trailing")


def multistep_images(
    parts: TextToImageParts,
    prompts: list[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance_scale: float = 4.5,
    **options: Any,
) -> Tensor:
    """Pictures of the stock pipeline by DDIM (arXiv 2010.02502), or Euler's method on rectified flow.

    `options` are those of `pipeline_images`.
    """
    pipeline = stock_pipeline(parts, multistep_scheduler(parts.scheduler))
    return pipeline_images(pipeline, prompts, seeds, steps, guidance_scale, **options)


@torch.no_grad()
def pipeline_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    batch_size: int | None = None,
    negative_prompt: str | Sequence[str | None] | None = None,
) -> Tensor:
    """Pictures [B, 3, H, W], float32 in [0, 1], of any stock text-to-image pipeline, one seed per picture.

    One CPU generator per picture makes the start noise of `seeded_noise`, whatever the batch size. The
    negative prompt is one for all, or one per picture. A network that takes the guidance scale as an input
    (an LCM) is given a usual one instead of 1.
    """
    if guidance_scale == 1:
        guidance_scale = embedded_guidance(getattr(pipeline, "unet", None)) or guidance_scale
    pictures = []
    for part in in_batches(prompts, seeds, batch_size):
        options: dict[str, Any] = call_options(pipeline) | guidance_options(pipeline, guidance_scale)
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            options["negative_prompt"] = [text or "" for text in negative_prompt[part]]
        elif (everywhere := negative_prompt or options.get("negative_prompt")) is not None:
            options["negative_prompt"] = [everywhere] * len(prompts[part])
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[part]]
        try:
            output = pipeline(
                prompt=prompts[part], num_inference_steps=steps, generator=generators, output_type="pt",
                **options,
            )  # fmt: skip
        except (TypeError, ValueError, AttributeError, IndexError) as error:  # too many steps, other inputs …
            raise UserError(
                f"{type(pipeline).__name__} can't draw from prompts alone in {steps} steps: "
                f"{first_line(error)}; give another number of --steps, or another model"
            ) from error
        pictures.append(output.images.float().clamp(0.0, 1.0))
    return torch.cat(pictures)


def in_batches(prompts: Sequence[str], seeds: Sequence[int], batch_size: int | None = None) -> list[slice]:
    """Slices of at most `batch_size` that cover all prompts.

    Raises:
        ValueError: as many seeds as prompts are needed, at least one.
    """
    count = len(prompts)
    if not count or count != len(seeds):
        raise ValueError(
            f"{count} prompts and {len(seeds)} seeds; one seed per prompt and at least one is needed"
        )
    size = batch_size or count
    return [slice(start, start + size) for start in range(0, count, size)]
