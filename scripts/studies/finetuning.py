"""Study: what do a few epochs of fine-tuning, and a special token, gain on a trained encoder?

The results are in model_cards/studies/finetuning.md and model_cards/studies/tokens.md.

    python scripts/studies/finetuning.py --encoder ENCODER --photos PHOTOS --output runs/finetuning

For each seed, `finetune` trains on the same photographs: frozen, and five epochs of each row of
`RECIPES`, with all labels, but for the row "default". The saved weights are the means of the
start's and the trained ones (WiSE-FT, arXiv 2109.01903), but for the rows "not averaged". Each
token has a control, the same run without it. The teacher is a frozen model of other photographs of
the same classes. Each model is measured on all test photographs, and compared with the frozen one
of the same seed.
"""

import time
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

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
from scipy import stats

from modeling_vitcls import evaluate, finetune


EPOCHS = 5
# Name -> flags of `finetune`, five epochs if they set none. Each token has a control: the same run without it.
RECIPES: dict[str, dict[str, Any]] = {
    "frozen": {"trainable": "head", "epochs": None},
    "classifier alone": {"trainable": "head"},
    "last four layers": {"trainable": "last-4"},
    "last four layers, not averaged": {"trainable": "last-4", "average_with_start": 0.0},
    "all layers": {},
    "all layers, default: a fifth or a tenth held out": {"held_out_fraction": None},
    "all layers, not averaged": {"average_with_start": 0.0},
    "LoRA": {"trainable": "lora"},
    "4 registers, faded in, all layers": {"num_register_tokens": 4},
    "4 registers at once, all layers": {"num_register_tokens": 4, "token_fade_in_steps": 0},
    "8 prompts, faded in, nothing else": {"num_register_tokens": 8, "trainable": "tokens"},
    "8 prompts at once, nothing else": {
        "num_register_tokens": 8,
        "trainable": "tokens",
        "token_fade_in_steps": 0,
    },
    "CLS for each quarter, all layers": {
        "cls_scopes": ("image", "2x2"),
        "pooling": "cls",
        "model_config": {"cls_pooling": "concat"},
    },
    "teacher on CLS, no token, all layers": {"teacher": True},
    "distillation token, same teacher, all layers": {
        "teacher": True,
        "num_distillation_tokens": 1,
        "distillation": "soft",
    },
}


@dataclass(frozen=True)
class Options(PhotoOptions):
    """Measure what fine-tuning and special tokens gain on a trained encoder."""

    num_labels: int = 20
    """Photographs of each class."""
    num_teacher_labels: int = 80
    """Photographs of each class that train the teacher, none of which train the student."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Rows of the table."""
    image_size: int = 112


def main() -> None:
    options = tyro.cli(Options)
    for seed, name in product(options.seeds, options.recipes):
        if not has_row(options.output, {"seed": seed, "name": name}):
            run_recipe(options, seed, name, RECIPES[name])
    write_page(options.output, format_page(read_rows(options.output)))


def run_recipe(options: Options, seed: int, name: str, flags: dict[str, Any]) -> None:
    """Train and measure one model."""
    folder = options.output / str(seed)
    train = draw_photos(options.photos / "train", options.num_labels, seed)
    link_photos(train, folder / "train")
    link_photos(list_photos(options.photos / "test"), options.output / "test")
    if flags.get("teacher"):
        flags = flags | {"teacher": str(fit_teacher(options, seed, set(train)))}

    start = time.process_time()
    fit(options, folder / "train", folder / "model", **{"epochs": EPOCHS} | flags)
    seconds = time.process_time() - start
    results = evaluate(folder / "model", options.output / "test", num_workers=0)
    names = ("accuracy", "loss", "calibration_error", "cls_accuracy", "distillation_accuracy")
    row = {"seed": seed, "name": name, "cpu_seconds": seconds}
    row |= {each: results.get(each) for each in names}
    add_row(options.output, row)


def fit_teacher(options: Options, seed: int, students: set[Path]) -> Path:
    """Fit a frozen classifier to other photographs, and record its accuracy."""
    folder = options.output / str(seed)
    others = [each for each in list_photos(options.photos / "train") if each not in students]
    chosen: list[Path] = []
    for name in sorted({each.parent.name for each in others}):
        photos = [each for each in others if each.parent.name == name]
        chosen += photos[: options.num_teacher_labels]
    link_photos(chosen, folder / "teacher-photos")
    results = folder / "teacher" / "results.json"
    if not results.exists():
        fit(options, folder / "teacher-photos", folder / "teacher", trainable="head")
    accuracy = evaluate(folder / "teacher", options.output / "test", num_workers=0)["accuracy"]
    print({"seed": seed, "teacher": accuracy}, flush=True)
    return folder / "teacher"


def fit(options: Options, photos: Path, output: Path, **flags: Any) -> None:
    """Train on all photographs, without a report."""
    finetune(
        options.encoder,
        str(photos),
        output,
        image_size=options.image_size,
        report=False,
        overwrite=True,
        **{"held_out_fraction": 0.0} | flags,
    )


def format_page(rows: list[dict[str, Any]]) -> str:
    """Format a table of the recipes: mean accuracy, and paired differences with their interval."""
    lines = [
        "| trained for five epochs | accuracy | over frozen, points (95%) | over all layers, each draw "
        "| mean (95%) | log loss | calibration error, points | CPU seconds |",
        "|---|---:|---|---|---|---:|---:|---:|",
    ]
    for name in RECIPES:
        own = sorted((row for row in rows if row["name"] == name), key=itemgetter("seed"))
        if not own:
            continue
        over_frozen = compare(rows, own, "frozen")
        over_all = compare(rows, own, "all layers")
        cells = [
            name,
            f"{100 * fmean(row['accuracy'] for row in own):.1f}%",
            format_interval(over_frozen),
            ", ".join(f"{each:+.1f}" for each in over_all),
            format_interval(over_all),
            f"{fmean(row['loss'] for row in own):.3f}",
            f"{100 * fmean(row['calibration_error'] for row in own):.1f}",
            f"{fmean(row['cpu_seconds'] for row in own):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compare(rows: list[dict[str, Any]], own: list[dict[str, Any]], name: str) -> list[float]:
    """Compute differences in accuracy to another recipe on the same draws, in points."""
    others = {row["seed"]: row["accuracy"] for row in rows if row["name"] == name}
    if own[0]["name"] == name:
        return []
    return [100 * (row["accuracy"] - others[row["seed"]]) for row in own if row["seed"] in others]


def format_interval(differences: list[float]) -> str:
    if not differences:
        return ""
    mean = f"{fmean(differences):+.1f}"
    if len(differences) == 1:
        return mean
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    return f"{mean} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()
