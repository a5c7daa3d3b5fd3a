"""Tokens stay near the ceilings of CONTRIBUTING.md, which only fall, and asserts above its floor."""

import ast
import io
import re
import shutil
import subprocess
import tokenize
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import cache

import pytest
from helpers.doc_pages import ROOT

from modeling_vitcls.training.options import FinetuneOptions


# A change that follows a recipe of CONTRIBUTING.md has room; the ceilings are lowered at a release.
HEADROOM = 1.01

# Comments, and tokens that only say where a line, a statement or a block ends.
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@cache
def count_code(folder: str, name: str = "*.py") -> Counter[str]:
    """Count statements, asserts and tokens, without imports, docstrings and comments.

    Folding two statements into one saves no tokens, and folding three asserts loses none. The
    tests count, because each process that collects them would spend seconds.
    """
    counts: Counter[str] = Counter()
    for file in (ROOT / folder).rglob(name):
        text = file.read_text()
        lines_left_out = set()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.stmt):
                continue
            is_import = isinstance(node, ast.Import | ast.ImportFrom)
            if is_import or is_docstring(node):
                lines_left_out.update(range(node.lineno, node.end_lineno + 1))
            else:
                counts["statements"] += 1
                counts["asserts"] += count_facts(node)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            counts["tokens"] += token.type not in LAYOUT and token.start[0] not in lines_left_out
    return counts


def count_facts(node: ast.stmt) -> int:
    """Count what an assert compares: `assert (a, b) == (1, 2)` states two facts."""
    if not isinstance(node, ast.Assert):
        return 0
    sides = [node.test.left, *node.test.comparators] if isinstance(node.test, ast.Compare) else []
    return max([1, *(len(side.elts) for side in sides if isinstance(side, ast.Tuple))])


def is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def read_limit(row: str) -> float:
    """Read the limit of a row from the tables of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    limit = re.search(rf"\| {re.escape(row)} \| ([\d,.]+) \|", text)
    assert limit is not None, f"CONTRIBUTING.md has no limit of {row}"
    return float(limit[1].replace(",", ""))


def count_evidence() -> int:
    return count_code("scripts/studies")["tokens"] + count_code("scripts/tools")["tokens"]


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ("tokens of the package", lambda: count_code("modeling_vitcls")["tokens"]),
        (
            "tokens of the `*_vitcls.py` files, which travel with every checkpoint",
            lambda: count_code("modeling_vitcls", "*_vitcls.py")["tokens"],
        ),
        ("tokens of the tests", lambda: count_code("tests")["tokens"]),
        (
            "tokens of the scripts without studies and tools",
            lambda: count_code("scripts")["tokens"] - count_evidence(),
        ),
        ("flags of `vitcls finetune`", lambda: len(fields(FinetuneOptions))),
    ],
)
def test_nothing_grows_far_above_its_ceiling(row: str, count: Callable[[], int]) -> None:
    number = count()
    assert number <= HEADROOM * read_limit(row), f"{number:,} {row}: look for what it replaces"


def read_ceilings(text: str) -> dict[str, int]:
    rows = re.findall(r"^\| (tokens of [^|]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    return {row: int(limit.replace(",", "")) for row, limit in rows}


def run_git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="the history of the ceilings is in the git repository",
)
def test_no_ceiling_has_ever_risen() -> None:
    ceilings = read_ceilings((ROOT / "CONTRIBUTING.md").read_text())
    for commit in run_git("log", "--format=%h", "--", "CONTRIBUTING.md").split():
        earlier = run_git("show", f"{commit}:CONTRIBUTING.md")
        if "Ceilings only fall" not in earlier:
            break  # The page of that time allowed raising them
        for row, limit in read_ceilings(earlier).items():
            assert ceilings.get(row, limit) <= limit, f"{row}: {limit:,} in {commit}"


def test_tests_assert_enough() -> None:
    counts = count_code("tests")
    density = 100 * counts["asserts"] / counts["statements"]
    assert density >= read_limit("asserts per 100 statements of the tests, at least"), (
        f"{density:.1f} asserts per 100 statements: check more of what the tests set up"
    )
