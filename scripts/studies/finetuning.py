"""Study: what do a few epochs of fine-tuning add to a frozen encoder with a fitted head?

The results are in model_cards/studies/finetuning.md.

    python scripts/studies/finetuning.py --encoder ENCODER --photos PHOTOS --output runs/finetuning

The arguments are those of first_answer.py. The encoder has learned positions. For each number
of labels and each seed, `vitcls finetune` trains on all labels: frozen, and five epochs of the last
four layers and of all layers. Each tuned model is also measured with two changes, and with both:

    averaged  each weight is the mean of the start's and the tuned one (WiSE-FT, arXiv 2109.01903)
    refitted  the head is fitted again by `LinearProbe`, to the features of the tuned encoder

Each result is appended to OUTPUT/rows.jsonl at once, so that an interrupted study continues.
"""

import json
import shutil
import time
from itertools import product
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import tyro
from first_answer import BATCH_SIZE, Options, compute_metrics, run_command
from photos import draw_photos, link_photos, list_photos
from PIL import Image
from transformers import AutoImageProcessor

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.data.aspect_ratio import get_resize
from modeling_vitcls.inference.class_statistics import TokenFeatures
from modeling_vitcls.inference.frozen_features import FeatureLayout, pool_layers
from modeling_vitcls.inference.intervals import compute_bootstrap_interval
from modeling_vitcls.inference.linear_probe import NUM_LAST_LAYERS, LinearProbe, stack_tokens
from modeling_vitcls.runtime.files import read_json, write_json


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPOCHS = 5
TRAINABLE = {"head": "frozen", "last-4": "last four layers", "full": "all layers"}
RECIPE = ("trainable", "is_averaged", "is_refitted")
# nothing is held out, and no time is spent on what the study does not read
FLAGS = ("--held-out-fraction", 0, "--average-with-start", 0, "--no-report")


def main() -> None:
    options = tyro.cli(Options)
    options.output.mkdir(parents=True, exist_ok=True)
    for num_labels, seed in product(options.labels, options.seeds):
        for trainable in TRAINABLE:
            run_recipe(options, num_labels, seed, trainable)
    page = format_page(read_rows(options.output))
    (options.output / "README.md").write_text(page, encoding="utf-8")
    print(page)


def read_rows(output: Path) -> list[dict[str, Any]]:
    file = output / "rows.jsonl"
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []


