"""Study: classes that are added to a finished model (model_cards/studies/additions.md).

    python scripts/studies/additions.py --encoder ENCODER --photos PHOTOS --output runs/additions

ENCODER is a ViT, as `vitcls convert` takes it. PHOTOS has the folders train and test with a folder
per class. Every image passes the encoder once. Each class is then left out in turn: of the others,
shrinkage LDA on CLS and the mean of the patches of the last four layers is the classifier.
`vitcls add-class` adds the class by its mean; `together` is LDA of all classes.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import tyro
from photos import (
    PhotoOptions,
    add_row,
    compute_features,
    has_row,
    list_photos,
    read_rows,
    write_page,
)

from modeling_vitcls import ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.conversion.open_model import open_model
from modeling_vitcls.frozen.class_statistics import ClassStatistics, TokenFeatures
from modeling_vitcls.frozen.linear_probe import stack_tokens


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


@dataclass(frozen=True)
class Images:
    """Features of N images, and their classes."""

    features: TokenFeatures
    labels: np.ndarray  # [N]

    def take(self, indices: np.ndarray) -> "Images":
        features = {token: values[indices] for token, values in self.features.items()}
        return Images(features, self.labels[indices])

    def predict(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Predict the class of each image with a classifier of all tokens."""
        logits = stack_tokens(self.features, list(self.features)) @ weight.T + bias
        return logits.argmax(axis=1)


def main() -> None:
    options = tyro.cli(Options)
    encoder = write_encoder(options)
    train, test = (read_images(options, encoder, split) for split in ("train", "test"))
    names = sorted(folder.name for folder in (options.photos / "train").iterdir())

    for name, seed in product(options.classes or names, options.seeds):
        if not has_row(options.output, {"class": name, "seed": seed}):
            for result in leave_out(options, train, test, names.index(name), seed):
                add_row(options.output, {"class": name, "seed": seed} | result)

    rows = read_rows(options.output)
    of_20 = [row for row in rows if row["num_images"] == 20]
    tables = [format_rows(rows, "num_images"), format_rows(of_20, "class")]
    write_page(options.output, "\n\n".join("\n".join(table) for table in tables))


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


def read_images(options: Options, encoder: Path, split: str) -> Images:
    """Compute the features of all images of a split."""
    files = list_photos(options.photos / split)
    labels = np.unique([file.parent.name for file in files], return_inverse=True)[1]
    return Images(compute_features(encoder, files), labels)


def leave_out(
    options: Options, train: Images, test: Images, new_label: int, seed: int
) -> list[dict[str, Any]]:
    """Add a class with each number of images, and measure it on the test images."""
    num_classes = train.labels.max() + 1
    order = np.append(np.delete(np.arange(num_classes), new_label), new_label)
    train, test = (Images(each.features, np.argsort(order)[each.labels]) for each in (train, test))
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(train.labels == c)) for c in range(num_classes)]
    chosen_old = np.concatenate([rows[: options.num_old] for rows in drawn[:-1]])

    old = train.take(chosen_old)
    statistics = ClassStatistics.fit(old.features, old.labels, num_classes - 1)
    weight, bias = statistics.build_classifier()
    was_right = test.predict(weight, bias) == test.labels
    is_old = test.labels < num_classes - 1
    results = []
    for num_images in options.sizes:
        chosen_new = drawn[-1][:num_images]
        new = train.take(chosen_new)
        numbers = np.arange(len(new.labels))
        extended = statistics.extend(new.features, 0 * numbers, 1, groups=numbers, threshold=None)
        new_weight, new_bias = extended.build_new_rows(num_classes - 1)
        with_new = np.vstack([weight, new_weight]), np.append(bias, new_bias)
        everything = train.take(np.append(chosen_old, chosen_new))
        together = ClassStatistics.fit(everything.features, everything.labels, num_classes)
        result = {"num_images": num_images, "before": 100 * was_right[is_old].mean()}
        for kind, classifier in (("added", with_new), ("together", together.build_classifier())):
            is_right = test.predict(*classifier) == test.labels
            result[kind] = {
                "recall": 100 * is_right[~is_old].mean(),
                "old": 100 * is_right[is_old].mean(),
            }
        results.append(result)
    return results


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


if __name__ == "__main__":
    main()
