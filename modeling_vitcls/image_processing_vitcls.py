"""The image processor: pictures of any kind in, `pixel_values` for the model out.

    source -> upright picture -> [C, H, W], 8 bits -> resize -> centre crop -> rescale -> normalise -> pixel_values
    |_________________ this file ________________|    |____________ transformers' backends ____________|

What lives here: reading sources (paths, bytes, URLs), EXIF orientation, channels and bit depths, and the checks whose
messages a user needs. Resizing, cropping, rescaling and normalising are transformers' own, once with torchvision and
once with PIL. A shorter way to the same values is in fast_image_processing_vitcls.py. Augmentation for training does
not live here.
"""

import base64
import difflib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import get_session
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    is_valid_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import is_torchvision_available

from .fast_image_processing_vitcls import (
    URL_STARTS,
    has_fast_way,
    in_threads,
    pixel_values,
    read_jpeg,
    resized,
    settings_of,
)


# `save_pretrained` names only the class it saved; with both named, either backend loads from any checkpoint.
AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_vitcls.ViTCLSImageProcessor",
        "pil": "image_processing_vitcls.ViTCLSImageProcessorPil",
    }
}

# What transformers' backends can resize to.
SIZE_KEYS = (
    ("height", "width"),
    ("shortest_edge",),
    ("shortest_edge", "longest_edge"),
    ("max_height", "max_width"),
)

# The filters that both backends have.
RESAMPLE = (
    PILImageResampling.NEAREST,
    PILImageResampling.LANCZOS,
    PILImageResampling.BILINEAR,
    PILImageResampling.BICUBIC,
)

# What becomes of half a pixel beside a centre crop: transformers rounds down; torchvision and timm to the even number.
CROP_ROUNDINGS: dict[str, Callable[[float], int]] = {"down": math.floor, "even": round}

GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N"})
FLOAT_SETTINGS = ("rescale_factor", "image_mean", "image_std")
DOWNLOAD_TIMEOUT = 60.0  # seconds

Source = str | os.PathLike[str] | bytes | bytearray
SOURCE_TYPES = (str, os.PathLike, bytes, bytearray)


