"""Attention to patches as maps on the pixels of an image, and names of attention maps.

    rows [..., key] -> extract_patch_maps [..., gh, gw] -> upsample_maps [..., h, w] -> overlay, an image
                                                           |
    processor, image size -> get_visible_region (data/aspect_ratio.py), a box ____|

The rows are returned by `model.token_attention`. Figures are in figures.py.
"""

import math

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import nn

from ..data.aspect_ratio import Size, VisibleRegion
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import pil_to_tensor


def get_head_names(config: ViTCLSConfig) -> list[str]:
    """Return the names of a layer's attention maps; differential attention has two per head."""
    names = [f"head {number}" for number in range(1, config.num_attention_heads + 1)]
    if config.attention_type == "differential":
        return [f"{name}, {ordinal} map" for name in names for ordinal in ("first", "second")]
    return names


# Maps ---------------------------------------------------------------------------------------------


def extract_patch_maps(rows: torch.Tensor, config: ViTCLSConfig, image_size: Size) -> torch.Tensor:
    """Return the attention to patches as maps.

    Attention to special tokens is omitted, so maps do not sum to 1.

    Args:
        rows: [..., key], as returned by `model.token_attention`.
        image_size: height and width of `pixel_values`.

    Returns:
        Maps [..., gh, gw], where gh and gw are the numbers of rows and columns of patches.

    Raises:
        ValueError: if the number of keys does not match the image size.
    """
    height, width = image_size
    grid_height, grid_width = config.get_grid_size(image_size)
    patch_rows = rows[..., config.token_layout.patches]
    if patch_rows.shape[-1] != grid_height * grid_width:
        raise ValueError(
            f"The attention rows contain {patch_rows.shape[-1]} patches, but images of {height} x "
            f"{width} pixels have {grid_height} x {grid_width} patches. Pass the height and width "
            "of `pixel_values`."
        )
    return patch_rows.unflatten(-1, (grid_height, grid_width))


def upsample_maps(
    maps: torch.Tensor, image_size: Size, visible_region: VisibleRegion
) -> torch.Tensor:
    """Interpolate maps [..., gh, gw] to the pixels of an image, bilinearly between patch centers.

    Args:
        image_size: height and width of the upright image.
        visible_region: the region that the maps cover (`get_visible_region`).

    Returns:
        Maps [..., h, w] in float32, with NaN outside the visible region.
    """
    height, width = image_size
    left, top, right, bottom = visible_region
    # Centers of the pixels, scaled so that the edges of the visible region are -1 and 1
    y = (torch.arange(height, dtype=torch.float64) + 0.5 - top) / (bottom - top) * 2 - 1
    x = (torch.arange(width, dtype=torch.float64) + 0.5 - left) / (right - left) * 2 - 1
    # [h, w, 2]
    centers = torch.stack(torch.meshgrid(x.float(), y.float(), indexing="xy"), dim=-1)
    centers = centers.to(maps.device)

    flat_maps = maps.float().reshape(1, -1, *maps.shape[-2:])  # [1, maps, gh, gw]
    pixel_maps = nn.functional.grid_sample(
        flat_maps, centers[None], padding_mode="border", align_corners=False
    )
    is_outside = (centers.abs() > 1).any(dim=-1)  # [h, w]
    return pixel_maps.masked_fill(is_outside, math.nan).reshape(*maps.shape[:-2], height, width)


# Overlay ------------------------------------------------------------------------------------------

COLORMAP = "inferno"  # perceptually uniform, colorblind-friendly colormap
IMAGE_BRIGHTNESS = 0.75  # brightness of the image under the map, as a factor
HIDDEN_BRIGHTNESS = 0.35  # brightness of the image outside the visible region, as a factor
# lower limit of the value drawn in the brightest color, as a multiple of the mean of the map
MIN_SCALE = 3.0


