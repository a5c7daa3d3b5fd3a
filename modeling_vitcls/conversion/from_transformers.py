"""Convert transformers models to ViTCLS models with the same outputs.

    model = convert_transformers_model(AutoModel.from_pretrained("facebook/dinov2-base"))

This file lists the supported classes. The parameter names and configurations of each family are in
transformers_families.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.modeling_vitcls import ViTCLSPreTrainedModel
from . import transformers_families as families
from .weight_rules import (
    ConversionError,
    Fields,
    Rule,
    append_zero_bias,
    build_converted_model,
    convert_weights,
    strip_encoder_name,
)


def convert_transformers_model(model: PreTrainedModel) -> ViTCLSPreTrainedModel:
    """Convert a transformers ViT as `convert_from_transformers` does, without comparing outputs."""
    name = type(model).__name__
    # A class with this name in other code, such as remote code, may compute something else.
    if name not in CONVERTIBLE_CLASSES or not type(model).__module__.startswith("transformers."):
        raise ConversionError(
            f"{name} cannot be converted. Convert a class of transformers that docs/converting.md "
            "lists, such as the encoder inside the model, or `model.merge_and_unload()` of PEFT's model"
        )
    convertible_class = CONVERTIBLE_CLASSES[name]
    family = convertible_class.family
    weights = strip_encoder_name(model.state_dict(), convertible_class.encoder_name)
    fields = family.read_all_fields(getattr(model.config, "vision_config", model.config), weights)
    config = ViTCLSConfig(
        **fields
        | dict(convertible_class.fields)
        | convertible_class.read_label_fields(model.config)
    )

    # The first match counts. The rules of the family keep the norm on the pooled token; a classifier
    # of CLIP has none.
    rules = [
        *(Rule(name, []) for name in convertible_class.unused_patterns),
        *HEAD_RULES,
        *family.rules,
    ]
    weights = convert_weights(family.prepare_weights(weights), rules, config)
    return build_converted_model(
        config,
        weights,
        # The class decides, not the weights: a classifier with `num_labels=0` has none.
        has_classifier=convertible_class.encoder_name is not None,
    )


@dataclass(frozen=True)
class ConvertibleClass:
    """A transformers model class that can be converted."""

    family: families.TransformersFamily
    # Attribute name of the encoder; None if the class itself is the encoder
    encoder_name: str | None = None
    # Fields of `ViTCLSConfig` that depend on the class
    fields: Mapping[str, Any] = field(default_factory=dict)
    # Name patterns of encoder weights that the class does not use
    unused_patterns: tuple[str, ...] = ()
    # Function that reads the labels from the configuration
    read_label_fields: Callable[[Any], Fields] = families.read_label_fields


HEAD_RULES = [
    Rule("(cls_)?classifier.{rest}", "classifier.{rest}"),
    Rule("distillation_classifier.{rest}", "distillation_classifier.{rest}"),
    Rule("visual_projection.weight", ["classifier.weight", "classifier.bias"], append_zero_bias),
]

VIT_ENCODER = ConvertibleClass(families.VIT)
VIT_CLASSIFIER = ConvertibleClass(families.VIT, "vit")
INTERNVL_ENCODER = ConvertibleClass(families.INTERNVL)
BEIT_ENCODER = ConvertibleClass(families.BEIT)
CLIP_ENCODER = ConvertibleClass(families.CLIP, fields={"pooled_norm": True})
CLIP_EMBEDDER = ConvertibleClass(
    families.CLIP,
    "vision_model",
    {"pooled_norm": True},
    read_label_fields=lambda config: {"num_labels": config.projection_dim},
)
CLIP_CLASSIFIER = ConvertibleClass(
    families.CLIP, "vision_model", {"pooling": "mean"}, unused_patterns=("post_layernorm.{rest}",)
)

CONVERTIBLE_CLASSES: dict[str, ConvertibleClass] = {
    "ViTModel": VIT_ENCODER,
    "ViTForImageClassification": VIT_CLASSIFIER,
    "DeiTModel": ConvertibleClass(families.DEIT),
    "DeiTForImageClassification": ConvertibleClass(
        families.DEIT, "deit", {"distillation_head": False}
    ),
    "DeiTForImageClassificationWithTeacher": ConvertibleClass(families.DEIT, "deit"),
    "ViTMSNModel": VIT_ENCODER,
    "ViTMSNForImageClassification": VIT_CLASSIFIER,
    "ViTMAEModel": VIT_ENCODER,
    "IJepaModel": ConvertibleClass(families.IJEPA),
    "IJepaForImageClassification": ConvertibleClass(families.IJEPA, "ijepa"),
    "Dinov2Model": ConvertibleClass(families.DINOV2),
    "Dinov2ForImageClassification": ConvertibleClass(
        families.DINOV2, "dinov2", {"pooling": "cls_mean"}
    ),
    "Dinov2WithRegistersModel": ConvertibleClass(families.DINOV2_WITH_REGISTERS),
    "Dinov2WithRegistersForImageClassification": ConvertibleClass(
        families.DINOV2_WITH_REGISTERS, "dinov2_with_registers", {"pooling": "cls_mean"}
    ),
    "DINOv3ViTModel": ConvertibleClass(families.DINOV3),
    "Sapiens2Model": ConvertibleClass(families.SAPIENS2),
    "Tipsv2VisionModel": ConvertibleClass(families.TIPSV2),
    "CLIPVisionModel": CLIP_ENCODER,
    "CLIPVisionModelWithProjection": CLIP_EMBEDDER,
    "CLIPForImageClassification": CLIP_CLASSIFIER,
    "ChineseCLIPVisionModel": CLIP_ENCODER,
    "MetaClip2VisionModel": CLIP_ENCODER,
    "MetaClip2VisionModelWithProjection": CLIP_EMBEDDER,
    "MetaClip2ForImageClassification": CLIP_CLASSIFIER,
    "SiglipVisionModel": ConvertibleClass(families.SIGLIP),
    "SiglipForImageClassification": ConvertibleClass(
        families.SIGLIP, "vision_model", {"pooling": "mean"}, unused_patterns=("head.{rest}",)
    ),
    "Siglip2VisionModel": ConvertibleClass(families.SIGLIP2),
    "Siglip2ForImageClassification": ConvertibleClass(
        families.SIGLIP2, "vision_model", {"pooling": "mean"}, unused_patterns=("head.{rest}",)
    ),
    "PixioModel": ConvertibleClass(families.PIXIO),
    "Aimv2VisionModel": ConvertibleClass(families.AIMV2),
    "BeitModel": BEIT_ENCODER,
    "BeitForImageClassification": ConvertibleClass(families.BEIT, "beit"),
    "Data2VecVisionModel": BEIT_ENCODER,
    "Data2VecVisionForImageClassification": ConvertibleClass(families.BEIT, "data2vec_vision"),
    "InternVLVisionModel": INTERNVL_ENCODER,
    "QianfanOCRVisionModel": INTERNVL_ENCODER,
    "RadioModel": ConvertibleClass(families.RADIO),
}
