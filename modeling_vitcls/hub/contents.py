"""Which files of a model folder are published: those on a list. Never pickles, optimiser states or checkpoints."""

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ..configuration_vitcls import ViTCLSConfig
from .card import shareable


WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
RECIPE = "config.resolved.yaml"

# Without these a repository is another model. Those that a new commit does not have are removed by it: an old
# model.safetensors would be loaded in place of new shards.
ESSENTIAL = (
    "config.json",
    WEIGHTS,
    WEIGHTS_INDEX,
    "model-*-of-*.safetensors",
    "preprocessor_config.json",
    "*_vitcls.py",
)
# These tell about it.
ACCOMPANYING = (
    "README.md",
    "LICENSE*",
    "results.json",
    "metrics.jsonl",
    RECIPE,
    "certificate.json",  # of a conversion
    *(f"{folder}*.{kind}" for folder in ("", "pictures/") for kind in ("png", "jpg", "jpeg", "svg", "webp")),
    ".eval_results/*.yaml",
)

# Path in the repository -> the file, or what stands in for it.
Contents = dict[str, Path | bytes]


def contents_of(folder: Path) -> Contents:
    """The files to publish.

    config.resolved.yaml is published without the paths of this machine.

    Raises:
        ValueError: in one line, where the folder holds no vitcls model, or only a part of one.
    """
    check_is_model(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    contents: Contents = {
        name: path for name, path in files.items() if matches(name, ESSENTIAL) or matches(name, ACCOMPANYING)
    }
    for name in needed_by_config(folder) | needed_by_index(folder):
        if name not in contents:
            raise ValueError(f"{folder} lacks {name}, without which the model does not load: save the model again")
    if RECIPE in contents:
        contents[RECIPE] = shareable_recipe(folder / RECIPE)
    return contents


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path, such as `pictures/cat.png`, is on the list. `*` stands for no `/`."""
    return any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)  # so that * cannot take one in
        for pattern in patterns
    )


def outdated(published: Iterable[str], contents: Contents) -> list[str]:
    """Files of an earlier push that would spoil this one."""
    return sorted(name for name in published if name not in contents and matches(name, ESSENTIAL))


def check_is_model(folder: Path) -> None:
    """Raise ValueError unless the folder holds a vitcls model."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the one that a model was saved to")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model, as it has no config.json: give the folder that one was saved to")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != ViTCLSConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {model_type!r}, not {ViTCLSConfig.model_type!r}: convert it with "
            "scripts/convert.py first"
        )


def needed_by_config(folder: Path) -> set[str]:
    """The code files that config.json refers to; `owner/name--module.Class` is code in another repository."""
    references = read_json(folder / "config.json").get("auto_map", {}).values()
    return {f"{reference.partition('.')[0]}.py" for reference in references if "--" not in reference}


def needed_by_index(folder: Path) -> set[str]:
    """The files of weights."""
    if not (folder / WEIGHTS_INDEX).is_file():
        return {WEIGHTS}
    return set(read_json(folder / WEIGHTS_INDEX)["weight_map"].values())


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError, in one line, where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def shareable_recipe(file: Path) -> bytes:
    """The recipe of a run as others can use it."""
    return yaml.safe_dump(shareable(yaml.safe_load(file.read_text(encoding="utf-8"))), sort_keys=False).encode()
