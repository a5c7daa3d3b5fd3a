"""Folders of tiny models, as training writes them, for publishing."""

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from helpers.tiny_models import build_tiny_config, save_with_processor
from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification
from modeling_vitcls.evaluation.evaluator import write_rows
from modeling_vitcls.hub.model_files import PREDICTIONS_FILE, hash_weights
from modeling_vitcls.runtime.files import write_json


RESULTS = {
    "selection_metric": "accuracy",
    "accuracy": 0.983333,
    "accuracy_interval": [0.96, 0.99],
    "num_images": 360,
    "dataset": "digits",
    "split": "split 'test'",
    "held_out_split": "test",
    "num_training_images": 1437,
    "steps": 1123,
    "epochs": 50.0153,
    "seconds": 58.4,
    "device": "CPU",
    "mixed_precision": "no",
    "num_processes": 1,
    "provenance": None,
    "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
}
FLAGS = {
    "output_dir": "./runs/out",
    "model": "vitcls-tiny",
    "dataset": "digits",
    "epochs": 3.0,
    "max_steps": None,
    "push_to_hub": True,
    "hub_model_id": "ann/model",
}


def write_run_folder(
    folder: Path,
    results: dict[str, Any] | None = None,
    flags: dict[str, Any] | None = None,
    model_class: type = ViTCLSForImageClassification,
    config: ViTCLSConfig | None = None,
) -> Path:
    """Write the files of a training run: a tiny model, results.json and config.resolved.yaml.

    `results` and `flags` replace values of RESULTS and FLAGS.
    """
    save_with_processor(
        model_class(config or build_tiny_config(id2label={0: "dusk", 1: "noon", 2: "x"})), folder
    )
    write_results(folder, results)
    (folder / "config.resolved.yaml").write_text(
        yaml.safe_dump(FLAGS | (flags or {}), sort_keys=False)
    )
    return folder


def write_results(folder: Path, results: dict[str, Any] | None = None) -> None:
    """Write results.json for the weights in a folder."""
    write_json(
        folder / "results.json",
        RESULTS | {"weights_sha256": hash_weights(folder)} | (results or {}),
    )


def write_predictions(folder: Path, rows: pd.DataFrame) -> None:
    """Write predictions.parquet of the weights in a folder."""
    write_rows(folder / PREDICTIONS_FILE, rows, hash_weights(folder))
