"""Training on several processes: two processes on this machine's CPU equal one process.

The checks are in distributed_worker.py. They run once, in the same two processes.
"""

import pytest
from helpers import distributed_worker
from helpers.distributed_worker import CHECKS, NUM_PROCESSES
from helpers.warm_processes import run_together

from modeling_vitcls.runtime.files import read_json


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return check -> error, "" if it passed.

    The exit status is ignored: with torch 2.11, gloo threads sometimes abort a process that has
    finished.
    """
    folder = tmp_path_factory.mktemp("distributed")
    run_together(
        distributed_worker.__file__,
        folder,
        log=folder / "log",
        processes=NUM_PROCESSES,
        may_fail=True,
    )
    assert (folder / "report.json").is_file(), (folder / "log.errors").read_text()[-4000:]
    return read_json(folder / "report.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_several_processes_equal_one(name: str, report: dict[str, str]) -> None:
    if report[name]:
        pytest.fail(report[name], pytrace=False)
