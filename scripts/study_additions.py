"""Study: tasks and classes that are added to a finished model (model_cards/studies/additions.md).

    python scripts/study_additions.py --encoder ENCODER --photos PHOTOS --cifar CIFAR --output runs/additions

ENCODER is a ViT, as `vitcls convert` takes it. PHOTOS has the folders train, validation and test
with a folder per class; CIFAR has CIFAR-10's train.parquet and test.parquet. Four parts follow one
another:

    features   each image passes the encoder once; the features are kept in OUTPUT
    classes    one class is left out, and added again: 5 classes x 3 seeds x 3 numbers of images, on the features, by
               the functions that `vitcls add-class` calls. The baseline fits all classes together
    tasks      three tasks, the second and third in two orders: by `add_task` on digits, and by its functions on the
               features of clothing. The baselines are models that are trained for one task only
    commands   `add_class` itself, for a model of 1,000 classes and for some of the classes that were left out

An interrupted study continues: finished runs are read from OUTPUT/runs.json.
"""

import copy
import io
import itertools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegressionCV

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    add_class,
    add_task,
    finetune,
)
from modeling_vitcls.conversion.any_checkpoint import resolve
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.sources import load_splits
from modeling_vitcls.inference.frozen_features import Features, concatenate_features
from modeling_vitcls.inference.linear_probe import (
    DEFAULT_STRENGTH,
    Candidate,
    LinearClassifier,
    choose_probe,
    describe_candidate,
    fit_classifier,
    list_candidates,
)
from modeling_vitcls.runtime.files import read_json, write_json
from modeling_vitcls.training.additions import (
    Base,
    append_head,
    describe_cost,
    fit_new_rows,
    fit_task_head,
    fit_without_old_images,
    load_base,
)
from modeling_vitcls.training.options import AdditionOptions


SPLITS = ("train", "validation", "test")
NUM_CIFAR_IMAGES = {"train": 100, "validation": 20, "test": 30}  # per class
NUM_DIGITS = {"train": 1000, "validation": 300, "test": 497}
IMAGE_SIZES = {"clothing": 112, "CIFAR-10": 112, "digits": 32}
NUM_TASK_IMAGES = 400  # that a task is fitted to
LAST_CLS = Candidate((-1,), "cls", "raw")
# what `vitcls finetune` chose on 20 and 50 photographs of clothing per class
HEAD = Candidate((-4, -3, -2, -1), "last_cls_mean", "standardized")
LEFT_OUT = {  # the classes that are added again
    "clothing": ("dress", "hat", "longsleeve", "pants", "shoes"),
    "CIFAR-10": ("airplane", "automobile", "bird", "cat", "deer"),
}
TASKS = {  # data -> task -> label -> classes
    "digits": {
        "parity": {"even": "02468", "odd": "13579"},
        "size": {"small": "01234", "large": "56789"},
        "loops": {"none": "12357", "some": "04689"},
    },
    "clothing": {
        "upper_body": {
            "yes": ["dress", "longsleeve", "outwear", "shirt", "t-shirt"],
            "no": ["hat", "pants", "shoes", "shorts", "skirt"],
        },
        "legs": {
            "yes": ["dress", "pants", "shorts", "skirt"],
            "no": ["hat", "longsleeve", "outwear", "shirt", "shoes", "t-shirt"],
        },
        "weather": {
            "warm": ["dress", "shorts", "skirt", "t-shirt"],
            "cold": ["longsleeve", "outwear", "pants"],
            "any": ["hat", "shirt", "shoes"],
        },
    },
}
CURVE_LOSSES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)  # in points
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # C of scikit-learn's side
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@dataclass(frozen=True)
class Options:
    """Encoder, images and size of the study."""

    encoder: str
    """A ViT, as `vitcls convert` takes it."""
    photos: Path
    """Folder with train/CLASS/PHOTO, validation/CLASS/PHOTO and test/CLASS/PHOTO."""
    cifar: Path
    """Folder with train.parquet and test.parquet of CIFAR-10."""
    output: Path
    """Folder for features, models, runs.json and README.md."""
    sizes: tuple[int, ...] = (5, 20, 100)
    """Numbers of images of the added class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that draw the images of the added class."""
    num_left_out: int = 5
    """Number of classes that are left out, one at a time."""
    num_commands: int = 5
    """Number of these classes of clothing that are also added by `add_class` itself."""


