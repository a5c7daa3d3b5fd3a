"""What is exported: a model, its image processor, and its answers by name.

ViTCLSModel                         last_hidden_state, pooler_output
ViTCLSForImageClassification        logits; with a second head cls_logits and distillation_logits
ViTCLSForMultiTaskClassification    one answer per task, named by it
ViTCLSBackbone                      feature maps, named by their stages
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adaptation_vitcls import check_folder, load_checkpoint
from ..configuration_vitcls import ViTCLSConfig
from ..hub.loading import get_model_folder
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.load_model import check_is_vitcls, is_preset
from ..modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
    ViTCLSPreTrainedModel,
)
from ..training.model import fit_processor


INPUT = "pixel_values"

Answers = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Exportable:
    """A model in float32 and eval mode, with what belongs to it.

    Attributes:
        processor: None where there is none beside the weights.
        is_trained: False for a preset, whose weights are random.
    """

    model: ViTCLSPreTrainedModel
    processor: ViTCLSImageProcessor | None
    is_trained: bool


class NamedAnswers(nn.Module):
    """A model that takes images alone and gives its answers by name, in float32."""

    def __init__(self, model: ViTCLSPreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.read = READERS[type(model)]

    def forward(self, pixel_values: torch.Tensor) -> Answers:
        """[B, C, H, W] -> answers, [B, ...] each."""
        answers = self.read(self.model(pixel_values), self.model)
        return {name: answer.float() for name, answer in answers.items() if answer is not None}


def encoded(outputs: Any, model: Any) -> dict[str, torch.Tensor | None]:
    """The sequence [B, N, D], and what a head would read [B, P] where there is a pooler."""
    return {"last_hidden_state": outputs.last_hidden_state, "pooler_output": outputs.pooler_output}


def classified(outputs: Any, model: Any) -> dict[str, torch.Tensor | None]:
    """The logits [B, labels], and those of each head where there are two."""
    if outputs.distillation_logits is None:
        return {"logits": outputs.logits}
    return {name: outputs[name] for name in ("logits", "cls_logits", "distillation_logits")}


def classified_per_task(outputs: Any, model: Any) -> dict[str, torch.Tensor | None]:
    """The logits [B, labels] of each task."""
    return outputs.logits


def mapped(outputs: Any, model: Any) -> dict[str, torch.Tensor | None]:
    """The feature maps [B, D, rows, columns] of `config.out_features`."""
    return dict(zip(model.out_features, outputs.feature_maps, strict=True))


READERS: dict[type, Callable[[Any, Any], dict[str, torch.Tensor | None]]] = {
    ViTCLSModel: encoded,
    ViTCLSForImageClassification: classified,
    ViTCLSForMultiTaskClassification: classified_per_task,
    ViTCLSBackbone: mapped,
}
CLASSES: dict[str, Any] = {model_class.__name__: model_class for model_class in READERS}


def load_exportable(source: str) -> Exportable:
    """A folder, a model of the Hub, or a preset, which gets random weights.

    Raises:
        ValueError: for another kind of model, one of ours that has no exported form, or one that lacks weights.
        OSError: for a checkpoint that cannot be found or read.
    """
    if is_preset(source):
        model: ViTCLSPreTrainedModel = ViTCLSForImageClassification(ViTCLSConfig.from_preset(source))
        processor = ViTCLSImageProcessor()
        fit_processor(processor, model.config)
        return Exportable(model.eval(), processor, is_trained=False)
    folder = get_model_folder(source)
    check_folder(folder, config_is_elsewhere=False)
    check_is_vitcls(source, folder)
    config = load_checkpoint(ViTCLSConfig.from_pretrained, folder)
    saved = (config.architectures or ["model of no known class"])[0]
    if saved not in CLASSES:
        raise ValueError(f"{source} holds a {saved}, which is not exported: give one of {', '.join(CLASSES)}")
    model = load_whole(CLASSES[saved], source, folder)
    if INPUT in config.task_labels():
        raise ValueError(f"a task of {source} is called {INPUT}, as the graph's input is: rename the task")
    try:
        return Exportable(model, ViTCLSImageProcessor.from_pretrained(folder), is_trained=True)
    except OSError:
        return Exportable(model, None, is_trained=True)


def load_whole(model_class: Any, source: str, folder: str) -> ViTCLSPreTrainedModel:
    """The model in float32; without its pooler if that was not saved.

    Raises:
        ValueError: if other weights are missing.
    """
    keywords: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    model, found = load_checkpoint(model_class.from_pretrained, folder, **keywords)
    missing = sorted(found["missing_keys"])
    if missing and model_class is ViTCLSModel and all(name.startswith("pooler.") for name in missing):
        model, found = load_checkpoint(model_class.from_pretrained, folder, add_pooling_layer=False, **keywords)
        missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"the checkpoint {source} lacks {missing[0]}: train it first")
    return model.eval()
