"""Attention to patches as maps on a picture's own pixels, and the words for the tokens that look.

    rows [..., key] -> patch_maps [..., gh, gw] -> on_picture [..., h, w] -> overlay, a picture
                                                       |
    processor, picture size -> seen_part, a box _______|

The rows are those of `model.token_attention`. Whole figures are in figures.py.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import nn
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import ChannelDimension, get_image_size_for_max_height_width

from ..configuration_vitcls import ViTCLSConfig
from ..image_processing_vitcls import CROP_ROUNDINGS, pil_to_tensor


Size = tuple[int, int]  # height, width in pixels
Processor = Any  # ViTCLSImageProcessor or ViTCLSImageProcessorPil; transformers gives them their attributes

# Group of `config.token_layout` -> what one of its tokens is called.
TOKEN_WORDS = {"cls": "CLS", "distillation": "distillation", "registers": "register"}


class SeenPart(NamedTuple):
    """The part of a picture that a model is shown, in the picture's own pixels, as edges: (0, 0, w, h) is all of it.

    It reaches beyond the picture where the processor pads.
    """

    left: float
    top: float
    right: float
    bottom: float


# Words ---------------------------------------------------------------------------------------------------------------


def token_names(config: ViTCLSConfig) -> list[str]:
    """What to call each special token, in the order of the sequence.

    "CLS", or "CLS 1", "CLS 2"; "CLS species" where tokens have tasks; "CLS 2 (cell 1, 2 of 2 x 2)" where a token sees
    only row 1, column 2 of such a grid (`config.cls_scopes`). "distillation" and "register" likewise.
    """
    return [name for names in names_by_group(config).values() for name in names]


def names_by_group(config: ViTCLSConfig) -> dict[str, list[str]]:
    """`token_names` by group of `config.token_layout`, of the three special groups."""
    layout = config.token_layout
    special = range(layout.num_prefix_tokens)
    names = {group: numbered(word, len(special[getattr(layout, group)])) for group, word in TOKEN_WORDS.items()}
    if config.tasks:
        names["cls"] = [f"{TOKEN_WORDS['cls']} {task}" for task in config.task_labels()]
    for place, scope in enumerate(config.cls_scopes or ()):
        if not isinstance(scope, str):
            rows, columns, row, column = scope
            names["cls"][place] += f" (cell {row + 1}, {column + 1} of {rows} x {columns})"
    return names


def numbered(word: str, count: int) -> list[str]:
    """The word alone for one, with numbers from 1 for several."""
    return [word] if count == 1 else [f"{word} {number}" for number in range(1, count + 1)]


# Maps ----------------------------------------------------------------------------------------------------------------


def patch_maps(rows: torch.Tensor, config: ViTCLSConfig, image_size: Size) -> torch.Tensor:
    """The patches' part of attention rows as maps; what goes to special tokens is missing from their sum.

    Args:
        rows: [..., key], as `model.token_attention` returns them.
        image_size: Height and width of `pixel_values`.

    Returns:
        [..., gh, gw]: rows and columns of patches.

    Raises:
        ValueError: for rows of another length than images of this size give.
    """
    grid_height, grid_width = (
        pixels // patch for pixels, patch in zip(image_size, config.patch_height_width, strict=True)
    )
    to_patches = rows[..., config.token_layout.patches]
    if to_patches.shape[-1] != grid_height * grid_width:
        raise ValueError(
            f"the attention rows have {to_patches.shape[-1]} patches and images of {image_size[0]} x {image_size[1]} "
            f"pixels give {grid_height} x {grid_width}: pass height and width of the pixel_values that they are from"
        )
    return to_patches.unflatten(-1, (grid_height, grid_width))


def on_picture(maps: torch.Tensor, picture_size: Size, seen: SeenPart) -> torch.Tensor:
    """Maps [..., gh, gw] on the pixels of a picture, bilinear between the patches' centres.

    Args:
        picture_size: Height and width of the picture, upright.
        seen: The part of it that the maps cover (`seen_part`).

    Returns:
        [..., h, w] float32, NaN where the model saw nothing.
    """
    height, width = picture_size
    y = places(height, seen.top, seen.bottom).to(maps.device)  # [h]
    x = places(width, seen.left, seen.right).to(maps.device)  # [w]
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)  # [h, w, 2]
    flat = maps.float().reshape(1, -1, *maps.shape[-2:])  # [1, maps, gh, gw]
    drawn = nn.functional.grid_sample(flat, grid[None], mode="bilinear", padding_mode="border", align_corners=False)
    outside = (grid.abs() > 1).any(dim=-1)  # [h, w]
    return drawn.masked_fill(outside, math.nan).reshape(*maps.shape[:-2], height, width)


def places(length: int, start: float, stop: float) -> torch.Tensor:
    """Centres of `length` pixels within start..stop, as -1..1 over it; float32 [length]."""
    centres = torch.arange(length, dtype=torch.float64) + 0.5
    return ((centres - start) / (stop - start) * 2 - 1).float()


# What the processor shows --------------------------------------------------------------------------------------------


def seen_part(processor: Processor, picture_size: Size, patch_size: Size | None = None) -> SeenPart:
    """The part of a picture that the processor shows to the model.

    A plain resize shows all. A centre crop shows the middle; one that is larger than what it is cut from pads with
    black on both sides, and `do_pad` on the right and at the bottom: the part then reaches beyond the picture.

    Args:
        picture_size: Height and width of the picture, upright.
        patch_size: Height and width of patches (`config.patch_height_width`): count only whole ones, as the model
            does, which leaves out pixels on the right and at the bottom. Default: all that is shown.
    """
    resized = resized_size(processor, picture_size)
    (height, width), (top, left) = resized, (0, 0)
    if processor.do_center_crop:
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        top, left = crop_offsets(processor, resized, (height, width))
    if processor.do_pad and processor.pad_size:
        height, width = processor.pad_size["height"], processor.pad_size["width"]
    if patch_size is not None:
        height, width = height // patch_size[0] * patch_size[0], width // patch_size[1] * patch_size[1]
    down, across = (own / scaled for own, scaled in zip(picture_size, resized, strict=True))
    return SeenPart(left * across, top * down, (left + width) * across, (top + height) * down)


def resized_size(processor: Processor, picture_size: Size) -> Size:
    """Height and width after the processor's resizing, by transformers' own rules."""
    if not processor.do_resize:
        return picture_size
    size = dict(processor.size)
    return RESIZED_SIZES[frozenset(size)](picture_size, **size)


def to_shortest_edge(picture_size: Size, shortest_edge: int) -> Size:
    """The shorter side exactly so long."""
    picture = np.broadcast_to(np.uint8(0), (1, *picture_size))  # its size is asked for, and takes no memory
    height, width = get_resize_output_image_size(
        picture, shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
    )
    return height, width


RESIZED_SIZES: dict[frozenset[str], Callable[..., Size]] = {
    frozenset({"height", "width"}): lambda _, height, width: (height, width),
    frozenset({"shortest_edge"}): to_shortest_edge,
    frozenset({"shortest_edge", "longest_edge"}): lambda picture_size, shortest_edge, longest_edge: (
        get_size_with_aspect_ratio(picture_size, shortest_edge, longest_edge)
    ),
    frozenset({"max_height", "max_width"}): get_image_size_for_max_height_width,
}

# Where half a pixel goes beside a centre crop that pads, by the processor's backend.
PAD_ROUNDINGS: dict[str, Callable[[float], int]] = {"torchvision": math.trunc, "pil": math.floor}


def crop_offsets(processor: Processor, resized: Size, crop: Size) -> tuple[int, int]:
    """Where the centre crop begins, down and across, in the resized picture's pixels; negative where it pads."""
    margins = [(have - want) / 2 for have, want in zip(resized, crop, strict=True)]
    pads = min(margins) < 0
    rounding = PAD_ROUNDINGS[processor.backend] if pads else CROP_ROUNDINGS[processor.crop_rounding]
    top, left = map(rounding, margins)
    return top, left


