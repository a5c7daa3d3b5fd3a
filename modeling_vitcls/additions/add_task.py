"""`vitcls add-task`: another label column, as a head that reads the frozen encoder (see extend.py)."""

from dataclasses import fields
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ..data.splits import divide_images, load_undivided_images
from ..data.splits_table import list_encoder_rows
from ..hub.local_paths import strip_folders
from ..inference.class_statistics import expand_rows
from ..inference.linear_probe import LinearProbe, describe_candidate
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.extra_heads_vitcls import RESERVED_OUTPUT_NAMES
from ..model.modeling_vitcls import ViTCLSImageClassifierOutput, count_output_tokens
from ..runtime.errors import warn_on_first_process
from .extend import (
    Addition,
    OldModel,
    append_head,
    build_result,
    check_has_one_label,
    list_left_out,
)
from .options import AddTaskOptions


def build_task(old: OldModel, options: AddTaskOptions) -> Addition:
    """Fit the classifier of a task, and measure it by cross-validation or on held-out images.

    Raises:
        ValueError, OSError: if the data cannot be read, or if the name is taken.
    """
    check_name(options.name, old.model.config)
    data = divide_images(load_undivided_images(options), options.held_out_fraction or 0.0)
    num_seen = data.count_seen(list_encoder_rows(old.folder))
    label_space = data.label_space
    check_has_one_label(label_space, data.name)
    # A classifier on CLS does not compute the patches of the last layer. A head on them would
    # compute this layer again for all tokens: about 8% of a forward pass instead of 2%.
    has_patches = count_output_tokens(old.model.vitcls, None, {}) is None
    probe = LinearProbe(pooling=None if has_patches else "cls")
    features = old.compute_features(data.train.draw(options.max_images), label_space)
    with threadpool_limits(limits=1):  # The matrices are small
        probe.fit(features.get_tokens(), features.labels, features.groups)

    weight, bias = probe.build_linear(len(label_space.names))
    choice = probe.build_record(len(features.labels))
    record: dict[str, Any] = {
        "kind": "task",
        "reads": describe_candidate(choice),
        **choice,
        "dataset": strip_folders(data.name),
        "label_column": list(label_space.columns),
    }
    rows = None
    if len(data.held_out):
        held_out = old.compute_features(data.held_out, label_space)
        is_right = probe.predict(held_out.get_tokens()) == held_out.labels
        record["result"] = build_result("accuracy", is_right, held_out.groups, "held-out")
    elif probe.estimate_ is not None:
        is_known = np.isfinite(probe.losses_)
        known = features.take(is_known)
        left_out = probe.out_of_fold_[is_known].T
        probabilities = expand_rows(left_out, probe.classes_, len(label_space.names)).T
        tokens = probe.candidate_.tokens
        rows = list_left_out(known, tokens, known.labels, probabilities, label_space.names)
        is_right = probabilities.argmax(axis=1) == known.labels
        record["result"] = build_result("accuracy", is_right, known.groups, "cross-validated")
        record["result"] |= probe.estimate_.to_metrics()  # Corrected for the choice
    if num_seen:
        record.get("result", {}).pop("accuracy_interval", None)
        warn_on_first_process(
            f"{num_seen:,} of the images that measure the task trained the encoder of "
            f"{options.model}, so the accuracy is higher than for new images"
        )

    extended = append_head(
        old.model, options.name, probe.candidate_.tokens, label_space.names, weight, bias
    )
    splits = data.build_splits_table(options.name)
    return Addition(extended, record, data.train, label_space, splits, rows)


def check_name(name: str, config: ViTCLSConfig) -> None:
    """Raise ValueError if an output of the model has a name."""
    outputs = [field.name for field in fields(ViTCLSImageClassifierOutput)]
    if name in (*RESERVED_OUTPUT_NAMES, *outputs, *config.get_extra_heads(), *(config.tasks or ())):
        raise ValueError(
            f"`name={name!r}`: the model has an output with this name. Choose another `name`"
        )
