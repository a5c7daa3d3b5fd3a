"""Show one sheet per photo: `vitcls look`, and the function `look`.

PATHS -> measure_photo (photo.py) -> build_sheet (sheet.py) -> HTML (pages.py) or an image (draw_sheet)
"""

import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import HPacker, OffsetImage, TextArea, VPacker
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from ..conversion.open_model import open_model
from ..data.aspect_ratio import get_output_size, get_resize, set_resize
from ..hub.local_paths import get_title
from ..inference.inputs import compute_checksum, list_records, read_trained_checksums
from ..inference.load_model import load_model
from ..model.field_checks_vitcls import to_pair
from ..model.image_processing_vitcls import image_to_tensor
from ..runtime.errors import warn_on_first_process
from ..runtime.files import write_atomically
from ..runtime.progress import build_console, print_warning, track
from .options import LookOptions
from .pages import render
from .photo import measure_photo
from .sheet import Row, Section, Sheet, Tile, build_sheet
from .token_use import find_token_use


def draw_photo(options: LookOptions, image: Any) -> Image.Image:
    """Draw the sheet of one photo: a path, encoded bytes, a PIL image or an array.

    With `output`, the sheet is also written.
    """
    if isinstance(image, list | tuple):
        raise ValueError(f"cannot draw a {type(image).__name__}. Pass one photo")
    sheet = open_sheets(options)(image)
    name = Path(image).name if isinstance(image, str | Path) else ""
    title = " · ".join(filter(None, (get_title(options.model), name)))
    if options.output is not None:
        save_sheet(sheet, title, choose_file(options.output, Path(name).stem or "sheet", True, []))
    return draw_sheet(sheet, title)


def write_sheets(options: LookOptions, output: Path) -> None:
    """Write the sheets of all photos to a file or a folder, and print the names of the files.

    Photos that cannot be read are named in a warning.

    Raises:
        ValueError, OSError: if the model or all photos cannot be read, or a file cannot be written.
    """
    error_console = build_console(stderr=True)
    photos, _ = list_records(options.paths)
    build = open_sheets(options)
    model_name = get_title(options.model)
    is_single = len(photos) == 1
    written: list[Path] = []
    for name, source in track(photos, "drawing sheets", unit="photos", console=error_console):
        try:
            sheet = build(source)
        except ValueError as error:
            print_warning(error_console, f"skipped a photo: {error}")
            continue
        file = choose_file(output, Path(name).stem, is_single, written)
        save_sheet(sheet, f"{model_name} · {Path(name).name}", file)
        written.append(file)
        print(f"saved {file}")
    if not written:
        raise ValueError(f"none of the {len(photos)} photos can be read. Pass other image files")


def open_sheets(options: LookOptions) -> Callable[[Any], Sheet]:
    """Load the model and its image processor, with another image size or resizing if it is set.

    Returns:
        A function that builds the sheet of one photo: a path, encoded bytes, a PIL image or an array.
    """
    folder = open_model(options.model)
    model, processor = load_model(folder), folder.load_processor()
    image_size, resize = options.image_size, options.resize
    if image_size is not None or resize is not None:
        size = get_output_size(processor) if image_size is None else to_pair(image_size)
        set_resize(processor, resize or get_resize(processor), size)
    use = find_token_use(model)
    trained = read_trained_checksums(folder)

    def build(image: Any) -> Sheet:
        photo = processor.fetch_images(image)
        if not isinstance(photo, Image.Image):
            photo = to_pil_image(image_to_tensor(photo, to_rgb=True, bit_depth=processor.bit_depth))
        measurements = measure_photo(model, processor, photo, use)
        return build_sheet(measurements, compute_checksum(image) in trained)

    return build


def choose_file(output: Path, stem: str, is_single: bool, written: list[Path]) -> Path:
    """Choose the file for a sheet: `output`, `output`-STEM, or STEM.html in the folder `output`.

    If the command has already written a sheet with this name, "-2" is appended.
    """
    file = output / f"{stem}.html"
    if output.suffix:
        file = output if is_single else output.with_stem(f"{output.stem}-{stem}")
    # The sheets of one command never replace each other, but they replace the sheets of an earlier
    # command.
    while file in written:
        file = file.with_stem(f"{file.stem}-2")
    return file


