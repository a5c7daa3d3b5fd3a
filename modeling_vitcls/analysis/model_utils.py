"""What a model is, whatever it is wrapped in: torch.compile, PEFT, or the wrappers of several processes.

plain_model(model)      the ViTCLS model inside
is_classifier(model)    whether it answers with labels
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


# By name, and not the classes themselves: a model that was loaded with the code of its repository has classes of its
# own, which are called the same.
CLASSIFIERS = {"ViTCLSForImageClassification", "ViTCLSForMultiTaskClassification"}


def plain_model(model: Any) -> Any:
    """The ViTCLS model inside of wrappers. What PEFT put into its layers stays there and takes part."""
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
    """Whether a model, or one made from it by inheritance, answers with labels: no encoder, and no regression."""
    plain = plain_model(model)
    config = plain.config
    has_head = any(kind.__name__ in CLASSIFIERS for kind in type(plain).__mro__)
    return has_head and bool(config.tasks or config.num_labels) and config.problem_type != "regression"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without dropout; afterwards each part of it as it was (frozen ones may differ)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
