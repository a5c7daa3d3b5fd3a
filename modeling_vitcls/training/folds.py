"""Cross-validation: one run per fold (`--folds`).

Each image is held out in exactly one fold. With one label per image, the predictions of all folds
are pooled: the result is that of all images, with the interval of a proportion.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.labels import LabelSpace
from ..hub.model_files import PREDICTIONS_FILE
from ..inference.evaluator import build_predictions, round_floats
from ..inference.image_pass import ImageOutput
from ..runtime.distributed import build_accelerator, run_on_main
from ..runtime.files import write_json
from .options import TrainOptions
from .output_folder import METRICS_FILE
from .probe import MIN_PROBABILITY
from .reporter import Reporter, format_metric


FOLDS_FILE = "folds.json"  # results of a cross-validation


def run_folds(
    options: TrainOptions, train_fold: Callable[[TrainOptions], dict[str, Any]]
) -> dict[str, Any]:
    """Train one model per fold in OUTPUT_DIR/fold-1, fold-2, ...

    (`--folds`). Write folds.json and return its content. `train_fold` returns the contents of
    results.json. Raise ValueError if --push-to-hub is set.
    """
    if options.push_to_hub:
        raise ValueError(
            "`folds` trains several models, but `push_to_hub=True` pushes only one model. Remove "
            "one of the two flags"
        )

    results = []
    for fold in range(1, (options.folds or 0) + 1):
        folder = options.output_dir / f"fold-{fold}"
        results.append(train_fold(replace(options, output_dir=folder, fold=fold)))

    metric = results[0]["selection_metric"]
    folds = [
        {"folder": f"fold-{index}", metric: result[metric]}
        for index, result in enumerate(results, start=1)
    ]
    mean = sum(result[metric] for result in results) / len(results)
    summary = {"metric": metric, "mean": round_floats(mean), "folds": folds}
    text = f"mean {format_metric(metric, mean)} over {len(folds)} folds"

    accelerator = build_accelerator()
    rows = run_on_main(accelerator, lambda: read_predictions(options.output_dir, results))
    if rows is not None:
        names = [row["name"] for row in results[0]["per_class"]]
        label_space = LabelSpace("single_label_classification", {"label": names})
        pooled = build_predictions(label_space, rows, accelerator).metrics
        summary |= pooled
        low, high = (100 * value for value in pooled["accuracy_interval"])
        text = (
            f"{format_metric('accuracy', pooled['accuracy'])} (95% interval: {low:.1f} to "
            f"{high:.1f}) on {pooled['num_images']:,} images, each held out by one of "
            f"{len(folds)} folds"
        )
    run_on_main(accelerator, lambda: write_json(options.output_dir / FOLDS_FILE, summary))
    Reporter(options.output_dir / METRICS_FILE, accelerator).print_line("folds", text)
    return summary


def read_predictions(folder: Path, results: list[dict[str, Any]]) -> list[ImageOutput] | None:
    """Return the predictions of all folds; None without one label per image."""
    import pandas as pd

    files = [folder / f"fold-{index}" / PREDICTIONS_FILE for index in range(1, len(results) + 1)]
    if not all(file.exists() for file in files) or "per_class" not in results[0]:
        return None
    names = [row["name"] for row in results[0]["per_class"]]
    table = pd.concat([pd.read_parquet(file) for file in files])
    return [
        ImageOutput(
            index=index,
            label=torch.tensor(names.index(label)),
            values=np.log(np.maximum(probabilities, MIN_PROBABILITY)).astype(np.float32),
            name=name,
        )
        for index, (label, probabilities, name) in enumerate(
            zip(table["label"], table["probabilities"], table["image"], strict=True)
        )
    ]
