"""Progress of long work in log files: a line at regular intervals."""

import io
import time

from pytest import MonkeyPatch
from rich.console import Console

from modeling_vitcls.runtime import progress
from modeling_vitcls.runtime.progress import track


def test_a_log_file_gets_the_number_of_processed_images(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.01)
    log = Console(file=io.StringIO())
    for _ in track([2, 3, 5], "features", 10, count=int, console=log):
        time.sleep(0.02)
    lines = log.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["features 2 of 10 images"]


def test_short_work_prints_nothing() -> None:
    log = Console(file=io.StringIO())
    assert list(track(range(3), "features", console=log)) == [0, 1, 2]
    assert log.file.getvalue() == ""  # type: ignore[attr-defined]
