"""Draw the sheet of one photo for `vitcls look` and the report, from the measurements in photo.py.

    title, and the whole photo if the model sees only a part
    photo | attention | principal components of the patches | norms of the patches
    attribution                  one tile per label of the predictions
    attention of each head       one row per token, in the last layer in which the token is used
    layer by layer               one row per token, then principal components and norms

Each section is a figure of the width of the sheet and as high as its contents. The sheet is one
section below the other.
"""

import io
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from ..inference.token_names import SINGLE_TOKEN_NAMES
from ..model.configuration_vitcls import ViTCLSConfig
from .figures import DARK_GRAY, GROUP_COLORS, shorten_text
from .maps import COLORMAP, MIN_SCALE, draw_region, get_brightest_value, limit_region, overlay
from .photo import PhotoMeasurements


WIDTH = 12.0  # width of the sheet in inches
DPI = 150
LEFT, RIGHT = 0.025, 0.975  # margins, as fractions of the width
TILES_LEFT = 0.12  # left edge of the tiles, right of the names of the rows
GAP = 0.12  # between sections, in inches
TILE_GAP = 0.07  # between the tiles of a row, in inches
CAPTION_GAP = 0.2  # between the rows of tiles, in inches
LARGE_SIDE = 640  # longer side of a picture in the first row, in pixels
LARGE_GAP = 0.25  # between the pictures in the first row, in inches
MAX_LARGE_HEIGHT = 3.4  # of these pictures, in inches

MAX_COLUMNS = 17  # maximum number of tiles per line: the mean and 16 heads
# tiles are not larger than in a line of this number of tiles
MIN_COLUMNS = 7
MIN_COLUMNS_OF_MANY = 12
MANY_TOKENS = 3  # minimum number of tokens for MIN_COLUMNS_OF_MANY
MAX_TOKENS = 9  # maximum number of tokens with a row
MAX_ATTRIBUTIONS = 12  # maximum number of labels with an attribution
MAX_TITLE = 64  # maximum number of characters of the title, beside the small photo

MEDIUM_GRAY = "#666666"
NORM_COLORMAP = "viridis"
BRIGHT_QUANTILE = 0.99  # quantile of an attention map that is drawn in the brightest color
HIDDEN_OPACITY = 0.3  # of the part of the photo that the model does not see
UNUSED_OPACITY = 0.35  # of maps that no output of the model depends on


class Tile(NamedTuple):
    """A picture [h, w, 3], and the text above it."""

    picture: np.ndarray
    caption: str
    is_used: bool = True


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
    figures = [
        draw_header(measurements, title),
        draw_overview(measurements),
        *draw_attributions(measurements),
        *draw_heads(measurements),
        *draw_layers(measurements),
    ]
    sections = [render(figure) for figure in figures]
    margin = round(GAP * DPI)
    height = sum(section.height for section in sections) + 2 * margin
    sheet = Image.new("RGB", (sections[0].width, height), "white")
    y = margin
    for section in sections:
        sheet.paste(section, (0, y))
        y += section.height
    return sheet


def render(figure: Figure) -> Image.Image:
    """Return a figure as an image of the width of the sheet and the height of its contents."""
    contents = figure.get_tightbbox()
    region = Bbox.from_extents(0, contents.y0 - GAP, WIDTH, contents.y1 + GAP)
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches=region, pil_kwargs={"compress_level": 1})
    return Image.open(buffer).convert("RGB")


