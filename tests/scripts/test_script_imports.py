"""All scripts: for those of studies and tools, no other test is needed."""

import ast
import importlib
from pathlib import Path

import pytest


SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("file", sorted(SCRIPTS.rglob("*.py")), ids=lambda file: file.stem)
def test_a_script_imports_what_the_package_has(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("modeling_vitcls"):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"