# Images and features ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Images of a dataset, and their features."""

    name: str
    folder: Path  # SPLIT/CLASS/IMAGE
    encoder: Path
    classes: list[str]
    features: dict[str, Features]  # by split


def load_data(options: Options, name: str) -> Data:
    """Compute the features of a dataset, or read them from OUTPUT."""
    if name == "digits":
        folder = write_digits(options)
        encoder = train_digits(options, folder)
    else:
        folder = options.photos if name == "clothing" else write_cifar(options)
        encoder = write_encoder(options, IMAGE_SIZES[name])
    data_options = DataOptions(str(folder), num_workers=0)
    splits = load_splits(data_options)
    base = load_base(str(encoder), build_options(folder))
    features = {}
    for split in SPLITS:
        file = options.output / f"{name}-{split}.npz"
        if not file.exists():
            images = splits.images_by_split[split]
            computed = base.compute_features(images, splits.label_space, data_options, 32)
            np.savez(file, values=computed.values, labels=computed.labels, indices=computed.indices)
        stored = np.load(file)
        features[split] = Features(base.layout, **{key: stored[key] for key in stored.files})
    return Data(name, folder, encoder, splits.label_space.names, features)


def write_cifar(options: Options) -> Path:
    """Write the first images of each class as an image folder.

    Validation images follow the training images.
    """
    folder = options.output / "cifar10"
    if folder.exists():
        return folder
    for split, file in (("train", "train"), ("validation", "train"), ("test", "test")):
        first = NUM_CIFAR_IMAGES["train"] if split == "validation" else 0
        table = pq.read_table(options.cifar / f"{file}.parquet")
        image_column, label_column = table.column_names[:2]
        labels = table[label_column].to_numpy()
        for label, class_name in enumerate(CIFAR_CLASSES):
            (folder / split / class_name).mkdir(parents=True)
            in_class = np.flatnonzero(labels == label)[first:][: NUM_CIFAR_IMAGES[split]]
            for index in in_class.tolist():
                content = table[image_column][index].as_py()["bytes"]
                Image.open(io.BytesIO(content)).save(folder / split / class_name / f"{index}.png")
    return folder


def write_digits(options: Options) -> Path:
    """Write scikit-learn's digits as an image folder."""
    folder = options.output / "digits"
    if folder.exists():
        return folder
    digits = load_digits()
    start = 0
    for split, num_images in NUM_DIGITS.items():
        for index in range(start, start + num_images):
            file = folder / split / str(digits.target[index]) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index] * 255 / 16).astype(np.uint8)).save(file)
        start += num_images
    return folder


def train_digits(options: Options, dataset: Path) -> Path:
    """Train a classifier of digits with the recipe of the package, for 10 epochs."""
    folder = options.output / "digits-model"
    if not folder.exists():
        recipe = Path(__file__).with_name("recipes") / "digits.yaml"
        flags = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        finetune(**flags | {"dataset": dataset, "output_dir": folder, "epochs": 10})
    return folder


def write_encoder(options: Options, image_size: int) -> Path:
    """Write the encoder for an image size.

    Its image processor scales the shorter side to this size.
    """
    folder = options.output / f"encoder-{image_size}"
    if not folder.exists():
        source = resolve(options.encoder).path
        processor = ViTCLSImageProcessor.from_pretrained(
            source,
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
        )
        ViTCLSModel.from_pretrained(source, image_size=image_size).save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def build_options(dataset: Path) -> AdditionOptions:
    """Return the options that `load_base` reads."""
    data = DataOptions(str(dataset), num_workers=0)
    return AdditionOptions(data=data, output_dir=Path("not-written"))


