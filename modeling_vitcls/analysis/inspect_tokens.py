"""Inspect a saved model on images, write the report, and print its table: `vitcls inspect`."""

from functools import partial

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..conversion.open_model import open_model
from ..data.labels import UNLABELED, get_label_space
from ..data.splits_table import read_splits, select_task
from ..hub.loading import get_cached_commit
from ..hub.local_paths import get_title
from ..inference.load_model import load_model
from ..runtime.distributed import choose_precision
from ..runtime.files import write_json
from ..runtime.progress import track
from .inspection import Inspection, inspect_model, read_images
from .inspection_images import open_images
from .model_utils import is_classifier
from .options import InspectOptions
from .photo import measure_photo
from .report import ShownPhoto, build_inspection_record, format_effect, write_page


def write_inspection(options: InspectOptions) -> Inspection:
    """Inspect a saved model, write the report, and print its table.

    Raises:
        ValueError, OSError: if the model or the images cannot be read, the images do not match the
            model, or the report cannot be written. The message is a single line.
    """
    console = Console(emoji=False, soft_wrap=True, highlight=False)
    error_console = Console(emoji=False, stderr=True, soft_wrap=True, highlight=False)
    folder = open_model(options.model)
    model, processor = load_model(folder), folder.load_processor()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    precision: str = options.mixed_precision
    if precision == "auto":
        precision = choose_precision(device, model.config)
    label_space = get_label_space(model.config) if is_classifier(model) else UNLABELED
    splits = select_task(read_splits(folder), None)
    images = open_images(options, label_space, splits).draw(options.max_images)
    files = [file for file in (options.output, options.json) if file is not None]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)  # An error comes before the measurements
    watch = partial(track, console=error_console, unit="")
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        read = read_images(
            model, processor, images.images, images.labels, options.batch_size, watch
        )
        for message in read.error_messages:
            error_console.print(
                f"WARNING: skipped an image: {message}", style="bold yellow", markup=False
            )
        inspection = inspect_model(
            model,
            read,
            num_shown=options.num_images,
            token_movement=folder.results_of_any_weights.get("token_movement"),
            watch=watch,
        )
    # Outside autocast: in float32, as in `vitcls look`.
    photos = [
        ShownPhoto(
            images.names[index],
            measure_photo(model, processor, images.images[index]),
            truth=None if images.labels is None else label_space.format(images.labels[index]),
            kind=kind,
        )
        for index, kind in watch(inspection.shown_images.items(), "drawing photos")
    ]
    title = get_title(options.model)
    commit = get_cached_commit(str(folder.path))
    record = build_inspection_record(inspection, title, commit)
    write_page(options.output, title, inspection, photos, images.source, commit)
    if options.json is not None:
        write_json(options.json, record)
    print_inspection(inspection, console)
    for file in files:
        console.print(f"saved {file}", markup=False)
    return inspection


# Output -------------------------------------------------------------------------------------------


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print the table, the faults and the numbers of images."""
    rows = [format_effect(*row) for row in inspection.effects]
    if not rows:
        console.print("The model has no special tokens.")
    else:
        table = Table(*rows[0], box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row.values()))
        console.print(table)
    for line in inspection.lines:
        console.print(line, markup=False)
    num_shown = len(inspection.shown_images)
    console.print(f"{inspection.num_images:,} images, {num_shown} shown")
