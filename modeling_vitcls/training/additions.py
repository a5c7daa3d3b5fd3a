"""Tasks and classes that are added to a finished model without changing its other outputs.

    images -> frozen encoder, once -> choice of layers, tokens, scale, C (cross-validation) -> extra head
           -> model folder with the tensors of the old model -> certificate, or nothing is written

A head only reads the tokens of the finished forward pass (`config.extra_heads`), so that the other
outputs keep their bits. The choice and the fit are those of the probe (inference/linear_probe.py).
Added classes are a head of their own, too, whose logits are appended: one product with more rows
would change the bits of the old ones.
"""

import copy
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console

from ..conversion.any_checkpoint import resolve
from ..data.evaluated_images import find_evaluated_images
from ..data.held_out import ADDITIONS_KEY, HELD_OUT_RECORD_KEY, read_held_out_record
from ..data.image_folder import check_output_is_not_read
from ..data.images import LabeledImages
from ..data.label_matching import match_labels
from ..data.labels import LabelSpace, get_label_space
from ..data.options import DataOptions
from ..data.sources import load_splits
from ..data.splits import TrainingData, choose_training_splits, load_training_data
from ..hub.connection import silence_transformers
from ..hub.local_paths import strip_folders
from ..hub.model_files import (
    CERTIFICATE_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    hash_settings,
    hash_weights,
)
from ..hub.model_folder import ModelFolder
from ..hub.provenance import Provenance, find_provenance
from ..inference.confidence import find_energy_threshold
from ..inference.evaluate import set_up_evaluation
from ..inference.evaluator import round_floats
from ..inference.frozen_features import (
    FeatureLayout,
    Features,
    FrozenPass,
    concatenate_features,
)
from ..inference.intervals import compute_proportion_interval
from ..inference.linear_probe import (
    LAST_CLS_INNER_MEAN,
    NUM_LAST_LAYERS,
    NUM_SINGLE_LAYERS,
    Candidate,
    LinearClassifier,
    choose_probe,
    describe_candidate,
    fit_classifier,
    list_candidates,
)
from ..inference.metric_tables import format_small_percent
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, count_output_tokens
from ..runtime.distributed import set_mixed_precision
from ..runtime.files import write_json
from ..runtime.staging import check_output_is_empty, create_output_folder
from ..runtime.system import get_versions
from .calibration import (
    compute_error,
    compute_error_by_chance,
    describe_error_by_chance,
    find_calibration,
)
from .certificate import NUM_IMAGES, certify, describe_certificate, load_old_model, read_pixels
from .options import AddClassOptions, AdditionOptions, AddTaskOptions
from .probe import MAX_CHOICE_IMAGES, build_record, select_out_of_fold, split_at_random


SINGLE_LABEL: Final = "single_label_classification"


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
            options=self.options.data,
            batch_size=self.options.batch_size,
            accelerator=self.accelerator,
            num_channels=self.config.num_channels,
            warn=self.warn,
        )
        features = frozen_pass(model, self.console)
        return features.take(features.labels >= 0)

    @property
    def layout(self) -> FeatureLayout:
        return FeatureLayout.for_extra_heads(self.config, max(NUM_SINGLE_LAYERS, NUM_LAST_LAYERS))

    def list_candidates(self) -> list[Candidate]:
        """Return what a head can read at a cost of less than 2% of the forward pass.

        The last layer of a classifier on CLS computes only CLS. A head on its patches would compute
        it again for all tokens, about 8% of a forward pass, so that such a head reads the patches
        of other layers only.
        """
        layout = self.layout
        candidates = list_candidates(layout.num_layers, tokens=layout.token_choices)
        if count_output_tokens(self.model.vitcls, None, {}) is None:
            return candidates
        candidates = [candidate for candidate in candidates if not candidate.reads_last_patches]
        if layout.num_layers >= NUM_LAST_LAYERS:
            layers = tuple(range(-NUM_LAST_LAYERS, 0))
            candidates += [
                Candidate(layers, LAST_CLS_INNER_MEAN, scale) for scale in ("raw", "standardized")
            ]
        return sorted(candidates, key=lambda candidate: candidate.complexity)


@dataclass(frozen=True)
class FittedHead:
    """A head and what is known about it."""

    candidate: Candidate  # what the head reads
    classifier: LinearClassifier
    fields: dict[str, Any]  # of `config.extra_heads`
    record: dict[str, Any]  # for results.json
    lines: dict[str, str]  # to print

    def compute_logits(self, features: Features) -> np.ndarray:
        """Return the logits [N, L] of the head, before the division by its temperature."""
        return features.select(self.candidate) @ self.classifier.weight.T + self.classifier.bias


