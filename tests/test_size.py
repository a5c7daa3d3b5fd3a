"""The package, its tests and the flags of `vitcls finetune` stay below the ceilings in CONTRIBUTING.md."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from modeling_vitcls.training.options import FinetuneOptions


ROOT = Path(__file__).parents[1]


def count_statements(folder: str) -> int:
    """Count the statements of all files of a folder, without imports and docstrings."""
    count = 0
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_docstring = (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            )
            if isinstance(node, ast.stmt) and not is_docstring:
                count += not isinstance(node, ast.Import | ast.ImportFrom)
    return count


def count_finetune_flags() -> int:
    return len(fields(FinetuneOptions))


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ("statements of the package", count_statements("modeling_vitcls")),
        ("statements of the tests", count_statements("tests")),
        ("flags of `vitcls finetune`", count_finetune_flags()),
    ],
)
def test_nothing_grows_above_its_ceiling(row: str, count: int) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ceiling = re.search(rf"\| {row} \| ([\d,]+) \|", text)

    assert ceiling is not None
    assert count <= int(ceiling[1].replace(",", "")), (
        f"{count:,} {row}: remove as much as you add, or more"
    )
