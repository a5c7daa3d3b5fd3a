"""Reset Accelerate, which keeps its settings in singletons."""

from accelerate.state import AcceleratorState, GradientState


def reset_accelerate() -> None:
    """Reset the state of Accelerate to the state of a process without an `Accelerator`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
