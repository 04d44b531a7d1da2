"""LPIPS: how different two pictures look, by the layers of a classifier and learned weights of its channels.

Zhang et al. 2018 (arXiv 1801.03924), version 0.1. The weights of the channels come with torchmetrics, those
of the classifier are torchvision's.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import torchmetrics.functional.image
import torchvision
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from callbacks.metrics.extractors import ExtractorSpec, FeatureExtractor
from callbacks.metrics.judges import find_judge
from common.errors import UserError, first_line
from common.hashing import hash_file, to_uint8

# mean and deviation of ImageNet's pictures in [-1, 1], as the package has them
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class Backbone(NamedTuple):
    """torchvision's name of a classifier, its weights there, and the layers that are compared."""

    name: str
    weights: str
    layers: tuple[int, ...]


BACKBONES = {
    "alex": Backbone("alexnet", "AlexNet_Weights", (1, 4, 7, 9, 11)),
    "vgg": Backbone("vgg16", "VGG16_Weights", (3, 8, 15, 22, 29)),
    "squeeze": Backbone("squeezenet1_1", "SqueezeNet1_1_Weights", (1, 4, 7, 9, 10, 11, 12)),
}


class LpipsExtractor(FeatureExtractor):
    """Features whose squared Euclidean distance is LPIPS; their number depends on the size of the pictures.

        d(x, y) = Σ_l 1/(H_l W_l) Σ_hw |w_l ⊙ (x̂_hw − ŷ_hw)|²                      equation 1

    with x̂ of unit length over the channels; the package's w are the squares of these.

    Args:
        network: ``alex``, ``vgg`` or ``squeeze``.
        weights: torchvision's file of the classifier; None: in the folder of judges or torchvision's cache.
        judges: the folder of judges.
        size: larger pictures are reduced to this shortest side (antialiased bicubic); None: never.

    Raises:
        UserError: the weights are missing or of another network.
    """

    width = 1  # known only with a picture

    def __init__(self, network: str, weights: str | None, judges: str | None, size: int | None) -> None:
        backbone = BACKBONES[network]
        file = find_classifier(backbone, weights, judges)
        self.model = nn.Module()
        self.model.classifier = classifier(backbone, file)
        own = Path(torchmetrics.functional.image.__file__).parent / "lpips_models" / f"{network}.pth"
        stored = torch.load(own, weights_only=True, map_location="cpu")
        for i in range(len(backbone.layers)):
            self.model.register_buffer(f"weight{i}", stored[f"lin{i}.model.1.weight"].clamp_min(0).sqrt())
        self.size, self.layers = size, backbone.layers
        content = hashlib.sha256(f"lpips {network} {hash_file(file)} {hash_file(own)} {size}".encode())
        words = "8-bit, as they are" if size is None else f"8-bit, reduced to {size} (antialiased bicubic)"
        super().__init__(f"LPIPS 0.1 ({backbone.name})", file, content.hexdigest(), words)

    def _image_features(self, images: Tensor) -> Tensor:
        x = to_uint8(images).to(self.device).float() / 255
        if self.size is not None and min(x.shape[-2:]) > self.size:
            x = TF.resize(x, [self.size], TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        shift, scale = (x.new_tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
        x, parts = (2 * x - 1 - shift) / scale, list[Tensor]()
        for place, layer in enumerate(self.model.classifier):
            x = layer(x)
            if place in self.layers:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + _EPSILON)
                weight = self.model.get_buffer(f"weight{len(parts)}")
                parts.append((weight * unit).flatten(1) / (x.shape[2] * x.shape[3]) ** 0.5)
        return torch.cat(parts, 1)


def find_classifier(backbone: Backbone, weights: str | None, judges: str | None) -> Path:
    """The file of torchvision's weights.

    Raises:
        UserError: it is missing.
    """
    url = getattr(torchvision.models, backbone.weights).IMAGENET1K_V1.url
    name = Path(url).name
    return find_judge(
        "diversity_lpips", name, f"curl --create-dirs -o {{place}} {url}", weights, judges,
        [Path(torch.hub.get_dir()) / "checkpoints" / name],
    )  # fmt: skip


def classifier(backbone: Backbone, file: Path) -> nn.Sequential:
    """The convolutions up to the last layer that is compared, frozen.

    Raises:
        UserError: the file holds no weights, or those of another network.
    """
    with torch.device("meta"):
        whole = getattr(torchvision.models, backbone.name)(weights=None)
    try:
        whole.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"), assign=True)
    except Exception as error:  # each kind of damage raises another type
        raise UserError(
            f"diversity_lpips: {file} can't be loaded as torchvision's {backbone.name}: {first_line(error)}"
        ) from error
    layers: nn.Sequential = whole.features[: backbone.layers[-1] + 1]
    return layers.float().requires_grad_(False).eval()


def lpips_network(network: str, weights: str | None, judges: str | None, size: int | None) -> ExtractorSpec:
    """What a metric's settings name.

    Raises:
        UserError: the network is unknown, or the size no size.
    """
    if network not in BACKBONES:
        raise UserError(
            f"diversity_lpips: network {network!r} is unknown: choose one of {', '.join(BACKBONES)}"
        )
    if size is not None and size < 32:
        raise UserError(f"diversity_lpips: size is {size}: it must be at least 32 pixels, or null for none")
    return LpipsExtractor, network, weights, judges, size


def squared_distances(features: Tensor) -> Tensor:
    """Squared distances of all pairs of rows [N, D], each pair once, [N (N − 1) / 2], float64."""
    first, second = torch.triu_indices(len(features), len(features), 1)
    rows = [(features[i] - features[j]).double().square().sum() for i, j in zip(first, second)]
    return torch.stack(rows)
