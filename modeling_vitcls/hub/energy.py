"""An estimate of the energy that a run took: assumed or known watts of its devices x time. Nothing is measured here.

GPU     the power limit of the board, as its driver reports it
CPU     `WATTS_PER_CPU_THREAD` for each thread
others  no estimate
"""

import subprocess
from typing import Any

import torch


WATTS_PER_CPU_THREAD = 10.0  # server processors: 100 to 300 W over 16 to 64 cores, with memory and power supply
JOULES_PER_KILOWATT_HOUR = 3.6e6
NVIDIA_SMI_SECONDS = 10.0  # to answer


def energy_estimate(seconds: float, num_processes: int, device: torch.device) -> dict[str, Any] | None:
    """Kilowatt-hours of all processes, and what that number rests on; None where nothing is known of the device.

    Args:
        seconds: that the run took.
        num_processes: each on a device like this one.
        device: of this process.

    Returns:
        "kilowatt_hours", "watts_per_process", and "assumption" in words, without which no number should be shown.
    """
    if device.type == "cuda":
        watts, assumption = power_limit(device), "each GPU drew the power limit of its board"
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        watts = threads * WATTS_PER_CPU_THREAD
        assumption = f"{threads} thread(s) per process drew {WATTS_PER_CPU_THREAD:.0f} W each"
    else:
        return None
    if watts is None:
        return None
    return {
        "kilowatt_hours": float(f"{watts * num_processes * seconds / JOULES_PER_KILOWATT_HOUR:.3g}"),
        "watts_per_process": watts,
        "assumption": f"{assumption} all the time; the rest of the machine is not counted",
    }


def power_limit(device: torch.device) -> float | None:
    """Watts that a GPU may draw, as `nvidia-smi` says; None where it is not there or does not say."""
    board = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={board}", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
        return float(ran.stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
