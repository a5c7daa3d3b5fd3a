"""Helpers for models that may be wrapped by torch.compile, PEFT, DataParallel or DistributedDataParallel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


# Classes are compared by name, because a model loaded with the code of a Hub repository has different class objects
# with the same names.
CLASSIFIER_CLASS_NAMES = {"ViTCLSForImageClassification", "ViTCLSForMultiTaskClassification"}


def unwrap_model(model: Any) -> Any:
    """Return the ViTCLS model inside any wrappers. Adapter layers that PEFT inserted stay active."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def is_classifier(model: Any) -> bool:
    """Return whether a model is a classifier (including subclasses). Regression models are not classifiers."""
    unwrapped_model = unwrap_model(model)
    config = unwrapped_model.config
    has_head = any(base.__name__ in CLASSIFIER_CLASS_NAMES for base in type(unwrapped_model).__mro__)
    return has_head and bool(config.tasks or config.num_labels) and config.problem_type != "regression"


def get_classifier_or_encoder(model: Any) -> Any:
    """Return an unwrapped classifier unchanged, and the encoder of any other unwrapped model."""
    return model if is_classifier(model) else model.base_model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode inside the block, and then restore the mode of each module. Some modules, such
    as frozen modules, may be in evaluation mode during training."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
