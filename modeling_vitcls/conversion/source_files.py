"""Load a published state-dict file, and build a timm reference model for the parity report.

    source = FileSource.load(Path("dinov2_vits14_reg4_pretrain.pth"))
    source = FileSource.load(Path("dino_deitsmall16_pretrain.pth"), family="dino")

1. A .npz file, a .safetensors file or a pickle of tensors is read without running code.
2. The weights are read from a container (`teacher`, `target_encoder`, `model`, ...) if there is one, and prefixes of
   parameter names (`module.`, `backbone.`) are stripped.
3. The family is detected from the parameter names and the container. If the family is ambiguous, set `--family`.
4. The weights are loaded into a timm model of the same architecture. For image sizes other than the native size, this
   package resamples the position embeddings of the timm model as in the authors' code, because timm often resamples
   differently.

Families with rules are converted in from_state_dict.py. The other families (`TIMM_FAMILIES`) are loaded by timm and
converted in from_timm.py.
"""

import argparse
import math
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from ..checkpoints import compute_file_digest
from ..configuration_vitcls import ViTCLSConfig
from ..errors import format_error
from ..modeling_vitcls import ViTCLSForImageClassification, ViTCLSPreTrainedModel
from ..positions_vitcls import resample_positions
from .from_state_dict import FAMILIES, convert_state_dict
from .from_timm import convert_from_timm
from .processors import ConvertedPreprocessing, build_default_preprocessing, convert_timm_preprocessing
from .source_models import Outputs, TimmSource, import_timm, raise_if_unsafe_pickle
from .weight_rules import ClassifierChoice, ConversionError, Weights


FILE_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")
# Keys of nested state dicts in order of precedence, with teachers and averaged weights first.
CONTAINER_KEYS = ("target_encoder", "teacher", "model_ema", "state_dict", "model", "student", "module")
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "backbone.")

# Family -> regular expression for the weight names that identify the family. The first matching family is used.
FAMILY_PATTERNS = {
    "big_vision": r"(.*/)?embedding/kernel",
    "dinov3": r"storage_tokens|rope_embed\.periods",
    "aimv2": r"(image_encoder\.)?preprocessor\.patchifier\.proj\.weight",
    "clip": r"(visual\.)?class_embedding",
    "beit": r".*relative_position_bias_table",
    "eva02": r"rope\.freqs_cos|blocks\.0\.(attn\.inner_attn_ln|mlp\.ffn_ln|attn\.q_proj)\..*",
    "dinov2": r"register_tokens|blocks\.0(\.0)?\.(ls1\.gamma|mlp\.w12\.weight)",
    "ibot": r"masked_embed",
    "mae": r"decoder_embed\.weight|fc_norm\.weight",
    "deit": r"dist_token|head\.weight|blocks\.0\.gamma_1",
}
# Family of encoders that match no pattern, by container key. iBOT encoders may be detected as DINO; the conversion is
# identical.
FAMILIES_BY_CONTAINER = {"teacher": "dino", "student": "dino", "model": "mae"}

# timm model names of the families without rules, by family and (width, patch size).
TIMM_FAMILIES: dict[str, dict[tuple[int, int], str]] = {
    "clip": {
        (768, 32): "vit_base_patch32_clip_quickgelu_224.openai",
        (768, 16): "vit_base_patch16_clip_quickgelu_224.openai",
        (1024, 14): "vit_large_patch14_clip_quickgelu_224.openai",
    },
    "eva02": {
        (192, 14): "eva02_tiny_patch14_224.mim_in22k",
        (384, 14): "eva02_small_patch14_224.mim_in22k",
        (768, 14): "eva02_base_patch14_224.mim_in22k",
        (1024, 14): "eva02_large_patch14_224.mim_in22k",
    },
    "aimv2": {
        (1024, 14): "aimv2_large_patch14_224.apple_pt",
        (1536, 14): "aimv2_huge_patch14_224.apple_pt",
        (2048, 14): "aimv2_1b_patch14_224.apple_pt",
        (3072, 14): "aimv2_3b_patch14_224.apple_pt",
    },
}
# timm model name by family. Other families have several timm models, or use the timm model of DINO.
TIMM_MODEL_NAMES = {
    "deit": "deit_small_patch16_224.fb_in1k",
    "mae": "vit_base_patch16_224.mae",
    "ijepa": "vit_huge_patch14_gap_224.in1k_ijepa",
    "big_vision": "vit_base_patch16_224.augreg_in21k",
}
FILE_FAMILIES = (*FAMILIES, *TIMM_FAMILIES)


