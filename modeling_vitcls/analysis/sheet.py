"""Draw the sheet of one photo for `vitcls look` and the report, from the measurements in photo.py.

    title, and the whole photo if the model sees only a part
    photo | score without each part, or attention | components of the patches | their norms
    without each part            one tile per label of the predictions
    attention of each head       one row per token, in the last layer in which the token is used
    layer by layer               one row per token, then principal components and norms

Each section is a figure of matplotlib, as wide as the sheet; the sheet stacks them, because the
height of a section is known only after it is drawn. Heights and widths are in inches.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LinearLocator
from PIL import Image

from ..inference.token_names import SINGLE_TOKEN_NAMES
from ..model.token_layout_vitcls import TOKEN_KINDS
from .fonts import use_installed_fonts
from .maps import choose_scale, draw_region, overlay
from .photo import PhotoMeasurements


WIDTH = 12.0
DPI = 150
LEFT, RIGHT = 0.025, 0.975  # Edges of the content, as fractions of the width
TILES_LEFT = 0.12  # Left edge of the tiles, right of the names of the rows
TILE_WIDTH = 0.92  # Part of the column; the rest is the gap between tiles
HEADING_HEIGHT = 0.55
CAPTION_HEIGHT = 0.2
MIN_TILE_HEIGHT = 0.3  # The name and the note of a row need it
MAX_LARGE_HEIGHT = 3.4  # Height of the images in the first row
LARGE_SIDE = 640  # Longer side of the photo before it is scaled, in pixels

MAX_TOKENS = 9  # Further tokens have no row
MAX_ATTRIBUTIONS = 14  # Two lines of labels
HEADER_CHARACTERS = 150  # With more in a line of headers, neighbors overlap
MAX_TITLE = 80  # Characters that fit in a line

# Color of each group of `config.token_layout`
GROUP_COLORS = {kind.group: kind.color for kind in TOKEN_KINDS} | {"patches": "#8C8C8C"}
DARK_GRAY = "#222222"
MEDIUM_GRAY = "#666666"
PALE = 0.35  # Opacity of maps that no output depends on

STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "text.color": MEDIUM_GRAY,
    "text.parse_math": False,  # Otherwise, a name with two dollar signs is a formula
    "axes.labelcolor": MEDIUM_GRAY,
    "axes.labelsize": 8,
    "axes.titlecolor": DARK_GRAY,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "xtick.color": MEDIUM_GRAY,
    "xtick.labelsize": 8,
}

HIDDEN_TEXTS = (
    "Without each part of the photo",
    "Red: the score of the label (its log odds) falls if the part is hidden; blue: it rises. Measured by hiding "
    "halves of the photo. Above: the largest value ± its standard error",
)

# An image, the text above it, and whether an output of the model depends on it
Tile = tuple[Any, str, bool]
Row = tuple[str, str, str, list[Tile]]  # A name, its color, a note below it, and tiles


@dataclass(frozen=True)
class ShownPhoto:
    """A photo that a page shows.

    Attributes:
        name: name of the photo.
        measurements: the values that its sheet shows.
        truth: true label as text; None if unknown.
        predicted: predicted label as text. Default: the prediction of the measurements.
        kind: reason why the photo is shown (`select_images`); None without a reason.
    """

    name: str
    measurements: PhotoMeasurements
    truth: str | None = None
    predicted: str | None = None
    kind: str | None = None

    @property
    def caption(self) -> str:
        """The true and the predicted labels, or the name of the photo."""
        predicted = self.predicted or ", ".join(
            labels[0][0] for labels in self.measurements.predictions.values() if labels
        )
        if self.truth and predicted:
            return f"{self.truth} → {predicted}"
        return predicted or self.name

    @cached_property
    def sheet(self) -> Image.Image:
        """The sheet of the photo."""
        return draw_sheet(self.measurements, Path(self.name).name)


def draw_sheet(
    measurements: PhotoMeasurements, title: str = "", is_trained: bool = False
) -> Image.Image:
    """Draw the sheet of a photo.

    Args:
        measurements: measurements of the photo (`measure_photo`).
        title: name of the model and of the photo.
        is_trained: whether the photo trained the model, which the title says.

    Returns:
        An RGB image that is 1,800 pixels wide.
    """
    photo = draw_region(measurements.image, measurements.visible_region, LARGE_SIDE)
    pictures = []
    if is_trained:
        title = " · ".join(filter(None, (title, "this photo trained the model")))
    with rc_context(STYLE):
        for figure in (
            draw_header(measurements, title),
            draw_overview(measurements, photo),
            *draw_attributions(measurements, photo),
            draw_heads(measurements, photo),
            draw_layers(measurements, photo),
        ):
            use_installed_fonts(figure)
            # Without pyplot, which would keep every figure in memory until it is closed.
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pictures.append(np.asarray(canvas.buffer_rgba())[:, :, :3])
    return Image.fromarray(np.concatenate(pictures))


# Sections -----------------------------------------------------------------------------------------


def draw_header(measurements: PhotoMeasurements, title: str) -> Figure:
    """Write the title, the sizes of the model and the photo, and the predictions."""
    config = measurements.config
    image = measurements.image
    height, width = measurements.input_size
    rows, columns = measurements.norms.shape[1:]
    tokens = [
        f"{number} {name} token{'s' * (number > 1)}"
        for name, number in zip(SINGLE_TOKEN_NAMES.values(), config.token_counts, strict=True)
        if number
    ]
    lines = [
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, patches of "
        f"{' × '.join(map(str, config.patch_height_width))} pixels, {', '.join(tokens) or 'no special tokens'}",
        f"photo of {image.width} × {image.height} pixels; the model sees {width} × {height} pixels, "
        f"as {columns} × {rows} patches",
        "drawn in the last layer that the output depends on: "
        f"{shorten_middle(measurements.token_names[0], 36)} in layer "
        f"{measurements.token_layers[0]}, "
        f"patches in layer {measurements.patch_layer}",
    ]
    for task, labels in measurements.predictions.items():
        text = ", ".join(
            f"{shorten_middle(name, 40)} {probability:.0%}" for name, probability in labels
        )
        if measurements.is_unknown and not task:
            text = f"none of these. The nearest of the classes: {text}"
        lines.append(f"{task or 'prediction'}: {text or 'no label'}")

    inches = 0.6 + 0.2 * len(lines)
    figure = Figure((WIDTH, inches), DPI)
    figure.text(
        LEFT,
        1 - 0.43 / inches,
        shorten_middle(title, MAX_TITLE),
        fontsize=15,
        color=DARK_GRAY,
        weight="bold",
    )
    figure.text(LEFT, 0.1 / inches, "\n".join(lines), fontsize=9, linespacing=1.5)
    return figure


def draw_overview(measurements: PhotoMeasurements, photo: Image.Image) -> Figure:
    """Draw what the model sees, what decides or what the first token reads, and the patches."""
    layer = measurements.patch_layer
    values, scale = measurements.main_map
    if measurements.attributions:
        main = measurements.attributions[0]
        map_format = "{x:+.2g}"
        map_title = f"{shorten_middle(main.label[0], 18)} without each part"
        map_text = "loss of log odds"
    else:
        token_layer = measurements.token_layers[0]
        map_format = "{x:.2%}"
        map_title = (
            f"Attention of {shorten_middle(measurements.token_names[0], 11)}, layer {token_layer}"
        )
        map_text = "" if measurements.are_read[0] else "this classifier does not read it"
        if measurements.predictions:
            map_text = "no part of the photo changes the score"

    pictures = {
        "What the model sees": photo,
        map_title: overlay(photo, values, scale),
        f"Patch features, layer {layer}": measurements.colors[layer - 1].numpy(),
        f"Patch norms, layer {layer}": measurements.norms[layer - 1].numpy(),
    }

    height = min((RIGHT - LEFT) * WIDTH / 4.5 * photo.height / photo.width, MAX_LARGE_HEIGHT)
    layout = ConstrainedLayoutEngine(rect=(LEFT, 0, RIGHT - LEFT, 0.95), w_pad=0, wspace=0.08)
    figure = Figure((WIDTH, height + 0.9), DPI, layout=layout)
    upper, lower = figure.subplots(2, 4, height_ratios=(height, 0.08))
    for axes, (title, picture) in zip(upper, pictures.items(), strict=True):
        norms = axes.imshow(picture, extent=(0, photo.width, photo.height, 0))
        axes.set_title(title)
    for axes in (*upper, lower[0], lower[2]):
        axes.set_axis_off()

    shares = measurements.explained_variance[layer - 1]
    lower[2].text(
        0,
        1,
        f"red, green, blue: 3 principal components,\nwhich explain {sum(shares):.0%} of the variance",
        va="top",
        fontsize=8,
    )
    for colors, axes, number_format, text in (
        (scale, lower[1], map_format, map_text),
        (norms, lower[3], "{x:.3g}", ""),
    ):
        figure.colorbar(
            colors,
            axes,
            orientation="horizontal",
            ticks=LinearLocator(3),
            format=number_format,
            label=text,
        )
    return figure


def draw_attributions(measurements: PhotoMeasurements, photo: Image.Image) -> list[Figure]:
    """Draw what the score of each label loses without each part, all in the same colors."""
    shown = measurements.attributions[:MAX_ATTRIBUTIONS]
    if not shown:
        return []
    # Log odds have one unit, so all labels share one scale.
    scale = choose_scale(torch.stack([each.values for each in shown]), is_signed=True)
    headers = []
    tiles = []
    for each in shown:
        name, probability = each.label
        headers.append(f"{': '.join(filter(None, (each.task, name)))} {probability:.0%}")
        tiles.append((overlay(photo, each.values, scale), each.caption, True))
    row = ("prediction", DARK_GRAY, "loss of log odds", tiles)
    return [draw_rows(*HIDDEN_TEXTS, headers, [row], photo, num_columns=7)]


def draw_heads(measurements: PhotoMeasurements, photo: Image.Image) -> Figure:
    """Draw the mean and the heads of each token in the last layer in which the token is used."""
    num_tokens = len(measurements.token_names)
    some = f", first {MAX_TOKENS} of {num_tokens} tokens" if num_tokens > MAX_TOKENS else ""
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
        note = f"layer {layer}" if measurements.are_read[index] else f"layer {layer}, not read"
        rows.append(build_attention_row(measurements, index, note, maps, len(maps)))
    return draw_rows(f"Attention by head{some}", explanation, headers, rows, photo, num_columns=13)


def draw_layers(measurements: PhotoMeasurements, photo: Image.Image) -> Figure:
    """Draw the attention of each token, the features and the norms after each layer."""
    explanation = (
        "Attention: mean over heads, and percentage on patches. Features: 3 components, and the "
        "variance that they explain; their colors are matched between layers. Pale: not in the output"
    )
    rows = []
    for index, num_used in enumerate(measurements.token_layers[:MAX_TOKENS]):
        maps = measurements.maps[:, :, index].mean(dim=1)  # [L, gh, gw]
        rows.append(build_attention_row(measurements, index, "attention", maps, num_used))

    layers = range(1, len(measurements.maps) + 1)
    is_used = [layer <= measurements.patch_layer for layer in layers]
    shares = [f"{sum(shares):.0%}" for shares in measurements.explained_variance]
    ranges = [f"{norms.min():.3g} to {norms.max():.3g}" for norms in measurements.norms]
    features = list(zip(measurements.colors.numpy(), shares, is_used, strict=True))
    norms = list(zip(measurements.norms.numpy(), ranges, is_used, strict=True))
    rows.append(("patches", DARK_GRAY, "features", features))
    rows.append(("patches", DARK_GRAY, "norms", norms))
    return draw_rows(
        "Layer by layer",
        explanation,
        [f"layer {layer}" for layer in layers],
        rows,
        photo,
        num_columns=12,
    )


def build_attention_row(
    measurements: PhotoMeasurements, index: int, note: str, maps: torch.Tensor, num_used: int
) -> Row:
    """Build the row of a token: a tile for each map [n, gh, gw]; outputs use the first `num_used`."""
    tiles = []
    for number, values in enumerate(maps):
        colors = choose_scale(values).to_rgba(values.numpy())
        tiles.append((colors, f"{values.sum():.0%}", number < num_used))
    color = GROUP_COLORS[measurements.token_groups[index]]
    return measurements.token_names[index], color, note, tiles


def draw_rows(
    heading: str,
    explanation: str,
    headers: Sequence[str],
    rows: Sequence[Row],
    photo: Image.Image,
    num_columns: int,
) -> Figure:
    """Draw a heading, one line in gray, and rows of tiles with headers above the columns.

    Tiles have the shape of `photo`. If there are more tiles than columns, all rows continue below.
    """
    column_width = (RIGHT - TILES_LEFT) * WIDTH / num_columns
    tile_height = TILE_WIDTH * column_width * photo.height / photo.width
    space = max(tile_height, MIN_TILE_HEIGHT)
    line_height = CAPTION_HEIGHT + len(rows) * (CAPTION_HEIGHT + space)
    height = HEADING_HEIGHT + math.ceil(len(headers) / num_columns) * line_height + 0.08
    figure = Figure((WIDTH, height), DPI)
    # On the axes, x counts the columns, and y is the distance from the top.
    axes = figure.add_axes((TILES_LEFT, 0, RIGHT - TILES_LEFT, 1))
    axes.set(xlim=(0, num_columns), ylim=(height, 0))
    axes.set_axis_off()
    left = (LEFT - TILES_LEFT) * WIDTH / column_width
    axes.text(left, 0.28, heading, fontsize=11.5, color=DARK_GRAY, weight="bold")
    axes.text(left, 0.47, explanation)

    y = HEADING_HEIGHT
    for start in range(0, len(headers), num_columns):
        columns = slice(start, start + num_columns)
        y += CAPTION_HEIGHT
        for column, header in enumerate(headers[columns]):
            short_header = shorten_middle(header, HEADER_CHARACTERS // num_columns)
            axes.text(column, y, short_header, fontsize=7.5, color=DARK_GRAY)
        for name, color, note, tiles in rows:
            y += CAPTION_HEIGHT
            for column, (picture, caption, is_used) in enumerate(tiles[columns]):
                axes.imshow(
                    picture,
                    extent=(column, column + TILE_WIDTH, y + tile_height, y),
                    aspect="auto",
                    alpha=1 if is_used else PALE,
                )
                axes.text(column, y - 0.03, caption, fontsize=7)
            middle = y + tile_height / 2
            lines = textwrap.wrap(shorten_middle(name, 36), 13)
            axes.text(left, middle, "\n".join(lines), color=color, weight="bold")
            axes.text(left, middle + 0.05, note, fontsize=7.5, va="top")
            y += space
    return figure


def shorten_middle(text: str, max_length: int) -> str:
    """Replace the middle of a long text with "…", because names often differ at their ends."""
    if len(text) <= max_length:
        return text
    num_last = (max_length - 1) // 2
    return f"{text[: max_length - 1 - num_last]}…{text[len(text) - num_last :]}"
