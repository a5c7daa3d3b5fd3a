"""Accuracy of simple classifiers on frozen features, by token and layer (`evaluate --frozen`).

    training images -> encoder, once -> features -> fit scikit-learn's classifier  --+
    held-out images -> encoder, once -> features ------------------------------------+-> accuracy by token, by layer

--frozen      classifier
knn           KNeighborsClassifier: 10 nearest neighbors by cosine distance, weighted by inverse distance
logreg        `LinearProbe`: shrinkage LDA or logistic regression, chosen by cross-validation

The features by token are the special tokens and the mean of the patch tokens after the final norm
of the encoder. The rows by layer are the candidates of the probe (linear_probe.py), each compared
with CLS of the last layer on the same images.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..conversion.open_model import open_model
from ..data.evaluation_data import EvaluationData, load_fitting_and_evaluation_data
from ..data.splits import load_on_main
from ..data.splits_table import read_splits, select_task
from .evaluate import (
    MAX_BATCH_SIZE,
    build_table,
    describe_evaluation,
    set_up_evaluation,
    write_results,
)
from .evaluator import round_floats
from .frozen_features import FeatureLayout, pool_layers
from .image_pass import ImagePass, stack_rows
from .intervals import compute_mean_interval, compute_proportion_interval
from .linear_probe import (
    NUM_LAST_LAYERS,
    POOLING_TEXTS,
    LinearProbe,
    describe_layers,
    list_candidates,
    stack_tokens,
)
from .load_model import TORCH, load_for_inference
from .metric_tables import format_percent
from .options import EvaluateOptions
from .token_names import get_token_names


def compute_tokens_and_layers(
    model: Any, layout: FeatureLayout, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Return the features [B, F] of tokens and of layers from one forward pass.

    The special tokens and the mean of the patches of the last layer come first, then the features
    of the last layers that a probe chooses from.
    """
    outputs = model(pixel_values, output_hidden_states=True)
    tokens = outputs.last_hidden_state
    num_prefix_tokens = model.config.token_layout.num_prefix_tokens
    mean = tokens[:, num_prefix_tokens:].mean(dim=1, keepdim=True)
    features = torch.cat([tokens[:, :num_prefix_tokens], mean], dim=1).flatten(1)
    return torch.cat([features.float(), pool_layers(model, outputs, layout)], dim=1)


def build_classifier(kind: str, num_training_images: int) -> Any:
    """Build a k-NN classifier, or a linear one that is chosen by cross-validation."""
    from sklearn.neighbors import KNeighborsClassifier

    if kind == "knn":
        return KNeighborsClassifier(
            min(10, num_training_images), weights="distance", metric="cosine"
        )
    return LinearProbe()