class FileSource(TimmSource):
    """A published state dict of an image encoder, and a timm model with the same weights."""

    def __init__(self, file: Path, family: str, weights: Weights, model: nn.Module, notes: list[str]) -> None:
        super().__init__(str(file), model, None, notes)
        self.family = family
        self.weights = weights  # weights by parameter name, without containers and prefixes
        self.sha256 = compute_file_digest(file)
        self.has_linear_head = "linear_head.weight" in weights  # DINOv2's linear classifier, which timm does not have

    @classmethod
    def load(cls, file: Path, family: str | None = None) -> "FileSource":  # type: ignore[override]
        """Load a file. By default, the family is detected from the parameter names. Raise ConversionError if the file
        is not a state dict of a supported family, or if the family is ambiguous."""
        notes: list[str] = []
        weights, container_key = unwrap_weights(read_state_dict(file), notes)
        family = family or detect_family(weights, container_key, file)
        if family == "beit":
            raise ConversionError(
                f"{file} contains beit weights, but beit files are not supported. Use another source, for example "
                "transformers:microsoft/beit-base-patch16-224"
            )
        if family not in FILE_FAMILIES:
            raise ConversionError(f"--family {family} is unknown. Use one of {', '.join(FILE_FAMILIES)}")
        pretraining_prefixes = ("decoder", "mask_token") if family == "mae" else ()
        weights = {name: weight for name, weight in weights.items() if not name.startswith(pretraining_prefixes)}
        try:
            if family in TIMM_FAMILIES:
                model = build_timm_model(weights, family)
            else:
                converted_model = convert_state_dict(weights, family)
                model = build_reference_model(weights, family, converted_model, file)
                notes += describe_differences(family, converted_model.config)
        except (LookupError, RuntimeError) as error:  # raised by timm for weights that do not match the model
            raise ConversionError(f"{file} does not contain {family} weights: {format_error(error)}") from error
        return cls(file, family, weights, model, notes)

    @property
    def has_classifier(self) -> bool:
        """Return whether the file contains a classifier or a projection."""
        return self.has_linear_head or super().has_classifier

    def convert(self, classifier: ClassifierChoice, num_labels: int | None) -> ViTCLSPreTrainedModel:
        """Convert the weights with the rules of the family, or convert the timm model of a family without rules."""
        if self.family in TIMM_FAMILIES:
            return convert_from_timm(self.model, classifier=classifier, num_labels=num_labels)
        weights = {name: weight.float() for name, weight in self.weights.items()}
        return convert_state_dict(weights, self.family, classifier=classifier, num_labels=num_labels)

    def build_resized_model(self, size: tuple[int, int]) -> Any:
        """Return the timm model for another image size, with position embeddings resampled as in the authors' code."""
        model = super().build_resized_model(size)
        if self.family in FAMILIES and self.model.pos_embed is not None:
            config = convert_state_dict(self.weights, self.family).config
            num_prefix_tokens = 0 if self.model.no_embed_class else self.model.num_prefix_tokens
            prefix_positions, positions = self.model.pos_embed.data.tensor_split([num_prefix_tokens], dim=1)
            positions = resample_positions(positions, config.grid_size, model.patch_embed.grid_size, config)
            model.pos_embed.data = torch.cat([prefix_positions, positions], dim=1)
        return model

    def compute_outputs(self, pixel_values: torch.Tensor) -> Outputs:
        """Return the outputs of the timm model, and the logits of DINOv2's linear classifier."""
        outputs = super().compute_outputs(pixel_values)
        if not self.has_linear_head:
            return outputs
        sequence = outputs["sequence"]
        pooled = torch.cat([sequence[:, 0], sequence[:, self.model.num_prefix_tokens :].mean(dim=1)], dim=1)
        weight, bias = (self.weights[f"linear_head.{name}"].float() for name in ("weight", "bias"))
        return {"sequence": sequence, "logits": nn.functional.linear(pooled, weight, bias)}

    def convert_preprocessing(self) -> ConvertedPreprocessing:
        """Convert timm's preprocessing for the family, at the image size of the weights."""
        if self.family == "msn":
            return build_default_preprocessing(self.image_size, "timm has no preprocessing settings for MSN")
        self.model.pretrained_cfg["input_size"] = (3, *self.image_size)
        return convert_timm_preprocessing(self.model)


# Reading -------------------------------------------------------------------------------------------------------------


