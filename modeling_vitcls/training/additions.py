"""Tasks and classes that are added to a finished model without changing its other outputs.

    task      images -> frozen encoder, once -> LinearProbe -> extra head
    class     images -> frozen encoder, once -> mean of the class, class statistics of the model -> one row
              -> model folder with the tensors of the old model -> certificate, or nothing is written

A head only reads the tokens of the finished forward pass (`config.extra_heads`), so that the other
outputs keep their bits. Added classes are a head of their own, too, whose logits are appended: one
product with more rows would change the bits of the old ones.

A class needs no images of the old ones (inference/class_statistics.py): its row is the mean of its
images, multiplied by the precision matrix that the old classes share.
"""

import copy
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from rich.console import Console
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from ..conversion.open_model import open_model
from ..data.image_folder import check_output_is_not_read
from ..data.images import LabeledImages
from ..data.label_matching import match_labels
from ..data.labels import LabelSpace, get_label_space
from ..data.options import DataOptions
from ..data.sources import load_splits
from ..data.splits import TrainingData, choose_training_splits, load_training_data
from ..data.splits_table import (
    EMPTY_TABLE,
    build_splits_table,
    find_trained_images,
    read_splits,
    select_task,
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
from ..hub.model_folder import ModelFolder
from ..hub.provenance import Provenance, find_provenance
from ..inference.class_statistics import ClassStatistics, Token
from ..inference.evaluate import set_up_evaluation
from ..inference.frozen_features import (
    FeatureLayout,
    Features,
    FrozenPass,
    concatenate_features,
)
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
from ..model.modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, count_output_tokens
from ..runtime.distributed import set_mixed_precision
from ..runtime.files import write_json
from ..runtime.staging import check_output_is_empty, create_output_folder
from ..runtime.system import get_versions
from .certificate import NUM_IMAGES, certify, describe_certificate, load_old_model, read_pixels
from .options import AddClassOptions, AdditionOptions, AddTaskOptions
from .probe import (
    ABSENT_CLASS_MARGIN,
    MAX_CHOICE_IMAGES,
    build_probe_record,
    describe_probe,
    draw_parts,
)


SINGLE_LABEL: Final = "single_label_classification"
NUM_FOLDS = 10  # that measure the recall of a new class


@dataclass(frozen=True)
class Base:
    """The model to which something is added."""

    folder: ModelFolder
    model: Any  # a classifier; that of an encoder has no labels
    processor: Any
    accelerator: Accelerator
    console: Console
    warn: Any
    options: AdditionOptions

    @property
    def config(self) -> ViTCLSConfig:
        return self.model.config

    def compute_features(
        self, images: LabeledImages, label_space: LabelSpace, with_logits: bool = False
    ) -> Features:
        """Pass images through the model once, and return the features of those with a known label.

        With logits, these are the last columns of the features.
        """
        model = self.model.to(self.accelerator.device).eval()
        frozen_pass = FrozenPass(
            images,
            self.layout,
            has_logits=with_logits,
            processor=self.processor,
            label_space=label_space,
            batch_size=self.options.batch_size,
            accelerator=self.accelerator,
            num_workers=self.options.num_workers,
            max_unreadable_images=self.options.max_unreadable_images,
            num_channels=self.config.num_channels,
            warn=self.warn,
        )
        features = frozen_pass(model, self.console)
        return features.take(features.labels >= 0)

    def get_logits(self, features: Features) -> np.ndarray:
        """Return the logits [N, C] in some features, before the division by the temperature."""
        logits = features.values[:, -(self.config.num_labels or 0) :]
        return logits.astype(np.float64) * self.config.temperature

    @property
    def layout(self) -> FeatureLayout:
        return FeatureLayout.for_extra_heads(self.config, NUM_LAST_LAYERS)

    @property
    def computes_last_patches(self) -> bool:
        """Return whether the model computes the patches of the last layer.

        A classifier on CLS does not. A head on them would compute the layer again for all tokens,
        about 8% of a forward pass, and all other heads cost less than 2%.
        """
        return count_output_tokens(self.model.vitcls, None, {}) is None


@dataclass(frozen=True)
class FittedHead:
    """A head and what is known about it."""

    tokens: tuple[Token, ...]  # that it reads
    weight: np.ndarray  # [L, F]
    bias: np.ndarray  # [L]
    fields: dict[str, Any]  # of `config.extra_heads`
    record: dict[str, Any]  # for results.json
    lines: dict[str, str]  # to print

    def compute_logits(self, features: Features) -> np.ndarray:
        """Return the logits [N, L] of the head, before the division by its temperature."""
        return stack_tokens(features.get_tokens(), self.tokens) @ self.weight.T + self.bias

    def predict(self, features: Features, logits: np.ndarray) -> np.ndarray:
        """Return the label [N] of the highest logit: of the classifier, [N, C], or of the head."""
        return np.concatenate([logits, self.compute_logits(features)], axis=1).argmax(axis=1)


# Tasks --------------------------------------------------------------------------------------------


def add_task_from_options(options: AddTaskOptions) -> dict[str, Any]:
    """Add, replace or remove a task, write the model folder, and return the record of the task.

    Raises:
        ValueError, OSError: if the model or the data cannot be read, the name is taken, or another
            output would change. Nothing is written then.
    """
    check_output_is_empty(options.output_dir, "output_dir")
    check_output_is_not_read(options.output_dir, options.dataset)
    base = load_base(options.model, options)
    check_name(options, base.config)
    changes = (options.remove_task, options.name)
    changed_heads = [name for name in base.config.get_added_tasks() if name in changes]

    data = load_training_data(replace(options, held_out_fraction=options.held_out_fraction or 0.0))
    model = base.model
    for name in changed_heads:
        model = remove_head(model, name)
    additions = base.folder.results.get(ADDITIONS_KEY, {})
    records = {name: value for name, value in additions.items() if name not in changed_heads}
    record = {}
    with create_output_folder(options.output_dir, "output_dir") as folder:
        if options.name is not None:
            head = fit_task(base, data, options)
            extended = append_head(model, options.name, head)
            record = head.record | describe_cost(model, extended)
            print_lines(base.console, head.lines | {"cost": format_cost(record)})
            model = extended
            records[options.name] = record

        splits = EMPTY_TABLE if options.name is None else data.build_splits_table(options.name)
        pixels = read_pixels(data.train, base.processor)  # type: ignore[arg-type]  # not streamed
        line = write_model(base, model, folder, pixels, records, splits, changed_heads)
    print_lines(base.console, {"certificate": line, "written": str(options.output_dir)})
    return record


def load_base(source: str, options: AdditionOptions) -> Base:
    """Load a model, its image processor and the device."""
    accelerator, console, warn = set_up_evaluation(options.mixed_precision)
    folder = open_model(source)
    model = load_old_model(folder)
    if isinstance(model, ViTCLSModel):
        model = build_classifier_without_labels(model)
    set_mixed_precision(accelerator, options.mixed_precision, model.config)
    return Base(folder, model, folder.load_processor(), accelerator, console, warn, options)


def build_classifier_without_labels(encoder: Any) -> Any:
    """Return a classifier whose logits are the pooled vector of an encoder."""
    config = copy.deepcopy(encoder.config)
    config.num_labels = 0
    config.architectures = None
    model = ViTCLSForImageClassification(config).to(encoder.dtype).eval()
    model.vitcls.load_state_dict(encoder.state_dict())
    return model


def check_name(options: AddTaskOptions, config: ViTCLSConfig) -> None:
    """Raise ValueError if the task to remove does not exist, or the new name is taken."""
    names = config.get_added_tasks()
    if options.remove_task is not None and options.remove_task not in names:
        remedy = f"Choose from {', '.join(names)}" if names else "Remove `remove_task`"
        raise ValueError(
            f"`remove_task={options.remove_task!r}`: the model has no such added task. {remedy}"
        )
    if options.name in names and not options.overwrite_task and options.name != options.remove_task:
        raise ValueError(
            f"`name={options.name!r}`: the model has a task with this name. Set "
            "`overwrite_task=True` to replace it, or choose another `name`"
        )
    if options.name in config.get_added_classes() or options.name in (config.tasks or {}):
        raise ValueError(
            f"`name={options.name!r}`: the model has an output with this name. Choose another "
            "`name`"
        )


def fit_task(base: Base, data: TrainingData, options: AddTaskOptions) -> FittedHead:
    """Choose and fit the head of a task, and measure it by cross-validation or on held-out images."""
    check_has_one_label(data.label_space, options.dataset)
    compute = partial(base.compute_features, label_space=data.label_space)
    images: Any = data.train  # not streamed
    first, others = draw_parts(len(images), options.max_images)
    features = compute(images.select(first))
    num_chosen_images = len(features.labels)
    probe = LinearProbe(pooling=None if base.computes_last_patches else "cls")
    with threadpool_limits(limits=1):  # the matrices are small
        probe.fit(features.get_tokens(), features.labels, features.groups)
    if len(others):
        features = concatenate_features(features, compute(images.select(others)))
        probe.refit(features.get_tokens(), features.labels)

    record = build_probe_record(probe, len(features.labels))
    head = build_task_head(probe, data.label_space.names, record)
    if probe.estimate_ is not None:
        measured = {
            "accuracy": probe.estimate_.accuracy,
            "accuracy_interval": probe.estimate_.interval,
            "num_images": num_chosen_images,
        }
        head.lines["cross-validation"] = format_proportion(measured)
        head.record["result"] = measured
    if len(data.held_out):
        held_out = compute(data.held_out)
        is_right = head.compute_logits(held_out).argmax(axis=1) == held_out.labels
        measured = build_proportion("accuracy", is_right)
        head.lines["held out"] = format_proportion(measured)
        head.record["result"] = measured
    record = {
        "dataset": strip_folders(data.name),
        "label_column": list(data.label_space.columns),
        "held_out_images": data.held_out_name,
    }
    return replace(head, record=head.record | record)


def check_has_one_label(label_space: LabelSpace, dataset: str) -> None:
    """Raise ValueError unless a dataset has one label per image."""
    if label_space.kind != SINGLE_LABEL:
        raise ValueError(
            f"one label per image is required, but {dataset} has labels for {label_space.kind}. "
            "Set `label_column` to a column with one label per image"
        )


def build_task_head(probe: LinearProbe, names: list[str], record: dict[str, Any]) -> FittedHead:
    """Return the head of a fitted probe. Labels without training images are never predicted."""
    tokens = probe.candidate_.tokens
    weight = np.zeros((len(names), probe.weight_.shape[1]))
    bias = np.full(len(names), probe.bias_.min() - ABSENT_CLASS_MARGIN)
    weight[probe.classes_] = probe.weight_
    bias[probe.classes_] = probe.bias_
    temperature = round(probe.temperature_, 4)
    return FittedHead(
        tokens=tokens,
        weight=weight,
        bias=bias,
        fields=build_head_fields(tokens, names) | {"temperature": temperature},
        record={"kind": "task", "reads": describe_tokens(tokens), "temperature": temperature}
        | record,
        lines={"head": describe_probe(record)},
    )


def build_head_fields(tokens: Sequence[Token], names: list[str]) -> dict[str, Any]:
    """Return the entry of `config.extra_heads` for a head that reads some tokens."""
    poolings: dict[int, str] = {}
    for layer, kind in tokens:
        poolings[layer] = "cls_mean" if layer in poolings else kind
    return {
        "labels": list(names),
        "pooling": list(poolings.values()),
        "pooled_layers": list(poolings),
        "problem_type": SINGLE_LABEL,
    }


def describe_tokens(tokens: Sequence[Token]) -> str:
    """Return the tokens as text: "last 4 layers, CLS and mean of the patches"."""
    layers = dict.fromkeys(layer for layer, _ in tokens)
    kinds = dict.fromkeys(POOLING_TEXTS[kind] for _, kind in tokens)
    return f"{describe_layers(list(layers))}, {' and '.join(kinds)}"


def build_proportion(name: str, values: np.ndarray) -> dict[str, Any]:
    """Return the proportion of true values, its 95% interval and the number of values."""
    return {
        name: float(values.mean()),
        f"{name}_interval": compute_proportion_interval(int(values.sum()), len(values)),
        "num_images": len(values),
    }


def format_proportion(measured: dict[str, Any]) -> str:
    """Return a result of `build_proportion` as text."""
    name = next(iter(measured))
    low, high = measured[f"{name}_interval"]
    text = f"{name.replace('_', ' ')} {measured[name]:.1%} (95% interval: {low:.1%} to {high:.1%})"
    return f"{text}, {measured['num_images']:,} images"


# Model --------------------------------------------------------------------------------------------


def append_head(
    model: Any, name: str, head: FittedHead, id2label: dict[int, str] | None = None
) -> Any:
    """Return the model with another extra head. The other weights are those of `model`."""
    config = copy.deepcopy(model.config)
    if id2label is not None:
        config.id2label = id2label
        config.label2id = {label: index for index, label in id2label.items()}
        config.class_statistics = (
            None  # of the old classes; those of all classes are set afterwards
        )
    config.extra_heads = {**(config.extra_heads or {}), name: head.fields}
    extended = rebuild(model, config)
    linear = extended.extra_heads[f"task_{name}"]
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(head.weight))
        linear.bias.copy_(torch.from_numpy(head.bias))
    return extended


