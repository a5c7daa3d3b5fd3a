"""Helpers for models, which may be wrapped by torch.compile, PEFT or distributed training.

The functions that a user calls unwrap the model; all other functions of the analysis take a plain
model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn


# Classes are compared by name, because a model loaded with the code of a Hub repository has
# different class objects with the same names.
CLASSIFIER_CLASS_NAMES = {"ViTCLSForImageClassification", "ViTCLSForMultiTaskClassification"}


def unwrap_model(model: Any) -> Any:
    """Find the ViTCLS model inside any wrappers; layers that PEFT inserted stay active."""
    module: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return unwrap_model(module.get_base_model()) if hasattr(module, "get_base_model") else module


def is_classifier(model: Any) -> bool:
    """Whether a model is a classifier (including subclasses).

    Regression models are not classifiers.
    """
    config = model.config
    has_head = any(base.__name__ in CLASSIFIER_CLASS_NAMES for base in type(model).__mro__)
    return (
        has_head and bool(config.tasks or config.num_labels) and config.problem_type != "regression"
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode inside the block, and then restore the mode of each module.

    Some modules, such as frozen modules, may be in evaluation mode during training.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
