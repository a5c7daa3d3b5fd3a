"""Reset Accelerate, which keeps its settings in singletons."""

from accelerate.test_utils.testing import AccelerateTestCase


def reset_accelerate() -> None:
    """Reset Accelerate to the state of a process without an `Accelerator`."""
    AccelerateTestCase().tearDown()
