"""Training on several processes: two processes on this machine's CPU equal one process.

The checks are in distributed_worker.py. They run once, in the same two processes.
"""

from pathlib import Path

import pytest
from helpers import distributed_worker
from helpers.distributed_worker import CHECKS, NUM_PROCESSES
from helpers.warm_processes import run_together

from modeling_vitcls.runtime.files import read_json


@pytest.fixture(scope="module")
def report(module_path: Path) -> dict[str, str]:
    """Return check -> error, "" if it passed.

    The exit status is ignored: with torch 2.11, gloo threads sometimes abort a process that has
    finished.
    """
    run_together(
        distributed_worker.__file__,
        module_path,
        log=module_path / "log",
        processes=NUM_PROCESSES,
        may_fail=True,
    )
    assert (module_path / "report.json").is_file(), (module_path / "log.errors").read_text()[-4000:]
    return read_json(module_path / "report.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_several_processes_equal_one(name: str, report: dict[str, str]) -> None:
    if report[name]:
        pytest.fail(report[name], pytrace=False)
