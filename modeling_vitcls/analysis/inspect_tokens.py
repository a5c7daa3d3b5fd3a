"""Inspect a saved model on images, write the report, and print its table: `vitcls inspect`.

PATHS       files and folders; if a folder has the name of a class, its images have this label
--dataset   a dataset, loaded as in `vitcls evaluate`
"""

from functools import partial
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..conversion.open_model import open_model
from ..data.aspect_ratio import get_output_size
from ..data.cells import normalize_name
from ..data.evaluation_data import EvaluationData, load_evaluation_data
from ..data.images import DatasetImages, LabeledImages
from ..data.label_matching import translate_labels
from ..data.labels import UNLABELED, LabelSpace, OneLabel, get_label_space
from ..data.options import DataOptions
from ..data.splits_table import EMPTY_TABLE, read_splits, select_task
from ..hub.loading import get_cached_commit
from ..hub.local_paths import get_title
from ..inference.inputs import list_records
from ..inference.load_model import choose_batch_size, load_model
from ..runtime.distributed import choose_precision
from ..runtime.progress import track
from .inspection import MAX_BATCH_SIZE, Inspection, inspect_images
from .options import InspectOptions
from .report import format_effects, write_page
from .token_use import find_token_use


def write_inspection(options: InspectOptions) -> Inspection:
    """Inspect a saved model, write the report, and print its table.

    Raises:
        ValueError, OSError: if the model or the images cannot be read, the images do not match the
            model, or the report cannot be written. The message is a single line.
    """
    console = Console(emoji=False, soft_wrap=True, highlight=False)
    error_console = Console(emoji=False, stderr=True, soft_wrap=True, highlight=False)
    folder = open_model(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder).to(device)
    processor = folder.load_processor()
    precision: str = options.mixed_precision
    if precision == "auto":
        precision = choose_precision(device, model.config)
    batch_size = choose_batch_size(
        options.batch_size,
        model.config,
        get_output_size(processor, model.config.image_height_width),
        device,
        MAX_BATCH_SIZE,
    )
    label_space = get_label_space(model.config) if find_token_use(model).has_head else UNLABELED
    data = open_images(options, label_space, select_task(read_splits(folder), None))
    options.output.parent.mkdir(
        parents=True, exist_ok=True
    )  # An error comes before the measurements

    inspection, photos = inspect_images(
        model,
        processor,
        data.images.draw(options.max_images),
        data.label_space,
        batch_size=batch_size,
        num_shown=options.num_images,
        token_movement=folder.results_of_any_weights.get("token_movement"),
        uses_bfloat16=precision == "bf16",
        watch=partial(track, console=error_console, unit=""),
    )
    for message in inspection.error_messages:
        error_console.print(
            f"WARNING: skipped an image: {message}", style="bold yellow", markup=False
        )
    title = get_title(options.model)
    commit = get_cached_commit(str(folder.path))
    write_page(options.output, title, inspection, photos, data.description, commit)
    print_inspection(inspection, console)
    console.print(f"{inspection.num_images:,} images, {len(photos)} shown")
    console.print(f"saved {options.output}", markup=False)
    return inspection


# Output -------------------------------------------------------------------------------------------


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print the table and the faults."""
    rows = format_effects(inspection)
    if not rows:
        console.print("The model has no special tokens.")
    else:
        table = Table(*rows[0], box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row.values()))
        console.print(table)
    for line in inspection.lines:
        console.print(line, markup=False)


# Images -------------------------------------------------------------------------------------------


def open_images(
    options: InspectOptions, label_space: LabelSpace, splits: pd.DataFrame = EMPTY_TABLE
) -> EvaluationData:
    """Open the images of `paths` or `dataset`, with the label indices of a classifier.

    `label_space` belongs to the classifier, or is UNLABELED. `splits` are the rows of
    splits.parquet about the model.

    Raises:
        ValueError: if there are no images, the dataset cannot be read, or its labels do not match
            the model.
    """
    if options.dataset is None:
        return open_paths(options.paths, label_space)

    data_options = DataOptions(
        dataset=options.dataset,
        image_column=options.image_column,
        label_column=options.label_column,
        label_separator=options.label_separator,
    )
    use_labels = label_space != UNLABELED
    data = load_evaluation_data(data_options, options.split, splits, use_labels=use_labels)
    images = data.images
    if use_labels:
        images = translate_labels(images, data.label_space, label_space)
    description = f"{Path(options.dataset).resolve().name}, {data.description}"
    return data._replace(images=images, label_space=label_space, description=description)


def open_paths(paths: tuple[str, ...], label_space: LabelSpace) -> EvaluationData:
    """Open image files and folders.

    The class of each image is the name of its folder; without a class of this name, it has no
    label. There are no labels if images do not have exactly one class.
    """
    files = [str(record.content) for record in list_records(paths)]
    if not isinstance(label_space, OneLabel):
        label_space = UNLABELED
    class_names = label_space.names if label_space.columns else []
    indices = {normalize_name(name): index for index, name in enumerate(class_names)}
    labels = [indices.get(normalize_name(Path(file).resolve().parent.name)) for file in files]
    images = LabeledImages(DatasetImages.from_list(files), labels)
    description = ", ".join(Path(path).resolve().name for path in paths)
    return EvaluationData(label_space, images, "", 0, description)
