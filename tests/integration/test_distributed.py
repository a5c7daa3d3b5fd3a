"""Training on several processes: two on this machine's CPU, which must do what one does.

The checks themselves are in distributed_worker.py; they run once, together.
"""

import json
from pathlib import Path

import pytest
from distributed_worker import CHECKS, NUM_PROCESSES
from warm_processes import OFFLINE, run_together


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check -> what went wrong."""
    folder = tmp_path_factory.mktemp("distributed")
    worker = Path(__file__).parents[1] / "helpers" / "distributed_worker.py"
    # The exit status says nothing: with torch 2.11, threads of gloo now and then abort a process that is done.
    run_together(worker, folder, log=folder / "log", environment=OFFLINE, processes=NUM_PROCESSES, may_fail=True)
    assert (folder / "report.json").is_file(), (folder / "log.errors").read_text()[-4000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", CHECKS)
def test_several_processes_do_what_one_does(name: str, report: dict[str, str]) -> None:
    if report[name]:
        pytest.fail(report[name], pytrace=False)
