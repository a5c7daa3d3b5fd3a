"""Our models -> transformers' own classes, with the same numbers, where one of `TARGETS` can hold them.

    built_in = convert_to_transformers(ViTCLSForImageClassification.from_pretrained(path))

A class can hold a model if its configuration, read back by the tables of the other direction, decides all that ours
decides. Fields that differ stand in the way, and the error names them. What has no effect on a model's numbers outside
training (dropout, drop path, initialisation) does not count. A ViT or DeiT of a rectangular image_size takes images of
that size only, as transformers resamples positions of squares alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..adaptation_vitcls import replace_fields
from ..configuration_vitcls import ViTCLSConfig
from ..modeling_vitcls import ViTCLSPreTrainedModel
from .equivalent_models import REWRITES, Rewrite
from .from_transformers import HEAD_RULES, SOURCES, Source, classifier_labels, split_head
from .transformers_families import SAME_FIELDS, Settings, Weights, as_size, dinov2_mlp_width
from .weight_rules import ConversionError, revert_weights


logger = logging.get_logger(__name__)


def convert_to_transformers(model: ViTCLSPreTrainedModel, native_size_only: bool = False) -> PreTrainedModel:
    """Hand a model to the built-in class that can hold it: same outputs, dtype and device, in eval mode.

    `ViTCLSForImageClassification` becomes a class of ViT, DeiT, DINOv2 or DINOv2 with registers with a classifier,
    `ViTCLSModel` a base model of these or of DINOv3. Biases and LayerScales that only the built-in class has are
    neutral. A mask token that it has no place for is left out, which is logged. If no class supports the model as it
    is, an equivalent form of the model is converted (equivalent_models.py).

    Args:
        model: The model.
        native_size_only: Whether the outputs have to be the same only for images of `config.image_size`. The class of
            transformers may then resample positions differently for other sizes.

    Raises:
        ConversionError: If no class supports the model. The message names the nearest class and the fields in the way.
    """
    kind = type(model).__name__
    if kind not in TARGETS:
        raise ConversionError(f"{kind}: no built-in class does its task; convert its encoder, .vitcls, if it has one")
    best = find_best_fit(kind, model.config, native_size_only)
    if best.obstacles:
        hint = hint_at_encoder(model)
        if not native_size_only and not (native := find_best_fit(kind, model.config, True)).obstacles:
            hint = f". {native.target.name} is exact at the native size: set native_size_only=True"
        raise ConversionError(f"{', '.join(best.obstacles)}{describe_nearest(best)}{hint}")
    return build(best, model)


@dataclass(frozen=True)
class Target:
    """A built-in class: its configuration and its constructor's options from ours."""

    name: str
    settings: Callable[[ViTCLSConfig], Settings]
    options: Callable[[ViTCLSConfig], dict[str, bool]] = lambda config: {}
    pools: bool = True  # whether it gives a pooled vector where no pooler with weights is asked for

    @property
    def source(self) -> Source:
        """The class in the other direction."""
        return SOURCES[self.name]

    def build(self, config: ViTCLSConfig) -> PreTrainedModel:
        """A model with fresh weights."""
        model_class = getattr(transformers, self.name)
        known = {field.name for field in dataclasses.fields(model_class.config_class)}
        same = {name: getattr(config, name) for name in SAME_FIELDS if name in known}
        sizes = {"image_size": as_size(config.image_height_width), "patch_size": as_size(config.patch_height_width)}
        settings = same | sizes | self.settings(config) | classifier_labels(config)
        return model_class(model_class.config_class(**settings), **self.options(config))


def vit_settings(config: ViTCLSConfig) -> Settings:
    """Configuration of ViT and DeiT."""
    return {"qkv_bias": any(biases(config)), "pooler_act": config.pooled_activation or "tanh"}


def vit_options(config: ViTCLSConfig) -> dict[str, bool]:
    """Constructor of their base models."""
    return {"add_pooling_layer": config.pooled_activation is not None, "use_mask_token": config.use_mask_token}


