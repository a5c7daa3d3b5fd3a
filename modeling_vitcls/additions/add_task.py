"""`vitcls add-task`: another label column, as a head that reads the frozen encoder (see extend.py)."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ..data.dataset import Dataset
from ..data.splits import TrainingData, divide_images, load_undivided_images
from ..data.splits_table import list_encoder_rows
from ..evaluation.evaluator import build_rows, count_in_trained_scenes, measure_left_out
from ..frozen.heads import FrozenHead
from ..frozen.linear_probe import LinearProbe, describe_candidate
from ..frozen.scenes import TrainedScenes
from ..hub.local_paths import strip_folders
from ..inference.features import Features
from ..model.configuration_vitcls import RESERVED_OUTPUT_NAMES, ViTCLSConfig
from ..model.modeling_vitcls import ViTCLSImageClassifierOutput
from ..runtime.errors import warn_on_first_process
from ..speed.packed import count_output_tokens
from .extend import Addition, OldModel, append_head, check_has_one_label
from .options import AddTaskOptions
from .records import build_result


def build_task(old: OldModel, options: AddTaskOptions) -> Addition:
    """Fit the classifier of a task, and measure it by cross-validation or on held-out images.

    Raises:
        ValueError, OSError: if the data cannot be read, or if the name is taken.
    """
    check_name(options.name, old.model.config)
    images = load_undivided_images(options)
    label_space = images.label_space
    check_has_one_label(label_space, images.name)
    train: Any = images.train.draw(options.max_images)
    features = old.compute_features(train, label_space)
    features, limit, scenes_record = old.keep_scenes_together(train, features, label_space)
    split, *_ = images.images_by_split
    images = replace(images, images_by_split={**images.images_by_split, split: train})
    data, features, held_out = divide(old, images, features, options.held_out_fraction or 0.0)
    scenes = TrainedScenes.of(features, limit)

    # A classifier on CLS does not compute the patches of the last layer. A head on them would
    # compute this layer again for all tokens: about 8% of a forward pass instead of 2%.
    has_patches = count_output_tokens(old.model.vitcls) is None
    probe = LinearProbe(pooling=None if has_patches else "cls")
    readable = {
        (layer, kind): values
        for (layer, kind), values in features.get_tokens().items()
        if kind != "distillation"  # Extra heads do not read it
    }
    with threadpool_limits(limits=1):  # The matrices are small
        is_counted = train.is_counted[features.indices]
        probe.fit(readable, features.labels, features.groups, is_counted)
    tokens = probe.candidate_.tokens
    weight, bias = probe.build_linear(len(label_space.names))
    choice = probe.build_record(len(features.labels))
    record: dict[str, Any] = {
        "kind": "task",
        "reads": describe_candidate(choice),
        **choice,
        "dataset": strip_folders(data.name),
        "label_column": list(label_space.columns),
        "scenes": scenes_record,
    }

    head = FrozenHead(options.name, probe, tokens, label_space, features, held_out)
    predictions = measure_left_out(head)
    rows = None
    if predictions is not None:
        rows = build_rows(predictions)
        record["result"] = build_result("accuracy", predictions, head.num_folds)
        if options.answers:
            record["result"].update(data.build_counted_record())
        if num_seen := data.count_seen(list_encoder_rows(old.folder)):
            del record["result"]["accuracy_interval"]
            warn_on_first_process(
                f"the encoder of {options.model} was trained on {num_seen:,} of the images that measure the "
                "task, or the task on copies of them, so the accuracy is higher than for new images"
            )
        if data.held_out_split is not None:  # The splits of a dataset may divide scenes
            record["in_trained_scenes"] = count_in_trained_scenes(
                scenes.recognize(held_out), predictions
            )

    extended = append_head(old.model, options.name, tokens, label_space.names, weight, bias)
    parts = {"train": data.train, "test": data.held_out}
    trained_scenes = {**old.trained_scenes, options.name: scenes}
    return Addition(extended, record, parts, trained_scenes, rows)


def divide(
    old: OldModel, images: Dataset, features: Features, held_out_fraction: float
) -> tuple[TrainingData, Features, Any]:
    """Divide the images when their scenes are known: each of them is on one side.

    Returns:
        The images, the features of the training images, and of the held-out images or None. The
        images of a split for evaluation pass the model now.
    """
    groups = np.array(images.train.groups)
    groups[features.indices] = features.groups
    data = divide_images(images, held_out_fraction, groups=groups)
    if data.held_out_split is not None:
        return data, features, old.compute_features(data.held_out, data.label_space)
    if not len(data.held_out):
        return data, features, None
    is_trained, is_held_out = (
        np.isin(features.indices, places) for places in (data.train_indices, data.held_out_indices)
    )
    return data, features.take(is_trained), features.take(is_held_out)


def check_name(name: str, config: ViTCLSConfig) -> None:
    """Raise ValueError if an output of the model has a name."""
    outputs = [field.name for field in fields(ViTCLSImageClassifierOutput)]
    if name in (*RESERVED_OUTPUT_NAMES, *outputs, *config.get_extra_heads(), *(config.tasks or ())):
        raise ValueError(
            f"`name={name!r}`: the model has an output with this name. Choose another `name`"
        )
