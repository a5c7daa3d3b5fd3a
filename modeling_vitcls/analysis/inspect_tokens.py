"""Inspect a saved model on images, write the report or its numbers, and print a summary: `vitcls inspect`.

PATHS       photographs: files and folders, without labels
--dataset   a dataset, loaded as in `vitcls evaluate`
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from ..conversion.open_model import open_model
from ..data.evaluation_data import EvaluationData
from ..data.images import DatasetImages, LabeledImages
from ..data.labels import UNLABELED, LabelSpace, get_label_space
from ..data.options import read_data_options
from ..evaluation.evaluate import load_data
from ..evaluation.token_effects import describe_effect
from ..hub.loading import get_cached_commit
from ..hub.local_paths import get_title
from ..hub.model_folder import ModelFolder
from ..inference.inputs import list_records
from ..inference.load_model import load_for_inference
from ..runtime.distributed import resolve_precision
from ..runtime.progress import build_console, print_warning, track
from .inspection import MAX_BATCH_SIZE, Inspection, inspect_images
from .options import PAGE_SUFFIXES, InspectOptions
from .photo import describe_outliers
from .report import write_page, write_tables
from .token_use import find_token_use


def write_inspection(options: InspectOptions) -> Inspection:
    """Inspect a saved model, write the report, and print a summary.

    Raises:
        ValueError, OSError: if the model or the images cannot be read, the images do not match the
            model, or the report cannot be written. The message is a single line.
    """
    console = build_console()
    error_console = build_console(stderr=True)
    folder = open_model(options.model)
    loaded = load_for_inference(
        folder,
        device=None,
        use_head=None,
        batch_size=options.batch_size,
        max_batch_size=MAX_BATCH_SIZE,
    )
    model = loaded.model
    precision = resolve_precision(options.mixed_precision, model.device, model.config)
    label_space = get_label_space(model.config) if find_token_use(model).has_head else UNLABELED
    data = open_images(options, label_space, folder)
    options.output.parent.mkdir(
        parents=True, exist_ok=True
    )  # An error comes before the measurements

    is_page = options.output.suffix.lower() in PAGE_SUFFIXES
    inspection, photos = inspect_images(
        model,
        loaded.processor,
        data.images.draw(options.max_images),
        data.label_space,
        batch_size=loaded.batch_size,
        num_shown=options.num_images if is_page else 0,
        layers=options.layers,
        uses_bfloat16=precision == "bf16",
        watch=partial(track, console=error_console, unit=""),
    )
    for message in inspection.error_messages:
        print_warning(error_console, f"skipped an image: {message}")
    if is_page:
        title = get_title(options.model)
        commit = get_cached_commit(str(folder.path))
        write_page(options.output, title, inspection, photos, data.description, commit)
    else:
        write_tables(options.output, inspection)
    print_inspection(inspection, console)
    console.print(f"{inspection.num_images:,} images, {len(photos)} shown")
    console.print(f"saved {options.output}", markup=False)
    return inspection


# Output -------------------------------------------------------------------------------------------


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print what each token has, and how far it is faded in."""
    lines = [describe_effect(effect) for effect in inspection.effects]
    lines += [
        f"{name}: faded in to {value:.2f}, where 1 is an ordinary token"
        for name, value in inspection.fade_in.items()
    ]
    patches = inspection.layers.xs("patches", level="group")
    lines = lines or ["The model has no special tokens."]
    for line in [*lines, describe_outliers(patches["outliers"].tolist())]:
        console.print(line, markup=False)


# Images -------------------------------------------------------------------------------------------


def open_images(
    options: InspectOptions, label_space: LabelSpace, folder: ModelFolder
) -> EvaluationData:
    """Open the photographs of `paths`, or the images of `dataset` as `vitcls evaluate` does.

    `label_space` belongs to the classifier, or is UNLABELED. Photographs have no labels.

    Raises:
        ValueError: if there are no images, the dataset cannot be read, or its labels do not match
            the model.
    """
    if options.dataset is None:
        files = [record.content for record in list_records(options.paths)[0]]
        photographs = LabeledImages(DatasetImages.from_list(files), [None] * len(files))
        description = ", ".join(Path(path).resolve().name for path in options.paths)
        return EvaluationData(UNLABELED, photographs, "", 0, description)

    data = load_data(read_data_options(vars(options)), label_space, folder, options.split)
    description = f"{Path(options.dataset).resolve().name}, {data.description}"
    return replace(data, description=description)
