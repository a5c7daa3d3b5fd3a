"""End of a run: results.json and the last printed lines (run.py)."""

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed.fsdp import FSDPModule

from ..data.images import LabeledImages
from ..data.splits import MAX_CLASS_RATIO
from ..hub.local_paths import is_local, make_relative, split_prefix
from ..hub.model_files import PREDICTIONS_FILE, RESULTS_FILE, SPLITS_FILE
from ..inference.class_statistics import ClassStatistics, Token
from ..inference.evaluator import Predictions
from ..inference.frozen_features import FeatureLayout
from ..inference.linear_probe import KNOWN_RECALL, MIN_DISTANCE_IMAGES, NUM_LAST_LAYERS
from ..model.modeling_vitcls import count_output_tokens
from ..runtime.flags import get_flag_fields, to_arguments, to_flags
from . import pretrain
from .defaults import REFIT_EPOCHS
from .duration import estimate_step_seconds, format_minutes
from .loop import TrainingLoop
from .options import TrainOptions
from .output_folder import CHECKPOINTS_FOLDER
from .probe import FrozenModel
from .reporter import describe_run, format_result
from .run_inputs import Environment, Loaded


MAX_STATISTICS_IMAGES = 5000  # of which the statistics of a trained model are
# flags of a run without steps that this command leaves out; --hub-model-id, because its model would
# replace the frozen one
FLAGS_WITHOUT_FINE_TUNING = (
    "trainable",
    "max_steps",
    "select",
    "early_stopping",
    "resume",
    "overwrite",
    "hub_model_id",
)


@dataclass(frozen=True)
class Trained:
    """The model after the last step."""

    loop: TrainingLoop
    metrics: dict[str, Any]  # of the last evaluation; empty if the run has no steps
    seconds: float


@dataclass(frozen=True)
class Best:
    """The model that is saved, in evaluation mode.

    Attributes:
        model: the model from `Accelerator.prepare`, with the chosen weights.
        step: the step that was chosen, 0 for the frozen model; None if none was chosen.
        score: the metric of the choice, for the selection images.
        frozen: the frozen model with its final classifier, if it was chosen.
    """

    model: Any
    step: int | None
    score: float | None
    frozen: FrozenModel | None = None


@dataclass(frozen=True)
class Result:
    """The metrics of the model that is saved, and its calibration.

    Attributes:
        metrics, calibration: fields of results.json.
        predictions: content of predictions.parquet, if the images have one label each.
        nearest_images: names of the nearest training images of each wrong prediction, by its index.
        lines: to print.
    """

    metrics: dict[str, Any]
    calibration: dict[str, Any] | None
    predictions: Predictions | None
    nearest_images: dict[int, list[str]] | None
    lines: dict[str, str]


def build_results(
    loaded: Loaded,
    frozen_record: dict[str, Any] | None,
    trained: Trained,
    best: Best,
    result: Result,
    environment: Environment,
    features: tuple[dict[str, Any] | None, dict[str, Any] | None],
) -> dict[str, Any]:
    """Return the content of results.json.

    `features` are the metrics of features before and after pre-training.
    """
    data, setup, loop = loaded.data, loaded.setup, trained.loop
    results: dict[str, Any] = {
        "dataset": data.name,
        "split": describe_measured_images(loaded),
        "held_out_split": data.held_out_split,
        "num_training_images": count_training_images(loaded),
        "chosen_flags": loaded.metadata["flags"]["chosen"],
        **setup.results,
    }

    seconds = trained.seconds
    if frozen_record:
        results["frozen"] = frozen_record
        if not loaded.has_steps:
            seconds = frozen_record["seconds"]
    results |= {
        "calibration": result.calibration,
        "selection_metric": setup.selection_metric,
        "forward_flops_per_image": loaded.forward_flops,
        **describe_run(loaded.plan, loop.state.step, setup.model, environment.accelerator, seconds),
        **result.metrics,
        "num_unreadable_training_images": len(loop.unreadable_images.indices),
        "token_movement": loop.monitor.compute_token_movement(),
    }

    if data.selection is not None and loaded.has_steps:
        is_stored = isinstance(data.selection, LabeledImages)
        results["selection"] = {
            "images": data.selection_name,
            "num_images": len(data.selection) if is_stored else None,
            "step": best.step,
            setup.selection_metric: best.score,
        }

    before, after = features
    if before is not None and after is not None:
        summary = pretrain.compare_features(before, after)
        results["features"] = {"before": before, "after": after, "summary": summary}
    return results


