"""A plain SwiftBrush training loop to measure against, as the public script (diffusers, accelerate) works.

Written from a description of that script: one network for both scores with PEFT's adapter switched off and
on, four score passes one after another (teacher and LoRA teacher, each with and without text),
everything eager, torch's Adam and diffusers' EMAModel at their defaults, text embeddings made beforehand,
losses read every step for a progress bar. Where the script keeps noises in the half type or writes 0.0047 for
the schedule's constant, this loop does as this project does, so that both compute the same numbers; random
draws, too, are made by its functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.timesteps import UniformTimesteps

ADAPTER = "fake_score"  # the project's name, so that adapters can be copied
Text = Mapping[str, Tensor]


@dataclass
class Settings:
    """What `emoji_swiftbrush_official.yaml` says, without the project's classes."""

    start_timestep: int
    guidance_scale: float
    timesteps: tuple[int, int]
    prompt_dropout: float
    rank: int
    alpha: float
    targets: list[str]
    student_adam: dict[str, Any]
    lora_adam: dict[str, Any]
    clip_norm: float
    ema_decay: float

    @classmethod
    def of(cls, model: dict[str, Any]) -> Settings:
        """From the ``init_args`` of the model in a configuration of `fit`."""
        objective, lora = model["objective"]["init_args"], model["lora"]
        return cls(
            model["start_timestep"], objective["guidance_scale"],
            (objective["min_timestep"], objective["max_timestep"]), objective["prompt_dropout"],
            lora["rank"], lora["alpha"], lora["targets"],
            model["student"]["optimizer"]["init_args"], model["fake_score"]["optimizer"]["init_args"],
            model["student"]["clip_norm"], model["ema_decay"],
        )  # fmt: skip


class ReferenceLoop:
    """Student, scores, optimizers and average; `step` is one iteration of the script.

    Args:
        student, scores: two copies of the teacher's network.
        alphas_cumprod: of its schedule, [T].
        null: the empty prompt, each [1, ...].
        precision: bfloat16 for autocast with a base in that type, or float32.
    """

    def __init__(
        self, student: nn.Module, scores: nn.Module, alphas_cumprod: Tensor, null: Text, settings: Settings,
        device: torch.device, precision: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.settings, self.device, self.precision = settings, device, precision
        self.student = student.to(device).train()
        self.scores = scores.to(device, precision).requires_grad_(False)
        lora = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.targets)
        inject_adapter_in_model(lora, self.scores, ADAPTER)  # as diffusers' add_adapter, which PixArt has not
        self.adapter = {n: p for n, p in self.scores.named_parameters() if p.requires_grad}
        for parameter in self.adapter.values():
            parameter.data = parameter.data.float()
        self.student_adam = torch.optim.Adam(self.student.parameters(), **settings.student_adam)
        self.lora_adam = torch.optim.Adam(self.adapter.values(), **settings.lora_adam)
        self.ema = EMAModel(self.student.parameters(), decay=settings.ema_decay)
        self.alpha = alphas_cumprod.sqrt().float().to(device)
        self.sigma = (1 - alphas_cumprod).sqrt().float().to(device)
        self.null = {name: tensor.to(device) for name, tensor in null.items()}
        self.autoencoder: nn.Module | None = None  # kept in memory by the script, and not used in a step
        self.operations: dict[str, int] | None = None

    def copy_adapter(self, weights: Mapping[str, Tensor]) -> None:
        """Start from the adapter of another network of this kind."""
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                parameter.copy_(weights[name])

    def step(self, text: Text, random: StepRandom) -> dict[str, float]:
        """One iteration on B encoded prompts; the losses of both networks."""
        text = {name: tensor.to(self.device) for name, tensor in text.items()}
        count = random.batch_size
        null = {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self.null.items()}
        x0, student_loss = self._student_loss(text, null, random)
        with self._counted("student, forward and backward"):
            student_loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip_norm)
        self.student_adam.step()
        self.student_adam.zero_grad()
        dropped = random.shared_uniform("prompt_dropout") < self.settings.prompt_dropout
        with self._counted("LoRA teacher's update"):
            lora_loss = self._lora_loss(x0.detach(), null if dropped else text, random)
            lora_loss.backward()
        nn.utils.clip_grad_norm_(self.adapter.values(), self.settings.clip_norm)
        self.lora_adam.step()
        self.lora_adam.zero_grad()
        self.ema.step(self.student.parameters())
        return {"student": student_loss.detach().item(), "lora": lora_loss.detach().item()}

    def _student_loss(self, text: Text, null: Text, random: StepRandom) -> tuple[Tensor, Tensor]:
        settings = self.settings
        z = random.normal("start", self._shape)
        start = torch.full((len(z),), settings.start_timestep, device=self.device)
        with self._counted("student, forward and backward"):
            output = self._predict(self.student, z, start, text)
        x0 = (z - self._at(self.sigma, start) * output) / self._at(self.alpha, start)
        with torch.no_grad():
            t = UniformTimesteps(*settings.timesteps).draw(random.uniform("student_timestep")).to(self.device)
            noise = random.normal("student_noise", self._shape)
            x_t = self._at(self.alpha, t) * x0 + self._at(self.sigma, t) * noise
            self._switch_adapters(False)
            with self._counted("teacher, two evaluations"):
                teacher = self._guided(x_t, t, text, null)
            self._switch_adapters(True)
            with self._counted("LoRA teacher, two evaluations"):
                fake = self._guided(x_t, t, text, null)
            gradient = torch.nan_to_num(self._at(self.sigma, t) ** 2 * (teacher - fake))
        return x0, 0.5 * F.mse_loss(x0.float(), (x0 - gradient).detach().float())

    def _switch_adapters(self, on: bool) -> None:
        """As diffusers' enable_adapters and disable_adapters."""
        for module in self.scores.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)

    def _guided(self, x_t: Tensor, t: Tensor, text: Text, null: Text) -> Tensor:
        with_text = self._predict(self.scores, x_t, t, text)
        without = self._predict(self.scores, x_t, t, null)
        return without + self.settings.guidance_scale * (with_text - without)

    def _lora_loss(self, x0: Tensor, text: Text, random: StepRandom) -> Tensor:
        timesteps = UniformTimesteps(0, len(self.alpha))
        t = timesteps.draw(random.uniform("fake_timestep")).to(self.device)
        noise = random.normal("fake_noise", self._shape)
        alpha, sigma = self._at(self.alpha, t), self._at(self.sigma, t)
        output = self._predict(self.scores, alpha * x0 + sigma * noise, t, text)
        return F.mse_loss(alpha * output.float(), alpha * noise)

    def _predict(self, network: nn.Module, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """Noise [B, C, h, w], in float32; PixArt's variance is dropped."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            output: Tensor = network(x_t, timestep=t, **text, return_dict=False)[0]
        return output[:, : x_t.shape[1]].float()

    @property
    def _shape(self) -> tuple[int, int, int]:
        config: Any = self.student.config
        return config.in_channels, config.sample_size, config.sample_size

    @staticmethod
    def _at(table: Tensor, t: Tensor) -> Tensor:
        return table[t].view(-1, 1, 1, 1)

    @contextmanager
    def _counted(self, part: str) -> Iterator[None]:
        """Add the operations made inside to those of a part of the step, if `operations` is a dictionary."""
        if self.operations is None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.operations[part] = self.operations.get(part, 0) + counter.get_total_flops()
