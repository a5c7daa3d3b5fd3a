"""Output of a run during training (reporter.py)."""

import io
import json
import math
from pathlib import Path

import pytest
from accelerate import Accelerator
from helpers.photo_folders import get_file_names
from rich.console import Console

from modeling_vitcls.training.reporter import Reporter


RECORD = {"epoch": 0.5, "loss": 2.0, "learning_rate": 2.5e-4, "images_per_second": 100.0}


def build_reporter(folder: Path) -> tuple[Reporter, io.StringIO]:
    output = io.StringIO()
    reporter = Reporter(folder / "metrics.jsonl", Accelerator(cpu=True))
    reporter.console = Console(file=output, soft_wrap=True)
    return reporter, output


def test_records_of_repeated_steps_are_removed(tmp_path: Path) -> None:
    """A run that continues after step 4 keeps the records up to step 4.

    The last line was truncated.
    """
    reporter, _ = build_reporter(tmp_path)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))
    reporter.start_after(4, 10)
    assert (tmp_path / "metrics.jsonl").read_text() == f"{lines[0]}\n{lines[1]}\n"
    reporter.log(RECORD | {"step": 5})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[2:] == [
        json.dumps(RECORD | {"step": 5})
    ]
    with pytest.raises(ValueError, match="Out of range float values"):  # would not be valid JSON
        reporter.log(RECORD | {"step": 6, "loss": math.nan})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert get_file_names(tmp_path) == {"metrics.jsonl"}


def test_only_the_main_process_writes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
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


def test_brackets_are_not_markup(tmp_path: Path) -> None:
    reporter, output = build_reporter(tmp_path)
    reporter.print_line("data", "[red] and registers[1]")
    reporter.warn("[bold]noon[/bold].png cannot be read")
    assert "[red] and registers[1]" in output.getvalue()
    assert "[bold]noon[/bold].png" in output.getvalue()


def test_no_line_has_an_escape_sequence_of_a_file_or_class(tmp_path: Path) -> None:
    reporter, output = build_reporter(tmp_path)
    reporter.print_line("scenes", "pairs such as a\x1b[31m.jpg\nand b.jpg")
    reporter.warn("no images of \x1b]0;title\x07cat")
    assert "\x1b[31m" not in output.getvalue()
    assert "\x1b]" not in output.getvalue()
    assert "\n          and b.jpg\n" in output.getvalue()
