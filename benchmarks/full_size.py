"""Peak memory of two updates at full size on the CPU, measured and computed: SANA 0.6B, random weights.

    python benchmarks/full_size.py             256 px, batch 2, in float32: minutes, 8 GB, 3 GB of disk

SwiftBrush with teacher, LoRA fake score and LoRA student on one frozen base. The transformer has its
published configuration; text encoder and autoencoder are tiny. Computed are the parts that the start of a run
prints, and the largest sum of tensors alive at once in the two turns, which run on PyTorch's meta device; of
Python and the imports it is measured. Measured is the peak of the resident set from the first update on.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import GIB, parser, table, write
from benchmarks.memory import LiveMemory
from datamodules.prompts import PromptDataModule
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.schedule import RectifiedFlow
from lightning_modules.distillation import FakeScoreSettings, OneStepDistillation
from lightning_modules.memory import GRADIENTS
from lightning_modules.networks.backbones.calling import run_network
from lightning_modules.networks.lora import LoraSettings, StudentLoraSettings, add_adapter
from lightning_modules.networks.roles import ScoreModels
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.optimization import RoleOptimization

CONFIG: dict[str, Any] = {
    "sample_size": 8, "in_channels": 32, "out_channels": 32, "num_layers": 28, "num_attention_heads": 36,
    "attention_head_dim": 32, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152, "caption_channels": 2304,
}  # fmt: skip
STUDENT = StudentLoraSettings(rank=64, alpha=64.0, share_base=True)
FAKE = LoraSettings(rank=64, alpha=64.0)


def resident(name: str) -> int:
    """Bytes of the resident set: VmRSS now, VmHWM at most."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def write_folder(folder: Path) -> None:
    """The model with weights at random."""
    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *map(chr, range(33, 127)), "\n"]
    text = Gemma2Config(
        vocab_size=len(words), hidden_size=CONFIG["caption_channels"], intermediate_size=16, head_dim=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    sides = {f"{side}_block_out_channels": (4,) * 6 for side in ("encoder", "decoder")}
    layers = {f"{side}_layers_per_block": (1,) * 6 for side in ("encoder", "decoder")}
    kinds = {f"{side}_block_types": "ResBlock" for side in ("encoder", "decoder")}
    scales = {f"{side}_qkv_multiscales": ((),) * 6 for side in ("encoder", "decoder")}
    transformer = SanaTransformer2DModel(**CONFIG)
    with torch.no_grad():  # else all scores, and so all gradients, are zero
        transformer.proj_out.weight.normal_(std=0.02)
    SanaPipeline(
        tokenizer=GemmaTokenizer(vocab={word: place for place, word in enumerate(words)}),
        text_encoder=Gemma2Model(text),
        vae=AutoencoderDC(latent_channels=32, attention_head_dim=2, **sides, **layers, **kinds, **scales),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(folder)


def give_back_freed_memory() -> None:
    """Freed memory leaves the process at once; runs on the CPU keep it, the GNU C library a part of it."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD, which is not adapted any more then


def measured(folder: Path, batch: int) -> dict[str, float]:
    """Bytes by part, and the peak of two updates."""
    give_back_freed_memory()
    facts = {"Python and the imports": float(resident("VmRSS"))}
    adam = {"optimizer": lambda groups: torch.optim.Adam(groups, lr=1e-5)}
    module = OneStepDistillation(
        SwiftBrush(dropout_per_sample=True),
        student=RoleOptimization(**adam), fake_score=FakeScoreSettings(**adam, lora=FAKE),
        teacher=str(folder), start_timestep=999, student_lora=STUDENT, ema_decay=None,
    )  # fmt: skip

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            facts.update({name: float(part[1]) for name, part in module.memory_parts().items()})
            gc.collect()
            facts["after loading"] = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            facts["peak"] = resident("VmHWM")

    run = L.Trainer(
        max_steps=2, max_epochs=-1, accelerator="cpu", limit_val_batches=0, logger=False, precision="32-true",
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[Watch()], check_val_every_n_epoch=None,
    )  # fmt: skip
    with patch("lightning_modules.distillation.keep_freed_memory", give_back_freed_memory):
        run.fit(module, PromptDataModule(["a red cat", "a dog"], batch_size=batch))
    return facts


def turns(batch: int) -> int:
    """Bytes of activations and gradients at most, of the two turns of an update."""
    schedule = RectifiedFlow(shift=3.0)
    with torch.device("meta"):
        base = SanaTransformer2DModel(**CONFIG)
        student = SanaTransformer2DModel(**CONFIG)
        add_adapter(student, STUDENT)
        scores = ScoreModels(base, schedule, FAKE)
        layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
        texts = {
            "encoder_hidden_states": torch.empty(batch, 300, CONFIG["caption_channels"]),
            "encoder_attention_mask": torch.ones(batch, 300),
        }
        condition = Condition(texts, {name: x[:1] for name, x in texts.items()})
        twice = condition.concat(condition)
        noise, t = torch.empty(batch, 32, 8, 8), torch.empty(batch)
        with LiveMemory() as memory:
            x0 = run_network(student, noise, t, condition)
            with torch.no_grad(), scores.adapter(False):
                x_t, both = torch.cat([x0, x0]), torch.cat([t, t])
                gradient = run_network(base, x_t, both, twice)
                # the fake score without gradients: the adapter folded into copies of its weights
                folded = [layer.get_base_layer().weight.clone() for layer in layers]
                gradient = (gradient - run_network(base, x_t, both, twice)).chunk(2)[0]
                del folded, x_t, both
            (x0 * gradient).mean().backward()
            student.zero_grad(set_to_none=True)
            del x0, gradient
            run_network(base, noise, t, condition).square().mean().backward()
    return max(memory.history)


def main() -> None:
    """Measure, compute and print."""
    reader = parser(__doc__)
    reader.add_argument("--batch", type=int, default=2)
    given = reader.parse_args()
    with tempfile.TemporaryDirectory() as place:
        writer = get_context("spawn").Process(target=write_folder, args=(Path(place),))
        writer.start()  # in a process of its own, whose memory is not ours
        writer.join()
        facts = measured(Path(place), given.batch)
    peak, loaded = facts.pop("peak"), facts.pop("after loading")
    facts.pop(GRADIENTS)
    facts["activations and gradients"] = float(turns(given.batch))
    total = sum(facts.values())
    rows = [[name, f"{size / GIB:.2f}"] for name, size in facts.items()]
    rows += [["computed", f"{total / GIB:.2f}"], ["measured peak", f"{peak / GIB:.2f}"]]
    rows += [["resident after loading", f"{loaded / GIB:.2f}"]]
    write(
        table(["", "GiB"], rows) + f"\n\ncomputed / measured: {total / peak - 1:+.1%}",
        {**facts, "computed": total, "peak": peak}, given.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