def read_state_dict(file: Path) -> Mapping[str, Any]:
    """Read a state dict, which may be nested, without running code in the file. Raise ConversionError if the file has
    an unsupported format, or is a pickle of objects other than tensors."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file. Use timm:NAME, transformers:PATH_OR_ID or an existing file")
    if file.suffix not in FILE_SUFFIXES:
        raise ConversionError(
            f"{file} is not supported. Use a file with one of the suffixes {' '.join(FILE_SUFFIXES)}"
        )
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a TorchScript archive causes a warning and an error
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise any exception for a damaged file
        raise_if_unsafe_pickle(str(file), error)
        is_torchscript = "TorchScript" in str(error)
        reason = "the file is a TorchScript archive, which contains code" if is_torchscript else format_error(error)
        raise ConversionError(f"cannot read the weights in {file}: {reason}") from error
    if not isinstance(weights, Mapping):
        raise ConversionError(f"{file} contains an object of type {type(weights).__name__} instead of a state dict")
    return weights


def unwrap_weights(weights: Mapping[str, Any], notes: list[str]) -> tuple[Weights, str | None]:
    """Return the tensors of the image encoder, with prefixes stripped, and the key of the innermost container. Add a
    note if the file contains weights outside the encoder, such as the projection head of a teacher."""
    container_key = None
    while key := next((key for key in CONTAINER_KEYS if isinstance(weights.get(key), Mapping)), None):
        container_key, weights = key, weights[key]
    tensors = {
        str(name): torch.as_tensor(value)
        for name, value in weights.items()
        if isinstance(value, torch.Tensor | np.ndarray)
    }
    while prefix := next((prefix for prefix in WRAPPER_PREFIXES if has_encoder(tensors, prefix)), None):
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith((prefix, "linear_head."))}
        if other_names := [name for name in tensors if name not in kept]:
            notes.append(
                f"{len(other_names)} weights outside of {prefix}* are not converted, for example {other_names[0]}"
            )
        tensors = {name.removeprefix(prefix): tensor for name, tensor in kept.items()}
    return tensors, container_key


def has_encoder(weights: Weights, prefix: str) -> bool:
    """Return whether the weights contain an image encoder whose parameter names start with `prefix`."""
    return any(
        re.match(rf"{re.escape(prefix)}.*(patch_embed\.proj|conv1|patchifier\.proj)\.weight", name) for name in weights
    )


def detect_family(weights: Weights, container_key: str | None, file: Path) -> str:
    """Return the family of a state dict. Raise ConversionError if no family or several families match."""
    for family, pattern in FAMILY_PATTERNS.items():
        if any(re.fullmatch(pattern, name) for name in weights):
            return family
    if "patch_embed.proj.weight" not in weights:
        names = ", ".join(list(weights)[:3])
        raise ConversionError(
            f"{file} does not contain a supported image encoder; it contains weights such as {names}. Use "
            "timm:NAME or transformers:PATH_OR_ID"
        )
    if container_key == "target_encoder":
        return "msn" if "cls_token" in weights else "ijepa"
    if container_key in FAMILIES_BY_CONTAINER:
        return FAMILIES_BY_CONTAINER[container_key]
    raise ConversionError(
        f"the weights in {file} match several families. Set --family to one of dino, ibot, msn, mae, deit, ijepa"
    )


# Reference models ----------------------------------------------------------------------------------------------------


def build_reference_model(weights: Weights, family: str, converted_model: ViTCLSPreTrainedModel, file: Path) -> Any:
    """Build a timm model from the weights of a family with rules. `converted_model` has the same weights."""
    timm = import_timm()
    config: ViTCLSConfig = converted_model.config
    is_gated = config.mlp_type != "mlp"
    has_head = isinstance(converted_model, ViTCLSForImageClassification) and "linear_head.weight" not in weights
    options: dict[str, Any] = {
        "img_size": config.image_height_width,
        "patch_size": config.patch_height_width,
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size * (2 if is_gated and family == "dinov2" else 1),
        "num_classes": config.num_labels if has_head else 0,
    }
    name = get_timm_model_name(family, config)
    if config.num_register_tokens:
        options["reg_tokens" if family == "dinov2" else "num_reg_tokens"] = config.num_register_tokens
    if family == "dinov3" or (family == "mae" and config.pooling == "mean"):
        options["global_pool"] = "token" if family == "dinov3" else "avg"
    if family == "big_vision":
        return build_big_vision_model(timm, name, options, config, file)
    model = timm.create_model(name, pretrained=False, **options)
    tensors = {
        name: tensor for name, tensor in weights.items() if not name.startswith(("linear_head.", "masked_embed"))
    }
    if family == "dinov2":
        tensors.setdefault("mask_token", torch.zeros(1))  # timm detects DINOv2 weights by this name
    load_timm_weights(model, tensors, **({"adapt_layer_scale": True} if name.startswith("deit3") else {}))
    if config.rope_periods is not None:
        periods = torch.tensor(config.rope_periods)
        model.rope._compute_periods = lambda device="cpu", dtype=torch.float32: periods.to(device, dtype)
        model.rope.reset_parameters()
    return model


def get_timm_model_name(family: str, config: ViTCLSConfig) -> str:
    """Return the name of a timm model of the family, with a tag that selects the preprocessing of the family."""
    is_gated = config.mlp_type != "mlp"
    if family == "dinov2":
        registers_infix = "reg4_" if config.num_register_tokens else ""
        return f"vit_{'giant' if is_gated else 'small'}_patch14_{registers_infix}dinov2.lvd142m"
    if family == "dinov3":
        bias_suffix = "_qkvb" if config.qkv_bias or not is_gated else ""
        return f"vit_small_{'plus_' if is_gated else ''}patch16_dinov3{bias_suffix}.lvd1689m"
    if family == "deit" and config.layer_scale_init_value:
        return "deit3_small_patch16_224.fb_in1k"
    if family == "big_vision" and config.pooling == "attention":
        return "vit_base_patch16_siglip_224.webli"
    if config.num_distillation_tokens:
        return "deit_small_distilled_patch16_224.fb_in1k"
    return TIMM_MODEL_NAMES.get(family, "vit_small_patch16_224.dino")


def build_big_vision_model(timm: Any, name: str, options: dict[str, Any], config: ViTCLSConfig, file: Path) -> Any:
    """Build a timm model, and load a big_vision file with timm's loader."""
    options |= {"act_layer": "gelu_tanh"}
    if not config.num_cls_tokens and config.pooling == "mean":
        options |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    elif config.position_embedding_tokens == "patches" and config.num_cls_tokens:
        options |= {"no_embed_class": True}
    model = timm.create_model(name, pretrained=False, **options)
    model.load_pretrained(str(file))
    return model


