"""Cross-validation: one run per fold (`--folds`).

Each image is held out in exactly one fold. The confidence interval of the mean uses Student's
t-distribution. This interval is too narrow, because the training images of the folds overlap
(Bengio and Grandvalet 2004, "No unbiased estimator of the variance of k-fold cross-validation").
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..inference.evaluator import round_floats
from ..inference.intervals import compute_mean_interval
from ..runtime.distributed import build_accelerator, run_on_main
from ..runtime.files import write_json
from .output_folder import METRICS_FILE
from .reporter import Reporter, format_metric


FOLDS_FILE = "folds.json"  # results of a cross-validation


def run_folds(options: Any, train_fold: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Train one model per fold in OUTPUT_DIR/fold-1, fold-2, ...

    (`--folds`). Write folds.json and return its content. `train_fold` returns the contents of
    results.json. Raise ValueError if --push-to-hub is set.
    """
    if options.run.push_to_hub:
        raise ValueError(
            "`folds` trains several models, but `push_to_hub=True` pushes only one model. Remove "
            "one of the two flags"
        )

    results = []
    for fold in range(1, options.data.folds + 1):
        folder = options.output_dir / f"fold-{fold}"
        results.append(
            train_fold(replace(options, output_dir=folder, data=replace(options.data, fold=fold)))
        )

    metric = results[0]["selection_metric"]
    values = [result[metric] for result in results]
    mean, half_width = compute_mean_interval(values)
    summary = {
        "metric": metric,
        "mean": round_floats(mean),
        "interval": round_floats([mean - half_width, mean + half_width]),
        "folds": [
            {"folder": f"fold-{index + 1}", metric: value} for index, value in enumerate(values)
        ],
    }

    accelerator = build_accelerator()
    run_on_main(accelerator, lambda: write_json(options.output_dir / FOLDS_FILE, summary))
    low, high = (format_metric(metric, value).split()[-1] for value in summary["interval"])
    Reporter(options.output_dir / METRICS_FILE, accelerator).print_line(
        "folds",
        f"mean {format_metric(metric, mean)} (95% interval: {low} to {high}) over {len(values)} "
        "folds",
    )
    return summary
