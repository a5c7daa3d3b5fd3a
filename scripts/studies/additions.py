"""Study: classes that are added to a finished model (model_cards/studies/additions.md).

    python scripts/studies/additions.py --encoder ENCODER --photos PHOTOS --output runs/additions

ENCODER is a ViT, as `vitcls convert` takes it. PHOTOS has the folders train and test with a folder
per class. Every image passes the encoder once. Each class is then left out in turn: of the others,
shrinkage LDA on the last four layers, which `vitcls finetune` chooses for so few photos, is the
classifier. The class is added to it by the functions of `vitcls add-class`; `together` is LDA of
all classes. With --trained, one class is also left out of a run with steps, and added by the
command.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import tyro
from photos import PhotoOptions, link_photos

from modeling_vitcls import ViTCLSImageProcessor, ViTCLSModel, add_class, evaluate, finetune
from modeling_vitcls.additions.add_class import build_class_rows
from modeling_vitcls.additions.extend import build_old_model
from modeling_vitcls.additions.options import AddClassOptions
from modeling_vitcls.conversion.open_model import open_model
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.sources import load_splits
from modeling_vitcls.inference.class_statistics import ClassStatistics
from modeling_vitcls.inference.frozen_features import FeatureLayout, Features
from modeling_vitcls.inference.linear_probe import NUM_LAST_LAYERS, stack_tokens
from modeling_vitcls.runtime.files import read_json, write_json
from modeling_vitcls.runtime.system import format_device_name


@dataclass(frozen=True)
class Options(PhotoOptions):
    """Encoder, images and size of the study."""

    image_size: int = 224
    """Height and width of the images in pixels."""
    num_old: int = 50
    """Number of images of each old class."""
    sizes: tuple[int, ...] = (5, 20, 50)
    """Numbers of images of the added class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that draw the images."""
    classes: tuple[str, ...] = ()
    """Classes that are left out. Default: each of them."""
    trained: str | None = None
    """Class that is left out of a run with steps."""


# Features -----------------------------------------------------------------------------------------


def compute_features(options: Options) -> tuple[list[str], dict[str, Features]]:
    """Return the classes, and the features of both splits, which are kept in OUTPUT."""
    data = DataOptions(dataset=str(options.photos), num_workers=0)
    splits = load_splits(data)
    addition = AddClassOptions(
        model=str(write_encoder(options)),
        dataset=str(options.photos),
        output_dir=Path("not-written"),
        num_workers=0,
    )
    encoder = build_old_model(addition, addition.output_dir)
    layout = FeatureLayout.for_extra_heads(encoder.model.config, NUM_LAST_LAYERS)
    features = {}
    for split in ("train", "test"):
        file = options.output / f"{split}.npz"
        if not file.exists():
            images = splits.images_by_split[split]
            computed = encoder.compute_features(images, splits.label_space)
            np.savez(file, **computed.arrays)
        stored = np.load(file)
        features[split] = Features(layout=layout, **{key: stored[key] for key in stored.files})
    return splits.label_space.names, features


def write_encoder(options: Options) -> Path:
    """Write the encoder for the image size; its image processor scales the shorter side to it."""
    folder = options.output / "encoder"
    if not folder.exists():
        size = options.image_size
        source = open_model(str(options.encoder)).path
        ViTCLSModel.from_pretrained(source, image_size=size).save_pretrained(folder)
        ViTCLSImageProcessor.from_pretrained(
            source, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ).save_pretrained(folder)
    return folder


# Classes ------------------------------------------------------------------------------------------


def leave_out(
    options: Options, features: dict[str, Features], new_label: int, seed: int
) -> list[dict[str, Any]]:
    """Add a class with each number of images, and measure it on the test images."""
    num_classes = features["train"].labels.max() + 1
    order = [label for label in range(num_classes) if label != new_label] + [new_label]
    train, test = (relabel(features[split], order) for split in ("train", "test"))
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(train.labels == c)) for c in range(num_classes)]
    old = train.take(np.concatenate([rows[: options.num_old] for rows in drawn[:-1]]))

    statistics = ClassStatistics.fit(old.get_tokens(), old.labels, num_classes - 1)
    test_logits = compute_logits(statistics, test)
    is_old = test.labels < num_classes - 1
    was_right = test_logits.argmax(axis=1) == test.labels
    results = []
    for num_images in options.sizes:
        new = train.take(drawn[-1][:num_images])
        with_logits = replace(new, logits=compute_logits(statistics, new))
        new_labels = np.zeros(len(new.labels), np.int64)  # of the only new class
        extended = statistics.extend(new.get_tokens(), new_labels, 1)
        weight, bias = build_class_rows(statistics, extended, with_logits)
        new_logits = stack_tokens(test.get_tokens(), statistics.tokens) @ weight.T + bias
        added = np.hstack([test_logits, new_logits]).argmax(axis=1) == test.labels
        everything = old.join(new)
        together = ClassStatistics.fit(everything.get_tokens(), everything.labels, num_classes)
        fitted = compute_logits(together, test).argmax(axis=1) == test.labels
        results.append(
            {
                "num_images": num_images,
                "seed": seed,
                "before": 100 * was_right[is_old].mean(),
                "added": {"recall": 100 * added[~is_old].mean(), "old": 100 * added[is_old].mean()},
                "together": {
                    "recall": 100 * fitted[~is_old].mean(),
                    "old": 100 * fitted[is_old].mean(),
                },
            }
        )
    return results


def relabel(features: Features, order: list[int]) -> Features:
    """Return the features with the labels in another order."""
    labels = np.argsort(order)[features.labels]
    return replace(features, labels=labels)


def compute_logits(statistics: ClassStatistics, features: Features) -> np.ndarray:
    weight, bias = statistics.build_classifier()
    return stack_tokens(features.get_tokens(), statistics.tokens) @ weight.T + bias


def train_and_add(options: Options, name: str) -> dict[str, Any]:
    """Leave a class out of a run with steps, add it by the command, and return its record."""
    folders = {}
    for split in ("train", "test"):
        for part in ("old", "new"):
            folders[split, part] = options.output / part / split
            photos = list_part(options, split, name, is_new=part == "new")
            link_photos(photos, folders[split, part])
    finetune(
        str(options.output / "encoder"),
        str(options.output / "old"),
        output_dir=options.output / "trained",
        trainable="last-4",
        epochs=3,
        select="last",
        num_workers=0,
        report=False,
    )
    trained, added = (options.output / name for name in ("trained", "trained-and-added"))
    record = add_class(trained, str(options.output / "new"), added, num_workers=0)
    old = str(options.output / "old")
    accuracies = [evaluate(each, old, num_workers=0)["accuracy"] for each in (trained, added)]
    return record | {"old_classes_before_and_after": accuracies}


def list_part(options: Options, split: str, name: str, is_new: bool) -> list[Path]:
    """Return the photos of the left-out class, or of the others."""
    files: list[Path] = []
    for source in sorted((options.photos / split).iterdir()):
        if (source.name == name) != is_new:
            continue
        photos = sorted(source.iterdir())
        if split == "train":
            photos = photos[: 20 if is_new else options.num_old]
        files += photos
    return files


# Page ---------------------------------------------------------------------------------------------


def format_rows(rows: list[dict[str, Any]], key: str) -> list[str]:
    """Return a table with the means of the runs that have the same value of `key`."""
    lines = [
        f"| {key.replace('_', ' ')} | runs | recall: added | together | old classes: before "
        "| added | together |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for value in dict.fromkeys(row[key] for row in rows):
        group = [row for row in rows if row[key] == value]
        means = [
            fmean(row["added"]["recall"] for row in group),
            fmean(row["together"]["recall"] for row in group),
            fmean(row["before"] for row in group),
            fmean(row["added"]["old"] for row in group),
            fmean(row["together"]["old"] for row in group),
        ]
        cells = " | ".join(f"{mean:.1f}" for mean in means)
        lines.append(f"| {value} | {len(group)} | {cells} |")
    return lines


def main() -> None:
    options = tyro.cli(Options)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "runs.json"
    runs: dict[str, Any] = read_json(file) if file.exists() else {"classes": []}
    names, features = compute_features(options)

    for name in options.classes or names:
        for seed in options.seeds:
            if not any((row["class"], row["seed"]) == (name, seed) for row in runs["classes"]):
                results = leave_out(options, features, names.index(name), seed)
                runs["classes"] += [{"class": name} | result for result in results]
                write_json(file, runs)
    if options.trained is not None and "trained" not in runs:
        runs["trained"] = train_and_add(options, options.trained)
        write_json(file, runs)

    of_20 = [row for row in runs["classes"] if row["num_images"] == 20]
    tables = [format_rows(runs["classes"], "num_images"), format_rows(of_20, "class")]
    page = "\n\n".join("\n".join(table) for table in tables)
    (options.output / "README.md").write_text(
        f"{page}\n\n{format_device_name(torch.device('cpu'))}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
