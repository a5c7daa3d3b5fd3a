"""Processes that load batches, and end with an error instead of waiting forever.

They pass batches on through shared memory (/dev/shm on Linux). If a batch does not fit there, or if
a limit such as `ulimit -n` is reached, PyTorch waits forever. Here, the process that cannot pass on
a batch ends, and the training process raises an error.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import (
    current_process,
    get_start_method,
    parent_process,
    queues,
    resource_tracker,
)
from pathlib import Path
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from ..runtime.errors import format_error


TIMEOUT = 600.0  # Maximum time without a batch, in seconds

# In the messages of PyTorch and the system for a process that has ended, has timed out, or cannot
# open files
WORKER_ERRORS = ("DataLoader worker (pid", "DataLoader timed out", "Too many open files")


def load_batches(dataset: Any, num_workers: int, **options: Any) -> Iterator[Any]:
    """Iterate over a DataLoader whose processes end with an error instead of waiting forever.

    The items of `dataset` are batches, and `options` other arguments of DataLoader. Raise ValueError
    if the processes would run the script of this process again.
    """
    if current_process().daemon:  # Such as one of a `Pool`, which must not start others
        num_workers = 0
    if num_workers:
        check_script_is_guarded()
        options |= {
            "timeout": TIMEOUT,
            "worker_init_fn": prepare_worker,
        }
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, **options)
    if not num_workers or not hasattr(signal, "sigwaitinfo"):  # macOS does not have it
        return iter(loader)
    # The processes inherit that all their threads leave SIGTERM to `wait_for_parent_signal`
    resource_tracker.ensure_running()  # Its start unblocks SIGTERM
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def explain_worker_errors(num_workers: int) -> Iterator[None]:
    """Convert errors of data loading processes that ended or hang to an OSError of one line.

    PyTorch raises these errors at any time, also while the training process computes.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not num_workers or not any(text in str(error) for text in WORKER_ERRORS):
            raise
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise OSError(
            f"{reason}. Possible causes: a full /dev/shm (in Docker, enlarge it with --shm-size), too "
            "little memory, a limit (ulimit), or storage that does not respond. Set `num_workers=0`"
        ) from error


def check_script_is_guarded() -> None:
    """Raise ValueError if the script of this process does not expect to be imported by others.

    Processes that Python starts by `spawn` (macOS, Windows) or `forkserver` import it. It would
    train again in each of them, and PyTorch would wait for their batches.
    """
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)  # A notebook has none
    # `python -m` imports a module
    if get_start_method() == "fork" or not script or main.__spec__ is not None:
        return
    if b"__main__" not in Path(script).read_bytes():
        raise ValueError(
            f"{script} would run again in each data loading process. Write its calls below `if "
            "__name__ == '__main__':`, or set `num_workers=0`"
        )


# In the data loading processes --------------------------------------------------------------------


def prepare_worker(worker_index: int) -> None:
    """Prepare a data loading process; the `worker_init_fn` of the loader.

    It ignores signals that are sent to all processes: the training process still needs batches.
    SIGTERM from the training process ends it, unless a SIGTERM from another process is pending. To
    end it without a signal, close the iterator.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):  # Windows has only the first
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # PyTorch's handler would end this process
        threading.Thread(target=wait_for_parent_signal, daemon=True).start()
    # Python's thread that passes batches on would only print the error, and the parent would wait
    # for the batch.
    queues.Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]


def end_worker(error: BaseException, item: Any) -> NoReturn:
    """End this process, because it cannot pass on a batch.

    PyTorch raises an error in the parent process.
    """
    print(f"a data loading process cannot pass on a batch: {format_error(error)}", file=sys.stderr)
    os._exit(1)


def wait_for_parent_signal() -> None:
    """Exit after a SIGTERM from the parent process, and ignore SIGTERM from other processes."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent_process().pid:  # type: ignore[union-attr]
        pass
    os._exit(0)
