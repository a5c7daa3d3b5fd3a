"""An old model is opened, gets a head, and is written again, with its other outputs equal to the bit.

    task      images -> frozen encoder, once -> LinearProbe -> extra head
    class     images -> frozen encoder, once -> mean of the class, class statistics of the model -> one row
              -> model folder with the tensors of the old model -> certificate, or nothing is written

A head only reads the tokens of the finished forward pass (`config.extra_heads`), so the other
outputs keep their bits. Added classes are also a head of their own, and their logits are appended:
one product with more rows would change the bits of the old logits.

add_task.py and add_class.py say what the head is.
"""

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from ..data.image_folder import check_output_is_not_read
from ..data.images import LabeledImages
from ..data.labels import LabelSpace, get_label_space
from ..data.splits_table import read_splits, write_splits
from ..hub.connection import silence_transformers
from ..hub.model_files import (
    ADDITIONS_KEY,
    CERTIFICATE_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    hash_settings,
    hash_weights,
)
from ..hub.model_folder import ModelFolder, open_vitcls
from ..inference.class_statistics import Token
from ..inference.evaluate import set_up_evaluation
from ..inference.frozen_features import FeatureLayout, Features, FrozenPass
from ..inference.intervals import compute_proportion_interval
from ..inference.linear_probe import NUM_LAST_LAYERS, POOLING_TEXTS, describe_layers
from ..inference.metric_tables import format_small_percent
from ..inference.speed import count_flops
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from ..runtime.distributed import set_mixed_precision
from ..runtime.errors import mark_errors_of_all_processes
from ..runtime.files import write_json
from ..runtime.staging import check_output_is_empty
from ..runtime.system import get_versions
from .certificate import certify, describe_certificate, draw_pixels, load_old_model
from .options import AdditionOptions


@dataclass(frozen=True)
class OldModel:
    """A finished model that gets another head."""

    folder: ModelFolder
    model: Any
    processor: ViTCLSImageProcessor
    build_pass: Callable[..., FrozenPass]  # The pass of labeled images through the model
    console: Console

    def compute_features(
        self, images: LabeledImages, label_space: LabelSpace, has_logits: bool = False
    ) -> Features:
        """Compute the features of the images that have a label.

        With `has_logits`, the last columns are the logits of the classifier.
        """
        one_pass = self.build_pass(images, label_space=label_space, has_logits=has_logits)
        features = one_pass(self.model, self.console)
        return features.take(features.labels >= 0)

    def write(
        self,
        extended: Any,
        record: dict[str, Any],
        images: LabeledImages,
        new_splits: pd.DataFrame,
        staging: Path,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write the model with one more head, and certify that no other output has changed.

        Args:
            extended: this model with another head, the last of its extra heads.
            record: of the addition, for results.json.
            images: the outputs of both models are compared with these.
            new_splits: rows for splits.parquet about the addition.
            staging: folder for the files.

        Returns:
            The record with what the head costs, and the certificate.

        Raises:
            ValueError: at the first difference.
        """
        with silence_transformers():
            extended.save_pretrained(staging)
            self.processor.save_pretrained(staging)
            # Both models are read from their files: what is certified is what is written. The files
            # are still in the hidden folder, so a difference leaves no model behind.
            certificate = certify(self.folder, staging, draw_pixels(images, self.processor))
        hashes = {"weights_sha256": hash_weights(staging)}
        write_json(staging / CERTIFICATE_FILE, hashes | certificate)

        old_flops = count_flops(self.model)
        flops = count_flops(extended) - old_flops
        record = record | {
            "flops": flops,
            "relative_flops": round(flops / old_flops, 6),
            "num_parameters": extended.num_parameters() - self.model.num_parameters(),
        }
        folder = self.folder
        if folder.results and (folder.path / RECIPE_FILE).is_file():
            shutil.copyfile(folder.path / RECIPE_FILE, staging / RECIPE_FILE)
        provenance = folder.provenance
        *_, name = extended.config.extra_heads
        results = {
            "versions": get_versions(),
            **folder.results,
            **hashes,
            "settings_sha256": hash_settings(staging),
            "provenance": None if provenance is None else provenance.copy_to(staging),
            ADDITIONS_KEY: folder.results.get(ADDITIONS_KEY, {}) | {name: record},
        }
        write_json(staging / RESULTS_FILE, results)
        write_splits(pd.concat([read_splits(folder), new_splits]), staging)
        return record, certificate


def open_old_model(options: AdditionOptions) -> OldModel:
    """Load the old model and its image processor, and prepare the pass of labeled images.

    Raises:
        ValueError, OSError: if the model cannot be read, or the output folder cannot be written.
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
        processor=processor,
        batch_size=options.batch_size,
        accelerator=accelerator,
        num_workers=options.num_workers,
        num_channels=model.config.num_channels,
        warn=warn,
    )
    return OldModel(folder, model, processor, build_pass, console)


def check_has_one_label(label_space: LabelSpace, dataset: str) -> None:
    """Raise ValueError unless a dataset has one label per image."""
    if label_space.kind != "single_label_classification":
        raise ValueError(
            f"one label per image is required, but {dataset} has labels for {label_space.kind}. "
            "Set `label_column` to a column with one label per image"
        )


# The head, and its records ------------------------------------------------------------------------


def build_head(tokens: Sequence[Token], labels: list[str]) -> dict[str, Any]:
    """Build the entry of `config.extra_heads` for a head that reads some tokens."""
    poolings: dict[int, str] = {}
    for layer, kind in tokens:
        poolings[layer] = "cls_mean" if layer in poolings else kind
    return {
        "labels": labels,
        "pooling": list(poolings.values()),
        "pooled_layers": list(poolings),
        "problem_type": "single_label_classification",
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
    extended = model.new_like(config).to(device=model.device, dtype=model.dtype).eval()
    # The old model has no weights for the new head, which are set below.
    extended.load_state_dict(model.state_dict(), strict=False)
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
    proportions = pd.Series(is_right).groupby(groups).mean()  # The share of each group
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


def describe_addition(
    head: str, record: dict[str, Any], certificate: dict[str, Any], output: Path
) -> str:
    """Describe what was added, one line each; `head` says how its classifier was made."""
    lines = {
        "head": head,
        "result": format_result(record),
        "cost": f"{format_small_percent(record['relative_flops'])} of the forward pass (FLOPs), "
        f"{record['num_parameters']:,} parameters",
        "certificate": describe_certificate(certificate),
        "written": output,
    }
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())
