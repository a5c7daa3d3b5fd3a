"""Convert the preprocessing of other projects to a `ViTCLSImageProcessor`, and compare the outputs.

    timm            `pretrained_cfg`: input_size, interpolation, mean, std, crop_pct, crop_mode
    transformers    `preprocessor_config.json`, read by AutoImageProcessor

If a source has no preprocessing settings, or this package does not support the settings, the
default image processor is used, and the parity report contains the reason.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, ImageProcessingMixin
from transformers.image_processing_backends import PilBackend

from ..model.field_checks_vitcls import Size
from ..model.image_processing_vitcls import ViTCLSImageProcessor, ViTCLSImageProcessorPil


# Maximum allowed pixel difference on the test images, in gray levels (0 to 255). The converted
# processor is compared with the source's preprocessing in the same backend (PIL or torchvision).
# The difference is 0, except for sources that round to gray levels after resizing (DINOv3).
MAX_PIXEL_DIFFERENCE = 1.0

RESAMPLING_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}

# Settings with the same name and meaning in transformers and in this package.
SHARED_SETTINGS = (
    "do_convert_rgb do_resize size resample do_center_crop crop_size do_rescale rescale_factor "
    "do_normalize image_mean image_std"
).split()


# An image processor, and the field `preprocessing` of the parity report.
ConvertedPreprocessing = tuple[ViTCLSImageProcessor, dict[str, Any]]


def convert_timm_preprocessing(model: nn.Module) -> ConvertedPreprocessing:
    """Convert timm's evaluation transform, which is built from the model's `pretrained_cfg`."""
    from timm.data import create_transform, resolve_data_config

    settings: Any = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    # timm resizes with PIL
    return build_checked_processor(
        partial(convert_timm_settings, settings),
        ViTCLSImageProcessorPil,
        create_transform(**settings, is_training=False),
        "timm's pretrained_cfg",
        settings["input_size"][1:],
        # Known, even if another setting is not supported
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
    )


def convert_timm_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Convert the output of `timm.data.resolve_data_config` to image processor settings."""
    channels, height, width = settings["input_size"]
    scaled_height, scaled_width = (
        math.floor(length / settings["crop_pct"]) for length in (height, width)
    )
    interpolation = settings["interpolation"]
    crop_mode = settings["crop_mode"]

    if interpolation not in RESAMPLING_FILTERS:
        raise ValueError(
            f"interpolation={interpolation!r} in timm's pretrained_cfg is not supported"
        )

    if crop_mode == "squash":
        size = {"height": scaled_height, "width": scaled_width}
    elif crop_mode == "center" and height == width:
        size = {"shortest_edge": scaled_height}
    else:
        raise ValueError(
            f"crop_mode={crop_mode!r} for {height} x {width} pixels in timm's pretrained_cfg is "
            "not supported"
        )

    return {
        "do_convert_rgb": channels == 3,
        "size": size,
        "resample": RESAMPLING_FILTERS[interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        # timm crops with torchvision, which rounds half pixels to even.
        "crop_rounding": "even",
    }


def convert_transformers_preprocessing(folder: str, image_size: Size) -> ConvertedPreprocessing:
    """Convert the image processor in a folder.

    If the folder has no supported image processor, build the default image processor for
    `image_size` (height, width).
    """
    try:
        source_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return build_default_preprocessing(image_size, "the source has no image processor")

    is_pil = isinstance(source_processor, PilBackend)
    return build_checked_processor(
        partial(select_settings, source_processor),
        ViTCLSImageProcessorPil if is_pil else ViTCLSImageProcessor,
        partial(apply_processor, source_processor),
        type(source_processor).__name__,
        image_size,
    )


def build_checked_processor(
    read_settings: Callable[[], dict[str, Any]],
    backend_class: Any,
    preprocess: Callable[[PIL.Image.Image], Tensor],
    settings_name: str,
    image_size: Size,
    **known: Any,
) -> ConvertedPreprocessing:
    """Build an image processor, or the default one if its pixels differ from the source's.

    `backend_class` is our class with the backend of the source. Both have the `known` settings.
    """
    try:
        processor = ViTCLSImageProcessor(**read_settings(), **known)
        # PIL and torchvision resize differently, by more than the limit. In the same backend, any
        # difference comes from the settings.
        same_backend_processor = backend_class.from_dict(processor.to_dict())
        difference = check_processor(same_backend_processor, preprocess, settings_name)
    except ValueError as error:
        return build_default_preprocessing(image_size, str(error), **known)
    return processor, {
        "origin": settings_name,  # Name of the settings from which the image processor was built
        "largest_difference_in_gray_levels": difference,
        "assumed_because": "",
    }


def apply_processor(processor: Any, image: PIL.Image.Image) -> Tensor:
    """Preprocess an image; the pixels are [C, H, W]."""
    pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return pixels


def select_settings(
    processor: ImageProcessingMixin, names: Sequence[str] = SHARED_SETTINGS
) -> dict[str, Any]:
    """Select the settings of an image processor that are listed in `names` and are not None."""
    settings = processor.to_dict()
    return {name: settings[name] for name in names if settings.get(name) is not None}


def check_processor(
    processor: ViTCLSImageProcessor | ViTCLSImageProcessorPil,
    preprocess: Callable[[PIL.Image.Image], Tensor],
    settings_name: str,
) -> float:
    """Compare an image processor with the preprocessing of the source on test images.

    `preprocess` is the source's function in the same backend. Return the largest difference in gray
    levels. Raise ValueError if it exceeds MAX_PIXEL_DIFFERENCE. `settings_name` is the name of the
    source's settings.
    """
    largest_difference = 0.0  # Unit: gray levels
    for image in (build_test_image(301, 428), build_test_image(428, 301)):
        image = image if processor.do_convert_rgb else image.convert("L")
        pixels = apply_processor(processor, image)
        expected = preprocess(image)
        if pixels.shape != expected.shape:
            raise ValueError(
                f"the converted processor differs from {settings_name} in the output shape. If the run "
                "has `resize='pad'`, which transformers lacks, train it with 'squash' or 'crop'"
            )

        # A limit for normalized values would depend on the standard deviation, so the comparison is
        # in gray levels.
        std = torch.tensor(processor.image_std if processor.do_normalize else 1.0).view(-1, 1, 1)
        difference = ((pixels - expected).abs() * std * 255).max().item()
        if not difference <= MAX_PIXEL_DIFFERENCE:
            raise ValueError(
                f"the converted processor differs from {settings_name} by {difference:.3g} gray "
                "levels"
            )
        largest_difference = max(largest_difference, difference)
    return largest_difference


def build_test_image(height: int, width: int) -> PIL.Image.Image:
    """Build a smooth image with one edge.

    With an odd height or width, center crops can have half-pixel offsets, which make differences in
    rounding visible.
    """
    y, x = np.mgrid[0:height, 0:width] / 60.0
    channels = [
        127 + 100 * np.sin(x * frequency + y) + 25 * (x > y) for frequency in (1.0, 2.0, 3.0)
    ]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def build_default_preprocessing(
    image_size: Size, reason: str, **known: Any
) -> ConvertedPreprocessing:
    """Build the default image processor, which resizes to `image_size` (height, width)."""
    height, width = image_size
    processor = ViTCLSImageProcessor(size={"height": height, "width": width}, **known)
    return processor, {"assumed_because": reason}
