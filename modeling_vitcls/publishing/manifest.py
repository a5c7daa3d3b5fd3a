"""The allowlist of files that are published from a model folder. The list contains no pickle files.

With `--push-optimizer`, the newest checkpoint is also published, so that `--resume` can continue from it:

    checkpoints/step-00000120/      model.safetensors, optimizer.safetensors, ...
                                    state.json, without local paths

Like local checkpoints (checkpoints.py), published checkpoints contain only tensors and JSON.
"""

import logging
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from transformers.dynamic_module_utils import get_relative_imports

from ..checkpoints import (
    STATE_FILE,
    CheckpointStore,
    DamagedCheckpointError,
    compute_file_digest,
    format_state,
    read_checkpoint,
    read_state,
)
from ..files import read_json
from ..hub.loading import CONFIG_FILE, CONFIG_FILES, MODEL_FILE_PATTERNS, PARITY_REPORT_FILE, check_is_vitcls
from ..hub.local_paths import can_publish_images, is_local
from ..hub.provenance import CARD_FILE, LICENSE_PATTERNS
from .adapters import ADAPTER_PATTERNS, check_adapter, is_adapter
from .card_renaming import replace_model_name
from .card_sections import get_shareable_flags, insert_onnx_section
from .code_files import CODE_LICENSE_FILE, CODE_PATTERN, read_code_license


RECIPE_FILE = "config.resolved.yaml"
REPORT_FILE = "report.html"  # HTML report with held-out images
SAMPLE_IMAGES_FILE = "pictures/attention.png"  # path of the only figure that shows images of the dataset
# Model types that `vitcls convert --to transformers` writes.
NATIVE_MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")

# ONNX files of `vitcls export --format transformers.js`, and their report with the SHA-256 of the weights.
ONNX_REPORT_FILE = "onnx/report.json"
ONNX_PATTERNS = ("onnx/*.onnx", ONNX_REPORT_FILE)

# Files that define the model. A push removes such files if only an earlier push contained them, because an old
# model.safetensors would be loaded instead of new shards.
MODEL_PATTERNS = (*MODEL_FILE_PATTERNS, CODE_PATTERN)
# Results and reports of a run. A push also removes old results, because old results describe another model.
RESULT_PATTERNS = ("results.json", "metrics.jsonl", RECIPE_FILE, PARITY_REPORT_FILE, REPORT_FILE, *ONNX_PATTERNS)
CHECKPOINT_PATTERNS = ("checkpoints/step-*/*.safetensors", "checkpoints/step-*/state.json")
# Files that describe the model.
DOCUMENTATION_PATTERNS = (
    CARD_FILE,
    *LICENSE_PATTERNS,
    CODE_LICENSE_FILE,
    *RESULT_PATTERNS,
    *(f"pictures/*.{extension}" for extension in ("png", "jpg", "jpeg", "svg", "webp")),
    ".eval_results/*.yaml",
)
REPO_SEPARATOR = "--"  # separator after a repository id, as in `owner/name--module.Class`

logger = logging.getLogger(__name__)

# Path in the repository -> local file, or the content as bytes.
RepoFiles = dict[str, Path | bytes]


def collect_model_files(folder: Path, repo_id: str | None = None) -> RepoFiles:
    """Return the files of a model or adapter folder that are published in the repository `repo_id`.

    config.resolved.yaml is published without local paths. The published README.md contains the repository id.
    report.html is published only if images of the dataset may be published. The license of the code files is also
    included.

    Raise ValueError if the folder does not contain a complete model or adapter, or if the code is in several
    repositories.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if is_adapter(folder):
        check_adapter(folder)
        adapter_files: RepoFiles = {name: path for name, path in paths.items() if is_match(name, ADAPTER_PATTERNS)}
        return set_repo_id_in_card(adapter_files, folder, repo_id)
    check_is_model(folder)
    find_code_repository(folder, repo_id)
    files: RepoFiles = {
        name: path for name, path in paths.items() if is_match(name, (*MODEL_PATTERNS, *DOCUMENTATION_PATTERNS))
    }
    for name in sorted(list_required_code(folder) | list_weight_files(folder)):
        if name not in files:
            raise ValueError(f"{folder} lacks {name}, which is required to load the model. Save the model again")
    recipe = read_recipe(folder)
    if REPORT_FILE in files and (recipe is None or not can_publish_images(recipe)):
        del files[REPORT_FILE]
    if not has_current_onnx_files(folder):
        if outdated_files := [name for name in files if is_match(name, ONNX_PATTERNS)]:
            logger.warning(
                "not publishing %s, because %s is missing or was created for other weights",
                ", ".join(outdated_files),
                ONNX_REPORT_FILE,
            )
            files = {name: path for name, path in files.items() if name not in outdated_files}
    elif CARD_FILE in files:
        onnx_report = read_json(folder / ONNX_REPORT_FILE)
        files[CARD_FILE] = insert_onnx_section(read_text(folder / CARD_FILE), onnx_report).encode()
    if any(name.endswith(".py") for name in files):
        files[CODE_LICENSE_FILE] = read_code_license()
    if RECIPE_FILE in files:
        flags = get_shareable_flags(yaml.safe_load(read_text(folder / RECIPE_FILE)))
        files[RECIPE_FILE] = yaml.safe_dump(flags, sort_keys=False).encode()
    return set_repo_id_in_card(files, folder, repo_id)


def has_current_onnx_files(folder: Path) -> bool:
    """Return whether the ONNX files were created from the weights in the folder, according to onnx/report.json."""
    if not (folder / ONNX_REPORT_FILE).is_file():
        return False
    weight_digests = {name: compute_file_digest(folder / name) for name in list_weight_files(folder)}
    return read_json(folder / ONNX_REPORT_FILE).get("weights_sha256") == weight_digests


def set_repo_id_in_card(files: RepoFiles, folder: Path, repo_id: str | None) -> RepoFiles:
    """Return the files; in README.md, the folder name is replaced with the repository id."""
    if CARD_FILE not in files or repo_id is None:
        return files
    card = files[CARD_FILE]
    text = read_text(card) if isinstance(card, Path) else card.decode()
    return files | {CARD_FILE: replace_model_name(repo_id, text, folder.resolve().name).encode()}


def is_match(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a path, such as `pictures/cat.png`, matches any of the patterns. `*` does not match `/`."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def find_outdated_files(published_files: Iterable[str], files: RepoFiles) -> list[str]:
    """Return the published files that a new push must remove."""
    removable_patterns = (*MODEL_PATTERNS, *RESULT_PATTERNS, *CHECKPOINT_PATTERNS)
    return sorted(name for name in published_files if name not in files and is_match(name, removable_patterns))


def check_is_model(folder: Path) -> None:
    """Raise ValueError unless the folder contains a vitcls model, or a model converted from vitcls to transformers."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Specify the folder of a saved model")
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} does not contain a model: config.json is missing. Specify the folder of a saved model"
        )
    if not is_native_model(folder):
        check_is_vitcls(str(folder), folder)


