"""Training on several processes: two on this machine's CPU, which must do what one does.

The checks themselves are in distributed_worker.py; they run once, together.
"""

import pytest
from distributed_worker import CHECKS, NUM_PROCESSES
from warm_processes import run_checks


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check -> error, empty if it passed."""
    return run_checks("distributed_worker.py", tmp_path_factory.mktemp("distributed"), NUM_PROCESSES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_several_processes_do_what_one_does(name: str, report: dict[str, str]) -> None:
    if report[name]:
        pytest.fail(report[name], pytrace=False)