# Over the picture ----------------------------------------------------------------------------------------------------

COLOURMAP = "inferno"  # even steps of lightness, and readable for the colour-blind
PICTURE_LIGHT = 0.75  # of the picture under the map
UNSEEN_LIGHT = 0.35  # of what the model did not see
EVEN = 3.0  # times the mean: the least that gets the brightest colour


def overlay(
    picture: Image.Image,
    values: torch.Tensor | np.ndarray,
    seen: SeenPart | None = None,
    strongest: float | None = None,
    max_side: int | None = None,
    min_side: int | None = None,
) -> Image.Image:
    """A map drawn over a picture, on the picture's own pixels: the stronger, the brighter and the more opaque.

    The picture is grey and dimmed, so that colours are the map's alone. What the model did not see is dark and
    hatched.

    Args:
        values: [gh, gw], patches, or [h, w], one per pixel of the picture; not negative. NaN is not seen.
        seen: The part of the picture that [gh, gw] covers (`seen_part`). Default: all.
        strongest: The value of the brightest colour, to compare maps. Default: the largest, or three times the mean
            if that is more, so that even attention does not glow everywhere.
        max_side: Shrink the result to at most so many pixels a side.
        min_side: Enlarge it, in whole steps, until the longer side has so many (pictures of few pixels).

    Returns:
        An RGB image of the picture's size, or scaled so.

    Raises:
        ValueError: for a picture that the image processor cannot use either.
    """
    small, part = scaled(upright(picture), seen, max_side, min_side)
    size = (small.height, small.width)
    drawn = torch.as_tensor(values).detach().float().cpu()
    if seen is not None or drawn.shape != size:
        drawn = on_picture(drawn, size, part)  # [h, w]
    grey = np.asarray(small.convert("L"), dtype=np.float32)[:, :, None].repeat(3, axis=2) / 255  # [h, w, 3]
    painted = np.where(drawn.isnan()[:, :, None], hatched(grey), coloured(grey, drawn.numpy(), strongest))
    return Image.fromarray((painted * 255).round().astype(np.uint8))


