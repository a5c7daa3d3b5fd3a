"""Tasks and classes that are added to a finished model without changing its other outputs.

    task      images -> frozen encoder, once -> LinearProbe -> extra head
    class     images -> frozen encoder, once -> mean of the class, class statistics of the model -> one row
              -> model folder with the tensors of the old model -> certificate, or nothing is written

A head only reads the tokens of the finished forward pass (`config.extra_heads`), so the other
outputs keep their bits. Added classes are also a head of their own, and their logits are appended:
one product with more rows would change the bits of the old logits.

To add a class, no images of the old classes are needed (inference/class_statistics.py): its row is
the mean of its images, multiplied by the precision matrix that the old classes share.
"""

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from ..data.cells import normalize_name, warn_about_similar_classes
from ..data.image_folder import check_output_is_not_read
from ..data.images import LabeledImages
from ..data.label_matching import translate_labels
from ..data.labels import LabelSpace, OneLabel, get_label_space
from ..data.sources import Splits, load_splits
from ..data.splits import (
    TrainingData,
    add_keys,
    check_contradictions,
    choose_training_splits,
    load_training_data,
)
from ..data.splits_table import (
    build_splits_table,
    find_trained_images,
    list_encoder_rows,
    read_splits,
    write_splits,
)
from ..hub.connection import silence_transformers
from ..hub.local_paths import strip_folders
from ..hub.model_files import (
    ADDITIONS_KEY,
    CERTIFICATE_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    hash_settings,
    hash_weights,
)
from ..hub.model_folder import ModelFolder, open_vitcls
from ..inference.class_statistics import ClassStatistics, Token
from ..inference.evaluate import set_up_evaluation
from ..inference.frozen_features import FeatureLayout, Features, FrozenPass
from ..inference.intervals import compute_proportion_interval
from ..inference.linear_probe import (
    NUM_LAST_LAYERS,
    POOLING_TEXTS,
    LinearProbe,
    describe_layers,
    stack_tokens,
)
from ..inference.metric_tables import format_small_percent
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.extra_heads_vitcls import RESERVED_OUTPUT_NAMES
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageClassifierOutput,
    ViTCLSModel,
    count_output_tokens,
)
from ..runtime.distributed import set_mixed_precision
from ..runtime.errors import mark_errors_of_all_processes, warn_on_first_process
from ..runtime.files import write_json
from ..runtime.staging import check_output_is_empty, create_output_folder
from ..runtime.system import get_versions
from .certificate import certify, describe_certificate, load_old_model, read_pixels
from .options import AddClassOptions, AdditionOptions, AddTaskOptions
from .probe import build_linear, build_probe_record, describe_probe


SINGLE_LABEL: Final = "single_label_classification"
NUM_FOLDS = 10  # that measure the recall of a new class

ComputeFeatures = Callable[[LabeledImages, LabelSpace], Features]


def open_old_model(
    options: AdditionOptions, has_logits: bool = False
) -> tuple[ModelFolder, Any, ViTCLSImageProcessor, ComputeFeatures]:
    """Load the old model and its image processor, and build the pass over labeled images.

    Images without a label have no features. With `has_logits`, the logits are the last columns.
    """
    with mark_errors_of_all_processes():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "a task or class is added by one process. Start the command without `accelerate "
                "launch`"
            )
    # Before the model is loaded, because these mistakes need no model to be noticed.
    check_output_is_empty(options.output_dir, "output_dir")
    check_output_is_not_read(options.output_dir, options.dataset)
    folder = open_vitcls(options.model)
    model = load_old_model(folder)
    if isinstance(model, ViTCLSModel):  # becomes a classifier whose logits are the pooled vector
        model, _ = folder.load_partly(ViTCLSForImageClassification, num_labels=0)

    accelerator, console, warn = set_up_evaluation(options.mixed_precision)
    set_mixed_precision(accelerator, options.mixed_precision, model.config)
    model.to(accelerator.device)
    processor = folder.load_processor()
    build_pass = partial(
        FrozenPass,
        layout=FeatureLayout.for_extra_heads(model.config, NUM_LAST_LAYERS),
        has_logits=has_logits,
        processor=processor,
        batch_size=options.batch_size,
        accelerator=accelerator,
        num_workers=options.num_workers,
        num_channels=model.config.num_channels,
        warn=warn,
    )

    def compute(images: LabeledImages, label_space: LabelSpace) -> Features:
        features = build_pass(images, label_space=label_space)(model, console)
        return features.take(features.labels >= 0)

    return folder, model, processor, compute


