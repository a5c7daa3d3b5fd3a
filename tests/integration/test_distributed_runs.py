"""Training on several processes: two processes on this machine's CPU equal one process.

The checks are in distributed_worker.py. They run once, in the same two processes.
"""

import pytest
from helpers.distributed_worker import CHECKS, NUM_PROCESSES
from helpers.warm_processes import run_checks


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return check -> error, "" if it passed."""
    return run_checks(
        "distributed_worker.py", tmp_path_factory.mktemp("distributed"), NUM_PROCESSES
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_several_processes_equal_one(name: str, report: dict[str, str]) -> None:
    if report[name]:
        pytest.fail(report[name], pytrace=False)
