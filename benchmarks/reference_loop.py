"""A plain SwiftBrush training loop to measure against, as the public script (diffusers, accelerate) works.

Written from a description of that script: one network for both scores with PEFT's adapter switched off and
on, four score passes one after another (teacher and LoRA teacher, each with and without text), everything
eager, torch's Adam and diffusers' EMAModel at their defaults, text embeddings made beforehand, losses read
every step for a progress bar. Where the script keeps noises in the half type or writes 0.0047 for the
schedule's constant, this loop does as this project does, so that both compute the same numbers; random draws,
too, are made by its functions. The script knows no rectified flow; for models of it the loop reads networks
as such, and the second loss is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.timesteps import UniformTimesteps
from lightning_modules.networks.loading import load_parts, noise_schedule

ADAPTER = "fake_score"  # the project's name, so that adapters can be copied
Text = Mapping[str, Tensor]


class ReferenceLoop:
    """Student, scores, optimizers and average; `step` is one iteration of the script.

    Args:
        settings: `init_args` of the model in a configuration of `fit`, as plain data; `teacher` is a folder.
        null: the empty prompt, each [1, ...].
        precision: bfloat16 for autocast with a base in that type, or float32.
    """

    def __init__(
        self, settings: dict[str, Any], null: Text, device: torch.device, precision: torch.dtype
    ) -> None:
        self.settings, self.objective = settings, settings["objective"]["init_args"]
        self.device, self.precision = device, precision
        parts, lora = load_parts(settings["teacher"]), settings["fake_score"]["lora"]
        self.student = load_parts(settings["teacher"]).denoiser.to(device).train()
        self.scores = parts.denoiser.to(device, precision).requires_grad_(False)
        lora = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"])
        inject_adapter_in_model(lora, self.scores, ADAPTER)  # as diffusers' add_adapter, which PixArt has not
        self.adapter = {n: p for n, p in self.scores.named_parameters() if p.requires_grad}
        for parameter in self.adapter.values():
            parameter.data = parameter.data.float()
        student, fake_score = (settings[r]["optimizer"]["init_args"] for r in ("student", "fake_score"))
        self.student_adam = torch.optim.Adam(self.student.parameters(), **student)
        self.lora_adam = torch.optim.Adam(self.adapter.values(), **fake_score)
        self.ema = EMAModel(self.student.parameters(), decay=settings["ema_decay"])
        schedule = noise_schedule(parts.scheduler, parts.image_tokens, parts.backbone)
        self.alpha, self.sigma = schedule.alpha.to(device), schedule.sigma.to(device)
        self.flow = schedule.prediction_type == "flow"
        self.null = {name: tensor.to(device) for name, tensor in null.items()}
        self.autoencoder = parts.vae.to(device)  # kept in memory by the script, and not used in a step

    def copy_adapter(self, weights: Mapping[str, Tensor]) -> None:
        """Start from the adapter of another network of this kind."""
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                parameter.copy_(weights[name])

    def step(self, text: Text, random: StepRandom) -> dict[str, float]:
        """One iteration on B encoded prompts; the losses of both networks."""
        text = {name: tensor.to(self.device) for name, tensor in text.items()}
        null = {name: x.expand(random.batch_size, *x.shape[1:]) for name, x in self.null.items()}
        x0, student_loss = self._student_loss(text, null, random)
        student_loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.settings["student"]["clip_norm"])
        self.student_adam.step()
        self.student_adam.zero_grad()
        dropped = random.shared_uniform("prompt_dropout") < self.objective["prompt_dropout"]
        lora_loss = self._lora_loss(x0.detach(), null if dropped else text, random)
        lora_loss.backward()
        nn.utils.clip_grad_norm_(self.adapter.values(), self.settings["fake_score"]["clip_norm"])
        self.lora_adam.step()
        self.lora_adam.zero_grad()
        self.ema.step(self.student.parameters())
        return {"student": student_loss.detach().item(), "lora": lora_loss.detach().item()}

    def _student_loss(self, text: Text, null: Text, random: StepRandom) -> tuple[Tensor, Tensor]:
        z = random.normal("start", self._shape)
        start = torch.full((len(z),), self.settings["start_timestep"], device=self.device)
        output = self._predict(self.student, z, start, text)
        x0 = z - self._at(self.sigma, start) * output
        x0 = x0 if self.flow else x0 / self._at(self.alpha, start)
        with torch.no_grad():
            drawn = UniformTimesteps(self.objective["min_timestep"], self.objective["max_timestep"])
            t = drawn.draw(random.uniform("student_timestep")).to(self.device)
            noise = random.normal("student_noise", self._shape)
            x_t = self._at(self.alpha, t) * x0 + self._at(self.sigma, t) * noise
            self._switch_adapters(False)
            teacher = self._guided(x_t, t, text, null)
            self._switch_adapters(True)
            fake = self._guided(x_t, t, text, null)
            weight = self._at(self.sigma, t) ** 2 * (self._at(self.alpha, t) if self.flow else 1)
            gradient = torch.nan_to_num(weight * (teacher - fake))
        return x0, 0.5 * F.mse_loss(x0.float(), (x0 - gradient).detach().float())

    def _switch_adapters(self, on: bool) -> None:
        """As diffusers' enable_adapters and disable_adapters."""
        for module in self.scores.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)

    def _guided(self, x_t: Tensor, t: Tensor, text: Text, null: Text) -> Tensor:
        with_text = self._predict(self.scores, x_t, t, text)
        without = self._predict(self.scores, x_t, t, null)
        return without + self.objective["guidance_scale"] * (with_text - without)

    def _lora_loss(self, x0: Tensor, text: Text, random: StepRandom) -> Tensor:
        drawn = UniformTimesteps(0, len(self.alpha))
        t = drawn.draw(random.uniform("fake_timestep")).to(self.device)
        noise = random.normal("fake_noise", self._shape)
        alpha, sigma = self._at(self.alpha, t), self._at(self.sigma, t)
        output = self._predict(self.scores, alpha * x0 + sigma * noise, t, text)
        if self.flow:
            return F.mse_loss(output, noise - x0)
        return F.mse_loss(alpha * output.float(), alpha * noise)

    def _predict(self, network: nn.Module, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """Noise (velocity of a flow) [B, C, h, w], in float32; PixArt's variance is dropped."""
        t = 1000 * self.sigma[t] if self.flow else t
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
