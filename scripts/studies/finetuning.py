"""Study: what do a few epochs of fine-tuning add to a frozen encoder with a fitted head?

The results are in model_cards/studies/finetuning.md.

    python scripts/studies/finetuning.py --encoder ENCODER --photos PHOTOS --output runs/finetuning

The arguments are those of first_answer.py. For each number of labels and each seed, `finetune`
trains on all labels: frozen, and five epochs of the last four layers and of all layers.
Each tuned model is also measured with two changes, and with both:

    averaged  each weight is the mean of the start's and the tuned one (WiSE-FT, arXiv 2109.01903)
    refitted  the head is fitted again by `LinearProbe`, to the features of the tuned encoder
"""

import time
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import tyro
from first_answer import Options, compute_metrics
from photos import (
    add_row,
    compute_features,
    draw_photos,
    has_row,
    link_photos,
    list_photos,
    read_rows,
    write_page,
)
from transformers import AutoImageProcessor

from modeling_vitcls import ViTCLSForImageClassification, finetune
from modeling_vitcls.frozen.class_statistics import TokenFeatures
from modeling_vitcls.frozen.linear_probe import LinearProbe, stack_tokens
from modeling_vitcls.inference.intervals import compute_bootstrap_interval
from modeling_vitcls.runtime.files import read_json, write_json


EPOCHS = 5
TRAINABLE = {"head": "frozen", "last-4": "last four layers", "full": "all layers"}
RECIPE = ("trainable", "is_averaged", "is_refitted")
# nothing is held out, and no time is spent on what the study does not read
FLAGS = {"held_out_fraction": 0.0, "average_with_start": 0.0, "report": False, "overwrite": True}


def main() -> None:
    options = tyro.cli(Options)
    for num_labels, seed in product(options.labels, options.seeds):
        for trainable in TRAINABLE:
            for is_averaged in (False, True):
                run_recipe(options, num_labels, seed, trainable, is_averaged)
    write_page(options.output, format_page(read_rows(options.output)))


def run_recipe(
    options: Options, num_labels: int, seed: int, trainable: str, is_averaged: bool
) -> None:
    """Train one model, measure it with its own head and with a refitted one, and add the results."""
    key = {"labels": num_labels, "seed": seed, "trainable": trainable, "is_averaged": is_averaged}
    is_frozen = trainable == "head"
    if has_row(options.output, key) or (is_frozen and is_averaged):
        return

    folder = options.output / f"{num_labels}-{seed}"
    train = draw_photos(options.photos / "train", num_labels, seed)
    test = list_photos(options.photos / "test")
    link_photos(train, folder / "photos")
    seconds = fine_tune(options, folder, trainable)
    model = average_weights(folder, trainable) if is_averaged else folder / trainable
    features = compute_features(model, test)
    labels, targets = (
        np.unique([file.parent.name for file in files], return_inverse=True)[1]
        for files in (train, test)
    )

    probabilities = {False: apply_head(model, features)}
    start_time = time.process_time()
    if not is_frozen:
        probe = LinearProbe().fit(compute_features(model, train), labels)
        probabilities[True] = probe.predict_proba(features)
    refit_seconds = time.process_time() - start_time
    for is_refitted, values in probabilities.items():
        row = key | {
            "is_refitted": is_refitted,
            "cpu_seconds": seconds + is_refitted * refit_seconds,
            **compute_metrics(values, targets),
            "is_right": (values.argmax(axis=1) == targets).astype(int).tolist(),
        }
        add_row(options.output, row)


def fine_tune(options: Options, folder: Path, trainable: str) -> float:
    """Fine-tune on all photographs unless that has been done, and return the CPU seconds."""
    usage = folder / f"{trainable}.json"
    if usage.exists():
        return float(read_json(usage)["cpu_seconds"])
    flags = FLAGS | {"trainable": trainable, "image_size": options.image_size}
    if trainable != "head":
        # the geometry is compared once for all models
        frozen = read_json(folder / "head" / "results.json")["frozen"]
        flags |= {"epochs": EPOCHS, "resize": frozen["resize"]}
    start_time = time.process_time()
    finetune(options.encoder, str(folder / "photos"), folder / trainable, **flags)
    seconds = time.process_time() - start_time
    write_json(usage, {"cpu_seconds": seconds})
    return seconds


