"""Run programs, such as Python, in new processes, which import all libraries again.

Tests that need no new import use warm_processes.py, which is faster.
"""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from helpers.doc_pages import ROOT


SECONDS = 1800  # timeout of a process
# Environment variables for scripts: import this repository; one thread, no GPU, no Hub, a wide
# terminal, and processes that reach each other on this machine.
SCRIPT_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}


def run_program(
    *command: object, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program, which must end with exit status 0, and return its output.

    Args:
        command: the program and its arguments.
        environment: all environment variables of the process. Default: the variables of this
            process.
        cwd: working directory. Default: the working directory of this process.
    """
    words = list(map(str, command))
    done = subprocess.run(
        words, env=environment, cwd=cwd, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, (
        f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-4000:]}"
    )
    return done


# Runs Python with options, then a script, `-m MODULE` or `-c CODE`, then its flags
run_python = partial(run_program, sys.executable)