# Classes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """A classifier for all classes but one, which is added later.

    Labels are in the order of the new model.
    """

    name: str
    folder: Path  # of the classifier
    base: Base
    features: dict[str, Features]  # by split; the last columns are its logits

    @property
    def num_old(self) -> int:
        return self.base.config.num_labels

    def take(self, split: str, is_new: bool) -> Features:
        """Return the features of the images of the old classes, or of the new class."""
        features = self.features[split]
        return features.take((features.labels == self.num_old) == is_new)


def leave_out(options: Options, data: Data, name: str | None) -> LeftOut:
    """Fit a classifier to the training images of all classes but one.

    It is fitted as by `vitcls finetune --trainable head`.
    """
    old_classes = [each for each in data.classes if each != name]
    order = [*old_classes, *filter(None, [name])]
    new_labels = np.array([order.index(each) for each in data.classes])
    features = {
        split: replace(each, labels=new_labels[each.labels])
        for split, each in data.features.items()
    }
    train = features["train"].take(features["train"].labels < len(old_classes))
    classifier = fit_together(train, len(old_classes))

    folder = options.output / f"{data.name}-without-{name}"
    if not folder.exists():
        write_classifier(data.encoder, folder, old_classes, train, classifier)
    for split, each in features.items():
        logits = compute_logits(each, classifier).astype(np.float32)
        features[split] = replace(each, values=np.concatenate([each.values, logits], axis=1))
    base = load_base(str(folder), build_options(data.folder))
    return LeftOut(str(name), folder, base, features)


def fit_together(
    features: Features, num_labels: int, candidate: Candidate = HEAD
) -> LinearClassifier:
    """Fit a classifier to all classes at once."""
    values = features.select(candidate).astype(np.float64)
    return fit_classifier(values, features.labels, num_labels, candidate.scale, DEFAULT_STRENGTH)


def compute_logits(
    features: Features, classifier: LinearClassifier, candidate: Candidate = HEAD
) -> np.ndarray:
    return features.select(candidate) @ classifier.weight.T + classifier.bias


def write_classifier(
    encoder: Path,
    folder: Path,
    classes: list[str],
    features: Features,
    classifier: LinearClassifier,
    candidate: Candidate = HEAD,
) -> None:
    """Write a model folder with the encoder and a fitted classifier."""
    model = ViTCLSModel.from_pretrained(encoder)
    config = copy.deepcopy(model.config)
    config.architectures = None
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.pooling = candidate.pooling
    config.pooled_layers = list(candidate.layers)
    whole = ViTCLSForImageClassification(config)
    whole.vitcls.load_state_dict(model.state_dict())
    expanded = features.layout.expand(classifier, candidate)
    whole.classifier.load_state_dict(
        {
            "weight": torch.from_numpy(expanded.weight),
            "bias": torch.from_numpy(expanded.bias),
        }
    )
    whole.save_pretrained(folder)
    ViTCLSImageProcessor.from_pretrained(encoder).save_pretrained(folder)


def run_class(left_out: LeftOut, num_images: int, seed: int) -> dict[str, Any]:
    """Add the class with some of its images, and measure recall and loss on the test images."""
    new = left_out.take("train", is_new=True)
    chosen = np.random.default_rng(seed).permutation(len(new.labels))[:num_images]
    new = new.take(np.isin(np.arange(len(new.labels)), chosen))
    old = left_out.take("validation", is_new=False)
    test = left_out.features["test"]
    row: dict[str, Any] = {"class": left_out.name, "num_images": num_images, "seed": seed}

    start_time = time.process_time()
    try:
        head, compute = fit_new_rows(left_out.base, [left_out.name], [new, old], 1.0)
    except ValueError as error:
        row |= {"refused": str(error), "added": {"recall": 0.0, "loss": 0.0}}
    else:
        logits = np.concatenate([test.values[:, -left_out.num_old :], compute(test)], axis=1)
        row["added"] = measure(left_out, logits)
        row["curve"] = trace_curve(left_out, logits)
        row["promised_loss"] = head.record["old_classes"]["old_loss"]
        row["seconds"] = time.process_time() - start_time

    _, compute = fit_without_old_images(left_out.base, [left_out.name], [new], 1.0)
    logits = np.concatenate([test.values[:, -left_out.num_old :], compute(test)], axis=1)
    row["without"] = measure(left_out, logits)

    together = concatenate_features(left_out.take("train", is_new=False), new)
    classifier = fit_together(together, left_out.num_old + 1)
    row["together"] = measure(left_out, compute_logits(test, classifier))
    return row


def measure(left_out: LeftOut, logits: np.ndarray) -> dict[str, float]:
    """Return the recall of the new class, and what the old classes lose, in points."""
    test = left_out.features["test"]
    is_old = test.labels < left_out.num_old
    was_right = test.values[:, -left_out.num_old :].argmax(axis=1) == test.labels
    is_right = logits.argmax(axis=1) == test.labels
    return {
        "recall": 100 * float(is_right[~is_old].mean()),
        "loss": 100 * float(was_right[is_old].mean() - is_right[is_old].mean()),
    }


def trace_curve(left_out: LeftOut, logits: np.ndarray) -> list[float]:
    """Return the largest recall of the new class for each loss in `CURVE_LOSSES`.

    The maximum is over all numbers that could be added to the logits of the new class.
    """
    margins = logits[:, :-1].max(axis=1) - logits[:, -1]
    recalls = np.zeros(len(CURVE_LOSSES))
    for shift in np.unique(margins):
        moved = logits.copy()
        moved[:, -1] += shift + 1e-6
        measured = measure(left_out, moved)
        is_allowed = measured["loss"] <= np.array(CURVE_LOSSES)
        recalls[is_allowed] = np.maximum(recalls[is_allowed], measured["recall"])
    return recalls.tolist()


# Commands -----------------------------------------------------------------------------------------


def list_images(data: Data, split: str) -> list[tuple[Path, str]]:
    """Return the files of a split with their class names."""
    return [(file, file.parent.name) for file in sorted((data.folder / split).glob("*/*"))]


def run_add_class(options: Options, data: Data, left_out: LeftOut) -> dict[str, Any]:
    """Run `add_class` with 20 images, and with images of the old classes.

    The classifier was not fitted to these images.
    """
    new = [pair for pair in list_images(data, "train") if pair[1] == left_out.name]
    chosen = np.random.default_rng(0).permutation(len(new))[:20]
    dataset = {
        "train": [new[index] for index in chosen],
        "test": [pair for pair in list_images(data, "test") if pair[1] == left_out.name],
    }
    old = [pair for pair in list_images(data, "validation") if pair[1] != left_out.name]
    folder = options.output / f"{left_out.folder.name}-added"
    shutil.rmtree(folder, ignore_errors=True)
    record = add_class(
        left_out.folder, dataset, folder, old_dataset={"validation": old}, num_workers=0
    )
    certificate = read_json(folder / "certificate.json")
    return {
        "class": left_out.name,
        "recall": 100 * record["held_out_result"]["recall"],
        "promised_loss": record["old_classes"]["old_loss"],
        "num_tensors": certificate["num_tensors"],
        "passes": [
            [each["dtype"], each["batch_size"], each["num_images"]]
            for each in certificate["passes"]
        ],
    }


def run_thousand(options: Options, data: Data) -> dict[str, Any]:
    """Add a class to a model of 1,000 classes with random weights of the head."""
    source = options.output / "thousand"
    if not source.exists():
        torch.manual_seed(0)
        model = ViTCLSForImageClassification.from_pretrained(data.encoder, num_labels=1000)
        model.save_pretrained(source)
        ViTCLSImageProcessor.from_pretrained(data.encoder).save_pretrained(source)
    folder = options.output / "thousand-and-one"
    shutil.rmtree(folder, ignore_errors=True)
    add_class(source, list_images(data, "train")[:20], folder, num_workers=0)
    model = ViTCLSForImageClassification.from_pretrained(folder)
    return {
        "num_labels": model.config.num_labels,
        "last_label": model.config.id2label[1000],
        "num_tensors": read_json(folder / "certificate.json")["num_tensors"],
    }


# Tasks --------------------------------------------------------------------------------------------


def run_tasks(data: Data) -> dict[str, Any]:
    """Run `add_task` on the classifier of the digits, for the other tasks in two orders."""
    first, *others = TASKS[data.name]
    start, record = add(data, data.encoder, first)
    records = {first: [record]}
    weights = []
    for order in (others, others[::-1]):
        folder = start
        for name in order:
            folder, record = add(data, folder, name)
            records.setdefault(name, []).append(record)
        weights.append(load_file(folder / "model.safetensors"))
    return {
        "data": data.name,
        "same_in_any_order": all(
            torch.equal(weights[0][each], weights[1][each]) for each in weights[0]
        ),
        "tasks": {name: compare(data, name, records[name]) for name in records},
    }


def add(data: Data, source: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Run `add_task`, and return the new folder and the record of the task."""
    folder = source.with_name(f"{source.name}-{name}")
    if not folder.exists():
        label_by_class = build_label_by_class(data, name)
        dataset = {
            split: [(file, label_by_class[each]) for file, each in list_images(data, split)]
            for split in ("train", "test")
        }
        add_task(source, dataset, name, folder, max_images=NUM_TASK_IMAGES, num_workers=0)
    return folder, read_json(folder / "results.json")["additions"][name]


