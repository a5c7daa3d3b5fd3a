"""Accuracy, differences and speed of an exported file on the images of a dataset.

    images = load_export_images(folder, "digits")        # split as in the run of the model
    images.measure_file(Path("model.xml"))

Training images calibrate int8 graphs. Held-out images measure the accuracy and, also without
labels, the differences between the outputs of the file and the model.
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..data.evaluated_images import load_fitting_and_evaluation_data
from ..data.held_out import read_held_out_record
from ..data.images import LabeledImages
from ..data.options import DataOptions
from ..data.splits import load_training_data
from ..hub.local_paths import resolve_name, strip_folders
from ..hub.model_folder import ModelFolder
from ..inference.evaluate import EvaluationSetup, load_evaluation, set_label_columns
from ..inference.exported_graphs import INPUT_NAME, ExportedModel
from ..inference.image_pass import ImageOutput
from ..inference.intervals import compute_proportion_interval
from ..inference.options import EvaluateOptions
from ..runtime.distributed import build_accelerator
from ..runtime.messages import format_message
from .exportable import Outputs


NUM_COMPARED_IMAGES = 64

logger = logging.getLogger(__name__)


@dataclass
class ExportImages:
    """Images of a dataset, and an evaluator if they have labels and the model is a classifier."""

    dataset: str
    training: Any  # sequence of images
    held_out: Any
    setup: EvaluationSetup | None

    def measure_file(self, file: Path) -> dict[str, Any] | None:
        """Return the metric of the model and of one file; None without labels.

        With one label per image, the values of `compare_labels` are added.
        """
        if self.setup is None:
            return None
        evaluator = self.setup.evaluator
        evaluator.keep_logits = evaluator.label_space.kind == "single_label_classification"
        scores = self.describe_metrics(evaluator(self.setup.model))
        rows = evaluator.rows
        scores["file"] = self.evaluate_file(file)[scores["metric"]]
        if not evaluator.keep_logits:
            return scores | {"interval": None, "drop_interval": None, "num_equal_labels": None}
        return scores | compare_labels(rows, evaluator.rows)

    def evaluate_file(self, file: Path) -> dict[str, Any]:
        """Return the metrics of an exported file."""
        assert self.setup is not None
        metrics: dict[str, Any] = self.setup.evaluator(
            ExportedModel(file, self.setup.model.config, True)
        )
        return metrics

    def describe_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the images and the metric of the model."""
        assert self.setup is not None
        metric = next(iter(metrics))
        return {
            "dataset": strip_folders(resolve_name(self.dataset)),
            "split": self.setup.data.split,
            "num_images": metrics["num_images"],
            "metric": metric,
            "model": metrics[metric],
        }


def prepare_images(images: Any, processor: Any, count: int) -> list[torch.Tensor]:
    """Return up to `count` preprocessed images, each [1, C, H, W], spread over all images.

    Unreadable images are left out.
    """
    pixels = []
    for index in range(0, len(images), max(1, len(images) // count)):
        with contextlib.suppress(ValueError):
            pixels.append(processor(images[index], return_tensors="pt")[INPUT_NAME])
    return pixels[:count]


def compare_labels(
    model_rows: Sequence[ImageOutput], file_rows: Sequence[ImageOutput]
) -> dict[str, Any]:
    """Return the number of equal labels, and 95% intervals of the accuracy and of its loss.

    The accuracy is that of a file, and the loss is what it loses against the model.

    Both programs are evaluated on the same images. The loss therefore depends only on the images
    for which exactly one of them is right (McNemar's test), and its interval on the share of these
    images that the file loses.
    """
    labels = np.array([int(row.label) for row in file_rows])
    predicted, predicted_in_file = (
        np.array([row.values.argmax() for row in rows]) for rows in (model_rows, file_rows)
    )
    is_labeled = labels >= 0
    is_correct = (predicted == labels)[is_labeled]
    is_correct_in_file = (predicted_in_file == labels)[is_labeled]
    num_images = len(is_correct)
    num_lost = int((is_correct & ~is_correct_in_file).sum())
    num_different = int((is_correct != is_correct_in_file).sum())
    lost_interval = compute_proportion_interval(num_lost, num_different) or [0.5, 0.5]
    return {
        "interval": compute_proportion_interval(int(is_correct_in_file.sum()), num_images),
        "drop_interval": [(2 * bound - 1) * num_different / num_images for bound in lost_interval],
        "num_equal_labels": int((predicted == predicted_in_file).sum()),
    }


def load_export_images(
    folder: ModelFolder | None, dataset: str, split: str | None = None, batch_size: int = 64
) -> ExportImages:
    """Load the training images and the held-out images of a dataset.

    Without labels, or for a model without classifier, print why no accuracy is measured.

    Args:
        folder: The model; None for a preset.
        dataset: As in `vitcls evaluate`.
        split: Split to evaluate, as in `vitcls evaluate`, which requires labels. Default: held-out
            images.
        batch_size: Number of images per forward pass.

    Raises:
        ValueError, OSError: If the dataset cannot be read, or the labels do not match the model.
    """
    data_options = DataOptions(dataset=dataset)
    try:
        if folder is None:
            raise ValueError("a preset has random weights")
        options = EvaluateOptions(
            model=folder.source,
            data=data_options,
            split=split,
            batch_size=batch_size,
            mixed_precision="no",
            backend="torch",
        )
        setup = load_evaluation(folder, options, build_accelerator(mixed_precision="no"), print)
    except ValueError as error:
        if split is not None:
            raise
        data = load_training_data(data_options, use_labels=False)
        logger.warning("the accuracy is not measured: %s", format_message(str(error)))
        return ExportImages(dataset, getattr(data.train, "images", ()), data.held_out.images, None)
    data_options = set_label_columns(data_options, setup.model.config, folder)
    training, _ = load_fitting_and_evaluation_data(
        data_options, split, read_held_out_record(folder)
    )
    held_out = setup.evaluator.images
    assert isinstance(held_out, LabeledImages)  # nothing is streamed
    return ExportImages(dataset, training.images.images, held_out.images, setup)


def compare_outputs_on_images(found: list[Outputs], expected: list[Outputs]) -> dict[str, Any]:
    """Compare the first output of a file with that of the model, one dict per image.

    Measured are the relative error (Frobenius norm), the mean cosine similarity and, for logits,
    the fraction of images with the same top-1 label.
    """
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
