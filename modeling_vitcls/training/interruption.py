"""Being asked to stop: Ctrl-C and SIGTERM become a question that the training loop asks after each step.

    with Interruption(accelerator) as interruption:
        ...one step...
        if interruption.requested(): save a checkpoint, and end with interruption.exit_status

Clusters send SIGTERM some time before they take a machine away. Who receives a signal depends on the launcher:

    python                    the process itself
    accelerate, 1 process     SIGTERM: often the launcher alone, which dies of it; `requested` sees that the parent is
                              gone. Ctrl-C: both; the shell's prompt is back before the checkpoint is saved
    accelerate, N processes   torchrun's agent passes both on to all, DataLoader workers too, waits 30 s for them, then
                              kills

Our exit status is the launcher's only where it survives: torchrun's agent exits with 1 after any signal.
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
ECHO_SECONDS = 1.0  # a launcher may pass on a Ctrl-C that the terminal has already sent


class Interruption:
    """Context manager: the first signal is noted, a second Ctrl-C raises KeyboardInterrupt at once.

    Outside of the main thread, where Python allows no signal handlers, it notes nothing. A signal that is ignored
    (a shell's background jobs ignore Ctrl-C) stays ignored.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        self.old_handlers: dict[signal.Signals, Any] = {}
        self.parent = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None
        # On the CPU, so that asking does not make the CPU wait for the device.
        self.group: Any = distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.agreed: signal.Signals | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                old = signal.getsignal(number)
                if old not in (signal.SIG_IGN, None):  # None: set by something other than Python
                    self.old_handlers[number] = old
                    signal.signal(number, self.note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        self.old_handlers.clear()

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.received_at > ECHO_SECONDS:
            raise KeyboardInterrupt

    def requested(self) -> str | None:
        """Name of the signal that asks to stop, or None. The same on all processes: all have to ask together."""
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
        """What a program that a signal ended exits with: 130 after Ctrl-C, 143 after SIGTERM. 0 without a signal."""
        return 128 + self.agreed if self.agreed else 0
