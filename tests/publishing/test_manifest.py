"""The published files of a model folder: code, card and ONNX files. test_publish.py tests the pushed files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.local_hub import LocalHub
from helpers.tiny_models import build_tiny_config, raises_one_line

import modeling_vitcls as vitcls
from modeling_vitcls.hub.loading import CONFIG_FILES
from modeling_vitcls.publishing.code_files import READING_ORDER
from modeling_vitcls.publishing.manifest import (
    collect_model_files,
    has_current_onnx_files,
    is_match,
    is_native_model,
    list_required_code,
    read_code_references,
)
from modeling_vitcls.publishing.publish import push_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a model whose code is in another repository."""
    target = tmp_path / "my-run"
    target.mkdir()
    for name, references in zip(
        CONFIG_FILES,
        (
            {"AutoModel": "ann/code--modeling_vitcls.ViTCLSModel"},
            {"AutoImageProcessor": [None, "ann/code--image_processing_vitcls.ViTCLSImageProcessor"]},
        ),
        strict=True,
    ):
        (target / name).write_text(json.dumps({"model_type": "vitcls", "auto_map": references}))
    (target / "model.safetensors").write_bytes(b"weights")
    return target


def test_a_model_without_code_is_published_without_the_license_of_the_code(folder: Path) -> None:
    assert collect_model_files(folder).keys() == {*CONFIG_FILES, "model.safetensors"}
    assert list_required_code(folder) == set()
    assert read_code_references(folder) == [
        "ann/code--modeling_vitcls.ViTCLSModel",
        "ann/code--image_processing_vitcls.ViTCLSImageProcessor",
    ]


def test_lists_of_references_name_required_code(folder: Path) -> None:
    (folder / CONFIG_FILES[1]).write_text(json.dumps({"auto_map": {"AutoImageProcessor": [None, "mine.Mine"]}}))
    assert list_required_code(folder) == {"mine.py"}


def test_an_outdated_license_of_the_code_is_replaced(folder: Path) -> None:
    (folder / "handler_vitcls.py").write_text("")
    (folder / "CODE_LICENSE").write_text("outdated")
    assert collect_model_files(folder)["CODE_LICENSE"] == (Path(__file__).parents[2] / "LICENSE").read_bytes()


def test_the_card_is_renamed_in_the_current_folder_with_its_line_endings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "README.md").write_bytes(b'# my-run\r\n\r\nfrom_pretrained("my-run")\r\nmore\r\n')
    monkeypatch.chdir(folder)
    expected = b'# ann/mine\r\n\r\nfrom_pretrained("ann/mine")\r\nmore\r\n'
    assert collect_model_files(Path(), "ann/mine")["README.md"] == expected
    assert collect_model_files(Path())["README.md"] == Path("README.md")
    Path("README.md").write_bytes(b"\xff")
    with raises_one_line("cannot read README.md: 'utf-8' codec"):
        collect_model_files(Path(), "ann/mine")


def test_onnx_files_are_current_if_all_shards_have_the_reported_digests(folder: Path) -> None:
    assert not has_current_onnx_files(folder)
    (folder / "model.safetensors").unlink()
    shards = {f"model-0000{number}-of-00002.safetensors": bytes([number]) for number in (1, 2)}
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "onnx").mkdir()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in shards.items()}
    (folder / "onnx" / "report.json").write_text(json.dumps({"weights_sha256": digests}))
    assert has_current_onnx_files(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"new")
    assert not has_current_onnx_files(folder)


@pytest.mark.parametrize(
    ("settings", "has_report", "expected"),
    [
        ({"model_type": "vit"}, True, True),
        ({"model_type": "vit"}, False, False),
        ({"model_type": "vitcls"}, True, False),
        ({"model_type": "vit", "auto_map": {"AutoModel": "modeling.Model"}}, True, False),
    ],
)
def test_converted_models_are_native_if_they_have_a_report_and_no_code(
    tmp_path: Path, settings: dict[str, Any], has_report: bool, expected: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if has_report:
        (tmp_path / "parity_report.json").write_text("{}")
    assert is_native_model(tmp_path) is expected


def test_patterns_do_not_match_other_folders() -> None:
    assert is_match("pictures/a.png", ["x", "pictures/*.png"])
    assert not is_match("pictures/a/b.png", ["pictures/*.png"]) and not is_match("a/x.json", ["*.json"])
    assert not is_match("A.JSON", ["*.json"])


# Required code -------------------------------------------------------------------------------------------------------


@pytest.fixture
def complete_folder(tmp_path: Path) -> Path:
    """Return a folder with a model and its image processor."""
    vitcls.ViTCLSForImageClassification(build_tiny_config()).save_pretrained(tmp_path / "model")
    vitcls.ViTCLSImageProcessor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_all_code_is_needed(complete_folder: Path) -> None:
    """Imports are followed: `auto_map` contains only three of the files."""
    assert list_required_code(complete_folder) == set(READING_ORDER)
    assert set(READING_ORDER) <= collect_model_files(complete_folder).keys()


@pytest.mark.parametrize("name", READING_ORDER)
def test_a_folder_without_a_code_file_is_an_error(name: str, complete_folder: Path) -> None:
    (complete_folder / name).unlink()
    with raises_one_line(f"lacks {name}", "Save the model again"):
        collect_model_files(complete_folder)


def test_nothing_of_an_incomplete_folder_is_pushed(hub: LocalHub, complete_folder: Path) -> None:
    (complete_folder / "blocks_vitcls.py").unlink()
    with raises_one_line("lacks blocks_vitcls.py"):
        push_folder(complete_folder, "ann/model")
    assert not hub.repositories


def test_files_that_import_each_other(complete_folder: Path) -> None:
    """Each file is read once."""
    for name, other in (("first", "second"), ("second", "first")):
        (complete_folder / f"{name}_vitcls.py").write_text(f"from .{other}_vitcls import value\n")
    with (complete_folder / "blocks_vitcls.py").open("a") as code:
        code.write("from .first_vitcls import value\n")
    assert list_required_code(complete_folder) == {*READING_ORDER, "first_vitcls.py", "second_vitcls.py"}
