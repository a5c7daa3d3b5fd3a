"""Share one copy of the code, in a separate repository, among many models.

    write_code("vitcls-code")                           # the files to publish: hf upload ME/vitcls-code vitcls-code
    use_shared_code("runs/mine", "ME/vitcls-code")      # then: vitcls push --model runs/mine ...

    AutoModel.from_pretrained("ME/mine", revision="<commit of the weights>", code_revision="<commit of the code>",
                              trust_remote_code=True)

Without `code_revision`, transformers runs the newest code in the code repository, even if `revision` is set.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ..files import read_json, write_atomically
from ..hub.loading import CONFIG_FILES, is_hub_id
from ..hub.provenance import CARD_FILE
from .code_files import CODE_PATTERN, PACKAGE_FOLDER
from .manifest import REPO_SEPARATOR, check_is_model, read_text


# Patterns in a card: code that pins the weights, the location of the code, and the note about the code repository.
REVISION_STRING_PATTERN = re.compile(r'(?<!code_)revision="(?!main")([^"]*)"(, code_revision="[^"]*")?')
REVISION_VARIABLE_PATTERN = re.compile(r"(?<!code_)revision=revision\b(, code_revision=code_revision\b)?")
REVISION_ASSIGNMENT_PATTERN = re.compile(
    r"^(?P<line>(?P<indent> *)revision = .*)$(\n *code_revision = .*$)?", re.MULTILINE
)
CODE_LOCATION_PATTERN = re.compile(r"Python files (next to the weights|in `[^`]*`)")
SHARED_CODE_NOTE = "This repository contains the weights; the code is in another repository"
NOTE_PATTERN = re.compile(rf"^(?:{SHARED_CODE_NOTE}.*\n\n)?(`trust_remote_code=True` runs )", re.MULTILINE)


def write_code(folder: str | Path) -> list[str]:
    """Copy the code files of vitcls models to a folder for upload, and return the file names."""
    target_folder = Path(folder)
    target_folder.mkdir(parents=True, exist_ok=True)
    files = sorted(PACKAGE_FOLDER.glob(CODE_PATTERN))
    for file in files:
        shutil.copyfile(file, target_folder / file.name)
    return [file.name for file in files]


def use_shared_code(folder: str | Path, repo_id: str) -> None:
    """Make a saved model use the code in a repository on the Hub, update the card, and remove the code files from the
    folder.

    Call this function only before the model is published. If this package is installed, the folder is still loaded
    with the package's code. Saving the model again, for example after fine-tuning, adds the code files again.

    Args:
        folder: Folder of the saved model.
        repo_id: `namespace/name` of the repository that contains the code. The repository does not have to exist
            yet.

    Raises:
        ValueError: If the folder does not contain a vitcls model, or if the repository id is invalid.
        OSError: If the files cannot be written.
    """
    folder = Path(folder)
    check_is_model(folder)
    if not is_hub_id(repo_id) or repo_id.count("/") != 1:  # other users need the namespace to find the repository
        raise ValueError(
            f"{repo_id!r} is not a repository id. Specify the repository that contains the code as namespace/name"
        )
    for file in (folder / name for name in CONFIG_FILES if (folder / name).is_file()):
        config_dict = read_json(file)
        config_dict["auto_map"] = add_repo_id(config_dict.get("auto_map", {}), repo_id)
        with write_atomically(file) as temporary_file:
            temporary_file.write_text(json.dumps(config_dict, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (folder / CARD_FILE).is_file():
        (folder / CARD_FILE).write_bytes(pin_code_in_card(read_text(folder / CARD_FILE), repo_id).encode())
    for file in folder.glob(CODE_PATTERN):
        file.unlink()


def add_repo_id(references: Any, repo_id: str) -> Any:
    """Add the repository id to code references, such as `modeling_vitcls.ViTCLSModel`, in nested dicts."""
    if isinstance(references, dict):
        return {name: add_repo_id(reference, repo_id) for name, reference in references.items()}
    return f"{repo_id}{REPO_SEPARATOR}{references.rpartition(REPO_SEPARATOR)[2]}"


def pin_code_in_card(text: str, repo_id: str) -> str:
    """Return the card text with the name of the code repository and, in the code examples, a pinned code revision.

    The text is returned unchanged if the code examples do not pin a revision.
    """
    if not (REVISION_STRING_PATTERN.search(text) or REVISION_VARIABLE_PATTERN.search(text)):
        return text
    code_pin = f'"<commit hash of {repo_id}>"'
    text = REVISION_ASSIGNMENT_PATTERN.sub(
        lambda match: f"{match['line']}\n{match['indent']}code_revision = {code_pin}", text
    )
    text = REVISION_VARIABLE_PATTERN.sub("revision=revision, code_revision=code_revision", text)
    text = REVISION_STRING_PATTERN.sub(lambda match: f'revision="{match[1]}", code_revision={code_pin}', text)
    text = CODE_LOCATION_PATTERN.sub(f"Python files in `{repo_id}`", text)
    note = (
        f"{SHARED_CODE_NOTE}, `{repo_id}`. `revision` pins the weights and `code_revision` pins the code. Without "
        "`code_revision`, the newest code in the code repository runs."
    )
    return NOTE_PATTERN.sub(lambda match: f"{note}\n\n{match[1]}", text)
