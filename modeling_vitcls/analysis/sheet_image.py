"""The sheet of a photo (sheet.py) as one image, drawn by matplotlib for `vitcls look -o sheet.png`.

Sizes and places are in inches; y is the distance from the top. The font has no Chinese and no emoji, which
browsers have.
"""

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .sheet import Row, Section, Sheet


WIDTH = 12.0
DPI = 150
MARGIN = 0.3
TILE_WIDTH = 0.92  # Part of the column; the rest is the gap between tiles
GAP = 0.12  # Below tiles
PALE = 0.35  # Opacity of tiles that no output depends on
CHARACTER_WIDTH = 0.0088  # average, with a font of one point
LINE_HEIGHT = 0.0195


def draw_sheet(sheet: Sheet, title: str = "") -> Image.Image:
    """Draw the sheet of a photo below a title, which names the model and the photo.

    Returns:
        An RGB image that is 1,800 pixels wide.
    """
    figure = Figure(dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    y = write(axes, title, MARGIN, MARGIN, size=15, weight="bold")
    for line in sheet.lines:
        y = write(axes, line, MARGIN, y)
    overview = Section("", "", 4, [Row(sheet.overview)])
    for section in (overview, *sheet.sections):
        y = write(axes, section.heading, MARGIN, y + GAP, size=12, weight="bold")
        y = write(axes, section.explanation, MARGIN, y)
        for row in section.rows:
            y = draw_row(axes, row, section.num_columns, sheet.shape, y)

    # The height is known only now
    axes.set(xlim=(0, WIDTH), ylim=(y + MARGIN, 0))
    figure.set_size_inches(WIDTH, y + MARGIN)
    # Without pyplot, which would keep every figure in memory until it is closed.
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3])


def draw_row(axes: Axes, row: Row, num_columns: int, shape: tuple[int, int], y: float) -> float:
    """Draw a row of tiles with the proportions of `shape`, in several lines if needed; return the y below."""
    y = write(axes, f"{row.name}  {row.note}", MARGIN, y, color=row.color)
    column_width = (WIDTH - 2 * MARGIN) / num_columns
    width = TILE_WIDTH * column_width
    for start in range(0, len(row.tiles), num_columns):
        places = {
            MARGIN + column_width * column: tile
            for column, tile in enumerate(row.tiles[start : start + num_columns])
        }
        top = max(
            write(axes, tile.caption, left, write(axes, tile.title, left, y, width), width)
            for left, tile in places.items()
        )
        bottom = top + width * shape[1] / shape[0]
        for left, tile in places.items():
            alpha = 1 if tile.is_used else PALE
            extent = (left, left + width, bottom, top)
            axes.imshow(tile.picture, extent=extent, aspect="auto", alpha=alpha)
        y = bottom + GAP
    return y


def write(
    axes: Axes,
    text: str,
    left: float,
    y: float,
    width: float = WIDTH - 2 * MARGIN,
    size: float = 8.0,
    **style: Any,
) -> float:
    """Write a text of a size in points, in lines of a width, and return the y below it."""
    lines = textwrap.wrap(text, int(width / (size * CHARACTER_WIDTH)))
    # Without `parse_math`, a name with two dollar signs is a name
    axes.text(left, y, "\n".join(lines), fontsize=size, va="top", parse_math=False, **style)
    return y + len(lines) * size * LINE_HEIGHT
