"""Keyword arguments of the Python functions: the file that editors and type checkers read."""

import inspect
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import modeling_vitcls
from modeling_vitcls.cli import flags
from scripts import make_flags


ROOT = Path(__file__).parents[2]

SNIPPET = """
from modeling_vitcls import finetune, predict

finetune("m", "digits", "out", learning_rate=1e-3, label_column="age", log_with=["wandb"])
predict("m", ["a.jpg"], features=("cls", "mean"))
finetune("m", "digits", "out", learning_rat=1e-3)
predict("m", ["a.jpg"], fit="stretch")
"""


def test_the_file_contains_all_flags_of_the_options() -> None:
    text = make_flags.FILE.read_text(encoding="utf-8")
    assert text == make_flags.build_module(), "run python scripts/make_flags.py"


@pytest.mark.parametrize("name", make_flags.FUNCTIONS)
def test_a_function_declares_the_flags_of_its_command(name: str) -> None:
    function: Any = getattr(modeling_vitcls, name)
    options_class = make_flags.FUNCTIONS[name]
    declared = typing.get_type_hints(inspect.unwrap(function))["flags"]
    expected = getattr(flags, options_class.__name__.replace("Options", "Flags"))
    assert typing.get_args(declared) == (expected,)


@pytest.mark.slow
@pytest.mark.integration
def test_a_type_checker_finds_a_wrong_name_and_a_wrong_value(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET.strip(), encoding="utf-8")
    package = Path("modeling_vitcls")
    files = [
        package / "__init__.py",
        package / "runtime" / "flags.py",
        *package.glob("*/options.py"),
    ]
    files += [package / "cli" / f"{name}.py" for name in ("functions", "flags")]

    options = ["--config-file=", "--explicit-package-bases", "--follow-imports=skip"]
    options += ["--ignore-missing-imports", f"--cache-dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "mypy", *options, str(snippet), *map(str, files)]

    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in checked.stdout.splitlines() if "snippet.py" in line]
    errors = [line for line in lines if ": error:" in line]

    assert len(errors) == 2, checked.stdout
    assert "snippet.py:5:" in errors[0]
    assert '"learning_rat"' in errors[0]
    assert "snippet.py:6:" in errors[1]
    assert '"fit"' in errors[1]
