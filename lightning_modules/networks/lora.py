"""Low-rank adapters (arXiv 2106.09685): put into a network, trained as a student, folded in, written.

A LoRA student (SwiftBrush v2, arXiv 2408.14176) is an adapter on frozen weights.
Checkpoints hold the adapter alone, a few per cent of the network. The base is named by its path, together
with a hash of its weights: a base that has changed since is refused rather than used.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import UserError, check_range
from lightning_modules.networks.backbones import Backbone
from lightning_modules.networks.model_names import model_name
from lightning_modules.networks.weights import difference, hide_from_state_dict

ADAPTER = "student"


@dataclass
class LoraSettings:
    """Low-rank adapter.

    Attributes:
        rank: rank r of the update B A.
        alpha: the update is scaled by alpha / rank.
        targets: names of the layers that get one (a name matches every layer that ends in it).
        dropout: probability of dropping an input of the adapter, in training.
    """

    rank: int = 64
    alpha: float = 108.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_v"])
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range("the LoRA rank", self.rank, 1, 8192)
        if not 0 < self.alpha < math.inf or not 0.0 <= self.dropout < 1.0 or not self.targets:
            raise UserError(
                f"LoRA settings rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, "
                f"targets={self.targets} can't work: alpha must be finite and above 0, dropout in "
                "[0, 1), targets not empty."
            )


@dataclass
class StudentLoraSettings(LoraSettings):
    """Low-rank adapter of the student, in the size of SwiftBrush v2.

    The paper doesn't name the layers; these are all projections of the attentions.

    Attributes:
        share_base: the frozen weights under the adapter are the teacher's own tensors, so that teacher, LoRA
            fake score and student hold them once; null: where the teacher is one of rectified flow. In shards
            each network has its own.
    """

    rank: int = 256
    alpha: float = 512.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    share_base: bool | None = None

    @property
    def adapter(self) -> dict[str, Any]:
        """The adapter's own settings, as plain data."""
        return {name: value for name, value in asdict(self).items() if name != "share_base"}


@dataclass(frozen=True)
class StudentBase:
    """The frozen weights under a LoRA student.

    Attributes:
        path: what ``load_student`` reads them from.
        hash: ``content_hash`` of the network.
    """

    path: str
    hash: str

    def check(self, hash_now: str, owner: str) -> None:
        """Raise a UserError unless these are the weights that the adapter in `owner` was trained on."""
        if hash_now != self.hash:
            raise UserError(
                f"{owner} holds a LoRA adapter trained on the weights of {self.path}, which are others now "
                f"(hash {hash_now[:12]}, then {self.hash[:12]}): put the former model back there"
            )


@dataclass(frozen=True)
class StudentAdapter:
    """The adapter of a LoRA student by itself.

    Attributes:
        base: the weights it belongs on.
        settings: its size and place.
        weights: by the names that they have in the network.
    """

    base: StudentBase
    settings: LoraSettings
    weights: Mapping[str, Tensor]