def dinov2_settings(config: ViTCLSConfig) -> Settings:
    """Configuration of DINOv2."""
    is_gated = config.mlp_type != "mlp"
    widths = {dinov2_mlp_width(config.hidden_size, ratio, is_gated): ratio for ratio in range(16, 0, -1)}
    return {
        "qkv_bias": any(biases(config)),
        "mlp_ratio": widths.get(config.intermediate_size, 4),
        "use_swiglu_ffn": is_gated,
        "layerscale_value": float(config.layer_scale_init_value or 1.0),
        "use_mask_token": config.use_mask_token,
    }


def registers_settings(config: ViTCLSConfig) -> Settings:
    """Configuration of DINOv2 with registers, which always has a mask token."""
    settings = dinov2_settings(config) | {"num_register_tokens": config.num_register_tokens}
    del settings["use_mask_token"]
    return settings


def dinov3_settings(config: ViTCLSConfig) -> Settings:
    """Configuration of DINOv3."""
    query_bias, key_bias, value_bias = biases(config)
    return {
        "num_register_tokens": config.num_register_tokens,
        "rope_theta": float(config.rope_theta),
        "query_bias": query_bias,
        "key_bias": key_bias,
        "value_bias": value_bias,
        "proj_bias": config.projection_bias,
        "mlp_bias": config.mlp_bias,
        "use_gated_mlp": config.mlp_type != "mlp",
        "hidden_act": activation(config),
        "attention_dropout": config.attention_probs_dropout_prob,
        "layerscale_value": float(config.layer_scale_init_value or 1.0),
    }


TARGETS: dict[str, list[Target]] = {
    "ViTCLSModel": [
        Target("ViTModel", vit_settings, vit_options, pools=False),
        Target("DeiTModel", vit_settings, vit_options, pools=False),
        Target("Dinov2Model", dinov2_settings),
        Target("Dinov2WithRegistersModel", registers_settings),
        Target("DINOv3ViTModel", dinov3_settings),
    ],
    "ViTCLSForImageClassification": [
        Target("ViTForImageClassification", vit_settings),
        Target("DeiTForImageClassificationWithTeacher", vit_settings),
        Target("DeiTForImageClassification", vit_settings),
        Target("Dinov2ForImageClassification", dinov2_settings),
        Target("Dinov2WithRegistersForImageClassification", registers_settings),
    ],
}


@dataclass(frozen=True)
class Fit:
    """How well a target holds a configuration: the fields that stand in the way, and what it has in their place.

    Attributes:
        config: The configuration, after `steps`.
        names: Names of the fields in the way.
        steps: Rewrites of the model, each with the configuration before and after it.
    """

    target: Target
    config: ViTCLSConfig
    obstacles: list[str]
    instead: list[str]
    names: frozenset[str] = frozenset()
    steps: tuple[tuple[Rewrite, ViTCLSConfig, ViTCLSConfig], ...] = ()


def find_best_fit(kind: str, config: ViTCLSConfig, native_size_only: bool) -> Fit:
    """Return the fit with the fewest obstacles, then with the fewest rewrites, for a model class."""
    fits = [fit_equivalent(target, config, native_size_only) for target in TARGETS[kind]]
    return min(fits, key=lambda fit: (len(fit.obstacles), len(fit.steps)))


def fit_equivalent(target: Target, config: ViTCLSConfig, native_size_only: bool) -> Fit:
    """Return the fit of a configuration after all rewrites that remove obstacles."""
    fit = fit_into(target, config)
    for rewrite in REWRITES:
        if not rewrite.fields & fit.names or (rewrite.at_native_size_only and not native_size_only):
            continue
        for changes in rewrite.list_changes(fit.config):
            changed = fit_into(target, replace_fields(fit.config, changes))
            if len(changed.obstacles) < len(fit.obstacles):
                fit = replace(changed, steps=(*fit.steps, (rewrite, fit.config, changed.config)))
                break
    return fit


