"""The model folder: what `from_pretrained` loads, from a model in training and its gathered weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..image_processing_vitcls import ViTCLSImageProcessor
from .checkpoints import Tensors
from .trainable import merged_weights


def write_model(model: PreTrainedModel, processor: ViTCLSImageProcessor, folder: Path, weights: Tensors) -> None:
    """Write weights, configuration, code and image processor. Call it on the main process.

    Args:
        model: the plain model, which may be sharded.
        weights: all of its tensors, whole, by name; LoRA's additions are merged into what is written.
    """
    with plain_class(model):
        model.save_pretrained(folder, state_dict=merged_weights(weights))
    processor.save_pretrained(folder)


@contextmanager
def plain_class(model: PreTrainedModel) -> Iterator[None]:
    """The model is of its own class inside this block.

    FSDP2 gives it a class of PyTorch's, and Transformers would then save PyTorch's files as the model's code.
    """
    wrapped = type(model)
    plain: Any = next(kind for kind in wrapped.__mro__ if not issubclass(kind, FSDPModule))
    model.__class__ = plain
    try:
        yield
    finally:
        model.__class__ = wrapped
