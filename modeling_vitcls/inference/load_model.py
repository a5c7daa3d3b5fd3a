"""Load a saved model for evaluation or prediction, and check that it is a vitcls checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from ..adaptation_vitcls import load_checkpoint
from ..configuration_vitcls import PRESETS, ViTCLSConfig
from ..hub.loading import get_model_folder
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification, ViTCLSModel


Classifier = ViTCLSForImageClassification | ViTCLSForMultiTaskClassification
CLASSES: dict[str, type[Classifier]] = {
    "single_label_classification": ViTCLSForImageClassification,
    "multi_label_classification": ViTCLSForImageClassification,
    "multi_task": ViTCLSForMultiTaskClassification,
}


def is_preset(name: str) -> bool:
    """Return whether `--model` names a preset, which has random weights."""
    return name.removeprefix("vitcls-") in PRESETS


def check_is_vitcls(source: str, folder: str) -> None:
    """Raise ValueError if a model is not a vitcls model. `source` is the name that the user wrote."""
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type", "no known")
    if model_type != ViTCLSConfig.model_type:
        raise ValueError(
            f"{source} holds a model of type {model_type!r}: give a {ViTCLSConfig.model_type!r} checkpoint, or one of "
            f"the presets {list_presets()}"
        )


def load_model(source: str, with_head: bool) -> tuple[PreTrainedModel, ViTCLSImageProcessor]:
    """Load a vitcls checkpoint, with or without its classifier, and its image processor.

    Raises:
        ValueError: if the checkpoint is not a vitcls model, or lacks trained weights.
        OSError: if the checkpoint cannot be found or read.
    """
    if is_preset(source):
        raise ValueError(
            f"{source} is a preset without trained weights: set --model to a folder or a model on the Hub"
        )
    folder = get_model_folder(source)
    settings = load_checkpoint(PreTrainedConfig.get_config_dict, folder)[0]
    if (model_type := settings.get("model_type", "no known")) != ViTCLSConfig.model_type:
        raise ValueError(
            f"{source} holds a model of type {model_type!r}: give a {ViTCLSConfig.model_type!r} checkpoint "
            "(scripts/convert.py makes one of many others)"
        )
    model_class: Any = ViTCLSModel
    keywords = {"add_pooling_layer": False}
    if with_head:
        check_has_labels(source, settings)
        model_class = ViTCLSForMultiTaskClassification if settings.get("tasks") else ViTCLSForImageClassification
        keywords = {}
    with without_warnings():  # missing weights raise an error below; an unused classifier is not an error
        model, loading = model_class.from_pretrained(folder, output_loading_info=True, **keywords)
    if loading["missing_keys"]:
        raise ValueError(f"the checkpoint {source} lacks {min(loading['missing_keys'])}: train it first")
    return model, load_checkpoint(ViTCLSImageProcessor.from_pretrained, folder)


def check_has_labels(source: str, settings: dict[str, Any]) -> None:
    """Raise ValueError if the config of a checkpoint lists an architecture without a classifier."""
    names = settings.get("architectures") or []
    if names and not any(name.endswith("Classification") for name in names):
        raise ValueError(
            f"{source} holds a {names[0]}, which has no labels to predict: fine-tune it first, or set --features"
        )


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence the report that transformers prints about weights."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def list_presets() -> str:
    """Return the names of all presets as `--model` accepts them."""
    return ", ".join(f"vitcls-{name}" for name in PRESETS)