# Tasks --------------------------------------------------------------------------------------------


def add_task_from_options(options: AddTaskOptions) -> dict[str, Any]:
    """Add, replace or remove a task, write the model folder, and return the record of the task.

    Raises:
        ValueError, OSError: if the model or the data cannot be read, the name is taken, or another
            output would change. Nothing is written then.
    """
    check_output_is_empty(options.output_dir, "output_dir")
    check_output_is_not_read(options.output_dir, options.data.dataset)
    base = load_base(options.model, options)
    check_name(options, base.config)
    changes = (options.remove_task, options.name)
    changed_heads = [name for name in base.config.get_added_tasks() if name in changes]

    data = load_training_data(options.data)
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

        pixels = read_pixels(data.train, base.processor)  # type: ignore[arg-type]  # not streamed
        line = write_model(base, model, folder, pixels, records, changed_heads)
    print_lines(base.console, {"certificate": line, "written": str(options.output_dir)})
    return record


def load_base(source: str, options: AdditionOptions) -> Base:
    """Load a model, its image processor and the device."""
    accelerator, console, warn = set_up_evaluation(options.mixed_precision)
    folder = resolve(source)
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
    """Choose and fit the head of a task, and measure it on the held-out images."""
    check_has_one_label(data.label_space, options.data.dataset)
    compute = partial(base.compute_features, label_space=data.label_space)
    images: Any = data.train  # not streamed
    first_images, other_images = split_at_random(images.draw(options.max_images), MAX_CHOICE_IMAGES)
    parts = [compute(first_images)]
    if len(other_images):
        parts.append(compute(other_images))
    held_out = compute(data.held_out) if len(data.held_out) else None

    head = fit_task_head(base, data.label_space.names, parts)
    if held_out is not None:
        measured = measure_head(head, held_out)
        head.record["held_out_result"] = round_floats(measured)
        head.lines["held out"] = format_proportion(measured)
    record = {
        "kind": "task",
        "dataset": strip_folders(data.name),
        "label_column": list(data.label_space.columns),
        **head.record,
        "held_out_images": data.held_out_name,
        HELD_OUT_RECORD_KEY: asdict(data.build_record()),
    }
    return replace(head, record=record)


def check_has_one_label(label_space: LabelSpace, dataset: str) -> None:
    """Raise ValueError unless a dataset has one label per image."""
    if label_space.kind != SINGLE_LABEL:
        raise ValueError(
            f"one label per image is required, but {dataset} has labels for {label_space.kind}. "
            "Set `label_column` to a column with one label per image"
        )


def measure_head(head: FittedHead, held_out: Features) -> dict[str, Any]:
    """Return the accuracy and the calibration error of a head."""
    logits = head.compute_logits(held_out)
    num_right = (logits.argmax(axis=1) == held_out.labels).sum()
    calibrated = (logits / head.fields.get("temperature", 1.0)).astype(np.float32)
    return build_proportion("accuracy", num_right, len(logits)) | {
        "calibration_error": compute_error(calibrated, held_out.labels),
        "calibration_error_by_chance": compute_error_by_chance(calibrated),
    }


def fit_task_head(base: Base, names: list[str], parts: Sequence[Features]) -> FittedHead:
    """Fit a logistic regression, with a temperature from the images that each fold leaves out."""
    first = parts[0]
    choice = choose_probe(
        lambda candidate: first.select(candidate).astype(np.float64),
        first.labels,
        len(names),
        base.list_candidates(),
    )
    candidate = choice.candidate
    everything = join(parts)
    classifier = fit_classifier(
        everything.select(candidate).astype(np.float64),
        everything.labels,
        len(names),
        candidate.scale,
        choice.strength,
    )

    fields = build_head_fields(candidate, names)
    record = build_record(choice, "unchanged", None, list(parts))
    lines = {"head": describe_candidate(record)}
    if choice.score is not None:
        lines["cross-validation"] = f"{record['accuracy']:.1%}, log loss {record['loss']:.2f}"
        out_of_fold, labels = select_out_of_fold(choice.score, first.labels)
        calibration = find_calibration(out_of_fold.astype(np.float32), labels, "cross-validation")
        lines["calibration"] = calibration.text
        if calibration.is_fitted:
            fields |= {
                "temperature": calibration.temperature,
                "threshold": calibration.energy_threshold,
            }
            record["calibration"] = calibration.to_dict()
    return FittedHead(candidate, classifier, fields, record, lines)


