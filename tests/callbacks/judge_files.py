"""Miniatures of judges with random weights, in the published classes and file formats."""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)  # fmt: skip
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "number", "red", "dog", *"0123456789"]


def pick_score_folder(clip: Path, folder: Path) -> Path:
    """A CLIP with another logit scale; without tokenizer and processor, which lie in the CLIP's folder."""
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    return folder


def aesthetic_head(file: Path, width: int) -> Path:
    """The improved predictor's layers, with their names, in small."""
    torch.manual_seed(2)
    layers = nn.Sequential(nn.Linear(width, 6), nn.Dropout(), nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 1))
    torch.save({f"layers.{name}": weight for name, weight in layers.state_dict().items()}, file)
    return file


def blip_towers() -> tuple[BlipVisionModel, BlipTextModel]:
    """Two towers of two layers of two heads, on 2 x 2 patches of 16 pixels."""
    torch.manual_seed(6)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    eye = BlipVisionModel(BlipVisionConfig(**sizes, image_size=32, patch_size=16, layer_norm_eps=1e-6))
    text = BlipTextConfig(
        **sizes, vocab_size=len(WORDS), encoder_hidden_size=128, max_position_embeddings=40, is_decoder=True
    )
    reader = BlipTextModel(text, add_pooling_layer=False)
    for parameter in (*eye.parameters(), *reader.parameters()):
        nn.init.normal_(parameter, std=0.2)
    return eye.eval(), reader.eval()


def image_reward_files(folder: Path) -> tuple[Path, Path]:
    """``ImageReward.pt`` with the names that its package gives the weights, and a BERT tokenizer."""
    eye, reader = blip_towers()
    weights: dict[str, Tensor] = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    for name, weight in eye.state_dict().items():
        for new, old in [
            ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
            ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers", "blocks"),
            ("self_attn.projection", "attn.proj"), ("self_attn", "attn"), ("layer_norm", "norm"),
            ("post_layernorm", "norm"),
        ]:  # fmt: skip
            name = name.replace(new, old)
        weights[f"blip.visual_encoder.{name}"] = weight
    weights |= {f"blip.text_encoder.{name}": weight for name, weight in reader.state_dict().items()}
    weights |= {"blip.vision_proj.weight": torch.zeros(2, 128), "blip.text_proj.weight": torch.zeros(2, 128)}
    head = nn.Sequential(nn.Linear(128, 8), nn.Dropout(), nn.Linear(8, 1))
    weights |= {f"mlp.layers.{name}": weight for name, weight in head.state_dict().items()}
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "bert-base-uncased").mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert-base-uncased")
    return folder / "ImageReward.pt", folder / "bert-base-uncased"


def detector_folder(folder: Path) -> Path:
    """Mask2Former of three classes and five queries, which is sure of what it sees."""
    torch.manual_seed(8)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
    config = Mask2FormerConfig(
        backbone_config=backbone, **sizes, dim_feedforward=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=5, id2label={0: "dog", 1: "cat", 2: "mouse"},
        label2id={"dog": 0, "cat": 1, "mouse": 2},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(20)
    model.save_pretrained(folder)
    return folder


def judges_folder(clip: Path, folder: Path) -> Path:
    """All of them where `judges` finds them."""
    image_reward_files(folder)
    pick_score_folder(clip, folder / "PickScore_v1")
    for name in ("CLIP-ViT-H-14-laion2B-s32B-b79K", "clip-vit-large-patch14"):
        shutil.copytree(clip, folder / name)
    detector_folder(folder / "mask2former-swin-small-coco-instance")
    aesthetic_head(folder / "sac+logos+ava1-l14-linearMSE.pth", 16)
    return folder
