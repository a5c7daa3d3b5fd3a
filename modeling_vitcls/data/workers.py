"""DataLoader workers with one-line errors. The contents of the batches are defined in batches.py and streaming.py."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def from_workers(batches: Dataset, keys: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """Yield `batches[key]` for each key, in order, on the CPU. Close the iterator to stop the workers.

    Args:
        batches: dataset that returns the batch of a key; runs in the workers.
        keys: the keys; iterated in this process.
        num_workers: number of worker processes; 0 loads the batches in this process.

    Raises:
        ValueError: the error that `batches` raises, without the traceback of the worker.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        yield from loader
        return
    except ValueError as error:  # in a worker, the traceback precedes the message
        problem = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        error.__traceback__ = None  # it references the loader and would keep its workers alive
    raise ValueError(problem)


def leave_signals_to_parent(worker: int) -> None:
    """Make a DataLoader worker ignore signals that were sent to all processes; used as `worker_init_fn`.

    Otherwise the workers would stop before the training step that waits for their images. SIGTERM from the training
    process still stops a worker, but is lost while a SIGTERM from another process is pending. To stop the workers
    without a signal, close the iterator of the loader.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in the thread below as well
        threading.Thread(target=wait_for_parents_signal, daemon=True).start()


def wait_for_parents_signal() -> None:
    """End this process at a SIGTERM from its parent; a SIGTERM from another process is ignored."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
