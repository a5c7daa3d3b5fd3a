# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""The image processor: from paths, URLs, PIL images, arrays and tensors to `pixel_values`.

    source -> upright image -> [C, H, W] uint8 -> resize -> center crop -> rescale -> normalize
    |______________ this file _______________|    |___________ transformers' backends ________|

This file reads sources (paths, bytes, URLs), applies EXIF orientation, converts channels and bit
depths, and checks settings. The backends of transformers (torchvision or PIL) perform the remaining
steps. Augmentation for training is elsewhere, and the commands of the package compute the same pixels
faster. At the end are pipelines of transformers that hand an image to the processor as it is: its own
convert every image to RGB first, which clips 16-bit images and drops transparency. The configuration of a
folder names them (`custom_pipelines`), for `pipeline(..., trust_remote_code=True)`.
"""

import base64
import copy
import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from io import BytesIO
from typing import Any
from urllib.request import urlopen

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from huggingface_hub.utils import get_session
from PIL.ExifTags import Base
from torch import Tensor
from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
    is_valid_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import is_torchvision_available, logging

from .field_checks_vitcls import open_regular_file, raise_one_line_errors


logger = logging.get_logger(__name__)

# `auto_map` of both backends (torchvision, PIL). By default, transformers saves only the class of
# the saved processor.
AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_vitcls.ViTCLSImageProcessor",
        "pil": "image_processing_vitcls.ViTCLSImageProcessorPil",
    }
}

# Formats that PIL may open. EPS is excluded, because PIL opens it with an external program.
IMAGE_FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM AVIF JPEG2000 ICO HEIF".split()

# Resampling filters that both backends support.
RESAMPLING_FILTERS = tuple(map(PILImageResampling, range(4)))  # Nearest, Lanczos, bilinear, bicubic

# Rounding of half pixels in the margins of a center crop: down in transformers, to even in
# torchvision and timm.
CROP_ROUNDINGS: dict[str, Callable[[float], int]] = {"down": math.floor, "even": round}

MAX_SAMPLE_VALUE = 281  # Tag of a TIFF. Some writers put the largest value of the image there
BIT_DEPTHS = {1023: 10, 4095: 12, 16383: 14}  # Largest possible value -> number of bits
REPORTED_BIT_DEPTHS: set[int] = set()  # Numbers of bits that a warning has named

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # Weights of red, green and blue (ITU-R BT.601)
DOWNLOAD_TIMEOUT = 60.0  # Seconds without a byte
MAX_SIDE = 4096  # Maximum height and width of a processed image, in pixels: 17 megapixels

SOURCE_TYPES = (str, os.PathLike, bytes, bytearray)
URL_PREFIXES = ("http://", "https://", "data:")


class ViTCLSBaseImageProcessor(BaseImageProcessor):
    """Base class of the image processors: default settings, loading, conversion and checks."""

    do_convert_rgb = True
    do_resize = True
    size: Any = {"height": 224, "width": 224}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    _auto_class = "AutoImageProcessor"  # type: ignore[assignment]  # The code is saved

    def __init__(
        self, crop_rounding: str = "down", bit_depth: int = 16, **kwargs: Unpack[ImagesKwargs]
    ) -> None:
        if isinstance(self, TorchvisionBackend) and not is_torchvision_available():
            raise ImportError(
                f"{type(self).__name__} requires torchvision. Install torchvision or set "
                "backend='pil'."
            )
        check_setting_names(kwargs)
        if type(bit_depth) is not int or not 9 <= bit_depth <= 16:
            raise ValueError(f"bit_depth must be an integer from 9 to 16, not {bit_depth!r}.")
        if crop_rounding not in CROP_ROUNDINGS:
            raise ValueError(
                f"Unknown crop_rounding {crop_rounding!r}. Use {' or '.join(CROP_ROUNDINGS)}."
            )
        super().__init__(**kwargs)
        if "--" in str(kwargs.get("auto_map")):  # OWNER/REPOSITORY--FILE.CLASS: no code is saved
            self._auto_class = None  # type: ignore[assignment]
        self.crop_rounding = crop_rounding
        self.bit_depth = bit_depth

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load the processor of a checkpoint; of another ViT, it computes the same pixels.

        The checkpoint is as in `from_pretrained` of the models, which also says what is raised.
        """
        # Not a global: `datasets` hashes a processor with all globals of its methods
        from .field_checks_vitcls import find_checkpoint

        source = find_checkpoint(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(source, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Write the settings for `preprocessor_config.json`, with both backends in `auto_map`."""
        settings = super().to_dict()
        settings.pop("_auto_class", None)
        if "--" not in str(settings.get("auto_map")):
            settings["auto_map"] = copy.deepcopy(AUTO_MAP)
        return settings

    def preprocess(self, images: Any, *args: Any, **kwargs: Unpack[ImagesKwargs]) -> BatchFeature:
        """Preprocess an image, a batch or a list; keyword arguments override the settings."""
        # No decorator: `datasets` hashes the method, and cannot hash a generator in its closure
        with raise_one_line_errors():
            check_setting_names(kwargs)
            return super().preprocess(images, *args, **kwargs)  # type: ignore[no-any-return]

    def fetch_images(self, images: Any) -> Any:
        """Read every path, URL and encoded image in a (nested) list.

        Images in memory are returned unchanged.

        Raises:
            ValueError: If a path, URL or encoded image cannot be read, or if an object is not an
                image.
        """
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, SOURCE_TYPES):
            return read_image(images)
        if is_valid_image(images):
            return images
        raise ValueError(
            f"cannot use {type(images).__name__} as an image: pass a path, bytes, PIL image, array "
            "or tensor"
        )

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Convert one image in memory to the shape [C, H, W] and type that the backend requires."""
        do_rescale = bool(kwargs.get("do_rescale"))
        pixels = image_to_tensor(
            image,
            bool(do_convert_rgb),
            do_rescale,
            input_data_format,
            self.bit_depth,
            num_channels=count_channels(kwargs.get("image_mean")),
        )
        if kwargs.get("do_normalize"):
            check_statistics(
                len(pixels),
                image_mean=kwargs.get("image_mean"),
                image_std=kwargs.get("image_std"),
            )
            if not do_rescale and pixels.dtype is torch.uint8 and np.max(kwargs["image_mean"]) <= 1:
                raise ValueError(
                    "do_rescale=False requires floats from 0 to 1, but this image has integers: "
                    "set do_rescale=True, or divide the values by 255"
                )
        return super().process_image(
            pixels, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, **kwargs
        )

    def center_crop(self, image: Any, size: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Crop the center of images [..., H, W] to `size`; `crop_rounding` rounds the margins."""
        margins = [
            (old - new) / 2
            for old, new in zip(image.shape[-2:], (size.height, size.width), strict=True)
        ]
        # An image that is smaller than the crop is padded, as in transformers.
        if min(margins) < 0:
            return super().center_crop(image, size, **kwargs)
        top, left = map(CROP_ROUNDINGS[self.crop_rounding], margins)
        return image[..., top : top + size.height, left : left + size.width]

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        """Return a flat list of images.

        Unlike transformers, this class accepts grayscale arrays [H, W].
        """
        single_images = list(flatten_images(self.fetch_images(images)))
        if not single_images:
            raise ValueError("the list of images is empty: pass one or more images")
        return single_images

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the settings in canonical form, as `__init__` and `preprocess` require them."""
        settings = super()._standardize_kwargs(**kwargs)
        resample = settings.get("resample")
        filters = ", ".join(f"{int(each)} ({each.name.lower()})" for each in RESAMPLING_FILTERS)
        size, crop_size, pad_size = (
            dict(settings.get(name) or {}) for name in ("size", "crop_size", "pad_size")
        )
        is_cropped = bool(settings.get("do_center_crop") and settings.get("do_resize"))
        sides = [*size.values(), *crop_size.values(), *pad_size.values()]
        if settings.get("rescale_factor") == 0:
            raise ValueError("rescale_factor must not be 0")
        if np.any(np.equal(settings.get("image_std", 1), 0)):
            raise ValueError("image_std must not be 0")
        if any(side is not None and not 1 <= side <= MAX_SIDE for side in sides):
            raise ValueError(
                f"size {size}, crop_size {crop_size} and pad_size {pad_size} must be from 1 to "
                f"{MAX_SIDE:,} pixels"
            )
        if isinstance(resample, int | str) and resample not in RESAMPLING_FILTERS:
            raise ValueError(f"unknown resample {resample!r}: use one of {filters}")
        is_larger = any(
            (crop_size.get(edge) or 0) > (size.get(edge) or size.get("shortest_edge") or math.inf)
            for edge in ("height", "width")
        )
        if is_cropped and is_larger:
            raise ValueError(
                f"crop_size {crop_size} is larger than an image resized to {size}: reduce crop_size"
            )
        return settings

    def _preprocess(
        self, images: list[Any], return_tensors: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Resize, crop, rescale, normalize and stack the images."""
        batch = super()._preprocess(images, return_tensors=None, **kwargs)
        if return_tensors is not None:
            check_same_shape(batch["pixel_values"])
        return BatchFeature(data=dict(batch), tensor_type=return_tensors)


class ViTCLSImageProcessor(ViTCLSBaseImageProcessor, TorchvisionBackend):  # type: ignore[misc]
    r"""Image processor for the ViTCLS models, based on torchvision, for the CPU or a GPU (`device="cuda"`).

    The input is an image, a batch or a list. The output is a `BatchFeature` with `pixel_values` [B,
    C, H, W] float32. An image is a path (`str`, `pathlib.Path`), a URL (`http`, `https`, `data`),
    an encoded file as `bytes`, a PIL image, or an array or tensor of shape [H, W], [C, H, W] or [H,
    W, C]. `IMAGE_FORMATS` lists the file formats; of an animation, the first frame is read.

    Before resizing, images are turned upright (EXIF) and become 8-bit RGB: 1-bit values become 0 and
    255, 16-bit values are divided by 257, and transparent images are composited on white. Other
    integers must be from 0 to 255, and floats from 0 to 1. With `do_convert_rgb=False`, gray images
    have 1 channel, color images 3, or 4 with transparency, and arrays keep their channels;
    `image_mean` and `image_std` require one value for each (of one, color images become gray).

    `ViTCLSImageProcessorPil` returns the same values up to rounding if images are not resized. With
    bilinear or bicubic resizing, values differ by at most 2 of 255 gray levels (mean: 0.05) for
    photographs, and by at most 16 (mean: 0.5) for noise, because PIL rounds and clips between
    passes. With other filters, they differ more.

    Args:
        do_convert_rgb (`bool`, defaults to `True`): Whether every image gets three channels.
        do_resize (`bool`, defaults to `True`): Whether to resize to `size`.
        size (`dict` or `int`, defaults to `{"height": 224, "width": 224}`): Size in pixels: exact,
            or `{"shortest_edge": 256}`, which keeps the aspect ratio. An `int` sets both sides.
        resample (`int`, defaults to 3): 0 nearest; with antialiasing: 1 Lanczos, 2 bilinear,
            3 bicubic.
        do_center_crop (`bool`, *optional*): Whether to crop the center of the image to `crop_size`.
        crop_size (`dict` or `int`, *optional*): In pixels, at most the size after resizing.
        crop_rounding (`"down"` or `"even"`, defaults to `"down"`): Rounding of crop margins that
            are not whole pixels: down as in transformers, or half to even as in torchvision and
            timm. Calls cannot override it.
        bit_depth (`int`, defaults to 16): Number of bits, from 9 to 16, that 16-bit images of a
            camera or microscope use, unless a TIFF states it. Calls cannot override it.
        do_rescale (`bool`, defaults to `True`): Whether to multiply by `rescale_factor`. Floats are
            rounded to 256 levels first; with False, they are not.
        rescale_factor (`float`, defaults to 1/255): Factor of pixel values.
        do_normalize (`bool`, defaults to `True`): Whether to subtract `image_mean` and divide by
            `image_std`.
        image_mean, image_std (`float` or `list[float]`): Statistics of rescaled values per channel;
            those of ImageNet by default (DeiT, DINO). transformers' ViT has 0.5 and `resample=2`.

    Raises:
        ValueError: If an image or a setting cannot be used, in one line.

    Examples:
        >>> from modeling_vitcls import ViTCLSImageProcessor
        >>> processor = ViTCLSImageProcessor(size=224)
        >>> processor("photo.jpg", return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 224, 224])
    """


class ViTCLSImageProcessorPil(ViTCLSBaseImageProcessor, PilBackend):  # type: ignore[misc]
    """Image processor for the ViTCLS models, based on PIL and NumPy.

    Images are processed one by one.

    Settings, inputs and errors are the same as in `ViTCLSImageProcessor`, whose docstring states
    how outputs differ.

    Examples:
        >>> from modeling_vitcls import ViTCLSImageProcessorPil
        >>> processor = ViTCLSImageProcessorPil(size=224)
        >>> processor("photo.jpg", return_tensors="np")["pixel_values"].shape
        (1, 3, 224, 224)
    """


# Reading sources ----------------------------------------------------------------------------------
def read_image(source: str | os.PathLike[str] | bytes | bytearray) -> PIL.Image.Image:
    """Load an upright image, in the color mode of the file, from a path, a URL or encoded bytes.

    Raises:
        ValueError: If the source cannot be read or is not a complete image. The message names the
            source.
    """
    content: bytes | bytearray | None = None
    path: Any = source
    if isinstance(source, bytes | bytearray):
        content = source
        source_name = f"{len(source)} bytes"
    else:
        source_name = shorten_text(os.fspath(source))
        if str(source).startswith(URL_PREFIXES):
            content = read_url(str(source), source_name)

    try:
        with (
            BytesIO(content) if content is not None else open_regular_file(path) as file,
            PIL.Image.open(file, formats=get_image_formats()) as image,
        ):
            # The first image of a raw file (NEF, DNG, ARW) is a reduced one, and the photo a SubIFD
            if (
                image.format == "TIFF"
                and image.tag_v2.get(Base.NewSubfileType) == 1  # type: ignore[attr-defined]
                and Base.SubIFDs in image.tag_v2  # type: ignore[attr-defined]
            ):
                raise ValueError(
                    f"it is a camera's raw file, of which only a thumbnail of {image.width} x "
                    f"{image.height} pixels can be read. Export the photo as JPEG"
                )
            PIL.ImageOps.exif_transpose(image, in_place=True)  # Keeps the tags of a TIFF
            if content is None:  # Messages name it; Pillow sets it only for files that it opens
                image.filename = os.fspath(path)
            return image
    except PIL.UnidentifiedImageError as error:
        # PIL's message contains the repr of a BytesIO object
        reason = f"it is not an image in a supported format ({', '.join(get_image_formats())}). A table is a `dataset`"
        if starts_like_an_image(path if content is None else content):
            reason = (
                "the file is damaged, such as by a wrong checksum, or has bands that are not supported. Export "
                "the image again, with three bands"
            )
        raise ValueError(f"cannot read an image from {source_name}: {reason}") from error
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(
            f"cannot read an image from {source_name}: {get_first_line(error)} Make it smaller or, "
            "if you trust it, set PIL.Image.MAX_IMAGE_PIXELS (`vitcls predict --max-megapixels`)"
        ) from error
    except Exception as error:  # Pillow's decoders raise almost any exception for damaged data
        reason = get_first_line(error)
        if "MAX_TEXT" in reason:  # A limit of Pillow
            reason = "its metadata (texts or color profile) exceeds 1 MB. Save the image without it"
        raise ValueError(f"cannot read an image from {source_name}: {reason}") from error


def starts_like_an_image(source: Any) -> bool:
    """Tell whether a path or encoded bytes begin like PNG, JPEG, GIF or TIFF."""
    if not isinstance(source, bytes | bytearray):
        with open_regular_file(source) as file:
            source = file.read(4)
    return bool(re.match(rb"\x89PNG|\xff\xd8\xff|GIF8|II\*\0|MM\0\*", bytes(source[:4])))


@cache
def get_image_formats() -> tuple[str, ...]:
    """List the formats in `IMAGE_FORMATS` that the installed Pillow can open.

    HEIF (HEIC) requires the library pillow-heif.
    """
    PIL.Image.init()
    try:  # The scanner of remote code exempts imports in `try`
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass
    return tuple(name for name in IMAGE_FORMATS if name in PIL.Image.OPEN)


def read_url(url: str, source_name: str) -> bytes:
    """Read the contents of an `http`, `https` or `data` URL (RFC 2397)."""
    try:
        if url.startswith("data:"):
            with urlopen(url) as data:
                content: bytes = data.read()
            return content
        response = get_session().get(url, follow_redirects=True, timeout=DOWNLOAD_TIMEOUT)
        response.raise_for_status()
        return response.content
    except Exception as error:  # The type depends on the version of huggingface_hub
        raise ValueError(
            f"cannot fetch the image at {source_name}: {get_first_line(error)}"
        ) from error


def shorten_text(text: str) -> str:
    """Quote a text; if it has more than 200 characters, `...` replaces the middle."""
    return repr(text if len(text) <= 200 else f"{text[:40]}...{text[-120:]}")


def get_first_line(error: Exception) -> str:
    """Take the first line of an error message, at most 300 characters, or the error type.

    The errors of the system repeat the name of the file, and may end after its first characters.
    """
    message = getattr(error, "strerror", None) or str(error)
    return (message.splitlines() or [type(error).__name__])[0][:300]


def flatten_images(images: Any) -> Iterator[Any]:
    """Yield the images of nested lists and 4-dimensional batches, in order."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from flatten_images(image)
    elif getattr(images, "ndim", None) == 4:
        yield from images
    else:
        yield images


# Channels and bit depth ---------------------------------------------------------------------------
def image_to_tensor(
    image: Any,
    to_rgb: bool,
    do_rescale: bool = True,
    input_data_format: str | ChannelDimension | None = None,
    bit_depth: int = 16,
    num_channels: int = 3,
) -> Tensor:
    """Convert one image in memory to an upright tensor [C, H, W].

    The type is `uint8`, or `float32` for floats without rescaling. Arrays and tensors have the
    shape [H, W], [C, H, W] or [H, W, C]; C is 1, 3, 4 or `num_channels`, which the model reads.
    """
    if isinstance(image, PIL.Image.Image):
        return pil_to_tensor(image, to_rgb, bit_depth, num_channels)
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "biuf":
            raise ValueError(f"cannot use an array of {image.dtype} as an image: pass numbers")
        # `np.require` copies arrays only if they are read-only or not C-contiguous.
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    image = to_channels_first(image, input_data_format, num_channels)
    pixels = to_uint8(image, do_rescale, bit_depth)
    if to_rgb:
        return convert_to_rgb(pixels)
    return convert_to_gray(pixels) if num_channels == 1 else pixels


def pil_to_tensor(
    image: PIL.Image.Image, to_rgb: bool, bit_depth: int, num_channels: int | None = None
) -> Tensor:
    """Convert one PIL image of any mode to an upright [C, H, W] `uint8` tensor.

    For a model with `num_channels=1`, the image becomes gray.
    """
    name = shorten_text(getattr(image, "filename", "") or f"PIL image of mode {image.mode}")
    try:
        tags = getattr(image, "tag_v2", {})  # What a TIFF says about its values
        stated = BIT_DEPTHS.get(tags.get(MAX_SAMPLE_VALUE, (0,))[0], 16)
        bit_depth = min(bit_depth, stated, *tags.get(Base.BitsPerSample, ()))
        image = PIL.ImageOps.exif_transpose(image)  # Also loads a lazily opened image
        values = pil_to_array(image)
        pixels = to_channels_first(torch.from_numpy(values), ChannelDimension.LAST)
        pixels = to_uint8(pixels, do_rescale=True, bit_depth=bit_depth, name=name)
    except Exception as error:  # A lazily opened image is decoded here
        raise ValueError(f"cannot use the image {name}: {get_first_line(error)}") from error

    if to_rgb:
        return convert_to_rgb(pixels)
    is_gray = num_channels == 1 or PIL.Image.getmodebase(image.mode) == "L"
    return convert_to_gray(pixels) if is_gray else pixels


def pil_to_array(image: PIL.Image.Image) -> np.ndarray:
    """Read the values of a PIL image: [H, W], [H, W, 3], or [H, W, 4] with transparency."""
    if image.mode == "F":
        raise ValueError(
            "mode F has no fixed range: convert to mode L, or pass an array of floats from 0 to 1"
        )
    if image.mode.startswith("I"):
        if "transparency" in image.info:
            raise ValueError(
                "a gray image of 16 bits with a transparent level is not supported: save it with 8 bits"
            )
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"values must be between 0 and 65535, but range from {values.min()} to "
                f"{values.max()}"
            )
        # PIL may read 16-bit files as 32-bit integers (mode I), and only the range shows which they
        # are.
        return values.astype(np.uint16)
    if image.has_transparency_data:
        return np.array(image.convert("RGBA"))
    return np.array(image if image.mode in ("1", "L", "RGB") else image.convert("RGB"))


def to_channels_first(
    image: Tensor, data_format: str | ChannelDimension | None, num_channels: int = 3
) -> Tensor:
    """Order an image as [C, H, W]; C is the axis with `num_channels`, otherwise with 1, 3 or 4."""
    shape = list(image.shape)
    if image.ndim not in (2, 3) or image.numel() == 0:
        raise ValueError(
            "an image must have shape [H, W], [C, H, W] or [H, W, C] and at least 1 pixel, not "
            f"{shape}"
        )
    if image.ndim == 2:
        return image[None]
    if data_format is None:
        ends = {shape[0], shape[2]}
        counts = {num_channels} if num_channels in ends else {1, 3, 4}
        if not ends & counts:
            raise ValueError(
                f"an image of shape {shape} has {num_channels or 3} channels (or 1, 3, 4) neither "
                "in its first nor in its last axis"
            )
        data_format = infer_channel_dimension_format(
            image,  # type: ignore[arg-type]
            num_channels=tuple(counts),
        )
    return (
        image.permute(2, 0, 1) if ChannelDimension(data_format) is ChannelDimension.LAST else image
    )


def to_uint8(pixels: Tensor, do_rescale: bool, bit_depth: int, name: str = "an image") -> Tensor:
    """Convert pixels [C, H, W] of any type to `uint8` from 0 to 255.

    Floats are from 0 to 1; without rescaling, they become `float32`. The conversion is necessary,
    because the results of the two backends are almost equal only for `uint8` images.
    """
    if pixels.dtype is torch.uint8:
        return pixels
    if pixels.dtype is torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.dtype is torch.uint16:
        return uint16_to_uint8(pixels.to(torch.int32), bit_depth, name)

    is_float = pixels.is_floating_point()
    minimum, maximum = (bound.item() for bound in torch.aminmax(pixels.double()))
    if not (minimum >= 0 and maximum <= (1 if is_float else 255)):
        raise ValueError(
            f"the values of this image are between {minimum:g} and {maximum:g}, but floats must be "
            "from 0 to 1 and integers from 0 to 255: clip floats, or divide them by the largest "
            "possible value, and pass 16-bit values as uint16"
        )
    if is_float and not do_rescale:
        return pixels.float()
    return (pixels.float() * 255).round().to(torch.uint8) if is_float else pixels.to(torch.uint8)


def uint16_to_uint8(pixels: Tensor, bit_depth: int, name: str) -> Tensor:
    """Convert `int32` pixels of which `bit_depth` bits are used to `uint8`, rounded to nearest.

    Log a warning if the image uses at most 14 of 16 bits, because it is then almost black. It is
    logged once for each number of bits.
    """
    white = 2**bit_depth - 1
    maximum = int(pixels.max())
    if maximum > white:
        raise ValueError(f"values up to {maximum} exceed bit_depth={bit_depth}: set a larger one")
    num_bits = max(maximum.bit_length(), 9)
    if bit_depth == 16 and maximum and num_bits <= 14 and num_bits not in REPORTED_BIT_DEPTHS:
        REPORTED_BIT_DEPTHS.add(num_bits)
        logger.warning(
            f"The largest 16-bit value of {name} is {maximum:,}, so the image is almost black. If "
            f"such files use {num_bits} of the 16 bits, set bit_depth={num_bits} in the image "
            "processor (`vitcls finetune --bit-depth`)."
        )
    rounded: Tensor = (2 * 255 * pixels + white) // (2 * white)
    return rounded.to(torch.uint8)


def convert_to_rgb(pixels: Tensor) -> Tensor:
    """Convert a gray, RGB or RGBA image [1, 3 or 4, H, W] to RGB [3, H, W]."""
    if len(pixels) == 4:
        return composite_on_white(pixels)
    if len(pixels) not in (1, 3):
        raise ValueError(
            f"cannot convert an image with {len(pixels)} channels to RGB: set do_convert_rgb=False"
        )
    return pixels.expand(3, -1, -1)


def convert_to_gray(pixels: Tensor) -> Tensor:
    """Convert a gray, RGB or RGBA image [1, 3 or 4, H, W] to gray [1, H, W], weighted as in PIL."""
    if len(pixels) == 1:
        return pixels
    color = convert_to_rgb(pixels)
    weights = color.new_tensor(GRAY_WEIGHTS, dtype=torch.float32)[:, None, None]
    gray = (color * weights).sum(dim=0, keepdim=True)
    return gray if pixels.is_floating_point() else gray.round().to(pixels.dtype)


def composite_on_white(pixels: Tensor) -> Tensor:
    """Composite RGBA [4, H, W] on a white background; return RGB [3, H, W] in the same type."""
    white = 1.0 if pixels.is_floating_point() else 255.0
    color = pixels[:3].float()  # [3, H, W]
    alpha = pixels[3:].float() / white  # [1, H, W]
    composite = color * alpha + white * (1 - alpha)
    return composite if pixels.is_floating_point() else composite.round().to(pixels.dtype)


# Checks of settings -------------------------------------------------------------------------------
def check_setting_names(keywords: dict[str, Any] | ImagesKwargs) -> None:
    """Raise ValueError for misspelled settings; transformers handles other unknown keywords."""
    settings = ImagesKwargs.__annotations__
    for keyword in keywords.keys() - settings.keys():
        if matches := difflib.get_close_matches(keyword, settings, n=1, cutoff=0.85):
            raise ValueError(f"unknown setting {keyword!r}: did you mean {matches[0]!r}?")


def check_same_shape(images: list[Any]) -> None:
    """Raise ValueError unless all images [C, H, W] of a batch have the same shape."""
    shapes = sorted({tuple(pixels.shape) for pixels in images})
    if len(shapes) > 1:
        raise ValueError(
            f"the images of this batch have different shapes {shapes} and cannot be stacked: set "
            "an exact size or do_center_crop (and do_convert_rgb if the channels differ), or pass "
            "the images one by one"
        )


def count_channels(image_mean: float | Sequence[float] | None) -> int:
    """Count the channels that a mean is for. One number for all channels counts as 3."""
    return len(image_mean) if isinstance(image_mean, list | tuple) else 3


def check_statistics(num_channels: int, **statistics: float | Sequence[float] | None) -> None:
    """Raise ValueError unless mean and std are scalars or have one value per channel."""
    for name, values in statistics.items():
        if isinstance(values, list | tuple) and len(values) != num_channels:
            raise ValueError(
                f"{name} has {len(values)} values, but this image has {num_channels} channels: "
                f"pass images with {len(values)} channels, or set one value per channel (and "
                "do_convert_rgb=False, unless there are 3)"
            )


# Pipelines ----------------------------------------------------------------------------------------
# Shorter texts are paths; the smallest encoded images have about as many characters
MIN_BASE64_LENGTH = 100


class ImageReading:
    """Hands an image to the image processor as it is. Those of other models read what they did."""

    image_processor: Any
    dtype: Any

    def preprocess(self, image: Any, timeout: float | None = None, **settings: Any) -> Any:
        """Read and preprocess one image: a path, URL, base64, bytes, a PIL image or an array.

        Raises:
            ValueError: If it cannot be read, as in `ViTCLSImageProcessor`.
        """
        if not hasattr(self.image_processor, "bit_depth"):
            return super().preprocess(image, timeout, **settings)  # type: ignore[misc]
        is_path = not isinstance(image, str) or os.path.lexists(image)
        if not is_path and len(image) >= MIN_BASE64_LENGTH:
            # An address has characters that base64 has not
            with suppress(ValueError):
                image = base64.b64decode(image, validate=True)
        return self.image_processor(image, return_tensors="pt", **settings).to(self.dtype)


class ViTCLSImageClassificationPipeline(ImageReading, ImageClassificationPipeline):  # type: ignore[misc]
    """`pipeline("image-classification", ...)`: the labels of an image, the most probable first."""


class ViTCLSImageFeatureExtractionPipeline(ImageReading, ImageFeatureExtractionPipeline):  # type: ignore[misc]
    """`pipeline("image-feature-extraction", ...)`: the tokens of an image."""