def describe_measured_images(loaded: Loaded) -> str:
    """Return the held-out images as text, or that each training image was predicted by folds."""
    has_folds = loaded.options.refit or not loaded.has_steps
    if len(loaded.data.held_out) or not has_folds:
        return loaded.data.held_out_name
    return "cross-validation"


def describe_result(results: dict[str, Any], loaded: Loaded) -> str:
    """Return the result as text: that of held-out images, or the estimate of the probe."""
    text = format_result(results, loaded.setup.result_metrics)
    record = results.get("frozen")
    if results["split"] != "cross-validation" or not record or not record["num_folds"]:
        return text
    low, high = (100 * value for value in results["accuracy_interval"])
    text = (
        f"accuracy {results['accuracy']:.2%} (95% interval: {low:.1f} to {high:.1f}), estimated by "
        f"{record['num_folds']}-fold cross-validation on {results['num_images']:,} images, "
        f"corrected for the choice among {len(record['candidates'])} candidates. "
    )
    if not results["steps"]:
        return f"{text}The saved model was fitted to all of them"
    return (
        f"frozen model: {text}The saved model was fine-tuned from it on all of them, so that its "
        "own accuracy is not measured. `held_out_fraction=0.2` holds out images for this"
    )


def count_training_images(loaded: Loaded) -> int | None:
    """Return the number of images that the model was fitted to; None for a stream.

    It includes the selection images of a run without steps.
    """
    data = loaded.data
    if loaded.has_steps or data.selection is None or data.num_training_images is None:
        return data.num_training_images
    return data.num_training_images + len(data.selection)


def print_result(
    results: dict[str, Any], loaded: Loaded, trained: Trained, environment: Environment
) -> None:
    """Print the last lines of the run."""
    reporter, loop = environment.reporter, trained.loop
    if num_unreadable := len(loop.unreadable_images.indices):
        reporter.warn(
            f"{num_unreadable} training image(s) could not be read and were replaced with other "
            "images"
        )
    reporter.print_line("result", describe_result(results, loaded))
    if loaded.data.class_ratio > MAX_CLASS_RATIO and results.get("per_class"):
        reporter.print_line("classes", describe_class_results(results))
    if "features" in results:
        reporter.print_line("features", results["features"]["summary"])
    if not loaded.has_steps:
        reporter.print_line("steps", describe_fine_tuning(loaded, environment))
    folder = loaded.options.output_dir
    reporter.print_line("saved", describe_saved_files(folder))


def describe_fine_tuning(loaded: Loaded, environment: Environment) -> str:
    """Return that a run had no steps, and the command that fine-tunes, with its duration on a CPU."""
    text = "not fine-tuned: the encoder is frozen. "
    command = build_fine_tuning_command(environment.asked)
    num_images = count_training_images(loaded)
    if loaded.forward_seconds is None or num_images is None:
        return f"{text}To fine-tune all layers: {command}"

    seconds = estimate_step_seconds(
        loaded.forward_seconds, REFIT_EPOCHS, num_images, environment.accelerator.num_processes
    )
    duration = format_minutes(seconds)
    return f"{text}Fine-tuning all layers would take about {duration}: {command}"


def build_fine_tuning_command(asked: TrainOptions) -> str:
    """Return the command of a run without steps, changed so that it trains all layers.

    `asked` are the options as the person set them.
    """
    asked_names = {
        name
        for name, field in get_flag_fields(type(asked)).items()
        if getattr(asked, name) != field.default
    }
    flags = {
        name: shorten_path(value)
        for name, value in to_flags(asked).items()
        if name in asked_names.difference(FLAGS_WITHOUT_FINE_TUNING)
    }
    flags |= {
        "output_dir": f"{flags['output_dir']}-fine-tuned",
        "epochs": f"{REFIT_EPOCHS:g}",
        "refit": True,
    }
    arguments = [argument for flag in flags.items() for argument in to_arguments(*flag)]
    return f"vitcls finetune {shlex.join(arguments)}"


