"""Fixtures that several tests of the core share."""

from pathlib import Path

import pytest
from warm_processes import OFFLINE, run_together

from modeling_vitcls import cpu_kernels_vitcls


@pytest.fixture
def low_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels compute tiny models too."""
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_WORK", dict.fromkeys(cpu_kernels_vitcls.MIN_WORK, 0))
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_CHUNKED_SCORES", 0)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the results of two_processes.py."""
    folder = tmp_path_factory.mktemp("two_processes")
    worker = Path(__file__).with_name("two_processes.py")
    run_together(worker, folder, log=folder / "log", environment=OFFLINE)
    return folder
