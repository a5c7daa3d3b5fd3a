"""Write the folder of a finished run: model, image processor, results, splits and predictions.

The files are staged (runtime/staging.py) and moved into the folder together. run_folder.py looks at
the folder before a run.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from torch.distributed.fsdp import FSDPModule

from ..data.splits import TrainingData
from ..data.splits_table import write_splits
from ..hub.connection import silence_transformers
from ..hub.model_files import (
    CONFIG_FILE,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    hash_settings,
    hash_weights,
)
from ..hub.provenance import find_provenance
from ..inference.evaluator import Predictions
from ..inference.per_image import write_predictions
from ..inference.speed import measure_inference_speed
from ..runtime.distributed import run_on_main
from ..runtime.errors import RunStopped, describe_error, format_error
from ..runtime.files import read_json, write_json
from ..runtime.staging import stage_files
from .checkpoints import WRITE_ERRORS, Tensors
from .distributed_state import gather_weights
from .model import InitialModel, merge_lora
from .training_setup import TrainingSetup


def save_output(
    output_dir: Path,
    setup: TrainingSetup,
    data: TrainingData,
    results: dict[str, Any],
    *,
    initial: InitialModel,
    teacher: str | None,
    predictions: Predictions | None,
    nearest_images: dict[int, list[str]] | None,
) -> None:
    """Write the model, the image processor, results.json and the predictions.

    All processes must call this function. Raise RunStopped on all processes if the folder cannot be
    written.
    """
    # Outside of `write`, because all processes take part in gathering.
    weights = gather_weights(setup.model)
    # Pre-training saves its encoder under the names of a plain encoder; projector and decoder stay
    # in the checkpoints.
    if setup.encoder is not None:
        weights = {
            name.removeprefix("vitcls."): weights[name]
            for name in weights
            if name.startswith("vitcls.")
        }

    def write() -> None:
        try:
            # A run that is killed at any time is continued by --resume: config.json marks the folder
            # of a model and results.json a finished run, so these two are moved last.
            with (
                stage_files(output_dir, CONFIG_FILE, RESULTS_FILE) as folder,
                silence_transformers(),
            ):
                write_model_files(
                    setup,
                    folder,
                    weights=weights,
                    results=results,
                    initial=initial,
                    teacher=teacher,
                )
                write_splits(pd.concat([data.build_splits_table(), setup.encoder_rows]), folder)
                if predictions is not None:
                    weights_hash = read_json(folder / RESULTS_FILE)["weights_sha256"]
                    file = folder / PREDICTIONS_FILE
                    write_predictions(file, predictions, weights_hash, nearest_images)
        except WRITE_ERRORS as error:
            raise OSError(describe_error(error)) from error

    try:
        run_on_main(write)
    except OSError as error:
        raise RunStopped(
            f"cannot write the model to {output_dir}: {format_error(error)}. Then repeat "
            "the command with `resume=True`"
        ) from error


def write_model_files(
    setup: TrainingSetup,
    folder: Path,
    weights: Tensors,
    results: dict[str, Any],
    initial: InitialModel,
    teacher: str | None,
) -> None:
    """Write weights, configuration, code, image processor and results.

    LoRA weights are merged. Only the main process may call this function. `weights` are full
    tensors, because the model may be sharded.
    """
    # FSDP2 replaces the model's class with a subclass. With the subclass, transformers would save
    # PyTorch's source files as the model's code.
    model = setup.encoder or setup.model
    unsharded_class: Any = next(
        base for base in type(model).__mro__ if not issubclass(base, FSDPModule)
    )
    model.__class__ = unsharded_class
    weights = merge_lora(weights)
    model.save_pretrained(folder, state_dict=weights)
    setup.processor.save_pretrained(folder)

    # The hashes tie the results to these weights and settings: nothing publishes them with others.
    results = results | {
        "weights_sha256": hash_weights(folder),
        "settings_sha256": hash_settings(folder),
        "provenance": None,
    }
    if not initial.has_random_weights:
        results["provenance"] = find_provenance(initial.name).copy_to(folder)
    if teacher is not None:
        results["teacher_provenance"] = find_provenance(teacher).to_dict()

    # Read back from disk: `model` may be sharded, and this is what others will load.
    saved_model = unsharded_class.from_pretrained(folder).to(model.device).eval()
    results["inference"] = measure_inference_speed(saved_model, model.device)
    write_json(folder / RESULTS_FILE, results)
