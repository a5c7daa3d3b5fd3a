"""How much memory work needs: by how much a process grows at most while it does it, from /proc, so Linux alone.

On a GPU, PyTorch's allocator says it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .comparison import last_words


# What is freed goes back to the system at once, for all from 64 KiB. So memory that is in use is measured, rather than
# what the C library keeps for later, which depends on the order in which sizes come.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


def peak_in_a_process(module: str, *arguments: str) -> int:
    """Bytes that a module of this package prints when it is run, in a fresh process, to measure its `growth`.

    Raises:
        ValueError: if that process fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVE_BACK)
    if done.returncode:
        raise ValueError(f"the memory of {' '.join(arguments)} cannot be measured: {last_words(done.stderr)}")
    return int(done.stdout.strip().splitlines()[-1])


def growth(warm_up: Callable[[], object], work: Callable[[], object]) -> int:
    """Bytes by which this process grows at most during `work`; what stays after `warm_up` does not count."""
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = status("VmRSS")
    work()
    return max(status("VmHWM") - before, 0)


def growth_on_gpu(work: Callable[[], object]) -> int:
    """Bytes that `work` needs at most on the current GPU beyond what is there before; run it before, to warm up."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def status(name: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
