"""Signals that stop a run after a checkpoint: Ctrl-C, SIGTERM, SIGHUP and SIGUSR1."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import torch
from accelerate import PartialState
from torch import distributed


# Environment variables that accelerate and torchrun set
LAUNCHER_ENVIRONMENT_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
# Maximum delay in seconds between a signal and the same signal forwarded by a launcher.
MAX_FORWARDING_SECONDS = 1.0
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGUSR1"):  # Windows lacks it
    # A terminal that is closed sends SIGHUP.
    STOP_SIGNALS += [signal.SIGUSR1, signal.SIGHUP]


class SignalHandler:
    """Context manager that stores the first Ctrl-C, SIGTERM, SIGHUP or SIGUSR1.

    After any of them, Ctrl-C raises KeyboardInterrupt. If one of the others is repeated, it ends the
    process. Neither saves a checkpoint.

    Clusters send SIGTERM, or SIGUSR1 (`sbatch --signal=USR1@120`), some time before the machine is
    stopped. The launcher determines which processes receive a signal:

        python                    the process itself
        accelerate, 1 process     Ctrl-C: the launcher and the process; the shell prompt appears before the checkpoint
                                  is saved. SIGTERM: often only the launcher, which ends; `get_signal` detects that
                                  the parent process has changed
        accelerate, N processes   torchrun's agent forwards both signals to all processes, including DataLoader
                                  workers, and kills the processes after 30 s

    The launcher may exit with another status than the run (128 plus the signal's number):
    torchrun's agent exits with 1 after any signal. Signal handlers are installed only in the main
    thread, because Python does not allow other threads to install handlers. Signals that are
    already ignored, for example Ctrl-C in background jobs of a shell, remain ignored.
    """

    def __init__(self) -> None:
        # When each signal was received first, in this order
        self.signal_times: dict[int, float] = {}
        self.old_handlers: dict[int, Any] = {}
        is_launched = any(name in os.environ for name in LAUNCHER_ENVIRONMENT_VARIABLES)
        self.parent_pid = os.getppid() if is_launched else None
        # A process group for CPU tensors avoids synchronization with the device.
        self.process_group: Any = (
            distributed.new_group(backend="gloo") if PartialState().num_processes > 1 else None
        )

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                old_handler = signal.getsignal(signum)
                # None: the handler was not installed from Python
                if old_handler not in (signal.SIG_IGN, None):
                    self.old_handlers[signum] = old_handler
                    signal.signal(signum, self.handle_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.old_handlers.items():
            signal.signal(signum, handler)

    def handle_signal(self, signum: int, frame: FrameType | None) -> None:
        """Store the first signal. A repeated signal, or a later Ctrl-C, acts as without the handler."""
        now = time.monotonic()
        first_time = self.signal_times.setdefault(signum, now)
        if signum == signal.SIGINT:
            first_time = min(self.signal_times.values())
        # A launcher may send its own copy of a signal within moments; only a person or a cluster
        # that waits and repeats it means it.
        if now - first_time > MAX_FORWARDING_SECONDS:
            signal.signal(signum, self.old_handlers[signum])
            signal.raise_signal(signum)

    def get_signal(self) -> str | None:
        """Name the stop signal that was received; None if there was none.

        The result is the same on all processes. This method must be called on all processes.
        """
        # Accelerate may end on SIGTERM without forwarding it. Then this process has a new parent.
        if self.parent_pid not in (None, os.getppid()):
            self.signal_times.setdefault(signal.SIGTERM, time.monotonic())
        signum = int(next(iter(self.signal_times), 0))
        if self.process_group is not None:
            # The maximum over the processes: they must stop after the same step, or the rest would
            # wait in the next one for those that have stopped.
            max_signum = torch.tensor(signum)
            distributed.all_reduce(
                max_signum, op=distributed.ReduceOp.MAX, group=self.process_group
            )
            signum = int(max_signum)
        return signal.Signals(signum).name if signum else None
