"""Accuracy of simple classifiers on frozen features, for each token of each layer (`vitcls evaluate --frozen`).

    training images -> encoder, once -> features -> fit scikit-learn's classifier  --+
    held-out images -> encoder, once -> features ------------------------------------+-> accuracy by layer and token

--frozen      classifier
knn           KNeighborsClassifier: 10 nearest neighbors by cosine distance, weighted by inverse distance
logreg        LogisticRegression on standardized features
few-shot:N    logreg on N images per class, repeated with different images

The features of a layer are the special tokens and the mean of the patch tokens in the layer output. The final norm of
the encoder is applied to the output of every layer, as in DINOv2's `get_intermediate_layers`.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from rich.console import Console

from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.held_out import RESULTS_FILE, read_held_out_record
from ..data.images import LabeledImages
from ..data.labels import LabelSpace
from ..data.splits import load_evaluation_data, load_on_main
from ..hub.loading import MODEL_FILE_PATTERNS
from ..intervals import compute_mean_interval, compute_proportion_interval
from ..options import EvaluateOptions
from ..token_names import get_token_names
from .evaluate import (
    LABEL_DESCRIPTIONS,
    build_progress,
    build_table,
    describe_evaluation,
    describe_possible_overlap,
    set_up_evaluation,
    write_results,
)
from .evaluator import Evaluator, HeldOutBatch, round_floats
from .load_model import load_model
from .metric_tables import format_percent


# Features ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabeledFeatures:
    """Features and labels of images."""

    vectors: dict[tuple[int, str], np.ndarray]  # (layer number, starting from 1; token name) -> [images, D] float32
    labels: np.ndarray  # class name of each image, [images]
    num_unreadable: int  # number of unreadable images, which have no features


class FeatureEvaluator(Evaluator):
    """Computes the features of images on any number of processes."""

    def __init__(self, layer_numbers: list[int], *args: Any, **kwargs: Any) -> None:
        """Initialize the evaluator. Layers are numbered from 1. See `Evaluator` for the remaining arguments."""
        super().__init__(*args, **kwargs)
        self.layer_numbers = layer_numbers

    def build_metrics(self) -> "FeatureStore":
        return FeatureStore()

    def compute_outputs(self, model: torch.nn.Module, batch: HeldOutBatch) -> torch.Tensor:
        """Return the features [G, num_vectors, D] of the G readable images of a batch."""
        with self.accelerator.autocast():
            features = compute_features(model, self.pad_batch(model, batch.pixel_values), self.layer_numbers)
        return features[: len(batch.labels)]


class FeatureStore:
    """The features of all batches. The class has the same interface as the metrics in metrics.py."""

    def __init__(self) -> None:
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Add the features [G, num_vectors, D] and the class indices [G] of a batch."""
        self.batches.append((features.float().cpu().numpy(), labels.cpu().numpy()))

    def compute(self) -> dict[str, Any]:
        """Return the features and labels of all processes in the order of the images."""
        gathered_batches = gather_object([self.batches])  # one list per process; batches are assigned round-robin
        ordered_batches = [batch for batches in zip(*gathered_batches, strict=True) for batch in batches]
        features, labels = (np.concatenate(arrays) for arrays in zip(*ordered_batches, strict=True))
        return {"num_images": len(labels), "features": features, "labels": labels}


def compute_features(encoder: Any, pixel_values: torch.Tensor, layer_numbers: list[int]) -> torch.Tensor:
    """Return the features [B, num_layers * (num_prefix_tokens + 1), D] of a `ViTCLSModel` for images [B, C, H, W]."""
    hidden_states = encoder(pixel_values, output_hidden_states=True).hidden_states  # embeddings and layer outputs
    num_prefix_tokens = encoder.config.token_layout.num_prefix_tokens
    vectors = []
    for layer_number in layer_numbers:
        tokens = hidden_states[layer_number]
        if encoder.layernorm is not None:
            tokens = encoder.layernorm(tokens)
        vectors += [tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:].mean(dim=1, keepdim=True)]
    return torch.cat(vectors, dim=1)


