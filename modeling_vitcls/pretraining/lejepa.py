"""LeJEPA: pre-training without labels, teacher or stop-gradient.

Balestriero and LeCun 2025, arXiv 2511.08544.

    image -> global and local crops -> encoder -> pooled token -> projector -> z [views, B, P]

    loss = (1 - weight) * invariance(z) + weight * SIGReg(z)

The invariance loss pulls all views of an image to the mean of its global views. SIGReg makes the
distribution of z an isotropic Gaussian, so the features cannot collapse. The loss is the same over
several processes as over one process with all images. The crops are drawn on the model's device,
from PyTorch's random numbers.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..data.batches import Batch, Normalizer
from ..model.modeling_vitcls import ViTCLSModel, ViTCLSPreTrainedModel
from ..training.losses import Losses


# Frequencies of the characteristic functions that SIGReg compares
MAX_FREQUENCY = 3.0
NUM_FREQUENCIES = 17
NUM_DIRECTIONS = 256  # Number of random directions per step
NUM_GLOBAL = 2  # Global crops of each image
SIGREG_WEIGHT = 0.05  # The paper's
# Minimum area of global crops and maximum area of local crops, as a fraction of the image area
GLOBAL_SCALE = 0.3
LOCAL_SCALE = 0.05  # Minimum area of local crops
LOCAL_SIZE = 0.43  # Side length of local crops, as a fraction of the image size (98 of 224 pixels)
MAX_ASPECT_RATIO = 4 / 3
JITTER_PROBABILITY = 0.8
JITTER = 0.4  # Brightness, contrast and saturation change by a factor of 1 - 0.4 to 1 + 0.4
GRAY_PROBABILITY = 0.2
NUM_FEATURES = 64  # Channels of the projector's output


class LeJEPA(ViTCLSPreTrainedModel):
    """An encoder with a projector on its pooled token. The projector is dropped after pre-training.

    Examples:
        >>> import torch
        >>> from modeling_vitcls import ViTCLSConfig, ViTCLSModel
        >>> from modeling_vitcls.pretraining.lejepa import (
        ...     LeJEPA, compute_invariance_loss, compute_sigreg, draw_directions,
        ... )
        >>> method = LeJEPA(ViTCLSModel(ViTCLSConfig.from_preset("tiny", image_size=32, patch_size=8)))
        >>> views = torch.randn(4, 8, 3, 32, 32)  # two global and two local crops of 8 images
        >>> projections = method(views)
        >>> invariance = compute_invariance_loss(projections, num_global=2)
        >>> loss = 0.95 * invariance + 0.05 * compute_sigreg(projections, draw_directions(projections, 256))
    """

    def __init__(self, encoder: ViTCLSModel, width: int = 1024) -> None:
        super().__init__(encoder.config)
        # LayerNorm instead of BatchNorm: no image depends on the other images of its process.
        self.projector = nn.Sequential(
            nn.Linear(encoder.config.pooled_size, width), nn.LayerNorm(width), nn.GELU(),
            nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(),
            nn.Linear(width, NUM_FEATURES),
        )  # fmt: skip
        self.post_init()
        # After the initialization of the projector, which keeps these weights
        self.vitcls = encoder

    def forward(self, *views: Tensor, **kwargs: Any) -> Any:
        """Compute the projections [views, B, P] of images [views, B, C, H, W] of one or more sizes.

        For images [B, C, H, W], return the encoder's output.
        """
        if views[0].ndim == 4:
            return self.vitcls(*views, **kwargs)
        projections = []
        for images in views:
            pooled: Tensor = self.vitcls(images.flatten(0, 1)).pooler_output
            projections.append(self.projector(pooled).unflatten(0, images.shape[:2]))
        return torch.cat(projections)


def compute_lejepa_losses(
    model: nn.Module,
    batch: Batch,
    *,
    normalize: Normalizer,
    patch_size: tuple[int, int],
    num_local: int,
) -> Losses:
    """Compute the losses of a batch: crops, projections, invariance and SIGReg.

    `NUM_GLOBAL` and `num_local` crops have more and less than `GLOBAL_SCALE` of the image area.
    """
    pixels = batch["pixels"].float() / 255
    size = list(pixels.shape[-2:])
    small = [
        max(2, round(LOCAL_SIZE * side / patch)) * patch
        for side, patch in zip(size, patch_size, strict=True)
    ]
    kinds = [(NUM_GLOBAL, size, (GLOBAL_SCALE, 1.0))]
    if num_local:
        kinds.append((num_local, small, (LOCAL_SCALE, GLOBAL_SCALE)))
    views = []
    for number, crop_size, scale in kinds:
        crops = (crop(pixels, crop_size, scale) for _ in range(number))
        views.append(torch.stack([normalize(255 * jitter(each)) for each in crops]))

    # One call for all views, because DDP expects one forward pass for each backward pass.
    projections = model(*views).float()
    invariance = compute_invariance_loss(projections, NUM_GLOBAL)
    sigreg = compute_sigreg(projections, draw_directions(projections, NUM_DIRECTIONS))
    loss = (1 - SIGREG_WEIGHT) * invariance + SIGREG_WEIGHT * sigreg
    return {"loss": loss, "invariance_loss": invariance, "sigreg_loss": sigreg}


# Views --------------------------------------------------------------------------------------------


def crop(pixels: Tensor, size: list[int], scale: tuple[float, float]) -> Tensor:
    """Crop each image [B, C, H, W] at random, resize the crop to `size`, and flip half of them.

    `scale` is the range of the area as a fraction of the image, as in torchvision's
    RandomResizedCrop.
    """
    area, ratio, x, y, flip = torch.rand(5, len(pixels), device=pixels.device)
    area = scale[0] + (scale[1] - scale[0]) * area
    ratio = torch.exp((2 * ratio - 1) * math.log(MAX_ASPECT_RATIO))
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)

    transforms = pixels.new_zeros(len(pixels), 2, 3)  # [B, 2, 3]
    transforms[:, 0, 0] = width * (1 - 2 * (flip < 0.5).float())
    transforms[:, 0, 2] = (2 * x - 1) * (1 - width)
    transforms[:, 1, 1] = height
    transforms[:, 1, 2] = (2 * y - 1) * (1 - height)

    grid = nn.functional.affine_grid(transforms, [*pixels.shape[:2], *size], align_corners=False)
    return nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def jitter(pixels: Tensor) -> Tensor:
    """Change the colors of images [B, C, H, W] in [0, 1] at random.

    Brightness, contrast and saturation are random, and some images are gray.
    """
    random = torch.rand(5, len(pixels), 1, 1, 1, device=pixels.device)
    factors = torch.where(random[3] < JITTER_PROBABILITY, 1 + JITTER * (2 * random[:3] - 1), 1)
    pixels = pixels * factors[0]
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * factors[1]
    gray = pixels.mean(dim=1, keepdim=True)
    pixels = gray + (pixels - gray) * torch.where(random[4] < GRAY_PROBABILITY, 0, factors[2])
    return pixels.clamp(0, 1)


# Loss ---------------------------------------------------------------------------------------------


def compute_invariance_loss(projections: Tensor, num_global: int) -> Tensor:
    """Pull the views of an image together: mean squared distance of [views, B, P] from their centers.

    The center of an image is the mean of its first `num_global` views.
    """
    return (projections - projections[:num_global].mean(dim=0)).square().mean()


def compute_sigreg(projections: Tensor, directions: Tensor) -> Tensor:
    """Compute the mean Epps-Pulley statistic of projections [views, B, P] in directions [P, M].

    The statistic is the number of images times the integral of |characteristic function of the
    projections - characteristic function of a Gaussian|^2, weighted with the latter (section 4.2;
    trapezoidal rule).
    """
    frequencies = torch.linspace(0, MAX_FREQUENCY, NUM_FREQUENCIES, device=projections.device)
    gaussian = torch.exp(-frequencies.square() / 2)
    # Twice, for both signs
    weights = torch.full_like(frequencies, 2 * MAX_FREQUENCY / (NUM_FREQUENCIES - 1))
    weights[[0, -1]] /= 2

    angles = (projections @ directions).unsqueeze(-1) * frequencies  # [views, B, M, frequencies]
    # [2, views, M, frequencies]
    means = torch.stack([angles.cos().mean(dim=1), angles.sin().mean(dim=1)])
    cos, sin = average_over_processes(means)

    errors = (cos - gaussian).square() + sin.square()
    num_processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return (errors @ (weights * gaussian)).mean() * projections.shape[1] * num_processes


def draw_directions(projections: Tensor, num_directions: int) -> Tensor:
    """Draw random unit vectors [P, num_directions], the same on all processes."""
    directions = torch.randn(projections.shape[-1], num_directions, device=projections.device)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(directions, src=0)
    return directions / directions.norm(dim=0)


def average_over_processes(values: Tensor) -> Tensor:
    """Average a value over the processes.

    Gradients flow to this process's values only, because data parallelism then averages the
    gradients of all processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size() + values - values.detach()