def check_has_one_label(label_space: LabelSpace, dataset: str) -> None:
    """Raise ValueError unless a dataset has one label per image."""
    if label_space.kind != SINGLE_LABEL:
        raise ValueError(
            f"one label per image is required, but {dataset} has labels for {label_space.kind}. "
            "Set `label_column` to a column with one label per image"
        )


# Tasks --------------------------------------------------------------------------------------------


def add_task_from_options(options: AddTaskOptions) -> dict[str, Any]:
    """Add a task, write the model folder, and return the record of the task.

    Raises:
        ValueError, OSError: if the model or the data cannot be read, the name is taken, or another
            output would change. Nothing is written then.
    """
    folder, model, processor, compute = open_old_model(options)
    check_name(options.name, model.config)
    data = load_training_data(replace(options, held_out_fraction=options.held_out_fraction or 0.0))
    check_has_one_label(data.label_space, options.dataset)

    with create_output_folder(options.output_dir, "output_dir") as staging:
        # A classifier on CLS does not compute the patches of the last layer. A head on them would
        # compute this layer again for all tokens: about 8% of a forward pass instead of 2%.
        has_patches = count_output_tokens(model.vitcls, None, {}) is None
        probe = LinearProbe(pooling=None if has_patches else "cls")
        record = fit_task(probe, data, compute, options.max_images)
        if num_seen := data.count_seen(list_encoder_rows(folder)):
            record.get("result", {}).pop("accuracy_interval", None)
            warn_on_first_process(
                f"{num_seen:,} of the images that measure the task trained the encoder of "
                f"{options.model}, so the accuracy is higher than for new images"
            )
        extended = append_probe(model, options.name, probe, data.label_space.names)
        record |= measure_cost(model, extended)

        records = {options.name: record}
        splits = data.build_splits_table(options.name)
        certificate = write_model(folder, extended, processor, staging, records, data.train, splits)
    print_addition(describe_probe(record), record, certificate, options.output_dir)
    return record


def check_name(name: str, config: ViTCLSConfig) -> None:
    """Raise ValueError if an output of the model has a name."""
    outputs = [field.name for field in fields(ViTCLSImageClassifierOutput)]
    if name in (*RESERVED_OUTPUT_NAMES, *outputs, *config.get_extra_heads(), *(config.tasks or ())):
        raise ValueError(
            f"`name={name!r}`: the model has an output with this name. Choose another `name`"
        )


def fit_task(
    probe: LinearProbe, data: TrainingData, compute: ComputeFeatures, max_images: int | None
) -> dict[str, Any]:
    """Fit the classifier of a task, and measure it by cross-validation or on held-out images.

    Return the record of the task for results.json.
    """
    images: Any = data.train  # not streamed
    features = compute(images.draw(max_images), data.label_space)
    with threadpool_limits(limits=1):  # the matrices are small
        probe.fit(features.get_tokens(), features.labels, features.groups)

    record = {
        "kind": "task",
        "reads": describe_tokens(probe.candidate_.tokens),
        "temperature": round(probe.temperature_, 4),
        **build_probe_record(probe, len(features.labels)),
        "dataset": strip_folders(data.name),
        "label_column": list(data.label_space.columns),
        "held_out_images": data.held_out_name,
    }
    if len(data.held_out):
        held_out = compute(data.held_out, data.label_space)
        is_right = probe.predict(held_out.get_tokens()) == held_out.labels
        record["result"] = build_result("accuracy", is_right, held_out.groups, "held-out")
    elif probe.estimate_ is not None:
        record["result"] = {
            **probe.estimate_.to_metrics(),
            "num_images": len(features.groups),
            "num_groups": len(np.unique(features.groups)),
            "images": "cross-validated",
        }
    return record