def join(parts: Sequence[Features]) -> Features:
    """Return the features of one part, or of two parts of the same images."""
    return parts[0] if len(parts) == 1 else concatenate_features(*parts)


def build_head_fields(candidate: Candidate, names: list[str]) -> dict[str, Any]:
    """Return the entry of `config.extra_heads` for a head that reads exactly a candidate."""
    return {
        "labels": list(names),
        "pooling": candidate.layer_poolings,
        "pooled_layers": list(candidate.layers),
        "problem_type": SINGLE_LABEL,
    }


def build_proportion(name: str, count: int, total: int) -> dict[str, Any]:
    """Return a proportion, its 95% interval and the number of observations."""
    return {
        name: float(count / total),
        f"{name}_interval": compute_proportion_interval(int(count), total),
        "num_images": total,
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
    config.extra_heads = {**(config.extra_heads or {}), name: head.fields}
    extended = rebuild(model, config)
    linear = extended.extra_heads[f"task_{name}"]
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(head.classifier.weight))
        linear.bias.copy_(torch.from_numpy(head.classifier.bias))
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
    changed_heads: Collection[str] = (),
) -> str:
    """Write the model and the certificate that the other outputs are unchanged.

    Return the certificate as a line. Raise ValueError at the first difference.
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
class BiasChoice:
    """Number that is added to the bias of the new classes, and its effect.

    The effect is that on images that were left out of the fits.
    """

    shift: float
    num_old: int
    num_lost: int  # old images that were right and are predicted as a new class
    num_new: int
    num_recognized: int


def add_classes_from_options(options: AddClassOptions) -> dict[str, Any]:
    """Add classes, write the model folder, and return the record of the classes.

    Raises:
        ValueError, OSError: if the model or the data cannot be read, if a class exists already, or
            if no image of a new class is recognized unless the old classes lose more than
            `max_old_loss` points. Nothing is written.
    """
    check_output_is_empty(options.output_dir, "output_dir")
    check_output_is_not_read(options.output_dir, options.data.dataset)
    base = load_base(options.model, options)
    label_space = get_label_space(base.config)
    num_labels = base.config.num_labels or 0
    is_classifier = isinstance(base.model, ViTCLSForImageClassification) and num_labels > 1
    if not is_classifier or label_space.kind != SINGLE_LABEL:
        raise ValueError(
            f"classes can be added to a classifier with one label per image, but {options.model} "
            "is none. Add a task with `vitcls add-task`"
        )
    new_space, new_images, new_held_out = load_new_images(options, label_space)
    names = new_space.names[len(label_space.names) :]
    old_images, old_description = load_old_images(base, options, label_space)

    with create_output_folder(options.output_dir, "output_dir") as folder:
        compute = partial(base.compute_features, with_logits=True)
        new_features = compute(new_images, new_space)
        if old_images is None:
            head = fit_without_old_images(base, names, new_features)
        else:
            features = concatenate_features(new_features, compute(old_images, label_space))
            head = fit_new_rows(base, names, features, options.max_old_loss)
        record: dict[str, Any] = {
            "kind": "classes",
            "labels": names,
            "dataset": strip_folders(options.data.dataset),
            "num_new_images": len(new_features.labels),
            "old_images": old_description,
            **head.record,
        }
        lines = head.lines
        if new_held_out is not None:
            held_out = compute(new_held_out, new_space)
            logits = [get_old_logits(base, held_out), head.compute_logits(held_out)]
            is_right = np.concatenate(logits, axis=1).argmax(axis=1) == held_out.labels
            measured = build_proportion("recall", is_right.sum(), len(is_right))
            record["held_out_result"] = round_floats(measured)
            lines = lines | {"held out": format_proportion(measured)}

        head_name = f"added_classes_{len(base.config.get_added_classes()) + 1:03d}"
        model = append_head(base.model, head_name, head, dict(enumerate(new_space.names)))
        if base.config.energy_threshold is not None and "energy_threshold" in record:
            model.config.energy_threshold = record["energy_threshold"]
        record |= describe_cost(base.model, model)
        print_lines(base.console, lines | {"cost": format_cost(record)})

        num_old_pixels = 0 if old_images is None else NUM_IMAGES * 3 // 4
        pixels = read_pixels(new_images, base.processor, NUM_IMAGES - num_old_pixels)
        if old_images is not None:
            pixels += read_pixels(old_images, base.processor, NUM_IMAGES - len(pixels))
        records = base.folder.results.get(ADDITIONS_KEY, {}) | {head_name: record}
        line = write_model(base, model, folder, pixels, records)
    print_lines(base.console, {"certificate": line, "written": str(options.output_dir)})
    return record


def load_new_images(
    options: AddClassOptions, label_space: LabelSpace
) -> tuple[LabelSpace, LabeledImages, LabeledImages | None]:
    """Return the old and new classes, images of the new classes, and held-out images, if any."""
    splits = load_splits(options.data)
    check_has_one_label(splits.label_space, options.data.dataset)
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


def load_old_images(
    base: Base, options: AddClassOptions, label_space: LabelSpace
) -> tuple[LabeledImages | None, str | None]:
    """Return held-out images of the old classes and their description, or None for both.

    They come from --old-dataset or from the dataset in the record of the model: the validation or
    test split or, if there is only one split, the images that training held out.
    """
    record = read_held_out_record(base.folder)
    dataset = options.old_dataset or (None if record is None else record.dataset)
    if dataset is None:
        return None, None
    data_options = DataOptions(dataset, num_workers=options.data.num_workers)
    try:
        splits = load_splits(data_options)
    except (ValueError, OSError):
        if options.old_dataset is not None:
            raise
        return None, None
    training_splits = choose_training_splits(splits.names, use_selection_split=False)
    split = training_splits.held_out or training_splits.train
    images = splits.images_by_split[split]
    names = splits.label_space.names
    is_known = [
        label >= 0 and names[label] in label_space.index_by_name["label"] for label in images.labels
    ]
    images = images.select(np.flatnonzero(is_known).tolist())
    part_text = f"split {split!r}"
    if training_splits.held_out is None:
        is_evaluated, part = find_evaluated_images(images, record, data_options, splits.name)
        images = images.select(np.flatnonzero(is_evaluated).tolist())
        part_text = part.describe()
    if not len(images):
        return None, None
    images = match_labels(images.draw(MAX_CHOICE_IMAGES), splits.label_space, label_space)
    return images, f"{len(images):,} images of {strip_folders(dataset)} ({part_text})"


def get_old_logits(base: Base, features: Features) -> np.ndarray:
    """Return the logits [N, C] of the old classes before the division by the temperature.

    The new rows share the temperature.
    """
    logits = features.values[:, -(base.config.num_labels or 0) :]
    return logits.astype(np.float64) * base.config.temperature


def fit_new_rows(
    base: Base, names: list[str], features: Features, max_old_loss: float
) -> FittedHead:
    """Fit the rows of the new classes, which cost the old ones at most `max_old_loss` points.

    Raise ValueError if no image of a new class is recognized at this cost.
    """
    labels = features.labels
    old_logits = get_old_logits(base, features)
    num_old = old_logits.shape[1]
    num_labels = old_logits.shape[1] + len(names)
    choice = choose_probe(
        lambda candidate: features.select(candidate).astype(np.float64),
        labels,
        num_labels,
        [candidate for candidate in base.list_candidates() if candidate.layers[-1] == -1],
        old_logits,
    )
    candidate = choice.candidate
    if choice.score is None:
        raise ValueError(
            f"{len(labels)} images are too few for a cross-validation. Add images to `dataset`"
        )
    out_of_fold, predicted_labels = select_out_of_fold(choice.score, labels)
    bias = choose_bias(out_of_fold, predicted_labels, num_old, max_old_loss)
    classifier = fit_classifier(
        features=features.select(candidate).astype(np.float64),
        labels=labels,
        num_labels=num_labels,
        scale=candidate.scale,
        strength=choice.strength,
        old_logits=old_logits,
    )
    classifier = LinearClassifier(
        classifier.weight, (classifier.bias + bias.shift).astype(np.float32)
    )

    out_of_fold = out_of_fold.copy()
    out_of_fold[:, num_old:] += bias.shift
    calibrated = (out_of_fold / base.config.temperature).astype(np.float32)
    lost = build_proportion("old_loss", bias.num_lost, bias.num_old)
    recall = build_proportion("recall", bias.num_recognized, bias.num_new)
    record = build_record(choice, "unchanged", None, [features]) | {
        "max_old_loss": max_old_loss / 100,
        "old_classes": round_floats(lost),
        "new_classes": round_floats(recall),
        "calibration_error": compute_error(calibrated, predicted_labels),
        "calibration_error_by_chance": compute_error_by_chance(calibrated),
        "energy_threshold": round(find_energy_threshold(calibrated), 6),
    }
    by_chance_text = describe_error_by_chance(record["calibration_error_by_chance"])
    lines = {
        "head": describe_candidate(record),
        "old classes": format_proportion(lost),
        "new classes": format_proportion(recall),
        "calibration": (
            f"error {100 * record['calibration_error']:.1f} points with all classes "
            f"{by_chance_text}"
        ),
    }
    return FittedHead(candidate, classifier, build_class_fields(candidate, names), record, lines)


def choose_bias(
    logits: np.ndarray, labels: np.ndarray, num_old: int, max_old_loss: float
) -> BiasChoice:
    """Choose the number that is added to the logits of the new classes.

    An old image is lost if it was right and is now predicted as a new class. Of the numbers with
    which at most `max_old_loss` percent of the old images are lost, one that recognizes the most
    new images is chosen: 0, if it is one of them, and otherwise the middle between the last
    recognized image and the next lost one.

    Args:
        logits: [N, C + K] of images that the new rows were not fitted to.
        labels: [N]; those of the new classes start at `num_old`.

    Raises:
        ValueError: if no new image is recognized at this cost, or none was left out.
    """
    is_old = labels < num_old
    if is_old.all():
        raise ValueError(
            "one image of each new class is too few, because it cannot be left out of the fits to "
            "measure what the class costs. Add images to `dataset`"
        )
    margins = logits[:, :num_old].max(axis=1) - logits[:, num_old:].max(axis=1)
    was_right = logits[:, :num_old].argmax(axis=1) == labels
    is_right_new = logits[:, num_old:].argmax(axis=1) + num_old == labels

    lost_margins = np.sort(margins[is_old & was_right])
    num_allowed = int(max_old_loss / 100 * is_old.sum())
    limit = lost_margins[num_allowed] if num_allowed < len(lost_margins) else np.inf
    new_margins = np.sort(margins[~is_old & is_right_new])
    recognized = new_margins[new_margins < limit]
    if not len(recognized):
        cost = ""
        if len(new_margins):
            points = 100 * (lost_margins < new_margins[0]).sum() / is_old.sum()
            cost = f": the first one would cost the old classes {points:.1f} points"
        raise ValueError(
            f"at `max_old_loss={max_old_loss:g}`, no image of a new class is recognized{cost}. Add "
            "images to `dataset`, or set a larger `max_old_loss`"
        )
    last = recognized[-1]
    shift = 0.0
    if not last < 0 < limit:
        shift = (last + limit) / 2 if np.isfinite(limit) else last + 1.0
    return BiasChoice(
        shift=float(shift),
        num_old=int(is_old.sum()),
        num_lost=int((lost_margins < shift).sum()),
        num_new=int((~is_old).sum()),
        num_recognized=int((new_margins < shift).sum()),
    )


def fit_without_old_images(base: Base, names: list[str], features: Features) -> FittedHead:
    """Return rows that score the similarity to the mean of a new class.

    They recognize half of its images.

    Without images of the old classes, nothing is known about what these lose. In
    model_cards/studies/additions.md, it was 33 points with rows that recognize 90% of the new
    images, and 12 points with these.
    """
    old_logits = get_old_logits(base, features)
    candidate = base.list_candidates()[0]
    values = features.select(candidate).astype(np.float64)
    spread = float((old_logits.max(axis=1) - old_logits.mean(axis=1)).mean())
    weights = []
    biases = []
    for index in range(len(names)):
        in_class = features.labels == old_logits.shape[1] + index
        if not in_class.any():
            raise ValueError(
                f"the class {names[index]!r} has no images. Add images, or remove the class"
            )
        mean = values[in_class].mean(axis=0)
        weight = spread * mean / (mean @ mean)
        margins = old_logits[in_class].max(axis=1) - values[in_class] @ weight
        weights.append(weight)
        biases.append(np.median(margins) + 1e-3)
    classifier = LinearClassifier(
        np.stack(weights).astype(np.float32), np.array(biases, np.float32)
    )
    base.warn(
        "there are no images of the old classes, so that it is unknown what these lose. Set "
        "`old_dataset` to images that the model was not trained on"
    )
    record = {
        "num_training_images": len(features.labels),
        "layers": list(candidate.layers),
        "tokens": candidate.tokens,
        "max_old_loss": None,
    }
    return FittedHead(candidate, classifier, build_class_fields(candidate, names), record, {})


def build_class_fields(candidate: Candidate, names: list[str]) -> dict[str, Any]:
    """Return the entry of `config.extra_heads` for a head that adds classes."""
    return build_head_fields(candidate, names) | {"adds_classes": True}
