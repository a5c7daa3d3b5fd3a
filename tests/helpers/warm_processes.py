"""Processes that start at once: forks of a server that has imported the large libraries, and done nothing else.

    process = READY.Process(target=run_script, args=("finetune.py", flags, log, errors, environment))
    printed = run_together("finetune.py", *flags, log=log)      two that work together, until they have ended

Forks of the tests' own process would know what tests before them have left, and cannot compute gradients once that
has computed some. What libraries read from the environment at import, such as HF_ENDPOINT, is what it was for the
server. Real launchers are tested in test_accelerate_configs.py and test_resume.py.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


SCRIPTS = Path(__file__).parents[2] / "scripts"
PRELOADED = ["modeling_vitcls.training.finetune", "datasets", "peft", "psutil", "pytest", "timm"]
PRELOADED += ["sklearn.datasets", "sklearn.model_selection", "tyro"]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
READY = multiprocessing.get_context(METHOD)
if multiprocessing.parent_process() is None:  # not in what the server has started
    READY.set_forkserver_preload(PRELOADED)
SECONDS = 240.0
OFFLINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}  # for what is started


def run_script(
    script: str | Path, flags: Sequence[str], log: Path, errors: Path, environment: Mapping[str, str]
) -> None:
    """What such a process does to be a script, in a session of its own, with the ends of these files as its output."""
    os.setsid()  # signals can be sent to it and its workers alone
    for descriptor, file in ((1, log), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # its workers start as they always do
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
    """A script on processes that work together, until all have ended; what they printed.

    Args:
        script: a name in scripts/, or a path.
        flags: for each of them.
        log: what they print is added to it, and their errors to one with .errors at its end.
        environment: in addition to this one's and what a launcher sets.
        processes: how many.
        may_fail: whether their exit status does not matter.
    """
    errors = log.with_name(f"{log.name}.errors")
    port = free_port()
    started = [
        READY.Process(
            target=run_script,
            args=(script, list(map(str, flags)), log, errors, dict(environment or {}) | ranked(rank, processes, port)),
        )
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
    hanging = [process for process in started if process.is_alive()]
    for process in hanging:
        process.terminate()
    assert not hanging, f"{len(hanging)} of {processes} did not end in {SECONDS} s: {log.read_text()}"
    if not may_fail:
        assert [process.exitcode for process in started] == [0] * processes, log.read_text() + errors.read_text()
    return log.read_text(encoding="utf-8")


def ranked(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher tells one of several processes on the CPU."""
    several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    several |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    cpu = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": loopback()}
    return {name: str(value) for name, value in several.items()} | cpu


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def loopback() -> str:
    """The network interface that leads back to this machine."""
    return "lo0" if sys.platform == "darwin" else "lo"
