"""Speed of processing JPEG files into pixel values and into predicted labels.

    pixels        `ViTCLSImageProcessor`, compared with AutoImageProcessor
    prediction    `vitcls predict`, compared with transformers' pipeline

    python -m modeling_vitcls.benchmarking.image_files ours FOLDER [--toy]

The files are crops of scikit-learn's two sample images. The crops have the same size but different JPEG settings.
Each measurement reads the files again. For predictions, `vitcls predict` and the pipeline run in separate processes,
because `vitcls predict` changes the memory allocator settings of its process (system.py). A process reads requests,
such as `labels 16` or `speed 16` for batches of 16 images. For each request, the process prints a line of JSON: the
most probable label of each file with its probability, or the images per second.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.inputs import build_list_input
from ..inference.predict import Predictor, get_num_workers
from ..inference.prediction_rows import build_prediction_columns
from .comparison import (
    BenchmarkSettings,
    Comparison,
    LoggedProcess,
    check_difference,
    compare_throughput,
    measure_alternately,
    measure_throughput,
)
from .peers import ModelSize, build_transformers_peer, get_model_size


# Keyword arguments for saving JPEG files with PIL. The files cycle through this list.
JPEG_SETTINGS: list[dict[str, Any]] = [
    {"quality": 90},
    {"quality": 75, "optimize": True},
    {"quality": 95, "subsampling": "4:4:4"},
    {"quality": 85, "progressive": True},
]


def write_photographs(folder: Path, num_images_per_class: int) -> Path:
    """Write random crops as JPEG files to `folder`, with one subfolder per photograph, and return `folder`."""
    height, width = 375, 500
    generator = torch.Generator().manual_seed(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        image_height, image_width, _ = photograph.shape  # 427 x 640
        for index in range(num_images_per_class):
            y = int(torch.randint(image_height - height + 1, (), generator=generator))
            x = int(torch.randint(image_width - width + 1, (), generator=generator))
            crop = Image.fromarray(photograph[y : y + height, x : x + width])
            crop.save(folder / name / f"{index:03}.jpg", **JPEG_SETTINGS[index % len(JPEG_SETTINGS)])
    return folder


def write_benchmark_files(folder: Path, is_toy: bool) -> list[str]:
    """Write the JPEG files of a benchmark, and return the sorted paths of the files."""
    write_photographs(folder / "photographs", num_images_per_class=2 if is_toy else 32)
    return sorted(map(str, folder.rglob("*.jpg")))


def build_image_processors(size: ModelSize, folder: Path) -> tuple[ViTCLSImageProcessor, Any]:
    """Build equivalent image processors of this package and of transformers. Files are written to `folder`."""
    from transformers import AutoImageProcessor, ViTImageProcessor

    height_width = {"height": size.image_size, "width": size.image_size}
    ViTImageProcessor(size=height_width).save_pretrained(folder / "processor")
    ours = ViTCLSImageProcessor(size=height_width, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return ours, AutoImageProcessor.from_pretrained(folder / "processor")


# Pixel values --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelRow:
    """Settings of a call to the image processors, in one row of the benchmark report."""

    num_files: int  # number of files per call
    open_file: Callable[[str], Any]  # converts a path into the input of AutoImageProcessor


PIXEL_ROWS = {
    "one file": PixelRow(1, Image.open),
    "lists of 16 files": PixelRow(16, Image.open),
    "one file, as a path for both image processors": PixelRow(1, str),
    "lists of 16 files, as paths for both image processors": PixelRow(16, str),
}


def compare_pixels(rows: dict[str, PixelRow], settings: BenchmarkSettings) -> Iterator[Comparison]:
    """Compare `ViTCLSImageProcessor` with AutoImageProcessor, for each row."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_benchmark_files(Path(folder), settings.is_toy)
        ours, theirs = build_image_processors(get_model_size(settings.is_toy), Path(folder))
        for name, row in rows.items():
            yield compare_processors(name, row, files, ours, theirs, settings)


def compare_processors(
    name: str, row: PixelRow, files: list[str], ours: Any, theirs: Any, settings: BenchmarkSettings
) -> Comparison:
    """Compare `ViTCLSImageProcessor` with AutoImageProcessor, for one row."""
    batches = [files[start : start + row.num_files] for start in range(0, len(files), row.num_files)]

    def process_ours() -> list[torch.Tensor]:
        return [ours(batch, return_tensors="pt")["pixel_values"] for batch in batches]

    def process_theirs() -> list[torch.Tensor]:
        opened_batches = ([row.open_file(file) for file in batch] for batch in batches)
        return [theirs(batch, return_tensors="pt")["pixel_values"] for batch in opened_batches]

    for _ in range(2):  # the first call also initializes the image processor
        if not all(map(torch.equal, process_ours(), process_theirs())):
            raise ValueError(f"{name}: the pixel values differ. Speed is compared only if the outputs are equal.")
    throughputs = compare_throughput(process_ours, process_theirs, len(files), settings)
    return Comparison("file to pixel_values", name, "AutoImageProcessor", *throughputs, 0.0, {"num_files": len(files)})


