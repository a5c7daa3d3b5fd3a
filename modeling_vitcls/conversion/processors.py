"""Other projects' preprocessing -> our image processor, checked on a picture.

    timm            `pretrained_cfg`: input_size, interpolation, mean, std, crop_pct, crop_mode
    transformers    `preprocessor_config.json`, read by AutoImageProcessor

Where a source has no such settings, or ours cannot do what they say, a stated default stands in, and the certificate
says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend

from ..image_processing_vitcls import ViTCLSImageProcessor, ViTCLSImageProcessorPil


# Grey levels out of 255 by which any pixel may differ from the source's own preprocessing on the check picture, both
# with PIL or both with torchvision. It is 0 but for sources that resize before they round to whole levels (DINOv3).
LIMIT = 1.0

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}

# Settings with the same name and meaning in transformers and here.
SAME_SETTINGS = (
    "do_convert_rgb do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize "
    "image_mean image_std"
).split()


@dataclass(frozen=True)
class Preprocessing:
    """An image processor, where its settings are from, and how far it is from the source's own.

    Attributes:
        difference: largest, in grey levels, on `check_picture`; None for a default, which has nothing to differ from.
        assumed: why a default stands in; empty if none does.
    """

    processor: ViTCLSImageProcessor
    origin: str
    difference: float | None
    assumed: str = ""

    def described(self) -> dict[str, Any]:
        """All but the processor, for the certificate."""
        return {
            "origin": self.origin,
            "largest_difference_in_grey_levels": self.difference,
            "limit": LIMIT,
            "assumed_because": self.assumed,
        }


def preprocessing_of_timm(model: nn.Module) -> Preprocessing:
    """As timm's own transform for evaluation, by the model's `pretrained_cfg`."""
    from timm.data import create_transform, resolve_data_config

    settings: Any = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    _, height, width = settings["input_size"]
    own_transform: Any = create_transform(**settings, is_training=False)
    try:
        processor = ViTCLSImageProcessor(**timm_settings(**settings), crop_rounding="even")
        ours = ViTCLSImageProcessorPil.from_dict(processor.to_dict())  # timm resizes with PIL
        return checked(processor, ours, own_transform, "timm's pretrained_cfg")
    except ValueError as error:
        return default_preprocessing((height, width), str(error))


def timm_settings(
    input_size: tuple[int, int, int],
    interpolation: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_pct: float,
    crop_mode: str,
) -> dict[str, Any]:
    """Settings of our processor for those of `timm.data.resolve_data_config`.

    Raises:
        ValueError: for those that it does not have.
    """
    channels, height, width = input_size
    scaled_height, scaled_width = math.floor(height / crop_pct), math.floor(width / crop_pct)
    if interpolation not in FILTERS:
        raise ValueError(f"interpolation={interpolation!r} of timm's pretrained_cfg has no counterpart here")
    if crop_mode == "squash":
        size = {"height": scaled_height, "width": scaled_width}
    elif crop_mode == "center" and height == width:
        size = {"shortest_edge": scaled_height}
    else:
        raise ValueError(
            f"crop_mode={crop_mode!r} for {height} x {width} pixels in timm's pretrained_cfg has none here"
        )
    return {
        "do_convert_rgb": channels == 3,
        "size": size,
        "resample": FILTERS[interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "image_mean": list(mean),
        "image_std": list(std),
    }


def preprocessing_of_transformers(folder: str, image_size: tuple[int, int]) -> Preprocessing:
    """As the image processor in the source's folder; `image_size` (height, width) is for the default."""
    try:
        theirs = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return default_preprocessing(image_size, "the source has no image processor")
    backend = ViTCLSImageProcessorPil if isinstance(theirs, PilBackend) else ViTCLSImageProcessor
    settings = {name: value for name, value in theirs.to_dict().items() if name in SAME_SETTINGS and value is not None}
    origin = type(theirs).__name__

    def own_preprocessing(picture: PIL.Image.Image) -> torch.Tensor:
        return theirs(picture, return_tensors="pt")["pixel_values"][0]

    try:
        processor = ViTCLSImageProcessor(**settings)
        return checked(processor, backend.from_dict(processor.to_dict()), own_preprocessing, origin)
    except ValueError as error:
        return default_preprocessing(image_size, str(error))


def checked(
    processor: ViTCLSImageProcessor,
    ours: ViTCLSImageProcessor | ViTCLSImageProcessorPil,
    theirs: Callable[[PIL.Image.Image], torch.Tensor],
    origin: str,
) -> Preprocessing:
    """Compare `ours`, which has the settings of `processor` and the source's backend, with the source.

    Raises:
        ValueError: if they differ by more than `LIMIT`.
    """
    difference = largest_difference(ours, theirs)
    if not difference <= LIMIT:
        raise ValueError(f"the processor made from {origin} differs from it by {difference:.3g} grey levels")
    return Preprocessing(processor, origin, difference)


def largest_difference(
    ours: ViTCLSImageProcessor | ViTCLSImageProcessorPil, theirs: Callable[[PIL.Image.Image], torch.Tensor]
) -> float:
    """Of any pixel of `check_picture`, upright and on its side, in grey levels; infinite for other shapes."""
    differences = []
    for picture in (check_picture(301, 428), check_picture(428, 301)):
        picture = picture if ours.do_convert_rgb else picture.convert("L")
        found, wanted = ours(picture, return_tensors="pt")["pixel_values"][0], theirs(picture)
        if found.shape != wanted.shape:
            return math.inf
        std = torch.tensor(ours.image_std if ours.do_normalize else 1.0).view(-1, 1, 1)
        differences.append(((found - wanted).abs() * std * 255).max().item())
    return max(differences)


def check_picture(height: int, width: int) -> PIL.Image.Image:
    """A smooth picture with an edge, of a size that leaves half pixels beside most crops."""
    y, x = np.mgrid[0:height, 0:width] / 60.0
    channels = [127 + 100 * np.sin(x * frequency + y) + 25 * (x > y) for frequency in (1.0, 2.0, 3.0)]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def default_preprocessing(image_size: tuple[int, int], reason: str) -> Preprocessing:
    """Exactly `image_size` (height, width), bicubic, mean and standard deviation of ImageNet."""
    height, width = image_size
    processor = ViTCLSImageProcessor(size={"height": height, "width": width})
    return Preprocessing(processor, "the default", None, assumed=reason)
