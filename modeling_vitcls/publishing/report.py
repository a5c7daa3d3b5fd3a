"""The report of a model folder, and the sheet of its card.

    write_report(ModelFolder(Path("runs/mine")))    report.html and images/attention.png

The images are read again from the dataset of the run, so the folder does not have to contain them.
Their predictions are read from predictions.parquet. The report of a run measures fewer images and
effects than `vitcls inspect`.
"""

from functools import partial
from typing import Any

import torch

from ..analysis.inspection import inspect_images
from ..analysis.report import write_page
from ..hub.model_files import REPORT_FILE, SAMPLE_IMAGES_FILE
from ..hub.model_folder import ModelFolder
from ..inference.load_model import load_model
from ..inference.metric_tables import build_class_tables
from ..inference.per_image import read_predictions
from ..runtime.errors import format_error
from ..runtime.progress import track
from ..training.run_folder import load_run_data
from .wrong_photos import (
    choose_photos,
    count_confusions,
    draw_wrong_photos,
    find_photos,
    summarize_predictions,
)


NUM_SHOWN_IMAGES = 6
# A report follows each run, so it may cost seconds, but not hours for a large model
NUM_MEASURED_IMAGES = 32
BATCH_SIZE = 8


def write_report(folder: ModelFolder) -> str | None:
    """Write report.html and the card's sheet, and return the faults that the report names.

    The faults are one line, "" if there are none; without a report, the result is None. The images
    of the report are the held-out images of the run that wrote the folder or, if the run was
    cross-validated, its training images. Errors are printed, and the missing files are not written.
    """
    # Without a record of the run, there is nothing to read the images from.
    if not folder.results or "dataset" not in folder.flags:
        return None
    try:
        return write_run_page(folder)
    except Exception as error:  # A run does not fail by its report: its model is written
        print(f"WARNING: {REPORT_FILE} could not be written: {format_error(error)}", flush=True)
        return None


def write_run_page(folder: ModelFolder) -> str | None:
    """Measure the model of a run in the precision of the run, and write both files.

    The held-out images are measured or, if the run was cross-validated, the training images. The
    photos are chosen among all predictions, or among the measured images if there are none.
    """
    results = folder.results
    data = load_run_data(folder, folder.flags["dataset"])
    measured = data.held_out
    source = results["split"]
    if results.get("split") == "cross-validation":
        measured = data.train
        source = "training images"
    if not len(measured):
        return None

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder).to(device)
    processor = folder.load_processor()
    rows = read_predictions(folder)
    predictions = None
    chosen: Any = []
    # Without one label per image, there are no wrong photos to show, but results per label.
    class_tables = build_class_tables(results)
    if rows is not None:
        class_tables = count_confusions(rows)
        predictions = summarize_predictions(folder, rows)
        photos_by_name = find_photos(data)
        predictions["wrong"] = draw_wrong_photos(
            predictions["wrong"], photos_by_name, data.label_space.names, processor.bit_depth
        )
        # Two photos each, drawn as the nearest ones of a wrong photo
        predictions["pairs"] = draw_wrong_photos(
            [{"image": pair[0], "nearest_images": pair} for pair in predictions["pairs"]],
            photos_by_name,
            data.label_space.names,
            processor.bit_depth,
        )
        # The saved model was fitted to the training images, so it cannot explain a mistake of cross-validation.
        explained = rows
        if predictions["is_cross_validated"]:
            explained = rows[rows["label"] == rows["prediction"]]
        chosen = choose_photos(explained, photos_by_name, NUM_SHOWN_IMAGES)

    inspection, photos = inspect_images(
        model,
        processor,
        measured.draw(NUM_MEASURED_IMAGES),
        data.label_space,
        batch_size=BATCH_SIZE,
        chosen=chosen,
        num_shown=NUM_SHOWN_IMAGES,
        # Effects are worth a table only if there are several tokens, and training changed them.
        has_ablations=folder.has_trained_tokens,
        token_movement=results.get("token_movement"),
        uses_bfloat16=results.get("mixed_precision") == "bf16",
        watch=partial(track, unit="", has_bar=False),
    )
    write_page(
        folder.path / REPORT_FILE,
        folder.name,
        inspection,
        photos,
        source=f"{results['dataset']}, {source}",
        predictions=predictions,
        class_tables=class_tables,
    )
    sheet_file = folder.path / SAMPLE_IMAGES_FILE
    sheet_file.parent.mkdir(exist_ok=True)
    photos[0].sheet.save(sheet_file, optimize=True)
    return "; ".join(inspection.faults)
