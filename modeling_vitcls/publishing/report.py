"""The report and the card's images of a model folder.

    write_report(ModelFolder(Path("runs/mine")), warn)    report.html and images/, with the held-out images of the run

The images are read from the dataset of the run again, so that the folder does not contain them.
Their predictions are read from predictions.parquet. The report of a run measures fewer images and
effects than `vitcls inspect`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from ..analysis.inspection import Inspection, inspect_model, select_images
from ..analysis.report import ShownPhoto, measure_shown_photo, write_page
from ..analysis.sheet import draw_sheet
from ..data.options import DataOptions
from ..data.splits import TrainingData, load_training_data
from ..hub.model_files import REPORT_FILE
from ..hub.model_folder import ModelFolder
from ..model import modeling_vitcls
from ..runtime.progress import track
from .card import has_token_effects
from .card_images import write_card_images
from .held_out_predictions import (
    FoundImage,
    describe_predictions,
    find_images,
    read_predictions,
)


NUM_SHOWN_IMAGES = 6  # number of photos
# Maximum and minimum number of images for the statistics, which take at most MAX_STATISTICS_FLOPS
# floating-point operations unless there are only MIN_STATISTICS_IMAGES images
NUM_STATISTICS_IMAGES, MIN_STATISTICS_IMAGES = 64, 16
MAX_STATISTICS_FLOPS = 2e11


def write_report(folder: ModelFolder, warn: Callable[[str], None]) -> str | None:
    """Write report.html and the card's images, and return what it says about the tokens in one line.

    Returns None without a report. The images of the report are the held-out images of the run that
    wrote the folder or, if it predicted its training images out of fold, these. Errors are passed
    to `warn`, and the missing files are not written.
    """
    inspection: Inspection | None = None
    photos: list[ShownPhoto] = []
    name = folder.path.resolve().name
    with convert_errors(warn, f"{REPORT_FILE} could not be written"):
        data = load_run_data(folder) if folder.results else None
        has_predictions = read_predictions(folder) is not None
        if data is not None and (len(data.held_out) or has_predictions):
            images_by_name = find_images(data)
            split = folder.results["split"] if len(data.held_out) else "training images"
            source = f"{folder.results['dataset']}, {split}"
            inspection, photos = inspect_run(folder, data, images_by_name)
            predictions = describe_predictions(folder, images_by_name)
            report = folder.path / REPORT_FILE
            write_page(report, inspection, photos, name, source, predictions)
    if folder.config is not None:
        with convert_errors(warn, "the card has no images, because the images could not be drawn"):
            sheet = draw_sheet(photos[0].measurements, name) if photos else None
            write_card_images(folder.path, folder.config, folder.results, sheet)
    return "; ".join(inspection.lines) if inspection else None


def inspect_run(
    folder: ModelFolder, data: TrainingData, images_by_name: Mapping[str, FoundImage]
) -> tuple[Inspection, list[ShownPhoto]]:
    """Measure the model of a run on its held-out or training images, in the precision of the run.

    Return the measurements of a sample of the images, and the photos to show, which are selected
    from all predictions of the run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = folder.load(getattr(modeling_vitcls, folder.architecture)).to(device)
    processor = folder.load_processor()
    is_bfloat16 = folder.results.get("mixed_precision") == "bf16"

    num_affordable = int(MAX_STATISTICS_FLOPS / folder.results.get("forward_flops_per_image", 1))
    num_measured = min(max(num_affordable, MIN_STATISTICS_IMAGES), NUM_STATISTICS_IMAGES)
    measured: Any = data.held_out if len(data.held_out) else data.train
    sample = measured.draw(num_measured)
    has_labels = bool(data.label_space.columns)

    with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
        inspection = inspect_model(
            model,
            processor,
            sample.images,
            labels=sample.labels if has_labels else None,
            num_shown=NUM_SHOWN_IMAGES,
            has_ablations=has_token_effects(folder),
            token_movement=folder.results.get("token_movement"),
            watch=watch,
        )

    # in float32, as in `vitcls look`
    shown = select_predicted_images(folder, images_by_name)
    if not shown:
        names = sample.images.get_names()
        for index, kind in inspection.shown_images.items():
            truth = data.label_space.format_label(sample.labels[index]) if has_labels else None
            texts = {"name": names[index], "truth": truth, "kind": kind}
            shown.append((FoundImage(sample, index), texts))
    photos = [
        measure_shown_photo(model, processor, images.images[position], **texts)
        for (images, position), texts in watch(shown, "drawing photos")
    ]
    return inspection, photos


def select_predicted_images(
    folder: ModelFolder, images_by_name: Mapping[str, FoundImage]
) -> list[tuple[FoundImage, dict[str, Any]]]:
    """Return the most instructive images of all predictions of a run, with their texts.

    The list is empty without predictions.
    """
    rows = read_predictions(folder)
    if rows is None:
        return []
    rows = rows[rows["image"].isin(images_by_name.keys())]
    selected = select_images(
        rows["confidence"].tolist(),
        (rows["label"] != rows["prediction"]).tolist(),
        rows["label"].tolist(),
        NUM_SHOWN_IMAGES,
    )
    shown = []
    for position, kind in selected.items():
        row = rows.iloc[position]
        texts = {"name": row["image"], "truth": row["label"], "predicted": row["prediction"]}
        shown.append((images_by_name[row["image"]], {**texts, "kind": kind}))
    return shown


def watch(items: Collection[Any], description: str) -> Iterable[Any]:
    """Return the same items, and print lines about the progress."""
    return track(items, f"report, {description}", unit="", has_bar=False)


@contextmanager
def convert_errors(warn: Callable[[str], None], message: str) -> Iterator[None]:
    """Convert any error inside the `with` block to a warning."""
    try:
        yield
    except Exception as error:  # whatever fails in a report, the model is already written
        warn(f"{message}: {' '.join(str(error).split()) or type(error).__name__}")


def load_run_data(folder: ModelFolder) -> TrainingData | None:
    """Load the data of the run that wrote a folder; None without a record of the run."""
    options = read_data_options(folder)
    if options is None:
        return None
    use_labels = folder.architecture != "ViTCLSForMaskedImageModeling"
    return load_training_data(options, folder.flags.get("select") == "best", use_labels)


def read_data_options(folder: ModelFolder) -> DataOptions | None:
    """Return the dataset options of the run that wrote a folder; None without a record."""
    flags = folder.flags
    if "dataset" not in flags:
        return None
    stored_values = {
        field.name: flags[field.name] for field in fields(DataOptions) if field.name in flags
    }
    values: Any = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in stored_values.items()
    }
    return DataOptions(**values)
