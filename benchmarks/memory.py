"""What fits where: memory of a distillation by part, and the largest micro-batch that a GPU has room for.

    python benchmarks/memory.py                    the table in docs/performance.md; computed on any machine
    python benchmarks/memory.py --parts            teachers of rectified flow: adapters on one base, by part
    python benchmarks/memory.py --models sd35      what fits where of these, too; minutes each
    python benchmarks/memory.py --few-bits assets/emoji-sd      errors of a network in 8 and 4 bits
    python benchmarks/memory.py --models sd21 --output memory.json

Nothing is allocated: the networks are built on PyTorch's meta device from the published configurations, and
the two turns of an update run there, forward and backward, with the casts of bf16 autocast on a GPU and fused
attention. Weights and optimizer states are counted; activations and gradients are the largest sum of tensors
that are alive at once. Left out is what libraries take for themselves (workspaces, fragmentation); `ROOM`
leaves something for them.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import GIB, parser, table, write
from benchmarks.models import MODELS, ROOT
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.networks.backbones.calling import run_network
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.lora import LoraSettings, StudentLoraSettings, add_adapter
from lightning_modules.networks.quantized import quantize_frozen
from lightning_modules.networks.roles import ScoreModels
from lightning_modules.parallel import blocks

GPUS = {16: 15.6, 24: 23.6, 40: 39.4, 80: 79.1, 141: 139.8}
"""GiB of cards that are sold as so many GB."""
ROOM = 1.0, 0.05
"""What we leave free: GiB for CUDA and its libraries, and a share of the rest for fragmentation."""
ADAM, EIGHT_BIT = 8.0, 2 * (1 + 4 / 256)
"""Bytes a weight; bitsandbytes' Adam8bit has two bytes, and a scale for each block of 256."""
STUDENTS: dict[str, dict[str, Any]] = {
    "all weights, average": {"ema": True},
    "all weights": {},
    "all weights, 8-bit Adam": {"state": EIGHT_BIT},
    "LoRA, rank 256": {"lora": True},
}
FLOWS = ("sana06", "sana", "sd35", "klein", "zimage", "flux", "qwen")
ONE_BASE = {"two adapters on one base, rank 64": {"shared": True, "lora": True}}
"""As in configs/base/flow.yaml."""
BLOCK = 512  # CUDA's allocator rounds up to so many bytes


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that are alive among those made inside; views add nothing.

    Attributes:
        live: bytes now.
        history: bytes after each operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.history: list[int] = []
        self._known: set[int] = set()  # addresses of storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), made_inside=False)  # weights, say
        result = func(*args, **(kwargs or {}))
        self._note(result, made_inside=True)
        self.history.append(self.live)
        return result

    def _note(self, tree: Any, made_inside: bool) -> None:
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)):
            if (address := storage._cdata) not in self._known:
                size = -(-storage.nbytes() // BLOCK) * BLOCK if made_inside else 0
                self._known.add(address)
                self.live += size
                weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._known.remove(address)
        self.live -= size


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """The casts of bf16 autocast on a GPU and its fused attention, not to be had for the meta device.

    Weights' casts are not cached, as under Lightning. The functions of `torch.nn.functional` are exchanged: a
    mode of PyTorch would be off in backward passes, where checkpoints run parts of the forward pass again.
    """

    def casting(name: str, dtype: torch.dtype) -> Callable[..., Tensor]:
        function = getattr(F, name)
        return lambda *args, **kwargs: function(*cast(args, dtype), **cast(kwargs, dtype))

    def attention(*args: Tensor, attn_mask: Tensor | None = None, **unused: Any) -> Tensor:
        query, key, value, mask = cast((*args[:3], attn_mask), torch.bfloat16)
        if mask is not None:
            mask = mask.expand(*query.shape[:-1], key.shape[-2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, mask, torch.is_grad_enabled())[0]

    functions = {name: casting(name, torch.bfloat16) for name in ("linear", "conv2d")}
    functions |= {name: casting(name, torch.float32) for name in ("group_norm", "layer_norm")}
    with patch.multiple(F, **functions, scaled_dot_product_attention=attention):
        yield


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in another type."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


class Networks(NamedTuple):
    """What `fit` makes of a model: trained weights in float32, frozen ones in bfloat16."""

    student: nn.Module
    scores: ScoreModels


def build(name: str, lora: bool = False, checkpointing: bool = False) -> Networks:
    """Student, and teacher with a LoRA fake score of rank 64."""
    with torch.device("meta"):
        base = MODELS[name].network(**MODELS[name].shape)
        student = copy.deepcopy(base).requires_grad_(True).train()
        if lora:
            add_adapter(student, StudentLoraSettings(64, 64) if name in FLOWS else StudentLoraSettings())
        scores = ScoreModels(base, NoiseSchedule(torch.ones(1000, device="cpu")), LoraSettings(64, 108))
        for network in (student, scores):
            if checkpointing:
                network.enable_gradient_checkpointing()
            for parameter in network.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
    return Networks(student, scores)


def fixed(
    name: str, lora: bool = False, ema: bool = False, state: float = ADAM, shared: bool = False
) -> dict[str, float]:
    """Bytes of each part that stays, without text encoders.

    Args:
        shared: the student's base is the teacher.
        state: bytes that the student's optimizer keeps of a weight.
    """
    made = build(name, lora)

    def size(network: nn.Module, trained: bool) -> int:
        found = [p for p in network.parameters() if p.requires_grad is trained]
        found += [] if trained else network.buffers()  # positions, in float32
        return sum(x.numel() * x.element_size() for x in found)

    student, fake = size(made.student, True), size(made.scores, True)
    return {
        "student": student, "student's base": 0 if shared else size(made.student, False),
        "teacher": size(made.scores, False),
        "fake score": fake, "moving average": student if ema else 0,
        "optimizer states": student / 4 * state + fake / 4 * ADAM,
        "autoencoder": 2 * MODELS[name].autoencoder,
    }  # fmt: skip


def turns(name: str, batch: int, lora: bool = False, checkpointing: bool = False) -> list[int]:
    """Bytes of activations and gradients after each operation of an update."""
    model, (student, scores) = MODELS[name], build(name, lora, checkpointing)
    with LiveMemory() as memory, gpu_autocast(), torch.device("meta"):
        noise, t, text = model.inputs(batch)
        *_, twice = model.inputs(2 * batch)
        x0 = run_network(student, noise, t, text)
        with torch.no_grad():  # both scores with guidance: 2 B samples in one call
            x_t, both = torch.cat([x0, x0]), torch.cat([t, t])
            with scores.adapter(False):
                teacher = run_network(scores.base, x_t, both, twice).float()
            fake = run_network(scores.base, x_t, both, twice).float()
            gradient = (teacher - fake).chunk(2)[0]
            del x_t, both, teacher, fake
        (x0.float() * gradient).mean().backward()
        del x0, gradient
        student.zero_grad(set_to_none=True)  # before the other turn begins
        output = run_network(scores.base, noise, t, text)
        output.float().square().mean().backward()
        scores.zero_grad(set_to_none=True)
    return memory.history


class Needs:
    """Bytes of activations and gradients over an update, as a function of the batch.

    The operations are the same for any batch above one (a batch of one needs fewer copies), so after each of
    them the memory is a + b B; two batches tell a and b. The largest sum is not quite proportional to B: it
    moves to other operations.

    Args:
        two, four: bytes after each operation, for batches of two and four.
    """

    def __init__(self, two: Iterable[int], four: Iterable[int]) -> None:
        first, second = np.array(two, np.float64), np.array(four, np.float64)
        self.constant, self.per_sample = 2 * first - second, (second - first) / 2

    def peak(self, batch: int) -> float:
        """Bytes at most."""
        return float((self.constant + self.per_sample * batch).max())

    def largest(self, size: float) -> int:
        """Samples that go into so many bytes; 0 if not even one."""
        if self.constant.max() > size:
            return 0
        growing = self.per_sample > 0
        return max(0, int(((size - self.constant[growing]) / self.per_sample[growing]).min()))


def room(gib: float) -> float:
    """Bytes of a card that training may take."""
    return (gib - ROOM[0]) * (1 - ROOM[1]) * GIB


def rows(model: str) -> list[dict[str, Any]]:
    """All ways of training one model, without and with gradient checkpointing."""
    students = ONE_BASE if model in FLOWS else STUDENTS
    loras = {changes.get("lora", False) for changes in students.values()}
    ways = [(lora, checkpointing) for lora in sorted(loras) for checkpointing in (False, True)]
    needs = {way: Needs(*(turns(model, batch, *way) for batch in (2, 4))) for way in ways}
    found = []
    for name, changes in students.items():
        parts, lora = fixed(model, **changes), changes.get("lora", False)
        constant = sum(parts.values())
        row: dict[str, Any] = {"model": model, "student": name, "parts": parts, "gib": constant / GIB}
        row["weights"] = parameters(model)
        row["batch 1"] = [(constant + needs[lora, way].peak(1)) / GIB for way in (False, True)]
        row["largest"] = {
            gb: [needs[lora, way].largest(room(gib) - constant) for way in (False, True)]
            for gb, gib in GPUS.items()
        }
        found.append(row)
    return found


def parameters(model: str) -> int:
    """Of the denoiser."""
    with torch.device("meta"):
        return sum(p.numel() for p in MODELS[model].network(**MODELS[model].shape).parameters())


def markdown(found: list[dict[str, Any]]) -> str:
    """GiB in all for one sample, then what fits; without / with gradient checkpointing."""
    head = ["", "10⁹ weights", "student", "weights and states", "batch 1", *(f"{gb} GB" for gb in GPUS)]
    cells = [
        [
            MODELS[row["model"]].title, f"{row['weights'] / 1e9:.2f}", row["student"], f"{row['gib']:.1f}",
            " / ".join(f"{gib:.1f}" for gib in row["batch 1"]),
            *(" / ".join(str(batch or "–") for batch in row["largest"][gb]) for gb in GPUS),
        ]
        for row in found
    ]  # fmt: skip
    return table(head, cells)


def parts_of_flows() -> tuple[str, dict[str, Any]]:
    """GiB of what stays, of teacher, LoRA fake score and LoRA student on one base, and of gradients."""
    head = ["", "10⁹ weights", "base, bf16", "student", "fake score", "optimizer states", "gradients",
            "autoencoder", "in all", "base in 8 / 4 bits"]  # fmt: skip
    found, lines = {}, []
    for name in FLOWS:
        parts = fixed(name, lora=True, shared=True)
        base, student, fake = (parts[part] for part in ("teacher", "student", "fake score"))
        sizes = [base, student, fake, parts["optimizer states"], max(student, fake), parts["autoencoder"]]
        sizes.append(sum(sizes))
        few = [base - 2 * linear_in_blocks(name) * (1 - share) for share in (8.125 / 16, 4.5 / 16)]
        found[name] = {"weights": parameters(name), "bytes": dict(zip(head[2:], sizes))}
        lines.append([
            MODELS[name].title.partition(",")[0], f"{parameters(name) / 1e9:.2f}",
            *(f"{size / GIB:.2f}" for size in sizes), " / ".join(f"{size / GIB:.1f}" for size in few),
        ])  # fmt: skip
    return table(head, lines), found


def linear_in_blocks(name: str) -> int:
    """Weights that `quantize_frozen` takes."""
    with torch.device("meta"):
        network = MODELS[name].network(**MODELS[name].shape)
    layers = [layer for block in blocks(network) for layer in block.modules()]
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))


