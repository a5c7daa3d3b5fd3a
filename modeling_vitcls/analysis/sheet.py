"""Draw the sheet of one photo for `vitcls look` and the report, from the measurements in photo.py.

    title, and the whole photo if the model sees only a part
    photo | attention | principal components of the patches | norms of the patches
    attribution                  one tile per label of the predictions
    attention of each head       one row per token, in the last layer in which the token is used
    layer by layer               one row per token, then principal components and norms

Each line of the sheet is a `Strip`: one composed picture, and texts at its pixels. The strips are
the rows of one matplotlib figure.
"""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ..inference.token_names import SINGLE_TOKEN_NAMES
from ..model.configuration_vitcls import ViTCLSConfig
from .maps import COLORMAP, MIN_SCALE, draw_region, get_brightest_value, limit_region, overlay
from .photo import PhotoMeasurements


# in pixels, of which an inch has DPI
WIDTH = 1800
DPI = 150
LEFT, RIGHT = 45, 1755
TILES_LEFT = 216  # left edge of the tiles, right of the names of the rows
TILE_GAP = 10
LARGE_SIDE = 640  # longer side of the photo before it is scaled
LARGE_GAP = 38  # between the pictures in the first row
MAX_LARGE_HEIGHT = 510  # of these pictures

MAX_COLUMNS = 17  # maximum number of tiles per line: the mean and 16 heads
# tiles are not larger than in a line of this number of tiles
MIN_COLUMNS = 7
MIN_COLUMNS_OF_MANY = 12
MANY_TOKENS = 3  # minimum number of tokens for MIN_COLUMNS_OF_MANY
MAX_TOKENS = 9  # maximum number of tokens with a row
MAX_ATTRIBUTIONS = 12  # maximum number of labels with an attribution
CHARACTER_WIDTH = 9  # of a header, so that neighbors do not overlap
MAX_TITLE = 64  # maximum number of characters of the title, beside the small photo

# Color of each group of `config.token_layout`. Color-blind readers can distinguish the colors
# (palette of Okabe and Ito).
GROUP_COLORS = {
    "cls": "#0072B2",
    "distillation": "#D55E00",
    "registers": "#009E73",
    "patches": "#8C8C8C",
}
DARK_GRAY = "#222222"
MEDIUM_GRAY = "#666666"
NORM_COLORMAP = "viridis"
BRIGHT_QUANTILE = 0.99  # quantile of an attention map that is drawn in the brightest color
HIDDEN_OPACITY = 0.3  # of the part of the photo that the model does not see
UNUSED_OPACITY = 0.35  # of maps that no output of the model depends on


# a picture, the text above it, and whether an output of the model depends on it
Tile = tuple[Image.Image, str, bool]


class Row(NamedTuple):
    """A row of tiles, with a name in a color and a note below the name."""

    name: str
    note: str
    color: str
    tiles: list[Tile]


class Strip:
    """A line of the sheet: a picture as wide as the sheet, and texts at its pixels."""

    def __init__(self, height: int) -> None:
        self.picture = Image.new("RGB", (WIDTH, height), "white")
        self.texts: list[dict[str, Any]] = []

    def write(
        self, x: int, y: int, text: str, size: float = 9, color: str = MEDIUM_GRAY, **style: Any
    ) -> None:
        """Write a text that begins at x, on the baseline y."""
        self.texts.append({"x": x, "y": y, "s": text, "fontsize": size, "color": color, **style})


def draw_sheet(measurements: PhotoMeasurements, title: str = "") -> Image.Image:
    """Draw the sheet of a photo.

    Args:
        measurements: measurements of the photo (`measure_photo`).
        title: name of the model and of the photo.

    Returns:
        An RGB image that is 1,800 pixels wide.
    """
    photo = draw_region(measurements.image, measurements.visible_region, LARGE_SIDE)
    strips = [
        draw_header(measurements, title),
        draw_overview(measurements, photo),
        *draw_attributions(measurements, photo),
        *draw_heads(measurements, photo),
        *draw_layers(measurements, photo),
        Strip(20),
    ]
    heights = [strip.picture.height for strip in strips]
    figure = Figure(figsize=(WIDTH / DPI, sum(heights) / DPI), dpi=DPI)
    # the rows fill the figure, so a pixel of a strip is a pixel of the sheet
    places = {"left": 0, "right": 1, "bottom": 0, "top": 1, "hspace": 0}
    rows = figure.subplots(len(strips), height_ratios=heights, gridspec_kw=places)
    for axes, strip in zip(rows, strips, strict=True):
        axes.imshow(strip.picture, aspect="auto", interpolation="nearest")
        axes.set_axis_off()
        for text in strip.texts:
            # A name with two dollar signs is no formula.
            axes.text(parse_math=False, **text)
    # Without pyplot, which would keep every figure in memory until it is closed.
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


