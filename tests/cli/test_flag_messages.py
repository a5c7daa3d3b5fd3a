"""Messages of the package name parameters; a command shows them as flags."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_in_process import run_here

import modeling_vitcls
from modeling_vitcls import evaluate, finetune
from modeling_vitcls.cli.flag_messages import name_flags
from modeling_vitcls.inference.options import EvaluateOptions, PredictOptions
from modeling_vitcls.runtime.flags import get_flag_fields
from modeling_vitcls.training.options import FinetuneOptions


PACKAGE = Path(modeling_vitcls.__file__).parent
# Flags in strings below cli/ that are not part of a `vitcls` command
OTHER_FLAGS = [
    ("data/workers.py", "--shm-size"),  # a flag of Docker
    ("runtime/flags.py", "--{}"),  # to_arguments writes command lines
    ("runtime/flags.py", "--no-{}"),
]


@pytest.mark.parametrize(
    ("options_class", "message", "expected"),
    [
        (FinetuneOptions, "a longer `warmup`, or `seed`.", "a longer --warmup, or --seed."),
        (FinetuneOptions, "Set `split_seed` to a number", "Set --split-seed to a number"),
        (FinetuneOptions, "Set `num_workers=0`.", "Set --num-workers 0."),
        (FinetuneOptions, "`held_out_fraction=0.25` fits", "--held-out-fraction 0.25 fits"),
        (FinetuneOptions, "(`mixed_precision='no'`)", "(--mixed-precision no)"),
        (FinetuneOptions, 'Set `pooling="cls"`', "Set --pooling cls"),
        (FinetuneOptions, "`cls_scopes=('image', '2x2')`", "--cls-scopes image 2x2"),
        (FinetuneOptions, "Set `resume=True` or `overwrite=True`", "Set --resume or --overwrite"),
        (FinetuneOptions, "`probe=False` is set", "--no-probe is set"),
        (FinetuneOptions, "`output_dir='my runs'`: a file", "--output-dir 'my runs': a file"),
        (FinetuneOptions, "`epochs=N` epochs", "--epochs N epochs"),
        (PredictOptions, "one of `images` and `dataset`", "one of PATHS and --dataset"),
    ],
)
def test_parameters_become_flags(options_class: type, message: str, expected: str) -> None:
    assert name_flags(message, get_flag_fields(options_class)) == expected


@pytest.mark.parametrize(
    "message",
    [
        "Run `vitcls evaluate --model M --split test`",
        "Use `vitcls predict` for several splits",
        "cannot read data/split/images/a.png",
        "the split 'test' has no labels",
        "`images` is a parameter of predict",
        "there is no parameter `splits`",
        "Set split=test",
    ],
)
def test_commands_paths_and_parameters_of_other_functions_stay(message: str) -> None:
    assert name_flags(message, get_flag_fields(EvaluateOptions)) == message


def test_an_error_about_options_names_a_parameter_in_python_and_a_flag_in_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"^`held_out_fraction` is 2\.0"):
        finetune("vitcls-tiny", tmp_path, tmp_path / "run", held_out_fraction=2.0)

    arguments = ["--dataset", str(tmp_path), "--output-dir", str(tmp_path / "run")]
    run_here("finetune", "--model", "vitcls-tiny", *arguments, "--held-out-fraction", "2")
    assert capsys.readouterr().err.startswith("error: --held-out-fraction is 2.0")


def test_an_error_of_a_run_names_parameters_in_python_and_flags_in_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"Remove `streaming`$"):
        evaluate("vitcls-tiny", tmp_path, streaming=True)

    arguments = ["--model", "vitcls-tiny", "--dataset", str(tmp_path)]
    run_here("evaluate", *arguments, "--streaming")
    assert capsys.readouterr().err.rstrip().endswith("Remove --streaming")


def list_strings(file: Path) -> Iterator[str]:
    """Return the strings of a file without docstrings, with {} for the values in f-strings."""
    nodes = [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
    f_strings = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    for f_string in f_strings:
        parts = [getattr(part, "value", "") for part in f_string.values]
        yield "".join(part if isinstance(part, str) else "{}" for part in parts)

    skipped = {*docstrings, *(part for f_string in f_strings for part in f_string.values)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.value


def test_strings_below_the_commands_contain_no_flags_except_in_commands() -> None:
    found = set()
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith("cli/"):
            continue
        for text in list_strings(file):
            text = re.sub(r"`vitcls [^`]*`|^vitcls .*", "", text)
            found |= {(name, flag) for flag in re.findall(r"(?<![\w-])--(?:[a-z{][\w{}-]*)", text)}
    assert found == set(OTHER_FLAGS)