def fit_tasks(options: Options, data: Data) -> dict[str, Any]:
    """Fit the tasks of clothing on the features, and append them in two orders.

    The classifier that they are added to reads the CLS token.
    """
    train = data.features["train"]
    folder = options.output / f"{data.name}-cls"
    if not folder.exists():
        classifier = fit_together(train, len(data.classes), LAST_CLS)
        write_classifier(data.encoder, folder, data.classes, train, classifier, LAST_CLS)
    base = load_base(str(folder), build_options(data.folder))
    pixels = torch.stack(
        [
            base.processor(Image.open(file), return_tensors="pt")["pixel_values"][0]
            for file, _ in list_images(data, "test")[::25]
        ]
    )
    expected = base.model(pixels).logits
    heads = {}
    records = {}
    for name in TASKS[data.name]:
        labels = list(TASKS[data.name][name])
        parts = [label_features(data, name, split) for split in ("train", "test")]
        heads[name] = fit_task_head(base, labels, [parts[0]], parts[1])
        cost = describe_cost(base.model, append_head(base.model, name, heads[name]))
        records[name] = [heads[name].record | cost]

    first, *others = TASKS[data.name]
    outputs = []
    for order in ([first, *others], [first, *others[::-1]]):
        model = base.model
        for name in order:
            model = append_head(model, name, heads[name])
            outputs.append(model(pixels))
    is_same = all(torch.equal(each.logits, expected) for each in outputs)
    for name in TASKS[data.name]:
        logits = [each.task_logits[name] for each in outputs if name in each.task_logits]
        is_same = is_same and all(torch.equal(each, logits[0]) for each in logits)
    return {
        "data": data.name,
        "same_in_any_order": is_same,
        "tasks": {name: compare(data, name, records[name]) for name in records},
    }