# Sections -----------------------------------------------------------------------------------------


def draw_header(measurements: PhotoMeasurements, title: str) -> Strip:
    """Write the title, the size of the model, what it sees of the photo, and the predictions."""
    config = measurements.config
    image = measurements.image
    height, width = measurements.input_size
    rows, columns = measurements.norms.shape[1:]
    patch_height, patch_width = config.patch_height_width
    visible_part = describe_visible_part(measurements)
    lines = [
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, patches of "
        f"{patch_height} × {patch_width} pixels, {count_special_tokens(config)}",
        f"photo of {image.width} × {image.height} pixels; the model sees {visible_part} at "
        f"{width} × {height} pixels, as {columns} × {rows} patches",
    ]
    for prediction in measurements.predictions:
        labels = ", ".join(
            f"{shorten_middle(name, 40)} {probability:.0%}"
            for name, probability in prediction.labels
        )
        lines.append(f"{prediction.task or 'prediction'}: {labels or 'no label'}")

    strip = Strip(80 + 30 * len(lines))
    strip.write(LEFT, 65, shorten_middle(title, MAX_TITLE), 15, DARK_GRAY, weight="bold")
    for number, line in enumerate(lines, start=1):
        strip.write(LEFT, 65 + 30 * number, line)
    if visible_part != "all of it":
        photo = draw_whole_photo(measurements)
        photo.thumbnail((400, strip.picture.height - 36))
        strip.picture.paste(photo, (RIGHT - photo.width, 36))
    return strip


def draw_overview(measurements: PhotoMeasurements, photo: Image.Image) -> Strip:
    """Draw what the model sees, the attention of the first token, and the patches."""
    token = shorten_middle(measurements.token_names[0], 11)
    token_layer = measurements.token_layers[0]
    attention = measurements.maps[token_layer - 1, :, 0].mean(dim=0)  # [gh, gw]
    layer = measurements.patch_layer
    norms = measurements.norms[layer - 1]  # [gh, gw]
    pictures = {
        "What the model sees": photo,
        f"Attention of {token}, layer {token_layer}": overlay(photo, attention),
        f"Patch features, layer {layer}": to_picture(measurements.colors[layer - 1].numpy()),
        f"Patch norms, layer {layer}": color_norms(norms),
    }

    slot = (RIGHT - LEFT - 3 * LARGE_GAP) // 4
    scale = min(slot / photo.width, MAX_LARGE_HEIGHT / photo.height)
    width, height = max(round(scale * photo.width), 1), max(round(scale * photo.height), 1)
    top = 50
    below = top + height + 12
    strip = Strip(below + 48)
    lefts = [LEFT + number * (slot + LARGE_GAP) for number in range(4)]
    for left, (title, picture) in zip(lefts, pictures.items(), strict=True):
        strip.picture.paste(scale_picture(picture, width, height), (left, top))
        strip.write(left, top - 9, title, 10, DARK_GRAY, weight="bold")

    brightest = get_brightest_value(attention)
    bars = {
        lefts[1]: (COLORMAP, "0", f"{brightest:.2%} in one patch"),
        lefts[3]: (NORM_COLORMAP, f"{norms.min():.3g}", f"{norms.max():.3g}"),
    }
    for left, (colormap, low, high) in bars.items():
        colors = colormaps[colormap](np.linspace(0, 1, slot))[None, :, :3]  # [1, slot, 3]
        strip.picture.paste(to_picture(colors).resize((slot, 10)), (left, below))
        strip.write(left, below + 30, low, 8)
        strip.write(left + slot, below + 30, high, 8, ha="right")

    share = sum(measurements.explained_variance[layer - 1])
    explanation = (
        f"red, green, blue: 3 principal components,\nwhich explain {share:.0%} of the variance"
    )
    strip.write(lefts[2], below - 2, explanation, 8, va="top")
    return strip