# Classifiers ---------------------------------------------------------------------------------------------------------


def build_classifier(kind: str, num_training_images: int) -> Any:
    """Build a k-NN classifier, or a logistic regression on standardized features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "knn":
        return KNeighborsClassifier(min(10, num_training_images), weights="distance", metric="cosine")
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def measure_accuracies(
    kind: str, training_features: LabeledFeatures, held_out_features: LabeledFeatures, num_repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Return the accuracy of a classifier on each token of each layer, with a 95% confidence interval.

    For `knn` and `logreg`, the interval is the Wilson interval over the held-out images. Few-shot classifiers are
    fitted to `num_repeats` random subsets of images; the interval is the confidence interval of the mean accuracy.
    """
    _, _, num_images_per_class = kind.partition(":")
    subsets = [np.arange(len(training_features.labels))]
    if num_images_per_class:
        subsets = select_few_shot_images(training_features.labels, int(num_images_per_class), num_repeats, seed)
    num_images = len(held_out_features.labels)
    rows = []
    for (layer, token), vectors in training_features.vectors.items():
        correct_counts = []
        for indices in subsets:
            classifier = build_classifier(kind, len(indices)).fit(vectors[indices], training_features.labels[indices])
            predictions = classifier.predict(held_out_features.vectors[layer, token])
            correct_counts.append(int((predictions == held_out_features.labels).sum()))
        if num_images_per_class:
            accuracy = summarize_repeats([count / num_images for count in correct_counts])
        else:
            interval = compute_proportion_interval(correct_counts[0], num_images)
            accuracy = {"accuracy": correct_counts[0] / num_images, "accuracy_interval": interval}
        rows.append({"layer": layer, "token": token, **accuracy})
    return rows


def select_few_shot_images(
    labels: np.ndarray, num_images_per_class: int, num_repeats: int, seed: int
) -> list[np.ndarray]:
    """Return one array per repeat: the sorted indices of `num_images_per_class` random images of each class. Raise
    ValueError if a class has too few images."""
    names, counts = np.unique(labels, return_counts=True)
    if counts.min() < num_images_per_class:
        raise ValueError(
            f"--frozen few-shot:{num_images_per_class} requires {num_images_per_class} training images of each class, "
            f"but {str(names[counts.argmin()])!r} has {counts.min()}. Set --frozen few-shot:{counts.min()}"
        )
    subsets = []
    for repeat in range(num_repeats):
        generator = np.random.default_rng([seed, repeat])
        class_indices = [
            generator.choice(np.flatnonzero(labels == name), num_images_per_class, replace=False) for name in names
        ]
        subsets.append(np.sort(np.concatenate(class_indices)))
    return subsets


def summarize_repeats(accuracies: list[float]) -> dict[str, Any]:
    """Return the mean accuracy over repeats, with a 95% interval (Student's t; None for one repeat)."""
    mean, half_width = compute_mean_interval(accuracies)
    interval = [max(mean - half_width, 0.0), min(mean + half_width, 1.0)] if len(accuracies) > 1 else None
    return {"accuracy": mean, "accuracy_interval": interval, "accuracies": accuracies}


# Run -----------------------------------------------------------------------------------------------------------------


