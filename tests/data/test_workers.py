"""Data loading processes that cannot work: errors of one line instead of runs that wait forever."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow  # each test starts a process

# Loads batches of 1 MB in two processes.
LOAD_BATCHES = """
import torch
from modeling_vitcls.data.workers import (load_batches, explain_worker_errors)

class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 50
    def __getitem__(self, index):
        return torch.zeros(250_000)

if __name__ == "__main__":
    try:
        with explain_worker_errors(2):
            print(len(list(load_batches(Batches(), 2))))
    except (OSError, ValueError) as error:
        print("error:", error)
"""
SECONDS = 240  # limit of a process on a busy machine; without the limits, PyTorch waits forever


def test_a_tiny_shared_memory_is_an_error(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if (
        unshare is None
        or subprocess.run([unshare, "-m", "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("another /dev/shm requires Linux and the permission to mount (unshare -m)")
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    command = [unshare, "-m", "sh", "-c", mount, "sh", sys.executable, "-m", "modeling_vitcls.cli"]
    arguments = f"finetune --config digits --max-steps 2 --num-workers 2 --output-dir {tmp_path}/a"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [*command, *arguments.split()],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
        check=False,
    )
    assert ran.returncode == 1
    # The other process may write its line later
    assert "enlarge it with --shm-size" in ran.stderr
    assert "Set --num-workers 0" in ran.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ulimit")
@pytest.mark.parametrize("limit", ["-f 100", "-n 24"])
def test_a_limit_of_the_shell_is_an_error(limit: str) -> None:
    command = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", sys.executable, "-c", LOAD_BATCHES]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert "`num_workers=0`" in ran.stdout + ran.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("is_guarded", [True, False])
def test_processes_that_would_run_the_script_again_are_not_started(
    method: str, is_guarded: bool, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    start = f"import multiprocessing\nmultiprocessing.set_start_method({method!r}, force=True)\n"
    condition = '__name__ == "__main__"' if is_guarded else "True"
    script.write_text(start + LOAD_BATCHES.replace('__name__ == "__main__"', condition))
    ran = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    assert ran.stdout.startswith("50" if is_guarded else f"error: {script} would run again in")
