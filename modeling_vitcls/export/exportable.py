"""Load a model and its image processor for export, and return the outputs of the model by name.

ViTCLSModel                         last_hidden_state, pooler_output
ViTCLSForImageClassification        logits; if there are two heads, also cls_logits and distillation_logits
ViTCLSForMultiTaskClassification    one output per task, named after the task
both classifiers                    then one output per extra head, named after its task, and
                                    distance (to the nearest class), if the model has class statistics
ViTCLSBackbone                      feature maps, named after their stages
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..conversion.open_model import is_preset, open_model
from ..hub.model_folder import ModelFolder
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
    ViTCLSPreTrainedModel,
)


Outputs = dict[str, torch.Tensor]


EXPORTABLE_CLASSES = (
    ViTCLSModel,
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSBackbone,
)


class NamedOutputsModel(nn.Module):
    """Model wrapper that takes only images as input and returns a dict of float32 outputs."""

    def __init__(self, model: ViTCLSPreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixel_values: torch.Tensor) -> Outputs:
        """Compute the outputs [B, ...] for images [B, C, H, W], by name."""
        outputs: Any = self.model(pixel_values)
        named: Outputs = {}
        for name, value in outputs.items():
            if name == "feature_maps":
                named |= zip(self.model.out_features, value, strict=True)
            elif isinstance(value, dict):  # Task -> logits
                named |= value
            # With one head, the logits belong to CLS.
            elif name != "cls_logits" or outputs.distillation_logits is not None:
                named[name] = value
        # All graphs have float32 outputs, so the program that runs one needs no knowledge of its
        # dtype.
        return {name: output.float() for name, output in named.items()}


class Exportable(NamedTuple):
    """A model to export, in float32 and evaluation mode."""

    model: ViTCLSPreTrainedModel
    processor: ViTCLSImageProcessor | None  # None if the checkpoint has none
    folder: ModelFolder | None  # None for a preset, which has random weights


def load_exportable_model(source: str) -> Exportable:
    """Load any checkpoint that `model` may name, or a preset with random weights.

    Raises:
        ValueError: If the checkpoint is not a ViTCLS model, if its class is not supported, or if
            weights are missing.
        OSError: If the checkpoint cannot be found or read.
    """
    if is_preset(source):
        preset = ViTCLSForImageClassification(ViTCLSConfig.from_preset(source))
        return Exportable(preset.eval(), None, None)
    folder = open_model(source)
    class_name = (folder.config.architectures or ["an unknown class"])[0]
    classes: dict[str, Any] = {each.__name__: each for each in EXPORTABLE_CLASSES}
    if class_name not in classes:
        raise ValueError(
            f"export requires one of {', '.join(classes)}, but {source} contains {class_name}. Set "
            "`model` to a model of a supported class"
        )
    model = folder.load(classes[class_name], dtype=torch.float32)
    processor = folder.load_processor() if folder.has_processor else None
    return Exportable(model.eval(), processor, folder)