def draw_attributions(measurements: PhotoMeasurements, photo: Image.Image) -> list[Strip]:
    """Draw the attribution of each label of the predictions over the photo, if there are any."""
    attributions = measurements.attributions[:MAX_ATTRIBUTIONS]
    if not attributions:
        return []
    tiles = [
        (overlay(photo, values), f"{probability:.0%}", True)
        for _, (_, probability), values in attributions
    ]
    return draw_rows(
        measurements,
        photo,
        "What counts for a label",
        "Attribution: attention weighted by its gradient (Chefer et al. 2021). Bright patches raise "
        "the score of the label",
        [": ".join(filter(None, (task, name))) for task, (name, _), _ in attributions],
        [Row("prediction", "attribution", DARK_GRAY, tiles)],
    )


def draw_heads(measurements: PhotoMeasurements, photo: Image.Image) -> list[Strip]:
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
    noun = "map" if measurements.config.attention_type == "differential" else "head"
    headers = ["mean", *(f"{noun} {number}" for number in range(1, measurements.maps.shape[1] + 1))]

    rows = []
    for index, layer in enumerate(measurements.token_layers[:MAX_TOKENS]):
        maps = measurements.maps[layer - 1, :, index]  # [H, gh, gw]
        maps = torch.cat([maps.mean(dim=0, keepdim=True), maps])  # [1 + H, gh, gw]
        rows.append(build_attention_row(measurements, index, f"layer {layer}", maps))
    return draw_rows(measurements, photo, heading, explanation, headers, rows)


def draw_layers(measurements: PhotoMeasurements, photo: Image.Image) -> list[Strip]:
    """Draw the attention of each token, the features and the norms after each layer."""
    explanation = (
        "Attention: mean over heads, and percentage on patches. Features: 3 components, and the "
        "variance that they explain; their colors are matched between layers"
    )
    num_layers = len(measurements.maps)
    if min(measurements.patch_layer, *measurements.token_layers) < num_layers:
        reader = "not read by the classifier" if measurements.predictions else "not in the output"
        explanation += f". Pale: {reader}"

    rows = []
    for index, num_used in enumerate(measurements.token_layers[:MAX_TOKENS]):
        maps = measurements.maps[:, :, index].mean(dim=1)  # [L, gh, gw]
        rows.append(build_attention_row(measurements, index, "attention", maps, num_used))

    used = range(measurements.patch_layer)
    features = [
        (to_picture(colors.numpy()), f"{sum(shares):.0%}", layer in used)
        for layer, (colors, shares) in enumerate(
            zip(measurements.colors, measurements.explained_variance, strict=True)
        )
    ]
    norms = [
        (color_norms(values), f"{values.min():.3g} to {values.max():.3g}", layer in used)
        for layer, values in enumerate(measurements.norms)
    ]
    rows.append(Row("patches", "features", DARK_GRAY, features))
    rows.append(Row("patches", "norms", DARK_GRAY, norms))
    headers = [f"layer {layer + 1}" for layer in range(num_layers)]
    return draw_rows(measurements, photo, "Layer by layer", explanation, headers, rows)


def build_attention_row(
    measurements: PhotoMeasurements,
    index: int,
    note: str,
    maps: torch.Tensor,
    num_used: int | None = None,
) -> Row:
    """Build the row of a token, with one tile for each map [n, gh, gw].

    The first `num_used` maps are used; all of them by default.
    """
    color = GROUP_COLORS[measurements.token_groups[index]]
    tiles = [
        (color_attention(values), f"{values.sum():.0%}", num_used is None or layer < num_used)
        for layer, values in enumerate(maps)
    ]
    return Row(measurements.token_names[index], note, color, tiles)


# Rows of tiles ------------------------------------------------------------------------------------