def append_probe(model: Any, name: str, probe: LinearProbe, labels: list[str]) -> Any:
    """Append a fitted probe as a task. Labels without training images are never predicted."""
    weight, bias = build_linear(probe, len(labels))
    return append_head(model, name, build_head(probe.candidate_.tokens, labels), weight, bias)


# Classes ------------------------------------------------------------------------------------------


def add_classes_from_options(options: AddClassOptions) -> dict[str, Any]:
    """Add classes, write the model folder, and return the record of the classes.

    Raises:
        ValueError, OSError: if the model or the data cannot be read, if the model has one of the
            classes, or no class statistics. Nothing is written then.
    """
    folder, model, processor, compute = open_old_model(options, has_logits=True)
    statistics = ClassStatistics.from_model(model)
    if statistics is None:
        raise ValueError(
            f"{options.model} has no class statistics, which a classifier with one label per image "
            f"needs for another class. Run vitcls finetune --model {options.model}, which stores "
            "them, or add a task with vitcls add-task"
        )
    old_names = get_label_space(model.config).names
    label_space, images = select_new_images(load_splits(options), options.dataset, old_names)
    splits = build_splits_table({"train": images})
    if num_trained := int(find_trained_images(images, read_splits(folder)).sum()):
        warn_on_first_process(
            f"{num_trained:,} of the {len(images):,} images of the new classes trained "
            f"{options.model} as other classes, and are still in their means. Repeat its run "
            "without them"
        )

    with create_output_folder(options.output_dir, "output_dir") as staging:
        features = compute(images, label_space)
        extended, record = add_classes(model, statistics, features, label_space.names)
        record["dataset"] = strip_folders(options.dataset)
        record |= measure_cost(model, extended)
        records = {next(reversed(extended.config.extra_heads)): record}
        certificate = write_model(folder, extended, processor, staging, records, images, splits)
    print_addition(
        f"means of the classes, {record['reads']}", record, certificate, options.output_dir
    )
    return record


def select_new_images(
    splits: Splits, dataset: str, old_names: list[str]
) -> tuple[LabelSpace, LabeledImages]:
    """Select the training images of the new classes, labeled among all classes."""
    new_space = splits.label_space
    check_has_one_label(new_space, dataset)
    if known := sorted(set(new_space.names) & set(map(normalize_name, old_names))):
        raise ValueError(
            f"the model has the class {known[0]!r} already. Remove its images from `dataset`"
        )
    names = [*old_names, *new_space.names]
    warn_about_similar_classes(f"{dataset} and the model", names)

    images = add_keys(splits.images_by_split)
    check_contradictions(list(images.values()), new_space, dataset)
    train = images[choose_training_splits(False, images)[0]]
    label_space = OneLabel({"label": names})
    return label_space, translate_labels(train, new_space, label_space)


def add_classes(
    model: Any, statistics: ClassStatistics, features: Features, names: list[str]
) -> tuple[Any, dict[str, Any]]:
    """Add classes to a classifier, and cross-validate how many of their images it recognizes.

    Args:
        model: classifier of the first C of the classes.
        statistics: of these C classes.
        features: of images of the others, with the logits of the model as the last columns.
        names: of all classes.

    Returns:
        The extended model, and the record of the classes for results.json.
    """
    num_old = len(statistics.counts)
    extended_statistics = statistics.extend(features.get_tokens(), features.labels, len(names))
    missing = np.flatnonzero(extended_statistics.counts[num_old:] == 0)
    if len(missing):
        raise ValueError(
            f"the class {names[num_old + missing[0]]!r} has no images. Add images, or remove the "
            "class"
        )

    weight, bias = build_rows(statistics, features, len(names))
    head = build_head(statistics.tokens, names[num_old:]) | {"adds_classes": True}
    name = f"added_classes_{len(model.config.get_added_classes()) + 1:03d}"
    extended = append_head(model, name, head, weight, bias)
    extended_statistics.set_in_model(extended)
    # Of the weights before they were rounded or merged: the old statistics keep their bits.
    extended.class_distance.fingerprint.copy_(model.class_distance.fingerprint)

    record = {
        "kind": "classes",
        "labels": names[num_old:],
        "num_new_images": len(features.labels),
        "reads": describe_tokens(statistics.tokens),
    }
    is_right = cross_validate(statistics, features, len(names))
    if is_right is not None:
        record["result"] = build_result("recall", is_right, features.groups, "cross-validated")
    return extended, record


