"""Study: `finetune` on few photographs, and ten lines of scikit-learn.

The results are in model_cards/studies/first_answer.md.

    python scripts/studies/first_answer.py --encoder ENCODER --photos PHOTOS --output runs/first-answer

ENCODER is a transformers folder of a ViT, and PHOTOS has the folders train/CLASS and test/CLASS.
For each number of labels and each seed, the same training photographs go through

    ours          `finetune` and `evaluate` with no other arguments than paths (and the image size)
    scikit-learn  the encoder and its own image processor in transformers, `LogisticRegressionCV` on the CLS token

The run's own estimate of its accuracy is compared with the accuracy on the test photographs. The
features of scikit-learn's side are computed once; its CPU time is that of the images that a run
needs.
"""

import time
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import tyro
from photos import (
    PhotoOptions,
    add_row,
    draw_photos,
    has_row,
    link_photos,
    list_photos,
    read_rows,
    write_page,
)
from PIL import Image
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import log_loss
from transformers import AutoImageProcessor, AutoModel

from modeling_vitcls import evaluate, finetune
from modeling_vitcls.inference.metrics import compute_calibration_error


BATCH_SIZE = 8
NAMES = {"ours": "ours", "peer": "scikit-learn"}
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # C of the peer, chosen by its own cross-validation


@dataclass(frozen=True)
class Options(PhotoOptions):
    """Encoder, photographs and size of the study."""

    labels: tuple[int, ...] = (20, 50, 100)
    """Numbers of training photographs per class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that draw the training photographs."""
    image_size: int | None = None
    """Side of the images in pixels. Default: 224, that of the checkpoint's image processor."""


def main() -> None:
    options = tyro.cli(Options)
    for num_labels, seed in product(options.labels, options.seeds):
        key = {"labels": num_labels, "seed": seed}
        if not has_row(options.output, key):
            chosen = draw_photos(options.photos / "train", num_labels, seed)
            ours = run_ours(options, chosen, options.output / f"{num_labels}-{seed}")
            add_row(options.output, key | {"ours": ours, "peer": run_peer(options, chosen)})
    write_page(options.output, format_page(read_rows(options.output)))


# Ours ---------------------------------------------------------------------------------------------


def run_ours(options: Options, chosen: list[Path], folder: Path) -> dict[str, Any]:
    """Fine-tune on the chosen photographs, and evaluate on all test photographs."""
    link_photos(chosen, folder / "photos")
    start_time = time.process_time()
    estimated = finetune(
        options.encoder,
        str(folder / "photos"),
        folder / "run",
        image_size=options.image_size,
        overwrite=True,
    )
    metrics = evaluate(folder / "run", str(options.photos / "test"))
    return {
        "estimate": estimated["accuracy"],
        "interval": estimated["accuracy_interval"],
        "accuracy": metrics["accuracy"],
        "calibration_error": metrics["calibration_error"],
        "num_images": metrics["num_images"],
        "cpu_seconds": time.process_time() - start_time,
    }


# scikit-learn -------------------------------------------------------------------------------------


@cache
@torch.no_grad()
def compute_cls_tokens(options: Options) -> tuple[dict[Path, np.ndarray], float]:
    """Return the CLS tokens of all photographs, and the CPU seconds for each photograph.

    The image processor is the checkpoint's own.
    """
    model = AutoModel.from_pretrained(options.encoder).eval()
    processor = AutoImageProcessor.from_pretrained(options.encoder)
    if options.image_size is not None:
        processor.size = {"shortest_edge": round(options.image_size * 256 / 224)}
        processor.crop_size = {"height": options.image_size, "width": options.image_size}
    files = list_photos(options.photos / "train") + list_photos(options.photos / "test")
    values: dict[Path, np.ndarray] = {}
    start_time = time.process_time()
    for start in range(0, len(files), BATCH_SIZE):
        batch = files[start : start + BATCH_SIZE]
        images = processor([Image.open(file).convert("RGB") for file in batch], return_tensors="pt")
        tokens = model(**images).last_hidden_state[:, 0].numpy()
        values |= dict(zip(batch, tokens, strict=True))
    return values, (time.process_time() - start_time) / len(files)


def run_peer(options: Options, chosen: list[Path]) -> dict[str, float]:
    """Fit scikit-learn's regression to the chosen photographs, and measure it."""
    tokens, seconds_per_image = compute_cls_tokens(options)
    test = list_photos(options.photos / "test")
    labels, test_labels = (
        np.array([file.parent.name for file in files]) for files in (chosen, test)
    )
    train_features, test_features = (
        np.stack([tokens[file] for file in files]) for files in (chosen, test)
    )

    start_time = time.process_time()
    classifier = LogisticRegressionCV(Cs=STRENGTHS, cv=5, scoring="neg_log_loss", max_iter=500)
    classifier.fit(train_features, labels)
    probabilities = classifier.predict_proba(test_features)
    seconds = time.process_time() - start_time

    targets = np.searchsorted(classifier.classes_, test_labels)
    metrics = compute_metrics(probabilities, targets)
    seconds += seconds_per_image * (len(chosen) + len(test))
    return metrics | {"cpu_seconds": seconds}


def compute_metrics(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return the accuracy, log loss and calibration error of probabilities [N, K]."""
    return {
        "accuracy": float((probabilities.argmax(axis=1) == targets).mean()),
        "log_loss": log_loss(targets, probabilities, labels=range(probabilities.shape[1])),
        "calibration_error": compute_calibration_error(np.log(probabilities), targets),
    }


# Page ---------------------------------------------------------------------------------------------


def format_page(rows: list[dict[str, Any]]) -> str:
    """Return the tables of the study."""
    lines = [
        "| labels per class | seed | ours | scikit-learn | difference, points | estimate (95%) |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        ours, peer = (100 * row[name]["accuracy"] for name in NAMES)
        low, high = (100 * value for value in row["ours"]["interval"])
        lines.append(
            f"| {row['labels']} | {row['seed']} | {ours:.1f}% | {peer:.1f}% | {ours - peer:+.1f} "
            f"| {100 * row['ours']['estimate']:.1f}% ({low:.1f} to {high:.1f}) |"
        )
    lines += [
        "",
        "| labels per class | | accuracy | calibration error, points | CPU seconds |",
        "|---:|---|---:|---:|---:|",
    ]
    for num_labels in dict.fromkeys(row["labels"] for row in rows):
        for name, heading in NAMES.items():
            runs = [row[name] for row in rows if row["labels"] == num_labels]
            means = {
                key: fmean(run[key] for run in runs)
                for key in ("accuracy", "calibration_error", "cpu_seconds")
            }
            lines.append(
                f"| {num_labels} | {heading} | {means['accuracy']:.1%} "
                f"| {100 * means['calibration_error']:.1f} | {means['cpu_seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