def remove_head(model: Any, name: str) -> Any:
    """Return the model without one of its extra heads."""
    config = copy.deepcopy(model.config)
    config.extra_heads = {
        key: fields for key, fields in config.extra_heads.items() if key != name
    } or None
    return rebuild(model, config)


def rebuild(model: Any, config: ViTCLSConfig) -> Any:
    """Return a model with another configuration and the weights of `model` that it has, too."""
    rebuilt = model.new_like(config).to(device=model.device, dtype=model.dtype).eval()
    weights = model.state_dict()
    rebuilt.load_state_dict(
        {name: weights[name] for name in rebuilt.state_dict() if name in weights}, strict=False
    )
    return rebuilt


def describe_cost(old: Any, new: Any) -> dict[str, Any]:
    """Return what an addition costs in each forward pass, and its number of parameters."""
    old_flops = old.flops()
    new_flops = new.flops()
    return {
        "flops": new_flops - old_flops,
        "relative_flops": round((new_flops - old_flops) / old_flops, 6),
        "num_parameters": new.num_parameters() - old.num_parameters(),
    }


def format_cost(record: dict[str, Any]) -> str:
    return (
        f"{format_small_percent(record['relative_flops'])} of the forward pass (FLOPs), "
        f"{record['num_parameters']:,} parameters"
    )


