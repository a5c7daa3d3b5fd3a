"""How well a model fills in the hidden patches of held-out pictures: each picture once, always with the same patches
hidden, whatever the batch size and the number of processes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ..data.columns import UNLABELLED
from ..data.images import LabelledPictures
from ..data.masking import MaskChooser
from ..data.random_bits import seed_for
from ..image_processing_vitcls import ViTCLSImageProcessor
from .evaluator import Evaluator, HeldOutBatch
from .metrics import mean_of_pictures, number, number_of_pictures


class ReconstructionEvaluator(Evaluator):
    """Evaluates a masked autoencoder. In place of a label, a picture has its own number, which says what is hidden."""

    def __init__(
        self,
        pictures: Sequence[Image.Image],
        processor: ViTCLSImageProcessor,
        choose_masks: MaskChooser,
        mask_seed: int,
        batch_size: int,
        num_workers: int,
        accelerator: Accelerator,
        max_broken_images: int,
        warn: Callable[[str], None],
        num_channels: int | None = None,
    ) -> None:
        """As `Evaluator`; `mask_seed` chooses which patches are hidden."""
        numbered = LabelledPictures(pictures, range(len(pictures)))
        super().__init__(
            numbered,
            processor,
            UNLABELLED,
            batch_size,
            num_workers,
            accelerator,
            max_broken_images,
            warn,
            num_channels,
        )
        self.choose_masks = choose_masks
        self.mask_seed = mask_seed

    def build_metrics(self) -> "ReconstructionMetrics":
        """The reconstruction loss."""
        return ReconstructionMetrics(self.accelerator.device)

    def outputs(self, model: nn.Module, batch: HeldOutBatch) -> Any:
        """The model's outputs for a whole batch; of the blank images that fill it up nothing is hidden, so that they
        have no part in the loss."""
        pixel_values = self.filled_up(model, batch.pixel_values)  # [B, C, H, W]
        rows, columns = self.choose_masks.grid
        masks = torch.zeros(len(pixel_values), rows * columns, dtype=torch.bool)
        for row, picture in enumerate(batch.labels.tolist()):
            masks[row] = self.mask_of(picture)
        with self.accelerator.autocast():
            return model(pixel_values=pixel_values, bool_masked_pos=masks.to(pixel_values.device))

    def mask_of(self, picture: int) -> torch.Tensor:
        """What is hidden of one picture, [rows * columns]."""
        generator = torch.Generator().manual_seed(seed_for(self.mask_seed, picture))
        return self.choose_masks(1, torch.device("cpu"), generator)[0]


class ReconstructionMetrics:
    """Of a masked autoencoder, as metrics.py has them for classifiers.

    reconstruction_loss     the training loss, mean over the pictures
    num_images
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = mean_of_pictures(device)
        self.num_images = number_of_pictures(device)

    def update(self, outputs: Any, pictures: torch.Tensor) -> None:
        """Take the mean loss of a batch, and the numbers [G] of its pictures."""
        self.loss.update(outputs.loss.expand(len(pictures)))  # torchmetrics leaves weights out where NaN may show
        self.num_images.update(len(pictures))

    def compute(self) -> dict[str, Any]:
        """The numbers, over all processes."""
        return {"reconstruction_loss": number(self.loss.compute()), "num_images": int(self.num_images.compute())}