def build_timm_model(weights: Weights, family: str) -> Any:
    """Build a timm model from the weights of a family without rules."""
    timm = import_timm()
    patterns = (r".*(conv1|patch_embed\.proj|patchifier\.proj)\.weight", r".*(positional_embedding|pos_embed)")
    patch_kernel, position_embeddings = (
        next((tensor for name, tensor in weights.items() if re.fullmatch(pattern, name)), None) for pattern in patterns
    )
    if patch_kernel is None or position_embeddings is None:
        raise LookupError("the patch projection or the position embeddings are missing")
    width, patch_size = patch_kernel.shape[0], patch_kernel.shape[-1]
    if (width, patch_size) not in TIMM_FAMILIES[family]:
        sizes_text = ", ".join(map(str, TIMM_FAMILIES[family]))
        raise ConversionError(
            f"{family} files require a (width, patch size) of {sizes_text}, but this file has ({width}, "
            f"{patch_size}). Use timm:NAME"
        )
    grid_side = math.isqrt(position_embeddings.shape[-2])
    blocks = {int(match[1]) for name in weights if (match := re.search(r"blocks\.(\d{1,9})\.", name))}
    projection = weights.get("visual.proj", weights.get("proj"))  # [D, num_classes]
    head_weight = weights.get("head.weight", None if projection is None else projection.T)
    options = {
        "img_size": grid_side * patch_size,
        "depth": len(blocks),
        "num_classes": 0 if head_weight is None else len(head_weight),
    }
    model = timm.create_model(TIMM_FAMILIES[family][width, patch_size], pretrained=False, **options)
    if family == "clip" and "class_embedding" in weights:
        weights = {f"visual.{name}": tensor for name, tensor in weights.items()}
    load_timm_weights(model, weights)
    return model


def load_timm_weights(model: Any, weights: Weights, **options: bool) -> None:
    """Load published weights into a timm model in float32, using the `checkpoint_filter_fn` of the timm module."""
    timm_module = sys.modules[type(model).__module__]
    # In half precision, the sums of tokens and position embeddings in timm would be rounded.
    weights = {name: weight.float() for name, weight in weights.items()}
    model.load_state_dict(timm_module.checkpoint_filter_fn(weights, model, **options))


def describe_differences(family: str, config: ViTCLSConfig) -> list[str]:
    """Return notes on differences between the converted model, the authors' code, timm and transformers."""
    if config.rope_periods is not None:
        return [
            "rotary periods: as stored in the file and used by the authors' code; timm and transformers compute the "
            "periods in float32"
        ]
    if family == "big_vision":
        return [
            "position embeddings for other image sizes: bilinear; the authors' code aligns the corners of both grids, "
            "and timm resamples bicubically with antialiasing"
        ]
    if config.position_antialias or config.position_embedding_type != "learned":
        return []
    offset_text = f" with offset {config.position_offset}" if config.position_offset else ""
    return [
        f"position embeddings for other image sizes: bicubic{offset_text} without antialiasing, as in the authors' "
        "code; timm uses antialiasing"
    ]