def write_model(
    base: Base,
    model: Any,
    folder: Path,
    pixels: Sequence[torch.Tensor],
    records: dict[str, Any],
    new_splits: pd.DataFrame,
    changed_heads: Collection[str] = (),
) -> str:
    """Write the model and the certificate that the other outputs are unchanged.

    `new_splits` are the rows of splits.parquet about the addition. Return the certificate as a
    line. Raise ValueError at the first difference.
    """
    with silence_transformers():
        model.save_pretrained(folder)
        base.processor.save_pretrained(folder)
        certificate = certify(
            base.folder.path,
            folder,
            strip_folders(base.folder.source),
            pixels,
            base.accelerator.device,
            changed_heads,
        )
    hashes = {"weights_sha256": hash_weights(folder)}
    write_json(folder / CERTIFICATE_FILE, hashes | certificate)
    recipe = base.folder.path / RECIPE_FILE
    if base.folder.results and recipe.is_file():
        shutil.copyfile(recipe, folder / RECIPE_FILE)
    provenance = copy_provenance(base, folder)
    results = {"versions": get_versions()} | base.folder.results
    additions = {"provenance": provenance, ADDITIONS_KEY: records}
    hashes["settings_sha256"] = hash_settings(folder)
    write_json(folder / RESULTS_FILE, results | hashes | additions)
    splits = read_splits(base.folder)
    kept = splits[~splits["task"].isin(changed_heads)]
    write_splits(pd.concat([kept, new_splits]), folder)
    return describe_certificate(certificate)


