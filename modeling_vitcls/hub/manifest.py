"""Which files of a model folder are published: those on a list. Never pickles.

Optimiser states are published where that is asked for: manifest.py.

What `--resume` needs, as it is published: the newest checkpoint of a run, where the user asks for it.

    checkpoints/step-00000120/      model.safetensors, optimizer.safetensors, ...
                                    state.json, without the paths of the machine that trained

Tensors and JSON only, as on disk (checkpoints.py): whoever resumes from it unpickles nothing.

Held-out pictures in a card: whether those of a model folder are of this machine, and would be published with it.
"""

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from transformers.dynamic_module_utils import get_relative_imports

from ..checkpoints import (
    STATE_FILE,
    Checkpoint,
    CheckpointStore,
    DamagedCheckpoint,
    read_checkpoint,
    read_state,
    state_text,
)
from ..configuration_vitcls import ViTCLSConfig
from .card_renaming import card_under
from .card_training import shareable
from .local_paths import is_local
from .provenance import LICENSE_FILES


WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
RECIPE = "config.resolved.yaml"
CARD = "README.md"

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
# How it was made, and what was measured: wrong of another model, so these are removed in the same way.
RECORDS = (
    "results.json",
    "metrics.jsonl",
    RECIPE,
    "certificate.json",  # of a conversion
)
CHECKPOINTS = ("checkpoints/step-*/*.safetensors", "checkpoints/step-*/state.json")
# These tell about it.
ACCOMPANYING = (
    CARD,
    *LICENSE_FILES,
    *RECORDS,
    *(f"pictures/*.{kind}" for kind in ("png", "jpg", "jpeg", "svg", "webp")),
    ".eval_results/*.yaml",
)
# Files that name classes, and in `auto_map` the file of code that each class is in.
REFERRING = ("config.json", "preprocessor_config.json")
# `owner/name--module.Class` is code in another repository.
SEPARATOR = "--"

# Path in the repository -> the file, or what stands in for it.
Contents = dict[str, Path | bytes]


def contents_of(folder: Path, repo_id: str | None = None) -> Contents:
    """The files to publish.

    config.resolved.yaml is published without the paths of this machine, README.md with the repository's id.

    Args:
        folder: with the model.
        repo_id: `namespace/name` to publish it as.

    Raises:
        ValueError: in one line, where the folder holds no vitcls model, only a part of one, or one whose code is
            scattered over repositories.
    """
    check_is_model(folder)
    code_repository(folder, repo_id)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    contents: Contents = {
        name: path for name, path in files.items() if matches(name, ESSENTIAL) or matches(name, ACCOMPANYING)
    }
    for name in sorted(needed_code(folder) | needed_by_index(folder)):
        if name not in contents:
            raise ValueError(f"{folder} lacks {name}, without which the model does not load: save the model again")
    if RECIPE in contents:
        contents[RECIPE] = shareable_recipe(folder / RECIPE)
    if CARD in contents and repo_id is not None:
        contents[CARD] = card_under(repo_id, read_text(folder / CARD), folder.resolve().name).encode()
    return contents


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path, such as `pictures/cat.png`, is on the list. `*` stands for no `/`."""
    return any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)  # so that * cannot take one in
        for pattern in patterns
    )


def outdated(published: Iterable[str], contents: Contents) -> list[str]:
    """Files of an earlier push that would spoil this one."""
    wrong = (*ESSENTIAL, *RECORDS, *CHECKPOINTS)
    return sorted(name for name in published if name not in contents and matches(name, wrong))


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


def code_references(folder: Path) -> list[str]:
    """What the model's files say about their code: `modeling_vitcls.ViTCLSModel`, `owner/name--module.Class`."""
    found: list[str] = []
    for file in (folder / name for name in REFERRING if (folder / name).is_file()):
        collect_texts(read_json(file).get("auto_map"), found)
    return found


def collect_texts(value: Any, into: list[str]) -> None:
    """Add the texts in nested dicts and lists."""
    if isinstance(value, str):
        into.append(value)
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            collect_texts(item, into)