@torch.no_grad()
def errors_in_few_bits(path: str) -> str:
    """How far a network with linear layers in few bits is from itself in float32, relative, by timestep.

    At normal noise and captions of the bundled evaluation set.
    """
    parts, captions = load_parts(path), (ROOT / "assets/eval_captions.txt").read_text().splitlines()[:16]
    condition = parts.backbone.prompt_encoder(parts).encode(captions)
    noise = torch.randn(16, *parts.latent_shape, generator=torch.Generator().manual_seed(0))
    times = [torch.full((16,), t) for t in (20, 500, 999)]

    def outputs() -> list[Tensor]:
        return [run_network(parts.denoiser, noise, t, condition) for t in times]

    exact, rows = outputs(), []
    for bits in (8, 4):
        parts.denoiser = load_parts(path).denoiser.requires_grad_(False)
        quantize_frozen([parts.denoiser], bits)
        found = [(x - y).norm() / y.norm() for x, y in zip(outputs(), exact, strict=True)]
        rows.append([f"{bits} bits", *(f"{float(error):.2%}" for error in found)])
    return table(["", "t = 20", "t = 500", "t = 999"], rows)


def main() -> None:
    """Compute and print."""
    reader, names = parser(__doc__), ["sd15", "sd21", "sdxl", "pixart"]
    reader.add_argument("--models", nargs="+", choices=[*names, *FLOWS, "sd21_small"], default=names)
    reader.add_argument("--few-bits", metavar="MODEL", help="errors of its network in 8 and 4 bits instead")
    reader.add_argument(
        "--parts", action="store_true", help="teachers of rectified flow on one base, by part"
    )
    given = reader.parse_args()
    if given.parts:
        write(*parts_of_flows(), given.output)
        return
    if given.few_bits:
        write(errors_in_few_bits(given.few_bits), None, given.output)
        return
    found = [row for model in tqdm(given.models, unit="model") for row in rows(model)]
    write(markdown(found), found, given.output)


if __name__ == "__main__":
    main()