def copy_provenance(base: Base, folder: Path) -> dict[str, Any] | None:
    """Copy the license of the weights, and return their provenance.

    Returns None for weights that were trained from scratch.
    """
    if "provenance" not in base.folder.results:
        provenance = find_provenance(base.folder.source)
    elif base.folder.results["provenance"] is None:
        return None
    else:
        provenance = Provenance.from_dict(base.folder.results["provenance"], base.folder.path)
    provenance.copy_license(folder)
    return provenance.to_dict()


def print_lines(console: Console, lines: dict[str, str]) -> None:
    for name, text in lines.items():
        console.print(f"{name:17} {text}", markup=False)


# Classes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OldImages:
    """Images of the old classes, from `old_dataset`."""

    fitted: LabeledImages  # for class statistics, if the model has none
    measured: LabeledImages  # for what the old classes lose; the model was not trained on them
    description: str


def add_classes_from_options(options: AddClassOptions) -> dict[str, Any]:
    """Add classes, write the model folder, and return the record of the classes.

    Raises:
        ValueError, OSError: if the model or the data cannot be read, if a class exists already, if
            there are no class statistics, or if the old classes lose more than `max_old_loss`
            points. Nothing is written.
    """
    check_output_is_empty(options.output_dir, "output_dir")
    check_output_is_not_read(options.output_dir, options.dataset)
    base = load_base(options.model, options)
    label_space = get_label_space(base.config)
    num_old = base.config.num_labels or 0
    is_classifier = isinstance(base.model, ViTCLSForImageClassification) and num_old > 1
    if not is_classifier or label_space.kind != SINGLE_LABEL:
        raise ValueError(
            f"classes can be added to a classifier with one label per image, but {options.model} "
            "is none. Add a task with `vitcls add-task`"
        )
    new_space, new_images, new_held_out = load_new_images(options, label_space)
    names = new_space.names[num_old:]
    old_images = None
    if options.old_dataset is not None:
        old_images = load_old_images(base, options, label_space)

    with create_output_folder(options.output_dir, "output_dir") as folder:
        compute = partial(base.compute_features, with_logits=True)
        statistics = find_statistics(base, old_images, label_space)
        new = compute(new_images, new_space)
        head = build_class_head(statistics, new, base.get_logits(new), names)
        if new_held_out is not None:
            held_out = compute(new_held_out, new_space)
            is_right = head.predict(held_out, base.get_logits(held_out)) == held_out.labels
        else:
            is_right = cross_validate(statistics, new, base.get_logits(new), names)
        record = head.record | {"dataset": strip_folders(options.dataset)}
        if len(is_right):
            record["result"] = build_proportion("recall", is_right)
            head.lines["new classes"] = format_proportion(record["result"])
        if old_images is not None:
            old = compute(old_images.measured, label_space)
            loss = measure_old_loss(head, old, base.get_logits(old))
            check_old_loss(loss, options.max_old_loss)
            record |= {"old_classes": loss, "old_images": old_images.description}
            head.lines["old classes"] = format_proportion(loss)

        head_name = f"added_classes_{len(base.config.get_added_classes()) + 1:03d}"
        model = append_head(base.model, head_name, head, dict(enumerate(new_space.names)))
        extend_statistics(statistics, new).set_in_model(model)
        record |= describe_cost(base.model, model)
        print_lines(base.console, head.lines | {"cost": format_cost(record)})

        num_new_pixels = NUM_IMAGES if old_images is None else NUM_IMAGES // 4
        pixels = read_pixels(new_images, base.processor, num_new_pixels)
        if old_images is not None:
            pixels += read_pixels(old_images.measured, base.processor, NUM_IMAGES - len(pixels))
        records = base.folder.results.get(ADDITIONS_KEY, {}) | {head_name: record}
        splits = build_splits_table({"train": new_images, "test": new_held_out})
        line = write_model(base, model, folder, pixels, records, splits)
    print_lines(base.console, {"certificate": line, "written": str(options.output_dir)})
    return record


