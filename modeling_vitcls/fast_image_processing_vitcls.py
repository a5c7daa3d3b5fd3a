"""From 8-bit pictures to `pixel_values` with nothing around the work: the values of the image processor, to the bit.

    JPEG file -> [3, H, W], 8 bits -> resize -> centre crop -> rescale and normalise, written into the batch

`ViTCLSImageProcessor` takes this way where it has checked its settings before and a call brings none of its own. What
transformers does beside it (checks, groups of equal shapes, copies into another layout) costs as much as the work.
Resizing and cropping are the image processor's own methods; JPEG files are decoded by torchvision, not through PIL.

Nothing here starts PyTorch's threads: on a busy machine, waiting for each other would take them longer than a picture.
A list of files is read by as many threads as PyTorch has been given, each a picture at a time.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.image_utils import SizeDict


try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # without torchvision, or without its decoders, everything is read by PIL
    decode_jpeg = None


JPEG_START = b"\xff\xd8\xff"
URL_STARTS = ("http://", "https://", "data:")


# Decoding ------------------------------------------------------------------------------------------------------------


def read_jpeg(source: Any) -> torch.Tensor | None:
    """A JPEG file, or its bytes, as RGB, upright, [3, H, W] `uint8`: the very pixels that PIL gives.

    None for anything else, and for what torchvision cannot read, or not as PIL does (CMYK): then PIL reads it, or says
    what is wrong.
    """
    encoded = jpeg_bytes(source) if decode_jpeg is not None else None
    if encoded is None:
        return None
    try:
        data = torch.frombuffer(encoded, dtype=torch.uint8)
        pixels = decode_jpeg(data, mode=ImageReadMode.UNCHANGED, apply_exif_orientation=True)
    except RuntimeError:
        return None
    if len(pixels) == 1:
        return pixels.expand(3, -1, -1)
    return pixels if len(pixels) == 3 else None


def jpeg_bytes(source: Any) -> bytearray | None:
    """The content of a JPEG file, or of bytes that are one; None for other content, and for what cannot be read."""
    if isinstance(source, bytes | bytearray):
        return bytearray(source) if source.startswith(JPEG_START) else None
    if not isinstance(source, str | os.PathLike) or str(source).startswith(URL_STARTS):
        return None
    try:
        with Path(source).open("rb") as file:
            start = file.read(len(JPEG_START))
            return bytearray(start + file.read()) if start == JPEG_START else None
    except (OSError, ValueError):
        return None


# Pixels to values ----------------------------------------------------------------------------------------------------


def settings_of(processor: Any, names: list[str]) -> tuple[Any, ...]:
    """What an image processor is set to, to be compared later; sizes as they are now, for they can be changed."""
    values = (getattr(processor, name, None) for name in names)
    return tuple(tuple(vars(value).values()) if isinstance(value, SizeDict) else value for value in values)


def has_fast_way(processor: Any) -> bool:
    """Whether `pixel_values` below does everything that an image processor is set to do."""
    return bool(
        processor.do_rescale
        and processor.do_normalize
        and isinstance(processor.image_mean, tuple)
        and isinstance(processor.image_std, tuple)
        and not processor.do_pad
        and processor.input_data_format is None
        and processor.device is None
    )


def resized(processor: Any, pixels: torch.Tensor) -> torch.Tensor:
    """One picture [C, H, W] `uint8` as large as the model gets it, [C, h, w] `uint8`."""
    if processor.do_resize:
        pixels = processor.resize(pixels, size=processor.size, resample=processor.resample)
    return processor.center_crop(pixels, processor.crop_size) if processor.do_center_crop else pixels


def pixel_values(processor: Any, pictures: list[torch.Tensor]) -> torch.Tensor:
    """Pictures of one shape, [C, h, w] `uint8` on the CPU, rescaled and normalised: [B, C, h, w] float32."""
    mean, std = folded(processor.image_mean, processor.image_std, processor.rescale_factor)
    batch = np.empty((len(pictures), *pictures[0].shape), dtype=np.float32)  # [B, C, h, w]
    for values, picture in zip(batch, pictures, strict=True):
        np.copyto(values, picture.numpy())
        np.subtract(values, mean, out=values)
        np.divide(values, std, out=values)
    return torch.from_numpy(batch)


@lru_cache(maxsize=16)
def folded(mean: tuple[float, ...], std: tuple[float, ...], rescale_factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation in grey levels, float32 [C, 1, 1] each, by the arithmetic of transformers."""
    of_levels = [torch.tensor(values).float() * (1.0 / rescale_factor) for values in (mean, std)]
    return of_levels[0].view(-1, 1, 1).numpy(), of_levels[1].view(-1, 1, 1).numpy()


def in_threads(prepare: Callable[[Any], torch.Tensor], sources: list[Any]) -> list[torch.Tensor]:
    """`prepare` of each, in order."""
    num_threads = min(torch.get_num_threads(), len(sources))
    if num_threads == 1:
        return [prepare(source) for source in sources]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(prepare, sources))
