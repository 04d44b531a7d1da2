"""Noise schedules: α_t and σ_t of the forward process x_t = α_t x0 + σ_t ε."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.broadcast import at_least_float32, expand_like
from lightning_modules.diffusion.prediction import Prediction, check_prediction_type


class NoiseSchedule(nn.Module):
    """A variance-preserving schedule: α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t), t = 0 … T − 1 (DDPM, arXiv 2006.11239).

    The constants are computed in float64 and served in float32. They follow the module from device to device
    but never its dtype: ᾱ in bfloat16 would be off by up to 0.4 %. They are not part of the state dict.

    Args:
        alphas_cumprod: ᾱ, shape [T], each in [0, 1], not increasing.
        prediction_type: what the network's output stands for, one of ``prediction.PREDICTION_TYPES``.

    Raises:
        ValueError: on an unknown prediction type or constants that are not a schedule.
    """

    alpha: Tensor
    sigma: Tensor

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        super().__init__()
        check_prediction_type(prediction_type)
        table = alphas_cumprod.detach().to("cpu", torch.float64, copy=True)
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(
                f"alphas_cumprod must be one number per timestep, got shape {tuple(table.shape)}"
            )
        if not bool(((table >= 0) & (table <= 1)).all()) or bool((table.diff() > 0).any()):
            raise ValueError("alphas_cumprod must lie in [0, 1] and not increase with the timestep")
        self.prediction_type = prediction_type
        self._table = table  # a plain attribute, so that no cast of the module reaches it
        self._fill(torch.device("cpu"))

    def _fill(self, device: torch.device) -> None:
        alpha, sigma = self._table.sqrt(), (1 - self._table).sqrt()
        self.register_buffer("alpha", alpha.to(device, torch.float32), persistent=False)
        self.register_buffer("sigma", sigma.to(device, torch.float32), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseSchedule:
        """Follow device moves; refill after them, which undoes casts such as ``.half()``."""
        super()._apply(fn, recurse)
        self._fill(self.alpha.device)
        return self

    def network_time(self, t: Tensor) -> Tensor:
        """What networks are told in place of ``t`` [B], before what a family makes of it: ``t`` itself."""
        return t

    @property
    def num_timesteps(self) -> int:
        """T; timesteps run from 0 (nearly clean) to T − 1 (nearly noise)."""
        return len(self._table)

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ, [T], float64, on the CPU."""
        return self._table.clone()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(α_t, σ_t) for integer timesteps ``t`` [B], each [B] in float32.

        Raises:
            ValueError: if ``t`` is not a vector of integers.
        """
        if t.ndim != 1 or t.is_floating_point():
            raise ValueError(f"timesteps must be integers [B], got {t.dtype} of shape {tuple(t.shape)}")
        t = t.to(self.alpha.device)
        return self.alpha[t], self.sigma[t]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = α_t x0 + σ_t ε, [B, …], in float32 at least; differentiable in ``x0`` and ``noise``.

        Raises:
            ValueError: if ``x0`` and ``noise`` differ in shape or ``t`` does not fit the batch.
        """
        if x0.shape != noise.shape:
            raise ValueError(f"x0 has shape {tuple(x0.shape)}, the noise {tuple(noise.shape)}")
        x0, noise = at_least_float32(x0), at_least_float32(noise)
        alpha, sigma = self.alpha_sigma(t)
        return expand_like(alpha, x0) * x0 + expand_like(sigma, x0) * noise

    def read(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The network's ``output`` at (``x_t``, ``t``) as a :class:`Prediction` of this schedule's type."""
        alpha, sigma = self.alpha_sigma(t)
        return Prediction(output, self.prediction_type, x_t, alpha, sigma)


class RectifiedFlow(NoiseSchedule):
    """Rectified flow (arXiv 2209.03003): α_t = 1 − σ_t, and σ_t = shift(u), u = (t + 1) / T, for real t.

    Timesteps 0 … T − 1 are those of diffusers' flow schedulers from the last to the first, so that σ = 1 at
    T − 1. The shift moves them towards noise (arXiv 2403.03206, eq. 23); one that depends on the resolution,
    with parameter μ, is a shift by e^μ. ``terminal`` then stretches the range so that σ_0 is this number.

    Args:
        num_timesteps: T.
        shift: s in shift(u) = s u / (1 + (s − 1) u), above 0.
        terminal: least σ, in [0, 1); None: what the shift gives.

    Raises:
        ValueError: on values out of range.
    """

    def __init__(self, num_timesteps: int = 1000, shift: float = 1.0, terminal: float | None = None) -> None:
        nn.Module.__init__(self)
        if num_timesteps < 1 or shift <= 0 or not 0 <= (terminal or 0.0) < 1:
            raise ValueError(f"no flow schedule has T={num_timesteps}, shift={shift}, terminal={terminal}")
        self.prediction_type = "flow"
        self.steps, self.shift = num_timesteps, shift
        first = (num_timesteps - 1) / (num_timesteps + shift - 1)  # α_0 without a terminal
        self.stretch = 1.0 if terminal is None else (1 - terminal) / first
        self._fill(torch.device("cpu"))

    def _fill(self, device: torch.device) -> None:
        alpha, sigma = self._at(torch.arange(self.steps, dtype=torch.float64))
        self.register_buffer("alpha", alpha.to(device, torch.float32), persistent=False)
        self.register_buffer("sigma", sigma.to(device, torch.float32), persistent=False)

    @property
    def num_timesteps(self) -> int:
        """T; timesteps run from 0 (nearly clean) to T − 1 (noise)."""
        return self.steps

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # 1 − shift(u) and shift(u) with u = (t + 1) / T, without the cancellation of 1 − σ near σ = 1
        whole = self.steps + (self.shift - 1) * (t + 1)
        alpha, sigma = (self.steps - 1 - t) / whole, self.shift * (t + 1) / whole
        return (alpha, sigma) if self.stretch == 1 else (self.stretch * alpha, 1 - self.stretch * alpha)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(α_t, σ_t) for real timesteps ``t`` [B] from −1 (σ = 0, if no terminal is set) to T − 1, float32.

        Raises:
            ValueError: if ``t`` is not a vector.
        """
        if t.ndim != 1:
            raise ValueError(f"timesteps must be [B], got shape {tuple(t.shape)}")
        return self._at(t.to(self.alpha.device, torch.float32))

    def timestep(self, sigma: Tensor) -> Tensor:
        """The real t [B] at which σ_t is ``sigma`` [B], the inverse of :meth:`alpha_sigma`."""
        alpha = (1 - at_least_float32(sigma)) / self.stretch
        return (self.steps * (1 - alpha) / (1 + (self.shift - 1) * alpha)) - 1

    def network_time(self, t: Tensor) -> Tensor:
        """T σ_t, [B], float32."""
        return self.steps * self.alpha_sigma(t)[1]
