"""Small models of every class of transformers that can be converted, and what they answer, by our names."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from modeling_vitcls.conversion.random_weights import randomize_weights


NATIVE, OTHER, AS_MANY_PATCHES = (32, 32), (48, 24), (16, 64)
# A large eps, so that another one would show.
BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "layer_norm_eps": 0.01}
PLAIN = BASE | {"intermediate_size": 48, "image_size": 32}
RATIO = BASE | {"mlp_ratio": 2, "image_size": 32}
RADIO = BASE | {"mlp_ratio": 2.0, "max_img_size": 64, "num_cls_tokens": 3, "num_registers": 2, "summary_idxs": [2, 0]}
LABELS = {"id2label": {0: "ant", 1: "bee", 2: "cow"}, "label2id": {"ant": 0, "bee": 1, "cow": 2}}
ON_TOP = {"vision_config": PLAIN} | LABELS  # a configuration with a text part beside the vision part
ABSOLUTE = {"use_absolute_position_embeddings": True}
PER_LAYER = {"use_relative_position_bias": True}
SHARED = {"use_shared_relative_position_bias": True}


@dataclass
class Case:
    """A class of transformers with a configuration; `ask` for its `interpolate_pos_encoding` at other sizes."""

    model: str
    config: str
    values: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    ask: bool = False
    sizes: tuple[tuple[int, int], ...] = (NATIVE, OTHER)
    change: Callable[[nn.Module], Any] = lambda model: None

    def build(self) -> nn.Module:
        if not hasattr(transformers, self.model):
            pytest.skip(f"transformers {transformers.__version__} has no {self.model}")
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.values), **self.options)
        self.change(model)
        return randomize_weights(model)


CASES = {
    "vit": Case("ViTModel", "ViTConfig", PLAIN, ask=True),
    "vit without pooler": Case("ViTModel", "ViTConfig", PLAIN, {"add_pooling_layer": False}, ask=True),
    "vit with mask token": Case("ViTModel", "ViTConfig", PLAIN, {"use_mask_token": True}, ask=True),
    "vit without qkv bias": Case("ViTModel", "ViTConfig", PLAIN | {"qkv_bias": False}, ask=True),
    "vit of rectangles": Case(
        "ViTModel", "ViTConfig", PLAIN | {"image_size": [32, 48], "patch_size": [8, 4]}, sizes=((32, 48),)
    ),
    "vit classifier": Case(
        "ViTForImageClassification", "ViTConfig", PLAIN | LABELS, ask=True, sizes=(NATIVE, OTHER, AS_MANY_PATCHES)
    ),
    "vit without labels": Case("ViTForImageClassification", "ViTConfig", PLAIN | {"num_labels": 0}, ask=True),
    "deit": Case("DeiTModel", "DeiTConfig", PLAIN, ask=True),
    "deit classifier": Case("DeiTForImageClassification", "DeiTConfig", PLAIN | LABELS, ask=True),
    "deit distilled": Case("DeiTForImageClassificationWithTeacher", "DeiTConfig", PLAIN | LABELS, ask=True),
    "msn": Case("ViTMSNModel", "ViTMSNConfig", PLAIN, ask=True),
    "msn classifier": Case("ViTMSNForImageClassification", "ViTMSNConfig", PLAIN | LABELS, ask=True),
    "mae": Case("ViTMAEModel", "ViTMAEConfig", PLAIN | {"mask_ratio": 0.0}, ask=True),
    "ijepa": Case("IJepaModel", "IJepaConfig", PLAIN, ask=True),
    "ijepa classifier": Case("IJepaForImageClassification", "IJepaConfig", PLAIN | LABELS, ask=True),
    "dinov2": Case("Dinov2Model", "Dinov2Config", RATIO),
    "dinov2 swiglu": Case("Dinov2Model", "Dinov2Config", RATIO | {"use_swiglu_ffn": True}),
    "dinov2 classifier": Case("Dinov2ForImageClassification", "Dinov2Config", RATIO | LABELS),
    "registers": Case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", RATIO),
    "registers swiglu": Case(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", RATIO | {"use_swiglu_ffn": True}
    ),
    "registers classifier": Case(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", RATIO | LABELS
    ),
    "dinov3": Case("DINOv3ViTModel", "DINOv3ViTConfig", PLAIN | {"num_register_tokens": 4}),
    "dinov3 gated": Case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        PLAIN | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "dinov3 gated by gelu": Case("DINOv3ViTModel", "DINOv3ViTConfig", PLAIN | {"use_gated_mlp": True}),
    "dinov3 other biases": Case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        PLAIN | {"query_bias": False, "key_bias": True, "proj_bias": False, "mlp_bias": False, "rope_theta": 50.0},
    ),
    "clip": Case("CLIPVisionModel", "CLIPVisionConfig", PLAIN, ask=True),
    "clip projection": Case(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", PLAIN | {"projection_dim": 7}, ask=True
    ),
    "clip classifier": Case("CLIPForImageClassification", "CLIPConfig", ON_TOP, ask=True),
    "metaclip 2": Case("MetaClip2VisionModel", "MetaClip2VisionConfig", PLAIN, ask=True),
    "metaclip 2 projection": Case(
        "MetaClip2VisionModelWithProjection", "MetaClip2VisionConfig", PLAIN | {"projection_dim": 7}, ask=True
    ),
    "metaclip 2 classifier": Case("MetaClip2ForImageClassification", "MetaClip2Config", ON_TOP, ask=True),
    "siglip": Case("SiglipVisionModel", "SiglipVisionConfig", PLAIN, ask=True),
    "siglip without head": Case(
        "SiglipVisionModel", "SiglipVisionConfig", PLAIN | {"vision_use_head": False}, ask=True
    ),
    # 36 pixels hold four whole patches of 8, as 384 hold 27 of 14 in its so400m model
    "siglip with pixels over": Case(
        "SiglipVisionModel", "SiglipVisionConfig", PLAIN | {"image_size": 36}, ask=True, sizes=((36, 36), (50, 28))
    ),
    "siglip classifier": Case("SiglipForImageClassification", "SiglipConfig", ON_TOP, ask=True),
    "siglip 2": Case("Siglip2VisionModel", "Siglip2VisionConfig", BASE | {"intermediate_size": 48, "num_patches": 16}),
    "siglip 2 classifier": Case(
        "Siglip2ForImageClassification",
        "Siglip2Config",
        {"vision_config": BASE | {"intermediate_size": 48, "num_patches": 16}} | LABELS,
    ),
    "pixio": Case("PixioModel", "PixioConfig", RATIO),
    "aimv2": Case("Aimv2VisionModel", "Aimv2VisionConfig", PLAIN | {"rms_norm_eps": 0.02}, sizes=(NATIVE,)),
    "aimv2 native": Case("Aimv2VisionModel", "Aimv2VisionConfig", PLAIN | {"is_native": True}),
    "aimv2 with biases": Case(
        "Aimv2VisionModel",
        "Aimv2VisionConfig",
        PLAIN | {"qkv_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        sizes=(NATIVE,),
    ),
    "aimv2 without head": Case("Aimv2VisionModel", "Aimv2VisionConfig", PLAIN | {"use_head": False}, sizes=(NATIVE,)),
    "beit": Case("BeitModel", "BeitConfig", PLAIN | PER_LAYER, sizes=(NATIVE, OTHER, AS_MANY_PATCHES)),
    "beit shared": Case("BeitModel", "BeitConfig", PLAIN | SHARED),
    "beit shared and per layer": Case("BeitModel", "BeitConfig", PLAIN | SHARED | PER_LAYER | ABSOLUTE),
    "beit absolute": Case("BeitModel", "BeitConfig", PLAIN | ABSOLUTE | {"use_mean_pooling": False}),
    "beit without positions or scale": Case("BeitModel", "BeitConfig", PLAIN | {"layer_scale_init_value": 0.0}),
    "beit without pooler": Case("BeitModel", "BeitConfig", PLAIN | PER_LAYER, {"add_pooling_layer": False}),
    "beit classifier": Case("BeitForImageClassification", "BeitConfig", PLAIN | PER_LAYER | LABELS),
    "beit cls classifier": Case(
        "BeitForImageClassification", "BeitConfig", PLAIN | SHARED | LABELS | {"use_mean_pooling": False}
    ),
    "data2vec": Case("Data2VecVisionModel", "Data2VecVisionConfig", PLAIN | PER_LAYER | ABSOLUTE),
    "data2vec shared and per layer": Case("Data2VecVisionModel", "Data2VecVisionConfig", PLAIN | SHARED | PER_LAYER),
    "data2vec classifier": Case(
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", PLAIN | SHARED | LABELS
    ),
    "radio": Case("RadioModel", "RadioConfig", RADIO, sizes=(NATIVE, OTHER, (64, 64))),
    "radio swiglu": Case("RadioModel", "RadioConfig", RADIO | {"use_swiglu_ffn": True}),
    "radio without conditioner": Case(
        "RadioModel", "RadioConfig", RADIO, change=lambda model: model.make_preprocessor_external()
    ),
}


def encoder_of(model: nn.Module) -> nn.Module:
    return next((part for part in model.children() if hasattr(part, "embeddings")), model)


def expected(case: Case, model: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the source answers, by our names."""
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if case.model.startswith("Siglip2"):
        inputs = as_patches(pixels, case.values.get("vision_config", case.values)["patch_size"])
    elif case.ask and pixels.shape[-2:] != case.sizes[0]:
        inputs["interpolate_pos_encoding"] = True
    outputs = model(**inputs)
    encoded = encoder_of(model)(**inputs)
    answers = {
        "last_hidden_state": in_order(encoded),
        "pooler_output": encoded.get("summary", encoded.get("pooler_output")),
        "logits": outputs.get("logits", outputs.get("image_embeds")),
        "cls_logits": outputs.get("cls_logits"),
        "distillation_logits": outputs.get("distillation_logits"),
    }
    if answers["logits"] is not None:  # a classifier of theirs may read other tokens than the base model's pooler
        del answers["pooler_output"]
    return {name: answer for name, answer in answers.items() if answer is not None}


def in_order(encoded: Any) -> torch.Tensor:
    """The sequence, with the patches of MAE, which shuffles them, back in their places."""
    sequence = encoded.last_hidden_state
    if "ids_restore" not in encoded:
        return sequence
    cls, patches = sequence[:, :1], sequence[:, 1:]
    return torch.cat([cls, patches.gather(1, encoded.ids_restore[..., None].expand_as(patches))], dim=1)


def as_patches(pixels: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """What SigLIP 2 takes: flattened patches, channels last."""
    rows, columns = pixels.shape[-2] // size, pixels.shape[-1] // size
    patches = pixels.unflatten(2, (rows, size)).unflatten(4, (columns, size)).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": patches.flatten(3).flatten(1, 2),
        "pixel_attention_mask": torch.ones(len(pixels), rows * columns),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels)),
    }


def answered(model: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What our model answers."""
    return {**getattr(model, "vitcls", model)(pixels), **model(pixels)}


def images(size: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
