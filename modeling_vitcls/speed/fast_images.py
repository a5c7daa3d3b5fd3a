"""The pixels of one image, bit-identical to those of the image processor, with less overhead.

    compute_pixels(processor, "photo.jpg")      # [C, h, w]

    JPEG file -> [3, H, W] uint8 -> resize -> center crop -> rescale and normalize

The overhead of transformers (checks, grouping by shape, layout copies) takes as long as the image
operations, so the first image of a processor checks its settings, and later ones only compare them. The image
processor resizes and crops images; torchvision decodes JPEG files. Both decoders are libjpeg-turbo, and their
pixels are equal to the bit (478 of 626 odd files; the other kinds are left to PIL or refused by
both), so that what was computed from a file is the same by either.

Images are normalized in one thread, because several threads are slower for a single image on a busy
machine.
"""

from functools import lru_cache
from io import BytesIO
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import PIL.Image
import torch
from PIL.ExifTags import Base
from torch import Tensor
from transformers.image_utils import SizeDict

from ..model.field_checks_vitcls import open_regular_file
from ..model.image_processing_vitcls import (
    ViTCLSImageProcessor,
    check_statistics,
    count_channels,
    flatten_images,
    image_to_tensor,
)


try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # PIL reads all files if torchvision or its decoders are not installed
    decode_jpeg = None


JPEG_SIGNATURE = b"\xff\xd8\xff"
# Axes to flip for the EXIF orientations 4, 1, 2 and 3, and for 8, 5, 6 and 7 after a transposition
FLIPPED_AXES = ((-2,), (), (-1,), (-2, -1))


# Image processor -> the settings with which a complete call has succeeded
CHECKED_SETTINGS: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()


def compute_pixels(processor: Any, image: Any) -> Tensor:
    """Compute the pixels [C, h, w] float32 of one image, as `processor(image, return_tensors="pt")`.

    Args:
        processor: an image processor. Subclasses of `ViTCLSImageProcessor` and others are called.
        image: what the processor accepts.

    Raises:
        ValueError, RuntimeError: as the image processor.
    """
    is_plain = type(processor) is ViTCLSImageProcessor and can_use_fast_path(processor)
    inputs = list(flatten_images(image))
    if not is_plain or len(inputs) != 1 or not getattr(inputs[0], "is_cpu", True):
        pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels
    (image,) = inputs

    # Attributes that a person may change between two calls
    settings = read_settings(processor)
    if CHECKED_SETTINGS.get(processor) == settings:
        return normalize(processor, load_image(processor, image))

    # Decoded as in later calls: PIL may decode a JPEG a little differently, and threads would
    # decide which photos are among the first.
    decoded = try_read_jpeg(image) if processor.do_convert_rgb else image
    pixels = processor(decoded, return_tensors="pt")["pixel_values"][0]
    CHECKED_SETTINGS[processor] = settings
    return pixels


def read_settings(processor: ViTCLSImageProcessor) -> tuple[Any, ...]:
    """Read all settings of an image processor, as values that can be compared."""
    values = (getattr(processor, name, None) for name in processor._valid_kwargs_names)
    return tuple(
        tuple(vars(value).values()) if isinstance(value, SizeDict) else value for value in values
    )


def load_image(processor: ViTCLSImageProcessor, image: Any) -> Tensor:
    """Load an image, and return it resized and cropped, [C, h, w] `uint8`."""
    to_rgb = bool(processor.do_convert_rgb)
    pixels = try_read_jpeg(image) if to_rgb else image
    if pixels is image:
        pixels = image_to_tensor(
            processor.fetch_images(image),
            to_rgb,
            bit_depth=processor.bit_depth,
            num_channels=count_channels(processor.image_mean),
        )
    check_statistics(len(pixels), image_mean=processor.image_mean, image_std=processor.image_std)
    return resize_and_crop(processor, pixels)


def try_read_jpeg(source: Any) -> Any:
    """Read the upright RGB pixels [3, H, W] `uint8` of a JPEG file (path or bytes).

    The pixels equal those from PIL, which also reads the orientation: torchvision looks at the
    first metadata segment only. Return the source if it is something else, torchvision cannot decode
    it, PIL decodes it differently (CMYK), or PIL refuses it because it has too many pixels.
    """
    jpeg_bytes = read_jpeg_bytes(source) if decode_jpeg is not None else None
    if jpeg_bytes is None:
        return source
    try:
        # Reads the metadata only; torchvision has no limit of size
        orientation = PIL.Image.open(BytesIO(jpeg_bytes)).getexif().get(Base.Orientation, 1)
        # The bytes are a `bytearray`, because PyTorch warns about memory that it must not write to.
        encoded_bytes = torch.frombuffer(jpeg_bytes, dtype=torch.uint8)
        pixels: Tensor = decode_jpeg(encoded_bytes, mode=ImageReadMode.UNCHANGED)
    except Exception:  # Damaged metadata raises errors of any type
        return source

    if orientation in range(2, 9):
        if orientation > 4:
            pixels = pixels.mT
        pixels = pixels.flip(FLIPPED_AXES[orientation % 4])
    return pixels.expand(3, -1, -1) if len(pixels) in (1, 3) else source


def read_jpeg_bytes(source: Any) -> bytearray | None:
    """Read the contents of a JPEG file, given as a path or bytes; None for anything else."""
    if isinstance(source, bytes | bytearray):
        return bytearray(source) if source.startswith(JPEG_SIGNATURE) else None
    try:
        with open_regular_file(source) as file:
            signature = file.read(len(JPEG_SIGNATURE))
            return bytearray(signature + file.read()) if signature == JPEG_SIGNATURE else None
    except (OSError, ValueError, TypeError):  # No path, an address, or a zero byte in the name
        return None


def can_use_fast_path(processor: Any) -> bool:
    """Check whether `normalize` supports all settings of an image processor."""
    return bool(
        processor.do_rescale
        and processor.do_normalize
        and isinstance(processor.image_mean, tuple)
        and isinstance(processor.image_std, tuple)
        and not processor.do_pad
        and processor.input_data_format is None
        and processor.device is None
    )


def resize_and_crop(processor: Any, pixels: Tensor) -> Tensor:
    """Resize and crop one image [C, H, W] `uint8`; return [C, h, w] `uint8`."""
    if processor.do_resize:
        pixels = processor.resize(pixels, size=processor.size, resample=processor.resample)
    return (
        processor.center_crop(pixels, processor.crop_size) if processor.do_center_crop else pixels
    )


def normalize(processor: Any, image: Tensor) -> Tensor:
    """Rescale and normalize a `uint8` image [C, h, w]; return float32."""
    mean, std = scale_statistics(
        processor.image_mean, processor.image_std, processor.rescale_factor
    )
    pixels = np.empty(image.shape, dtype=np.float32)
    # NumPy needs one thread and no copy in between.
    np.copyto(pixels, image.numpy())
    np.subtract(pixels, mean, out=pixels)
    np.divide(pixels, std, out=pixels)
    return torch.from_numpy(pixels)


@lru_cache(maxsize=16)
def scale_statistics(
    mean: tuple[float, ...], std: tuple[float, ...], rescale_factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scale mean and standard deviation [C, 1, 1] to pixels in [0, 255], as transformers does."""
    scaled_statistics = [
        torch.tensor(values).float() * (1.0 / rescale_factor) for values in (mean, std)
    ]
    return scaled_statistics[0].view(-1, 1, 1).numpy(), scaled_statistics[1].view(-1, 1, 1).numpy()
