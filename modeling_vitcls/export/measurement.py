"""Accuracy, differences and speed of an exported file on the images of a dataset.

    images = load_export_images("runs/mine", "digits")        # split as in the run of the model
    images.measure_accuracy({"model.xml": Path("model.xml")})

Training images calibrate int8 graphs. Held-out images measure the accuracy and, also without labels, the differences
between the outputs of the file and the model.
"""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.evaluated_images import load_fitting_and_evaluation_data
from ..data.held_out import read_held_out_record
from ..data.images import LabeledImages
from ..data.splits import load_training_data
from ..hub.loading import MODEL_FILE_PATTERNS
from ..hub.local_paths import BUILT_IN_DATASET, resolve_name, strip_folders
from ..hub.model_files import RESULTS_FILE
from ..inference.evaluate import EvaluationSetup, load_evaluation, set_label_columns
from ..inference.exported_graphs import INPUT_NAME, ExportedModel
from ..inference.intervals import compute_proportion_interval
from ..options import DataOptions, EvaluateOptions
from ..runtime.distributed import build_accelerator
from .exportable import Outputs


NUM_COMPARED_IMAGES = 64

logger = logging.getLogger(__name__)


@dataclass
class ExportImages:
    """Images of a dataset, and an evaluator if the images have labels and the model is a classifier."""

    dataset: str
    training: Any  # sequence of images
    held_out: Any
    setup: EvaluationSetup | None

    def prepare(self, images: Any, processor: Any, count: int) -> list[torch.Tensor]:
        """Return up to `count` preprocessed images, each [1, C, H, W], spread over all images. Unreadable images are
        left out."""
        pixels = []
        for index in range(0, len(images), max(1, len(images) // count)):
            with contextlib.suppress(ValueError):
                pixels.append(processor(images[index], return_tensors="pt")[INPUT_NAME])
        return pixels[:count]

    def measure_accuracy(self, files: Mapping[str, Path]) -> dict[str, Any] | None:
        """Return the metric of the model and of each exported file, by name; None without labels."""
        if self.setup is None:
            return None
        evaluator, config = self.setup.evaluator, self.setup.model.config
        metrics = evaluator(self.setup.model)
        metric = next(iter(metrics))
        return {
            "dataset": strip_folders(resolve_name(self.dataset, self.dataset == BUILT_IN_DATASET)),
            "split": self.setup.split,
            "num_images": metrics["num_images"],
            "metric": metric,
            "model": metrics[metric],
            "files": {
                name: evaluator(ExportedModel(file, config, True))[metric]
                for name, file in files.items()
            },
        }

    def measure_file(self, file: Path) -> dict[str, Any] | None:
        """Return the metric of the model and of one file, with a 95% confidence interval; None without labels."""
        scores = self.measure_accuracy({"file": file})
        if scores is None:
            return None
        scores |= scores.pop("files")
        num_correct = round(scores["file"] * scores["num_images"])
        is_proportion = scores["metric"] == "accuracy"
        interval = (
            compute_proportion_interval(num_correct, scores["num_images"])
            if is_proportion
            else None
        )
        return scores | {"interval": interval}


def load_export_images(
    source: str, dataset: str, split: str | None = None, batch_size: int = 64
) -> ExportImages:
    """Load the training images and the held-out images of a dataset. Without labels, or for a model without
    classifier, print why no accuracy is measured.

    Args:
        source: The model.
        dataset: As in `vitcls evaluate`.
        split: Split to evaluate, as in `vitcls evaluate`, which requires labels. Default: held-out images.
        batch_size: Number of images per forward pass.

    Raises:
        ValueError, OSError: If the dataset cannot be read, or the labels do not match the model.
    """
    options = EvaluateOptions(
        model=source,
        data=DataOptions(dataset=dataset),
        split=split,
        batch_size=batch_size,
        mixed_precision="no",
    )
    try:
        setup = load_evaluation(options, build_accelerator(mixed_precision="no"), print)
    except ValueError as error:
        if split is not None:
            raise
        data = load_training_data(options.data, use_labels=False)
        logger.warning("the accuracy is not measured: %s", error)
        return ExportImages(dataset, getattr(data.train, "images", ()), data.held_out.images, None)
    folder = resolve_checkpoint(source, [*MODEL_FILE_PATTERNS, RESULTS_FILE])
    data_options = set_label_columns(options.data, setup.model.config, folder)
    training, _ = load_fitting_and_evaluation_data(
        data_options, split, read_held_out_record(folder)
    )
    held_out = setup.evaluator.images
    assert isinstance(held_out, LabeledImages)  # nothing is streamed
    return ExportImages(dataset, training.images.images, held_out.images, setup)


def compare_outputs_on_images(found: list[Outputs], expected: list[Outputs]) -> dict[str, Any]:
    """Compare the first output of a file with that of the model, one dict per image: relative error (Frobenius norm),
    mean cosine similarity and, for logits, the fraction of images with the same top-1 label."""
    name = next(iter(expected[0]))
    values, reference = (
        torch.cat([outputs[name] for outputs in each]) for each in (found, expected)
    )
    is_logits = reference.ndim == 2
    top1_agreement = (
        (values.argmax(-1) == reference.argmax(-1)).float().mean().item() if is_logits else None
    )
    return {
        "num_images": len(reference),
        "output": name,
        "relative_error": ((values - reference).norm() / reference.norm()).item(),
        "cosine_similarity": F.cosine_similarity(values.flatten(1), reference.flatten(1))
        .mean()
        .item(),
        "top1_agreement": top1_agreement,
    }