def overlay(
    image: Image.Image,
    values: torch.Tensor | np.ndarray,
    visible_region: VisibleRegion | None = None,
    max_side: int | None = None,
    min_side: int | None = None,
) -> Image.Image:
    """Draw a map over an image; higher values are brighter and more opaque.

    The image is gray and dimmed, so that all colors belong to the map. Pixels outside the visible
    region are dark. The brightest color is the maximum of the map, but at least MIN_SCALE times the
    mean, so that a uniform map is not bright everywhere.

    Args:
        values: nonnegative values [gh, gw] of patches, or [h, w] of pixels. NaN marks values
            outside the visible region.
        visible_region: the region that a map [gh, gw] covers (`get_visible_region`). Default: the
            whole image.
        max_side: maximum length of the longer side in pixels; a larger image is scaled down.
        min_side: minimum length of the longer side in pixels; a smaller image is scaled up by an
            integer factor.

    Returns:
        An RGB image with the size of `image`, or with the scaled size.

    Raises:
        ValueError: if the image cannot be read or converted to RGB.
    """
    resized_image, region = resize_with_region(
        to_upright_rgb(image), visible_region, max_side, min_side
    )
    size = (resized_image.height, resized_image.width)
    map_values = torch.as_tensor(values).detach().float().cpu()
    if visible_region is not None or map_values.shape != size:
        map_values = upsample_maps(map_values, size, region)  # [h, w]

    finite_values = map_values.nan_to_num().numpy()  # [h, w]
    is_hidden = map_values.isnan().numpy()
    max_value = max(
        finite_values.max(), MIN_SCALE * finite_values.sum() / max((~is_hidden).sum(), 1)
    )
    strength = (finite_values / max_value if max_value > 0 else finite_values).clip(0, 1)  # [h, w]

    colors = colormaps[COLORMAP](strength)[:, :, :3]  # [h, w, 3]
    opacity = (0.25 + 0.6 * strength)[:, :, None]  # [h, w, 1]
    gray = np.asarray(resized_image.convert("L"), dtype=np.float32)[:, :, None] / 255  # [h, w, 1]
    blended = gray * IMAGE_BRIGHTNESS * (1 - opacity) + colors * opacity
    pixels = np.where(is_hidden[:, :, None], gray * HIDDEN_BRIGHTNESS, blended)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def draw_patch_colors(
    image: Image.Image, colors: torch.Tensor, visible_region: VisibleRegion, side: int
) -> Image.Image:
    """Draw colors [gh, gw, 3] (0 to 1) of the patches in the visible region of an image.

    Pixels outside the region are gray and dark, as in `overlay`. The longer side becomes about
    `side` pixels (`resize_with_region`).
    """
    resized_image, region = resize_with_region(to_upright_rgb(image), visible_region, side, side)
    gray = np.asarray(resized_image.convert("L")) * HIDDEN_BRIGHTNESS  # [h, w]
    drawn = Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    left, top, right, bottom = map(round, region)
    patches = Image.fromarray((colors.numpy() * 255).round().astype(np.uint8))
    size = (max(right - left, 1), max(bottom - top, 1))
    drawn.paste(patches.resize(size, Image.Resampling.NEAREST), (left, top))
    return drawn


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB as the image processor does: upright and on white."""
    return Image.fromarray(pil_to_tensor(image, to_rgb=True).permute(1, 2, 0).contiguous().numpy())


def resize_with_region(
    image: Image.Image,
    visible_region: VisibleRegion | None,
    max_side: int | None,
    min_side: int | None,
) -> tuple[Image.Image, VisibleRegion]:
    """Scale an image and the visible region.

    A large image is averaged; a small one is enlarged by an integer factor, without smoothing.
    """
    width, height = image.size
    longer_side = max(image.size)
    left, top, right, bottom = visible_region or VisibleRegion(0, 0, width, height)
    if max_side is not None and longer_side > max_side:
        size = (
            max(round(width * max_side / longer_side), 1),
            max(round(height * max_side / longer_side), 1),
        )
        image = image.resize(size, Image.Resampling.BOX)
    elif min_side is not None and longer_side < min_side:
        factor = math.ceil(min_side / longer_side)
        image = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)

    x_scale = image.width / width
    y_scale = image.height / height
    return image, VisibleRegion(left * x_scale, top * y_scale, right * x_scale, bottom * y_scale)