def build_rows(
    statistics: ClassStatistics, features: Features, num_labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Build a row for the mean of each new class, between the logits of the classifier.

    If the classifier was trained further, its logits have another mean and scale than logits from
    the statistics. The row of a new class is therefore shifted and scaled, by how the logits of the
    old classes differ on the new images.

    Args:
        statistics: of the C old classes.
        features: of the new images, with C logits as the last columns.
        num_labels: number C + L of classes.

    Returns:
        Weight [L, F] and bias [L], which is minus infinity for a class without images.
    """
    num_old = len(statistics.counts)
    known = np.flatnonzero(statistics.counts)
    tokens = features.get_tokens()
    old_weight, old_bias = statistics.build_classifier()
    own = (stack_tokens(tokens, statistics.tokens) @ old_weight.T + old_bias)[:, known]
    logits = features.values[:, -num_old:][:, known].astype(np.float64)
    scale = np.sqrt(logits.var(axis=1).mean() / own.var(axis=1).mean())

    extended = statistics.extend(tokens, features.labels, num_labels)
    weight, bias = extended.build_new_rows(num_old)
    return scale * weight, logits.mean() + scale * (bias - own.mean())


def cross_validate(
    statistics: ClassStatistics, features: Features, num_labels: int
) -> np.ndarray | None:
    """Find out which new images [N] are recognized by rows that were computed without their group.

    The arguments are as in `build_rows`. Copies of an image are one group. The result is None if
    all images of a class are one group.
    """
    groups, _ = pd.factorize(features.groups)
    labels = features.labels[np.unique(groups, return_index=True)[1]]  # of each group
    # Each class has images in every fold, so the smallest class limits their number.
    num_folds = min(NUM_FOLDS, np.unique(labels, return_counts=True)[1].min())
    if num_folds < 2:
        return None
    logits = features.values[:, -len(statistics.counts) :]
    inputs = stack_tokens(features.get_tokens(), statistics.tokens)
    is_right = np.zeros(len(groups), bool)
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    for _, left_out_groups in folds.split(labels, labels):
        left_out = np.isin(groups, left_out_groups)
        weight, bias = build_rows(statistics, features.take(~left_out), num_labels)
        new_logits = inputs[left_out] @ weight.T + bias
        predicted = np.hstack([logits[left_out], new_logits]).argmax(axis=1)
        is_right[left_out] = predicted == features.labels[left_out]
    return is_right


# Heads and records --------------------------------------------------------------------------------


def build_head(tokens: Sequence[Token], labels: list[str]) -> dict[str, Any]:
    """Build the entry of `config.extra_heads` for a head that reads some tokens."""
    poolings: dict[int, str] = {}
    for layer, kind in tokens:
        poolings[layer] = "cls_mean" if layer in poolings else kind
    return {
        "labels": labels,
        "pooling": list(poolings.values()),
        "pooled_layers": list(poolings),
        "problem_type": SINGLE_LABEL,
    }


def append_head(
    model: Any, name: str, head: dict[str, Any], weight: np.ndarray, bias: np.ndarray
) -> Any:
    """Build the model with another extra head. It takes all other weights from `model`."""
    config = copy.deepcopy(model.config)
    config.extra_heads = {**(config.extra_heads or {}), name: head}
    if head.get("adds_classes"):
        names = [*get_label_space(config).names, *head["labels"]]
        config.id2label = dict(enumerate(names))
        config.label2id = {label: index for index, label in enumerate(names)}
        config.class_statistics = None  # of the old classes; set for all of them afterwards
    extended = model.new_like(config).to(device=model.device, dtype=model.dtype)
    # The old model has no weights for the new head, which are set below.
    extended.load_state_dict(model.state_dict(), strict=False)
    extended.eval()
    linear = extended.extra_heads[f"task_{name}"]
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))
    return extended


def describe_tokens(tokens: Sequence[Token]) -> str:
    """Name the tokens: "last 4 layers, CLS and mean of the patches"."""
    layers = dict.fromkeys(layer for layer, _ in tokens)
    kinds = dict.fromkeys(POOLING_TEXTS[kind] for _, kind in tokens)
    return f"{describe_layers(list(layers))}, {' and '.join(kinds)}"


def build_result(
    metric: str, is_right: np.ndarray, groups: np.ndarray, images: str
) -> dict[str, Any]:
    """Build the record of a proportion of images [N] with its 95% interval.

    A group, such as the copies of an image, counts once. `images` says which images these are.
    """
    _, groups = np.unique(groups, return_inverse=True)
    proportions = np.bincount(groups, is_right) / np.bincount(groups)  # of each group
    num_groups = len(proportions)
    return {
        metric: float(proportions.mean()),
        f"{metric}_interval": compute_proportion_interval(round(proportions.sum()), num_groups),
        "num_images": len(is_right),
        "num_groups": num_groups,
        "images": images,
    }


def format_result(record: dict[str, Any]) -> str:
    """Describe the result of an addition."""
    result = record.get("result")
    if result is None:
        return "not measured, because a class has one image"
    metric = next(iter(result))
    interval = "no interval"
    if f"{metric}_interval" in result:
        low, high = result[f"{metric}_interval"]
        interval = f"95% interval: {low:.1%} to {high:.1%}"
    num_images = result["num_images"]
    groups = f" in {result['num_groups']:,} groups" if result["num_groups"] < num_images else ""
    return (
        f"{metric} {result[metric]:.1%} ({interval}), {num_images:,} "
        f"{result['images']} images{groups}"
    )


def measure_cost(old: Any, new: Any) -> dict[str, Any]:
    """Count what an addition costs in each forward pass, and its parameters."""
    old_flops = old.flops()
    new_flops = new.flops()
    return {
        "flops": new_flops - old_flops,
        "relative_flops": round((new_flops - old_flops) / old_flops, 6),
        "num_parameters": new.num_parameters() - old.num_parameters(),
    }


def print_addition(
    head: str, record: dict[str, Any], certificate: dict[str, Any], output: Path
) -> None:
    """Print what was added; `head` says how its classifier was made."""
    lines = {
        "head": head,
        "result": format_result(record),
        "cost": f"{format_small_percent(record['relative_flops'])} of the forward pass (FLOPs), "
        f"{record['num_parameters']:,} parameters",
        "certificate": describe_certificate(certificate),
        "written": output,
    }
    for name, text in lines.items():
        print(f"{name:12} {text}")


def write_model(
    folder: ModelFolder,
    model: Any,
    processor: ViTCLSImageProcessor,
    staging: Path,
    records: dict[str, Any],
    images: Any,
    new_splits: pd.DataFrame,
) -> dict[str, Any]:
    """Write the extended model, and certify that the outputs of the old one are unchanged.

    Args:
        folder: the old model.
        model: the extended one.
        processor: the image processor of both.
        staging: folder for its files.
        records: of the addition, for results.json.
        images: images to compare the outputs with.
        new_splits: rows of splits.parquet about the addition.

    Returns:
        The certificate.

    Raises:
        ValueError: at the first difference.
    """
    with silence_transformers():
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        # Both models are read from their files: what is certified is what is written. The files are
        # still in the hidden folder, so a difference leaves no model behind.
        certificate = certify(folder, staging, read_pixels(images, processor))
    hashes = {"weights_sha256": hash_weights(staging)}
    write_json(staging / CERTIFICATE_FILE, hashes | certificate)

    if folder.results and (folder.path / RECIPE_FILE).is_file():
        shutil.copyfile(folder.path / RECIPE_FILE, staging / RECIPE_FILE)
    provenance = folder.provenance
    results = {
        "versions": get_versions(),
        **folder.results,
        **hashes,
        "settings_sha256": hash_settings(staging),
        "provenance": None if provenance is None else provenance.copy_to(staging),
        ADDITIONS_KEY: folder.results.get(ADDITIONS_KEY, {}) | records,
    }
    write_json(staging / RESULTS_FILE, results)
    write_splits(pd.concat([read_splits(folder), new_splits]), staging)
    return certificate
