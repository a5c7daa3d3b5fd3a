"""Study: should a classifier on a trained encoder read the CLS token, the mean of the patches, or both?

The results are in model_cards/studies/class_token.md.

    python scripts/studies/class_token.py --encoder ENCODER --photos PHOTOS --output runs/class-token

ENCODER is any checkpoint that `vitcls convert` takes, and PHOTOS has the folders train/CLASS and
test/CLASS. Each of the last layers is read by scikit-learn's logistic regression, whose C is chosen
by its own cross-validation. The page shows accuracies on all test photographs, and the paired
differences of mean and both from CLS.
"""

import warnings
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tyro
from photos import PhotoOptions, draw_photos, write_page
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_vitcls import Predictor
from modeling_vitcls.inference.intervals import compute_bootstrap_interval


KINDS = ("CLS", "mean", "both")
STRENGTHS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # C, for standardized features


@dataclass(frozen=True)
class Options(PhotoOptions):
    """Encoder, photographs and size of the study."""

    labels: int = 50
    """Number of training photographs per class and draw."""
    max_test: int = 100
    """Largest number of test photographs per class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that draw the training photographs."""
    layers: tuple[int, ...] = (12, 11, 10, 9, 8, 7)
    """Layers to read, counted from 1."""


def main() -> None:
    options = tyro.cli(Options)
    warnings.simplefilter("ignore", FutureWarning)  # of scikit-learn, about default values
    options.output.mkdir(parents=True, exist_ok=True)

    train = [draw_photos(options.photos / "train", options.labels, seed) for seed in options.seeds]
    test = draw_photos(options.photos / "test", options.max_test, seed=0)
    features = compute_features(options, sorted({*test, *chain(*train)}))
    is_right = {
        (layer, kind): np.array([measure(features, layer, kind, draw, test) for draw in train])
        for layer in options.layers
        for kind in KINDS
    }
    write_page(options.output, format_page(options, is_right))


def compute_features(options: Options, files: list[Path]) -> dict[str, dict[Path, np.ndarray]]:
    """Return the features of all photographs by name, such as "cls@12"."""
    names = [f"{kind}@{layer}" for kind in ("cls", "mean") for layer in options.layers]
    values = Predictor(options.encoder, names)({"path": files})
    return {name: dict(zip(files, values[name], strict=True)) for name in names}


def measure(
    features: dict[str, dict[Path, np.ndarray]],
    layer: int,
    kind: str,
    train: list[Path],
    test: list[Path],
) -> np.ndarray:
    """Fit a regression, and return which test photographs [N] it recognizes."""
    names = {"CLS": ["cls"], "mean": ["mean"], "both": ["cls", "mean"]}[kind]

    def collect(files: list[Path]) -> np.ndarray:
        columns = [features[f"{name}@{layer}"] for name in names]
        return np.stack([np.concatenate([column[file] for column in columns]) for file in files])

    regression = LogisticRegressionCV(Cs=STRENGTHS, cv=5, scoring="neg_log_loss", max_iter=500)
    classifier = make_pipeline(StandardScaler(), regression)
    classifier.fit(collect(train), [file.parent.name for file in train])
    return classifier.predict(collect(test)) == np.array([file.parent.name for file in test])


def format_page(options: Options, is_right: dict[tuple[int, str], np.ndarray]) -> str:
    """Return the table of the study."""
    lines = [
        "| layer | CLS | mean of the patches | both | mean - CLS, points | both - CLS, points |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for layer in options.layers:
        accuracies = [f"{is_right[layer, kind].mean():.1%}" for kind in KINDS]
        differences = []
        for kind in KINDS[1:]:
            # of each photograph, averaged over the draws
            values = 100 * (1.0 * is_right[layer, kind] - is_right[layer, "CLS"]).mean(axis=0)
            low, high = compute_bootstrap_interval(values)
            differences.append(f"{values.mean():+.1f} ({low:.1f} to {high:.1f})")
        lines.append(f"| {layer} | {' | '.join([*accuracies, *differences])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
