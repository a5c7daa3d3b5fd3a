"""The code files of a model: digest, reading order, differences from this package, license."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.publishing import code_files
from modeling_vitcls.publishing.code_files import (
    PACKAGE_FOLDER,
    READING_ORDER,
    compute_code_digest,
    describe_code_differences,
    read_code_license,
)
from modeling_vitcls.publishing.shared_code import write_code
from modeling_vitcls.version import __version__


def test_each_file_imports_only_earlier_files() -> None:
    assert sorted(READING_ORDER) == sorted(file.name for file in PACKAGE_FOLDER.glob("*_vitcls.py"))
    for index, name in enumerate(READING_ORDER):
        imported = re.findall(r"^from \.(\w+) import", (PACKAGE_FOLDER / name).read_text(), re.MULTILINE)
        assert {f"{module}.py" for module in imported} <= set(READING_ORDER[:index]), name


def test_the_digest_is_computed_as_in_the_card(tmp_path: Path) -> None:
    write_code(tmp_path)
    printed = subprocess.check_output("cat *_vitcls.py | sha256sum", shell=True, cwd=tmp_path, text=True)
    assert printed.split()[0] == compute_code_digest(tmp_path) == compute_code_digest()
    (tmp_path / "heads_vitcls.py").write_text("")
    assert compute_code_digest(tmp_path) != compute_code_digest()


def test_differences_are_named(tmp_path: Path) -> None:
    write_code(tmp_path)
    assert describe_code_differences(tmp_path) == f"code identical to modeling_vitcls {__version__}"
    (tmp_path / "heads_vitcls.py").write_text("changed")
    (tmp_path / "handler.py").write_text("changed")
    (tmp_path / "blocks_vitcls.py").unlink()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "own.py").write_text("")
    assert describe_code_differences(tmp_path) == (
        f"code differs from modeling_vitcls {__version__}: handler.py, heads_vitcls.py (changed); blocks_vitcls.py "
        "(missing); more/own.py (added)"
    )


def test_the_license_equals_the_one_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_code_license() == (Path(__file__).parents[2] / "LICENSE").read_bytes()
    monkeypatch.setattr(code_files, "PACKAGE_FOLDER", tmp_path / "modeling_vitcls")  # not in a checkout
    installed = tmp_path / "site-packages" / "modeling_vitcls-0.2.0.dist-info"
    (installed / "licenses").mkdir(parents=True)
    (installed / "METADATA").write_text("Name: modeling_vitcls\nVersion: 0.2.0\n")
    (installed / "licenses" / "LICENSE").write_text("of the wheel")
    monkeypatch.syspath_prepend(installed.parent)
    assert read_code_license() == b"of the wheel"
    monkeypatch.setattr(code_files, "distribution", lambda name: SimpleNamespace(read_text=lambda file: None))
    with raises_one_line("the license of modeling_vitcls was not found. Reinstall the package"):
        read_code_license()
    assert all("SPDX-License-Identifier: Apache-2.0" in (PACKAGE_FOLDER / name).read_text() for name in READING_ORDER)