def draw_rows(
    measurements: PhotoMeasurements,
    photo: Image.Image,
    heading: str,
    explanation: str,
    headers: Sequence[str],
    rows: Sequence[Row],
) -> list[Strip]:
    """Draw a heading, one line in gray, and rows of tiles with headers above the columns.

    If there are too many columns, all rows continue below.
    """
    title = Strip(82)
    title.write(LEFT, 44, heading, 11.5, DARK_GRAY, weight="bold")
    title.write(LEFT, 73, explanation, 8.5)

    # rounded up
    num_lines = -(-len(headers) // MAX_COLUMNS)
    num_columns = -(-len(headers) // num_lines)
    has_many = len(measurements.token_names) >= MANY_TOKENS
    min_columns = MIN_COLUMNS_OF_MANY if has_many else MIN_COLUMNS
    width = (RIGHT - TILES_LEFT) // max(num_columns, min_columns) - TILE_GAP
    height = max(round(width * photo.height / photo.width), 1)

    strips = [title]
    for start in range(0, len(headers), num_columns):
        columns = slice(start, start + num_columns)
        names = Strip(34)
        for x, header in enumerate_columns(headers[columns], width):
            text = shorten_middle(header, width // CHARACTER_WIDTH)
            names.write(x, 28, text, 7.5, DARK_GRAY)
        strips.append(names)
        strips += [draw_row(row, row.tiles[columns], width, height) for row in rows]
    return strips


def draw_row(row: Row, tiles: Sequence[Tile], width: int, height: int) -> Strip:
    """Draw some tiles of a row, of this size, below their captions."""
    top = 24
    strip = Strip(top + max(height, 40) + 6)  # the name and the note need 40 pixels
    for x, (unscaled, caption, is_used) in enumerate_columns(tiles, width):
        picture = scale_picture(unscaled, width, height)
        if not is_used:
            picture = Image.blend(Image.new("RGB", picture.size, "white"), picture, UNUSED_OPACITY)
        strip.picture.paste(picture, (x, top))
        strip.write(x, top - 4, caption, 7)

    middle = top + height // 2
    name = "\n".join(textwrap.wrap(shorten_middle(row.name, 36), 13))
    strip.write(LEFT, middle, name, 8.5, row.color, weight="bold", va="bottom")
    strip.write(LEFT, middle + 4, row.note, 7.5, va="top")
    return strip


def enumerate_columns(items: Sequence[Any], width: int) -> Iterator[tuple[int, Any]]:
    """Yield the left edge of the column of each item."""
    return zip(range(TILES_LEFT, WIDTH, width + TILE_GAP), items, strict=False)


# Text ---------------------------------------------------------------------------------------------


def count_special_tokens(config: ViTCLSConfig) -> str:
    """Count the special tokens in words, such as "1 CLS token, 4 register tokens"."""
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
    """Say which part of the photo the model sees."""
    image = measurements.image
    left, top, right, bottom = limit_region(measurements.visible_region, image)
    share = (right - left) * (bottom - top) / (image.width * image.height)
    return "all of it" if share > 0.995 else f"the central {share:.0%} of it"


def shorten_middle(text: str, max_length: int) -> str:
    """Replace the middle of a long text with "…", because names often differ at their ends."""
    if len(text) <= max_length:
        return text
    suffix_length = (max_length - 1) // 2
    prefix_length = max_length - 1 - suffix_length
    return f"{text[:prefix_length]}…{text[len(text) - suffix_length :]}"


# Pictures -----------------------------------------------------------------------------------------


def draw_whole_photo(measurements: PhotoMeasurements) -> Image.Image:
    """Draw the whole photo. The part that the model does not see is pale."""
    photo = measurements.image
    white = Image.new("RGB", photo.size, "white")
    whole = Image.blend(white, photo.convert("L").convert("RGB"), HIDDEN_OPACITY)
    left, top, right, bottom = map(round, limit_region(measurements.visible_region, photo))
    whole.paste(photo.crop((left, top, right, bottom)), (left, top))
    return whole


def scale_picture(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture; a patch that is enlarged remains one rectangle of one color."""
    is_enlarged = picture.width < width
    resample = Image.Resampling.NEAREST if is_enlarged else Image.Resampling.LANCZOS
    return picture.resize((width, height), resample)


def to_picture(colors: np.ndarray) -> Image.Image:
    """Convert colors [h, w, 3] from 0 to 1."""
    return Image.fromarray((colors * 255).round().astype(np.uint8))


def color_attention(values: torch.Tensor) -> Image.Image:
    """Color an attention map [gh, gw]."""
    brightest = max(values.quantile(BRIGHT_QUANTILE).item(), MIN_SCALE * values.mean().item())
    strength = values / brightest if brightest > 0 else values
    return to_picture(colormaps[COLORMAP](strength.numpy())[:, :, :3])


def color_norms(norms: torch.Tensor) -> Image.Image:
    """Color norms [gh, gw], from the smallest to the largest norm."""
    strength = (norms - norms.min()) / (norms.max() - norms.min()).clamp(min=1e-12)
    return to_picture(colormaps[NORM_COLORMAP](strength.numpy())[:, :, :3])
