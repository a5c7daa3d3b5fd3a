"""What an addition writes: the model folder with its records, as a run writes them, and a certificate.

write_addition(old, addition)    certify, or nothing is written -> records, and the printed lines
"""

import shutil
from typing import Any

import pandas as pd

from ..data.splits_table import build_splits_table, read_splits, write_splits
from ..evaluation.evaluator import Predictions, describe_in_trained_scenes, write_rows
from ..frozen.scenes import write_scenes
from ..hub.connection import silence_transformers
from ..hub.model_files import (
    ADDITION_FLAGS_FILE,
    ADDITIONS_KEY,
    CERTIFICATE_FILE,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    hash_settings,
    hash_weights,
)
from ..hub.model_folder import ModelFolder, dump_flags
from ..inference.speed import count_flops
from ..inference.stated_result import format_small_percent, state_addition
from ..runtime.files import write_json
from ..runtime.system import get_versions
from .certificate import certify, describe_certificate, draw_pixels
from .extend import Addition, OldModel


def write_addition(old: OldModel, addition: Addition) -> dict[str, Any]:
    """Write the extended model with its certificate and records, and return the record.

    Raises:
        ModelsDiffer: if another output would change. Nothing is written then.
    """
    images, *_ = addition.parts.values()
    with silence_transformers():
        addition.extended.save_pretrained(old.staging)
        old.processor.save_pretrained(old.staging)
        # Both models are read from their files: what is certified is what is written. The files
        # are still in the hidden folder, so a difference leaves no model behind.
        pixels = draw_pixels(images, old.processor, old.model.config.num_channels)
        new = ModelFolder(old.staging, old.folder.source)
        certificate = certify(old.folder, new, pixels)
    relative_flops = count_flops(addition.extended) / count_flops(old.model) - 1
    record = addition.record | {
        "relative_flops": round(relative_flops, 6),
        "num_parameters": addition.extended.num_parameters() - old.model.num_parameters(),
    }
    write_records(old, addition, record, certificate)
    old.console.print(describe_addition(record, certificate), markup=False)
    return record


def build_result(metric: str, predictions: Predictions, num_folds: int = 0) -> dict[str, Any]:
    """Build the record of the proportion of right predictions with its 95% interval.

    Without folds, the images are held out.
    """
    metrics = predictions.metrics
    return {
        metric: metrics["accuracy"],
        f"{metric}_interval": metrics["accuracy_interval"],
        "num_images": metrics["num_images"],
        "num_right": metrics["num_right"],
        "num_folds": num_folds,
        "per_class": metrics["per_class"],
        "confusion_matrix": metrics.get("confusion_matrix"),
    }


def write_records(
    old: OldModel, addition: Addition, record: dict[str, Any], certificate: dict[str, Any]
) -> None:
    """Write the old model's records, extended by the addition, and the certificate."""
    folder, staging = old.folder, old.staging
    weights_hash = hash_weights(staging)
    write_json(staging / CERTIFICATE_FILE, {"weights_sha256": weights_hash} | certificate)
    if folder.results and (folder.path / RECIPE_FILE).is_file():
        shutil.copyfile(folder.path / RECIPE_FILE, staging / RECIPE_FILE)
    (staging / ADDITION_FLAGS_FILE).write_text(dump_flags(old.flags), encoding="utf-8")
    if addition.trained_scenes:
        write_scenes(addition.trained_scenes, staging, weights_hash)
    if addition.rows is not None:
        write_rows(staging / PREDICTIONS_FILE, addition.rows, weights_hash)

    provenance = folder.provenance
    *_, name = addition.extended.config.extra_heads
    origin = {key: certificate[key] for key in ("date", "old_weights_sha256")}
    results = {
        "versions": get_versions(),
        **folder.results,
        "weights_sha256": weights_hash,
        "settings_sha256": hash_settings(staging),
        "provenance": None if provenance is None else provenance.copy_to(staging),
        ADDITIONS_KEY: folder.results.get(ADDITIONS_KEY, {}) | {name: record | origin},
    }
    write_json(staging / RESULTS_FILE, results)
    # Added classes are classes of the model itself
    splits = build_splits_table(addition.parts, name if record["kind"] == "task" else "")
    write_splits(pd.concat([read_splits(folder), splits]), staging)


def describe_addition(record: dict[str, Any], certificate: dict[str, Any]) -> str:
    """Describe what was added, one line each."""
    lines = {
        "reads": record["reads"],
        "result": state_addition(record),
        "scenes": describe_in_trained_scenes(record.get("in_trained_scenes", {})),
    }
    if "num_unknown" in record:
        lines["unknown"] = (
            f"{record['num_unknown']:,} of these images would be marked as showing none of the classes"
        )
    percent = format_small_percent(record["relative_flops"])
    lines |= {
        "cost": f"{percent} of the forward pass (FLOPs), {record['num_parameters']:,} parameters",
        "unchanged": describe_certificate(certificate),
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items() if text)
