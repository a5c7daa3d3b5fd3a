"""The model to train, and the image processor that goes with it, for a given set of labels."""

import copy
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import SizeDict

from ..configuration_vitcls import PRESETS, ViTCLSConfig
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from .options import ModelOptions


def build_model(
    options: ModelOptions, label_names: list[str]
) -> tuple[ViTCLSForImageClassification, ViTCLSImageProcessor]:
    """A preset with fresh weights, or a checkpoint; its classifier is kept only where it has these very labels.

    Raises:
        ValueError: for values that contradict each other, or a checkpoint of another kind of model.
        OSError: for a checkpoint that cannot be found or read.
    """
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }
    if options.model.removeprefix("vitcls-") in PRESETS:
        model = ViTCLSForImageClassification(
            ViTCLSConfig.from_preset(options.model, **options.config_values(), **labels)
        )
        processor = ViTCLSImageProcessor()
    else:
        check_is_vitcls(options.model)
        model = load_for_labels(options.model, options.config_values(), labels)
        processor = ViTCLSImageProcessor.from_pretrained(options.model)
    if (mask_token := model.vitcls.embeddings.mask_token) is not None:
        mask_token.requires_grad_(False)  # of masked pre-training; several processes wait for gradients of all others
    fit_processor(processor, model.config)
    return model, processor


def load_for_labels(source: str, values: dict[str, Any], labels: dict[str, Any]) -> ViTCLSForImageClassification:
    """A checkpoint's encoder with a fresh classifier for `labels`, or with its own where it has the same labels."""
    if ViTCLSConfig.from_pretrained(source).id2label == labels["id2label"]:
        return ViTCLSForImageClassification.from_pretrained(source, dtype=torch.float32, **values)
    encoder = ViTCLSModel.from_pretrained(source, dtype=torch.float32, **values)
    config = copy.deepcopy(encoder.config)
    config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    model = ViTCLSForImageClassification(config)
    model.vitcls.load_state_dict(encoder.state_dict())
    return model


def check_is_vitcls(source: str) -> None:
    """Raise ValueError for another kind of model than ours."""
    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type", "no known")
    if model_type != ViTCLSConfig.model_type:
        raise ValueError(
            f"{source} holds a model of type {model_type!r}: give a {ViTCLSConfig.model_type!r} checkpoint, or one of "
            f"the presets {', '.join(f'vitcls-{name}' for name in PRESETS)}"
        )


def fit_processor(processor: Any, config: ViTCLSConfig) -> None:
    """Make an image processor produce images of the size that the model was built for, where it does not yet."""
    height, width = config.image_height_width
    output = processor.crop_size if processor.do_center_crop else processor.size
    if (output.height, output.width) != (height, width):
        processor.size = SizeDict(height=height, width=width)
        processor.do_center_crop = False