def build_label_by_class(data: Data, name: str) -> dict[str, str]:
    """Return the label of each class in a task."""
    labels = {}
    for label, classes in TASKS[data.name][name].items():
        labels |= dict.fromkeys(classes, label)
    return labels


def label_features(data: Data, name: str, split: str) -> Features:
    """Return the features of a split with the labels of a task; of the training images, a part."""
    features = data.features[split]
    label_by_class = build_label_by_class(data, name)
    labels = list(TASKS[data.name][name])
    indices = np.array([labels.index(label_by_class[each]) for each in data.classes])
    features = replace(features, labels=indices[features.labels])
    if split != "train":
        return features
    order = np.random.default_rng(0).permutation(len(features.labels))[:NUM_TASK_IMAGES]
    return features.take(np.isin(np.arange(len(features.labels)), order))


def compare(data: Data, name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the accuracies of an added task, of a regression, and of a model for this task only.

    The regression is scikit-learn's on the last CLS token. The model is trained as by `vitcls
    finetune --trainable head`, which can read more tokens.
    """
    train = label_features(data, name, "train")
    test = label_features(data, name, "test")
    peer = LogisticRegressionCV(Cs=STRENGTHS, cv=5, scoring="neg_log_loss", max_iter=500)
    peer.fit(train.select(LAST_CLS), train.labels)

    num_labels = len(TASKS[data.name][name])
    layout = train.layout
    choice = choose_probe(
        lambda candidate: train.select(candidate).astype(np.float64),
        train.labels,
        num_labels,
        list_candidates(layout.num_layers, tokens=layout.token_choices),
    )
    alone = fit_classifier(
        train.select(choice.candidate).astype(np.float64),
        train.labels,
        num_labels,
        choice.candidate.scale,
        choice.strength,
    )
    is_right = compute_logits(test, alone, choice.candidate).argmax(axis=1) == test.labels
    return {
        "added": [record["held_out_result"]["accuracy"] for record in records],
        "scikit-learn": float((peer.predict(test.select(LAST_CLS)) == test.labels).mean()),
        "alone": float(is_right.mean()),
        "num_images": len(test.labels),
        "relative_flops": records[0]["relative_flops"],
        "reads": describe_candidate(records[0]),
    }


# Page ---------------------------------------------------------------------------------------------


def format_tasks(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of the tasks."""
    lines = [
        "| data | task | added, in each order | scikit-learn, last CLS | trained alone | reads | "
        "cost |",
        "|---|---|---|---:|---:|---|---:|",
    ]
    for row in rows:
        for name, task in row["tasks"].items():
            added = ", ".join(f"{accuracy:.1%}" for accuracy in task["added"])
            lines.append(
                f"| {row['data']} | {name} | {added} | {task['scikit-learn']:.1%} | "
                f"{task['alone']:.1%} | {task['reads']} | {task['relative_flops']:.3%} |"
            )
    return lines


def format_classes(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> list[str]:
    """Return a table with a line for each group of runs with the same `key`."""
    lines = [
        "| data | runs | added: recall, loss | together: recall, loss | part of the recall | "
        "refused | without old images: recall, loss |",
        "|---|---:|---|---|---:|---:|---|",
    ]
    for name, group in group_rows(rows, key):
        added, together, without = (
            {each: fmean(row[way][each] for row in group) for each in ("recall", "loss")}
            for way in ("added", "together", "without")
        )
        refused = sum("refused" in row for row in group)
        part = added["recall"] / together["recall"] if together["recall"] else float("nan")
        lines.append(
            f"| {name} | {len(group)} | {added['recall']:.0f}%, {added['loss']:+.1f} "
            f"| {together['recall']:.0f}%, {together['loss']:+.1f} | {part:.0%} | {refused} "
            f"| {without['recall']:.0f}%, {without['loss']:+.1f} |"
        )
    return lines


def format_curves(rows: list[dict[str, Any]]) -> list[str]:
    """Return the mean recall for each loss."""
    lines = [
        f"| data, images | {' | '.join(f'{loss:g}' for loss in CURVE_LOSSES)} |",
        f"|---|{'---:|' * len(CURVE_LOSSES)}",
    ]
    rows = [row for row in rows if "curve" in row]
    for name, group in group_rows(rows, lambda row: f"{row['data']}, {row['num_images']}"):
        means = np.mean([row["curve"] for row in group], axis=0)
        lines.append(f"| {name} | {' | '.join(f'{mean:.0f}%' for mean in means)} |")
    return lines


def group_rows(
    rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]
) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Return the rows with the same `key`, in the order of their first row."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def format_page(runs: dict[str, Any]) -> str:
    """Return the tables of the study."""
    classes = runs["classes"]
    of_20 = [row for row in classes if row["num_images"] == 20]
    parts = [
        format_classes(classes, lambda row: f"{row['data']}, {row['num_images']} images"),
        format_curves(classes),
        format_classes(of_20, lambda row: f"{row['data']}, {row['class']}"),
        format_tasks(list(runs["tasks"].values())),
        [f"{name}: {row}" for name, row in runs["commands"].items()],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main() -> None:
    options = tyro.cli(Options)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "runs.json"
    runs: dict[str, Any] = {"classes": [], "commands": {}, "tasks": {}}
    if file.exists():
        runs = read_json(file)

    def save() -> None:
        write_json(file, runs)
        (options.output / "README.md").write_text(format_page(runs), encoding="utf-8")

    for seed, (name, classes) in itertools.product(options.seeds, LEFT_OUT.items()):
        data = load_data(options, name)
        for class_name in classes[: options.num_left_out]:
            left_out = leave_out(options, data, class_name)
            for num_images in options.sizes:
                run = {"data": name, "class": class_name, "num_images": num_images, "seed": seed}
                if not any(run.items() <= row.items() for row in runs["classes"]):
                    runs["classes"].append(run | run_class(left_out, num_images, seed))
                    save()

    for name in TASKS:
        if name not in runs["tasks"]:
            data = load_data(options, name)
            results = run_tasks(data) if name == "digits" else fit_tasks(options, data)
            runs["tasks"][name] = results
            save()

    data = load_data(options, "clothing")
    if "1,000 classes" not in runs["commands"]:
        runs["commands"]["1,000 classes"] = run_thousand(options, data)
        save()
    for class_name in LEFT_OUT["clothing"][: options.num_commands]:
        if class_name not in runs["commands"]:
            left_out = leave_out(options, data, class_name)
            runs["commands"][class_name] = run_add_class(options, data, left_out)
            save()


if __name__ == "__main__":
    main()
