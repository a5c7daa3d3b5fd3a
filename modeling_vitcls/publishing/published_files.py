"""The files that a push publishes.

They are those that this package writes, each by its name; other files in the folder stay on the
machine. README.md contains the id of the repository, config.resolved.yaml no local paths, and
CODE_LICENSE the license of the code. There are no pickle files, no results of other weights, and no
images of a dataset that may not be published.
"""

import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..hub.loading import split_revision
from ..hub.model_code import SEPARATOR, get_code_version
from ..hub.model_files import (
    CARD_FILE,
    CERTIFICATE_FILE,
    CONFIG_FILE,
    CONFIG_FILES,
    EXPORT_PATTERNS,
    INDEX_FILE,
    MODEL_PATTERNS,
    PARITY_REPORT_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    RUN_FILES,
    SAMPLE_IMAGES_FILE,
    list_license_files,
)
from ..hub.model_folder import ModelFolder, dump_flags
from .card import has_edited_card, render_card


PACKAGE_FOLDER = Path(__file__).parents[1]
# License file of the code. Other license files in a model folder apply to the weights.
CODE_LICENSE_FILE = "CODE_LICENSE"
# A push removes these files from the repository unless the folder contains them: an old
# model.safetensors would be loaded instead of new shards, and old results describe other weights.
DELETE_PATTERNS = [
    *MODEL_PATTERNS,
    *RUN_FILES,
    SAMPLE_IMAGES_FILE,
    *EXPORT_PATTERNS,
    PARITY_REPORT_FILE,
    CERTIFICATE_FILE,
    "handler.py",
    "checkpoints/step-*",
]


def collect_files(
    folder: ModelFolder,
    repo_id: str,
    license_id: str | None = None,
    card_samples: bool = False,
    code_from: str | None = None,
) -> dict[str, Path | bytes]:
    """Collect the files to publish: name in the repository -> path or content.

    Args:
        folder: Folder of the model.
        repo_id: Repository, which the card names.
        license_id: License of the weights for the card.
        card_samples: Whether to publish images of a dataset that is not public.
        code_from: `ID@COMMIT` of the repository whose code the model refers to. Default: the code
            in the folder, or the repository that the model refers to already.

    Raises:
        ValueError: If one of the files is a link to a file elsewhere, or the initial weights have
            another license.
    """
    hidden_files = set() if card_samples else folder.private_files
    names = list_published_files(folder) - hidden_files
    files: dict[str, Path | bytes] = {name: folder.path / name for name in sorted(names)}

    # What a person wrote is published as it is, even if it names another repository.
    if not has_edited_card(folder):
        card = render_card(folder, repo_id, hidden_files, license_id, code_from)
        files[CARD_FILE] = card.encode()
    if RECIPE_FILE in names:
        files[RECIPE_FILE] = dump_flags(folder.shareable_flags).encode()
    files |= rewrite_settings(folder, code_from)
    if code_from and folder.code_repository is None:
        return {name: files[name] for name in files if name not in folder.code_files}
    if any(name.endswith(".py") for name in names):
        files[CODE_LICENSE_FILE] = read_code_license().encode()
    return files


def rewrite_settings(folder: ModelFolder, code_from: str | None) -> dict[str, bytes]:
    """Write config.json and preprocessor_config.json with what a published model says about its code.

    A file that stays as it is is left out.
    """
    repository = split_revision(code_from)[0] if code_from else None
    has_own_code = not (folder.is_native or folder.code_repository or folder.other_code)
    files = {}
    for name in CONFIG_FILES:
        settings = folder.read_saved(name)
        old = json.dumps(settings)
        # transformers 4 wrote from where the weights were loaded, such as a home folder
        settings.pop("_name_or_path", None)
        if name == CONFIG_FILE and has_own_code and repository is None:
            settings["code_version"] = get_code_version()
        if repository and repository != folder.code_repository and "auto_map" in settings:
            settings["auto_map"] = refer_to_code(settings["auto_map"], repository)
        if json.dumps(settings) != old:
            files[name] = f"{json.dumps(settings, indent=2)}\n".encode()
    return files


def refer_to_code(auto_map: Any, repository: str) -> Any:
    """Write an `auto_map` whose references are to the code in a repository."""
    if isinstance(auto_map, dict):
        return {name: refer_to_code(auto_map[name], repository) for name in auto_map}
    return f"{repository}{SEPARATOR}{auto_map.rpartition(SEPARATOR)[2]}"


def list_published_files(folder: ModelFolder) -> set[str]:
    """Name the files to publish: the ones in the folder that this package writes.

    Raise ValueError if one of them is a link, because its target is not a file of the folder.
    """
    names = {CARD_FILE, *list_license_files(folder.path)}

    for file, report in folder.exports.items():
        names |= {file, f"{file}.json"} | {f"{file}.data"} & set(report["sha256"])

    names |= {*CONFIG_FILES, *folder.weight_files, INDEX_FILE, *folder.code_files}
    names |= {PARITY_REPORT_FILE} if folder.parity_report else set()
    names |= {CERTIFICATE_FILE} if folder.certificate else set()
    # If the results belong to other weights, no file of their run is published: its recipe
    # would be wrong for the new weights as well.
    if folder.results or not (folder.path / RESULTS_FILE).is_file():
        names |= {*RUN_FILES, SAMPLE_IMAGES_FILE}

    files = {name for name in names if (folder.path / name).is_file()}
    root = folder.path.resolve()
    for name in sorted(files):
        if (folder.path / name).resolve() != root / name:
            raise ValueError(
                f"{folder.path / name} is a link, but a push publishes only files of the folder "
                f"itself. Copy the folder (cp -rL {folder.path} COPY), and push the copy"
            )
    return files


def check_weights(folder: ModelFolder) -> None:
    """Raise ValueError if a weight is NaN or infinite: every answer of the model would be.

    Each weight is read once (a second for 1 GB), one at a time.
    """
    for file in folder.weight_files:
        if not (folder.path / file).is_file():
            continue
        with safe_open(folder.path / file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # No dictionary
                if not weights.get_tensor(name).isfinite().all():
                    raise ValueError(
                        f"{name} in {folder.path / file} has values that are not finite, so the "
                        "model has no answers. Train it again, or push an earlier checkpoint"
                    )


def read_code_license() -> str:
    """Read the license of the code files."""
    # An installed package has the file in its metadata, a checkout in its root.
    checkout_license = PACKAGE_FOLDER.parent / "LICENSE"
    if checkout_license.is_file():
        return checkout_license.read_text(encoding="utf-8")
    return str(distribution("modeling_vitcls").read_text("licenses/LICENSE"))
