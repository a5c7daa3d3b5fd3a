"""Names and hashes of the files in a model folder, and checks before they are read.

The folder is the interface between training or conversion and publishing.

config.json, preprocessor_config.json, model*.safetensors, *_vitcls.py      the model
results.json, splits.parquet, config.resolved.yaml, metrics.jsonl           a training run
parity_report.json                                                          a conversion
certificate.json, addition.resolved.yaml                                    an added task or class
README.md, report.html, images/                                            for publication

After `check_is_vitcls`, config.json is one of this package, and reading the weights runs no code.
Errors are lines that name the file, the problem and a remedy. What is not checked:
- The weights themselves: whether they are complete and of this configuration shows when they are
  loaded, whether they are finite in the outputs, and whether they are the weights of results.json
  by their hash (`hash_weights`).
- The Python files next to them, which this package neither reads nor runs.
- Where the folder is from, and whether it was changed since: hub/provenance.py, publishing/verify.py.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..runtime.files import compute_file_digest, compute_json_digest, read_json


CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
CONFIG_FILES = (CONFIG_FILE, PROCESSOR_FILE)
# Settings in these files that do not change outputs.
UNMEASURED_SETTINGS = ("auto_map", "code_version", "transformers_version", "_name_or_path")
RESULTS_FILE = "results.json"
RECIPE_FILE = "config.resolved.yaml"  # The flags of a run
SPLITS_FILE = "splits.parquet"  # Content key and split of each image that a run saw
SCENES_FILE = "trained_scenes.npz"  # Recognizes photos of the scenes that trained the model
PREDICTIONS_FILE = "predictions.parquet"  # Predictions of the held-out images
LABELS_FILE = "labels.html"  # Page that asks a person about labels; never published
METRICS_FILE = "metrics.jsonl"
PARITY_REPORT_FILE = "parity_report.json"  # Parity report of a conversion
ADDITION_FLAGS_FILE = "addition.resolved.yaml"  # The flags of the last addition; not published
CERTIFICATE_FILE = "certificate.json"  # Which outputs of an earlier model did not change
ADDITIONS_KEY = "additions"  # Added tasks and classes in results.json: name of the head -> record
CARD_FILE = "README.md"
REPORT_FILE = "report.html"  # HTML report with held-out images
IMAGES_FOLDER = "images"
# The only figure that shows images of the dataset.
SAMPLE_IMAGES_FILE = f"{IMAGES_FOLDER}/attention.png"
CODE_PATTERN = "*_vitcls.py"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"  # Which file contains which weight, if there are several
WEIGHTS_PATTERNS = (WEIGHTS_FILE, "model-*-of-*.safetensors", INDEX_FILE)
# Pickled weight files, which older models from other projects contain.
PICKLED_WEIGHTS_PATTERNS = (
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
)
HEAD = re.compile(r"(classifier|extra_heads).*weight$")  # Names of the weights of heads
MANY_LABELS = 30_000  # Checked within a second or two, without looking at the weights
ADAPTER_FILE = "adapter_config.json"  # transformers adds the adapter that it describes


# License files come before notices, and the first one is linked as the license.
LICENSE_FILES = tuple(
    f"{name}{ending}"
    for name in ("LICENSE", "LICENCE", "License", "license", "COPYING", "NOTICE")
    for ending in ("", ".md", ".txt")
)
# Files that define the model.
MODEL_PATTERNS = (*CONFIG_FILES, *WEIGHTS_PATTERNS, CODE_PATTERN)
# Files of a training run, which belong to certain weights.
RUN_FILES = (RESULTS_FILE, SPLITS_FILE, METRICS_FILE, RECIPE_FILE, REPORT_FILE)
# Files that commands read again, which no other output replaces.
REQUIRED_PATTERNS = (
    *MODEL_PATTERNS,
    RESULTS_FILE,
    SPLITS_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    SCENES_FILE,
    PREDICTIONS_FILE,
    PARITY_REPORT_FILE,
    CERTIFICATE_FILE,
    ADDITION_FLAGS_FILE,
)
GRAPH_FILE = "model.onnx"
# Files of `vitcls export`: FILE.json is the report of FILE, and FILE.data has large weights.
EXPORT_PATTERNS = ("*.onnx", "*.onnx.json", "*.onnx.data")
# Files that a run writes at the end, and exports of them, in the order in which they are removed;
# the results and the model come first.
FINAL_FILE_PATTERNS = (
    RESULTS_FILE,
    SPLITS_FILE,
    SCENES_FILE,
    *MODEL_PATTERNS,
    PREDICTIONS_FILE,
    LABELS_FILE,
    ADDITION_FLAGS_FILE,
    CARD_FILE,
    *LICENSE_FILES,
    REPORT_FILE,
    PARITY_REPORT_FILE,
    f"{IMAGES_FOLDER}/*.png",
    GRAPH_FILE,
    f"{GRAPH_FILE}.*",
)


def is_match(name: str, patterns: Iterable[str]) -> bool:
    """Check whether a path, such as `images/cat.png`, matches any of the patterns.

    `*` does not match `/`.
    """
    # The `*` of fnmatch also matches `/`, so a pattern of the folder would match the files of its
    # subfolders.
    return any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns
    )


def check_output_files(**files: Path | None) -> None:
    """Raise ValueError if a file to write is a link, a folder, a device, or a file of a model.

    Args:
        files: argument that the message names -> file to write.
    """
    for name, file in files.items():
        if file is None:
            continue
        # Replacing a link would leave its file as it was
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise ValueError(
                f"`{name}={str(file)!r}` is not a file that can be replaced. Set the path of a file"
            )
        is_in_model = (file.resolve().parent / CONFIG_FILE).is_file()
        if is_in_model and is_match(file.name, REQUIRED_PATTERNS):
            raise ValueError(
                f"`{name}={str(file)!r}` would replace a file of the model in {file.parent}. "
                "Choose another file"
            )


def list_weight_files(folder: Path) -> list[str]:
    """List the names of the weight files.

    Raise ValueError if the index of the weights does not contain names of files in the same folder.
    """
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        return [WEIGHTS_FILE]
    # The names come from a file that anybody may have written. The patterns have no `/`, so a name
    # such as ../../secret is refused.
    weight_map = read_json(index_file).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(
        isinstance(name, str) and is_match(name, WEIGHTS_PATTERNS) for name in names
    ):
        raise ValueError(
            f"cannot read {index_file}: `weight_map` must contain a file such as "
            "model-00001-of-00002.safetensors for each weight. Save or download the model again"
        )
    return sorted(set(names))


def list_license_files(folder: Path) -> list[str]:
    """List the names of license and notice files, the license first."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    return [name for name in LICENSE_FILES if name in names]


