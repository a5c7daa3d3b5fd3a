"""All scripts: for those of studies and tools, no other test is needed."""

from pathlib import Path

import pytest
from helpers.doc_pages import check_imports
from helpers.scripts_in_process import SCRIPTS


@pytest.mark.parametrize("file", sorted(SCRIPTS.rglob("*.py")), ids=lambda file: file.stem)
def test_a_script_imports_what_the_package_has(file: Path) -> None:
    check_imports(file.read_text())
