"""Small models of every class of transformers that can be converted, and their outputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_models import build_images
from torch import nn

from modeling_vitcls.conversion.source_models import flatten_patches
from scripts.tools.random_weights import randomize_weights


NATIVE = (32, 32)
OTHER = (48, 24)
AS_MANY_PATCHES = (16, 64)
# A large eps, so that another eps changes the outputs.
BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
    "layer_norm_eps": 0.01,
}
PLAIN = BASE | {"intermediate_size": 48, "image_size": 32}
RATIO = BASE | {"mlp_ratio": 2, "image_size": 32}
RADIO = BASE | {
    "mlp_ratio": 2.0,
    "max_img_size": 64,
    "num_cls_tokens": 3,
    "num_registers": 2,
    "summary_idxs": [2, 0],
}
LABELS = {"id2label": {0: "ant", 1: "bee", 2: "cow"}, "label2id": {"ant": 0, "bee": 1, "cow": 2}}
ON_TOP = {"vision_config": PLAIN} | LABELS  # a configuration with a text part and a vision part
ABSOLUTE = {"use_absolute_position_embeddings": True}
PER_LAYER = {"use_relative_position_bias": True}
SHARED = {"use_shared_relative_position_bias": True}


@dataclass
class Case:
    """A class of transformers with a configuration."""

    model: str
    values: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = (NATIVE, OTHER)
    change: Callable[[nn.Module], Any] = lambda model: None

    def build(self) -> nn.Module:
        if not hasattr(transformers, self.model):
            pytest.skip(f"transformers {transformers.__version__} has no {self.model}")
        model_class = getattr(transformers, self.model)
        model = model_class(model_class.config_class(**self.values), **self.options)
        self.change(model)
        return randomize_weights(model)


CASES = {
    "vit": Case("ViTModel", PLAIN),
    "vit without pooler": Case("ViTModel", PLAIN, {"add_pooling_layer": False}),
    "vit with mask token": Case("ViTModel", PLAIN, {"use_mask_token": True}),
    "vit of rectangles": Case(
        "ViTModel",
        PLAIN | {"image_size": [32, 48], "patch_size": [8, 4]},
        sizes=((32, 48),),
    ),
    "vit classifier": Case(
        "ViTForImageClassification",
        PLAIN | LABELS,
        sizes=(NATIVE, OTHER, AS_MANY_PATCHES),
    ),
    "vit without labels": Case("ViTForImageClassification", PLAIN | {"num_labels": 0}),
    "deit": Case("DeiTModel", PLAIN),
    "deit classifier": Case("DeiTForImageClassification", PLAIN | LABELS),
    "deit distilled": Case("DeiTForImageClassificationWithTeacher", PLAIN | LABELS),
    "msn": Case("ViTMSNModel", PLAIN),
    "msn classifier": Case("ViTMSNForImageClassification", PLAIN | LABELS),
    "mae": Case("ViTMAEModel", PLAIN | {"mask_ratio": 0.0}),
    "ijepa": Case("IJepaModel", PLAIN),
    "ijepa classifier": Case("IJepaForImageClassification", PLAIN | LABELS),
    "dinov2": Case("Dinov2Model", RATIO),
    "dinov2 swiglu": Case("Dinov2Model", RATIO | {"use_swiglu_ffn": True}),
    "dinov2 classifier": Case("Dinov2ForImageClassification", RATIO | LABELS),
    "registers": Case("Dinov2WithRegistersModel", RATIO),
    "registers classifier": Case("Dinov2WithRegistersForImageClassification", RATIO | LABELS),
    "dinov3": Case("DINOv3ViTModel", PLAIN | {"num_register_tokens": 4}),
    "dinov3 gated": Case(
        "DINOv3ViTModel",
        PLAIN | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "dinov3 other biases": Case(
        "DINOv3ViTModel",
        PLAIN
        | {
            "query_bias": False,
            "key_bias": True,
            "proj_bias": False,
            "mlp_bias": False,
            "rope_theta": 50.0,
        },
    ),
    "sapiens2": Case(
        "Sapiens2Model",
        PLAIN
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads_per_layer": [4, 2, 1],
            "rms_norm_eps": 0.02,
        },
    ),
    "sapiens2 plain": Case(
        "Sapiens2Model",
        PLAIN
        | {"use_gated_mlp": False, "use_qk_norm": False, "key_bias": False, "proj_bias": False},
    ),
    "tipsv2": Case("Tipsv2VisionModel", RATIO | {"num_register_tokens": 2}),
    "internvl": Case("InternVLVisionModel", PLAIN),
    "internvl cls": Case(
        "InternVLVisionModel",
        PLAIN | {"attention_bias": True, "use_mean_pooling": False},
    ),
    "qianfan ocr": Case("QianfanOCRVisionModel", PLAIN | {"norm_type": "rms_norm"}),
    "chinese clip": Case("ChineseCLIPVisionModel", PLAIN),
    "clip": Case("CLIPVisionModel", PLAIN),
    "clip projection": Case("CLIPVisionModelWithProjection", PLAIN | {"projection_dim": 7}),
    "clip classifier": Case("CLIPForImageClassification", ON_TOP),
    "metaclip 2": Case("MetaClip2VisionModel", PLAIN),
    "metaclip 2 projection": Case(
        "MetaClip2VisionModelWithProjection", PLAIN | {"projection_dim": 7}
    ),
    "metaclip 2 classifier": Case("MetaClip2ForImageClassification", ON_TOP),
    "siglip": Case("SiglipVisionModel", PLAIN),
    "siglip without head": Case("SiglipVisionModel", PLAIN | {"vision_use_head": False}),
    # 36 pixels contain four whole patches of 8, like 384 pixels and 27 patches of 14 in the so400m
    # model
    "siglip with pixels over": Case(
        "SiglipVisionModel",
        PLAIN | {"image_size": 36},
        sizes=((36, 36), (50, 28)),
    ),
    "siglip classifier": Case("SiglipForImageClassification", ON_TOP),
    "siglip 2": Case(
        "Siglip2VisionModel",
        BASE | {"intermediate_size": 48, "num_patches": 16},
    ),
    "siglip 2 classifier": Case(
        "Siglip2ForImageClassification",
        {"vision_config": BASE | {"intermediate_size": 48, "num_patches": 16}} | LABELS,
    ),
    "pixio": Case("PixioModel", RATIO),
    "aimv2": Case("Aimv2VisionModel", PLAIN | {"rms_norm_eps": 0.02}, sizes=(NATIVE,)),
    "aimv2 native": Case("Aimv2VisionModel", PLAIN | {"is_native": True}),
    "aimv2 with biases": Case(
        "Aimv2VisionModel",
        PLAIN | {"qkv_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        sizes=(NATIVE,),
    ),
    "beit": Case("BeitModel", PLAIN | PER_LAYER, sizes=(NATIVE, OTHER, AS_MANY_PATCHES)),
    "beit shared and per layer": Case("BeitModel", PLAIN | SHARED | PER_LAYER | ABSOLUTE),
    "beit of twelve layers": Case("BeitModel", PLAIN | PER_LAYER | {"num_hidden_layers": 12}),
    "beit without positions or scale": Case("BeitModel", PLAIN | {"layer_scale_init_value": 0.0}),
    "beit without pooler": Case("BeitModel", PLAIN | PER_LAYER, {"add_pooling_layer": False}),
    "beit classifier": Case("BeitForImageClassification", PLAIN | PER_LAYER | LABELS),
    "beit cls classifier": Case(
        "BeitForImageClassification",
        PLAIN | SHARED | LABELS | {"use_mean_pooling": False},
    ),
    "data2vec": Case("Data2VecVisionModel", PLAIN | PER_LAYER | ABSOLUTE),
    "data2vec classifier": Case("Data2VecVisionForImageClassification", PLAIN | SHARED | LABELS),
    "radio": Case("RadioModel", RADIO, sizes=(NATIVE, OTHER, (64, 64))),
    "radio without conditioner": Case(
        "RadioModel", RADIO, change=lambda model: model.make_preprocessor_external()
    ),
}


def get_encoder(model: nn.Module) -> nn.Module:
    """Return the base model of a classifier, or the model itself."""
    return next((part for part in model.children() if hasattr(part, "embeddings")), model)


def build_inputs(case: Case, pixels: torch.Tensor) -> dict[str, Any]:
    """Build the keyword arguments of a source for images [B, C, H, W]."""
    if case.model.startswith("Siglip2"):
        return flatten_patches(pixels, case.values.get("vision_config", case.values)["patch_size"])
    inputs = {"pixel_values": pixels}
    if case.model == "ViTMAEModel":  # It sorts the patches by this noise
        num_patches = pixels[0, 0].numel() // case.values["patch_size"] ** 2
        inputs["noise"] = torch.arange(num_patches).expand(len(pixels), -1)
    if pixels.shape[-2:] != case.sizes[0]:
        inputs["interpolate_pos_encoding"] = True  # Which some classes need, and others ignore
    return inputs


def compute_source_outputs(
    case: Case, model: nn.Module, pixels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the outputs of a source under the names of this package."""
    inputs = build_inputs(case, pixels)
    outputs = model(**inputs)
    encoder_outputs = get_encoder(model)(**inputs)
    named = {
        "last_hidden_state": encoder_outputs.last_hidden_state,
        "pooler_output": encoder_outputs.get("summary", encoder_outputs.get("pooler_output")),
        "logits": outputs.get("logits", outputs.get("image_embeds")),
        "cls_logits": outputs.get("cls_logits"),
        "distillation_logits": outputs.get("distillation_logits"),
    }
    if (
        named["logits"] is not None
    ):  # a classifier of transformers may read other tokens than the pooler
        del named["pooler_output"]
    return {name: output for name, output in named.items() if output is not None}


def compute_outputs(model: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the outputs of a converted model and of its encoder."""
    return {**getattr(model, "vitcls", model)(pixels), **model(pixels)}


def images(size: tuple[int, int]) -> torch.Tensor:
    return build_images(2, *size)
