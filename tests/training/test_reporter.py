"""Output of a run during training (reporter.py)."""

import io
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from rich.console import Console

from modeling_vitcls.options import FinetuneOptions, TrainingOptions
from modeling_vitcls.training import reporter as reporter_module
from modeling_vitcls.training.reporter import Reporter, format_duration
from modeling_vitcls.training.runner import Runner
from modeling_vitcls.training.task import estimate_run_seconds


RECORD = {"epoch": 0.5, "loss": 2.0, "learning_rate": 2.5e-4, "images_per_second": 100.0}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (42, "42 s"),
        (89.5, "90 s"),
        (91, "2 min"),
        (3600 - 31, "59 min"),
        (3600 - 29, "1 h 0 min"),
        (3600 * 3.5, "3 h 30 min"),
        (3600 * 53, "2 d 5 h"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(reporter_module.time, "perf_counter", lambda: now[0])
    return now


def build_reporter(folder: Path, **console: Any) -> tuple[Reporter, io.StringIO]:
    output = io.StringIO()
    reporter = Reporter(folder / "metrics.jsonl", Accelerator(cpu=True))
    reporter.console = reporter.progress.live.console = Console(file=output, soft_wrap=True, **console)
    return reporter, output


def test_a_line_shows_the_learning_rate_and_the_remaining_time(tmp_path: Path, clock: list[float]) -> None:
    """After a resume at step 10, two steps took four minutes."""
    reporter, output = build_reporter(tmp_path)
    reporter.start_at(10, 20)
    clock[0] += 240
    reporter.log(RECORD | {"step": 12, "held_out_loss": 1.0, "held_out_accuracy": 0.25}, "accuracy")
    assert output.getvalue() == (
        "step 12/20  epoch 0.5  loss 2.000  lr 2.5e-04  100 images/s  16 min left  held out: accuracy 25.00%\n"
    )
    reporter.log(RECORD | {"step": 20}, "accuracy")
    assert output.getvalue().endswith("100 images/s\n")  # no time remains


def test_the_time_on_the_bar_is_labeled(tmp_path: Path, clock: list[float]) -> None:
    reporter, output = build_reporter(tmp_path, force_terminal=True, width=200)
    reporter.progress.disable = False
    reporter.start_at(0, 20)
    with reporter:
        clock[0] += 240
        reporter.log(RECORD | {"step": 2}, "accuracy")
    (last,) = [line for line in output.getvalue().splitlines() if "36 min left" in line][-1:]
    assert "lr 2.5e-04" in last and "2/20" in last


def test_a_dry_run_expects_steps_and_evaluations(tmp_path: Path) -> None:
    """The first step, which takes longer, is not counted; the evaluation uses a quarter of the images."""

    class Plan:
        num_steps, num_images = 100, 50

        def count_epochs(self, step: int) -> float:
            return step / 40

    runner = Runner.__new__(Runner)
    runner.step_seconds, runner.evaluation_seconds = [9.0, 0.5, 0.6], [2.0]
    options = FinetuneOptions.__new__(FinetuneOptions)
    object.__setattr__(options, "training", TrainingOptions())
    runner.options = options
    plan: Any = Plan()
    assert estimate_run_seconds(runner, plan, 0.25) == 100 * 0.5 + 3 * 2.0 / 0.25
