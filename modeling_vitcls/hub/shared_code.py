"""Code in one repository, weights in others: many models that share one copy of the code, read and pinned once.

    write_code("vitcls-code")                           # the files to publish: hf upload ME/vitcls-code vitcls-code
    with_code_elsewhere("runs/mine", "ME/vitcls-code")  # then: python scripts/push_to_hub.py --model runs/mine ...

    AutoModel.from_pretrained("ME/mine", revision="<commit of the weights>", code_revision="<commit of the code>",
                              trust_remote_code=True)

Without `code_revision` the newest code of that repository runs, whatever `revision` pins.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .manifest import CARD, REFERRING, SEPARATOR, check_is_model, read_json, read_text


PACKAGE = Path(__file__).parents[1]
CODE = "*_vitcls.py"

# In a card: what pins the weights, where the code is said to be, and what is added about both.
PIN_IN_CALL = re.compile(r'(?<!code_)revision="([^"]*)"(, code_revision="[^"]*")?')
PIN_BY_NAME = re.compile(r"(?<!code_)revision=revision\b(, code_revision=code_revision\b)?")
NAMED_PIN = re.compile(r"^(?P<line>(?P<indent> *)revision = .*)$(\n *code_revision = .*$)?", re.MULTILINE)
PLACE_OF_CODE = re.compile(r"Python files (beside the weights|in `[^`]*`)")
NOTE = "The weights are here, and their code is in another repository"
NOTE_IN_CARD = re.compile(rf"^## Use\n(\n{NOTE}.*\n)?", re.MULTILINE)


def write_code(folder: str | Path) -> list[str]:
    """Put the code that models need into a folder, to be uploaded as it is; returns the names of the files.

    Raises:
        OSError: if they cannot be written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(PACKAGE.glob(CODE))
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]


def with_code_elsewhere(folder: str | Path, repo_id: str) -> None:
    """Let a saved model take its code from a repository on the Hub, say so in its card, and remove its own copy.

    Only for publishing: a process that has this package goes on loading the folder as before. What is saved anew,
    such as a model fine-tuned from it, has its own code again.

    Args:
        folder: that the model was saved to.
        repo_id: `namespace/name` of the repository with the code. Nobody looks whether it is there yet.

    Raises:
        ValueError: in one line, for another folder than a model's, or what can be no repository.
        OSError: if the files cannot be written.
    """
    folder = Path(folder)
    check_is_model(folder)
    check_repo_id(repo_id)
    for file in (folder / name for name in REFERRING if (folder / name).is_file()):
        settings = read_json(file)
        settings["auto_map"] = moved(settings.get("auto_map", {}), repo_id)
        written = file.with_name(f".{file.name}.partial")
        written.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written.replace(file)
    if (folder / CARD).is_file():
        (folder / CARD).write_bytes(card_with_code_elsewhere(read_text(folder / CARD), repo_id).encode())
    for code in folder.glob(CODE):
        code.unlink()


def moved(references: Any, repo_id: str) -> Any:
    """References such as `modeling_vitcls.ViTCLSModel`, in nested dicts, with the repository before them."""
    if isinstance(references, dict):
        return {name: moved(reference, repo_id) for name, reference in references.items()}
    return f"{repo_id}{SEPARATOR}{references.rpartition(SEPARATOR)[2]}"


def card_with_code_elsewhere(text: str, repo_id: str) -> str:
    """A card whose lines to load the model pin the code as well, and whose text says where that is.

    Args:
        text: of README.md. One that pins no revision stays as it is.
        repo_id: `namespace/name` of the repository with the code.
    """
    if not (PIN_IN_CALL.search(text) or PIN_BY_NAME.search(text)):
        return text
    code_pin = f'"<commit hash of {repo_id}>"'
    text = NAMED_PIN.sub(lambda found: f"{found['line']}\n{found['indent']}code_revision = {code_pin}", text)
    text = PIN_BY_NAME.sub("revision=revision, code_revision=code_revision", text)
    text = PIN_IN_CALL.sub(lambda found: f'revision="{found[1]}", code_revision={code_pin}', text)
    text = PLACE_OF_CODE.sub(f"Python files in `{repo_id}`", text)
    text = text.replace("that you have read as `revision`", "that you have read as `code_revision`")
    note = (
        f"{NOTE}, `{repo_id}`: `revision` pins the one, `code_revision` the other. Without `code_revision` the newest "
        "code there runs."
    )
    return NOTE_IN_CARD.sub(f"## Use\n\n{note}\n", text)


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless this names a repository in full; without a namespace nobody else would find it."""
    try:
        validate_repo_id(repo_id)
        is_full = repo_id.count("/") == 1
    except HFValidationError:
        is_full = False
    if not is_full:
        raise ValueError(f"{repo_id!r} is no repository on the Hub: give namespace/name of the one with the code")