def upright(picture: Image.Image) -> Image.Image:
    """The picture in RGB as the image processor takes it: turned by its EXIF tag, 8 bits, transparency on white."""
    return Image.fromarray(pil_to_tensor(picture, to_rgb=True).permute(1, 2, 0).contiguous().numpy())


def scaled(
    picture: Image.Image, seen: SeenPart | None, max_side: int | None, min_side: int | None
) -> tuple[Image.Image, SeenPart]:
    """A picture made smaller smoothly, or larger in whole steps so that its pixels stay visible; its seen part too."""
    (width, height), longer = picture.size, max(picture.size)
    left, top, right, bottom = seen or SeenPart(0, 0, width, height)
    if max_side is not None and longer > max_side:
        size = max(round(width * max_side / longer), 1), max(round(height * max_side / longer), 1)
        picture = picture.resize(size, Image.Resampling.BOX)
    elif min_side is not None and longer < min_side:
        steps = math.ceil(min_side / longer)
        picture = picture.resize((width * steps, height * steps), Image.Resampling.NEAREST)
    across, down = picture.width / width, picture.height / height
    return picture, SeenPart(left * across, top * down, right * across, bottom * down)


def coloured(grey: np.ndarray, values: np.ndarray, strongest: float | None) -> np.ndarray:
    """The map [h, w] in colours over a grey picture [h, w, 3], 0 to 1."""
    known = np.nan_to_num(values)
    if strongest is None:
        strongest = max(known.max(), EVEN * known.sum() / max(np.isfinite(values).sum(), 1))
    strength = (known / strongest if strongest > 0 else known).clip(0, 1)  # [h, w]
    colours = colormaps[COLOURMAP](strength)[:, :, :3]
    opacity = (0.25 + 0.6 * strength)[:, :, None]
    return grey * PICTURE_LIGHT * (1 - opacity) + colours * opacity


def hatched(grey: np.ndarray) -> np.ndarray:
    """A picture [h, w, 3] of 0 to 1, dark and with diagonal lines."""
    height, width, _ = grey.shape
    period = max(round(max(height, width) / 40), 2)
    lines = (np.arange(height)[:, None] + np.arange(width)[None, :]) % period < max(period / 8, 1)  # [h, w]
    return grey * UNSEEN_LIGHT + 0.12 * lines[:, :, None]
