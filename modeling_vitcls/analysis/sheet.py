"""The sheet of one photo as texts and pictures, from the measurements in photo.py.

    lines         the photo and the predictions
    overview      photo | score without each part, or attention | components of the patches | their norms
    sections      Without each part of the photo: one tile per label of the predictions
                  Attention by head: one row per token, in the last layer in which the token is used
                  Layer by layer: one row per token, then principal components and norms

Pages show it in HTML (pages.py), which wraps the tiles; `vitcls look -o sheet.png` draws it
(look.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image
from torch import Tensor

from ..model.token_layout_vitcls import TOKEN_KINDS
from .maps import choose_scale, draw_map, draw_region, overlay, to_picture
from .photo import OUTLIER_RATIO, PhotoMeasurements, ShownToken, describe_outliers


PHOTO_SIDE = 400  # Longer side of the pictures with the photo, in pixels

# Color of each group of `config.token_layout`
GROUP_COLORS = {kind.group: kind.color for kind in TOKEN_KINDS} | {"patches": "#8C8C8C"}

WITHOUT_PARTS = (
    "Red: the score of the label (its log odds) falls if the part is hidden; blue: it rises; pale: less than two "
    "standard errors. Measured by hiding halves of the photo."
)
BY_HEAD = (
    "In the last layer that uses the token. Percentages: attention on patches; the rest is on special "
    "tokens. Each map has its own scale: black is 0, bright is the highest 1% of its values."
)
BY_LAYER = (
    "Attention: mean over heads, and percentage on patches. Features: 3 components, and the variance that "
    "they explain; their colors are matched between layers. Pale: not in the output."
)


@dataclass(frozen=True)
class Tile:
    """A picture and its texts; it is pale if no output of the model depends on it."""

    picture: Image.Image
    title: str
    caption: str = ""
    is_used: bool = True


@dataclass(frozen=True)
class Row:
    """Tiles with a name, its color, and a note."""

    tiles: Sequence[Tile]
    name: str = ""
    note: str = ""
    color: str | None = None


@dataclass(frozen=True)
class Section:
    """Rows of tiles below a heading and its explanation, with `num_columns` tiles in a wide line."""

    heading: str
    explanation: str
    num_columns: int
    rows: Sequence[Row]


@dataclass(frozen=True)
class Sheet:
    """The sheet of a photo.

    Attributes:
        lines: the size of the photo, and the predictions.
        overview: the tiles at the top.
        sections: what follows.
        shape: width and height of the part of the photo that the model sees, in pixels of the sheet.
    """

    lines: Sequence[str]
    overview: Sequence[Tile]
    sections: Sequence[Section]
    shape: tuple[int, int]


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
    def sheet(self) -> Sheet:
        """The sheet of the photo."""
        return build_sheet(self.measurements)


def build_sheet(measurements: PhotoMeasurements, is_trained: bool = False) -> Sheet:
    """Build the sheet of a photo.

    Args:
        measurements: measurements of the photo (`measure_photo`).
        is_trained: whether the photo trained the model, which the sheet says.
    """
    photo = draw_region(measurements.image, measurements.visible_region, PHOTO_SIDE)
    lines = describe_photo(measurements)
    if is_trained:
        lines.insert(0, "this photo trained the model")
    by_layer = build_layer_section(measurements)
    sections = [build_head_section(measurements), by_layer]
    if measurements.attributions:
        sections.insert(0, build_label_section(measurements, photo))
    patches = [row.tiles[measurements.patch_layer - 1] for row in by_layer.rows[-2:]]
    return Sheet(lines, build_overview(measurements, photo, *patches), sections, photo.size)


def describe_photo(measurements: PhotoMeasurements) -> list[str]:
    """Describe the size of the photo, and the predictions, a line each."""
    image = measurements.image
    height, width = measurements.input_size
    rows, columns = measurements.norms.shape[1:]
    lines = [
        f"photo of {image.width} × {image.height} pixels; the model sees {width} × {height} pixels, "
        f"as {columns} × {rows} patches"
    ]
    medians = measurements.norms.flatten(1).median(dim=1).values[:, None, None]
    are_outliers = measurements.norms > OUTLIER_RATIO * medians
    if are_outliers.any():
        shares = are_outliers.float().mean(dim=(1, 2)).tolist()
        lines.append(describe_outliers(shares))
    for task, labels in measurements.predictions.items():
        text = ", ".join(f"{name} {probability:.0%}" for name, probability in labels)
        if measurements.is_unknown and not task:
            text = f"none of these. The nearest of the classes: {text}"
        lines.append(f"{task or 'prediction'}: {text or 'no label'}")
    return lines


def build_overview(
    measurements: PhotoMeasurements, photo: Image.Image, features: Tile, norms: Tile
) -> list[Tile]:
    """Put the photo and what decides before the tiles of the patches in the last layer in which they are used."""
    layer = measurements.patch_layer
    explained = f"red, green, blue: 3 components, {features.caption} of the variance"
    return [
        Tile(photo, "What the model sees"),
        build_main_tile(measurements, photo),
        replace(features, title=f"Patch features, layer {layer}", caption=explained),
        replace(norms, title=f"Patch norms, layer {layer}"),
    ]


def build_main_tile(measurements: PhotoMeasurements, photo: Image.Image) -> Tile:
    """Draw what the score of the first label loses, or the attention of the first token."""
    if measurements.attributions:
        main = measurements.attributions[0]
        picture = overlay(
            photo, main.values, choose_scale(main.values, is_signed=True), main.errors
        )
        return Tile(picture, f"{main.label[0]} without each part", main.caption)

    first = measurements.tokens[0]
    attention = measurements.maps[first.layer - 1, :, 0].mean(dim=0)
    scale = choose_scale(attention)
    caption = f"bright: {scale.norm.vmax:.2%} in one patch"
    if not first.is_read:
        caption += "; this classifier does not read it"
    if measurements.predictions:
        caption += "; no part of the photo changes the score"
    title = f"Attention of {first.name}, layer {first.layer}"
    return Tile(overlay(photo, attention, scale), title, caption)


def build_label_section(measurements: PhotoMeasurements, photo: Image.Image) -> Section:
    """Draw what the score of each label loses without each part, all in the same colors."""
    # Log odds have one unit, so all labels share one scale.
    values = torch.stack([each.values for each in measurements.attributions])
    scale = choose_scale(values, is_signed=True)
    tiles = []
    for each in measurements.attributions:
        name = ": ".join(filter(None, (each.task, each.label[0])))
        tiles.append(Tile(overlay(photo, each.values, scale, each.errors), name, each.caption))
    return Section("Without each part of the photo", WITHOUT_PARTS, 7, [Row(tiles)])


def build_head_section(measurements: PhotoMeasurements) -> Section:
    """Draw the mean and the heads of each token in the last layer in which the token is used."""
    noun = "map" if measurements.config.attention_type == "differential" else "head"
    titles = ["mean", *(f"{noun} {number}" for number in range(1, measurements.maps.shape[1] + 1))]
    rows = []
    for index, token in enumerate(measurements.tokens):
        maps = measurements.maps[token.layer - 1, :, index]  # [H, gh, gw]
        maps = torch.cat([maps.mean(dim=0, keepdim=True), maps])  # [1 + H, gh, gw]
        note = f"layer {token.layer}" + ("" if token.is_read else ", not read")
        rows.append(build_attention_row(token, note, titles, maps, len(maps)))
    return Section("Attention by head", BY_HEAD, 13, rows)


def build_layer_section(measurements: PhotoMeasurements) -> Section:
    """Draw the attention of each token, the features and the norms after each layer."""
    titles = [f"layer {layer}" for layer in range(1, len(measurements.maps) + 1)]
    rows = []
    for index, token in enumerate(measurements.tokens):
        maps = measurements.maps[:, :, index].mean(dim=1)  # [L, gh, gw]
        rows.append(build_attention_row(token, "attention", titles, maps, token.layer))

    features, norms = [], []
    for layer, title in enumerate(titles):
        is_used = layer < measurements.patch_layer
        share = f"{measurements.explained_variance[layer]:.0%}"
        features.append(Tile(to_picture(measurements.colors[layer].numpy()), title, share, is_used))
        values = measurements.norms[layer]
        low, high = values.min().item(), values.max().item()
        picture = draw_map(values, ScalarMappable(Normalize(low, high), "viridis"))
        norms.append(Tile(picture, title, f"{low:.3g} to {high:.3g}", is_used))
    rows += [Row(features, "patches", "features"), Row(norms, "patches", "norms")]
    return Section("Layer by layer", BY_LAYER, 12, rows)


def build_attention_row(
    token: ShownToken, note: str, titles: Sequence[str], maps: Tensor, num_used: int
) -> Row:
    """Build the row of a token: a tile for each map [n, gh, gw]; outputs use the first `num_used`."""
    tiles = [
        Tile(
            draw_map(values, choose_scale(values)), title, f"{values.sum():.0%}", number < num_used
        )
        for number, (title, values) in enumerate(zip(titles, maps, strict=True))
    ]
    return Row(tiles, token.name, note, GROUP_COLORS[token.group])
