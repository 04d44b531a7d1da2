"""What every loss on the student's decoded pictures has in common. A new one is one file with a subclass."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_modules.image_losses.schedules import WeightSchedule, as_schedule
from lightning_modules.networks.weights import hide_from_state_dict


class ImageLoss(nn.Module, ABC):
    """A differentiable judgement of pictures, one number for each.

    Its networks are frozen: gradients pass through them to the pictures, and no checkpoint holds them. They
    are read in `load`, not in the constructor, so that a configuration can be checked without them.

    Args:
        weight: a number or a schedule; None: from 0.1 to 0 on a line over the training.

    Attributes:
        name: in logs: ``train/student_NAME``, ``gradient_at_output/NAME``, ``image_losses/…_NAME``.
        logged: names of the diagnostics.
        diagnostics: numbers of the last call worth logging, by name, each one per picture [B].
        truncated_prompts: how many prompts so far were cut to what the text network takes.
    """

    name: str = ""
    logged: tuple[str, ...] = ()

    def __init__(self, weight: float | WeightSchedule | None = None) -> None:
        super().__init__()
        self.weight = as_schedule(weight)
        self.diagnostics: dict[str, Tensor] = {}
        self.truncated_prompts = 0
        hide_from_state_dict(self)

    @abstractmethod
    def load(self) -> None:
        """Read the networks, in float32 on the CPU; called once before training.

        Raises:
            UserError: they can't be read.
        """

    @abstractmethod
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The loss of each picture, [B], in at least float32; pictures are [B, 3, H, W] in [0, 1]."""

    def train(self, mode: bool = True) -> "ImageLoss":
        """Stay in evaluation mode: nothing here is trained."""
        return super().train(False)
