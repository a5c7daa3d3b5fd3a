"""Write the folder of a finished run: model, image processor, results, splits and predictions.

The files are staged (runtime/staging.py) and moved into the folder together. run_folder.py looks at
the folder before a run.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from torch.distributed.fsdp import FSDPModule

from ..data.splits_table import build_splits_table, write_splits
from ..evaluation.evaluator import build_rows, write_rows
from ..frozen.scenes import write_scenes
from ..hub.connection import silence_transformers
from ..hub.model_files import (
    PREDICTIONS_FILE,
    RESULTS_FILE,
    hash_settings,
    hash_weights,
)
from ..hub.provenance import find_provenance
from ..runtime.distributed import run_on_main
from ..runtime.errors import RunStopped, describe_error, format_error
from ..runtime.files import write_json
from ..runtime.staging import stage_files
from .checkpoints import WRITE_ERRORS, Tensors
from .distributed_state import gather_weights
from .model import merge_lora
from .run_inputs import RunInputs
from .run_results import Outcome


def save_output(
    output_dir: Path,
    inputs: RunInputs,
    outcome: Outcome,
    results: dict[str, Any],
) -> None:
    """Write the folder of a run. All processes must call this function.

    Args:
        output_dir: the folder.
        inputs: what the run has read, with the model that it has trained.
        outcome: what the run has made.
        results: content of results.json, without what is known only after the model is written.

    Raises:
        RunStopped: on all processes, if the folder cannot be written.
    """
    # Outside of `write`, because all processes take part in gathering.
    weights = gather_weights(inputs.model)

    def write() -> None:
        try:
            # A run that is killed at any time is continued by --resume: results.json marks a finished
            # run, so it is moved last.
            with stage_files(output_dir, RESULTS_FILE) as folder, silence_transformers():
                write_model(inputs, folder, weights)
                # The hashes tie the results to these weights and settings: nothing publishes them
                # with others.
                weights_hash = hash_weights(folder)
                record: dict[str, Any] = {
                    "weights_sha256": weights_hash,
                    "settings_sha256": hash_settings(folder),
                }
                record["provenance"] = None
                if not inputs.initial.has_random_weights:
                    provenance = find_provenance(inputs.initial.name)
                    record["provenance"] = provenance.copy_to(folder)  # With the license files
                if inputs.options.teacher is not None:
                    teacher_provenance = find_provenance(inputs.options.teacher)
                    record["teacher_provenance"] = teacher_provenance.to_dict()
                write_json(folder / RESULTS_FILE, results | record)
                data = outcome.data
                parts = {"train": data.train, "validation": data.selection, "test": data.held_out}
                write_splits(pd.concat([build_splits_table(parts), inputs.encoder_rows]), folder)
                if outcome.trained_scenes is not None:
                    write_scenes({"": outcome.trained_scenes}, folder, weights_hash)
                if outcome.predictions is not None:
                    rows = build_rows(outcome.predictions)
                    write_rows(folder / PREDICTIONS_FILE, rows, weights_hash)
        except WRITE_ERRORS as error:
            raise OSError(describe_error(error)) from error

    try:
        run_on_main(write)
    except OSError as error:
        raise RunStopped(
            f"cannot write the model to {output_dir}: {format_error(error)}. Then repeat "
            "the command with `resume=True`"
        ) from error


def write_model(inputs: RunInputs, folder: Path, weights: Tensors) -> None:
    """Write weights, configuration, code and image processor.

    LoRA weights are merged. `weights` are full tensors, because the model may be sharded.
    """
    model = inputs.model
    # FSDP2 replaces the model's class with a subclass. With the subclass, transformers would save
    # PyTorch's source files as the model's code.
    model.__class__ = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    merged = merge_lora(weights)
    if getattr(model, "class_distance", None) is not None:
        # The run has fitted the statistics to these weights, before they were merged or gathered
        prefix = f"{model.base_model_prefix}."
        encoder_weights = {
            name.removeprefix(prefix): weight
            for name, weight in merged.items()
            if name.startswith(prefix)
        }
        model.class_distance.claim(model.base_model, encoder_weights)
    model.save_pretrained(folder, state_dict=merged)
    inputs.processor.save_pretrained(folder)
