"""Code in a separate repository: the files in the model folder and the card. test_loading.py loads such models."""

import json
from pathlib import Path

import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.publishing.code_files import CODE_PATTERN, PACKAGE_FOLDER
from modeling_vitcls.publishing.shared_code import pin_code_in_card, use_shared_code, write_code


CODE = sorted(file.name for file in PACKAGE_FOLDER.glob(CODE_PATTERN))


def test_only_the_code_files_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "mine"
    assert write_code(folder) == CODE
    assert all((folder / name).read_bytes() == (PACKAGE_FOLDER / name).read_bytes() for name in CODE)
    references = {"AutoModel": "modeling_vitcls.ViTCLSModel"}
    settings = {"model_type": "vitcls", "auto_map": references}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "handler.py").write_text("handler")
    use_shared_code(folder, "ann/code")
    assert {file.name for file in folder.iterdir()} == {"config.json", "handler.py"}
    moved = {"AutoModel": "ann/code--modeling_vitcls.ViTCLSModel"}
    assert json.loads((folder / "config.json").read_text()) == settings | {"auto_map": moved}
    for repo_id in ("code", "a/b/c", "ann/my code"):
        with raises_one_line(f"{repo_id!r} is not a repository id"):
            use_shared_code(folder, repo_id)


CARD = """# mine

    AutoModel.from_pretrained("mine", revision="main", trust_remote_code=True)

    revision = "<commit hash>"
    AutoModel.from_pretrained("mine", revision=revision, trust_remote_code=True)

    AutoModel.from_pretrained("mine", revision="0123")

`trust_remote_code=True` runs the Python files next to the weights.
"""
PINNED_CARD = """# mine

    AutoModel.from_pretrained("mine", revision="main", trust_remote_code=True)

    revision = "<commit hash>"
    code_revision = "<commit hash of ann/code>"
    AutoModel.from_pretrained("mine", revision=revision, code_revision=code_revision, trust_remote_code=True)

    AutoModel.from_pretrained("mine", revision="0123", code_revision="<commit hash of ann/code>")

This repository contains the weights; the code is in another repository, `ann/code`. `revision` pins the weights and \
`code_revision` pins the code. Without `code_revision`, the newest code in the code repository runs.

`trust_remote_code=True` runs the Python files in `ann/code`.
"""


def test_the_code_is_pinned_next_to_each_pinned_revision() -> None:
    assert pin_code_in_card(CARD, "ann/code") == PINNED_CARD
    assert pin_code_in_card(pin_code_in_card(CARD, "bob/old"), "ann/code") == PINNED_CARD


@pytest.mark.parametrize("pin", ['revision="0123"', "revision=revision"])
def test_cards_with_one_kind_of_pin_are_changed(pin: str) -> None:
    assert "code_revision=" in pin_code_in_card(f'from_pretrained("x", {pin})', "ann/code")