def average_weights(folder: Path, trainable: str) -> Path:
    """Write a model whose weights are the means of those of the start and the tuned model."""
    start, tuned = (
        ViTCLSForImageClassification.from_pretrained(folder / name) for name in ("head", trainable)
    )
    weights = start.state_dict()
    tuned.load_state_dict(
        {name: (value + weights[name]) / 2 for name, value in tuned.state_dict().items()}
    )
    output = folder / f"{trainable}-averaged"
    tuned.save_pretrained(output)
    AutoImageProcessor.from_pretrained(folder / trainable).save_pretrained(output)
    return output


@torch.no_grad()
def apply_head(folder: Path, features: TokenFeatures) -> np.ndarray:
    """Return the probabilities [N, K] of the model's own classifier."""
    model = ViTCLSForImageClassification.from_pretrained(folder)
    config = model.config
    kinds = ("cls", "mean") if config.pooling == "cls_mean" else (config.pooling,)
    layers = config.resolve_layers(config.pooled_layers or [config.num_hidden_layers])
    tokens = [(layer - config.num_hidden_layers - 1, kind) for layer in layers for kind in kinds]
    values = torch.from_numpy(stack_tokens(features, tokens)).float()
    return model.classifier(values).softmax(dim=1).double().numpy()


# Page ---------------------------------------------------------------------------------------------


def format_page(rows: list[dict[str, Any]]) -> str:
    """Return a table for each number of labels, with the differences from the frozen model."""
    lines = []
    for num_labels in dict.fromkeys(row["labels"] for row in rows):
        of_labels = [row for row in rows if row["labels"] == num_labels]
        frozen = {row["seed"]: row for row in of_labels if row["trainable"] == "head"}
        lines += [
            f"## {num_labels} labels per class, seeds {', '.join(map(str, frozen))}",
            "",
            "| trained | weights | head | accuracy | difference of each draw, points "
            "| mean (95%) | log loss | calibration error, points | CPU seconds |",
            "|---|---|---|---:|---|---|---:|---:|---:|",
        ]
        recipes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in of_labels:
            recipes.setdefault(tuple(row[name] for name in RECIPE), []).append(row)
        for recipe, runs in recipes.items():
            lines.append(format_row(recipe, runs, frozen))
        lines.append("")
    return "\n".join(lines)


def format_row(
    recipe: tuple[Any, ...], runs: list[dict[str, Any]], frozen: dict[int, dict[str, Any]]
) -> str:
    """Return the row of a recipe, with the mean of its draws."""
    trainable, is_averaged, is_refitted = recipe
    cells = [
        TRAINABLE[trainable],
        "mean with the start" if is_averaged else "",
        "refitted" if is_refitted else "",
        f"{fmean(run['accuracy'] for run in runs):.1%}",
    ]
    # of each test photograph, in points
    values = [
        100 * (np.array(run["is_right"]) - np.array(frozen[run["seed"]]["is_right"]))
        for run in runs
    ]
    if trainable == "head":
        cells += ["", ""]
    else:
        low, high = compute_bootstrap_interval(np.mean(values, axis=0))
        cells += [
            ", ".join(f"{each.mean():+.1f}" for each in values),
            f"{np.mean(values):+.1f} ({low:+.1f} to {high:+.1f})",
        ]
    cells += [
        f"{fmean(run['log_loss'] for run in runs):.2f}",
        f"{100 * fmean(run['calibration_error'] for run in runs):.1f}",
        f"{fmean(run['cpu_seconds'] for run in runs):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
