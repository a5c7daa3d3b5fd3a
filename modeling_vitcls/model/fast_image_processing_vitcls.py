# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""The fast path of the image processor: bit-identical `pixel_values` with less overhead.

    JPEG file -> [3, H, W] uint8 -> resize -> center crop -> rescale and normalize into the batch

`ViTCLSImageProcessor` uses this path for calls whose only keyword argument is
`return_tensors="pt"`, after the first call has checked the settings. The overhead of transformers
(checks, grouping by shape, layout copies) takes as long as the image operations. The image
processor resizes and crops images; torchvision decodes JPEG files. Both decoders are libjpeg-turbo, and their
pixels are equal to the bit (478 of 626 odd files; the other kinds are left to PIL or refused by
both), so that what was computed from a file is the same by either.

Images are normalized in one thread, because several threads are slower for a single image on a busy
machine.
"""

import os
from functools import lru_cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL.ExifTags import Base
from torch import Tensor


try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # PIL reads all files if torchvision or its decoders are not installed
    decode_jpeg = None


JPEG_SIGNATURE = b"\xff\xd8\xff"
LFS_SIGNATURE = b"version https://git-lfs.github.com/spec/"
URL_PREFIXES = ("http://", "https://", "data:")
# Axes to flip for the EXIF orientations 4, 1, 2 and 3, and for 8, 5, 6 and 7 after a transposition
FLIPPED_AXES = ((-2,), (), (-1,), (-2, -1))


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


def open_regular_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file for reading.

    Raise OSError if it is missing, not a regular file after links (a named pipe would block, and a
    device would fill the memory), or what Git leaves in place of a large file.
    """
    file = Path(os.path.expanduser(path))  # noqa: PTH111  # unlike Path's, without errors
    if file.exists() and not file.is_file():
        raise OSError(f"{path} is not a regular file")
    stream = file.open("rb")
    if stream.peek().startswith(LFS_SIGNATURE):
        stream.close()
        raise OSError(
            f"{path} is a pointer of Git LFS instead of the file. Run `git lfs pull` in its folder"
        )
    return stream


def can_use_fast_path(processor: Any) -> bool:
    """Check whether `normalize_batch` supports all settings of an image processor."""
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


def normalize_batch(processor: Any, images: list[Tensor]) -> Tensor:
    """Rescale and normalize `uint8` images [C, h, w] of one shape; return float32 [B, C, h, w]."""
    mean, std = scale_statistics(
        processor.image_mean, processor.image_std, processor.rescale_factor
    )
    # NumPy writes each image to its place in the batch, in one thread and without a copy in
    # between.
    batch = np.empty((len(images), *images[0].shape), dtype=np.float32)  # [B, C, h, w]
    for pixels, image in zip(batch, images, strict=True):
        np.copyto(pixels, image.numpy())
        np.subtract(pixels, mean, out=pixels)
        np.divide(pixels, std, out=pixels)
    return torch.from_numpy(batch)


@lru_cache(maxsize=16)
def scale_statistics(
    mean: tuple[float, ...], std: tuple[float, ...], rescale_factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scale mean and standard deviation [C, 1, 1] to pixels in [0, 255], as transformers does."""
    scaled_statistics = [
        torch.tensor(values).float() * (1.0 / rescale_factor) for values in (mean, std)
    ]
    return scaled_statistics[0].view(-1, 1, 1).numpy(), scaled_statistics[1].view(-1, 1, 1).numpy()
