"""Handling of Ctrl-C and SIGTERM: the training loop checks for a signal after each step.

    with Interruption(accelerator) as interruption:
        ...one step...
        if interruption.get_signal(): save a checkpoint, and exit with interruption.exit_status

Clusters send SIGTERM some time before they stop a machine. The launcher determines which processes receive a signal:

    python                    the process itself
    accelerate, 1 process     SIGTERM: often only the launcher, which ends; `get_signal` then detects that the parent
                              process has changed. Ctrl-C: both; the shell's prompt appears before the checkpoint is
                              saved
    accelerate, N processes   torchrun's agent forwards both to all processes, including DataLoader workers, and kills
                              the processes after 30 s

The launcher's exit status may differ from the exit status of this process: torchrun's agent exits with 1 after any
signal.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import distributed


SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # variables that accelerate and torchrun set
ECHO_SECONDS = 1.0  # time in seconds in which a launcher may forward a Ctrl-C that the terminal has already sent


class Interruption:
    """Context manager that stores the first signal. A second Ctrl-C raises KeyboardInterrupt.

    It stores no signals outside of the main thread, where Python does not allow signal handlers. Ignored signals (a
    shell's background jobs ignore Ctrl-C) stay ignored.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        self.old_handlers: dict[signal.Signals, Any] = {}
        self.parent = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None
        # A group on the CPU avoids synchronization with the device.
        self.group: Any = distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.agreed: signal.Signals | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                old = signal.getsignal(number)
                if old not in (signal.SIG_IGN, None):  # None: set by something other than Python
                    self.old_handlers[number] = old
                    signal.signal(number, self.handle_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        self.old_handlers.clear()

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.received_at > ECHO_SECONDS:
            raise KeyboardInterrupt

    def get_signal(self) -> str | None:
        """Return the name of the received stop signal, or None; the result is the same on all processes. All processes
        must call it together."""
        if self.received is None and self.parent not in (None, os.getppid()):
            self.received = signal.SIGTERM
        number = int(self.received or 0)
        if self.group is not None:
            largest = torch.tensor(number)
            distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=self.group)
            number = int(largest)
        self.agreed = signal.Signals(number) if number else None
        return self.agreed.name if self.agreed else None

    @property
    def exit_status(self) -> int:
        """Return the exit status: 130 after Ctrl-C, 143 after SIGTERM, 0 without a signal."""
        return 128 + self.agreed if self.agreed else 0
