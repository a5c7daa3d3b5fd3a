"""What a reader meets stays within the limits of CONTRIBUTING.md: functions, signatures, files, and what ships."""

import ast
import io
import re
import tokenize
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from helpers.doc_pages import ROOT

from modeling_vitcls.training.options import FinetuneOptions


PACKAGE = ROOT / "modeling_vitcls"

# Comments, and tokens that only say where a line, a statement or a block ends.
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}

# Functions above a limit, which wait for someone to divide them. Nothing is added here.
LONG: set[str] = set()
# The first is transformers' signature; the others draw a page or a bar
MANY_PARAMETERS = {
    "model/blocks_vitcls.py:eager_attention_forward",
    "additions/extend.py:append_head",
    "analysis/inspection.py:inspect_images",
    "analysis/report.py:write_page",
    "inference/image_pass.py:__init__",
    "publishing/report.py:draw_page",
    "runtime/progress.py:track",
    "training/steps_run.py:build_loop",
    "training/steps_run.py:run_steps",
}
# Queries, keys and values are three; the others wait for a class
LONG_TUPLES = {
    "model/blocks_vitcls.py:project_qkv",
    "additions/add_task.py:divide",
    "additions/extend.py:keep_scenes_together",
    "conversion/to_transformers.py:find_transformers_class",
    "conversion/to_transformers.py:match_target",
    "data/cells.py:read_label_names",
    "evaluation/evaluate.py:set_up_evaluation",
    "frozen/linear_probe.py:cross_validate",
    "training/model.py:build_model",
    "training/new_tokens.py:measure_tokens",
}
LONG_FILES = {"frozen/linear_probe.py"}


def read_limit(row: str) -> float:
    """Read the limit of a row from the table of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    limit = re.search(rf"\| {re.escape(row)} \| ([\d,.]+) \|", text)
    assert limit is not None, f"CONTRIBUTING.md has no limit of {row}"
    return float(limit[1].replace(",", ""))


# Functions ----------------------------------------------------------------------------------------
@cache
def list_functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """List the functions of the package, as FILE:NAME."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((f"{name}:{node.name}", node))
    return found


def count_statements(function: ast.AST) -> int:
    return sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(parameter.arg not in ("self", "cls") for parameter in parameters)


def count_returned(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the values of a returned tuple: `tuple[Tensor, str, int]` has three."""
    match function.returns:
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=elements)):
            values = [ast.unparse(element) for element in elements]
        case _:
            return 1
    return 1 if values[-1] == "..." else len(values)


FUNCTION_LIMITS = {
    "statements of a function": (count_statements, LONG),
    "parameters of a function, without `self`": (count_parameters, MANY_PARAMETERS),
    "values of a returned tuple": (count_returned, LONG_TUPLES),
}


@pytest.mark.parametrize("row", FUNCTION_LIMITS)
def test_no_function_is_above_a_limit(row: str) -> None:
    count, waiting = FUNCTION_LIMITS[row]
    limit = read_limit(row)
    found = {name: count(function) for name, function in list_functions()}
    above = {name: number for name, number in found.items() if number > limit}
    assert above.keys() <= waiting, f"{above}: divide the function, or give the values a class"
    assert waiting <= above.keys(), f"{waiting - above.keys()}: no longer above the limit"


# Files --------------------------------------------------------------------------------------------
def test_no_file_is_too_long_to_read() -> None:
    lengths = {
        file.relative_to(PACKAGE).as_posix(): len(file.read_text().splitlines())
        for file in PACKAGE.rglob("*.py")
        if file.parent.name != "model"
    }
    limit = read_limit("lines of a file outside of `model/`")
    above = {name: length for name, length in lengths.items() if length > limit}
    assert above.keys() <= LONG_FILES, above


def list_shipped_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*_vitcls.py"))


def count_tokens(file: Path) -> int:
    """Count the tokens of a file, without imports, docstrings, comments and line ends."""
    text = file.read_text()
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and is_uncounted(node):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type not in LAYOUT and token.start[0] not in left_out for token in tokens)


def is_uncounted(node: ast.stmt) -> bool:
    """Tell whether a statement is an import or a docstring."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or isinstance(node, ast.Import | ast.ImportFrom)


def test_a_checkpoint_carries_few_files() -> None:
    assert len(list_shipped_files()) <= read_limit("files that travel with every checkpoint")


def test_a_checkpoint_carries_little_code() -> None:
    tokens = sum(map(count_tokens, list_shipped_files()))
    assert tokens <= read_limit("tokens of these files"), f"{tokens:,}"


# Flags and tests ----------------------------------------------------------------------------------
def test_finetune_has_few_flags() -> None:
    assert len(fields(FinetuneOptions)) <= read_limit("flags of `vitcls finetune`")


def count_facts(node: ast.Assert) -> int:
    """Count what an assert compares: `assert (a, b) == (1, 2)` states two facts."""
    sides = [node.test.left, *node.test.comparators] if isinstance(node.test, ast.Compare) else []
    return max([1, *(len(side.elts) for side in sides if isinstance(side, ast.Tuple))])


def test_tests_assert_enough() -> None:
    num_asserts = num_statements = 0
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Assert):
                num_asserts += count_facts(node)
            num_statements += isinstance(node, ast.stmt) and not is_uncounted(node)
    density = 100 * num_asserts / num_statements
    assert density >= read_limit("asserts per 100 statements of the tests, at least"), (
        f"{density:.1f} asserts per 100 statements: check more of what the tests set up"
    )
