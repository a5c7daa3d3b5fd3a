"""The report and the card's images of a model folder.

    write_report(ModelFolder(Path("runs/mine")))    report.html and images/, with the held-out images of the run

The images are read again from the dataset of the run, so the folder does not have to contain them.
Their predictions are read from predictions.parquet. The report of a run measures fewer images and
effects than `vitcls inspect`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..analysis.inspection import Inspection, inspect_model, read_images
from ..analysis.photo import measure_photo
from ..analysis.report import ShownPhoto, write_page
from ..analysis.sheet import draw_sheet
from ..hub.model_files import REPORT_FILE
from ..hub.model_folder import ModelFolder
from ..inference.metric_tables import build_class_tables
from ..model import modeling_vitcls
from ..runtime.errors import format_error
from ..runtime.progress import track
from ..training.run_folder import load_run_data
from .card_images import write_card_images
from .wrong_photos import (
    choose_photos,
    find_photos,
    read_predictions,
    summarize_predictions,
    wrong_photos,
)


NUM_SHOWN_IMAGES = 6
# A report follows each run, so it may cost seconds, but not hours for a large model
NUM_MEASURED_IMAGES = 32


def write_report(folder: ModelFolder) -> str | None:
    """Write report.html and the card's images, and return the faults that the report names.

    The faults are one line, "" if there are none; without a report, the result is None. The images
    of the report are the held-out images of the run that wrote the folder or, if the run was
    cross-validated, its training images. Errors are printed, and the missing files are not written.
    """
    inspection = sheet = None
    with warn_on_errors(f"{REPORT_FILE} could not be written"):
        # Without a record of the run, there is nothing to read the images from.
        if folder.results and "dataset" in folder.flags:
            inspection, sheet = write_run_page(folder)
    if folder.config is not None:
        with warn_on_errors("the card has no images, because the images could not be drawn"):
            write_card_images(folder.path, folder.config, folder.results, sheet)
    return "; ".join(inspection.faults) if inspection else None


def write_run_page(folder: ModelFolder) -> tuple[Inspection | None, Image.Image | None]:
    """Measure the model of a run in the precision of the run, and write report.html.

    The held-out images are measured or, if the run was cross-validated, the training images. The
    photos are chosen among all predictions, or among the measured images if there are none. Return
    the measurements, and the sheet of the first photo for the card.
    """
    data = load_run_data(folder, folder.flags["dataset"])
    photos_by_name = find_photos(data)
    rows = read_predictions(folder)
    is_cross_validated = folder.results.get("split") == "cross-validation"
    if not len(data.held_out) and not is_cross_validated:
        return None, None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = folder.load(getattr(modeling_vitcls, folder.architecture)).to(device)
    processor = folder.load_processor()
    is_bfloat16 = folder.results.get("mixed_precision") == "bf16"

    measured: Any = data.held_out if len(data.held_out) else data.train
    sample = measured.draw(NUM_MEASURED_IMAGES)
    has_labels = bool(data.label_space.columns)
    chosen = [] if rows is None else choose_photos(rows, photos_by_name, NUM_SHOWN_IMAGES)

    with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
        labels = sample.labels if has_labels else None
        inspection = inspect_model(
            model,
            read_images(model, processor, sample.images, labels),
            num_shown=NUM_SHOWN_IMAGES,
            # Effects are worth a table only if there are several tokens, and training changed them.
            has_ablations=folder.has_trained_tokens,
            token_movement=folder.results.get("token_movement"),
            watch=partial(track, unit="", has_bar=False),
        )

    # Outside autocast: in float32, as in `vitcls look`.
    if not chosen:
        names = sample.images.get_names()
        for index, kind in inspection.shown_images.items():
            truth = data.label_space.format(sample.labels[index]) if has_labels else None
            texts = {"name": names[index], "truth": truth, "kind": kind}
            chosen.append((sample.images[index], texts))
    photos = [
        ShownPhoto(measurements=measure_photo(model, processor, image), **texts)
        for image, texts in track(chosen, "drawing photos", unit="", has_bar=False)
    ]
    sheet = draw_sheet(photos[0].measurements, folder.name) if photos else None
    predictions = None
    if rows is not None:
        predictions = summarize_predictions(folder, rows)
        predictions["wrong"] = wrong_photos(
            rows, photos_by_name, data.label_space.names, processor.bit_depth
        )
    split = folder.results["split"] if len(data.held_out) else "training images"
    write_page(
        folder.path / REPORT_FILE,
        folder.name,
        inspection,
        photos,
        source=f"{folder.results['dataset']}, {split}",
        predictions=predictions,
        # Without one label per image, there are no wrong photos to show, but results per label.
        class_tables={} if predictions else build_class_tables(folder.results, folder.config),
    )
    return inspection, sheet


@contextmanager
def warn_on_errors(message: str) -> Iterator[None]:
    """Print any error inside the `with` block as a warning."""
    try:
        yield
    except Exception as error:  # A run does not fail by its report: its model is written
        print(f"WARNING: {message}: {format_error(error)}", flush=True)