def evaluate_frozen(options: EvaluateOptions) -> dict[str, Any]:
    """Measure the accuracy of a simple classifier on the frozen features of a checkpoint.

    The results are printed, written to `output` if it is set, and returned. The classifiers are
    fitted to the training images and evaluated on the images that `split` selects, as in
    `evaluate_checkpoint`.

    Raises:
        ValueError: if the checkpoint, the dataset or the labels are not supported, or if too many
            images are unreadable.
        OSError: if the checkpoint cannot be found or read, if the dataset cannot be found, or if
            the output cannot be written.
    """
    assert options.frozen is not None
    accelerator, console, warn = set_up_evaluation(options.mixed_precision)
    with accelerator.main_process_first():  # the main process downloads the files
        folder = open_model(options.model)
    loaded = load_for_inference(
        folder,
        replace(options, backend=TORCH),
        accelerator,
        use_head=False,
        max_batch_size=MAX_BATCH_SIZE,
        print_line=partial(console.print, markup=False),
    )
    model = loaded.model

    training_data, held_out_data = load_on_main(
        accelerator,
        options.dataset,
        partial(
            load_fitting_and_evaluation_data,
            options,
            options.split,
            select_task(read_splits(folder), None),
            options.max_images,
        ),
    )
    kind = held_out_data.label_space.kind
    if kind != "single_label_classification":
        raise ValueError(
            f"`frozen={options.frozen!r}` requires one label per image, but {options.dataset} "
            f"has labels for {kind}. Set a single `label_column`"
        )
    if held_out_data.split == training_data.split and options.split is not None:
        raise ValueError(
            f"`frozen={options.frozen!r}` fits to the split {training_data.split!r}. Remove "
            "`split`, or set another one"
        )
    layout = FeatureLayout.from_config(model.config, NUM_LAST_LAYERS)

    def extract_features(data: EvaluationData) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the features, the class names and the number of unreadable images."""
        images = ImagePass(
            images=data.images,
            processor=loaded.processor,
            label_space=data.label_space,
            batch_size=loaded.batch_size,
            accelerator=accelerator,
            num_workers=options.num_workers,
            max_unreadable_images=options.max_unreadable_images,
            num_channels=model.config.num_channels,
            warn=warn,
        )
        rows = images.collect(model, partial(compute_tokens_and_layers, model, layout), console)
        features, labels = stack_rows(rows)
        return features, np.array(data.label_space.names)[labels], images.num_unreadable

    start_time = time.perf_counter()
    training_features, training_labels, num_unreadable = extract_features(training_data)
    held_out_features, held_out_labels, num_unreadable_held_out = extract_features(held_out_data)
    seconds = time.perf_counter() - start_time
    num_images = len(training_labels) + len(held_out_labels)
    results: dict[str, Any] = {
        **describe_evaluation(options, held_out_data, num_images, seconds, accelerator),
        "frozen": options.frozen,
        "num_training_images": len(training_labels),
        "num_images": len(held_out_labels),
        "num_unreadable_images": num_unreadable + num_unreadable_held_out,
    }
    if accelerator.is_main_process:
        tokens = [*get_token_names(model.config), "mean of patches"]
        num_token_features = len(tokens) * model.config.hidden_size
        token_features, layer_features = (
            [features[:, part] for features in (training_features, held_out_features)]
            for part in (slice(num_token_features), slice(num_token_features, None))
        )
        labels = (training_labels, held_out_labels)
        results["rows"] = round_floats(
            measure_tokens(options.frozen, tokens, token_features, labels)
        )
        results["layers"] = round_floats(
            measure_layers(options.frozen, layout, layer_features, labels)
        )
        write_results(results, options.output, console)
        print_accuracies(results, held_out_data, console)
    accelerator.end_training()
    return results


Pair = Sequence[np.ndarray]  # of the training images and of the evaluated images


def measure_tokens(
    kind: str, tokens: list[str], features: Pair, labels: Pair
) -> list[dict[str, Any]]:
    """Return the accuracy of each token of the last layer. `features` are [N, tokens * D]."""
    rows = []
    widths = [part.reshape(len(part), len(tokens), -1) for part in features]
    for index, token in enumerate(tokens):
        is_right = predict_correctly(kind, [part[:, index] for part in widths], labels)
        interval = compute_proportion_interval(int(is_right.sum()), len(is_right))
        rows.append(
            {"token": token, "accuracy": float(is_right.mean()), "accuracy_interval": interval}
        )
    return rows


def measure_layers(
    kind: str, layout: FeatureLayout, features: Pair, labels: Pair
) -> list[dict[str, Any]]:
    """Return the accuracy of each choice of layers and tokens, and its difference from the first.

    The first is CLS of the last layer if there is one. The interval of the difference is paired by
    image.
    """
    rows: list[dict[str, Any]] = []
    first = None
    tokens = [layout.split(part) for part in features]
    candidates = [each for each in list_candidates(tokens[0]) if each.head == "lda"]
    for candidate in candidates:
        if kind == "knn":
            values = [stack_tokens(part, candidate.tokens) for part in tokens]
            is_right = predict_correctly(kind, values, labels)
        else:
            probe = LinearProbe(candidate.layers, candidate.pooling).fit(tokens[0], labels[0])
            is_right = probe.predict(tokens[1]) == labels[1]
        first = is_right if first is None else first
        difference, half_width = compute_mean_interval(is_right.astype(float) - first)
        rows.append(
            {
                "layers": list(candidate.layers),
                "pooling": candidate.pooling,
                "accuracy": float(is_right.mean()),
                "difference": difference,
                "difference_interval": [difference - half_width, difference + half_width],
            }
        )
    return rows


def predict_correctly(kind: str, features: Pair, labels: Pair) -> np.ndarray:
    """Return whether a classifier of the training images is right about each evaluated image."""
    classifier = build_classifier(kind, len(labels[0])).fit(features[0], labels[0])
    return classifier.predict(features[1]) == labels[1]


def print_accuracies(results: dict[str, Any], data: EvaluationData, console: Console) -> None:
    """Print the table of accuracies."""
    console.print(
        f"{results['frozen']} on frozen features: {results['num_training_images']:,} training "
        f"images, evaluated on {results['num_images']:,} images of {results['dataset']} "
        f"({data.description}); {results['images_per_second']:,} images/s",
        markup=False,
    )
    table_rows = []
    for row in results["rows"]:
        interval_text = " to ".join(map(format_percent, row["accuracy_interval"]))
        table_rows.append([row["token"], format_percent(row["accuracy"]), interval_text])
    console.print(build_table("", ["Token", "Accuracy", "95% interval"], table_rows))

    table_rows = []
    for row in results["layers"]:
        name = f"{describe_layers(row['layers'])}, {POOLING_TEXTS[row['pooling']]}"
        low, high = (f"{100 * value:+.1f}" for value in row["difference_interval"])
        difference_text = "–"
        if table_rows:
            difference_text = f"{100 * row['difference']:+.1f} ({low} to {high})"
        table_rows.append([name, format_percent(row["accuracy"]), difference_text])
    console.print(
        build_table("", ["Layers and tokens", "Accuracy", "Difference, points (95%)"], table_rows)
    )
