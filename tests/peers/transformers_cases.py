"""Small models of every class of transformers that can be converted, and their outputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
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
    """A class of transformers with a configuration.

    `interpolates` is set if other image sizes require `interpolate_pos_encoding`.
    """

    model: str
    config: str
    values: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    interpolates: bool = False
    sizes: tuple[tuple[int, int], ...] = (NATIVE, OTHER)
    change: Callable[[nn.Module], Any] = lambda model: None

    def build(self) -> nn.Module:
        if not hasattr(transformers, self.model):
            pytest.skip(f"transformers {transformers.__version__} has no {self.model}")
        model = getattr(transformers, self.model)(
            getattr(transformers, self.config)(**self.values), **self.options
        )
        self.change(model)
        return randomize_weights(model)


CASES = {
    "vit": Case("ViTModel", "ViTConfig", PLAIN, interpolates=True),
    "vit without pooler": Case(
        "ViTModel", "ViTConfig", PLAIN, {"add_pooling_layer": False}, interpolates=True
    ),
    "vit with mask token": Case(
        "ViTModel", "ViTConfig", PLAIN, {"use_mask_token": True}, interpolates=True
    ),
    "vit of rectangles": Case(
        "ViTModel",
        "ViTConfig",
        PLAIN | {"image_size": [32, 48], "patch_size": [8, 4]},
        sizes=((32, 48),),
    ),
    "vit classifier": Case(
        "ViTForImageClassification",
        "ViTConfig",
        PLAIN | LABELS,
        interpolates=True,
        sizes=(NATIVE, OTHER, AS_MANY_PATCHES),
    ),
    "vit without labels": Case(
        "ViTForImageClassification", "ViTConfig", PLAIN | {"num_labels": 0}, interpolates=True
    ),
    "deit": Case("DeiTModel", "DeiTConfig", PLAIN, interpolates=True),
    "deit classifier": Case(
        "DeiTForImageClassification", "DeiTConfig", PLAIN | LABELS, interpolates=True
    ),
    "deit distilled": Case(
        "DeiTForImageClassificationWithTeacher", "DeiTConfig", PLAIN | LABELS, interpolates=True
    ),
    "msn": Case("ViTMSNModel", "ViTMSNConfig", PLAIN, interpolates=True),
    "msn classifier": Case(
        "ViTMSNForImageClassification", "ViTMSNConfig", PLAIN | LABELS, interpolates=True
    ),
    "mae": Case("ViTMAEModel", "ViTMAEConfig", PLAIN | {"mask_ratio": 0.0}, interpolates=True),
    "ijepa": Case("IJepaModel", "IJepaConfig", PLAIN, interpolates=True),
    "ijepa classifier": Case(
        "IJepaForImageClassification", "IJepaConfig", PLAIN | LABELS, interpolates=True
    ),
    "dinov2": Case("Dinov2Model", "Dinov2Config", RATIO),
    "dinov2 swiglu": Case("Dinov2Model", "Dinov2Config", RATIO | {"use_swiglu_ffn": True}),
    "dinov2 classifier": Case("Dinov2ForImageClassification", "Dinov2Config", RATIO | LABELS),
    "registers": Case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", RATIO),
    "registers classifier": Case(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", RATIO | LABELS
    ),
    "dinov3": Case("DINOv3ViTModel", "DINOv3ViTConfig", PLAIN | {"num_register_tokens": 4}),
    "dinov3 gated": Case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        PLAIN | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "dinov3 other biases": Case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
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
        "Sapiens2Config",
        PLAIN
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads_per_layer": [4, 2, 1],
            "rms_norm_eps": 0.02,
        },
    ),
    "sapiens2 plain": Case(
        "Sapiens2Model",
        "Sapiens2Config",
        PLAIN
        | {"use_gated_mlp": False, "use_qk_norm": False, "key_bias": False, "proj_bias": False},
    ),
    "tipsv2": Case("Tipsv2VisionModel", "Tipsv2VisionConfig", RATIO | {"num_register_tokens": 2}),
    "internvl": Case("InternVLVisionModel", "InternVLVisionConfig", PLAIN),
    "internvl cls": Case(
        "InternVLVisionModel",
        "InternVLVisionConfig",
        PLAIN | {"attention_bias": True, "use_mean_pooling": False},
    ),
    "qianfan ocr": Case(
        "QianfanOCRVisionModel", "QianfanOCRVisionConfig", PLAIN | {"norm_type": "rms_norm"}
    ),
    "chinese clip": Case(
        "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", PLAIN, interpolates=True
    ),
    "clip": Case("CLIPVisionModel", "CLIPVisionConfig", PLAIN, interpolates=True),
    "clip projection": Case(
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        PLAIN | {"projection_dim": 7},
        interpolates=True,
    ),
    "clip classifier": Case("CLIPForImageClassification", "CLIPConfig", ON_TOP, interpolates=True),
    "metaclip 2": Case("MetaClip2VisionModel", "MetaClip2VisionConfig", PLAIN, interpolates=True),
    "metaclip 2 projection": Case(
        "MetaClip2VisionModelWithProjection",
        "MetaClip2VisionConfig",
        PLAIN | {"projection_dim": 7},
        interpolates=True,
    ),
    "metaclip 2 classifier": Case(
        "MetaClip2ForImageClassification", "MetaClip2Config", ON_TOP, interpolates=True
    ),
    "siglip": Case("SiglipVisionModel", "SiglipVisionConfig", PLAIN, interpolates=True),
    "siglip without head": Case(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        PLAIN | {"vision_use_head": False},
        interpolates=True,
    ),
    # 36 pixels contain four whole patches of 8, like 384 pixels and 27 patches of 14 in the so400m
    # model
    "siglip with pixels over": Case(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        PLAIN | {"image_size": 36},
        interpolates=True,
        sizes=((36, 36), (50, 28)),
    ),
    "siglip classifier": Case(
        "SiglipForImageClassification", "SiglipConfig", ON_TOP, interpolates=True
    ),
    "siglip 2": Case(
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        BASE | {"intermediate_size": 48, "num_patches": 16},
    ),
    "siglip 2 classifier": Case(
        "Siglip2ForImageClassification",
        "Siglip2Config",
        {"vision_config": BASE | {"intermediate_size": 48, "num_patches": 16}} | LABELS,
    ),
    "pixio": Case("PixioModel", "PixioConfig", RATIO),
    "aimv2": Case(
        "Aimv2VisionModel", "Aimv2VisionConfig", PLAIN | {"rms_norm_eps": 0.02}, sizes=(NATIVE,)
    ),
    "aimv2 native": Case("Aimv2VisionModel", "Aimv2VisionConfig", PLAIN | {"is_native": True}),
    "aimv2 with biases": Case(
        "Aimv2VisionModel",
        "Aimv2VisionConfig",
        PLAIN | {"qkv_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        sizes=(NATIVE,),
    ),
    "beit": Case(
        "BeitModel", "BeitConfig", PLAIN | PER_LAYER, sizes=(NATIVE, OTHER, AS_MANY_PATCHES)
    ),
    "beit shared and per layer": Case(
        "BeitModel", "BeitConfig", PLAIN | SHARED | PER_LAYER | ABSOLUTE
    ),
    "beit of twelve layers": Case(
        "BeitModel", "BeitConfig", PLAIN | PER_LAYER | {"num_hidden_layers": 12}
    ),
    "beit without positions or scale": Case(
        "BeitModel", "BeitConfig", PLAIN | {"layer_scale_init_value": 0.0}
    ),
    "beit without pooler": Case(
        "BeitModel", "BeitConfig", PLAIN | PER_LAYER, {"add_pooling_layer": False}
    ),
    "beit classifier": Case("BeitForImageClassification", "BeitConfig", PLAIN | PER_LAYER | LABELS),
    "beit cls classifier": Case(
        "BeitForImageClassification",
        "BeitConfig",
        PLAIN | SHARED | LABELS | {"use_mean_pooling": False},
    ),
    "data2vec": Case("Data2VecVisionModel", "Data2VecVisionConfig", PLAIN | PER_LAYER | ABSOLUTE),
    "data2vec classifier": Case(
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", PLAIN | SHARED | LABELS
    ),
    "radio": Case("RadioModel", "RadioConfig", RADIO, sizes=(NATIVE, OTHER, (64, 64))),
    "radio without conditioner": Case(
        "RadioModel", "RadioConfig", RADIO, change=lambda model: model.make_preprocessor_external()
    ),
}


def get_encoder(model: nn.Module) -> nn.Module:
    """Return the base model of a classifier, or the model itself."""
    return next((part for part in model.children() if hasattr(part, "embeddings")), model)


def build_inputs(case: Case, pixels: torch.Tensor) -> dict[str, Any]:
    """Build the keyword arguments of a source for images [B, C, H, W]."""
    if case.model.startswith("Siglip2"):
        return flatten_patches(pixels, case.values.get("vision_config", case.values)["patch_size"])
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if case.model == "ViTMAEModel":  # It sorts the patches by this noise
        num_patches = pixels[0, 0].numel() // case.values["patch_size"] ** 2
        inputs["noise"] = torch.arange(num_patches).expand(len(pixels), -1)
    if case.interpolates and pixels.shape[-2:] != case.sizes[0]:
        inputs["interpolate_pos_encoding"] = True
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


def images(size: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
