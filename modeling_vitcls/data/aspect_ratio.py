"""How an image of any aspect ratio becomes the input of the model, and what the model sees.

    squash  the whole image is resized to the input size, which changes its aspect ratio
    crop    the shorter side is resized, and the center is cropped
    pad     the longer side is resized, and gray is added on the right or at the bottom

The setting is stored only in the image processor (`size`, `do_center_crop`, `do_pad`), so training,
prediction, export and transformers' pipelines agree.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict

from ..model.field_checks_vitcls import Size
from ..model.image_processing_vitcls import CROP_ROUNDINGS
from ..speed.fast_images import resize_and_crop
from .images import read_size


MAX_MEASURED_IMAGES = 64  # Number of images whose size is read

# A ViTCLSImageProcessor or ViTCLSImageProcessorPil; transformers sets the attributes dynamically
Processor = Any


# Left, top, right and bottom edge, in pixels, of the image region that the model receives: a box of
# PIL. The region extends beyond the image if the processor pads the image.
VisibleRegion = tuple[float, float, float, float]


def set_resize(processor: Processor, resize: str, height_width: Size) -> None:
    """Set the size and the resizing of an image processor.

    A center crop keeps its ratio to the resized image.
    """
    height, width = height_width
    size = SizeDict(height=height, width=width)
    has_same_crop = processor.do_center_crop and dict(processor.crop_size) == dict(size)
    # The checkpoint's own crop stays as it is: the resized side, computed again from the rounded
    # ratio, could differ by a pixel.
    if resize == "crop" and has_same_crop:
        return

    crop_ratio = 1.0  # Size of the crop / size of the resized image (`crop_pct` in timm)
    if processor.do_resize and processor.do_center_crop:
        resized = processor.size
        resized_side = resized.shortest_edge or resized.height or resized.max_height
        crop_ratio = min(processor.crop_size.height / resized_side, 1.0)

    processor.do_resize = True
    processor.do_center_crop = resize == "crop"
    processor.do_pad = resize == "pad"
    processor.size = size

    if resize == "crop":
        processor.size = SizeDict(shortest_edge=math.floor(max(height_width) / crop_ratio))
        processor.crop_size = size
    elif resize == "pad":
        processor.size = SizeDict(max_height=height, max_width=width)
        processor.pad_size = size


def get_output_size(processor: Processor, default: Size | None = None) -> Size:
    """Compute the height and width of the preprocessed images.

    They are known after `set_resize`. For another processor, whose images keep their aspect ratio,
    `default` is returned if it is set.
    """
    names = {"crop": "crop_size", "pad": "pad_size", "squash": "size"}
    size = getattr(processor, names[get_resize(processor)])
    if default is not None and not (size and size.height and size.width):
        return default
    return size.height, size.width


def get_resize(processor: Processor) -> str:
    """Tell how an image processor makes images the input: crop, squash or pad."""
    if processor.do_center_crop:
        return "crop"
    return "pad" if processor.do_pad else "squash"


def resize_pixels(processor: Processor, keep_resolution: bool, pixels: Tensor) -> Tensor:
    """Resize, crop and pad an image [..., C, H, W] `uint8` as an image processor does, without normalization.

    With `keep_resolution`, it is padded to the aspect ratio of the input, but not resized or cropped.
    """
    if not keep_resolution:
        pixels = resize_and_crop(processor, pixels)
    if not processor.do_pad:
        return pixels

    height, width = pixels.shape[-2:]
    size = processor.pad_size
    scale = max(height / size.height, width / size.width) if keep_resolution else 1.0
    right = round(size.width * scale) - width
    bottom = round(size.height * scale) - height

    # 0 after normalization
    mean = processor.image_mean if processor.do_normalize else 0.0
    fill = [round(255 * value) for value in np.ravel(mean).tolist()]  # One for all, or for each
    return functional.pad(pixels, [0, 0, right, bottom], fill[: pixels.shape[-3]])


# Visible region -----------------------------------------------------------------------------------


def get_visible_region(processor: Processor, image_size: Size, patch_size: Size) -> VisibleRegion:
    """Find the region of an image that the model sees.

    Without cropping, the region is the whole image. A center crop keeps the middle of the image. A
    crop larger than the resized image adds padding on both sides, and `do_pad` adds padding on the
    right and at the bottom. The region then extends beyond the image.

    Args:
        image_size: height and width of the upright image.
        patch_size: height and width of patches (`config.patch_height_width`). Pixels on the right
            and at the bottom that do not fill a patch are excluded, as in the model.
    """
    # Both backends compute the same size, and the device "meta" computes no pixels.
    resized = torch.empty((1, *image_size), device="meta")
    if processor.do_resize:
        resized = TorchvisionBackend.resize(processor, resized, processor.size)
    _, *resized_size = resized.shape

    height, width = resized_size
    top = left = 0
    if processor.do_center_crop:
        height = processor.crop_size["height"]
        width = processor.crop_size["width"]
        offsets = ((resized_size[0] - height) / 2, (resized_size[1] - width) / 2)
        if min(offsets) < 0:  # The image is smaller than the crop, which pads it
            round_offset = PAD_ROUNDINGS[processor.backend]
        else:
            round_offset = CROP_ROUNDINGS[processor.crop_rounding]
        top, left = map(round_offset, offsets)

    if processor.do_pad and processor.pad_size:
        height = processor.pad_size["height"]
        width = processor.pad_size["width"]
    height = height // patch_size[0] * patch_size[0]
    width = width // patch_size[1] * patch_size[1]

    y_scale = image_size[0] / resized_size[0]
    x_scale = image_size[1] / resized_size[1]
    return left * x_scale, top * y_scale, (left + width) * x_scale, (top + height) * y_scale


# Backend of the processor -> rounding of half pixels in a center crop that pads.
PAD_ROUNDINGS: dict[str, Callable[[float], int]] = {"torchvision": math.trunc, "pil": math.floor}


def read_sizes(images: Sequence[Any]) -> list[Size]:
    """Read the sizes of up to `MAX_MEASURED_IMAGES` images, evenly spaced."""
    sizes = []
    for index in range(0, len(images), -(-len(images) // MAX_MEASURED_IMAGES) or 1):
        with suppress(ValueError):  # An unreadable image is reported when it is used
            sizes.append(read_size(images, index))
    return sizes