# Predictions ---------------------------------------------------------------------------------------------------------


PROBABILITY_LIMIT = 1e-4  # maximum difference between the probabilities of the most probable labels
PREDICTION_ROWS = {"fp32, batch 16": 16, "fp32, batch 1": 1}  # row name -> batch size

TopLabel = tuple[str, float]  # the most probable label and its probability
FilePredictionFunction = Callable[[int], list[TopLabel]]  # batch size -> top labels of all files, sorted by path


def compare_prediction(rows: dict[str, int], settings: BenchmarkSettings) -> Iterator[Comparison]:
    """Compare `vitcls predict` with transformers' pipeline for each row. The time to load the models is not
    measured."""
    with tempfile.TemporaryDirectory() as folder:
        num_files = len(write_benchmark_files(Path(folder), settings.is_toy))
        details = {"num_files": num_files, "size": vars(get_model_size(settings.is_toy))}
        with (
            PredictionProcess("ours", folder, settings) as ours,
            PredictionProcess("theirs", folder, settings) as theirs,
        ):
            for name, batch_size in rows.items():
                labels, expected = (process.request("labels", batch_size) for process in (ours, theirs))
                difference = check_labels(labels, expected, name)
                measure_ours = partial(ours.request, "speed", batch_size)
                measure_theirs = partial(theirs.request, "speed", batch_size)
                throughputs = measure_alternately(measure_ours, measure_theirs, settings.num_pairs)
                yield Comparison("vitcls predict on JPEG files", name, "pipeline", *throughputs, difference, details)


def check_labels(labels: list[TopLabel], expected: list[TopLabel], name: str) -> float:
    """Return the largest difference between probabilities. Raise ValueError if labels differ, or if probabilities
    differ by more than PROBABILITY_LIMIT."""
    for index, ((label, _), (expected_label, _)) in enumerate(zip(labels, expected, strict=True)):
        if label != expected_label:
            raise ValueError(
                f"{name}: the label of image {index} is {label} with vitcls predict, but {expected_label} with "
                "the pipeline"
            )
    difference = max(abs(ours - theirs) for (_, ours), (_, theirs) in zip(labels, expected, strict=True))
    return check_difference(difference, PROBABILITY_LIMIT, name, "the probabilities")


class PredictionProcess(LoggedProcess):
    """A process that runs `vitcls predict` or the pipeline, and replies to requests."""

    def __init__(self, program: str, folder: str, settings: BenchmarkSettings) -> None:
        super().__init__(
            [sys.executable, "-m", __name__, program, folder, *settings.toy_flags], stdout=subprocess.PIPE
        )

    def request(self, request_kind: str, batch_size: int) -> Any:
        """Send a request and return the reply. Raise ValueError if the process ends without a reply."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        print(request_kind, batch_size, file=stdin, flush=True)
        if reply := stdout.readline():
            return json.loads(reply)
        raise self.build_error()


def build_vitcls_predictor(size: ModelSize, folder: Path) -> FilePredictionFunction:
    """Return a function that predicts labels in the same way as `vitcls predict`."""
    processor, _ = build_image_processors(size, folder / "ours")
    model = build_transformers_peer(size).ours.eval()
    prediction_columns = build_prediction_columns(model, top_k=5, threshold=0.5, features=None)

    def predict(batch_size: int) -> list[TopLabel]:
        predictor = Predictor(model, processor, prediction_columns, nullcontext, batch_size, get_num_workers())
        image_files = build_list_input([str(folder / "photographs")])
        rows = predictor.iterate_rows(image_files, [range(image_files.num_images)], chunk_size=image_files.num_images)
        return [(row["error"] or row["label"], row["probability"]) for row in rows]

    return predict


def build_pipeline_predictor(size: ModelSize, folder: Path) -> FilePredictionFunction:
    """Return a function that predicts labels with transformers' pipeline."""
    from transformers import pipeline

    _, processor = build_image_processors(size, folder / "theirs")
    model: Any = build_transformers_peer(size).theirs.eval()
    files = sorted(map(str, folder.rglob("*.jpg")))
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")

    def predict(batch_size: int) -> list[TopLabel]:
        predictions = classify(files, batch_size=batch_size, top_k=5)
        return [(labels[0]["label"], labels[0]["score"]) for labels in predictions]

    return predict


PREDICTORS = {"ours": build_vitcls_predictor, "theirs": build_pipeline_predictor}


def main() -> None:
    """Reply to requests on standard input until end of file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("program", choices=PREDICTORS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--toy", action="store_true")
    flags = parser.parse_args()
    predict = PREDICTORS[flags.program](get_model_size(flags.toy), flags.folder)
    num_files = len(list(flags.folder.rglob("*.jpg")))
    for line in sys.stdin:
        request_kind, batch_size = line.split()
        predict_files = partial(predict, int(batch_size))
        reply = predict_files() if request_kind == "labels" else measure_throughput(predict_files, num_files, 0.0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