def load_new_images(
    options: AddClassOptions, label_space: LabelSpace
) -> tuple[LabelSpace, LabeledImages, LabeledImages | None]:
    """Return the old and new classes, images of the new classes, and held-out images, if any."""
    splits = load_splits(options)
    check_has_one_label(splits.label_space, options.dataset)
    names = splits.label_space.names
    if known := sorted(set(names) & set(label_space.names)):
        raise ValueError(
            f"the model has the class {known[0]!r} already. Remove its images from `dataset`"
        )
    new_space = LabelSpace(SINGLE_LABEL, {"label": [*label_space.names, *names]})
    training_splits = choose_training_splits(splits.names, use_selection_split=False)
    images = splits.images_by_split
    train = match_labels(images[training_splits.train], splits.label_space, new_space)
    held_out = None
    if training_splits.held_out is not None:
        held_out = match_labels(images[training_splits.held_out], splits.label_space, new_space)
    return new_space, train, held_out


def load_old_images(base: Base, options: AddClassOptions, label_space: LabelSpace) -> OldImages:
    """Load the images of the old classes.

    The measured ones are the validation or test split or, if there is only one split, the images
    that training held out. If it held out none, they are a random half.
    """
    assert options.old_dataset is not None
    data_options = DataOptions(dataset=options.old_dataset, num_workers=options.num_workers)
    splits = load_splits(data_options)
    check_has_one_label(splits.label_space, options.old_dataset)
    names = splits.label_space.names

    def take_known(split: str) -> LabeledImages:
        images = splits.images_by_split[split]
        known = [
            index
            for index, label in enumerate(images.labels)
            if label >= 0 and names[label] in label_space.index_by_name["label"]
        ]
        return images.select(known)

    training_splits = choose_training_splits(splits.names, use_selection_split=False)
    fitted = take_known(training_splits.train)
    if training_splits.held_out is not None:
        measured = take_known(training_splits.held_out)
        part_text = f"split {training_splits.held_out!r}"
    else:
        seen = select_task(read_splits(base.folder), None)
        is_measured = ~find_trained_images(fitted, seen)
        part_text = "without training images"
        if is_measured.all() or not is_measured.any():
            is_measured = np.random.default_rng(0).permutation(len(fitted)) % 2 == 0
            part_text = "a random half"
        measured = fitted.select(np.flatnonzero(is_measured).tolist())
        fitted = fitted.select(np.flatnonzero(~is_measured).tolist())
    if not len(measured):
        raise ValueError(
            f"{options.old_dataset} has no image of an old class that the model was not trained "
            "on. Set `old_dataset` to other images, or remove it"
        )
    fitted, measured = (
        match_labels(images.draw(MAX_CHOICE_IMAGES), splits.label_space, label_space)
        for images in (fitted, measured)
    )
    dataset = strip_folders(options.old_dataset)
    return OldImages(fitted, measured, f"{len(measured):,} images of {dataset} ({part_text})")


