"""Models of transformers -> ours, with the same numbers.

    model = convert_from_transformers(AutoModel.from_pretrained("facebook/dinov2-base"))
    model = convert_from_transformers(model, num_labels=10)                       # and a new classifier on it
    model = convert_from_transformers(classifier, classifier="new", num_labels=10)

This file lists the classes; how a family's names and configuration become ours is in transformers_families.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_vitcls import ViTCLSConfig
from ..modeling_vitcls import ViTCLSPreTrainedModel
from .head_transfer import ClassifierChoice, assemble
from .transformers_families import (
    AIMV2,
    BEIT,
    CLIP,
    DATA2VEC,
    DEIT,
    DINOV2,
    DINOV2_WITH_REGISTERS,
    DINOV3,
    IJEPA,
    PIXIO,
    RADIO,
    SIGLIP,
    SIGLIP2,
    VIT,
    Family,
    Weights,
)
from .weight_rules import ConversionError, Rule, convert_weights


def convert_from_transformers(
    model: PreTrainedModel, *, classifier: ClassifierChoice = "keep", num_labels: int | None = None
) -> ViTCLSPreTrainedModel:
    """Take over a ViT of transformers: same outputs, same dtype and device, in eval mode; the source stays as it is.

    A classifier becomes `ViTCLSForImageClassification`, with its labels; an image embedding model (CLIP with
    projection) too, its logits being the embeddings; any other model `ViTCLSModel`. Where transformers has no class
    with a classifier (DINOv3, MAE, Pixio, AIMv2, RADIO), `num_labels` gives one on the exact encoder.

    Images of other sizes are taken as the source takes them with its `interpolate_pos_encoding`. Two things differ in
    form: MAE's encoder sees all patches, in order, and RADIO's `image_size` is its largest, the size of its positions.

    Args:
        classifier: "keep" the source's, start a "new" one, or "drop" it (`ViTCLSModel`).
        num_labels: of a new classifier. It reads what the source pools, or else the CLS token, or the patches' mean.

    Raises:
        ConversionError: for a class or a feature that is not supported, weights that are missing or unexpected (they
            are listed), or a choice of classifier that does not fit the source.
    """
    source = source_of(model)
    weights, head = split_head(model.state_dict(), source.encoder)
    settings = source.family.settings(getattr(model.config, "vision_config", model.config), weights)
    config = ViTCLSConfig(**settings | dict(source.settings) | source.labels(model.config))
    rules = [*(Rule(name, []) for name in source.unused), *source.family.rules]
    encoder_weights = convert_weights(source.family.prepare(weights), rules, config)
    head_weights = None if source.encoder is None else convert_weights(head, HEAD_RULES, config)
    return assemble(config, encoder_weights, head_weights, classifier, num_labels)


def classifier_labels(config: Any) -> dict[str, Any]:
    """Number and names of the source's labels."""
    labels = {"id2label": config.id2label, "label2id": config.label2id, "problem_type": config.problem_type}
    return {name: value for name, value in labels.items() if value is not None}


def embedding_width(config: Any) -> dict[str, Any]:
    """An image embedding counts as so many labels."""
    return {"num_labels": config.projection_dim}


@dataclass(frozen=True)
class Source:
    """A class of transformers.

    Attributes:
        encoder: the attribute that holds the encoder, None if the class is the encoder.
        settings: fields of `ViTCLSConfig` that the class decides.
        unused: weights of the encoder that this class leaves unused.
    """

    family: Family
    encoder: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    labels: Callable[[Any], dict[str, Any]] = classifier_labels


def source_of(model: PreTrainedModel) -> Source:
    """How to convert a model of this class.

    Raises:
        ConversionError: if it is none of `SOURCES`; names a part that can be converted, if there is one.
    """
    if is_known(model):
        return SOURCES[type(model).__name__]
    parts = [name for name, part in model.named_children() if is_known(part)]
    families = sorted({re.split("(Vision)?(Model|For)", name)[0] for name in SOURCES})
    hint = f"convert its .{parts[0]}" if parts else f"the classes that can be are those of {', '.join(families)}"
    raise ConversionError(f"{type(model).__name__} cannot be converted: {hint}")