def inject_adapter(network: nn.Module, lora: LoraSettings, name: str) -> LoraModel:
    """Put an adapter into the network itself (float32 weights, B = 0: it computes what it did before).

    Names stay those of the network; the returned wrapper is needed for folding only.
    """
    layers = [n for n, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    unmatched = [t for t in lora.targets if not any(n == t or n.endswith("." + t) for n in layers)]
    if unmatched:
        short = {re.sub(r".*\.(?=[^.]*[^.\d])", "", name) for name in layers}  # to_q, to_out.0, conv1
        raise UserError(
            f"LoRA targets {unmatched} match no layer of the network. "
            f"Set the targets to some of: {', '.join(sorted(short))}."
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=lora.dropout
    )
    with _weights_that_count_as_real(network):
        wrapper = LoraModel(network, config, name)
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            for parameter in adapter_parameters(module):
                # trained weights are float32 on half-precision bases too
                parameter.data = parameter.data.float()
    return wrapper


@contextmanager
def _weights_that_count_as_real(network: nn.Module) -> Iterator[None]:
    """PEFT puts an adapter where its base is: the values it begins with would be lost on the meta device.

    One zero stands for all entries of such a weight inside.
    """
    meta = [
        (layer, name, parameter)
        for layer in network.modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for layer, name, parameter in meta:
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        setattr(layer, name, nn.Parameter(zeros, parameter.requires_grad))
    try:
        yield
    finally:
        for layer, name, parameter in meta:
            setattr(layer, name, parameter)


def adapter_parameters(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """Parameters of the adapter in one layer (without the base layer's)."""
    return [p for name, p in layer.named_parameters() if not name.startswith("base_layer.")]


def add_adapter(network: nn.Module, lora: LoraSettings) -> None:
    """Freeze the network and put a trained adapter into it; at the start it computes what it did before.

    Only the adapter stays in state dicts.
    """
    network.requires_grad_(False)
    inject_adapter(network, lora, ADAPTER)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    hide_from_state_dict(network, lambda name: name not in trained)


@torch.no_grad()
def fold(network: nn.Module, lora: LoraSettings, weights: Mapping[str, Tensor], owner: str) -> None:
    """Add an adapter's update alpha / rank * B A to the weights of a plain network, in place.

    Raises:
        UserError: the weights are not those of such an adapter on this network; names the `owner`.
    """
    wrapper = inject_adapter(network, lora, ADAPTER)
    adapter = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if found := difference(weights, adapter):
        raise UserError(f"The adapter in {owner} does not fit its base: {found}. Give another checkpoint.")
    for name, parameter in adapter.items():
        parameter.copy_(weights[name])
    wrapper.merge_and_unload()
    network.requires_grad_(False)


# --- files -------------------------------------------------------------------------------------------


def write_lora(
    adapter: StudentAdapter, backbone: Backbone, folder: Path, dtype: torch.dtype, told: Mapping[str, Any]
) -> None:
    """Write the adapter by itself; alpha / rank is folded into B, so that it is right at scale 1.

    Diffusers' `pytorch_lora_weights.safetensors`, if the pipeline reads it, else (PixArt) a folder of PEFT's
    for the transformer. ComfyUI reads both (`comfy/lora.py`: keys that begin with "transformer." or
    "base_model.model."), but of UNets the names of kohya's scripts alone, and of FLUX.2 not those of its
    blocks with one stream: `comfyui.safetensors`.

    Args:
        adapter: with its settings.
        backbone: the family of its base.
        folder: to be written.
        dtype: of the written weights.
        told: how the student is drawn with, for the files' metadata.
    """
    settings = adapter.settings
    config = {"r": settings.rank, "lora_alpha": settings.rank, "target_modules": list(settings.targets)}
    weights = {
        name.replace(f".{ADAPTER}.", "."): (
            tensor * (settings.alpha / settings.rank) if ".lora_B." in name else tensor
        ).detach().to("cpu", dtype).contiguous()
        for name, tensor in adapter.weights.items()
    }  # fmt: skip
    facts = {"format": "pt", **{name: str(value) for name, value in told.items()}}
    if not hasattr(backbone.pipeline_class, "save_lora_weights"):
        LoraConfig(**config, inference_mode=True).save_pretrained(str(folder))
        prefixed = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        save_file(prefixed, folder / "adapter_model.safetensors", metadata=facts)
        return
    part = backbone.denoiser[0]
    named: dict[str, Any] = {f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": config}
    backbone.pipeline_class.save_lora_weights(folder, **named)
    file = folder / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as written:
        own = written.metadata()
    save_file(load_file(file), file, metadata=own | facts)
    if (renamed := _for_comfyui(backbone)) is not None:
        save_file(renamed(weights), folder / "comfyui.safetensors", metadata=facts)


def _for_comfyui(backbone: Backbone) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None:
    """What names an adapter as ComfyUI reads it; None where it reads diffusers' names."""
    kinds = {UNet2DConditionModel: _kohya, Flux2Transformer2DModel: _black_forest}
    return kinds.get(backbone.denoiser[1])


def _kohya(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter of a UNet by the names of kohya's scripts, whose alpha is the rank."""
    renamed = {}
    for (layer, side), tensor in _by_layer(weights):
        stem = f"lora_unet_{layer.replace('.', '_')}"
        renamed[f"{stem}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor
        if side == "A":
            renamed[f"{stem}.alpha"] = torch.tensor(float(len(tensor)))
    return renamed


# Layers of FLUX.2: diffusers' names and its makers', which ComfyUI has behind "diffusion_model.", as in
# diffusers' `_convert_non_diffusers_flux2_lora_to_diffusers`. A second group is one of three layers in one.
_FLUX2 = {
    r"transformer_blocks\.(\d+)\.attn\.to_([qkv])": r"double_blocks.\1.img_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj": r"double_blocks.\1.txt_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
    r"transformer_blocks\.(\d+)\.ff\.linear_in": r"double_blocks.\1.img_mlp.0",
    r"transformer_blocks\.(\d+)\.ff\.linear_out": r"double_blocks.\1.img_mlp.2",
    r"transformer_blocks\.(\d+)\.ff_context\.linear_in": r"double_blocks.\1.txt_mlp.0",
    r"transformer_blocks\.(\d+)\.ff_context\.linear_out": r"double_blocks.\1.txt_mlp.2",
    r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
    r"single_transformer_blocks\.(\d+)\.attn\.to_out": r"single_blocks.\1.linear2",
    r"(double|single)_stream_modulation(_img|_txt|)\.linear": r"\1_stream_modulation\2.lin",
    r"time_guidance_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    r"x_embedder": "img_in", r"context_embedder": "txt_in",
    r"proj_out": "final_layer.linear", r"norm_out\.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip


def _black_forest(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter of FLUX.2 by its makers' names, to whom queries, keys and values are one layer.

    The adapters of three layers are one of three times the rank: A below each other, B as blocks.
    """
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, dict[str, Tensor]]] = {}
    for (layer, side), tensor in _by_layer(weights):
        match, name = next((m, to) for known, to in _FLUX2.items() if (m := re.fullmatch(known, layer)))
        stem = f"diffusion_model.{match.expand(name)}"
        if name.endswith(".qkv"):
            thirds.setdefault(stem, {}).setdefault(match[2], {})[side] = tensor
        else:
            renamed[f"{stem}.lora_{side}.weight"] = tensor
    for stem, parts in thirds.items():
        some = next(iter(parts.values()))
        absent = {"A": some["A"][:0], "B": some["B"][:, :0]}
        sides = [parts.get(one, absent) for one in "qkv"]
        renamed[f"{stem}.lora_A.weight"] = torch.cat([side["A"] for side in sides])
        renamed[f"{stem}.lora_B.weight"] = torch.block_diag(*(side["B"] for side in sides))
    return renamed


def _by_layer(weights: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Layer and side (A or B) of each tensor of an adapter, as diffusers names them."""
    for name, tensor in weights.items():
        layer, side = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", name).groups()  # type: ignore[union-attr]
        yield (layer, side), tensor


def lora_card(
    adapter: StudentAdapter,
    backbone: Backbone,
    output: str,
    call: str,
    scheduler: str = "DDIMScheduler",
    load: str = "",
) -> str:
    """The part of a model card about it, in Markdown; `scheduler` is the class of the student's.

    `load` and `call` are further arguments of opening and calling the pipeline.
    """
    base, settings = model_name(adapter.base.path), adapter.settings
    shown = Path(base.name).name if Path(base.name).is_absolute() else base.name
    arguments = "".join(f', {name}="{value}"' for name, value in base.options.items())
    # published text encoders often name another type than their networks, which do not work together
    pipeline = f'DiffusionPipeline.from_pretrained("{shown}"{arguments}{load}, torch_dtype=torch.float32)'
    comfy = "" if _for_comfyui(backbone) is None else "; for ComfyUI take `comfyui.safetensors`"
    note = ""
    if base.name.endswith(".ckpt"):
        note = f"`{shown}` is a checkpoint: load an `export` of it here.\n\n"
    if hasattr(backbone.pipeline_class, "save_lora_weights"):
        peft, adopt = "", f'pipe.load_lora_weights("{output}/lora")'
    else:
        peft = "from peft import PeftModel\n"
        adopt = f'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "{output}/lora")'
    return f"""
## The LoRA by itself

The folder `lora/` has the adapter alone (rank {settings.rank}), right at scale 1 in diffusers and in ComfyUI
(alpha {settings.alpha:g} is folded in){comfy}. It belongs on the weights it was trained on:

```python
import torch
from diffusers import {scheduler}, DiffusionPipeline
{peft}
pipe = {pipeline}
pipe.scheduler = {scheduler}.from_pretrained("{output}", subfolder="scheduler")
{adopt}
image = pipe(prompt="a red apple", {call}).images[0]
```

{note}"""
