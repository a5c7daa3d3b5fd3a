"""Study: what does a special token gain on a trained encoder?

The results are in model_cards/studies/tokens.md.

    python scripts/studies/tokens.py --encoder ENCODER --photos PHOTOS --output runs/tokens

For each seed, `finetune` trains on the same photographs: frozen, and five epochs of each row of
`RECIPES`, with all labels; each token has a control, the same run without it, and the table
contains the gates at the end. The teacher is a frozen model of other photographs of the same classes.
Each model is measured on all test photographs, and compared with the frozen one of the same seed.
Each result is appended to OUTPUT/rows.jsonl at once, so that an interrupted study continues.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
from photos import PhotoOptions, draw_photos, link_photos, list_photos
from scipy import stats

from modeling_vitcls import ViTCLSForImageClassification, evaluate, finetune


EPOCHS = 5
SLOW_GATES = (3e-5, 1e-3)  # The second rate is that of gates and new tokens: 0.01 by default
MIN_GATE = 0.1  # Below it, a row says nothing about its token
# Name -> flags of `finetune`. Each token has a control: the same run without it.
RECIPES: dict[str, dict[str, Any]] = {
    "frozen": {"trainable": "head"},
    "classifier alone": {"trainable": "head", "epochs": EPOCHS},
    "all layers": {"epochs": EPOCHS},
    "LoRA": {"trainable": "lora", "epochs": EPOCHS},
    "4 registers, gated, all layers": {"num_register_tokens": 4, "epochs": EPOCHS},
    "4 registers, gates at 1e-3, all layers": {
        "num_register_tokens": 4,
        "learning_rate": SLOW_GATES,
        "epochs": EPOCHS,
    },
    "4 registers, open, all layers": {
        "num_register_tokens": 4,
        "gate_new_tokens": False,
        "epochs": EPOCHS,
    },
    "8 prompts, gated, nothing else": {
        "num_register_tokens": 8,
        "trainable": "tokens",
        "epochs": EPOCHS,
    },
    "8 prompts, gates at 1e-3, nothing else": {
        "num_register_tokens": 8,
        "trainable": "tokens",
        "learning_rate": SLOW_GATES,
        "epochs": EPOCHS,
    },
    "8 prompts, open, nothing else": {
        "num_register_tokens": 8,
        "trainable": "tokens",
        "gate_new_tokens": False,
        "epochs": EPOCHS,
    },
    "CLS for each quarter, all layers": {
        "cls_scopes": ("image", "2x2"),
        "model_config": {"cls_pooling": "concat"},
        "epochs": EPOCHS,
    },
    "teacher on CLS, no token, all layers": {"teacher": True, "epochs": EPOCHS},
    "distillation token, same teacher, all layers": {
        "teacher": True,
        "num_distillation_tokens": 1,
        "distillation": "soft",
        "epochs": EPOCHS,
    },
}


@dataclass(frozen=True)
class Options(PhotoOptions):
    """Measure what the special tokens gain on a trained encoder."""

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
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.recipes:
            run_recipe(options, seed, name, RECIPES[name])
    page = format_page(read_rows(options.output))
    (options.output / "README.md").write_text(page, encoding="utf-8")
    print(page)


def read_rows(output: Path) -> list[dict[str, Any]]:
    file = output / "rows.jsonl"
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []


def run_recipe(options: Options, seed: int, name: str, flags: dict[str, Any]) -> None:
    """Train and measure one model, unless that has been done."""
    key = {"seed": seed, "name": name}
    if any(key.items() <= row.items() for row in read_rows(options.output)):
        return
    folder = options.output / str(seed)
    train = draw_photos(options.photos / "train", options.num_labels, seed)
    link_photos(train, folder / "train")
    link_photos(list_photos(options.photos / "test"), options.output / "test")
    if flags.get("teacher"):
        flags = flags | {"teacher": str(fit_teacher(options, seed, set(train)))}

    start = time.process_time()
    fit(options, folder / "train", folder / "model", **flags)
    seconds = time.process_time() - start
    results = evaluate(folder / "model", options.output / "test", num_workers=0)
    names = ("accuracy", "loss", "calibration_error", "cls_accuracy", "distillation_accuracy")
    row = key | {"cpu_seconds": seconds} | {each: results.get(each) for each in names}
    row["gates"] = read_gates(folder / "model")
    with (options.output / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


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


def read_gates(folder: Path) -> list[float] | None:
    """Read what part of an ordinary token's attention each gated token has, from 0 to 1."""
    model = ViTCLSForImageClassification.from_pretrained(folder)
    gates = model.vitcls.gates
    return None if gates is None else gates.get_gate_values().tolist()


def fit(options: Options, photos: Path, output: Path, **flags: Any) -> None:
    """Train on all photographs, without a report."""
    shutil.rmtree(output, ignore_errors=True)
    settings = {"image_size": options.image_size, "held_out_fraction": 0.0, "report": False}
    finetune(str(options.encoder), str(photos), output, **settings | flags)


def format_page(rows: list[dict[str, Any]]) -> str:
    """Format a table of the recipes: mean accuracy, and paired differences with their interval."""
    lines = [
        "| trained for five epochs | accuracy | over frozen, points (95%) | over all layers, each draw "
        "| mean (95%) | log loss | gates at the end | CPU seconds |",
        "|---|---:|---|---|---|---:|---|---:|",
    ]
    for name in RECIPES:
        own = [row for row in rows if row["name"] == name]
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
            format_gates(own),
            f"{fmean(row['cpu_seconds'] for row in own):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compare(rows: list[dict[str, Any]], own: list[dict[str, Any]], name: str) -> list[float]:
    """Compute differences in accuracy to another recipe on the same draws, in points."""
    others = {row["seed"]: row["accuracy"] for row in rows if row["name"] == name}
    if own[0]["name"] == name:
        return []
    return [100 * (row["accuracy"] - others[row["seed"]]) for row in own]


def format_gates(rows: list[dict[str, Any]]) -> str:
    """Format the range of the gates; a token below 0.1 was hardly in the network."""
    gates = [gate for row in rows for gate in row["gates"] or []]
    if not gates:
        return "open" if "open" in rows[0]["name"] else ""
    note = ": not tested" if fmean(gates) < MIN_GATE else ""
    return f"{min(gates):.3f} to {max(gates):.3f}{note}"


def format_interval(differences: list[float]) -> str:
    if not differences:
        return ""
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    return f"{fmean(differences):+.1f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()
