"""Errors of the Python functions: flags become arguments, and nothing else of the error changes."""

from typing import Any

import pytest

from modeling_vitcls.cli.argument_errors import errors_name_arguments, name_arguments
from modeling_vitcls.inference.options import EvaluateOptions, PredictOptions
from modeling_vitcls.runtime.errors import RunStopped
from modeling_vitcls.training.options import FinetuneOptions


@pytest.mark.parametrize(
    ("options_class", "message", "expected"),
    [
        (FinetuneOptions, "a longer --warmup, or --seed.", "a longer warmup, or seed."),
        (FinetuneOptions, "Set --split-seed to a number", "Set split_seed to a number"),
        (FinetuneOptions, "Set --num-workers 0.", "Set num_workers=0."),
        (FinetuneOptions, "--held-out-fraction 0.25 fits", "held_out_fraction=0.25 fits"),
        (FinetuneOptions, "(--mixed-precision no)", "(mixed_precision='no')"),
        (FinetuneOptions, "Set --resume or --overwrite", "Set resume=True or overwrite=True"),
        (FinetuneOptions, "--no-probe is set", "probe=False is set"),
        (FinetuneOptions, "--folds 3 --fold 1", "folds=3 fold=1"),
        (PredictOptions, "one of PATHS, --list and --dataset", "one of images, list and dataset"),
    ],
)
def test_flags_become_arguments(options_class: type, message: str, expected: str) -> None:
    assert name_arguments(message, options_class) == expected


@pytest.mark.parametrize(
    ("options_class", "message"),
    [
        (EvaluateOptions, "Run `vitcls evaluate --model M --split test`"),
        (EvaluateOptions, "`vitcls predict --dataset D --split a`, not evaluate"),
        (EvaluateOptions, "cannot read data/--split/PATHS/a.png"),
        (EvaluateOptions, "Use `vitcls predict` with --top-k"),
        (EvaluateOptions, "in Docker: --shm-size"),
        (EvaluateOptions, "there is no flag --splits"),
    ],
)
def test_commands_paths_and_flags_of_other_programs_stay(options_class: type, message: str) -> None:
    assert name_arguments(message, options_class) == message


def test_an_error_keeps_its_class_its_cause_and_its_attributes() -> None:
    cause = KeyError("cause")

    @errors_name_arguments(FinetuneOptions)
    def stop() -> Any:
        raise RunStopped("continue with --resume", exit_status=3) from cause

    with pytest.raises(RunStopped) as raised:
        stop()
    assert str(raised.value) == "continue with resume=True"
    assert raised.value.exit_status == 3
    assert raised.value.__cause__ is cause


def test_an_error_of_the_operating_system_stays() -> None:
    error = FileNotFoundError(2, "No such file", "--resume")
    with pytest.raises(FileNotFoundError) as raised, errors_name_arguments(FinetuneOptions):
        raise error
    assert raised.value.args == (2, "No such file")
    assert raised.value.filename == "--resume"