def code_repository(folder: Path, repo_id: str | None = None) -> str | None:
    """The repository that a model takes its code from; None where that lies beside the weights.

    Args:
        folder: with the model's files.
        repo_id: of the model itself, so that code which is said to be there is its own.

    Raises:
        ValueError: in one line, where there are several: `code_revision` could pin only one of them.
    """
    named = [reference.rpartition(SEPARATOR)[0] for reference in code_references(folder)]
    found = {None if name in ("", repo_id) else name for name in named}
    if len(found) > 1:
        places = ", ".join(sorted(name or "the one of the weights" for name in found))
        raise ValueError(
            f"{' and '.join(REFERRING)} take their code from several repositories ({places}), and one code_revision "
            "cannot pin them: let all of it come from one, see modeling_vitcls/hub/shared_code.py"
        )
    return next(iter(found), None)


def needed_code(folder: Path) -> set[str]:
    """Return the code files that the model's files refer to and the files that they import, of this folder."""
    references = [reference for reference in code_references(folder) if SEPARATOR not in reference]
    pending = [f"{reference.partition('.')[0]}.py" for reference in references]
    found: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in found and (folder / name).is_file():
            pending += [f"{module}.py" for module in get_relative_imports(folder / name)]
        found.add(name)
    return found


def needed_by_index(folder: Path) -> set[str]:
    """The files of weights."""
    if not (folder / WEIGHTS_INDEX).is_file():
        return {WEIGHTS}
    return set(read_json(folder / WEIGHTS_INDEX)["weight_map"].values())


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError, in one line, where there is none."""
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def read_text(file: Path) -> str:
    """A text from a file, line ends as they are. Raises ValueError, in one line, where it is none."""
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {file}: {error}") from None


def shareable_recipe(file: Path) -> bytes:
    """The recipe of a run as others can use it."""
    return yaml.safe_dump(shareable(yaml.safe_load(read_text(file))), sort_keys=False).encode()


def resumable_contents(folder: Path) -> Contents:
    """The files of the newest checkpoint below `folder`, as they are published.

    Flags that name files or folders of this machine are left out of state.json: `--resume` then takes those that it
    is given.

    Raises:
        ValueError: in one line, where there is no undamaged checkpoint.
    """
    checkpoint = newest_checkpoint(folder)
    state = read_state(checkpoint.folder)
    place = checkpoint.folder.relative_to(folder).as_posix()
    contents: Contents = {f"{place}/{name}": checkpoint.folder / name for name in state["files"]}
    state["facts"]["flags"] = {
        name: value for name, value in state["facts"]["flags"].items() if name != "output_dir" and not is_local(value)
    }
    contents[f"{place}/{STATE_FILE}"] = state_text(state).encode()
    return contents


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest undamaged one. Nothing is changed: a run may be writing there."""
    store = CheckpointStore(folder / "checkpoints", keep=1)
    for step in reversed(store.steps()):
        try:
            return read_checkpoint(store.path(step))
        except DamagedCheckpoint:
            continue
    raise ValueError(
        f"{store.folder} holds no undamaged checkpoint to publish: leave the optimiser's state out, or give the "
        "--output-dir of a run"
    )


SAMPLES = "pictures/attention.png"  # the one picture that shows images of the data set


def data_shown(folder: Path) -> str | None:
    """The data set of this machine whose pictures the card of a model folder shows, unless it was asked to
    (--card-samples); None where there is none."""
    if not (folder / SAMPLES).is_file() or not (folder / RECIPE).is_file():
        return None
    try:
        flags: Any = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):  # no text, or no YAML
        return None
    if not isinstance(flags, dict) or flags.get("card_samples"):
        return None
    return flags["dataset"] if is_local(flags.get("dataset")) else None


def warning(folder: Path, dataset: str, repo_id: str) -> str:
    """What to say where they have been published."""
    return (
        f"{repo_id} is public, and its card shows pictures of {dataset} ({SAMPLES}): if nobody should see them, make "
        f"it private in its settings on the Hub, or delete it there, remove {folder / SAMPLES} and push again"
    )
