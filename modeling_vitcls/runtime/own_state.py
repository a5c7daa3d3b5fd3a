"""What a function of Python takes from its caller: nothing of torch's defaults and random numbers."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def own_state() -> Iterator[None]:
    """Compute with torch's defaults, then restore the caller's defaults and random state.

    The defaults are the dtype, the device and the gradient mode of new tensors, and Pillow's largest
    image. The random state includes
    torch, NumPy and Python. No context manager of accelerate or transformers does this.
    """
    import numpy as np
    import torch
    from PIL import Image

    # A notebook continues after an error, so errors undo all of this as well.
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        # a device of its own makes new tensors slower, so it is set only to replace another
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Does not start CUDA in a process that does not use it
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(gpus))
        torch.set_default_dtype(torch.float32)
        yield
