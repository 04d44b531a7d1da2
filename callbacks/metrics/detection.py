"""The eyes of GenEval: instances of COCO's classes by Mask2Former, and their colours by CLIP ViT-L/14."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from transformers import Mask2FormerForUniversalSegmentation

from callbacks.metrics.aesthetic import ClipL14
from callbacks.metrics.extractors import FeatureExtractor, shared_extractor
from callbacks.metrics.pick_score import hub_judge
from common.errors import UserError, first_line
from common.hashing import hash_folder, hash_texts, to_uint8
from datamodules.picture_files import to_picture, to_tensor
from lightning_modules.networks.loading import no_progress_bars

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = (
    "a photo of a {colour} {thing}",
    "a photo of a {colour}-colored {thing}",
    "a photo of a {colour} object",
)
SYNONYMS = {
    "computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard",
    "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
    "dining table": "diningtable", "tv": "tvmonitor",
}  # fmt: skip
"""The detector's names of what the benchmark names otherwise: three as in COCO, six as in Pascal VOC."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GREY = (153, 153, 153)
_DIVISOR = 32


class Instance(NamedTuple):
    """Something that was detected.

    Attributes:
        box: left, top, right and bottom edge, in pixels.
        score: confidence in [0, 1].
        mask: [H, W], boolean.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: Tensor


class DetectorExtractor(FeatureExtractor):
    """Mask2Former and a CLIP; the features of a picture are its own 8-bit pixels in [0, 1].

    Args:
        detector: folder of Mask2Former for instances; None: in the folder of judges or the hub's cache.
        clip: folder of CLIP ViT-L/14; None: there, too.
        judges: the folder of judges.
        shortest, longest: sides of what the detector sees, which keeps its proportions.

    Raises:
        UserError: something is missing or damaged.
    """

    width = 3

    def __init__(
        self,
        detector: str | None,
        clip: str | None,
        judges: str | None,
        shortest: int = 800,
        longest: int = 1333,
    ) -> None:
        folder: Path = hub_judge("geneval", DETECTOR, detector, judges)
        eyes = shared_extractor((ClipL14, clip, judges))
        assert isinstance(eyes, ClipL14)
        self.clip, self.shortest, self.longest = eyes, shortest, longest
        try:
            with no_progress_bars():
                self.model, told = Mask2FormerForUniversalSegmentation.from_pretrained(
                    str(folder), output_loading_info=True, trust_remote_code=False
                )
        except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError …
            raise UserError(
                f"geneval: the detector {folder} can't be loaded: {first_line(error)}; fetch {DETECTOR} again"
            ) from error
        if missing := sorted(told["missing_keys"]):  # they would be random numbers
            raise UserError(f"geneval: the detector {folder} lacks the weights {missing[0]}: fetch it again")
        self.model.float().requires_grad_(False).eval()
        self.classes = {name: int(number) for number, name in self.model.config.id2label.items()}
        self._texts: dict[str, Tensor] = {}
        super().__init__(
            f"{folder.name} and {eyes.name}", folder,
            hash_texts([hash_folder(folder), eyes.content_hash, str((shortest, longest))]),
            f"8-bit; detector: {shortest} to {longest} pixels, bilinear; colours: {eyes.preprocessing}",
        )  # fmt: skip

    def to(self, device: torch.device | str) -> None:
        """Move both networks."""
        super().to(device)
        self.clip.to(device)

    def _image_features(self, images: Tensor) -> Tensor:
        return to_uint8(images).float() / 255

    def number_of(self, name: str) -> int:
        """The detector's number of a class.

        Raises:
            UserError: it knows no such class.
        """
        number = self.classes.get(name, self.classes.get(SYNONYMS.get(name, "")))
        if number is None:
            raise UserError(
                f"geneval: the detector {self.path.name} knows no {name!r}: it is none of COCO's classes, "
                "or the detector is another one"
            )
        return number

    @torch.no_grad()
    def detect(self, picture: Tensor, threshold: float) -> dict[int, list[Instance]]:
        """What is seen with more than this confidence, by class, the most confident first.

        Args:
            picture: [3, H, W] in [0, 1].
        """
        height, width = picture.shape[-2:]
        scale = min(self.shortest / min(height, width), self.longest / max(height, width))
        inner = [round(height * scale), round(width * scale)]
        seen = TF.resize(picture[None].to(self.device), inner, InterpolationMode.BILINEAR, antialias=False)
        padding = [-side % _DIVISOR for side in inner]
        pixels = F.pad(TF.normalize(seen, list(_MEAN), list(_DEVIATION)), (0, padding[1], 0, padding[0]))
        with torch.autocast(self.device.type, enabled=False):
            found = self.model(
                pixel_values=pixels, pixel_mask=torch.ones_like(pixels[:, 0], dtype=torch.long)
            )
        masks = found.masks_queries_logits
        masks = F.interpolate(masks, pixels.shape[-2:], mode="bilinear", align_corners=False)
        masks = masks[..., : inner[0], : inner[1]]
        masks = F.interpolate(masks, (height, width), mode="bilinear", align_corners=False)[0]
        return instances(found.class_queries_logits[0], masks, threshold)

    @torch.no_grad()
    def colours(self, picture: Tensor, name: str, found: list[Instance]) -> list[str]:
        """The colour of each instance: the one of ten whose texts fit its cut-out on grey best.

        Args:
            picture: [3, H, W] in [0, 1]. ``name``: of the class.
        """
        if name not in self._texts:
            self._texts[name] = torch.stack([self._text(colour, name) for colour in COLOURS])
        whole, chosen = to_picture(picture), []
        for one in found:
            mask = Image.fromarray(one.mask.cpu().numpy().astype("uint8") * 255)
            alone = Image.composite(whole, Image.new("RGB", whole.size, _GREY), mask)
            left, top, right, bottom = (round(edge) for edge in one.box)
            cut = to_tensor(alone.crop((left, top, right, bottom)))[None]
            features = self.clip.clip.encode_pixels(self.clip.pixels(cut))[0].double().cpu()
            chosen.append(COLOURS[int((self._texts[name] @ features).argmax())])
        return chosen

    def _text(self, colour: str, name: str) -> Tensor:
        texts = [template.format(colour=colour, thing=name) for template in TEMPLATES]
        features = F.normalize(self.clip.text_features(texts).double().cpu(), dim=-1)
        return F.normalize(features.mean(0), dim=0)


def instances(logits: Tensor, masks: Tensor, threshold: float) -> dict[int, list[Instance]]:
    """Instances by class, the most confident first, from Mask2Former's outputs for one picture.

    The confidence is the probability of the class times the mean of that of the mask, over the mask (Cheng et
    al. 2022, arXiv 2112.01527). One query may give several classes; as many (query, class) pairs as there are
    queries are looked at.

    Args:
        logits: of classes [Q, C + 1], the last one for no object. ``masks``: their logits [Q, H, W].
    """
    probabilities = logits.float().softmax(-1)[:, :-1]
    best = probabilities.flatten().topk(len(logits))
    found: dict[int, list[Instance]] = {}
    for probability, place in zip(best.values.tolist(), best.indices.tolist()):
        query, number = divmod(place, probabilities.shape[1])
        mask = masks[query] > 0
        if probability <= threshold or not bool(mask.any()):
            continue
        score = probability * float(masks[query].sigmoid()[mask].mean())
        if score > threshold:
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            left, top, right, bottom = (float(edge) for edge in edges)
            found.setdefault(number, []).append(Instance((left, top, right, bottom), score, mask))
    return {number: sorted(some, key=lambda one: -one.score) for number, some in found.items()}
