"""Generation in one step or a few: prompts and noise -> latents -> pictures, for training and tools."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.guided import guided_prediction
from lightning_modules.diffusion.randomness import seeded_noise
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.steps import Steps, as_steps
from lightning_modules.guidance.methods import Method
from lightning_modules.guidance.prompting import NegativePrompts, negative_attention
from lightning_modules.networks.backbones.calling import GUIDANCE, rescale, run_network, takes_guidance
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder
from lightning_modules.networks.decoder import LatentDecoder
from lightning_modules.networks.loading import TextToImageParts, noise_schedule
from lightning_modules.networks.step_counts import tell
from lightning_modules.networks.student import Weights, load_student
from lightning_modules.pipelines import in_batches


class OneStepGenerator(nn.Module):
    """The student f(z, y) and all it needs to make pictures from prompts.

    x0 is read off the student's prediction at the start timestep T with the schedule's own constants: for
    epsilon-prediction x0 = (z - sigma_T eps) / alpha_T (SwiftBrush, arXiv 2312.05239, section 3.3). The
    noise z is unit normal at any T; it is not scaled by sigma_T. Of several steps, each starts from the
    former one's x0 with noise (see `Steps`).

    Args:
        student: the network; its weights are the module's only entries in a state dict (`student.*`).
        schedule: of the teacher.
        steps: where it is called; one timestep T is one step.
        prompt_encoder: frozen.
        decoder: frozen.
        latent_shape: (C, h, w).

    Raises:
        UserError: a step is not at a timestep of the schedule.
    """

    def __init__(
        self,
        student: nn.Module,
        schedule: NoiseSchedule,
        steps: int | Steps,
        prompt_encoder: PromptEncoder,
        decoder: LatentDecoder,
        latent_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.steps = as_steps(steps)
        if not 0 <= self.start_timestep < schedule.num_timesteps:
            raise UserError(
                f"start_timestep {self.start_timestep} is not one of the teacher's timesteps "
                f"0 to {schedule.num_timesteps - 1}. Set it to e.g. {schedule.num_timesteps - 1}."
            )
        self.student = student
        self.schedule = schedule
        self.prompt_encoder = prompt_encoder
        self.decoder = decoder
        self.latent_shape = latent_shape

    @property
    def start_timestep(self) -> int:
        """T."""
        return self.steps.start

    @contextmanager
    def taking(self, count: int) -> Iterator[None]:
        """Only so many of the steps inside (see `Steps.fewer`)."""
        whole = self.steps
        self.steps = whole.fewer(count)
        try:
            yield
        finally:
            self.steps = whole

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return next(self.student.parameters()).device

    def noise(self, seeds: Sequence[int], step: int = 0) -> Tensor:
        """New noise of a step [B, C, h, w], of the first one the start, float32, one seed per picture."""
        return seeded_noise(seeds, self.latent_shape, self.device, draw=step)

    def latents(
        self,
        noise: Tensor,
        condition: Condition,
        guidance_scale: float | Tensor = 1.0,
        negative: Condition | None = None,
        fresh: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Student samples x0 [B, C, h, w] in at least float32; the gradient flows into the student.

        `guidance_scale` other than 1 mixes in the prediction without text (or for `negative`), in kappa form.
        `fresh` gives new noise for each step after the first, where these want some.
        """

        def network(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return run_network(self.student, x_t, t, condition)

        tell(self.student, len(self.steps))
        embedded = GUIDANCE if takes_guidance(self.student) else None
        x_t = noise
        for k in range(len(self.steps)):
            said = guided_prediction(
                network, self.schedule, x_t, self.steps.at(k, noise), condition, guidance_scale, negative,
                embedded, rescale(self.student),
            )  # fmt: skip
            if k + 1 < len(self.steps):
                x_t = self.steps.next_input(k, said, self.schedule, noise, fresh)
        return said.x0

    @torch.no_grad()
    def images(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | None | Sequence[str | None] = None,
        negative_method: Method | None = None,
        negative_steps: int | None = None,
    ) -> Tensor:
        """Pictures [B, 3, H, W], float32 in [0, 1], one per prompt and seed, made `batch_size` at a time.

        A negative prompt (one for all, or one per picture, None where there is none) acts through attention
        by `negative_method`, in the first `negative_steps` if they are given; without a method it takes the
        place of the empty prompt in guidance.

        Raises:
            ValueError: as many seeds as prompts are needed, at least one.
            UserError: the negative prompts are of another number.
        """
        batches = in_batches(prompts, seeds, batch_size)
        negatives = NegativePrompts(negative_prompt)
        texts = negatives.per_image(len(prompts), 1)
        # one negative prompt for all is encoded, and put into attention, once for all batches, unless their
        # steps are counted
        one = len(negatives.texts) == 1 and negative_steps is None
        shared = negatives.texts if one and not negatives.empty else []
        differ = not shared and not negatives.empty
        pictures = []
        with self._away_from(shared, negative_method) as common:
            for part in batches:
                condition, fresh = self.prompt_encoder.encode(prompts[part]), partial(self.noise, seeds[part])
                with self._away_from(texts[part] if differ else [], negative_method, negative_steps) as own:
                    away = own if differ else common
                    latents = self.latents(fresh(), condition, guidance_scale, away, fresh)
                pictures.append(self.decoder.decode(latents).float())
        return torch.cat(pictures)

    @contextmanager
    def _away_from(
        self, texts: list[str], method: Method | None, steps: int | None = None
    ) -> Iterator[Condition | None]:
        """The negative prompts encoded, for guidance; those of a method act through attention inside instead.

        None if there are no `texts`; an empty text among them is an image without a negative prompt.
        """
        encoded = self.prompt_encoder.encode(texts) if texts else None
        if encoded is None or method is None:
            yield encoded
            return
        present = None if all(texts) else torch.tensor([bool(text) for text in texts])
        with negative_attention(self.student, encoded, method, present, steps):
            yield None


def make_generator(
    parts: TextToImageParts, steps: int | Steps, student: nn.Module | None = None
) -> OneStepGenerator:
    """Generator from the parts of a pipeline; `student` takes the place of `parts.denoiser`."""
    return OneStepGenerator(
        student=parts.denoiser if student is None else student,
        schedule=noise_schedule(parts.scheduler, parts.image_tokens, parts.backbone),
        steps=steps,
        prompt_encoder=parts.backbone.prompt_encoder(parts),
        decoder=LatentDecoder(parts.vae),
        latent_shape=parts.latent_shape,
    )


def load_generator(path: str | Path, weights: Weights | None = None) -> OneStepGenerator:
    """Generator from a .ckpt file, an exported folder or any model folder (see `load_student`).

    Raises:
        UserError: the path is missing or not such a thing.
    """
    loaded = load_student(path, weights)
    return make_generator(loaded.parts, loaded.steps).eval()
