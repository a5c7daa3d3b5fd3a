"""The report and the card's images of a model folder.

    write_report(Path("runs/mine"))     report.html and images/, with the held-out images of the run

The images are read from the dataset of the run again, so that the folder does not contain them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..analysis.inspection import inspect_model
from ..analysis.inspection_inputs import InspectionImages
from ..analysis.report import write_page
from ..data.splits import TrainingData, load_training_data
from ..data.streaming import StreamedImages
from ..hub.model_files import REPORT_FILE
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..options import DataOptions
from .card_images import write_card_images
from .model_folder import ModelFolder
from .verify import MODEL_CLASSES


NUM_SAMPLES = 4  # number of images in the card
NUM_REPORT_IMAGES = 6  # number of images shown in the report
NUM_STATISTICS_IMAGES = 64  # number of images for the statistics in the report
NUM_STREAMED_IMAGES = 1000  # number of images of a streamed held-out split from which images are selected
MAX_IMAGES_TO_READ = 20  # maximum number of images to try to read for the card

Sample = tuple[Image.Image, str | None]  # image, and label as text (None if the images have no labels)


def write_report(path: Path, warn: Callable[[str], None], images: InspectionImages | None = None) -> str | None:
    """Write report.html and the card's images, and return a summary of the diagnosis of the special tokens.

    Errors are passed to `warn`, and the missing files are not written. `images` are the images of the report; by
    default, the held-out images of the run that wrote the folder.
    """
    folder, summary = ModelFolder(path), None
    with convert_errors(warn, "the card has no images, because the images could not be drawn"):
        model, processor = load_saved_model(folder)
        data = load_run_data(folder) if images is None and folder.results else None
        samples: list[Sample] = []
        if data is not None and isinstance(data.held_out, StreamedImages):
            data = replace(data, held_out=data.held_out.read_first(NUM_STREAMED_IMAGES))
        if data is not None and len(data.held_out):
            samples = select_samples(data)
            labels = data.held_out.labels if data.label_space.columns else None
            names = [f"held out, {index}" for index in range(len(data.held_out))]
            source = f"{folder.results['dataset']}, {folder.results['split']}"
            images = InspectionImages(data.held_out.images, names, labels, source)
        write_card_images(path, model, processor, folder.results, samples)
        if images is not None:
            with convert_errors(warn, f"{REPORT_FILE} could not be written"):
                inspection = inspect_model(
                    model,
                    processor,
                    **images.build_arguments(NUM_REPORT_IMAGES, NUM_STATISTICS_IMAGES),
                    token_movement=folder.results.get("token_movement"),
                )
                write_page(path / REPORT_FILE, inspection, path.resolve().name, images.source)
                summary = inspection.summary
    return summary


@contextmanager
def convert_errors(warn: Callable[[str], None], message: str) -> Iterator[None]:
    """Convert any error inside the `with` block to a warning."""
    try:
        yield
    except Exception as error:
        warn(f"{message}: {' '.join(str(error).split()) or type(error).__name__}")


def load_saved_model(folder: ModelFolder) -> tuple[Any, ViTCLSImageProcessor]:
    """Load the model and the image processor of a folder."""
    classes = {cls.__name__: cls for classes in MODEL_CLASSES.values() for cls in classes}
    model = classes[folder.architecture].from_pretrained(folder.path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), ViTCLSImageProcessor.from_pretrained(folder.path)


def load_run_data(folder: ModelFolder) -> TrainingData | None:
    """Load the data of the run that wrote a folder, with the same held-out images; None without a record of the
    run."""
    flags = folder.flags
    if "dataset" not in flags:
        return None
    stored_values = {field.name: flags[field.name] for field in fields(DataOptions) if field.name in flags}
    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in stored_values.items()}
    use_labels = folder.architecture != "ViTCLSForMaskedImageModeling"
    return load_training_data(DataOptions(**values), flags.get("select") == "best", use_labels)


def select_samples(data: TrainingData) -> list[Sample]:
    """Return a few readable held-out images with their labels as text, from different classes if possible."""
    samples: list[Sample] = []
    for index in islice(iterate_indices_by_class(data.held_out.labels), MAX_IMAGES_TO_READ):
        label = data.label_space.format_label(data.held_out.labels[index]) if data.label_space.columns else None
        with suppress(ValueError):  # the evaluation has already reported unreadable images
            samples.append((data.held_out.images[index], label))
        if len(samples) == NUM_SAMPLES:
            break
    return samples


def iterate_indices_by_class(labels: Iterable[Any]) -> Iterator[int]:
    """Iterate over the indices of labels: the first index of each class, then all other indices."""
    first_indices: dict[str, int] = {}
    other_indices = []
    for index, label in enumerate(labels):
        if first_indices.setdefault(str(label), index) != index:
            other_indices.append(index)
    return chain(first_indices.values(), other_indices)
