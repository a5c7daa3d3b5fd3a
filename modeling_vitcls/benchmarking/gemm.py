"""How many operations a second a machine does at best, in the one kind of work that a ViT mostly is: matrix products.

    gemm_peak(torch.device("cuda"), torch.bfloat16)      # FLOP/s, a multiply-add counting as two

What a model reaches, as a part of it, is its utilisation. Measured, not read from a data sheet: the machine as it is,
with its number of threads, its clock and whatever else runs on it.
"""

import time
from collections.abc import Callable

import torch
from torch import nn


SECONDS = 0.25  # of measuring, for each way to multiply
FEWEST_TURNS = 3

# Side of the square matrices: large enough to keep the device busy, small enough for several turns.
SIDES = {"cpu": 1024, "cuda": 8192}
DEFAULT_SIDE = 4096


@torch.no_grad()
def gemm_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of large matrix products: the fastest of many repetitions, in the fastest implementation.

    The measurement takes about half a second. On CPUs oneDNN is tried in addition to PyTorch's own choice, which may
    be half as fast. The result is a lower bound: other programs that run at the same time can only lower it.
    """
    device = torch.device(device)
    side = SIDES.get(device.type, DEFAULT_SIDE)
    generator = torch.Generator(device)  # training continues with the random numbers that it would have had
    first, second = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    ways: list[Callable[[], torch.Tensor]] = [lambda: nn.functional.linear(first, second)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16):
        packed_first, packed_second = first.to_mkldnn(), second.to_mkldnn()
        ways.append(lambda: nn.functional.linear(packed_first, packed_second))
    return 2 * side**3 / min(fewest_seconds(multiply, device) for multiply in ways)


def fewest_seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Return the seconds of the fastest call, after a first call that does not count."""
    work()
    turns: list[float] = []
    wait_for(device)
    started = time.perf_counter()
    while len(turns) < FEWEST_TURNS or time.perf_counter() - started < SECONDS:
        before = time.perf_counter()
        work()
        wait_for(device)
        turns.append(time.perf_counter() - before)
    return min(turns)


def wait_for(device: torch.device) -> None:
    """Until everything that was asked of it is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
