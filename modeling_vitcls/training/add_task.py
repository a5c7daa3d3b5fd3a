"""`vitcls add-task`: another label column, as a head that reads the frozen encoder (see extend.py)."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ..data.splits import TrainingData, load_training_data
from ..data.splits_table import list_encoder_rows
from ..hub.local_paths import strip_folders
from ..inference.linear_probe import LinearProbe
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.extra_heads_vitcls import RESERVED_OUTPUT_NAMES
from ..model.modeling_vitcls import ViTCLSImageClassifierOutput, count_output_tokens
from ..runtime.errors import warn_on_first_process
from ..runtime.staging import create_output_folder
from .extend import (
    OldModel,
    append_head,
    build_head,
    build_result,
    check_has_one_label,
    describe_tokens,
    open_old_model,
)
from .options import AddTaskOptions
from .probe import build_linear, build_probe_record


def add_task(options: AddTaskOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add a task, write the model folder, and return the record of the task and the certificate.

    Raises:
        ValueError, OSError: if the model or the data cannot be read, the name is taken, or another
            output would change. Nothing is written then.
    """
    old = open_old_model(options)
    check_name(options.name, old.model.config)
    data = load_training_data(replace(options, held_out_fraction=options.held_out_fraction or 0.0))
    check_has_one_label(data.label_space, data.name)

    with create_output_folder(options.output_dir, "output_dir") as staging:
        # A classifier on CLS does not compute the patches of the last layer. A head on them would
        # compute this layer again for all tokens: about 8% of a forward pass instead of 2%.
        has_patches = count_output_tokens(old.model.vitcls, None, {}) is None
        probe = LinearProbe(pooling=None if has_patches else "cls")
        record = fit_task(probe, data, old, options.max_images)
        if num_seen := data.count_seen(list_encoder_rows(old.folder)):
            record.get("result", {}).pop("accuracy_interval", None)
            warn_on_first_process(
                f"{num_seen:,} of the images that measure the task trained the encoder of "
                f"{options.model}, so the accuracy is higher than for new images"
            )

        labels = data.label_space.names
        head = build_head(probe.candidate_.tokens, labels)
        weight, bias = build_linear(probe, len(labels))
        extended = append_head(old.model, options.name, head, weight, bias)
        splits = data.build_splits_table(options.name)
        return old.write(extended, record, data.train, splits, staging)


def check_name(name: str, config: ViTCLSConfig) -> None:
    """Raise ValueError if an output of the model has a name."""
    outputs = [field.name for field in fields(ViTCLSImageClassifierOutput)]
    if name in (*RESERVED_OUTPUT_NAMES, *outputs, *config.get_extra_heads(), *(config.tasks or ())):
        raise ValueError(
            f"`name={name!r}`: the model has an output with this name. Choose another `name`"
        )


def fit_task(
    probe: LinearProbe, data: TrainingData, old: OldModel, max_images: int | None
) -> dict[str, Any]:
    """Fit the classifier of a task, and measure it by cross-validation or on held-out images.

    Return the record of the task for results.json.
    """
    features = old.compute_features(data.train.draw(max_images), data.label_space)
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
        held_out = old.compute_features(data.held_out, data.label_space)
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