def fit_into(target: Target, config: ViTCLSConfig) -> Fit:
    """Compare a configuration with what the target makes of it."""
    try:
        with torch.device("meta"):
            candidate = target.build(config)
        read_back = read_settings(target.source, candidate)
    except (TypeError, ValueError) as error:  # what this class, or this version of it, does not take
        return Fit(target, config, [" ".join(str(error).split())], [])
    classifies = target.source.encoder is not None
    ours, theirs = decisive_values(config, classifies), decisive_values(read_back, classifies)
    harmless = POOLING if not target.pools and has_bare_pooler(config) else set()
    names = [name for name in ours if name in theirs and name not in harmless and differs(name, ours, theirs)]
    obstacles, instead = ([f"{name}={values[name]!r}" for name in names] for values in (ours, theirs))
    return Fit(target, config, obstacles, instead, frozenset(names))


def read_settings(source: Source, model: PreTrainedModel) -> ViTCLSConfig:
    """The configuration that `convert_from_transformers` would give this model."""
    weights, _ = split_head(model.state_dict(), source.encoder)
    return ViTCLSConfig(**source.family.settings(model.config, weights) | dict(source.settings))


def differs(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether a field stands in the way. Of LayerScale only its presence counts, the values are weights.

    Biases and LayerScale that we lack can be filled so that they do nothing (`NEUTRAL_WEIGHTS`).
    """
    if name == "layer_scale_init_value":
        return ours[name] is not None and theirs[name] is None
    if name.endswith("_bias") and name != "relative_position_bias":
        return ours[name] and not theirs[name]
    return (ours[name] or None) != (theirs[name] or None)


def describe_nearest(fit: Fit) -> str:
    """What the nearest class has in place of the obstacles, where it is not said already."""
    if not fit.instead:
        return ""
    return f": no built-in class can hold this; the nearest, {fit.target.name}, has {', '.join(fit.instead)}"


def hint_at_encoder(model: ViTCLSPreTrainedModel) -> str:
    """For a classifier: the built-in class that can hold its encoder, if there is one."""
    if not hasattr(model, "vitcls"):
        return ""
    fit = find_best_fit("ViTCLSModel", model.config, native_size_only=False)
    return "" if fit.obstacles else f". Its encoder, model.vitcls, fits into {fit.target.name}"


POOLING = {"pooling", "cls_pooling", "pooled_cls_tokens"}
HEADS = {"head_type", "head_hidden_size", "distillation_head", "distillation_inference"}
LEARNED_POSITIONS = {
    "position_embedding_tokens",
    "position_interpolation",
    "position_antialias",
    "position_offset",
}
# Act in training only, or say what is built around the model. The mask token is looked after in `build`.
NOT_DECISIVE = {
    "use_mask_token",
    "token_init",
    "initializer_range",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "patch_drop_rate",
    "mim_loss",
    "norm_pixel_target",
    "_out_features",
    "_out_indices",
    "apply_layernorm",
    "reshape_hidden_states",
    "qkv_bias",
}


def decisive_values(config: ViTCLSConfig, classifies: bool) -> dict[str, Any]:
    """The fields that decide a model's numbers, in one form where several mean the same."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = [field.name for field in dataclasses.fields(config) if field.name not in inherited | NOT_DECISIVE]
    values = {name: getattr(config, name) for name in names}
    query_bias, key_bias, value_bias = biases(config)
    values |= {
        "image_size": list(config.image_height_width),
        "patch_size": list(config.patch_height_width),
        "attention_head_size": config.head_dim,
        "query_bias": query_bias,
        "key_bias": key_bias,
        "value_bias": value_bias,
        "mlp_type": "mlp" if config.mlp_type == "mlp" else "glu",
        "hidden_act": activation(config),
        "position_embedding_tokens": positioned_tokens(config),
        "distillation_head": config.has_distillation_head,
        "cls_scopes": config.cls_scopes if any(scope != "image" for scope in config.cls_scopes or ()) else None,
    }
    for is_idle, idle_names in idle_fields(config, classifies):
        if is_idle:
            values = {name: value for name, value in values.items() if name not in idle_names}
    return values


def idle_fields(config: ViTCLSConfig, classifies: bool) -> list[tuple[bool, set[str]]]:
    """Fields that others leave without effect, with whether they do."""
    pools_one_cls = config.num_cls_tokens == 1 or config.pooling not in ("cls", "cls_mean")
    attention_pool = {field.name for field in dataclasses.fields(config) if field.name.startswith("attention_pool_")}
    rotary = {field.name for field in dataclasses.fields(config) if field.name.startswith("rope_")}
    return [
        (not classifies, HEADS),
        (not config.position_embedding_type.startswith("learned"), LEARNED_POSITIONS),
        (not config.has_rotary_positions, rotary),
        (pools_one_cls, {"cls_pooling", "pooled_cls_tokens"}),
        (config.pooling != "attention", attention_pool),
        (config.head_type == "linear", {"head_hidden_size"}),
        (not config.has_distillation_head, {"distillation_inference"}),
    ]


def has_bare_pooler(config: ViTCLSConfig) -> bool:
    """Whether pooling has no weights, which a class without pooler may then leave to its caller."""
    return config.pooling != "attention" and not config.pooled_norm and config.pooled_activation is None


def biases(config: ViTCLSConfig) -> tuple[bool, bool, bool]:
    """Whether queries, keys and values have a bias."""
    query, key, value = (
        config.qkv_bias if bias is None else bias for bias in (config.query_bias, config.key_bias, config.value_bias)
    )
    return query, key, value


def activation(config: ViTCLSConfig) -> str:
    """The activation of the MLP or of its gate."""
    return "silu" if config.mlp_type == "swiglu" else config.hidden_act


def positioned_tokens(config: ViTCLSConfig) -> str:
    """`position_embedding_tokens`, by the tokens that exist."""
    if config.position_embedding_tokens == "all" and config.num_distillation_tokens + config.num_register_tokens:
        return "all"
    return "patches" if config.position_embedding_tokens == "patches" or not config.num_cls_tokens else "cls"


# End of a name -> value with which a weight of theirs does nothing; the mask token starts at zero there too.
NEUTRAL_WEIGHTS = {"bias": 0.0, "lambda1": 1.0, "mask_token": 0.0}


def build(fit: Fit, model: ViTCLSPreTrainedModel) -> PreTrainedModel:
    """The built-in model with our weights."""
    target = fit.target
    built_in = target.build(fit.config)
    parts = split_head(model.state_dict(), "vitcls" if target.source.encoder else None)
    encoder, head = map(dict, parts)
    for rewrite, old, new in fit.steps:
        rewrite.rewrite_weights(encoder, head, old, new)
    wanted_encoder, wanted_head = split_head(built_in.state_dict(), target.source.encoder)
    prefix = f"{target.source.encoder}." if target.source.encoder else ""
    encoder = without_homeless_mask_token(encoder, wanted_encoder, target)
    weights = revert_weights(encoder, target.source.family.rules, wanted_encoder)
    reverted = {f"{prefix}{name}": weight for name, weight in weights.items()}
    reverted |= revert_weights(head, HEAD_RULES, wanted_head)
    for name, like in built_in.state_dict().items():
        if name not in reverted:
            reverted[name] = neutral_weight(name, like)
    built_in.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]  # transformers wraps `to` untyped
    built_in.load_state_dict(reverted)
    return built_in.eval()


def without_homeless_mask_token(
    weights: Weights, wanted: Mapping[str, torch.Tensor], target: Target
) -> dict[str, torch.Tensor]:
    """Leave out the mask token, with a log line, for a class that has none: a classifier never uses it."""
    if "embeddings.mask_token" in wanted or "embeddings.mask_token" not in weights:
        return dict(weights)
    logger.warning(f"the mask token is left out: {target.name} has none")
    return {name: weight for name, weight in weights.items() if name != "embeddings.mask_token"}


def neutral_weight(name: str, like: torch.Tensor) -> torch.Tensor:
    """A weight that does nothing, in place of one that we lack."""
    kind = name.rsplit(".", 1)[-1]
    if kind not in NEUTRAL_WEIGHTS and like.numel():
        raise ConversionError(f"weights missing: {name}")
    return torch.full_like(like, NEUTRAL_WEIGHTS.get(kind, 0.0))