def is_known(module: torch.nn.Module) -> bool:
    """Whether it is transformers' own class of a name in `SOURCES`, no subclass."""
    return type(module).__name__ in SOURCES and type(module).__module__.startswith("transformers.")


def split_head(weights: Weights, encoder: str | None) -> tuple[Weights, Weights]:
    """The encoder's weights, by their names within it, and the others."""
    if encoder is None:
        return weights, {}
    prefix = f"{encoder}."
    inside = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    return inside, {name: weight for name, weight in weights.items() if not name.startswith(prefix)}


def with_zero_bias(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """A projection without bias -> its weight and a bias of zeros."""
    return [tensor, tensor.new_zeros(len(tensor))]


HEAD_RULES = [
    Rule("classifier.{rest}", "classifier.{rest}"),
    Rule("cls_classifier.{rest}", "classifier.{rest}"),
    Rule("distillation_classifier.{rest}", "distillation_classifier.{rest}"),
    Rule("visual_projection.weight", ["classifier.weight", "classifier.bias"], with_zero_bias),
]

CLS_ALONE = {"distillation_head": False}
CLS_AND_MEAN = {"pooling": "cls_mean"}
MEAN = {"pooling": "mean"}
NORMED_CLS = {"pooled_norm": True}
POST_NORM = ("post_layernorm.{rest}",)
ATTENTION_HEAD = ("head.{rest}",)

SOURCES: dict[str, Source] = {
    "ViTModel": Source(VIT),
    "ViTForImageClassification": Source(VIT, "vit"),
    "DeiTModel": Source(DEIT),
    "DeiTForImageClassification": Source(DEIT, "deit", CLS_ALONE),
    "DeiTForImageClassificationWithTeacher": Source(DEIT, "deit"),
    "ViTMSNModel": Source(VIT),
    "ViTMSNForImageClassification": Source(VIT, "vit"),
    "ViTMAEModel": Source(VIT),
    "IJepaModel": Source(IJEPA),
    "IJepaForImageClassification": Source(IJEPA, "ijepa"),
    "Dinov2Model": Source(DINOV2),
    "Dinov2ForImageClassification": Source(DINOV2, "dinov2", CLS_AND_MEAN),
    "Dinov2WithRegistersModel": Source(DINOV2_WITH_REGISTERS),
    "Dinov2WithRegistersForImageClassification": Source(DINOV2_WITH_REGISTERS, "dinov2_with_registers", CLS_AND_MEAN),
    "DINOv3ViTModel": Source(DINOV3),
    "CLIPVisionModel": Source(CLIP, settings=NORMED_CLS),
    "CLIPVisionModelWithProjection": Source(CLIP, "vision_model", NORMED_CLS, labels=embedding_width),
    "CLIPForImageClassification": Source(CLIP, "vision_model", MEAN, unused=POST_NORM),
    "MetaClip2VisionModel": Source(CLIP, settings=NORMED_CLS),
    "MetaClip2VisionModelWithProjection": Source(CLIP, "vision_model", NORMED_CLS, labels=embedding_width),
    "MetaClip2ForImageClassification": Source(CLIP, "vision_model", MEAN, unused=POST_NORM),
    "SiglipVisionModel": Source(SIGLIP),
    "SiglipForImageClassification": Source(SIGLIP, "vision_model", MEAN, unused=ATTENTION_HEAD),
    "Siglip2VisionModel": Source(SIGLIP2),
    "Siglip2ForImageClassification": Source(SIGLIP2, "vision_model", MEAN, unused=ATTENTION_HEAD),
    "PixioModel": Source(PIXIO),
    "Aimv2VisionModel": Source(AIMV2),
    "BeitModel": Source(BEIT),
    "BeitForImageClassification": Source(BEIT, "beit"),
    "Data2VecVisionModel": Source(DATA2VEC),
    "Data2VecVisionForImageClassification": Source(DATA2VEC, "data2vec_vision"),
    "RadioModel": Source(RADIO),
}
