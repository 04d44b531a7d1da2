"""The HPS loss of SwiftBrush v2 (arXiv 2408.14176, section 8.1): human preferences in place of CLIP."""

from common.errors import UserError
from lightning_modules.image_losses.clip import ClipLoss
from lightning_modules.image_losses.schedules import WeightSchedule
from lightning_modules.networks.clip_models import HPS_FILES, HPS_REPOSITORY, Clip, OpenClip
from lightning_modules.networks.model_names import asset_path


class HpsLoss(ClipLoss):
    """L = max(0, tau - HPS(D(x), y)), sample by sample; HPSv2 (arXiv 2306.09341) is a cosine of a tuned CLIP.

    A run that was trained with it is not to be judged by HPSv2: its score goes up by construction.

    Args:
        checkpoint: file of the weights, HPS_v2_compressed.pt or HPS_v2.1_compressed.pt of the hub's
            xswu/HPSv2.
        version: which of them it is, v2.0 or v2.1; their scores are not comparable.
        tau: the score that is enough; those of good pictures are about 0.27 to 0.30. The paper gives none.
        architecture: its name in open_clip.
        clamp: as in `ClipLoss`.
        weight: see `ImageLoss`.

    Raises:
        UserError: unknown version, or tau is no cosine.
    """

    name = "hps"

    def __init__(
        self,
        checkpoint: str,
        version: str,
        tau: float,
        architecture: str = "ViT-H-14",
        clamp: bool = True,
        weight: float | WeightSchedule | None = None,
    ) -> None:
        super().__init__(checkpoint, tau, clamp, weight)
        if version not in HPS_FILES:
            raise UserError(f"version of the hps loss is {version!r}: choose one of {', '.join(HPS_FILES)}")
        self.version, self.architecture = version, architecture

    def _read(self) -> Clip:
        if not asset_path(self.path).is_file():
            raise UserError(
                f"the HPS{self.version} checkpoint {self.path} does not exist: get it with `hf download "
                f"{HPS_REPOSITORY} {HPS_FILES[self.version]} --local-dir .`, and give its file"
            )
        return OpenClip(self.architecture, self.path)