def hash_weights(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of each weight file, by file name."""
    return hash_files(folder / name for name in list_weight_files(folder))


def hash_settings(folder: Path) -> dict[str, str]:
    """Compute a SHA-256 of the values in config.json and preprocessor_config.json, by file name.

    Values that do not change outputs are left out, and so are those at their defaults, which the
    configuration of a newer version may add when the model is saved again.
    """
    # Imported here: options of commands import this file, and flags are parsed without torch.
    from ..model.configuration_vitcls import ViTCLSConfig

    defaults = {CONFIG_FILE: {field.name: field.default for field in fields(ViTCLSConfig)}}
    hashes = {}
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            values = read_json(folder / name)
            settings = {
                key: value
                for key, value in values.items()
                if key not in UNMEASURED_SETTINGS
                and not is_equal(value, defaults.get(name, {}).get(key))
            }
            # Saving a model again may change the order of the keys, but not what they mean.
            hashes[name] = compute_json_digest(settings)
    return hashes


def is_equal(value: Any, default: Any) -> bool:
    """Compare a value of a JSON file with a default; 1 and true are two values."""
    return type(value) is type(default) and bool(value == default)


def hash_files(files: Iterable[Path]) -> dict[str, str]:
    """Compute the SHA-256 of each file, by file name."""
    return {file.name: compute_file_digest(file) for file in sorted(files)}


# Checks before files are read ---------------------------------------------------------------------


NOT_VITCLS = (
    "{0} is not a vitcls model. Set the folder of one or, if it is a model of another project, convert it: "
    "vitcls convert {0} FOLDER"
)


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
    if not (folder / CONFIG_FILE).exists():
        checkpoints = sorted(folder.glob(f"checkpoint-*/{CONFIG_FILE}"), key=get_step)
        remedy = (
            f"The last checkpoint of Trainer in it is {checkpoints[-1].parent}: use that folder"
            if checkpoints
            else "Specify the folder of a saved model"
        )
        raise ValueError(f"{source} does not contain a model: {CONFIG_FILE} is missing. {remedy}")
    # Imported here: options of commands import this file, and flags are parsed without torch.
    import torch

    config_dict = read_json(folder / CONFIG_FILE)
    if config_dict.get("model_type") != "vitcls":
        raise ValueError(NOT_VITCLS.format(source))
    dtype = config_dict.get("dtype") or "float32"
    if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(
            f"{folder / CONFIG_FILE}: `dtype` is {dtype!r}, but it must be a type such as float32"
        )
    if config_dict.get("quantization_config") is not None:
        raise ValueError(
            f"{folder / CONFIG_FILE}: `quantization_config` is set, but quantized weights are not "
            "supported. Use the model that was quantized"
        )
    if (folder / PROCESSOR_FILE).is_file():
        read_json(folder / PROCESSOR_FILE)
    check_weight_files(source, folder)
    check_number_of_labels(source, folder, config_dict.get("id2label"))


def check_number_of_labels(source: str, folder: Path, labels: Any) -> None:
    """Raise ValueError if config.json has more labels than the heads in the weights have rows.

    Checking a million labels takes more than a minute, and counting them milliseconds.
    """
    if not isinstance(labels, dict) or len(labels) <= MANY_LABELS:
        return
    from safetensors import SafetensorError, safe_open

    num_rows = 0
    for name in list_weight_files(folder):
        # Weights that are missing or damaged are an error when they are read
        with (
            suppress(OSError, SafetensorError),
            safe_open(folder / name, framework="np") as weights,
        ):
            shapes = {each: weights.get_slice(each).get_shape() for each in weights.keys()}  # noqa: SIM118
            num_rows += sum(shape[0] for each, shape in shapes.items() if HEAD.search(each))
    if len(labels) > num_rows:
        raise ValueError(
            f"{CONFIG_FILE} of {source} has {len(labels):,} labels, but the heads in the weights have "
            f"{num_rows:,}. Use the configuration of the weights"
        )


def get_step(file: Path) -> int:
    """Read the step of a file in a folder checkpoint-STEP of Trainer; -1 if it has none."""
    step = file.parent.name.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1


def check_weight_files(source: str, folder: Path) -> None:
    """Check that the folder has one set of weights in safetensors, or only exported files."""
    # Imported here: options of commands import this file, and flags are parsed without torch.
    from ..model.field_checks_vitcls import open_regular_file

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
