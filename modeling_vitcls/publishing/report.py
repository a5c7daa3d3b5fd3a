"""The report of a model folder, and the image of its card.

    write_report(ModelFolder(Path("runs/mine")))    report.html, images/attention.png and, after cross-validation,
                                                    labels.html (labels_page.py)
    finish_run(ModelFolder(Path("runs/mine")))      the same, and the card (card.py)

The images are read again from the dataset of the run or addition, so the folder does not have to
contain them. Their predictions are read from predictions.parquet. The report measures fewer images
than `vitcls inspect`, and shows the effects of tokens that the run has measured.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..analysis.inspection import inspect_images
from ..analysis.report import write_page
from ..data.images import LabeledImages
from ..data.labels import UNLABELED, LabelSpace
from ..data.options import read_data_options
from ..data.splits import load_run_data, load_undivided_images
from ..evaluation.evaluator import read_predictions
from ..hub.connection import silence_transformers
from ..hub.model_files import CARD_FILE, LABELS_FILE, REPORT_FILE, SAMPLE_IMAGES_FILE
from ..hub.model_folder import ModelFolder
from ..inference.load_model import load_model
from ..inference.stated_result import (
    Measurement,
    build_class_tables,
    build_metric_table,
    read_addition,
)
from ..runtime.errors import format_error, format_name_list
from ..runtime.progress import track
from .card import write_card
from .labels_page import choose_doubtful, write_labels_page
from .wrong_photos import (
    Photos,
    choose_photos,
    draw_pictures,
    find_photos,
    summarize_predictions,
)


NUM_SHOWN_IMAGES = 3  # A wrong, an uncertain and a typical one; a sheet takes seconds
# A report follows each run, so it may cost seconds, but not hours for a large model
NUM_MEASURED_IMAGES = 16
BATCH_SIZE = 8


def write_report(folder: ModelFolder) -> None:
    """Write report.html and the card's image.

    The report is about the last addition or, without one, about the run that wrote the folder. Errors
    are printed, and the missing files are not written.
    """
    # Without a record, there is nothing to read the images from.
    if not folder.results or "dataset" not in folder.shown_flags:
        return
    write_page_of = write_addition_page if folder.additions else write_run_page
    try:
        write_page_of(folder)
    except Exception as error:  # The model is written, and does not fail by its report
        print(f"WARNING: {REPORT_FILE} could not be written: {format_error(error)}", flush=True)


def write_run_page(folder: ModelFolder) -> None:
    """Measure the model of a run in the precision of the run, and write both files.

    The held-out images are measured or, if the run was cross-validated, the training images. The
    photos are chosen among all predictions, or among the measured images if there are none.
    """
    results = folder.results
    data = load_run_data(folder, folder.flags["dataset"])
    images = data.held_out
    source = results["split"]
    is_cross_validated = source == "cross-validation"
    if is_cross_validated:
        images = data.train
        source = "training images"
    if not len(images):
        return

    # Tasks have folds of their own, and no common result
    num_folds = results["frozen"].get("num_folds", 0) if is_cross_validated else 0
    draw_page(
        folder,
        images,
        source=f"{results['dataset']}, {source}",
        photos=find_photos(data.held_out, data.train, data.selection),
        photo_labels=data.label_space,
        measured=Measurement("", "accuracy", results, num_folds),
        record=results,
        label_space=data.label_space,
    )


def write_addition_page(folder: ModelFolder) -> None:
    """Show the photos of the last addition, and what was said of them when they were left out."""
    *_, record = folder.additions.values()
    data = load_undivided_images(read_data_options(folder.shown_flags), min_classes=1)
    name = format_name_list(data.label_space.names, 5)
    draw_page(
        folder,
        # The classifier of the model has other labels
        replace(data.train, labels=[None] * len(data.train)),
        source=record["dataset"],
        photos=find_photos(*data.images_by_split.values()),
        photo_labels=data.label_space,
        measured=read_addition(record, name) if "result" in record else Measurement(name, "", {}),
        record=record,
    )


def draw_page(
    folder: ModelFolder,
    images: LabeledImages,
    *,
    source: str,
    photos: Photos,
    photo_labels: LabelSpace,
    measured: Measurement,
    record: dict[str, Any],
    label_space: LabelSpace = UNLABELED,
) -> None:
    """Measure a model with images, and write both files.

    Args:
        source: description of the images.
        photos: all photos that the page may show.
        photo_labels: their labels.
        measured: result of photos that did not train what predicted them; without any, no metrics.
        record: of the run or the addition.
        label_space: of the images, if the model has their labels.
    """
    processor = folder.load_processor()
    chosen: Any = []
    rows = read_predictions(folder)
    predictions = None
    # Without one label per image, there are no wrong photos to show, but results per label.
    if rows is not None:
        predictions = summarize_predictions(measured, record, rows)
        # A photo that measures later models must not be chosen by this one. An addition has few labels.
        if measured.num_folds and label_space.columns:
            predictions["doubtful"] = choose_doubtful(rows, photos)
        predictions |= draw_pictures(predictions, photos, photo_labels.names, processor.bit_depth)
        if doubtful := predictions["doubtful"]:
            write_labels_page(folder.path / LABELS_FILE, doubtful, photo_labels.names)
        # The saved model was fitted to the training images, so it cannot explain a mistake of cross-validation.
        if measured.num_folds:
            rows = rows[rows["label"] == rows["prediction"]]
        chosen = choose_photos(rows, photos, NUM_SHOWN_IMAGES)
        if not label_space.columns:
            # The map is of the first prediction, which may be of another task than the label
            chosen = [
                (image, texts | {"truth": None, "predicted": None}) for image, texts in chosen
            ]

    inspection, shown = inspect_images(
        load_model(folder),
        processor,
        images.draw(NUM_MEASURED_IMAGES),
        label_space,
        batch_size=BATCH_SIZE,
        chosen=chosen,
        num_shown=NUM_SHOWN_IMAGES,
        # The page shows what the run has measured.
        effects=list(folder.results.get("tokens", {}).values()),
        uses_bfloat16=folder.results.get("mixed_precision") == "bf16",
        watch=partial(track, unit="", has_bar=False),
    )
    write_page(
        folder.path / REPORT_FILE,
        folder.name,
        inspection,
        shown,
        source=source,
        predictions=predictions,
        # A headline would say the same.
        tables=({} if predictions else build_metric_table(measured.metrics))
        | build_class_tables(measured.metrics),
    )
    sheet_file = folder.path / SAMPLE_IMAGES_FILE
    sheet_file.parent.mkdir(exist_ok=True)
    sheet = shown[0].sheet
    # The photo, its map and the features, side by side
    tiles = [
        np.asarray(tile.picture.resize(sheet.shape, Image.Resampling.NEAREST))
        for tile in sheet.overview[:3]
    ]
    Image.fromarray(np.hstack(tiles)).save(sheet_file)


def finish_run(folder: ModelFolder, has_report: bool = True) -> None:
    """Write the report and the card of a finished run or addition.

    Raise OSError if a file cannot be written. The message is a single line.
    """
    report = folder.path / REPORT_FILE
    # A finished run that is repeated with --resume has its report already.
    if has_report and not report.exists():
        with silence_transformers():
            write_report(folder)

    write_card(folder)
    print(f"written   {folder.path / CARD_FILE}" + (f", {report}" if report.exists() else ""))