def find_statistics(
    base: Base, old_images: OldImages | None, label_space: LabelSpace
) -> ClassStatistics:
    """Return the class statistics of the model or, if it has none, those of the old images.

    Raise ValueError without both.
    """
    statistics = ClassStatistics.from_model(base.model)
    if statistics is not None:
        return statistics
    if old_images is None:
        raise ValueError(
            f"{base.folder.source} has no class statistics. Set `old_dataset` to images of its "
            "classes, from which they are computed, or run `vitcls finetune` again"
        )
    features = base.compute_features(old_images.fitted, label_space)
    tokens = features.get_tokens()
    if not base.computes_last_patches:
        del tokens[-1, "mean"]
    return ClassStatistics.fit(tokens, features.labels, len(label_space.names))


def extend_statistics(statistics: ClassStatistics, features: Features) -> ClassStatistics:
    """Return the statistics with the means of the new classes, whose labels follow the old ones."""
    tokens = features.get_tokens()
    for label in range(len(statistics.counts), features.labels.max() + 1):
        in_class = features.labels == label
        statistics = statistics.extend({name: tokens[name][in_class] for name in statistics.tokens})
    return statistics


def build_class_head(
    statistics: ClassStatistics, features: Features, logits: np.ndarray, names: list[str]
) -> FittedHead:
    """Return a row for the mean of each new class, between the logits of the classifier.

    Unless the classifier is that of the statistics, its logits have another mean and scale than
    theirs. The row of a class is therefore moved and scaled as the logits of the old classes are,
    for the new images.

    Args:
        statistics: of the C old classes.
        features: of the new images; their labels start at C.
        logits: [N, C] of the classifier, before the division by its temperature.
        names: of the new classes.
    """
    known = np.flatnonzero(statistics.counts)
    tokens = features.get_tokens()
    weight, bias = statistics.build_classifier()
    own = (stack_tokens(tokens, statistics.tokens) @ weight.T + bias)[:, known]
    logits = logits[:, known]
    scale = center(logits).std() / center(own).std()

    rows = []
    biases = []
    num_old = len(statistics.counts)
    for index, name in enumerate(names):
        in_class = features.labels == num_old + index
        if not in_class.any():
            raise ValueError(f"the class {name!r} has no images. Add images, or remove the class")
        row, row_bias = statistics.add_class(
            {token: array[in_class] for token, array in tokens.items()}
        )
        rows.append(scale * row)
        biases.append(logits.mean() + scale * (row_bias - own.mean()))

    return FittedHead(
        tokens=statistics.tokens,
        weight=np.stack(rows),
        bias=np.array(biases),
        fields=build_head_fields(statistics.tokens, names) | {"adds_classes": True},
        record={
            "kind": "classes",
            "labels": names,
            "num_new_images": len(features.labels),
            "reads": describe_tokens(statistics.tokens),
        },
        lines={"head": f"means of the classes, {describe_tokens(statistics.tokens)}"},
    )


