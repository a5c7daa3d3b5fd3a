"""Batches from DataLoader's workers, whose errors come through in one line. What is in a batch is not decided here."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def from_workers(batches: Dataset, keys: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """`batches[key]` of each key, in order, on the CPU. Close the iterator to end the workers.

    Args:
        batches: key -> batch; asked in the workers.
        keys: asked for in this process.
        num_workers: processes besides this one; 0 for none.

    Raises:
        ValueError: what `batches` raises, without the worker's traceback.
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
    except ValueError as error:  # of a worker: its traceback precedes the message
        problem = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        error.__traceback__ = None  # it holds the loader, whose workers shall end now
    raise ValueError(problem)


def leave_signals_to_parent(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: signals sent to all processes must not end the workers before the step that
    waits for their pictures. SIGTERM from the training process itself still does, but is lost while another's waits to
    be noticed: close a loader's iterator, and its workers end without one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in the thread below as well
        threading.Thread(target=wait_for_parents_signal, daemon=True).start()


def wait_for_parents_signal() -> None:
    """End this process at a SIGTERM from its parent; those from others have no effect."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
