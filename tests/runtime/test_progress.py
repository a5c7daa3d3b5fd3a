"""Progress of long work in log files: a line at regular intervals, also during a slow item."""

import io
import time
from pathlib import Path

import pytest
from helpers.photo_folders import write_photos
from helpers.tiny_options import build_tiny_options, run_training
from rich.console import Console

from modeling_vitcls.runtime import progress
from modeling_vitcls.runtime.progress import report_work, track


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)


def test_a_log_file_gets_the_number_of_processed_images() -> None:
    log = Console(file=io.StringIO())
    for item in track([2, 3, 5], "features", 10, count=int, console=log):
        if item == 5:
            time.sleep(0.2)
    assert "features 5 of 10 images\n" in log.file.getvalue()  # type: ignore[attr-defined]


def test_short_work_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 30)
    log = Console(file=io.StringIO())
    assert list(track(range(3), "features", console=log)) == [0, 1, 2]
    assert log.file.getvalue() == ""  # type: ignore[attr-defined]


def test_short_stages_in_a_row_are_not_silent_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.5)
    log = Console(file=io.StringIO())
    for stage in range(4):
        with report_work(f"stage {stage}", log):
            time.sleep(0.2)
    # On a busy machine, an earlier stage may be the one that is named.
    assert log.file.getvalue().startswith("stage")  # type: ignore[attr-defined]


def test_no_line_is_printed_after_an_error() -> None:
    log = Console(file=io.StringIO())
    with pytest.raises(ValueError, match="stop"), report_work("fitting", log):
        time.sleep(0.1)
        raise ValueError("stop")
    printed = log.file.getvalue()  # type: ignore[attr-defined]
    time.sleep(0.1)
    assert "fitting, for 0:00:00" in printed
    assert log.file.getvalue() == printed  # type: ignore[attr-defined]


@pytest.mark.integration
@pytest.mark.usefixtures("fresh_accelerate")
def test_training_and_evaluation_print_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0005)
    photos = write_photos(tmp_path / "photos", range(40))
    run_training(build_tiny_options(tmp_path / "run", photos, max_steps=2, batch_size=8))
    assert "evaluating 0 of 16 images" in capsys.readouterr().out