class ViTCLSProcessing(BaseImageProcessor):
    """What both backends share: defaults, reading of sources, channels and checks. Not used by itself."""

    do_convert_rgb = True
    do_resize = True
    size: Any = {"height": 224, "width": 224}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD

    def __init__(self, crop_rounding: str = "down", **kwargs: Unpack[ImagesKwargs]) -> None:
        refuse_misspelt(kwargs)
        with errors_in_one_line():
            validate_typed_dict(ImagesKwargs, known_settings(kwargs))  # type: ignore[type-var]
        if crop_rounding not in CROP_ROUNDINGS:
            raise ValueError(f"unknown crop_rounding {crop_rounding!r}: use {' or '.join(CROP_ROUNDINGS)}")
        super().__init__(**kwargs)
        self.crop_rounding = crop_rounding

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from saved settings; keywords override them."""
        refuse_misspelt(kwargs)
        return super().from_dict(image_processor_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings as saved in `preprocessor_config.json`, with both backends in the `auto_map`."""
        settings = super().to_dict()
        settings["auto_map"] = {name: dict(classes) for name, classes in AUTO_MAP.items()}
        return settings

    def preprocess(self, images: Any, *args: Any, **kwargs: Unpack[ImagesKwargs]) -> BatchFeature:
        """Prepare an image, a batch or a list; keywords override the settings of this processor for this call."""
        refuse_misspelt(kwargs)
        with errors_in_one_line():
            return super().preprocess(images, *args, **kwargs)

    def fetch_images(self, images: Any) -> Any:
        """Read every path, URL and encoded image of a (nested) list; images already in memory pass through.

        Raises:
            ValueError: for a source that cannot be read or decoded, or something that is no image; it is named.
        """
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, SOURCE_TYPES):
            return read_picture(images)
        if is_valid_image(images):
            return images
        raise ValueError(
            f"cannot use {type(images).__name__} as an image: give a path, URL, bytes, PIL image, array or tensor"
        )

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        image_mean: float | tuple[float, ...] | None = None,
        image_std: float | tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Bring one image in memory to [C, H, W] in the backend's own type, ready for resizing."""
        pixels = image_to_pixels(image, bool(do_convert_rgb), bool(do_rescale), input_data_format)
        if do_normalize:
            check_channels(len(pixels), image_mean=image_mean, image_std=image_std)
        return super().process_image(pixels, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, **kwargs)

    def center_crop(self, image: Any, size: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Cut `size` out of the middle of one or more images [..., H, W], by `crop_rounding`."""
        top, left = ((have - want) / 2 for have, want in zip(image.shape[-2:], (size.height, size.width), strict=True))
        if min(top, left) < 0:  # pads
            return super().center_crop(image, size, **kwargs)
        top, left = CROP_ROUNDINGS[self.crop_rounding](top), CROP_ROUNDINGS[self.crop_rounding](left)
        return image[..., top : top + size.height, left : left + size.width]

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        """A flat list of single images; unlike transformers' own, grey arrays of shape [H, W] count as images."""
        singles = list(single_images(self.fetch_images(images)))
        check_any(singles)
        return singles

    def _standardize_kwargs(  # type: ignore[override]
        self, size: Any = None, crop_size: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Settings in their canonical form, checked: at construction and again at every call."""
        check_pair(size, "size")
        check_pair(crop_size, "crop_size")
        settings = super()._standardize_kwargs(size=size, crop_size=crop_size, **kwargs)
        check_sizes(settings)
        check_resample(settings.get("resample"))
        return settings

    def _preprocess(self, images: list[Any], return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """Resize, crop, rescale and normalise, then stack."""
        batch = super()._preprocess(images, return_tensors=None, **kwargs)
        if return_tensors is not None:
            check_one_shape(batch["pixel_values"])
        return BatchFeature(data=dict(batch), tensor_type=return_tensors)


class ViTCLSImageProcessor(ViTCLSProcessing, TorchvisionBackend):  # type: ignore[misc]
    r"""Prepares images for the ViTCLS models with torchvision: in batches, on a GPU if `device` says so.

    The defaults: an exact 224 x 224 pixels, bicubic, mean and standard deviation of ImageNet, as in DeiT and DINO.
    Checkpoints trained otherwise need their own values: those of transformers' ViT `resample=2`, `image_mean=[0.5] *
    3` and `image_std=[0.5] * 3`.

    Called with an image, a batch or a list, it returns a `BatchFeature` with `pixel_values` [B, C, H, W], float32. An
    image is a path (`str`, `pathlib.Path`), a URL (`http`, `https`, `data`), an encoded file as `bytes`, a PIL image,
    or an array or tensor of shape [H, W], [C, H, W] or [H, W, C].

    What it does to an image before resizing:
        - Orientation: the EXIF tag is applied, to files, bytes and PIL images. Of several frames the first is taken.
        - Bit depth: 1 bit becomes 0 and 255; 16 bits (PIL modes `I;16` and `I`, `uint16` arrays) are divided by 257,
          never cut off. Other arrays hold 0 to 255, or any floats if `do_rescale=False`. PIL's float mode `F` has no
          agreed range and is refused.
        - Channels, `do_convert_rgb=True`: grey, palette, CMYK and all other modes become RGB; transparency is laid on
          white.
        - Channels, `do_convert_rgb=False`: grey keeps 1 channel (its transparency on white), colour 3, colour with
          transparency 4; arrays are left as they are. `image_mean` and `image_std` then need one value per channel.
          For a model with `num_channels=1`: `do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]`.

    The backends agree. `ViTCLSImageProcessorPil` gives the same values up to float rounding without resizing. With it,
    bilinear or bicubic, they differ on photographs by at most 2 of 255 grey levels at any pixel and 0.05 on average,
    on pure noise by at most 16 and 0.5 (PIL rounds and clips between its two passes). Nearest and Lanczos differ more.

    Args:
        do_convert_rgb (`bool`, defaults to `True`): Bring every image to three channels.
        do_resize (`bool`, defaults to `True`): Resize to `size`.
        size (`dict` or `int`, defaults to `{"height": 224, "width": 224}`): Pixels. Exact, or keeping the aspect
            ratio: `{"shortest_edge": 256}`, usually followed by a centre crop. An `int` is both height and width.
        resample (`PILImageResampling`, defaults to bicubic): The filter for resizing, with antialiasing: 0 (nearest),
            1 (Lanczos), 2 (bilinear) or 3 (bicubic).
        do_center_crop (`bool`, *optional*): Cut `crop_size` out of the middle.
        crop_size (`dict` or `int`, *optional*): Pixels. Not larger than what `size` leaves.
        crop_rounding (`"down"` or `"even"`, defaults to `"down"`): Where the crop begins if the margins are not whole
            pixels: as in transformers, or at the nearest even pixel, as in torchvision and timm. Not per call.
        do_rescale (`bool`, defaults to `True`): Multiply by `rescale_factor`. `False` for floats between 0 and 1.
        rescale_factor (`float`, defaults to 1/255).
        do_normalize (`bool`, defaults to `True`): Subtract `image_mean`, divide by `image_std`.
        image_mean, image_std (`float` or `list[float]`): One value per channel, in units of the rescaled image.

    Raises:
        ValueError: in one line that names the source or the setting: for a file that is missing, truncated or not an
            image; for something that is no image; for sizes, channels or values that contradict each other; for a
            misspelt setting.
        ImportError: at construction, if torchvision is not installed; `ViTCLSImageProcessorPil` does not need it.
    """

    _checked_settings: tuple[Any, ...] | None = None  # with which a call was successful

    def __init__(self, crop_rounding: str = "down", **kwargs: Unpack[ImagesKwargs]) -> None:
        if not is_torchvision_available():
            raise ImportError("ViTCLSImageProcessor needs torchvision: install it, or load it with backend='pil'")
        super().__init__(crop_rounding=crop_rounding, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings as saved in `preprocessor_config.json`, with both backends in the `auto_map`."""
        settings = super().to_dict()
        settings.pop("_checked_settings", None)
        return settings

    def preprocess(self, images: Any, *args: Any, **kwargs: Unpack[ImagesKwargs]) -> BatchFeature:
        """Prepare an image, a batch or a list; keywords override the settings of this processor for this call.

        The first call with settings checks them; further ones without keywords go the short way.
        """
        if args or dict(kwargs) != {"return_tensors": "pt"} or type(self) is not ViTCLSImageProcessor:
            return super().preprocess(images, *args, **kwargs)
        settings = settings_of(self, self._valid_kwargs_names)
        singles = list(single_images(images))
        if settings == self._checked_settings and all(getattr(image, "is_cpu", True) for image in singles):
            return self._fast_preprocess(singles)
        batch = super().preprocess(images, **kwargs)
        self._checked_settings = settings if has_fast_way(self) else None
        return batch

    def _fast_preprocess(self, images: list[Any]) -> BatchFeature:
        """What `preprocess` gives as tensors for settings that it has checked, `has_fast_way` being true of them."""
        check_any(images)
        are_read = all(isinstance(image, SOURCE_TYPES) for image in images)
        pictures = in_threads(self._fast_picture, images) if are_read else list(map(self._fast_picture, images))
        check_one_shape(pictures)
        return BatchFeature(data={"pixel_values": pixel_values(self, pictures)})

    def _fast_picture(self, image: Any) -> torch.Tensor:
        """One image of any kind -> `uint8` [C, h, w], resized and cropped."""
        to_rgb = bool(self.do_convert_rgb)
        pixels = read_jpeg(image) if to_rgb else None
        if pixels is None:
            pixels = image_to_pixels(self.fetch_images(image), to_rgb, do_rescale=True, input_data_format=None)
        check_channels(len(pixels), image_mean=self.image_mean, image_std=self.image_std)
        return resized(self, pixels)


class ViTCLSImageProcessorPil(ViTCLSProcessing, PilBackend):  # type: ignore[misc]
    """Prepares images for the ViTCLS models with PIL and NumPy, one by one, without torchvision.

    Settings, accepted images, errors and, within the tolerance given there, results are those of
    `ViTCLSImageProcessor`; both load from the same `preprocessor_config.json`.
    """


# Makes save_pretrained copy this file beside the weights.
ViTCLSImageProcessor.register_for_auto_class()
ViTCLSImageProcessorPil.register_for_auto_class()


# Reading sources -----------------------------------------------------------------------------------------------------


def read_picture(source: Source) -> PIL.Image.Image:
    """Read and decode one path, URL or encoded image; upright, in the mode it was stored in.

    Raises:
        ValueError: if it cannot be read or is not a complete image; the message names it.
    """
    file: str | BytesIO
    if isinstance(source, bytes | bytearray):
        file, name = BytesIO(source), f"the {len(source)} bytes given"
    elif str(source).startswith(URL_STARTS):
        name = shortened(str(source))
        file = BytesIO(download(str(source), name))
    else:
        file, name = os.fspath(source), shortened(os.fspath(source))
    try:
        with PIL.Image.open(file) as picture:
            return PIL.ImageOps.exif_transpose(picture)
    except PIL.UnidentifiedImageError as error:  # its own message names an object in memory
        raise ValueError(f"cannot read an image from {name}: it is no image of a known format") from error
    except Exception as error:  # Pillow's decoders raise almost anything on broken data
        raise ValueError(f"cannot read an image from {name}: {first_line(error)}") from error


def download(url: str, name: str) -> bytes:
    """The content behind an `http`, `https` or base64 `data` URL."""
    try:
        if url.startswith("data:"):
            return base64.b64decode(url.partition(",")[2], validate=True)
        response = get_session().get(url, follow_redirects=True, timeout=DOWNLOAD_TIMEOUT)
        response.raise_for_status()
    except Exception as error:  # the HTTP library differs between versions of huggingface_hub, and so do its errors
        raise ValueError(f"cannot fetch the image at {name}: {first_line(error)}") from error
    return response.content


def shortened(text: str) -> str:
    """Quoted, and cut where a message would drown in it (a data URL holds the whole image)."""
    return repr(text if len(text) <= 200 else f"{text[:40]}...{text[-120:]}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, cut where it is long, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def single_images(images: Any) -> Iterator[Any]:
    """The images of a nested list and of 4-dimensional batches, one by one, in order."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from single_images(image)
    elif getattr(images, "ndim", None) == 4:
        yield from images
    else:
        yield images


# Channels and bit depth ----------------------------------------------------------------------------------------------


def image_to_pixels(
    image: Any, to_rgb: bool, do_rescale: bool, input_data_format: str | ChannelDimension | None
) -> torch.Tensor:
    """One image in memory -> upright, `uint8` (floats that will not be rescaled: `float32`) [C, H, W]."""
    if isinstance(image, PIL.Image.Image):
        return picture_to_pixels(image, to_rgb)
    return array_to_pixels(image, to_rgb, do_rescale, input_data_format)


def picture_to_pixels(picture: PIL.Image.Image, to_rgb: bool) -> torch.Tensor:
    """One PIL image of any mode -> upright, `uint8` [C, H, W]."""
    name = shortened(getattr(picture, "filename", "") or f"PIL image of mode {picture.mode}")
    try:
        picture = PIL.ImageOps.exif_transpose(picture)  # also decodes what was only opened
        values = picture_values(picture)
    except Exception as error:
        raise ValueError(f"cannot use the image {name}: {first_line(error)}") from error
    pixels = to_eight_bits(channels_first(torch.from_numpy(values), ChannelDimension.LAST), do_rescale=True)
    if to_rgb:
        return to_three_channels(pixels)
    is_grey_with_alpha = picture.mode in GREY_MODES and len(pixels) == 4
    return on_white(pixels)[:1] if is_grey_with_alpha else pixels


def picture_values(picture: PIL.Image.Image) -> np.ndarray:
    """The values of a PIL image: [H, W] for grey, [H, W, 3] for colour, [H, W, 4] with transparency."""
    if picture.mode == "F":
        raise ValueError("mode F (floats) has no agreed range: convert it, or pass an array and do_rescale=False")
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values run from {values.min()} to {values.max()}, 16 bits hold 0 to 65535")
        return values.astype(np.uint16)
    if picture.has_transparency_data:
        return np.array(picture.convert("RGBA"))
    return np.array(picture if picture.mode in ("1", "L", "RGB") else picture.convert("RGB"))


def array_to_pixels(
    image: np.ndarray | torch.Tensor,
    to_rgb: bool,
    do_rescale: bool,
    input_data_format: str | ChannelDimension | None,
) -> torch.Tensor:
    """One array or tensor [H, W], [C, H, W] or [H, W, C] -> `uint8`, or `float32` without rescaling, [C, H, W]."""
    if isinstance(image, np.ndarray):
        try:
            # Copies only what PyTorch cannot share: negative strides and read-only arrays.
            image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        except TypeError as error:
            raise ValueError(f"cannot use an array of {image.dtype} as an image: give integers or floats") from error
    pixels = to_eight_bits(channels_first(image, input_data_format), do_rescale)
    return to_three_channels(pixels) if to_rgb else pixels


def channels_first(image: torch.Tensor, data_format: str | ChannelDimension | None) -> torch.Tensor:
    """[H, W], [C, H, W] or [H, W, C] -> [C, H, W]; without `data_format`, channels are the axis of 1, 3 or 4."""
    shape = list(image.shape)
    if image.ndim not in (2, 3) or image.numel() == 0:
        raise ValueError(f"an image has the shape [H, W], [C, H, W] or [H, W, C] and at least one pixel, not {shape}")
    if image.ndim == 2:
        return image[None]
    if data_format is None:
        try:
            data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"cannot tell the channels of an image of shape {shape}: set input_data_format"
            ) from error
    return image.permute(2, 0, 1) if ChannelDimension(data_format) is ChannelDimension.LAST else image


def to_eight_bits(pixels: torch.Tensor, do_rescale: bool) -> torch.Tensor:
    """Any values [C, H, W] -> `uint8` of 0 to 255; floats that will not be rescaled stay as they are (`float32`).

    Both backends resize 8-bit images alike, and other types each in its own way.
    """
    if pixels.dtype is torch.uint8:
        return pixels
    if pixels.is_complex():
        raise ValueError("cannot use complex numbers as an image: give integers or floats")
    if pixels.dtype is torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.dtype is torch.uint16:
        return ((pixels.to(torch.int32) + 128) // 257).to(torch.uint8)  # rounds to nearest: 65535 = 257 * 255
    if pixels.is_floating_point() and not do_rescale:
        return pixels.float()
    low, high = (bound.item() for bound in torch.aminmax(pixels.double()))
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"the values of this image run from {low:g} to {high:g}: give 0 to 255, 16 bits as uint16, or floats "
            "with do_rescale=False"
        )
    if pixels.is_floating_point() and 0 < high <= 1:
        raise ValueError(f"the values of this image end at {high:g}, already rescaled: set do_rescale=False")
    return pixels.round().to(torch.uint8) if pixels.is_floating_point() else pixels.to(torch.uint8)


def to_three_channels(pixels: torch.Tensor) -> torch.Tensor:
    """Grey, RGB or RGBA [1 | 3 | 4, H, W] -> RGB [3, H, W]."""
    if len(pixels) == 1:
        return pixels.expand(3, -1, -1)
    if len(pixels) == 3:
        return pixels
    if len(pixels) == 4:
        return on_white(pixels)
    raise ValueError(f"cannot make RGB of an image with {len(pixels)} channels: set do_convert_rgb=False")


def on_white(pixels: torch.Tensor) -> torch.Tensor:
    """RGBA [4, H, W] over a white background -> RGB [3, H, W], in the same type."""
    white = 1.0 if pixels.is_floating_point() else 255.0
    if pixels.is_floating_point() and not 0 <= pixels.min() <= pixels.max() <= white:
        raise ValueError("cannot apply the transparency of floats outside 0 to 1: set do_convert_rgb=False")
    colour, alpha = pixels[:3].float(), pixels[3:].float() / white  # [3, H, W], [1, H, W]
    blended = colour * alpha + white * (1 - alpha)
    return blended if pixels.is_floating_point() else blended.round().to(pixels.dtype)


# Checks of settings --------------------------------------------------------------------------------------------------


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn huggingface_hub's multi-line errors about the types of settings into a `ValueError` of one line."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error.__cause__ or error).split())) from error


def known_settings(keywords: dict[str, Any] | ImagesKwargs) -> dict[str, Any]:
    """The keywords that are settings, for checking their types: saved files and transformers bring others along."""
    return {name: plain(name, value) for name, value in keywords.items() if name in ImagesKwargs.__annotations__}


def plain(name: str, value: Any) -> Any:
    """A setting as its type is declared: sizes as dicts, whole numbers as floats where JSON makes no difference."""
    if isinstance(value, SizeDict):
        return dict(value)
    if name in FLOAT_SETTINGS and isinstance(value, list | tuple):
        return [plain(name, item) for item in value]
    return float(value) if name in FLOAT_SETTINGS and type(value) is int else value


def refuse_misspelt(keywords: dict[str, Any] | ImagesKwargs) -> None:
    """Raise for keywords that resemble a setting; others are none of our business (transformers passes its own)."""
    known = ImagesKwargs.__annotations__
    for keyword in keywords:
        if keyword not in known and (similar := difflib.get_close_matches(keyword, known, n=1, cutoff=0.85)):
            raise ValueError(f"unknown setting {keyword!r}: did you mean {similar[0]!r}?")


def check_pair(size: Any, name: str) -> None:
    """transformers silently drops what comes after height and width."""
    if isinstance(size, list | tuple) and len(size) != 2:
        raise ValueError(f"{name} as a list is [height, width], not {list(size)}")


def check_sizes(settings: dict[str, Any]) -> None:
    """Raise for sizes that no image can be given, and for a crop larger than what it is cut from."""
    size, crop = (in_pixels(settings[name], name) for name in ("size", "crop_size"))
    if settings.get("do_resize") and size:
        check_size(size)
    if settings.get("do_center_crop") and set(crop) != {"height", "width"}:
        raise ValueError(f"do_center_crop needs crop_size: the height and width to cut out, in pixels, not {crop}")
    if settings.get("do_resize") and settings.get("do_center_crop"):
        check_crop(crop, size)


def check_size(size: dict[str, int]) -> None:
    """Raise for what transformers' backends cannot resize to."""
    if not any(set(size) == set(keys) for keys in SIZE_KEYS):
        ways = " or ".join("{" + ", ".join(keys) + "}" for keys in SIZE_KEYS)
        raise ValueError(f"cannot resize to size {size}: give {ways}")
    if "longest_edge" in size and size["longest_edge"] < size["shortest_edge"]:
        raise ValueError(f"the longest_edge of size {size} is less than its shortest_edge")


def check_crop(crop: dict[str, int], size: dict[str, int]) -> None:
    """Raise for a crop that would pad: at what `size` leaves, black bars are a mistake."""
    for edge in ("height", "width"):
        available = size.get(edge) or size.get("shortest_edge")
        if available and crop[edge] > available:
            raise ValueError(f"crop_size {crop} is larger than what size {size} leaves: lower it, or raise size")


def check_resample(resample: Any) -> None:
    """Raise for filters that only one backend has, and for names, which the PIL backend takes for bilinear."""
    if isinstance(resample, int | str) and resample not in RESAMPLE:
        known = ", ".join(f"{int(value)} ({value.name.lower()})" for value in RESAMPLE)
        raise ValueError(f"unknown resample {resample!r}: give one of {known}")


def in_pixels(size: SizeDict | None, name: str) -> dict[str, int]:
    """A size as a plain dict, empty for none; raises for what is no number of pixels."""
    if size is None:
        return {}
    pixels = dict(size)
    if not pixels or any(type(value) is not int or value < 1 for value in pixels.values()):
        raise ValueError(f"{name} {pixels} must give positive whole numbers of pixels")
    return pixels


def check_any(images: list[Any]) -> None:
    """Raise for no images at all."""
    if not images:
        raise ValueError("no images were given: the list is empty")


def check_one_shape(images: list[Any]) -> None:
    """Raise unless all images [C, H, W] of a batch have one shape."""
    shapes = sorted({tuple(pixels.shape) for pixels in images})
    if len(shapes) > 1:
        raise ValueError(
            f"the images of this batch come out in different shapes {shapes}, so they cannot be one tensor: set an "
            "exact size or do_center_crop (and do_convert_rgb if the channels differ), or pass them one by one"
        )


def check_channels(num_channels: int, **statistics: float | Sequence[float] | None) -> None:
    """Raise unless `image_mean` and `image_std` have one value, or one per channel of the image."""
    for name, values in statistics.items():
        if isinstance(values, list | tuple) and len(values) != num_channels:
            raise ValueError(
                f"{name} has {len(values)} values but this image has {num_channels} channels: give one per channel "
                "(do_convert_rgb=True makes 3 channels of every image, do_convert_rgb=False keeps its own)"
            )
