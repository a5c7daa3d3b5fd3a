"""Draw the sheet of one photo for `vitcls look`, from the measurements in photo.py.

    title, and the whole photo if the model sees only a part
    photo | attention | principal components of the patches | norms of the patches
    attention of each head       one row per token, in the last layer in which the token is used
    layer by layer               one row per token, then principal components and norms

All positions and sizes are in inches from the upper left corner of the sheet, so that tiles are
aligned.
"""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ..data.aspect_ratio import VisibleRegion
from ..inference.token_names import SINGLE_TOKEN_NAMES
from ..model.configuration_vitcls import ViTCLSConfig
from .figures import DARK_GRAY, GROUP_COLORS, shorten_text
from .maps import COLORMAP, MIN_SCALE, overlay, resize_with_region
from .photo import PhotoMeasurements


WIDTH = 12.0  # width of the sheet
DPI = 150
MARGIN = 0.3
GAP = 0.07  # between tiles
NAME_WIDTH = 1.15  # width of the names of rows
CAPTION_HEIGHT = 0.155

LARGE_SIDE = 640  # longer side of a tile in the first row, in pixels
SMALL_SIDE = 256  # longer side of a tile in the other rows, in pixels
MAX_LARGE_HEIGHT = 3.4  # of the tiles in the first row
MAX_COLUMNS = 17  # maximum number of tiles per line: the mean and 16 heads
# tiles are not larger than in a line of this number of tiles
MIN_COLUMNS = 7
MIN_COLUMNS_OF_MANY = 12
MANY_TOKENS = 3  # minimum number of tokens for MIN_COLUMNS_OF_MANY
MAX_TOKENS = 9  # maximum number of tokens with a row
MAX_TITLE = 64  # maximum number of characters of the title, beside the small photo

MEDIUM_GRAY = "#666666"
NORM_COLORMAP = "viridis"
BRIGHT_QUANTILE = 0.99  # quantile of an attention map that is drawn in the brightest color
HIDDEN_OPACITY = 0.3  # of the part of the photo that the model does not see


class Tile(NamedTuple):
    """A picture, and the text above it."""

    picture: Image.Image
    caption: str = ""


class Row(NamedTuple):
    """A row of tiles, with a name in a color and a note below the name."""

    name: str
    note: str
    color: str
    tiles: list[Tile]


def draw_sheet(measurements: PhotoMeasurements, title: str = "") -> Image.Image:
    """Draw the sheet of a photo.

    Args:
        measurements: measurements of the photo (`measure_photo`).
        title: name of the model and of the photo.

    Returns:
        An RGB image that is 1,800 pixels wide.
    """
    sheet = Sheet()
    draw_header(sheet, measurements, title)
    draw_overview(sheet, measurements)
    draw_heads(sheet, measurements)
    draw_layers(sheet, measurements)
    return sheet.render()


