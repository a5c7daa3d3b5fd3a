"""Run Python in a new process, which imports all libraries again.

Tests that need no new import use warm_processes.py, which is faster.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


SECONDS = 300  # timeout of a process
# Environment variables for scripts: import this repository; one thread, no GPU, no Hub, a wide
# terminal.
SCRIPT_ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
}


def run_fresh(
    *arguments: object, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments and return its exit status and output.

    Args:
        arguments: options, then a script, `-m MODULE` or `-c CODE`, then its flags.
        environment: all environment variables of the process. Default: the variables of this
            process.
        cwd: working directory. Default: the working directory of this process.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