def evaluate_frozen(options: EvaluateOptions) -> dict[str, Any]:
    """Measure the accuracy of simple classifiers on the frozen features of a checkpoint.

    The results are printed, written to `--output` if it is set, and returned. The classifiers are fitted to the
    training images and evaluated on the images that `--split` selects, as in `evaluate_checkpoint`.

    Raises:
        ValueError: if the checkpoint, the dataset or the labels are not supported, or if too many images are
            unreadable.
        OSError: if the checkpoint cannot be found or read, if the dataset cannot be found, or if the output cannot be
            written.
    """
    assert options.frozen is not None
    if options.data.streaming:
        raise ValueError("--frozen does not support streams. Remove --streaming")
    accelerator, console, warn = set_up_evaluation(options)
    with accelerator.main_process_first():  # the main process downloads the files
        model, processor = load_model(options.model, use_head=False, fit=options.fit)
        record = read_held_out_record(resolve_checkpoint(options.model, [*MODEL_FILE_PATTERNS, RESULTS_FILE]))
    (training_label_space, training_images, _, _), (held_out_label_space, held_out_images, split, rule) = load_on_main(
        accelerator,
        options.data.dataset,
        lambda: [load_evaluation_data(options.data, split, record) for split in ("train", options.split)],
    )
    check_is_single_label(options, held_out_label_space)
    if rule is not None and record is not None:
        warning = describe_possible_overlap(options.model, record, held_out_images)
        if warning is not None:
            warn(warning)
    model = model.to(accelerator.device).eval()
    num_layers = model.config.num_hidden_layers
    layer_numbers = [num_layers] if options.frozen_layers == "last" else list(range(1, num_layers + 1))

    def extract_features(images: LabeledImages, label_space: LabelSpace) -> LabeledFeatures:
        evaluator = FeatureEvaluator(
            layer_numbers,
            images,
            processor,
            label_space,
            options.batch_size,
            options.data.num_workers,
            accelerator,
            options.data.max_unreadable_images,
            warn=warn,
            num_channels=model.config.num_channels,
        )
        output = evaluator(model, build_progress(console, accelerator))
        tokens = [*get_token_names(model.config), "mean of patches"]
        keys = [(layer, token) for layer in layer_numbers for token in tokens]  # in the order of `compute_features`
        vectors = {key: output["features"][:, index] for index, key in enumerate(keys)}
        labels = np.array(label_space.names)[output["labels"]]
        return LabeledFeatures(vectors, labels, output["num_unreadable_images"])

    start_time = time.perf_counter()
    training_features = extract_features(training_images, training_label_space)
    held_out_features = extract_features(held_out_images, held_out_label_space)
    seconds = time.perf_counter() - start_time
    num_images = len(training_features.labels) + len(held_out_features.labels)
    results: dict[str, Any] = {
        **describe_evaluation(options, split, rule, num_images, seconds, accelerator),
        "frozen": options.frozen,
        "num_training_images": len(training_features.labels),
        "num_images": len(held_out_features.labels),
        "num_unreadable_images": training_features.num_unreadable + held_out_features.num_unreadable,
    }
    if accelerator.is_main_process:
        rows = measure_accuracies(
            options.frozen, training_features, held_out_features, options.frozen_repeats, options.data.split_seed
        )
        best_row = max(rows, key=lambda row: row["accuracy"])
        results |= {"best": round_floats(best_row), "rows": round_floats(rows)}
        print_accuracies(results, console)
        write_results(options, results, console)
    accelerator.end_training()
    return results


def check_is_single_label(options: EvaluateOptions, label_space: LabelSpace) -> None:
    """Raise ValueError unless the dataset has one label per image."""
    if label_space.kind != "single_label_classification":
        raise ValueError(
            f"--frozen {options.frozen} requires one label per image, but {options.data.dataset} has "
            f"{LABEL_DESCRIPTIONS[label_space.kind]}. Set a single --label-column"
        )


def print_accuracies(results: dict[str, Any], console: Console) -> None:
    """Print the table of accuracies and the best row."""
    console.print(
        f"{results['frozen']} on frozen features: {results['num_training_images']:,} training images, "
        f"evaluated on {results['num_images']:,} images of {results['dataset']} ({results['split']}); "
        f"{results['images_per_second']:,} images/s",
        markup=False,
    )
    table_rows = []
    for row in results["rows"]:
        interval_text = " to ".join(map(format_percent, row["accuracy_interval"] or []))
        table_rows.append([str(row["layer"]), row["token"], format_percent(row["accuracy"]), interval_text])
    console.print(build_table("", ["Layer", "Token", "Accuracy", "95% interval"], table_rows))
    best_row = results["best"]
    console.print(
        f"best      layer {best_row['layer']}, {best_row['token']}: {format_percent(best_row['accuracy'])} (best "
        f"of {len(results['rows'])} rows, selected on the evaluated images)",
        markup=False,
    )
