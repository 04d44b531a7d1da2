"""The LightningModule that distils a multi-step teacher into a student of one step or a few."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from common.errors import UserError, check_range
from common.hashing import hash_tensors
from common.processes import from_every_rank
from datamodules.real_pictures import RealSource
from lightning_modules.batch import Part, cut
from lightning_modules.build import NetworkSettings, build_networks, check_turns
from lightning_modules.compiling import CompiledNetworks
from lightning_modules.diffusion.randomness import StepRandom, seeded_noise
from lightning_modules.diffusion.steps import StepNoise, Steps, as_steps, step_facts
from lightning_modules.image_losses.terms import ImageLossSettings, ImageTerms, check_judges
from lightning_modules.memory import Part as MemoryPart
from lightning_modules.memory import memory_by_part
from lightning_modules.networks.ema import StudentEMA
from lightning_modules.networks.lora import StudentBase, StudentLoraSettings
from lightning_modules.networks.model_names import is_bundled, lasting_name
from lightning_modules.networks.quantized import quantize_frozen
from lightning_modules.networks.step_counts import tell
from lightning_modules.networks.student import architecture
from lightning_modules.networks.weights import check_fit
from lightning_modules.objectives.base import (
    NEGATIVE_PROMPTS,
    REAL_PICTURES,
    Inputs,
    Objective,
    Real,
    StudentSample,
)
from lightning_modules.objectives.pair_regression import PairRegression
from lightning_modules.optimization import FakeScoreSettings, RoleOptimization, StepNumbers, UpdateGuard
from lightning_modules.parallel import (
    FullySharded,
    mean_over_processes,
    same_on_all_processes,
    shard_autoencoders,
    shard_networks,
    shard_text_encoders,
    without_sync,
)
from lightning_modules.sampler import StudentSampler, check_negative_scale
from lightning_modules.trainer_settings import (
    cast_frozen,
    channels_last,
    check_trainer,
    frozen_dtype,
    keep_freed_memory,
)

Batch = dict[str, Any]
SHOWN_PROMPTS = 3


class OneStepDistillation(L.LightningModule):
    """Student, frozen teacher and fake score (a LoRA on the teacher, a full copy, or none), trained in turns.

    One training step is one student update on the global batch, and the other updates that the objective
    plans beside it; each trained network has its own optimizer. ``global_step`` counts student updates.
    Nothing but prompts goes in, unless ``data.real`` is given.

    Args:
        objective: the method; see ``lightning_modules/objectives``.
        student: optimization of the student.
        fake_score: the fake score's adapter, and the optimization of it and of networks that the objective
            owns; null where the objective has no fake score.
        further_roles: optimization of each further role that the objective names.
        teacher: diffusers folder or hub name; relative paths also from the repository.
        start_timestep: T at which the student is called. 999 as published; an earlier one multiplies its
            errors less (sigma_T / alpha_T is 14.6 at 999 and 2.5 at 625 on Stable Diffusion's schedule).
        timesteps: of a student of several steps, from the first one down ([999, 749, 499, 249]), in place of
            start_timestep. A turn draws one of them; the student's own steps lead there without a gradient.
        step_noise: between its steps: fresh, fixed (the start's again, which no stock sampler does, so that
            such a student can't be exported), or none (a deterministic trajectory).
        step_counts: numbers of steps, e.g. [1, 2, 4] of four timesteps, of which a turn draws one, evenly
            among the timesteps, and tells it to student and fake score (TDM-unify); needs full copies. null:
            the student is trained for all of its steps and told nothing.
        student_init: one-step model to start from: an exported or other diffusers folder, or a .ckpt; null:
            the teacher.
        student_lora: train an adapter of the student on frozen weights; null: train all weights.
        image_losses: auxiliary losses on decoded pictures; see ``lightning_modules/image_losses``.
        pair_regression: a regression term on the real pictures of ``data.real``.
        ema_decay: largest decay of the student's moving average; null for none.
        gradient_checkpointing: recompute activations of the trained networks in the backward pass: takes less
            memory and more time.
        frozen_weights: type of weights that are not trained: float32, bfloat16, or auto: bfloat16 where a
            bf16-mixed run is on an accelerator, unless in shards. 8bit, 4bit (bitsandbytes): linear layers in
            the blocks of teacher and LoRA student, the rest as in auto; an export has whole weights.
        decode_slice: most pictures that an autoencoder takes at once; fewer need less memory.
        score_batch: most samples that teacher and fake score take at once where no gradient is wanted, under
            guidance two of each prompt; null: all. Half of that needs less memory and a little more time.
        prompt_cache: folder that encode-prompts wrote with this teacher; prompts are looked up there, and the
            text encoders are not loaded (on the CPU, if a prompt is missing). null: encode on the fly.
        compile: compile the networks of a training step: true, or a mode of torch.compile.
        seed: of all random numbers of the training (noises, timesteps, guidance scales, dropout). None: the
            command line's ``seed_everything``, else 0.
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
        fake_score: FakeScoreSettings | None = None,
        teacher: str = "assets/emoji-sd",
        start_timestep: int = 999,
        timesteps: list[int] | None = None,
        step_noise: StepNoise = "fresh",
        step_counts: list[int] | None = None,
        student_init: str | None = None,
        student_lora: StudentLoraSettings | None = None,
        further_roles: dict[str, RoleOptimization] | None = None,
        image_losses: ImageLossSettings | None = None,
        pair_regression: PairRegression | None = None,
        ema_decay: float | None = 0.9999,
        gradient_checkpointing: bool = False,
        frozen_weights: Literal["auto", "float32", "bfloat16", "8bit", "4bit"] = "auto",
        decode_slice: int = 16,
        score_batch: int | None = None,
        prompt_cache: str | None = None,
        compile: bool | str = False,
        seed: int | None = None,
        max_skipped_updates: int = 20,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_range("model.decode_slice", decode_slice, 1, 2**31)
        check_range("model.score_batch", score_batch, 1, 2**31)
        check_range("model.ema_decay", ema_decay, 0, 1)
        plain = ("teacher", "start_timestep", "timesteps", "step_noise", "step_counts", "student_init",
                 "ema_decay", "gradient_checkpointing", "frozen_weights", "decode_slice", "score_batch",
                 "prompt_cache", "compile", "seed", "max_skipped_updates")  # fmt: skip
        self.save_hyperparameters(*plain)
        self.objective = objective
        given = {"student": student, "fake_score": fake_score, **(further_roles or {})}
        self.num_batches = check_turns(objective, list(further_roles or {}))
        if missing := [role for role in objective.roles if given[role] is None]:
            raise UserError(f"{type(objective).__name__} trains a {missing[0]}: give model.{missing[0]}")
        self.optimization = {role: item for role in objective.roles if (item := given[role]) is not None}
        self.network_settings = NetworkSettings(
            teacher,
            as_steps(timesteps or start_timestep, step_noise, step_counts or ()),
            fake_score.lora if fake_score else None,
            student_init,
            student_lora,
            prompt_cache,
            gradient_checkpointing,
        )
        self.image_losses, self.regression = image_losses, pair_regression
        self.ema_decay, self.compile_mode = ema_decay, compile
        self.frozen_weights, self.seed = frozen_weights, seed or 0
        self.decode_slice, self.score_batch = decode_slice, score_batch
        self.updates = dict.fromkeys(self.optimization, 0)
        self._prompts: list[str] = []  # of the step in progress
        self._guard, self.numbers = UpdateGuard(max_skipped_updates), StepNumbers()
        self.student: nn.Module | None = None
        self.image_terms: ImageTerms | None = None
        self.real_pictures: RealSource | None = None
        self.ema: StudentEMA | None = None

    @property
    def steps(self) -> Steps:
        """The student's steps from noise to picture."""
        return self.network_settings.steps

    @property
    def student_steps(self) -> int:
        """Student updates so far."""
        return self.updates["student"]

    @property
    def skipped_updates(self) -> int:
        """Updates of any role so far whose gradient was not finite."""
        return self._guard.skipped

    # --- construction ---------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """None; but this is the first hook that sees the Trainer, before Lightning's own checks of it."""
        check_trainer(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Ask the data for as many batches of prompts as the objective plans for a step.

        Raises:
            UserError: the data can't give them, or would give the bundled captions to another's model.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        teacher = self.network_settings.teacher
        if stage == "fit" and not getattr(data, "has_own_prompts", True) and not is_bundled(teacher):
            raise UserError(
                f"data.prompts is not set, and the teacher is {teacher}: the bundled captions describe emoji "
                "and suit the models of assets/ only. Give --data.prompts FILE (one prompt a line, or a "
                "table: docs/prompts.md), or --data.prompts assets/captions.txt where they are meant"
            )
        if stage != "fit" or self.num_batches == 1:
            return
        if not hasattr(data, "batches_per_step"):
            raise UserError(
                f"{type(self.objective).__name__} takes {self.num_batches} batches a step, which "
                f"{type(data).__name__} does not give: use datamodules.prompts.PromptDataModule"
            )
        data.batches_per_step = self.num_batches

    def configure_model(self) -> None:
        """Load the teacher and build the other roles from it, once; Lightning calls this in every stage.

        Raises:
            UserError: the teacher can't be used, or settings don't fit it or each other.
        """
        if self.student is not None:
            return
        if self.compile_mode:
            check_negative_scale(self.objective, self.seed)
        trainer = self._trainer
        in_shards = trainer is not None and isinstance(trainer.strategy, FullySharded)
        built = build_networks(replace(self.network_settings, in_shards=in_shards), self.objective)
        self.parts, self.student, self.student_base = built.parts, built.student, built.student_base
        self.scores, self.generator, self.networks = built.scores, built.generator, built.networks
        self.objective.mean = mean_over_processes
        if self.image_losses is not None:
            self.image_terms = ImageTerms(self.image_losses, self.parts)
            if trainer is not None:
                check_judges(self.image_losses.losses, trainer.callbacks)  # type: ignore[attr-defined]
        self.real_pictures = self._real_pictures()
        judges = [] if self.image_terms is None else [self.image_terms]
        decoders = [self.generator.decoder, *(terms.decoder for terms in judges)]
        for decoder in decoders:
            decoder.slice_size = self.decode_slice
        for score in (self.scores.teacher, self.scores.fake_score):
            score.most_at_once = self.score_batch
        trained = [self.student, *self.scores.networks()]
        dtype = frozen_dtype(trainer, self.frozen_weights)
        if self.frozen_weights in ("8bit", "4bit"):
            quantize_frozen(trained, int(self.frozen_weights[0]))
        cast_frozen([self.scores, self.generator, *judges], dtype)
        if trainer is not None and isinstance(trainer.strategy, FullySharded):
            mesh = trainer.strategy.device_mesh["data_parallel"]
            shard_networks(trained, mesh, self.parts.weights)
            shard_text_encoders(self.generator.prompt_encoder, mesh)
            shard_autoencoders((decoder.vae for decoder in decoders), mesh)
        elif trainer is not None and trainer.strategy.root_device.type == "cpu":
            channels_last(trained)
        self.ema = StudentEMA(self.student, self.ema_decay) if self.ema_decay is not None else None
        self._compiled = CompiledNetworks(trained, self.compile_mode)
        self._sampler = StudentSampler(
            self.student, self.networks.student, self.networks.schedule, self.steps, self.parts.latent_shape
        )

    def _real_pictures(self) -> RealSource | None:
        """The stream of real pictures; None where nothing needs them, or outside a training.

        Raises:
            UserError: something needs them and there are none, or the other way round.
        """
        data: Any = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        settings: Any = getattr(data, "real", None)
        needed = self.regression is not None or REAL_PICTURES in self.objective.needs
        if self._trainer is None or self.trainer.state.fn != "fit":
            return None
        if needed == (settings is not None):
            codec = partial(hash_tensors, self.parts.vae.state_dict())
            return data.real_pictures(self.parts.picture_size[1], codec) if needed else None
        if needed:
            raise UserError(
                "real pictures are needed (by the objective or pair_regression): set data.real, to captioned "
                "pictures or to the teacher's own samples, which python cli.py draw-teacher makes"
            )
        raise UserError(
            f"data.real is set, and neither {type(self.objective).__name__} nor pair_regression uses it"
        )

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.max_steps)
        if self.image_terms is not None:
            self.image_terms.weights(0, steps)  # a schedule without an end shows here, before any training
        self._check_own_weights()
        built = {
            role: item.build(self._parameter_groups(role), steps) for role, item in self.optimization.items()
        }
        return [optimizer for optimizer, _ in built.values()], [
            {"scheduler": schedule, "name": f"learning_rate/{role}"} for role, (_, schedule) in built.items()
        ]

    def _parameter_groups(self, role: str) -> list[dict[str, Any]]:
        """What moves in turns of a role.

        Raises:
            UserError: nothing does.
        """
        assert self.student is not None
        networks = {"student": self.student.parameters(), "fake_score": self.scores.fake_parameters()}
        trained = [p for p in networks.get(role, ()) if role != "student" or p.requires_grad]
        own: list[Any] = list(self.objective.parameters_of(role))
        groups = [{"params": trained}] if trained else []
        groups += own if own and isinstance(own[0], dict) else [{"params": own}] if own else []
        if not groups:
            raise UserError(f"{type(self.objective).__name__} names the role {role}, but gives it no weights")
        return groups

    def _check_own_weights(self) -> None:
        """Every weight of the objective itself moves in the turns of some role.

        Raises:
            UserError: one would never move.
        """
        given: list[Any] = [g for role in self.objective.roles for g in self.objective.parameters_of(role)]
        moved = {id(p) for g in given for p in (g["params"] if isinstance(g, dict) else [g])}
        idle = [n for n, p in self.objective.named_parameters() if p.requires_grad and id(p) not in moved]
        if idle:
            raise UserError(
                f"{type(self.objective).__name__} has a weight that no role trains, {idle[0]}: name its "
                "role in parameters_of (lightning_modules/objectives/base.py), or set requires_grad to False"
            )

    def on_fit_start(self) -> None:
        """Say what real pictures the training sees; processes begin with the same weights."""
        if self.device.type == "cpu":
            keep_freed_memory()
        if isinstance(self.trainer.strategy, FullySharded):
            same_on_all_processes(p for p in self.parameters() if p.requires_grad)
        if self.real_pictures is not None:
            self.print(self.real_pictures.notice)

    # --- training -------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """The turns that the objective plans, one of them the student's.

        A skipped student update is no step: neither counters nor learning rates move.
        """
        step, self._prompts = self.student_steps, batch["prompts"]
        self.numbers.clear()
        parts = self._parts(batch, step)
        with without_sync(self.trainer.strategy.model), self._compiled.active():
            for turn in self.objective.turns(step):
                for part in parts[turn.batch]:
                    if turn.role == "student":
                        self._student_turn(part)
                    else:
                        self._turn(turn.role, part)
                if self._update(turn.role):
                    self.updates[turn.role] += 1
                    self._after_update(turn.role)
        if self.student_steps > step:
            for config in self.trainer.lr_scheduler_configs:
                config.scheduler.step()  # type: ignore[call-arg]
        for name, count in self._counters().items():
            self.numbers.note(f"counts/{name}", float(count))
        self.numbers.log(self)

    def _parts(self, batch: Batch, step: int) -> list[list[Part]]:
        """The step's batches in parts that fit into memory, prompts encoded, with their random numbers.

        Raises:
            UserError: the objective needs negative prompts and the data has none.
        """
        needs_negatives = NEGATIVE_PROMPTS in self.objective.needs
        if needs_negatives and "negative_prompts" not in batch:
            raise UserError(
                f"{type(self.objective).__name__} is set to use negative prompts, and there are none: set "
                "data.negative_prompts, e.g. to assets/negative_prompts.txt"
            )
        size = getattr(getattr(self.trainer, "datamodule", None), "micro_batch_size", None)
        parts = cut(batch, self.num_batches, size)
        encode = self.generator.prompt_encoder.encode
        for part in chain.from_iterable(parts):
            part.random = StepRandom(self.seed, step, part.indices, self.device, part.number)
            part.inputs = Inputs(
                encode(part.prompts), encode(part.negatives or []) if needs_negatives else None
            )
        return parts

    def _student_turn(self, part: Part) -> None:
        """Draw samples, have them judged, backpropagate into the student; keep them without their graph."""
        assert part.inputs is not None and part.random is not None
        with self._sampler.turn() as student:
            sample = self.objective.sample(student, part.inputs, part.random, "student")
            # The terms are differentiated at the student's output first: that yields the norm of each term's
            # gradient, and whatever the objective did inside reaches no other weight.
            leaf = sample.x0.detach().requires_grad_()
            gradient = self._gradient_at(leaf, replace(sample, x0=leaf), part)
            if gradient is not None:
                self.manual_backward(part.share * (sample.x0 * gradient).sum())
        self.numbers.note("latents/mean", leaf.mean(), part.share)
        self.numbers.note("latents/std", leaf.std(), part.share)
        part.sample = _detached(sample)

    def _gradient_at(self, leaf: Tensor, sample: StudentSample, part: Part) -> Tensor | None:
        """Gradient of the student's terms at its samples; what calls the student itself goes on from there.

        None where no term depends on the samples.
        """
        calls = self.networks.student.calls_with_gradient
        terms = self._student_terms(sample, part)
        whole = torch.stack([*terms.values()]).sum()
        if len(terms) > 1 and (self.student_steps + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for name, term in terms.items():  # one by one only where the norms are logged
                self._note_norm(name, _gradient(term, leaf, keep=True), part.share)
        if self.networks.student.calls_with_gradient == calls:
            gradient = _gradient(whole, leaf)
        else:
            self.manual_backward(part.share * whole)
            gradient = None if leaf.grad is None else leaf.grad / part.share
        if len(terms) == 1:
            self._note_norm(next(iter(terms)), gradient, part.share)
        return gradient

    def _note_norm(self, name: str, gradient: Tensor | None, share: float) -> None:
        """Terms are means over the batch; times sqrt(B) their gradient's norm does not depend on its size."""
        if gradient is not None:
            self.numbers.note(f"gradient_at_output/{name}", gradient.norm() * len(gradient) ** 0.5, share)

    def _turn(self, role: str, part: Part) -> None:
        """Backpropagate the terms of another role, on samples without a gradient."""
        assert part.inputs is not None and part.random is not None
        if part.sample is None:
            with torch.no_grad(), self._sampler.turn() as student:
                part.sample = _detached(self.objective.sample(student, part.inputs, part.random, role))
        terms = self._objective_terms(role, self._with_real(part.sample, part), part)
        self.manual_backward(part.share * torch.stack([*terms.values()]).sum())

    def _update(self, role: str) -> bool:
        """Clip and step, unless the gradient is not finite; whether it was (the same on all processes)."""
        # Lightning counts the steps of the optimizers that it wraps: the student's
        wrapped = self.optimizers(use_pl_optimizer=role == "student")
        optimizers = dict(
            zip(self.optimization, wrapped if isinstance(wrapped, list) else [wrapped], strict=True)
        )
        for other, optimizer in optimizers.items():
            if other != role:  # what a backward pass left in weights whose turn it is not
                optimizer.zero_grad(set_to_none=True)
        suspects = partial(self._not_finite, role)
        finite, norm = self._guard.step(
            optimizers[role], self.optimization[role], role, self.student_steps, suspects
        )
        self.numbers.note(f"gradient_norm/{role}", norm)
        return finite

    def _after_update(self, role: str) -> None:
        """What follows an update that was not skipped."""
        if role == "student" and self.ema is not None:
            self.ema.update()
        self.objective.after_update(role, self.networks)

    def _student_terms(self, sample: StudentSample, part: Part) -> dict[str, Tensor]:
        """The objective's terms, the regression on given pictures, and image losses of weight above zero.

        Raises:
            UserError: two terms have one name.
        """
        assert part.random is not None
        sample = self._with_real(sample, part)
        terms = self._objective_terms("student", sample, part)
        if self.regression is not None:
            assert sample.real is not None
            pairs = self.regression.loss(sample.real, self.networks, self.steps.start)
            terms |= self._noted("student", {"pairs": pairs}, part.share)
        if self.image_terms is None:
            return terms
        whole = round(len(part.prompts) / part.share) * self.trainer.world_size
        images, numbers = self.image_terms.judge(
            sample.x0, part.prompts, part.random, whole, int(self.trainer.max_steps)
        )
        if both := terms.keys() & images.keys():
            raise UserError(f"objective and image losses both have a term {sorted(both)[0]!r}: rename one")
        self.numbers.note_all("image_losses", numbers, part.share, self.trainer.world_size)
        return terms | self._noted("student", images, part.share)

    def _objective_terms(self, role: str, sample: StudentSample, part: Part) -> dict[str, Tensor]:
        """The objective's terms for one role, noted together with its numbers."""
        assert part.random is not None
        self._tell(sample.told)
        terms = self.objective.loss(role, sample, self.networks, part.random)
        self.numbers.note_all("objective", terms.numbers, part.share, self.trainer.world_size)
        return self._noted(role, terms.losses, part.share)

    def _tell(self, count: int) -> None:
        """Tell student and fake score the number of steps that samples were drawn in; 0 is all."""
        if self.steps.counts:
            for network in (self.student, self.scores.full_copy):
                if network is not None:
                    tell(network, count or len(self.steps))

    def _noted(self, role: str, terms: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        """The terms; one that is not finite makes its gradient so: then every process skips the update."""
        for name, value in terms.items():
            self.numbers.note(f"train/{role}_{name}", value, share)
        # 0 · inf is NaN, which reaches every weight that the term depends on
        return {name: term * (1 + 0 * term.detach()) for name, term in terms.items()}

    @torch.no_grad()
    def _with_real(self, sample: StudentSample, part: Part) -> StudentSample:
        """The sample with the part's real pictures as latents, if the run has some."""
        if self.real_pictures is None:
            return sample
        places = self.real_pictures.settings.places(
            self.global_rank, self.trainer.world_size, part.place, part.passes
        )
        assert part.random is not None
        random = StepRandom(self.seed, part.random.step, places, self.device, part.number)
        images, captions, seeds = self.real_pictures.take(random.uniform("image_pair").cpu())
        latents, noise = images.to(self.device), None
        if seeds is None:
            latents = self.generator.decoder.encode(latents)
        else:
            noise = seeded_noise(seeds, latents.shape[1:], self.device)
        condition = self.generator.prompt_encoder.encode(captions)
        return replace(sample, real=Real(latents, condition, random, noise))

    def _not_finite(self, role: str) -> str:
        """Which terms of the update in progress are not finite, and its first prompts. Collective.

        Those of the first process that has such a term; where none has, the network's backward pass made it
        so.
        """
        kinds = (f"train/{role}_", *(["gradient_at_output/"] if role == "student" else []))
        names = [name.partition("/")[2] for name in self.numbers.nonfinite() if name.startswith(kinds)]
        terms = list(dict.fromkeys(name.removeprefix(f"{role}_") for name in names))
        found = from_every_rank((terms, self._prompts[:SHOWN_PROMPTS]))
        terms, shown = next((one for one in found if one[0]), found[0])
        what = f"terms: {', '.join(terms)}" if terms else "no term: in the network's backward pass"
        return f" ({what}; prompts: {', '.join(map(repr, shown))} …)"

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

    @torch.no_grad()
    def score_views(self, prompts: list[str], seeds: list[int], at: float = 0.5) -> dict[str, Tensor]:
        """Pictures [B, 3, H, W] in [0, 1] of what each role sees as x0.

        The student's sample, and what teacher and fake score, unguided, make of it when noised to ``at``
        times the schedule's length.
        """
        schedule, condition = self.networks.schedule, self.generator.prompt_encoder.encode(prompts)
        self._tell(0)
        with self.evaluation_weights():
            noise = partial(self.generator.noise, seeds)
            x0 = self.generator.latents(noise(), condition, fresh=noise)
        t = torch.full((len(x0),), int(at * schedule.num_timesteps), device=x0.device)
        again = seeded_noise([seed + 1_000_000 for seed in seeds], x0.shape[1:], x0.device)
        x_t = schedule.add_noise(x0, again, t)
        views = {"student": x0, "teacher x0": self.networks.teacher(x_t, t, condition).x0}
        if self.scores.with_fake_score:
            views["fake score x0"] = self.networks.fake_score(x_t, t, condition).x0
        return {name: self.generator.decoder.decode(latents) for name, latents in views.items()}

    def describe(self) -> dict[str, str]:
        """What is distilled and how, in words."""
        method = type(self.objective).__name__
        if (scale := getattr(self.objective, "guidance", None)) is not None:
            method += f", guidance scale {scale}"
        if self.image_losses is not None:
            method += "".join(f", {type(loss).__name__}" for loss in self.image_losses.losses)
        return {"Teacher": self.network_settings.teacher, "Objective": method}

    def memory_parts(self) -> dict[str, MemoryPart]:
        """What takes memory in training: name -> (values, bytes, whether trained); see `memory_by_part`."""
        assert self.student is not None
        kept = {role: item.state_per_weight(self.device) for role, item in self.optimization.items()}
        return memory_by_part(
            self.student, self.scores, self.objective, self.parts.vae,
            self.generator.prompt_encoder.text_encoders, self.image_terms, self.ema, kept,
        )  # fmt: skip

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _counters(self) -> dict[str, int]:
        counts = {f"{role}_steps": count for role, count in self.updates.items()}
        return {**counts, "skipped_updates": self.skipped_updates}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the moving average, the counters and what generate and export need to rebuild the student."""
        assert self.student is not None
        settings = self.network_settings
        checkpoint["ema"] = self.ema.state_dict() if self.ema is not None else None
        checkpoint["counters"] = self._counters()
        checkpoint["one_step"] = {
            "method": type(self.objective).__name__,
            "teacher": lasting_name(settings.teacher),
            **step_facts(settings.steps),
            "architecture": architecture(self.student),
            "weights": self.ema is not None,
            "student_steps": self.student_steps,
        }
        if settings.student_init is not None:
            checkpoint["one_step"]["student_init"] = lasting_name(settings.student_init)
        if self.real_pictures is not None:
            checkpoint["one_step"]["trained_on"] = self.real_pictures.trained_on
        if settings.student_lora is not None and self.student_base is not None:
            checkpoint["one_step"]["student_lora"] = settings.student_lora.adapter
            checkpoint["one_step"]["student_base"] = asdict(self.student_base)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over average and counters. Without an average in it, one starts from the student's weights.

        Raises:
            UserError: the checkpoint is of another model, or of an adapter on other weights.
        """
        # sharded checkpoints have no weights here: the strategy has loaded them already
        if "state_dict" in checkpoint:
            check_fit(checkpoint["state_dict"], self.state_dict())
        if self.student_base is not None and "student_base" in (stored := checkpoint.get("one_step", {})):
            StudentBase(**stored["student_base"]).check(self.student_base.hash, "the checkpoint")
        counters = checkpoint.get("counters", {})
        self.updates = {role: int(counters.get(f"{role}_steps", 0)) for role in self.updates}
        self._guard.skipped = int(counters.get("skipped_updates", 0))
        if self.ema is None:
            return
        if checkpoint.get("ema"):
            self.ema.load_state_dict(checkpoint["ema"])
        else:
            weights = checkpoint.get("state_dict") or self.state_dict()
            student = {k.removeprefix("student."): v for k, v in weights.items()}
            self.ema.shadow = {name: student[name].float().clone() for name in self.ema.shadow}


def _gradient(term: Tensor, leaf: Tensor, keep: bool = False) -> Tensor | None:
    """Gradient of a scalar at the student's samples; None where it does not depend on them."""
    if not term.requires_grad:
        return None
    return torch.autograd.grad(term, leaf, retain_graph=keep, allow_unused=True)[0]


def _detached(sample: StudentSample) -> StudentSample:
    x_t = None if sample.x_t is None else sample.x_t.detach()
    return replace(sample, x0=sample.x0.detach(), x_t=x_t)
