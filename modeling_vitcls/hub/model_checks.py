"""Checks of the files of a vitcls folder before they are read.

The errors are lines that name the file, the problem and a remedy. After the checks, config.json is
one of this package, and reading the weights runs no code.

What is not checked:
- The weights themselves: whether they are complete and of this configuration shows when they are
  loaded, whether they are finite in the outputs, and whether they are the weights of results.json
  by their hash (`hash_weights` in model_files.py).
- The Python files beside them, which this package neither reads nor runs.
- Where the folder is from, and whether it was changed since: hub/provenance.py, publishing/verify.py.
"""

from pathlib import Path
from typing import Any

import torch

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.fast_image_processing_vitcls import open_regular_file
from ..runtime.files import read_json
from .model_files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    PICKLED_WEIGHTS_PATTERNS,
    PROCESSOR_FILE,
    WEIGHTS_FILE,
    is_match,
    list_weight_files,
)


NOT_VITCLS = "{0} is not a vitcls model. Convert it first: vitcls convert {0} FOLDER"


def check_is_vitcls(source: str, folder: Path) -> None:
    """Check that a folder contains one vitcls model, whose files can be read without running code.

    `source` is the name of the model in error messages. Raise ValueError for other model types, a
    missing or damaged config.json, a damaged preprocessor_config.json, an adapter, pickled weights
    or two sets of weights, and OSError if the weights may not be read.
    """
    # transformers would load the adapter as well, without being asked, and the outputs would not be
    # the ones of the weights that are checked here.
    if (folder / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{source} contains an adapter ({ADAPTER_FILE}), which would change all outputs. Merge "
            "it into its model (PEFT's `merge_and_unload`) and save the model, or remove "
            f"{ADAPTER_FILE}"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{source} does not contain a model: {CONFIG_FILE} is missing. Specify the folder of a "
            "saved model"
        )
    check_config(source, folder / CONFIG_FILE, read_json(folder / CONFIG_FILE))
    if (folder / PROCESSOR_FILE).is_file():
        read_json(folder / PROCESSOR_FILE)
    check_weight_files(source, folder)


def check_config(source: str, file: Path, config_dict: dict[str, Any]) -> None:
    """Check the values of config.json that `ViTCLSConfig` does not check."""
    if config_dict.get("model_type") != ViTCLSConfig.model_type:
        raise ValueError(NOT_VITCLS.format(source))

    dtype = config_dict.get("dtype") or "float32"
    if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"{file}: `dtype` is {dtype!r}, but it must be a type such as float32")

    if config_dict.get("quantization_config") is not None:
        raise ValueError(
            f"{file}: `quantization_config` is set, but quantized weights are not supported. Use "
            "the model that was quantized"
        )

    is_classifier = any(
        str(name).endswith("Classification") for name in config_dict.get("architectures") or ()
    )
    if is_classifier and not config_dict.get("tasks") and config_dict.get("id2label", {}) is None:
        raise ValueError(
            f"{file}: `id2label` is null, but a classifier requires the names of its labels. "
            "Download or save the model again"
        )


def check_weight_files(source: str, folder: Path) -> None:
    """Check that the folder has one set of weights in safetensors, or only exported files."""
    has_one_file = (folder / WEIGHTS_FILE).is_file()
    has_index = (folder / INDEX_FILE).is_file()
    # transformers would read model.safetensors without a word, even if the shards are newer.
    if has_one_file and has_index:
        raise ValueError(
            f"{source} contains two sets of weights: {WEIGHTS_FILE} and the files of {INDEX_FILE}. "
            "Remove the set that does not belong to the model"
        )

    # A folder may have both formats. Then the pickles are not read, so they are no problem.
    is_pickled = any(is_match(file.name, PICKLED_WEIGHTS_PATTERNS) for file in folder.iterdir())
    if is_pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{source} contains pickled weights, which can run code when they are read, and no "
            f"{WEIGHTS_FILE}. Load the weights with torch where you trust them, and save the "
            "model again with `save_pretrained`"
        )

    if any(folder.glob("model.*.safetensors")) and not has_one_file and not has_index:
        raise ValueError(
            f"{source} has the weights of a variant, such as model.fp16.safetensors, and no "
            f"{WEIGHTS_FILE}. Rename the file to {WEIGHTS_FILE}"
        )
    for name in list_weight_files(folder):
        if (folder / name).exists():
            # Otherwise, safetensors reports a file without read permission as missing
            open_regular_file(folder / name).close()
