"""Attention to patches as maps, and maps and photos as images.

    rows [..., key] -> extract_patch_maps [..., gh, gw] -> choose_scale -> draw_map, overlay: pictures
                                                                             |
    photo, visible region (data/aspect_ratio.py) -> draw_region, the part of the photo under the map

The rows are attention (`model.token_attention`), whose values are positive. What a score loses without
a part (photo.py) has a sign. The sheet of a photo is in sheet.py.
"""

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from ..data.aspect_ratio import VisibleRegion
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.field_checks_vitcls import Size
from ..model.image_processing_vitcls import pil_to_tensor


# Both are safe for color-blind readers. The second is white at 0, and red above.
COLORMAP = "inferno"
SIGNED_COLORMAP = "RdBu_r"
PALE = 0.3  # Factor of the opacity of values that are hardly above their errors
IMAGE_BRIGHTNESS = 0.75  # The photo under a map is dimmed by this factor
# The brightest color is at least this multiple of the mean, so that a uniform map is dark.
MIN_SCALE = 3.0


def extract_patch_maps(rows: Tensor, config: ViTCLSConfig, image_size: Size) -> Tensor:
    """Reshape the attention to patches into maps.

    Attention to special tokens is omitted, so maps do not sum to 1.

    Args:
        rows: [..., key], as returned by `model.token_attention`.
        image_size: height and width of `pixel_values`.

    Returns:
        Maps [..., gh, gw], where gh and gw are the numbers of rows and columns of patches.
    """
    return rows[..., config.token_layout.patches].unflatten(-1, config.get_grid_size(image_size))


def overlay(
    image: Image.Image, values: Tensor, scale: ScalarMappable, errors: Tensor | None = None
) -> Image.Image:
    """Draw a map over the image that it covers; values far from 0 are more opaque.

    Values below two of their standard errors are pale.

    The image is gray and dimmed, so all colors belong to the map, which is interpolated between the
    centers of the patches.

    Args:
        image: an RGB image, cropped to the region of the patches (`draw_region`).
        values: values [gh, gw] of the patches.
        scale: the colors of the values (`choose_scale`).
        errors: standard errors [gh, gw] of the values.

    Returns:
        An RGB image with the size of `image`.
    """
    smooth = nn.functional.interpolate(
        values[None, None], (image.height, image.width), mode="bilinear"
    )[0, 0].numpy()  # [h, w]
    colors = scale.to_rgba(smooth)[:, :, :3]  # [h, w, 3]
    strength = np.clip(np.abs(smooth) / scale.norm.vmax, 0, 1)
    opacity = (0.25 + 0.6 * strength)[:, :, None]  # [h, w, 1]
    if errors is not None:
        is_clear = (values.abs() >= 2 * errors).to(values)[None, None]
        clear = nn.functional.interpolate(is_clear, smooth.shape, mode="bilinear")[0, 0, :, :, None]
        opacity = opacity * (PALE + (1 - PALE) * clear.numpy())
    gray = np.asarray(image.convert("L"), dtype=np.float32)[:, :, None] / 255  # [h, w, 1]
    return to_picture(gray * IMAGE_BRIGHTNESS * (1 - opacity) + colors * opacity)


def draw_map(values: Tensor, scale: ScalarMappable) -> Image.Image:
    """Draw a map [gh, gw], one pixel for each patch."""
    return to_picture(scale.to_rgba(values.numpy())[:, :, :3])


def to_picture(colors: np.ndarray) -> Image.Image:
    """Convert colors [h, w, 3] from 0 to 1."""
    return Image.fromarray((colors * 255).round().astype(np.uint8))


def choose_scale(values: Tensor, is_signed: bool = False) -> ScalarMappable:
    """Choose the colors of the values of a map, or of several maps that share their colors.

    The highest 1% of the values have the strongest color, because a single patch may be far above
    all others. A map of attention, whose values are positive, has it from MIN_SCALE times the mean,
    so that a uniform map is not bright everywhere.
    """
    if is_signed:
        limit = values.abs().quantile(0.99).item() or 1.0
        return ScalarMappable(Normalize(-limit, limit, clip=True), SIGNED_COLORMAP)
    limit = max(values.quantile(0.99).item(), MIN_SCALE * values.mean().item()) or 1.0
    return ScalarMappable(Normalize(0, limit, clip=True), COLORMAP)


def to_upright_rgb(image: Image.Image, bit_depth: int) -> Image.Image:
    """Convert an image to 8-bit RGB as the image processor does: upright and on white.

    `bit_depth` is the number of bits that 16-bit images use.
    """
    return to_pil_image(pil_to_tensor(image, to_rgb=True, bit_depth=bit_depth))


def draw_region(image: Image.Image, region: VisibleRegion, side: int) -> Image.Image:
    """Draw the region of an RGB image that a model sees. Padding outside the image is gray.

    The longer side becomes `side` pixels. Small images are enlarged without smoothing.
    """
    left, top, right, bottom = map(round, region)
    picture = Image.new("RGB", (right - left, bottom - top), "#808080")
    picture.paste(image, (-left, -top))
    longer = max(picture.size)
    # At least one pixel wide, unlike `ImageOps.contain`
    size = [max(1, length * side // longer) for length in picture.size]
    resampling = Image.Resampling
    return picture.resize(size, resampling.NEAREST if 2 * longer < side else resampling.LANCZOS)
