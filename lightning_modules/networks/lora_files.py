"""Writes the adapter of a LoRA student by itself, in the format that its family's pipelines read.

Stable Diffusion and SDXL: diffusers' `pytorch_lora_weights.safetensors`, rank and alpha in its metadata. The
pipeline of PixArt reads no such file; its transformer takes a folder of PEFT's.
"""

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from lightning_modules.networks.backbones import Backbone
from lightning_modules.networks.lora import ADAPTER, StudentAdapter
from lightning_modules.networks.model_names import model_name


def write_lora(adapter: StudentAdapter, backbone: Backbone, folder: Path, dtype: torch.dtype) -> None:
    """Write the adapter's own A and B; readers scale their product by alpha / rank."""
    settings = adapter.settings
    config = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": list(settings.targets)}
    weights = {
        name.replace(f".{ADAPTER}.", "."): tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in adapter.weights.items()
    }
    if _has_lora_files(backbone):
        backbone.pipeline_class.save_lora_weights(
            folder, unet_lora_layers=weights, unet_lora_adapter_metadata=config
        )
        return
    LoraConfig(**config, inference_mode=True).save_pretrained(str(folder))
    named = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def lora_card(adapter: StudentAdapter, backbone: Backbone, output: str, call: str) -> str:
    """The part of a model card about it, in Markdown."""
    base, settings = model_name(adapter.base.path), adapter.settings
    shown = Path(base.name).name if Path(base.name).is_absolute() else base.name
    arguments = "".join(f', {name}="{value}"' for name, value in base.options.items())
    # published text encoders often name another type than their networks, which do not work together
    pipeline = f'DiffusionPipeline.from_pretrained("{shown}"{arguments}, torch_dtype=torch.float32)'
    note = ""
    if base.name.endswith(".ckpt"):
        note = f"`{shown}` is a checkpoint: load an `export` of it here.\n\n"
    if _has_lora_files(backbone):
        peft, load = "", f'pipe.load_lora_weights("{output}/lora")'
    else:
        peft = "from peft import PeftModel\n"
        load = f'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "{output}/lora")'
    return f"""
## The LoRA by itself

The folder `lora/` has the adapter alone (rank {settings.rank}, alpha {settings.alpha:g}: scale
{settings.alpha / settings.rank:g}, which it says itself). It belongs on the weights it was trained on:

```python
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
{peft}
pipe = {pipeline}
pipe.scheduler = DDIMScheduler.from_pretrained("{output}", subfolder="scheduler")
{load}
image = pipe("a red apple", {call}).images[0]
```

{note}"""


def _has_lora_files(backbone: Backbone) -> bool:
    return hasattr(backbone.pipeline_class, "save_lora_weights")
