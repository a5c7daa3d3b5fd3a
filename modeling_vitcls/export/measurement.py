"""Accuracy, differences and speed of an exported file on the images of a dataset.

    images = load_export_images(model, processor, folder, "digits")    # split as in the model's run
    images.measure_file(ExportedModel(Path("model.xml"), model.config, use_head=True), model)

Training images calibrate int8 graphs. Held-out images measure the accuracy and, also without
labels, the differences between the outputs of the file and the model.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..data.evaluation_data import load_calibration_and_evaluation_data
from ..data.label_matching import translate_labels
from ..data.labels import check_is_classifier, get_label_space
from ..data.options import DataOptions
from ..data.splits import load_training_data
from ..data.splits_table import read_splits, select_task
from ..hub.local_paths import resolve_name, strip_folders
from ..hub.model_folder import ModelFolder
from ..inference.evaluate import get_training_columns
from ..inference.evaluator import Evaluator
from ..inference.exported_graphs import ExportedModel
from ..inference.image_pass import ImageOutput, prepare_batches, read_pixels
from ..inference.intervals import compute_proportion_interval
from ..inference.load_model import Classifier
from ..inference.speed import measure_inference_speed
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import ViTCLSPreTrainedModel
from ..runtime.distributed import build_accelerator
from .exportable import NamedOutputsModel, Outputs


NUM_COMPARED_IMAGES = 64
BATCH_SIZE = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportImages:
    """Images of a dataset, and an evaluator if they have labels and the model is a classifier."""

    dataset: str
    training: Any  # sequence of images
    held_out: Any
    split: str = ""  # name of the split with the held-out images
    evaluator: Evaluator | None = None

    def measure_file(self, exported: ExportedModel, model: Any) -> dict[str, Any] | None:
        """Measure an exported file and its model; None without labels.

        With one label per image, the values of `compare_labels` are added.
        """
        evaluator = self.evaluator
        if evaluator is None:
            return None
        of_model = evaluator.predict(model.to(evaluator.accelerator.device))
        model.to("cpu")
        of_file = evaluator.predict(exported)

        metric = next(iter(of_model.metrics))
        scores = {
            "dataset": strip_folders(resolve_name(self.dataset)),
            "split": self.split,
            "num_images": of_model.metrics["num_images"],
            "metric": metric,
            "model": of_model.metrics[metric],
            "file": of_file.metrics[metric],
        }
        if evaluator.label_space.kind != "single_label_classification":
            return scores | {"interval": None, "drop_interval": None, "num_equal_labels": None}
        return scores | compare_labels(of_model.rows, of_file.rows)


def prepare_images(images: Any, processor: Any, count: int) -> list[torch.Tensor]:
    """Preprocess up to `count` images, each [1, C, H, W], spread over all images.

    Unreadable images are left out.
    """
    # Datasets are often sorted by class, and the first images would then be of one class.
    indices = range(0, len(images), max(1, len(images) // count))
    prepare = partial(read_pixels, images, processor, None)
    batches = prepare_batches(prepare, [[index] for index in indices])
    pixels = [batch.pixel_values for batch in batches if batch.pixel_values is not None]
    return pixels[:count]


def compare_labels(
    model_rows: Sequence[ImageOutput], file_rows: Sequence[ImageOutput]
) -> dict[str, Any]:
    """Count equal labels, and compute 95% intervals of the accuracy and of its loss.

    The accuracy is the file's; the loss is how many points lower it is than the model's. Both are
    evaluated on the same images, so the loss depends only on the images for which exactly one of
    them is right (McNemar's test). Its interval comes from the share of these images that the file
    gets wrong.
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
    # If both are right on the same images, the interval is undefined and the loss is 0: the bounds
    # are multiplied by the number of different ones, 0.
    lost_interval = compute_proportion_interval(num_lost, num_different) or [0.5, 0.5]
    return {
        "interval": compute_proportion_interval(int(is_correct_in_file.sum()), num_images),
        "drop_interval": [(2 * bound - 1) * num_different / num_images for bound in lost_interval],
        "num_equal_labels": int((predicted == predicted_in_file).sum()),
    }


def load_export_images(
    model: ViTCLSPreTrainedModel,
    processor: ViTCLSImageProcessor | None,
    folder: ModelFolder | None,
    dataset: str,
    split: str | None = None,
) -> ExportImages:
    """Load the training images and the held-out images of a dataset.

    Without labels, or for a model without classifier, print why no accuracy is measured.

    Args:
        model, processor, folder: As `load_exportable_model` returns them. A processor is required.
        dataset: As in `vitcls evaluate`.
        split: Split to evaluate, as in `vitcls evaluate`, which requires labels. Default: held-out
            images.

    Raises:
        ValueError, OSError: If the dataset cannot be read, or the labels do not match the model.
    """
    if processor is None:
        raise ValueError("`dataset` requires an image processor, but the model has none. Omit it")
    options = DataOptions(dataset=dataset)
    try:
        if folder is None or not isinstance(model, Classifier):
            raise ValueError(
                "the weights are random" if folder is None else "the model has no classifier"
            )
        check_is_classifier(model.config)
        options = replace(options, **get_training_columns(model.config, folder))
        training, held_out = load_calibration_and_evaluation_data(
            options, split, select_task(read_splits(folder), None)
        )
        label_space = get_label_space(model.config)
        evaluator = Evaluator(
            translate_labels(held_out.images, held_out.label_space, label_space),
            processor=processor,
            label_space=label_space,
            batch_size=BATCH_SIZE,
            accelerator=build_accelerator(mixed_precision="no"),
            num_workers=options.num_workers,
            num_channels=model.config.num_channels,
        )
    except ValueError as error:
        # If a split was named, its accuracy was requested, so a warning is not enough. Otherwise,
        # images without labels suffice.
        if split is not None:
            raise
        data = load_training_data(options, use_labels=False)
        logger.warning("the accuracy is not measured: %s", error)
        return ExportImages(dataset, data.train.images, data.held_out.images)
    return ExportImages(
        dataset=dataset,
        training=training.images,
        held_out=held_out.images.images,
        split=held_out.split,
        evaluator=evaluator,
    )


def measure_graph(
    exported: ExportedModel,
    model: NamedOutputsModel,
    processor: Any,
    images: ExportImages | None,
    has_speed: bool,
) -> dict[str, Any]:
    """Measure the speed of an exported file, and its differences from the model on images.

    `has_speed` is False for a graph that does not accept images of the native size.
    """
    report: dict[str, Any] = {"evaluation": None, "comparison": None}
    if images is not None:
        pixels = prepare_images(images.held_out, processor, NUM_COMPARED_IMAGES)
        report["comparison"] = compare_outputs_on_images(
            list(map(exported.graph, pixels)), list(map(model, pixels))
        )
        report["evaluation"] = images.measure_file(exported, model.model)
    if has_speed:
        report["speed"] = measure_inference_speed(exported, exported.device)
    return report


def compare_outputs_on_images(found: list[Outputs], expected: list[Outputs]) -> dict[str, Any]:
    """Compare the first output of a file and of the model, one dict per image.

    Measured are the relative error (Frobenius norm), the mean cosine similarity and, for logits,
    the fraction of images with the same top-1 label.
    """
    name = next(iter(expected[0]))
    values, reference = (
        torch.cat([outputs[name] for outputs in each]) for each in (found, expected)
    )
    agreement = (values.argmax(-1) == reference.argmax(-1)).float().mean().item()
    return {
        "num_images": len(reference),
        "output": name,
        "relative_error": ((values - reference).norm() / reference.norm()).item(),
        "cosine_similarity": F.cosine_similarity(values.flatten(1), reference.flatten(1))
        .mean()
        .item(),
        "top1_agreement": agreement if reference.ndim == 2 else None,
    }
