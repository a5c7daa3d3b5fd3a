"""Folders without a required code file are not pushed, even if only another code file imports the missing file."""

import re
from pathlib import Path

import pytest
from local_hub import LocalHub
from tiny_models import build_tiny_config, raises_one_line

import modeling_vitcls as vitcls
from modeling_vitcls.hub.manifest import collect_model_files, list_required_code
from modeling_vitcls.hub.publish import push_folder


CODE = sorted(file.name for file in Path(vitcls.__file__).parent.glob("*_vitcls.py"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a model and its image processor."""
    vitcls.ViTCLSForImageClassification(build_tiny_config()).save_pretrained(tmp_path / "model")
    vitcls.ViTCLSImageProcessor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_all_code_is_needed(folder: Path) -> None:
    """Imports are followed: `auto_map` contains only three of the files."""
    assert list_required_code(folder) == set(CODE)
    assert set(CODE) <= collect_model_files(folder).keys()


def test_code_in_another_repository_is_not_needed(folder: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(r'"(\w+_vitcls\.)', r'"ann/code--\1', text))
    assert list_required_code(folder) == set()


@pytest.mark.parametrize("name", CODE)
def test_a_folder_without_a_code_file_is_an_error(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with raises_one_line(f"lacks {name}", "Save the model again"):
        collect_model_files(folder)


def test_nothing_of_an_incomplete_folder_is_pushed(hub: LocalHub, folder: Path) -> None:
    (folder / "blocks_vitcls.py").unlink()
    with raises_one_line("lacks blocks_vitcls.py"):
        push_folder(folder, "ann/model")
    assert not hub.repositories


def test_files_that_import_each_other(folder: Path) -> None:
    """Each file is read once."""
    for name, other in (("first", "second"), ("second", "first")):
        (folder / f"{name}_vitcls.py").write_text(f"from .{other}_vitcls import value\n")
    with (folder / "blocks_vitcls.py").open("a") as code:
        code.write("from .first_vitcls import value\n")
    assert list_required_code(folder) == {*CODE, "first_vitcls.py", "second_vitcls.py"}
