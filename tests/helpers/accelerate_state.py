"""What tests of training share: Accelerate's settings, which it keeps in singletons, forgotten."""

from accelerate.state import AcceleratorState, GradientState


def reset_accelerate() -> None:
    """As in a process that has not made an `Accelerator` yet."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
