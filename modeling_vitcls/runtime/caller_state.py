"""What a library call must not take from its caller, or leave to it: torch's defaults, random numbers."""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def own_state() -> Iterator[None]:
    """Run the block with torch's defaults, then restore the caller's defaults and random state.

    The defaults are the dtype, the device and the gradient mode of new tensors. The random state is
    that of torch, NumPy and Python.
    """
    import numpy as np
    import torch

    default_dtype = torch.get_default_dtype()
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()

    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(gpus))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default_dtype)
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def with_own_state(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a function that runs in `own_state`."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with own_state():
            return function(*args, **kwargs)

    return call