def create_section(height: float) -> Figure:
    """Create a white figure of the width of the sheet; the height is in inches."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")


def write(
    figure: Figure,
    text: str,
    inches: float,
    size: float = 9,
    color: str = MEDIUM_GRAY,
    **style: Any,
) -> None:
    """Write a line whose baseline is `inches` above the upper edge of the figure."""
    y = 1 + inches / figure.get_figheight()
    figure.text(LEFT, y, text, fontsize=size, color=color, parse_math=False, **style)


# Sections -----------------------------------------------------------------------------------------


def draw_header(measurements: PhotoMeasurements, title: str) -> Figure:
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
        labels = ", ".join(map(format_label, prediction.labels))
        lines.append(f"{prediction.task or 'prediction'}: {labels or 'no label'}")

    figure = create_section(0.3 + 0.2 * len(lines))
    write(figure, shorten_text(title, MAX_TITLE), -0.2, 15, DARK_GRAY, weight="bold")
    for number, line in enumerate(lines, start=1):
        write(figure, line, -0.2 - 0.2 * number)
    if visible_part != "all of it":
        axes = figure.add_axes((0.75, 0, RIGHT - 0.75, 1), anchor="NE")
        axes.imshow(draw_whole_photo(measurements))
        axes.set_axis_off()
    return figure


def draw_overview(measurements: PhotoMeasurements) -> Figure:
    """Draw what the model sees, the attention of the first token, and the patches."""
    token = shorten_text(measurements.token_names[0], 11)
    token_layer = measurements.token_layers[0]
    attention = measurements.maps[token_layer - 1, :, 0].mean(dim=0)  # [gh, gw]
    layer = measurements.patch_layer
    norms = measurements.norms[layer - 1]  # [gh, gw]
    photo = draw_visible_part(measurements)

    slot = ((RIGHT - LEFT) * WIDTH - 3 * LARGE_GAP) / 4
    figure = create_section(min(slot * photo.height / photo.width, MAX_LARGE_HEIGHT))
    slots = figure.subplots(
        ncols=4,
        gridspec_kw={
            "left": LEFT,
            "right": RIGHT,
            "bottom": 0,
            "top": 1,
            "wspace": LARGE_GAP / slot,
        },
    )
    pictures = {
        "What the model sees": photo,
        f"Attention of {token}, layer {token_layer}": overlay(photo, attention),
        f"Patch features, layer {layer}": measurements.colors[layer - 1].numpy(),
        f"Patch norms, layer {layer}": color_norms(norms),
    }
    for axes, (title, picture) in zip(slots, pictures.items(), strict=True):
        axes.set_anchor("NW")
        # in the proportions of the photo; a patch is one rectangle
        is_photo = isinstance(picture, Image.Image)
        axes.imshow(
            picture,
            extent=(0, photo.width, photo.height, 0),
            interpolation="antialiased" if is_photo else "nearest",
        )
        axes.set_axis_off()
        axes.set_title(
            title, loc="left", fontsize=10, color=DARK_GRAY, weight="bold", pad=4, parse_math=False
        )

    brightest = get_brightest_value(attention)
    draw_color_bar(figure, slots[1], COLORMAP, {0: "0", brightest: f"{brightest:.2%} in one patch"})
    limits = {value: f"{value:.3g}" for value in (norms.min().item(), norms.max().item())}
    draw_color_bar(figure, slots[3], NORM_COLORMAP, limits)

    share = sum(measurements.explained_variance[layer - 1])
    slots[2].annotate(
        f"red, green, blue: 3 principal components,\nwhich explain {share:.0%} of the variance",
        (0, 0),
        xycoords="axes fraction",
        xytext=(0, -6),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=MEDIUM_GRAY,
    )
    return figure


def draw_color_bar(figure: Figure, axes: Axes, colormap: str, labels: dict[float, str]) -> None:
    """Draw a color bar below a picture, with labels of its ends."""
    low, high = min(labels), max(labels)
    inch = 1 / figure.get_figheight()
    bar = figure.colorbar(
        ScalarMappable(Normalize(low, max(high, low + 1e-12)), colormap),
        cax=axes.inset_axes((0, -0.15 * inch, 1, 0.07 * inch)),
        orientation="horizontal",
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=MEDIUM_GRAY)
    bar.set_ticks([low, high], labels=[labels[low], labels[high]])
    left, right = bar.ax.get_xticklabels()
    left.set_horizontalalignment("left")
    right.set_horizontalalignment("right")


def draw_attributions(measurements: PhotoMeasurements) -> list[Figure]:
    """Draw the attribution of each label of the predictions over the photo."""
    attributions = measurements.attributions[:MAX_ATTRIBUTIONS]
    if not attributions:
        return []
    photo = draw_visible_part(measurements)
    headers = []
    tiles = []
    for attribution in attributions:
        name, probability = attribution.label
        headers.append(shorten_text(": ".join(filter(None, (attribution.task, name))), 22))
        picture = np.asarray(overlay(photo, attribution.values))
        tiles.append(Tile(picture, f"{probability:.0%}"))
    return draw_rows(
        measurements,
        "What counts for a label",
        "Attribution: attention weighted by its gradient (Chefer et al. 2021). Bright patches raise "
        "the score of the label",
        headers,
        [Row("prediction", "attribution", DARK_GRAY, tiles)],
    )


def draw_heads(measurements: PhotoMeasurements) -> list[Figure]:
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
    return draw_rows(measurements, heading, explanation, headers, rows)


def draw_layers(measurements: PhotoMeasurements) -> list[Figure]:
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

    features = []
    norms = []
    for layer in range(num_layers):
        is_used = layer < measurements.patch_layer
        share = sum(measurements.explained_variance[layer])
        values = measurements.norms[layer]
        features.append(Tile(measurements.colors[layer].numpy(), f"{share:.0%}", is_used))
        norms.append(
            Tile(color_norms(values), f"{values.min():.3g} to {values.max():.3g}", is_used)
        )
    rows.append(Row("patches", "features", DARK_GRAY, features))
    rows.append(Row("patches", "norms", DARK_GRAY, norms))

    headers = [f"layer {layer + 1}" for layer in range(num_layers)]
    return draw_rows(measurements, "Layer by layer", explanation, headers, rows)


def build_attention_row(
    measurements: PhotoMeasurements,
    index: int,
    note: str,
    maps: torch.Tensor,
    num_used: int | None = None,
) -> Row:
    """Return the row of a token, with one tile for each map [n, gh, gw].

    The first `num_used` maps are used; all of them by default.
    """
    color = GROUP_COLORS[measurements.token_groups[index]]
    tiles = [
        Tile(color_attention(values), f"{values.sum():.0%}", num_used is None or layer < num_used)
        for layer, values in enumerate(maps)
    ]
    return Row(measurements.token_names[index], note, color, tiles)


# Rows of tiles ------------------------------------------------------------------------------------


def draw_rows(
    measurements: PhotoMeasurements,
    heading: str,
    explanation: str,
    headers: Sequence[str],
    rows: Sequence[Row],
) -> list[Figure]:
    """Draw a heading, one line in gray, and rows of tiles with headers above the columns.

    If there are too many columns, all rows continue in further figures.
    """
    has_many = len(measurements.token_names) >= MANY_TOKENS
    min_columns = MIN_COLUMNS_OF_MANY if has_many else MIN_COLUMNS
    # rounded up
    num_lines = -(-len(headers) // MAX_COLUMNS)
    num_columns = -(-len(headers) // num_lines)

    figures = []
    for start in range(0, len(headers), num_columns):
        columns = slice(start, start + num_columns)
        figures.append(
            draw_grid(
                draw_visible_part(measurements),
                headers[columns],
                [row._replace(tiles=row.tiles[columns]) for row in rows],
                max(num_columns, min_columns),
            )
        )
    write(figures[0], heading, 0.6, 11.5, DARK_GRAY, weight="bold")
    write(figures[0], explanation, 0.41, 8.5)
    return figures


def draw_grid(
    photo: Image.Image, headers: Sequence[str], rows: Sequence[Row], num_slots: int
) -> Figure:
    """Draw rows of tiles. They are as wide as in a line of `num_slots` tiles.

    All tiles share one pair of axes, in inches from the upper left corner, because axes of their
    own would take most of the time of a report.
    """
    width = (RIGHT - TILES_LEFT) * WIDTH / num_slots - TILE_GAP
    height = width * photo.height / photo.width
    figure = create_section(len(rows) * (height + CAPTION_GAP) - CAPTION_GAP)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(figure.get_figheight(), 0))
    axes.set_autoscale_on(False)
    axes.set_axis_off()
    write_at = partial(axes.annotate, textcoords="offset points")

    lefts = [TILES_LEFT * WIDTH + column * (width + TILE_GAP) for column in range(len(headers))]
    for number, row in enumerate(rows):
        top = number * (height + CAPTION_GAP)
        for left, tile in zip(lefts, row.tiles, strict=True):
            axes.imshow(
                tile.picture,
                extent=(left, left + width, top + height, top),
                aspect="auto",
                alpha=1 if tile.is_used else UNUSED_OPACITY,
                interpolation="nearest",
            )
            write_at(tile.caption, (left, top), (0, 2), fontsize=7, color=MEDIUM_GRAY)

        middle = (LEFT * WIDTH, top + height / 2)
        name = "\n".join(textwrap.wrap(shorten_text(row.name, 36), 13))
        style: dict[str, Any] = {
            "fontsize": 8.5,
            "weight": "bold",
            "color": row.color,
            "parse_math": False,
        }
        write_at(name, middle, (0, 0), va="bottom", **style)
        write_at(row.note, middle, (0, -2), va="top", fontsize=7.5, color=MEDIUM_GRAY)

    for left, header in zip(lefts, headers, strict=True):
        write_at(header, (left, 0), (0, 11), fontsize=7.5, color=DARK_GRAY, parse_math=False)
    return figure


# Text ---------------------------------------------------------------------------------------------


def format_label(label: tuple[str, float]) -> str:
    """Return a label with its probability as text."""
    name, probability = label
    return f"{shorten_text(name, 40)} {probability:.0%}"


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
    inside = limit_region(measurements.visible_region, image)
    area = (inside.right - inside.left) * (inside.bottom - inside.top)
    share = area / (image.width * image.height)
    return "all of it" if share > 0.995 else f"the central {share:.0%} of it"


# Pictures -----------------------------------------------------------------------------------------


def draw_visible_part(measurements: PhotoMeasurements) -> Image.Image:
    """Draw the part of the photo that the model sees."""
    return draw_region(measurements.image, measurements.visible_region, LARGE_SIDE)


def draw_whole_photo(measurements: PhotoMeasurements) -> Image.Image:
    """Draw the whole photo. The part that the model does not see is pale."""
    photo = measurements.image.copy()
    photo.thumbnail((LARGE_SIDE, LARGE_SIDE))
    scale = photo.width / measurements.image.width
    inside = limit_region(measurements.visible_region, measurements.image)
    left, top, right, bottom = (round(edge * scale) for edge in inside)
    gray = photo.convert("L").convert("RGB")
    pale = Image.blend(Image.new("RGB", photo.size, "white"), gray, HIDDEN_OPACITY)
    pale.paste(photo.crop((left, top, right, bottom)), (left, top))
    return pale


def color_attention(values: torch.Tensor) -> np.ndarray:
    """Return the colors [gh, gw, 3] of an attention map [gh, gw]."""
    brightest = max(values.quantile(BRIGHT_QUANTILE).item(), MIN_SCALE * values.mean().item())
    strength = values / brightest if brightest > 0 else values
    return colormaps[COLORMAP](strength.numpy())[:, :, :3]


def color_norms(norms: torch.Tensor) -> np.ndarray:
    """Return the colors [gh, gw, 3] of norms [gh, gw], from the smallest to the largest norm."""
    strength = (norms - norms.min()) / (norms.max() - norms.min()).clamp(min=1e-12)
    return colormaps[NORM_COLORMAP](strength.numpy())[:, :, :3]
