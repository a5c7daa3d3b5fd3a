"""Run data loading processes: handle signals, and turn errors into one line.

    loader = build_loader(dataset, num_workers, sampler=sampler)
    with explain_worker_errors(num_workers):
        for batch in loader: ...

The processes pass batches on through shared memory (/dev/shm on Linux). If a batch does not fit
there, or if a limit such as `ulimit -n` is reached, PyTorch waits forever. Here, the process that
cannot pass on a batch ends, and the training process raises an error.
"""

import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from ..runtime.errors import format_error


TIMEOUT = 600.0  # Maximum time without a batch, in seconds
PREFETCH_FACTOR = 2  # Number of batches that each process loads in advance

# In the messages of PyTorch and the system for a process that has ended, has timed out, or cannot
# open files
WORKER_ERRORS = ("DataLoader worker (pid", "DataLoader timed out", "Too many open files")


def build_loader(dataset: Any, num_workers: int, **options: Any) -> DataLoader:
    """Build a DataLoader whose data loading processes end with an error instead of waiting forever.

    Args:
        dataset: dataset whose items are batches.
        num_workers: number of data loading processes; 0 loads the batches in this process.
        options: other arguments of DataLoader.

    Raises:
        ValueError: if the processes would run the script of this process again.
    """
    if num_workers:
        check_script_is_guarded()
        options |= {
            "timeout": TIMEOUT,
            "prefetch_factor": PREFETCH_FACTOR,
            "worker_init_fn": prepare_worker,
        }
    return DataLoader(dataset, batch_size=None, num_workers=num_workers, **options)


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
    if multiprocessing.get_start_method() == "fork" or not script or main.__spec__ is not None:
        return
    if "__main__" not in Path(script).read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"{script} would run again in each data loading process. Write its calls below `if "
            "__name__ == '__main__':`, or set `num_workers=0`"
        )


# In the data loading processes --------------------------------------------------------------------


def prepare_worker(worker_index: int) -> None:
    """Prepare a data loading process; the `worker_init_fn` of the loader."""
    leave_signals_to_parent()
    # Python's thread that passes batches on would only print the error, and the parent would wait
    # for the batch.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]


def end_worker(error: BaseException, item: Any) -> NoReturn:
    """End this process, because it cannot pass on a batch.

    PyTorch raises an error in the parent process.
    """
    print(
        f"a data loading process cannot pass on a batch: {format_error(error)}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def leave_signals_to_parent() -> None:
    """Make a DataLoader worker ignore signals that are sent to all processes.

    Otherwise, such a signal would stop the workers while the training process still needs batches.
    SIGTERM from the training process stops a worker, unless a SIGTERM from another process is
    pending. To stop the workers without a signal, close the iterator of the loader.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGUSR1", "SIGHUP"):  # Windows does not have them
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not have it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # Inherited by the thread below
        threading.Thread(target=wait_for_parent_signal, daemon=True).start()


def wait_for_parent_signal() -> None:
    """Exit after a SIGTERM from the parent process, and ignore SIGTERM from other processes."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