def shorten_path(name: Any) -> Any:
    """Make a local path relative to the working directory, unless two folders lie between them."""
    relative = make_relative(name)
    is_far = is_local(name) and split_prefix(relative)[1].startswith("../../")
    return name if is_far else relative


def describe_class_results(results: dict[str, Any]) -> str:
    """Return the metrics that large classes do not dominate, and what class weights would gain."""
    worst = min(
        (row for row in results["per_class"] if row["images"]), key=lambda row: row["recall"]
    )
    text = (
        f"of different sizes: balanced accuracy {results['balanced_accuracy']:.1%}, macro F1 "
        f"{results['macro_f1']:.1%}, lowest recall {worst['recall']:.1%} ({worst['name']})"
    )
    weighted = results.get("frozen", {}).get("balanced")
    if weighted and weighted["balanced_accuracy"] > weighted["balanced_accuracy_without"]:
        text += (
            ". `class_balance='weights'` would change the balanced accuracy in cross-validation "
            f"from {weighted['balanced_accuracy_without']:.1%} to "
            f"{weighted['balanced_accuracy']:.1%}, and the accuracy from "
            f"{weighted['accuracy_without']:.1%} to {weighted['accuracy']:.1%}"
        )
    return text


def describe_saved_files(folder: Path) -> str:
    """Return what a run has saved, with sizes, because checkpoints may be larger than the model."""
    files = [
        name for name in (RESULTS_FILE, SPLITS_FILE, PREDICTIONS_FILE) if (folder / name).exists()
    ]
    names = ", ".join(["model", "image processor", *files])
    text = f"{folder} ({names}), {measure_size(folder)}"
    checkpoints = folder / CHECKPOINTS_FOLDER
    if checkpoints.exists():
        text += f", of which {measure_size(checkpoints)} are checkpoints"
    return text


def measure_size(folder: Path) -> str:
    """Return the size of the files in a folder."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:,.1f} MB"


# Class statistics ---------------------------------------------------------------------------------


def store_statistics(loaded: Loaded, trained_model: Any) -> None:
    """Store class statistics in a trained model, from one pass over some of its training images.

    A frozen model has them already. Nothing is stored for several labels per image, a stream, a
    sharded model, and one image per class. Unknown images are those whose distance is larger than
    that of most images that the model was not trained on.
    """
    setup, data, model = loaded.setup, loaded.data, loaded.setup.model
    if setup.build_pass is None:
        return
    is_sharded = isinstance(trained_model, FSDPModule)
    if model.class_distance is not None or is_sharded or not isinstance(data.train, LabeledImages):
        return

    compute = partial(compute_tokens, setup.build_pass, model.eval())
    tokens, labels = compute(data.train)
    try:
        statistics = ClassStatistics.fit(tokens, labels, model.config.num_labels)
    except ValueError:  # one image per class
        return
    other_images = data.held_out if data.selection is None else data.selection
    if len(other_images) >= MIN_DISTANCE_IMAGES:
        distances = statistics.compute_distances(compute(other_images)[0])
        threshold = float(np.quantile(distances, KNOWN_RECALL, method="higher"))
        model.config.distance_threshold = threshold
    statistics.set_in_model(model)


def compute_tokens(
    build_pass: Any, model: Any, images: LabeledImages
) -> tuple[dict[Token, np.ndarray], np.ndarray]:
    """Return the features of each token and the labels of some labeled images."""
    layout = FeatureLayout.for_extra_heads(model.config, NUM_LAST_LAYERS)
    # the steps and evaluations have named the unreadable images
    statistics_pass = build_pass(images.draw(MAX_STATISTICS_IMAGES), layout, warn=lambda text: None)
    features = statistics_pass(model)
    features = features.take(features.labels >= 0)
    tokens = features.get_tokens()
    if count_output_tokens(model.vitcls, None, {}) is not None:  # only CLS in the last layer
        del tokens[-1, "mean"]
    return tokens, features.labels