class Sheet:
    """A figure on which text and pictures are placed from top to bottom."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH, WIDTH), dpi=DPI, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")
        self.y = MARGIN  # upper edge of the free space

    def place(
        self, picture: Image.Image | np.ndarray, x: float, y: float, width: float, height: float
    ) -> None:
        """Place a picture, stretched to a size, with its upper left corner at (x, y)."""
        self.axes.imshow(
            picture,
            extent=(x, x + width, y + height, y),
            aspect="auto",
            interpolation="antialiased",
        )

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 8.5,
        color: str = MEDIUM_GRAY,
        **style: Any,
    ) -> None:
        """Write text on the baseline y."""
        self.axes.text(x, y, text, fontsize=size, color=color, parse_math=False, **style)

    def write_heading(self, heading: str, explanation: str) -> None:
        """Write the heading of a section and one line in gray."""
        self.y += 0.34
        self.write(MARGIN, self.y, heading, size=11.5, color=DARK_GRAY, weight="bold")
        self.y += 0.19
        self.write(MARGIN, self.y, explanation)
        self.y += 0.06

    def draw_rows(self, headers: Sequence[str], rows: Sequence[Row], min_columns: int) -> None:
        """Draw rows of tiles with headers above the columns.

        If there are too many columns, all rows continue on further lines.
        """
        # rounded up
        num_lines = -(-len(headers) // MAX_COLUMNS)
        num_columns = -(-len(headers) // num_lines)
        width = (WIDTH - 2 * MARGIN - NAME_WIDTH + GAP) / max(num_columns, min_columns) - GAP

        for start in range(0, len(headers), num_columns):
            columns = slice(start, start + num_columns)
            self.y += 0.17
            for index, header in enumerate(headers[columns]):
                self.write(
                    MARGIN + NAME_WIDTH + index * (width + GAP),
                    self.y,
                    header,
                    size=7.5,
                    color=DARK_GRAY,
                )
            for row in rows:
                self.draw_line(row, row.tiles[columns], width)
            self.y += 0.05

    def draw_line(self, row: Row, tiles: Sequence[Tile], width: float) -> None:
        """Draw one line of tiles and the name of the row."""
        picture = tiles[0].picture
        height = width * picture.height / picture.width
        self.y += CAPTION_HEIGHT

        lines = textwrap.wrap(shorten_text(row.name, 36), 13)
        y = self.y + height / 2 - 0.075 * len(lines) + 0.07
        for line in lines:
            self.write(MARGIN, y, line, color=row.color, weight="bold")
            y += 0.15
        self.write(MARGIN, y, row.note, size=7.5)

        for index, tile in enumerate(tiles):
            x = MARGIN + NAME_WIDTH + index * (width + GAP)
            self.write(x, self.y - 0.04, tile.caption, size=7)
            self.place(tile.picture, x, self.y, width, height)
        self.y += height + GAP

    def render(self) -> Image.Image:
        """Return the sheet as an image that ends below the last tile."""
        height = self.y + MARGIN
        self.figure.set_size_inches(WIDTH, height)
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())


# Sections -----------------------------------------------------------------------------------------


def draw_header(sheet: Sheet, measurements: PhotoMeasurements, title: str) -> None:
    """Write the title, the size of the model, what it sees of the photo, and the predictions."""
    config = measurements.config
    image = measurements.image
    height, width = measurements.input_size
    rows, columns = measurements.norms.shape[1:]
    patch_height, patch_width = config.patch_height_width
    visible_part = describe_visible_part(measurements)
    lines = [
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, patches of "
        f"{patch_height} × {patch_width} pixels, {describe_tokens(config)}",
        f"photo of {image.width} × {image.height} pixels; the model sees {visible_part} at "
        f"{width} × {height} pixels, as {columns} × {rows} patches",
    ]

    for prediction in measurements.predictions:
        labels = ", ".join(
            f"{shorten_text(label, 40)} {probability:.0%}"
            for label, probability in prediction.labels
        )
        lines.append(f"{prediction.task or 'prediction'}: {labels or 'no label'}")

    sheet.y += 0.14
    sheet.write(
        MARGIN, sheet.y, shorten_text(title, MAX_TITLE), size=15, color=DARK_GRAY, weight="bold"
    )
    for line in lines:
        sheet.y += 0.2
        sheet.write(MARGIN, sheet.y, line, size=9)
    if visible_part != "all of it":
        thumbnail = draw_whole_photo(measurements)
        max_height = sheet.y - MARGIN + 0.05
        thumbnail_width = min(max_height * thumbnail.width / thumbnail.height, 2.65)
        thumbnail_height = thumbnail_width * thumbnail.height / thumbnail.width
        x = WIDTH - MARGIN - thumbnail_width
        sheet.place(thumbnail, x, MARGIN, thumbnail_width, thumbnail_height)


def draw_overview(sheet: Sheet, measurements: PhotoMeasurements) -> None:
    """Draw what the model sees, the attention of the first token, and the patches."""
    token = measurements.token_names[0]
    token_layer = measurements.token_layers[0]
    attention = measurements.maps[token_layer - 1, :, 0].mean(dim=0)  # [gh, gw]
    layer = measurements.patch_layer
    norms = measurements.norms[layer - 1]  # [gh, gw]

    sheet.y += 0.42
    pitch = (WIDTH - 2 * MARGIN + 0.25) / 4
    picture = draw_visible_part(measurements, LARGE_SIDE)
    width = min(pitch - 0.25, MAX_LARGE_HEIGHT * picture.width / picture.height)
    height = width * picture.height / picture.width

    tiles = [
        Tile(picture, "What the model sees"),
        Tile(
            draw_overlay(measurements, attention),
            f"Attention of {shorten_text(token, 11)}, layer {token_layer}",
        ),
        Tile(draw_colors(measurements, layer - 1, LARGE_SIDE), f"Patch features, layer {layer}"),
        Tile(draw_norms(measurements, layer - 1, LARGE_SIDE), f"Patch norms, layer {layer}"),
    ]

    for index, tile in enumerate(tiles):
        x = MARGIN + index * pitch
        sheet.write(x, sheet.y - 0.08, tile.caption, size=10, color=DARK_GRAY, weight="bold")
        sheet.place(tile.picture, x, sheet.y, width, height)

    sheet.y += height + 0.08
    brightest = max(attention.max().item(), MIN_SCALE * attention.mean().item())  # as in `overlay`
    draw_color_bar(
        sheet,
        x=MARGIN + pitch,
        width=width,
        colormap=COLORMAP,
        low="0",
        high=f"{brightest:.2%} in one patch",
    )
    draw_color_bar(
        sheet,
        x=MARGIN + 3 * pitch,
        width=width,
        colormap=NORM_COLORMAP,
        low=f"{norms.min():.3g}",
        high=f"{norms.max():.3g}",
    )

    share = sum(measurements.explained_variance[layer - 1])
    sheet.write(
        MARGIN + 2 * pitch, sheet.y + 0.08, "red, green, blue: 3 principal components,", size=8
    )
    sheet.write(
        MARGIN + 2 * pitch, sheet.y + 0.22, f"which explain {share:.0%} of the variance", size=8
    )
    sheet.y += 0.28


def draw_color_bar(
    sheet: Sheet, x: float, width: float, colormap: str, low: str, high: str
) -> None:
    """Draw a color bar with the values at its ends."""
    sheet.place(colormaps[colormap](np.linspace(0, 1, 256))[None], x, sheet.y, width, 0.07)
    sheet.write(x, sheet.y + 0.22, low, size=8)
    sheet.write(x + width, sheet.y + 0.22, high, size=8, ha="right")


def draw_heads(sheet: Sheet, measurements: PhotoMeasurements) -> None:
    """Draw the mean and the heads of each token in the last layer in which the token is used."""
    num_tokens = len(measurements.token_names)
    heading = "Attention by head"
    if num_tokens > MAX_TOKENS:
        heading += f", first {MAX_TOKENS} of {num_tokens} tokens"
    explanation = (
        "In the last layer that uses the token. Percentages: attention on patches; the rest is on "
        "special tokens. Each map has its own scale: black is 0, bright is the highest 1% of its "
        "values"
    )
    sheet.write_heading(heading, explanation)

    noun = "map" if measurements.config.attention_type == "differential" else "head"
    headers = ["mean", *(f"{noun} {number}" for number in range(1, measurements.maps.shape[1] + 1))]

    rows = []
    for index, layer in enumerate(measurements.token_layers[:MAX_TOKENS]):
        maps = measurements.maps[layer - 1, :, index]  # [H, gh, gw]
        maps = torch.cat([maps.mean(dim=0, keepdim=True), maps])  # [1 + H, gh, gw]
        rows.append(draw_attention_row(measurements, index, f"layer {layer}", maps))

    sheet.draw_rows(headers, rows, get_min_columns(measurements))


def draw_layers(sheet: Sheet, measurements: PhotoMeasurements) -> None:
    """Draw the attention of each token, the features and the norms after each layer."""
    explanation = (
        "Attention: mean over heads, with the percentage on patches. Features: 3 components per "
        "layer, with the variance that they explain; their colors are matched between layers"
    )
    sheet.write_heading("Layer by layer", explanation)

    layers = range(len(measurements.maps))
    rows = []
    for index in range(len(measurements.token_names[:MAX_TOKENS])):
        maps = measurements.maps[:, :, index].mean(dim=1)  # [L, gh, gw]
        rows.append(draw_attention_row(measurements, index, "attention", maps))

    shares = [f"{sum(each):.0%}" for each in measurements.explained_variance]
    tiles = [Tile(draw_colors(measurements, layer, SMALL_SIDE), shares[layer]) for layer in layers]
    rows.append(Row("patches", "features", DARK_GRAY, tiles))

    ranges = [f"{norms.min():.3g} to {norms.max():.3g}" for norms in measurements.norms]
    tiles = [Tile(draw_norms(measurements, layer, SMALL_SIDE), ranges[layer]) for layer in layers]
    rows.append(Row("patches", "norms", DARK_GRAY, tiles))

    sheet.draw_rows([f"layer {layer + 1}" for layer in layers], rows, get_min_columns(measurements))


def draw_attention_row(
    measurements: PhotoMeasurements, index: int, note: str, maps: torch.Tensor
) -> Row:
    """Return the row of a token, with one tile for each map [n, gh, gw]."""
    color = GROUP_COLORS[measurements.token_groups[index]]
    tiles = [Tile(draw_attention(measurements, values), f"{values.sum():.0%}") for values in maps]
    return Row(measurements.token_names[index], note, color, tiles)


def get_min_columns(measurements: PhotoMeasurements) -> int:
    """Return the minimum number of columns, which limits the size of tiles."""
    return MIN_COLUMNS if len(measurements.token_names) < MANY_TOKENS else MIN_COLUMNS_OF_MANY


# Text ---------------------------------------------------------------------------------------------


def describe_tokens(config: ViTCLSConfig) -> str:
    """Return the numbers of special tokens as text, such as "1 CLS token, 4 register tokens"."""
    indices = range(config.token_layout.num_prefix_tokens)
    counts = {
        name: len(indices[group])
        for name, group in config.token_layout.items()
        if name != "patches"
    }
    texts = [
        f"{n} {SINGLE_TOKEN_NAMES[name]} token{'s' * (n > 1)}" for name, n in counts.items() if n
    ]
    return ", ".join(texts) or "no special tokens"


def describe_visible_part(measurements: PhotoMeasurements) -> str:
    """Return which part of the photo the model sees."""
    image = measurements.image
    left, top, right, bottom = measurements.visible_region
    visible_width = min(right, image.width) - max(left, 0)
    visible_height = min(bottom, image.height) - max(top, 0)
    share = visible_width * visible_height / (image.width * image.height)
    return "all of it" if share > 0.995 else f"the central {share:.0%} of it"


# Pictures -----------------------------------------------------------------------------------------


def crop_to_region(image: Image.Image, region: VisibleRegion) -> Image.Image:
    """Return the region of an image. Padding outside the image is gray."""
    left, top, right, bottom = map(round, region)
    cropped = Image.new("RGB", (max(right - left, 1), max(bottom - top, 1)), "#808080")
    cropped.paste(image, (-left, -top))
    return cropped


def draw_visible_part(measurements: PhotoMeasurements, side: int) -> Image.Image:
    """Draw the part of the photo that the model sees."""
    image, region = resize_with_region(measurements.image, measurements.visible_region, side, side)
    return crop_to_region(image, region)


def draw_whole_photo(measurements: PhotoMeasurements) -> Image.Image:
    """Draw the whole photo. The part that the model does not see is pale."""
    image, region = resize_with_region(
        measurements.image, measurements.visible_region, LARGE_SIDE, LARGE_SIDE
    )
    left, top, right, bottom = map(round, region)
    box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    pale = Image.blend(
        Image.new("RGB", image.size, "white"), image.convert("L").convert("RGB"), HIDDEN_OPACITY
    )
    pale.paste(image.crop(box), box[:2])
    return pale


def draw_overlay(measurements: PhotoMeasurements, values: torch.Tensor) -> Image.Image:
    """Draw an attention map [gh, gw] over the photo."""
    image, region = resize_with_region(
        measurements.image, measurements.visible_region, LARGE_SIDE, LARGE_SIDE
    )
    return crop_to_region(overlay(image, values, region), region)


def draw_attention(measurements: PhotoMeasurements, values: torch.Tensor) -> Image.Image:
    """Draw an attention map [gh, gw]. Each patch has one color."""
    brightest = max(values.quantile(BRIGHT_QUANTILE).item(), MIN_SCALE * values.mean().item())
    strength = values / brightest if brightest > 0 else values
    return fill_region(measurements, colormaps[COLORMAP](strength.numpy())[:, :, :3], SMALL_SIDE)


def draw_colors(measurements: PhotoMeasurements, layer: int, side: int) -> Image.Image:
    """Draw the principal components after a layer as colors."""
    return fill_region(measurements, measurements.colors[layer].numpy(), side)


def draw_norms(measurements: PhotoMeasurements, layer: int, side: int) -> Image.Image:
    """Draw the norms of the patches after a layer, from the smallest to the largest norm."""
    norms = measurements.norms[layer]
    strength = (norms - norms.min()) / (norms.max() - norms.min()).clamp(min=1e-12)
    return fill_region(measurements, colormaps[NORM_COLORMAP](strength.numpy())[:, :, :3], side)


def fill_region(measurements: PhotoMeasurements, colors: np.ndarray, side: int) -> Image.Image:
    """Return colors of patches [gh, gw, 3] (0 to 1) as an image of the visible part's size."""
    size = draw_visible_part(measurements, side).size
    return Image.fromarray((colors * 255).round().astype(np.uint8)).resize(
        size, Image.Resampling.NEAREST
    )
