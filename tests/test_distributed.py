"""Training on several processes: two on this machine's CPU, which must do what one does.

The checks themselves are in distributed_worker.py; they run once, together, because starting processes takes longer
than all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_worker import CHECKS, NUM_PROCESSES


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check -> what went wrong."""
    folder = tmp_path_factory.mktemp("distributed")
    worker = Path(__file__).with_name("distributed_worker.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]  # picks a free port
    command = [sys.executable, *launcher, f"--nproc-per-node={NUM_PROCESSES}", str(worker), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": loopback()}
    processes = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    # not by the exit status: with torch 2.11, threads of gloo now and then abort a process that is done
    assert (folder / "report.json").is_file(), processes.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


def loopback() -> str:
    """The network interface that leads back to this machine."""
    return "lo0" if sys.platform == "darwin" else "lo"


@pytest.mark.parametrize("name", CHECKS)
def test_several_processes_do_what_one_does(name: str, report: dict[str, str]) -> None:
    if report[name]:
        pytest.fail(report[name], pytrace=False)
