"""Evaluation of masked image modeling on held-out images.

Each image is evaluated once. Its mask does not depend on the batch size or the number of processes.
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
    """Evaluate a masked autoencoder. The label of an image is its index, which determines its mask."""

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
        """See `Evaluator` for the arguments. `mask_seed` is the seed of the masks."""
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
        """Build the reconstruction metrics."""
        return ReconstructionMetrics(self.accelerator.device)

    def outputs(self, model: nn.Module, batch: HeldOutBatch) -> Any:
        """Return the model outputs for a padded batch. Blank images have no masked patches and no loss."""
        pixel_values = self.filled_up(model, batch.pixel_values)  # [B, C, H, W]
        rows, columns = self.choose_masks.grid
        masks = torch.zeros(len(pixel_values), rows * columns, dtype=torch.bool)
        for row, index in enumerate(batch.labels.tolist()):
            masks[row] = self.mask_of(index)
        with self.accelerator.autocast():
            return model(pixel_values=pixel_values, bool_masked_pos=masks.to(pixel_values.device))

    def mask_of(self, index: int) -> torch.Tensor:
        """Return the mask of one image, [rows * columns], True for masked patches."""
        generator = torch.Generator().manual_seed(seed_for(self.mask_seed, index))
        return self.choose_masks(1, torch.device("cpu"), generator)[0]


class ReconstructionMetrics:
    """Metrics of a masked autoencoder, with the interface of the classes in metrics.py.

    reconstruction_loss     the training loss, mean over the images
    num_images
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = mean_of_pictures(device)
        self.num_images = number_of_pictures(device)

    def update(self, outputs: Any, pictures: torch.Tensor) -> None:
        """Add the mean loss of a batch of G images; `pictures` contains their indices [G]."""
        self.loss.update(outputs.loss.expand(len(pictures)))  # torchmetrics ignores weights if NaN is allowed
        self.num_images.update(len(pictures))

    def compute(self) -> dict[str, Any]:
        """Return the metrics over all processes."""
        return {"reconstruction_loss": number(self.loss.compute()), "num_images": int(self.num_images.compute())}