def is_native_model(folder: Path) -> bool:
    """Return whether a folder contains a model that was converted from vitcls to transformers and requires no custom
    code."""
    is_native = read_json(folder / CONFIG_FILE).get("model_type") in NATIVE_MODEL_TYPES
    return is_native and (folder / PARITY_REPORT_FILE).is_file() and not read_code_references(folder)


def read_code_references(folder: Path) -> list[str]:
    """Return the code references of a model, such as `modeling_vitcls.ViTCLSModel` or `owner/name--module.Class`.

    The `auto_map` of a configuration file maps Auto classes to code references.
    """
    files = (folder / name for name in CONFIG_FILES if (folder / name).is_file())
    return [text for file in files for text in iter_strings(read_json(file).get("auto_map"))]


def iter_strings(value: Any) -> Iterator[str]:
    """Yield the strings in nested dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for nested_value in value.values() if isinstance(value, dict) else value:
            yield from iter_strings(nested_value)


def find_code_repository(folder: Path, repo_id: str | None = None) -> str | None:
    """Return the repository that contains a model's code, or None if the code is next to the weights, in `repo_id`.

    Raise ValueError if there are several repositories, because `code_revision` can pin only one repository.
    """
    prefixes = {reference.rpartition(REPO_SEPARATOR)[0] for reference in read_code_references(folder)}
    repositories = {None if prefix in ("", repo_id) else prefix for prefix in prefixes}
    if len(repositories) > 1:
        names = ", ".join(sorted(name or "the model's own" for name in repositories))
        raise ValueError(
            f"{' and '.join(CONFIG_FILES)} reference code in several repositories ({names}), but "
            "code_revision can pin only one repository. Move all code to one repository (see "
            "modeling_vitcls/publishing/shared_code.py)"
        )
    return next(iter(repositories), None)


def list_required_code(folder: Path) -> set[str]:
    """Return the names of the code files that the model requires, directly or through imports."""
    references = [reference for reference in read_code_references(folder) if REPO_SEPARATOR not in reference]
    pending_files = [f"{reference.partition('.')[0]}.py" for reference in references]
    required_files: set[str] = set()
    while pending_files:
        name = pending_files.pop()
        if name not in required_files and (folder / name).is_file():
            pending_files += [f"{module}.py" for module in get_relative_imports(folder / name)]
        required_files.add(name)
    return required_files


def list_weight_files(folder: Path) -> set[str]:
    """Return the names of the weight files."""
    index_file = folder / "model.safetensors.index.json"
    return set(read_json(index_file)["weight_map"].values()) if index_file.is_file() else {"model.safetensors"}


def read_text(file: Path) -> str:
    """Return the text of a file without converting line endings. Raise ValueError if the text is not UTF-8."""
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {file}: {error}") from None


def collect_checkpoint_files(folder: Path) -> RepoFiles:
    """Return the files to publish from the newest undamaged checkpoint in `folder`.

    The published state.json does not contain flags with local paths. A resumed run uses the flags on the command line
    instead. The folder is not changed, because a run may be writing to the folder.
    """
    store = CheckpointStore(folder / "checkpoints", num_kept=1)
    for step in reversed(store.list_steps()):
        try:
            checkpoint_folder = read_checkpoint(store.get_folder(step)).folder
        except DamagedCheckpointError:
            continue
        state = read_state(checkpoint_folder)
        flags = state["facts"]["flags"].items()
        state["facts"]["flags"] = {
            name: value for name, value in flags if name != "output_dir" and not is_local(value)
        }
        path = checkpoint_folder.relative_to(folder).as_posix()
        files: RepoFiles = {f"{path}/{name}": checkpoint_folder / name for name in state["files"]}
        return files | {f"{path}/{STATE_FILE}": format_state(state).encode()}
    raise ValueError(
        f"{store.folder} has no undamaged checkpoint to publish. Push without the optimizer state, or push "
        "the output folder of a run"
    )


def find_local_dataset_in_card(folder: Path) -> str | None:
    """Return the local dataset whose images the card shows although `--card-samples` was not set; None if the card
    shows no such images."""
    flags = read_recipe(folder)
    if not (folder / SAMPLE_IMAGES_FILE).is_file() or flags is None or can_publish_images(flags):
        return None
    return flags["dataset"]


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """Return the flags of the run that wrote the folder, or None if they are missing or unreadable."""
    try:
        flags: Any = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # no such file, not UTF-8, or not YAML
        return None
    return flags if isinstance(flags, dict) else None