def save_sheet(sheet: Sheet, title: str, file: Path) -> None:
    """Write a sheet as an HTML page or as an image, by the suffix of the file."""
    suffix = file.suffix.lower()
    with write_atomically(file) as temporary_file:
        if suffix == ".html":
            page = render("look.html.j2", title=title, sheet=sheet)
            temporary_file.write_text(page, encoding="utf-8")
        else:
            kind = Image.registered_extensions()[suffix]
            draw_sheet(sheet, title).save(temporary_file, format=kind, optimize=True, quality=90)


# The sheet as one image, laid out by matplotlib ---------------------------------------------------

# Sizes are in pixels, which are points at this resolution. The font has no Chinese and no emoji, which
# browsers have.


DPI = 72
WIDTH = 1800
MARGIN = 45
LINE_WIDTH = WIDTH - 2 * MARGIN
GAP = 14  # Between lines
TILE_WIDTH = 0.92  # Part of the column; the rest is the gap between tiles
PALE = 0.35  # Opacity of tiles that no output depends on
CHARACTER_WIDTH = 0.66  # average, with a font of one pixel


def draw_sheet(sheet: Sheet, title: str) -> Image.Image:
    """Draw the sheet of a photo below a title, which names the model and the photo.

    Returns:
        An RGB image that is 1,800 pixels wide.
    """
    sections: list[Artist] = []
    overview = Section(title, "\n".join(sheet.lines), 4, [Row(sheet.overview)])
    for section in (overview, *sheet.sections):
        lines = [write(section.heading, size=26, weight="bold"), write(section.explanation)]
        for row in section.rows:
            if row.name:
                lines.append(write(f"{row.name}  {row.note}", color=row.color))
            tiles = [
                draw_tile(tile, LINE_WIDTH / section.num_columns, sheet.shape) for tile in row.tiles
            ]
            lines += [
                HPacker(children=tiles[start : start + section.num_columns], align="bottom")
                for start in range(0, len(tiles), section.num_columns)
            ]
        sections.append(VPacker(children=lines, sep=GAP))

    figure = Figure(dpi=DPI)
    # Without pyplot, which would keep every figure in memory until it is closed.
    canvas = FigureCanvasAgg(figure)
    page = VPacker(children=sections, pad=MARGIN, sep=3 * GAP)
    figure.add_artist(page)
    with warnings.catch_warnings(record=True) as caught:
        bounds = page.get_bbox(canvas.get_renderer())
        page.set_offset(-bounds.p0)
        figure.set_size_inches(WIDTH / DPI, bounds.height / DPI)
        canvas.draw()
    if any("Glyph" in str(warning.message) for warning in caught):
        warn_on_first_process(
            "the image has boxes for characters that its font lacks. `output='sheet.html'` shows them"
        )
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3])


def draw_tile(tile: Tile, column_width: float, shape: tuple[int, int]) -> Artist:
    """Draw a picture in the proportions of `shape`, at most 1:4, below its texts."""
    width, height = shape
    # With its own proportions, a photo of one column would have a sheet of gigabytes
    picture = tile.picture.resize((width, min(height, 4 * width)), Image.Resampling.NEAREST)
    tile_width = TILE_WIDTH * column_width
    alpha = 1 if tile.is_used else PALE
    parts: list[Artist] = [
        write(f"{tile.title}\n{tile.caption}", tile_width),
        OffsetImage(np.asarray(picture), zoom=tile_width / width, alpha=alpha),
    ]
    return VPacker(children=parts, width=column_width, sep=GAP / 2, align="left")


def write(text: str, width: float = LINE_WIDTH, size: float = 16, **style: Any) -> Artist:
    """Write the lines of a text of a size in pixels, wrapped to a width."""
    num_characters = int(width / (size * CHARACTER_WIDTH))
    lines = [textwrap.fill(line, num_characters) for line in text.splitlines()]
    # Without `parse_math`, a name with two dollar signs is a name
    return TextArea(
        "\n".join(lines).strip(), textprops={"size": size, "parse_math": False, **style}
    )
