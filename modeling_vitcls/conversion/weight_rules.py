"""Use tables of rules to convert weights between other projects and this package.

Each family of checkpoints has a table of rules and a function that builds a `ViTCLSConfig`. The
rules map parameter names of the family to parameter names of this package. This file applies the
rules of any family and builds the model.

    rules = [
        Rule("pos_embed", POSITIONS, split_positions, axis=1),
        Rule("patch_embed.proj.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
        Rule("blocks.{i}.attn.qkv.{rest}", [f"layers.{{i}}.attention.{x}_proj.{{rest}}" for x in "qkv"]),   # divided
        Rule("(norm|layernorm).{rest}", "layernorm.{rest}"),
        Rule("head_drop.{rest}", []),                      # ignored
    ]

A pattern is a regular expression in which `.` is a period, `{i}` matches a number, and other
placeholders match any text. The first matching rule applies.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, ViTCLSPreTrainedModel
from ..model.token_layout_vitcls import COUNT_FIELDS, GROUPS_WITH_POSITIONS, TokenLayout
from ..runtime.errors import format_error, format_name_list


Weights = dict[str, Tensor]
Fields = dict[str, Any]  # Fields of ViTCLSConfig
Transform = Callable[[Tensor, ViTCLSConfig], Sequence[Tensor]]

# Names of the weights that `split_positions` returns.
POSITIONS = [f"embeddings.position_embeddings.{group}" for group in (*COUNT_FIELDS, "patches")]

# Names of the weights that `append_ones` returns.
LAYER_SCALES = ["layers.{i}.layer_scale1.lambda1", "layers.{i}.layer_scale2.lambda1"]


class ConversionError(ValueError):
    """Raised if a checkpoint cannot be converted exactly.

    The message names the unsupported feature.
    """


def split_positions(tensor: Tensor, config: ViTCLSConfig) -> Sequence[Tensor]:
    """Split position embeddings [1, N, D] or [N, D] into token groups [1, n, D]."""
    positions = tensor.reshape(1, -1, config.hidden_size)
    groups = GROUPS_WITH_POSITIONS[config.position_embedding_tokens]
    token_counts = [
        getattr(config, field) if group in groups else 0 for group, field in COUNT_FIELDS.items()
    ]
    return [positions[:, group] for _, group in TokenLayout.from_counts(*token_counts).items()]


def reshape_token(tensor: Tensor, config: ViTCLSConfig) -> Sequence[Tensor]:
    """Reshape a token [D] or [1, D] to [1, 1, D]."""
    return [tensor.reshape(1, 1, -1)]


def repeat_kv(tensor: Tensor, config: ViTCLSConfig) -> Sequence[Tensor]:
    """Repeat the key or value heads [heads * head_dim, ...], as many times as queries share them.

    Grouped-query attention becomes ordinary attention.
    """
    heads = tensor.unflatten(0, (-1, config.head_dim))
    return [heads.repeat_interleave(config.num_attention_heads // len(heads), dim=0).flatten(0, 1)]


def append_ones(tensor: Tensor, config: ViTCLSConfig) -> Sequence[Tensor]:
    """Append LayerScale values of 1, for an MLP without LayerScale, to the values of attention."""
    return [tensor, torch.ones_like(tensor)]


def append_zero_bias(tensor: Tensor, config: ViTCLSConfig) -> Sequence[Tensor]:
    """Add a zero bias [D] to a weight or bias [D, ...]."""
    return [tensor, tensor.new_zeros(len(tensor))]


def simplify_size(height: int, width: int) -> int | list[int]:
    """Write a size as one integer if height and width are equal, else as [height, width]."""
    return height if height == width else [height, width]


@dataclass(frozen=True)
class Rule:
    """Conversion of the parameters whose names match a pattern."""

    pattern: str  # Pattern of parameter names in the other project
    # Parameter names in this package; empty if the parameter is ignored
    targets: str | Sequence[str]
    # Function that returns one tensor per target; empty tensors are skipped, for example the
    # position embeddings of a token group that the model does not have. Default: the tensor [n * D,
    # ...] is divided among the n targets
    transform: Transform | None = None
    axis: int = 0  # Axis along which `revert_weights` concatenates the targets

    def match(self, name: str) -> list[str] | None:
        """Name the targets of a parameter; None if the pattern does not match."""
        pattern = self.pattern.replace(".", r"\.").replace("{i}", r"(?P<i>\d+)")
        match = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>.+)", pattern), name)
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        return [target.format(**match.groupdict()) for target in targets] if match else None


def convert_weights(weights: Weights, rules: Sequence[Rule], config: ViTCLSConfig) -> Weights:
    """Convert a state dict from another project.

    Raises:
        ConversionError: if a name matches no rule, or the weights are quantized.
    """
    if not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ConversionError(
            "the weights are quantized. Convert the model before, and quantize the result"
        )
    converted_weights: Weights = {}
    unmatched_names = []

    for name, tensor in weights.items():
        rule, targets = find_rule(rules, name)
        if rule is None:
            unmatched_names.append(name)
            continue

        converted_tensors: Sequence[Tensor] = ()
        if rule.transform:
            converted_tensors = rule.transform(tensor, config)
        elif targets:
            # A fused projection [3 * D, ...] becomes equal parts [D, ...].
            converted_tensors = tensor.chunk(len(targets))
        for target, converted_weight in zip(targets, converted_tensors, strict=True):
            if converted_weight.numel():
                converted_weights[target] = converted_weight

    if unmatched_names:
        raise ConversionError(f"unexpected weights: {format_name_list(unmatched_names, 8)}")
    return converted_weights


def strip_encoder_name(weights: Weights, encoder_name: str | None) -> Weights:
    """Strip the name of the encoder from parameter names: one table then fits all classes.

    `encoder_name` is None if the model is an encoder; the names are then unchanged.
    """
    return {name.removeprefix(f"{encoder_name}."): weight for name, weight in weights.items()}


def revert_weights(weights: Weights, rules: Sequence[Rule], reference: Weights) -> Weights:
    """Convert a state dict from this package to the names and shapes of another project.

    `reference` is a state dict of the other project. Its parameters without a counterpart are
    omitted.
    """
    reverted_weights: Weights = {}
    used_names: set[str] = set()

    for name, reference_weight in reference.items():
        rule, targets = find_rule(rules, name)
        used_targets = [target for target in targets if target in weights]
        used_names.update(used_targets)
        if rule and used_targets:
            concatenated_weight = torch.cat(
                [weights[target] for target in used_targets], dim=rule.axis
            )
            reverted_weights[name] = concatenated_weight.reshape(reference_weight.shape)

    # A weight without a counterpart would be lost without an error, and the outputs would differ.
    if unused_names := sorted(weights.keys() - used_names):
        raise ConversionError(
            f"the target model has no counterparts of these weights: {format_name_list(unused_names, 8)}"
        )
    return reverted_weights


def find_rule(rules: Sequence[Rule], name: str) -> tuple[Rule | None, list[str]]:
    """Find the first rule that matches `name`, and its targets; (None, []) for no rule."""
    for rule in rules:
        if (targets := rule.match(name)) is not None:
            return rule, targets
    return None, []


# Models -------------------------------------------------------------------------------------------


def build_converted_model(
    config: ViTCLSConfig,
    weights: Weights,
    add_pooling_layer: bool = True,
    has_classifier: bool | None = None,
) -> ViTCLSPreTrainedModel:
    """Build a model in eval mode from converted weights, with their dtype and device.

    Args:
        weights: Encoder weights, named as in `ViTCLSModel`, and classifier weights.
        add_pooling_layer: Whether a `ViTCLSModel` has a pooler.
        has_classifier: Whether to build a `ViTCLSForImageClassification`. Default: whether
            `weights` contains classifier weights.

    Raises:
        ConversionError: If the weights do not match the model.
    """
    head_names = {name for name in weights if name.partition(".")[0].endswith("classifier")}
    kernel = weights["embeddings.patch_embeddings.projection.weight"]

    model: ViTCLSPreTrainedModel
    # All weights are replaced below, and `load_state_dict` would report a missing one.
    with no_init_weights():
        if has_classifier or (has_classifier is None and head_names):
            model = ViTCLSForImageClassification(config)
            weights = {
                name if name in head_names else f"vitcls.{name}": weight
                for name, weight in weights.items()
            }
        else:
            model = ViTCLSModel(config, add_pooling_layer=add_pooling_layer)

    # `to` is untyped in transformers
    model.to(device=kernel.device, dtype=kernel.dtype)  # type: ignore[call-arg]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        # Weights are missing, unexpected or of a different shape.
        raise ConversionError(format_error(error)) from None
    model.eval()
    return model
