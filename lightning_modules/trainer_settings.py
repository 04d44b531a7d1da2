"""Which settings of the Trainer two optimizers in turn can be trained with."""

import ctypes
from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator, XLAAccelerator
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.parallel import FullySharded


def is_slow_in_bf16(accelerator: str) -> bool:
    """Whether a run would be on a processor without units for bf16: about 40 times slower than in float32.

    Args:
        accelerator: `trainer.accelerator`; "auto" is the processor where there is nothing else.
    """
    others = (CUDAAccelerator, MPSAccelerator, XLAAccelerator)
    is_auto = accelerator == "auto" and not any(kind.is_available() for kind in others)
    on_processor = is_auto or "cpu" in accelerator.lower()
    has_units = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return on_processor and not has_units


def check_trainer(trainer: Trainer) -> None:
    """Refuse what doesn't work with a UserError; have DDP leave gradients alone."""
    precision = str(trainer.precision)
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(
            f"trainer.precision is {precision}: use 32-true or bf16-mixed. fp16 needs one loss scaler per "
            "optimizer, and x0 = (z - sigma eps) / alpha overflows it; trained weights are kept in float32."
        )
    if trainer.gradient_clip_val:
        raise UserError(
            "trainer.gradient_clip_val clips all weights as one, but each role is clipped by itself: leave "
            "it out and set clip_norm of model.init_args.student and model.init_args.fake_score"
        )
    if trainer.accumulate_grad_batches != 1:
        raise UserError(
            "trainer.accumulate_grad_batches is of no use, since data.batch_size is the batch of a whole "
            "update: leave it out and set data.init_args.micro_batch_size to what fits into memory"
        )
    if isinstance(trainer.strategy, DDPStrategy):
        # gradients are averaged by the module, see parallel.py: there is nothing to search
        trainer.strategy._ddp_kwargs |= {"find_unused_parameters": False, "static_graph": False}
    sharding = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
    if sharding and not isinstance(trainer.strategy, FullySharded):
        raise UserError(
            f"trainer.strategy is {type(trainer.strategy).__name__}, which can't train two networks in turn; "
            "for shards take configs/trainer/fsdp.yaml (strategy: lightning_modules.parallel.FullySharded)"
        )


def frozen_dtype(trainer: Trainer | None, wanted: str = "auto") -> torch.dtype:
    """Type of weights that are not trained: float32, bfloat16 (a UserError in shards), or auto.

    Auto is bfloat16 where a bf16 run is on an accelerator: processors without bf16 units are slow with it.
    Where weights are in few bits (8bit, 4bit), it is the type of the others.
    """
    # a group of shards has one type, and that of trained weights is float32
    sharded = trainer is not None and isinstance(trainer.strategy, FullySharded)
    if sharded and wanted not in ("auto", "float32"):
        raise UserError(f"frozen_weights is {wanted}, but shards hold trained weights too: set it to float32")
    if wanted in ("float32", "bfloat16"):
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if sharded or trainer is None or str(trainer.precision) != "bf16-mixed":
        return torch.float32
    return torch.float32 if trainer.strategy.root_device.type == "cpu" else torch.bfloat16


def cast_frozen(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Cast in place all floating-point parameters that require no gradient."""
    for module in modules:
        for parameter in module.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def channels_last(networks: Iterable[nn.Module]) -> None:
    """Have UNets keep channels in the last place in memory, where a processor's convolutions are faster.

    Trained weights stay as they are: fused optimizers take weights and the states of a checkpoint as rows of
    numbers in one order. Kernels of one pixel have the same order in both layouts.
    """
    for network in networks:
        if not isinstance(network, UNet2DConditionModel):
            continue
        for weight in network.parameters():
            if weight.ndim == 4 and (not weight.requires_grad or weight.shape[2:] == (1, 1)):
                weight.data = weight.data.to(memory_format=torch.channels_last)
        network.conv_in.register_forward_pre_hook(_with_channels_last)


def _with_channels_last(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)


def keep_freed_memory() -> None:
    """Let the process keep memory that it frees, for the next tensors; other C libraries are left alone.

    By default the GNU C library gives large blocks back at once, and every step of a training has to get the
    same pages from the system again. The most that is in use at a time stays the same.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h of the GNU C library
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 32 * 2**20)  # the library takes no more
        mallopt(trim_threshold, 2**31 - 1)
