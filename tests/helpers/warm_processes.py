"""Start processes quickly: forks of a server that has imported the large libraries.

    process = READY.Process(target=run_script, args=("finetune.py", flags, log, errors, variables))
    output = run_together("finetune.py", *flags, log=log)      two processes that communicate

Forks of the test process would inherit the state of earlier tests, and could not compute gradients
once the test process has. Libraries read variables such as HF_ENDPOINT when the server imports
them. test_accelerate_configs.py and test_resume.py test the real launchers.
"""

import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate.utils.other import get_free_port

from helpers.fresh_processes import SCRIPT_ENVIRONMENT
from helpers.scripts_in_process import SCRIPTS


PRELOADED = (
    "modeling_vitcls.training.run datasets peft psutil pytest timm "
    "sklearn.datasets sklearn.model_selection tyro"
).split()
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
READY = multiprocessing.get_context(METHOD)
if multiprocessing.parent_process() is None:  # not inherited by the forks
    READY.set_forkserver_preload(PRELOADED)
SECONDS = 240.0  # timeout of a process


def run_script(
    script: str | Path,
    flags: Sequence[str],
    log: Path,
    errors: Path,
    environment: Mapping[str, str],
) -> None:
    """Run a script in this process, in a new session. Output and errors are appended to files."""
    os.setsid()  # signals to the session reach only this process and its workers
    for descriptor, file in ((1, log), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the default for workers
    torch.set_num_threads(1)
    sys.argv = [str(SCRIPTS / script), *flags]
    sys.path.insert(0, str(SCRIPTS))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_together(
    script: str | Path,
    *flags: object,
    log: Path,
    environment: Mapping[str, str] | None = None,
    processes: int = 2,
    may_fail: bool = False,
) -> str:
    """Run a script on processes that communicate; return their output.

    Args:
        script: name in scripts/, or path.
        flags: flags of each process.
        log: file to which output is appended; errors are appended to the file with the suffix
            .errors.
        environment: variables in addition to those of scripts and of a launcher.
        processes: number of processes.
        may_fail: whether the exit status is ignored.
    """
    errors = log.with_name(f"{log.name}.errors")
    words = list(map(str, flags))
    port = get_free_port()
    started = []
    for rank in range(processes):
        ranks = get_rank_variables(rank, processes, port)
        variables = SCRIPT_ENVIRONMENT | (environment or {}) | ranks
        process = READY.Process(target=run_script, args=(script, words, log, errors, variables))
        process.start()
        started.append(process)
    for process in started:
        process.join(SECONDS)
    hanging = [process for process in started if process.is_alive()]
    for process in hanging:
        process.terminate()
    output = log.read_text()
    assert not hanging, f"{len(hanging)} of {processes} did not end in {SECONDS} s: {output}"
    statuses = [process.exitcode for process in started]
    assert may_fail or statuses == [0] * processes, output + errors.read_text()
    return output


def get_rank_variables(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the variables that a launcher sets for one of several processes."""
    several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    several |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in several.items()}


def read_last_step(folder: Path) -> int:
    """Return the last step that a run has logged; 0 before the first one."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, IndexError, ValueError):  # no file, no line, or only a part of it
        return 0


def wait_for_step(
    folder: Path, step: int, is_alive: Callable[[], bool], log: Path | None = None
) -> None:
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + SECONDS
    while read_last_step(folder) < step:
        assert time.monotonic() < deadline, log and log.read_text()
        assert is_alive(), log and log.read_text()
        time.sleep(0.002)
