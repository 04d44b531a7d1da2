"""The clamped CLIP loss of SwiftBrush v2 (arXiv 2408.14176): pictures pulled to their prompts, so far."""

import math

from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from lightning_modules.diffusion.broadcast import at_least_float32
from lightning_modules.image_losses.base import ImageLoss
from lightning_modules.image_losses.schedules import WeightSchedule
from lightning_modules.networks.clip_models import Clip, load_clip, require_differentiable


class ClipLoss(ImageLoss):
    """L = max(0, tau - cos(E_img(D(x)), E_txt(y))), sample by sample.

    Samples whose cosine has reached tau have no gradient; a clamp of the batch's mean would go on pushing
    good samples for the sake of bad ones. tau has to suit the CLIP: cosines of good pairs are about 0.3 for
    OpenAI's and LAION's networks, and about 0.7 for the bundled ones.

    Args:
        clip: transformers folder or hub name, or ``open_clip:NAME/PRETRAINED``.
        tau: the cosine that is enough.
        clamp: False: L = tau - cos without the maximum, the paper's naive variant.
        weight: see `ImageLoss`.

    Raises:
        UserError: tau is no cosine.
    """

    name = "clip"
    logged = ("cosine", "below_tau")

    def __init__(
        self,
        clip: str,
        tau: float = 0.35,
        clamp: bool = True,
        weight: float | WeightSchedule | None = None,
    ) -> None:
        super().__init__(weight)
        if not math.isfinite(tau) or not -1 < tau <= 1:
            raise UserError(f"tau of the {self.name} loss is {tau}: it is a cosine, above -1 and at most 1")
        self.path, self.tau, self.clamp = clip, tau, clamp

    def load(self) -> None:
        """Read the CLIP."""
        self.network: Clip = self._read()
        require_differentiable(self.network.processor)

    def _read(self) -> Clip:
        return load_clip(self.path)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The loss of each picture, [B]."""
        texts = self.network.text_features(prompts)
        self.truncated_prompts = self.network.truncated_prompts
        seen = self.network.image_features(images)
        cosine = F.cosine_similarity(at_least_float32(seen), at_least_float32(texts), dim=-1)
        loss = self.tau - cosine
        self.diagnostics = {"cosine": cosine.detach(), "below_tau": (loss > 0).detach().to(loss)}
        return loss.clamp(min=0) if self.clamp else loss
