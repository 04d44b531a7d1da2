"""The LightningModule that distils a multi-step teacher into a one-step student."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.batch import MicroBatch, micro_batches, student_negatives
from lightning_modules.checkpointing import COUNTERS, add_to_checkpoint, take_from_checkpoint
from lightning_modules.compiling import CompiledNetworks, check_negative_scale
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.generator import OneStepGenerator, make_generator
from lightning_modules.image_losses.terms import ImageLossSettings, ImageTerms, check_judges
from lightning_modules.image_pairs import ImagePairs, PairRegression
from lightning_modules.judging import not_finite, objective_terms, pair_term, student_terms
from lightning_modules.memory import Part, memory_by_part
from lightning_modules.networks.ema import StudentEMA
from lightning_modules.networks.loading import load_parts, noise_schedule
from lightning_modules.networks.lora import LoraSettings, StudentBase, StudentLoraSettings
from lightning_modules.networks.prompt_cache.lookup import use_prompt_cache
from lightning_modules.networks.roles import ScoreModels
from lightning_modules.networks.student_start import make_student
from lightning_modules.networks.weights import hide_from_state_dict
from lightning_modules.objectives.base import Objective, StudentSample
from lightning_modules.optimization import RoleOptimization, StepNumbers, UpdateGuard
from lightning_modules.parallel import FullySharded, same_on_all_processes, shard_networks, without_sync
from lightning_modules.score_views import score_views
from lightning_modules.trainer_settings import cast_frozen, check_trainer, frozen_dtype, keep_freed_memory

Batch = dict[str, Any]


class OneStepDistillation(L.LightningModule):
    """Student, frozen teacher and fake score (LoRA teacher), trained in turn by two optimizers.

    One training step is one student update on the global batch, then one fake-score update on the same
    samples. ``global_step`` counts student updates. Nothing but prompts goes in, unless ``image_pairs`` are
    given.

    Args:
        objective: the method; see ``lightning_modules/objectives``.
        student: optimization of the student.
        fake_score: optimization of the fake score and of networks that the objective owns.
        teacher: diffusers folder or hub name; relative paths also from the repository.
        start_timestep: T at which the student is called. 999 as published; an earlier one multiplies its
            errors less (sigma_T / alpha_T is 14.6 at 999 and 2.5 at 625 on Stable Diffusion's schedule).
        lora: adapter of the fake score on the teacher's weights; null makes the fake score a full copy.
        student_init: one-step model to start from: an exported or other diffusers folder, or a .ckpt; null:
            the teacher.
        student_lora: train an adapter of the student on frozen weights; null: train all weights.
        image_losses: auxiliary losses on decoded pictures; see ``lightning_modules/image_losses``.
        image_pairs: pictures with captions for a regression term; the training isn't image-free then.
        ema_decay: largest decay of the student's moving average; null for none.
        gradient_checkpointing: recompute activations of the trained networks in the backward pass: takes less
            memory and more time.
        frozen_weights: type of weights that are not trained: float32, bfloat16, or auto: bfloat16 where a
            bf16-mixed run is on an accelerator, unless in shards.
        decode_slice: most pictures that an autoencoder takes at once; fewer need less memory.
        prompt_cache: folder that encode-prompts wrote with this teacher; prompts are looked up there, and the
            text encoders are not loaded (on the CPU, if a prompt is missing). null: encode on the fly.
        compile: compile the networks of a training step: true, or a mode of torch.compile.
        seed: of all random numbers of the training (noises, timesteps, guidance scales, dropout).
        max_skipped_updates: a run stops with an error after so many non-finite updates of a role in a row.
    """

    default_callbacks: tuple[str, ...] = (
        "callbacks.start_summary.StartSummary",
        "callbacks.throughput.Throughput",
        "callbacks.report.RunReport",
        "callbacks.stage_report.StageReport",
    )
    """Callbacks that every run of it has, unless it names its own; others read their checkpoints, too."""

    def __init__(
        self,
        objective: Objective,
        student: RoleOptimization,
        fake_score: RoleOptimization,
        teacher: str = "assets/emoji-sd",
        start_timestep: int = 999,
        lora: LoraSettings | None = LoraSettings(),  # noqa: B008 - read only
        student_init: str | None = None,
        student_lora: StudentLoraSettings | None = None,
        image_losses: ImageLossSettings | None = None,
        image_pairs: ImagePairs | None = None,
        ema_decay: float | None = 0.9999,
        gradient_checkpointing: bool = False,
        frozen_weights: Literal["auto", "float32", "bfloat16"] = "auto",
        decode_slice: int = 16,
        prompt_cache: str | None = None,
        compile: bool | str = False,
        seed: int = 0,
        max_skipped_updates: int = 20,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        plain = ("teacher", "start_timestep", "student_init", "ema_decay", "gradient_checkpointing",
                 "frozen_weights", "decode_slice", "prompt_cache", "compile", "seed",
                 "max_skipped_updates")  # fmt: skip
        self.save_hyperparameters(*plain)
        self.objective = objective
        self.student_optimization, self.fake_score_optimization = student, fake_score
        self.teacher_path, self.start_timestep, self.lora = teacher, start_timestep, lora
        self.student_init, self.student_lora = student_init, student_lora
        self.image_losses, self.image_pairs = image_losses, image_pairs
        self.ema_decay, self.gradient_checkpointing = ema_decay, gradient_checkpointing
        self.frozen_weights, self.decode_slice = frozen_weights, decode_slice
        self.prompt_cache, self.seed = prompt_cache, seed
        self.compile_mode = compile
        self.student_steps = self.fake_score_steps = 0
        self._prompts: list[str] = []  # of the update in progress
        self._guard, self.numbers = UpdateGuard(max_skipped_updates), StepNumbers()
        self.student: nn.Module | None = None
        self.student_base: StudentBase | None = None
        self.image_terms: ImageTerms | None = None
        self.pair_regression: PairRegression | None = None
        self.ema: StudentEMA | None = None

    @property
    def skipped_updates(self) -> int:
        """Updates of either role so far whose gradient was not finite."""
        return self._guard.skipped

    @skipped_updates.setter
    def skipped_updates(self, count: int) -> None:
        self._guard.skipped = count

    # --- construction ---------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """None; but this is the first hook that sees the Trainer, before Lightning's own checks of it."""
        check_trainer(self.trainer)
        return []

    def configure_model(self) -> None:
        """Load the teacher and build the other roles from it, once; Lightning calls this in every stage.

        Raises:
            UserError: the teacher can't be used, or the objective's settings don't fit its schedule.
        """
        if self.student is not None:
            return
        if self.compile_mode:
            check_negative_scale(self.objective, self.seed)
        offloaded = () if self.prompt_cache is None else ("text_encoders",)
        self.parts = load_parts(self.teacher_path, without=offloaded)
        schedule = noise_schedule(self.parts.scheduler)
        try:
            self.objective.check_schedule(schedule)
        except ValueError as error:
            raise UserError(
                f"{type(self.objective).__name__} does not fit {self.parts.path}: {error}"
            ) from error
        student, self.student_base = make_student(
            self.parts, self.teacher_path, self.start_timestep, self.student_init, self.student_lora
        )
        self.student = student
        self.scores = ScoreModels(self.parts.denoiser, schedule, self.lora)
        if self.gradient_checkpointing:
            student.enable_gradient_checkpointing()  # type: ignore[operator]
            self.scores.enable_gradient_checkpointing()
        generator = make_generator(self.parts, self.start_timestep, student)
        if self.prompt_cache is not None:  # drops text encoders without weights, which Lightning can't move
            use_prompt_cache(generator.prompt_encoder, self.parts, self.prompt_cache)
        self.generator: OneStepGenerator = generator
        hide_from_state_dict(self.generator)  # its student is stored under ``student``, the rest is frozen
        if self.image_losses is not None:
            self.image_terms = ImageTerms(self.image_losses, self.parts)
            if self._trainer is not None:
                check_judges(self.image_losses.losses, self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.image_pairs is not None:
            processes = self.trainer.world_size if self._trainer is not None else 1
            self.pair_regression = PairRegression(self.image_pairs, self.parts, processes)
        for part in (self.generator, self.image_terms):
            if part is not None:
                part.decoder.slice_size = self.decode_slice
        frozen = [self.scores, self.generator, *([self.image_terms] if self.image_terms is not None else [])]
        cast_frozen(frozen, frozen_dtype(self._trainer, self.frozen_weights))
        if self._trainer is not None and isinstance(self.trainer.strategy, FullySharded):
            mesh = self.trainer.strategy.device_mesh["data_parallel"]
            shard_networks([student, *self.scores.networks()], mesh)
        self.ema = StudentEMA(student, self.ema_decay) if self.ema_decay is not None else None
        self._compiled = CompiledNetworks([student, *self.scores.networks()], self.compile_mode)

    def configure_optimizers(self) -> Any:
        assert self.student is not None
        steps = int(self.trainer.max_steps)
        fake_groups = [{"params": self.scores.fake_parameters()}, *self.objective.extra_parameter_groups()]
        if self.image_terms is not None:
            self.image_terms.weights(0, steps)  # a schedule without an end shows here, before any training
        trained = [p for p in self.student.parameters() if p.requires_grad]
        student, schedule = self.student_optimization.build([{"params": trained}], steps)
        fake, fake_schedule = self.fake_score_optimization.build(fake_groups, steps)
        schedules = {"student": schedule, "fake_score": fake_schedule}
        return [student, fake], [
            {"scheduler": item, "name": f"learning_rate/{role}"} for role, item in schedules.items()
        ]

    def on_fit_start(self) -> None:
        """Say so if the training is not image-free; processes begin with the same weights."""
        if self.device.type == "cpu":
            keep_freed_memory()
        if isinstance(self.trainer.strategy, FullySharded):
            same_on_all_processes(p for p in self.parameters() if p.requires_grad)
        if self.pair_regression is not None:
            self.print(self.pair_regression.notice)

    # --- training -------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Student turn, then fake-score turn on the same samples (SwiftBrush, arXiv 2312.05239, algorithm 1).

        A skipped student update is no step: neither counters nor learning rates move.
        """
        student_optimizer, fake_optimizer = self.optimizers()  # type: ignore[attr-defined]
        # Lightning counts every optimizer's steps in global_step; only the student's are to count.
        fake_optimizer._on_before_step = fake_optimizer._on_after_step = lambda: None
        step, self._prompts = self.student_steps, batch["prompts"]
        self.numbers.clear()
        with without_sync(self.trainer.strategy.model), self._compiled.active():
            samples = [self._student_turn(part, step) for part in micro_batches(self, batch)]
            if (term := pair_term(self, step)) is not None:
                self.manual_backward(term)
            if updated := self._update(student_optimizer, self.student_optimization, "student"):
                self.student_steps += 1
                if self.ema is not None:
                    self.ema.update()
            for sample in samples:
                self._fake_score_turn(*sample)
            if self._update(fake_optimizer, self.fake_score_optimization, "fake_score"):
                self.fake_score_steps += 1
        for schedule in self.lr_schedulers() if updated else ():  # type: ignore[union-attr]
            schedule.step()
        for name in COUNTERS:
            self.numbers.note(f"counts/{name}", float(getattr(self, name)))
        self.numbers.log(self)

    def _student_turn(self, part: MicroBatch, step: int) -> tuple[StudentSample, StepRandom, float]:
        """Draw samples, have them judged and backpropagate into the student; returns them detached."""
        random = StepRandom(self.seed, step, part.indices, self.device)
        encode = self.generator.prompt_encoder.encode
        condition = encode(part.prompts)
        negative = None if part.negatives is None else encode(part.negatives)
        with student_negatives(self, negative, random):
            return self._judged_sample(part, random, condition, negative)

    def _judged_sample(
        self, part: MicroBatch, random: StepRandom, condition: Condition, negative: Condition | None
    ) -> tuple[StudentSample, StepRandom, float]:
        """The student's forward pass, its terms and its backward pass."""
        share = part.share
        x0 = self.generator.latents(random.normal("start", self.generator.latent_shape), condition)
        # The terms are differentiated at the student's output first: that yields the norm of each term's
        # gradient, and whatever the objective did inside reaches no other weight.
        leaf = x0.detach().requires_grad_()
        sample = StudentSample(leaf, condition, negative)
        terms = student_terms(self, sample, part.prompts, random, share)
        parts = {n: torch.autograd.grad(term, leaf, retain_graph=True)[0] for n, term in terms.items()}
        del terms, sample  # and with them what they keep for backward passes
        self.manual_backward(share * (x0 * torch.stack([*parts.values()]).sum(0)).sum())
        for name, gradient in parts.items():
            # Terms are means over the batch; times sqrt(B) their gradient's norm does not depend on its size.
            self.numbers.note(f"gradient_at_output/{name}", gradient.norm() * len(leaf) ** 0.5, share)
        self.numbers.note("latents/mean", leaf.mean(), share)
        self.numbers.note("latents/std", leaf.std(), share)
        return StudentSample(x0.detach(), condition, negative), random, share

    def _fake_score_turn(self, sample: StudentSample, random: StepRandom, share: float) -> None:
        """Train the fake score, and networks of the objective, on detached samples."""
        terms = objective_terms(self, "fake_score", sample, random, share)
        self.manual_backward(share * torch.stack([*terms.values()]).sum())

    def _update(self, optimizer: Any, optimization: RoleOptimization, role: str) -> bool:
        """Clip and step, unless the gradient is not finite; whether it was (the same on all processes)."""
        suspects = partial(not_finite, self.numbers, self._prompts, role)
        finite, norm = self._guard.step(optimizer, optimization, role, self.student_steps, suspects)
        self.numbers.note(f"gradient_norm/{role}", norm)
        return finite

    # --- evaluation -----------------------------------------------------------------------------------------

    @contextmanager
    def evaluation_weights(self) -> Iterator[str]:
        """The student with the weights that are judged: its moving average if there is one; yields which."""
        with nullcontext() if self.ema is None else self.ema.swapped():
            yield "online" if self.ema is None else "ema"

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Draw the pictures that all callbacks measure, once; the seed is the place of the prompt."""
        with self.evaluation_weights():
            images = self.generator.images(batch["prompts"], batch["indices"].tolist())
        return {"images": images, **batch}

    test_step = predict_step = validation_step

    def score_views(self, prompts: list[str], seeds: list[int], at: float = 0.5) -> dict[str, Tensor]:
        """Pictures [B, 3, H, W] of what each role sees as x0; see `score_views`."""
        return score_views(self, prompts, seeds, at)

    def memory_parts(self) -> dict[str, Part]:
        """What takes memory in training: name -> (values, bytes, whether trained); see `memory_by_part`."""
        return memory_by_part(self)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `add_to_checkpoint`."""
        add_to_checkpoint(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `take_from_checkpoint`."""
        take_from_checkpoint(self, checkpoint)