def run_recipe(options: Options, num_labels: int, seed: int, trainable: str) -> None:
    """Train one model, measure it with and without the changes, and append the results."""
    key = {"labels": num_labels, "seed": seed, "trainable": trainable}
    done = [row for row in read_rows(options.output) if key.items() <= row.items()]
    can_change = trainable != "head"
    if len(done) == (4 if can_change else 1):
        return

    folder = options.output / f"{num_labels}-{seed}"
    train = draw_photos(options.photos / "train", num_labels, seed)
    test = list_photos(options.photos / "test")
    link_photos(train, folder / "photos")
    seconds = fine_tune(options, folder, trainable)
    start = load_model(folder / "head")
    tuned = load_model(folder / trainable)
    labels, targets = (
        np.array([tuned.config.label2id[file.parent.name] for file in files])
        for files in (train, test)
    )

    for is_averaged in (False, True) if can_change else (False,):
        rows = [row for row in done if row["is_averaged"] == is_averaged]
        if len(rows) == 2:
            continue
        model = average_weights(start, tuned) if is_averaged else tuned
        features = compute_features(model, start, folder, test)
        for is_refitted in (False, True) if can_change else (False,):
            start_time = time.process_time()
            if is_refitted:
                probe = LinearProbe().fit(compute_features(model, start, folder, train), labels)
                probabilities = probe.predict_proba(features)
            else:
                probabilities = apply_head(model, features)
            row = key | {
                "is_averaged": is_averaged,
                "is_refitted": is_refitted,
                "cpu_seconds": seconds,
                "refit_seconds": time.process_time() - start_time,
                **compute_metrics(probabilities, targets),
                "is_right": (probabilities.argmax(axis=1) == targets).astype(int).tolist(),
            }
            with (options.output / "rows.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print({name: value for name, value in row.items() if name != "is_right"}, flush=True)


# Models -------------------------------------------------------------------------------------------


def fine_tune(options: Options, folder: Path, trainable: str) -> float:
    """Run `vitcls finetune` unless it has been run, and return its CPU seconds."""
    usage = folder / f"{trainable}.json"
    if usage.exists():
        return float(read_json(usage)["cpu_seconds"])
    output = folder / trainable
    shutil.rmtree(output, ignore_errors=True)
    flags: list[object] = ["--model", options.encoder, "--dataset", folder / "photos"]
    flags += ["--output-dir", output, "--trainable", trainable, *FLAGS]
    if options.image_size is not None:
        flags += ["--image-size", options.image_size]
    if trainable != "head":
        # the geometry is compared once for all models
        frozen = read_json(folder / "head" / "results.json")["frozen"]
        flags += ["--epochs", EPOCHS, "--resize", frozen["resize"]]
    seconds = run_command("finetune", *flags)
    write_json(usage, {"cpu_seconds": seconds})
    return seconds


def load_model(folder: Path) -> Any:
    """Load a model in evaluation mode."""
    model = ViTCLSForImageClassification.from_pretrained(folder, device_map=DEVICE)
    model.eval().requires_grad_(False)
    return model


def average_weights(start: Any, tuned: Any) -> Any:
    """Return a model whose weights are the means of those of two models."""
    weights = start.state_dict()
    model = ViTCLSForImageClassification(tuned.config).to(DEVICE).eval().requires_grad_(False)
    model.load_state_dict(
        {name: (value + weights[name]) / 2 for name, value in tuned.state_dict().items()}
    )
    return model


def apply_head(model: Any, features: TokenFeatures) -> np.ndarray:
    """Return the probabilities [N, K] of the model's own classifier."""
    config = model.config
    kinds = ("cls", "mean") if config.pooling == "cls_mean" else (config.pooling,)
    layers = config.resolve_layers(config.pooled_layers or [config.num_hidden_layers])
    tokens = [(layer - config.num_hidden_layers - 1, kind) for layer in layers for kind in kinds]
    values = torch.from_numpy(stack_tokens(features, tokens)).float().to(DEVICE)
    return model.classifier(values).softmax(dim=1).double().cpu().numpy()


# Features -----------------------------------------------------------------------------------------


def compute_features(model: Any, start: Any, folder: Path, files: list[Path]) -> TokenFeatures:
    """Return the features of the last four layers."""
    if have_equal_first_layers(model, start):
        states = compute_start_states(start, folder, files)
    else:
        states = compute_states(model, folder, files)

    encoder = model.vitcls
    layout = FeatureLayout.from_config(model.config, NUM_LAST_LAYERS)
    parts = []
    for batch in states.split(BATCH_SIZE):
        layer_states = [batch]
        for layer in encoder.layers[-NUM_LAST_LAYERS:]:
            layer_states.append(layer(layer_states[-1], None, None))
        outputs = SimpleNamespace(hidden_states=layer_states)
        parts.append(pool_layers(encoder, outputs, layout))
    return layout.split(torch.cat(parts).cpu().numpy())


def have_equal_first_layers(model: Any, start: Any) -> bool:
    """Return whether the layers before the last four have the weights of the start."""
    layers = [each.vitcls.layers[0].state_dict() for each in (model, start)]
    return all(torch.equal(value, layers[1][name]) for name, value in layers[0].items())


# (resizing of the image processor, photographs) -> tokens of the start, which is the same for all draws
START_STATES: dict[tuple[str, tuple[Path, ...]], torch.Tensor] = {}


def compute_start_states(start: Any, folder: Path, files: list[Path]) -> torch.Tensor:
    """Return the tokens of the start before the last four layers, computed once."""
    key = (get_resize(AutoImageProcessor.from_pretrained(folder / "head")), tuple(files))
    if key not in START_STATES:
        START_STATES[key] = compute_states(start, folder, files)
    return START_STATES[key]


def compute_states(model: Any, folder: Path, files: list[Path]) -> torch.Tensor:
    """Return the tokens [N, T, D] before the last four layers."""
    processor = AutoImageProcessor.from_pretrained(folder / "head")
    encoder = model.vitcls
    parts = []
    for start in range(0, len(files), BATCH_SIZE):
        batch = [Image.open(file).convert("RGB") for file in files[start : start + BATCH_SIZE]]
        pixel_values = processor(batch, return_tensors="pt")["pixel_values"].to(DEVICE)
        grid_size = encoder.embeddings.patch_embeddings.get_grid_size(pixel_values)
        states = encoder.embeddings(pixel_values, grid_size)
        for layer in encoder.layers[:-NUM_LAST_LAYERS]:
            states = layer(states, None, None)
        parts.append(states)
    return torch.cat(parts)


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
    seconds = fmean(run["cpu_seconds"] + run["refit_seconds"] for run in runs)
    cells += [
        f"{fmean(run['log_loss'] for run in runs):.2f}",
        f"{100 * fmean(run['calibration_error'] for run in runs):.1f}",
        f"{seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