def center(logits: np.ndarray) -> np.ndarray:
    """Subtract the mean of each image from its logits [N, C]."""
    return logits - logits.mean(axis=1, keepdims=True)


def cross_validate(
    statistics: ClassStatistics, features: Features, logits: np.ndarray, names: list[str]
) -> np.ndarray:
    """Return whether each new image is recognized by rows that were computed without it.

    The arguments are those of `build_class_head`. Returns an empty array if a class has one image.
    """
    num_folds = min(NUM_FOLDS, np.unique(features.labels, return_counts=True)[1].min())
    if num_folds < 2:
        return np.zeros(0, bool)
    is_right = np.zeros(len(features.labels), bool)
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    for train, test in folds.split(features.labels, features.labels):
        head = build_class_head(statistics, features.take(train), logits[train], names)
        is_right[test] = head.predict(features.take(test), logits[test]) == features.labels[test]
    return is_right


def measure_old_loss(head: FittedHead, features: Features, logits: np.ndarray) -> dict[str, Any]:
    """Return the part of the old images that were right, and are predicted as a new class."""
    was_right = logits.argmax(axis=1) == features.labels
    is_lost = was_right & (head.predict(features, logits) != features.labels)
    return build_proportion("old_loss", is_lost)


def check_old_loss(loss: dict[str, Any], max_old_loss: float) -> None:
    """Raise ValueError if the old classes lose more than `max_old_loss` points."""
    if 100 * loss["old_loss"] > max_old_loss:
        raise ValueError(
            f"the old classes lose {100 * loss['old_loss']:.1f} points, but "
            f"`max_old_loss={max_old_loss:g}`. Add images to `dataset`, set a larger "
            "`max_old_loss`, or train all classes together with `vitcls finetune`"
        )
