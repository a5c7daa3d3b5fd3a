"""Output of a run during training (reporter.py)."""

import io
import json
import math
from pathlib import Path

import pytest
from accelerate import Accelerator
from helpers.photo_folders import get_file_names
from pytest import CaptureFixture, MonkeyPatch
from rich.console import Console

from modeling_vitcls.training.reporter import Reporter


RECORD = {"epoch": 0.5, "loss": 2.0, "learning_rate": 2.5e-4, "images_per_second": 100.0}


def build_reporter(folder: Path) -> tuple[Reporter, io.StringIO]:
    output = io.StringIO()
    reporter = Reporter(folder / "metrics.jsonl", Accelerator(cpu=True))
    reporter.console = Console(file=output, soft_wrap=True)
    return reporter, output


def test_a_record_that_would_not_be_valid_json_is_an_error(tmp_path: Path) -> None:
    """test_finetune.py removes records of repeated steps and a truncated one."""
    reporter, _ = build_reporter(tmp_path)
    reporter.log(RECORD | {"step": 5})
    with pytest.raises(ValueError, match="Out of range float values"):
        reporter.log(RECORD | {"step": 6, "loss": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text() == f"{json.dumps(RECORD | {'step': 5})}\n"
    assert get_file_names(tmp_path) == {"metrics.jsonl"}


def test_only_the_main_process_writes_and_prints(
    tmp_path: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    reporter = Reporter(tmp_path / "metrics.jsonl", Accelerator(cpu=True))
    reporter.start_after(0, 10)
    reporter.print_line("data", "a line")
    reporter.warn("a warning")
    reporter.log(RECORD | {"step": 1})
    reporter.print_evaluation(RECORD | {"step": 1})
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_an_evaluation_is_a_line_with_the_score_of_the_run(tmp_path: Path) -> None:
    reporter, output = build_reporter(tmp_path)
    reporter.start_after(0, 900, "accuracy")
    scores = {"held_out_accuracy": 0.5, "held_out_loss": 3.0}
    reporter.log(RECORD | {"step": 890})
    reporter.print_evaluation(RECORD | {"step": 900} | scores)
    (line,) = output.getvalue().splitlines()
    assert line.startswith("step 900/900")
    assert line.endswith("  held out: accuracy 50%")


def test_brackets_are_not_markup_and_no_line_has_an_escape_sequence(tmp_path: Path) -> None:
    reporter, output = build_reporter(tmp_path)
    reporter.print_line("scenes", "[red] and registers[1], as in a\x1b[31m.jpg\nand b.jpg")
    reporter.warn("[bold]noon[/bold].png of \x1b]0;title\x07cat cannot be read")
    printed = output.getvalue()
    assert "[red] and registers[1]" in printed
    assert "[bold]noon[/bold].png" in printed
    assert "\n          and b.jpg\n" in printed
    assert "\x1b" not in printed
