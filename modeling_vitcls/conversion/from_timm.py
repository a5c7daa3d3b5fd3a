"""Exact rewritings of timm's weights that the rules, one parameter at a time, cannot do.

    parallel branches       n attentions and n MLPs side by side -> one of each, n times as wide
    differential attention  the vectors that make the share of the second map -> that share
    interleaved rotary      turning channels (0, 1), (2, 3), ... -> (0, half), (1, half + 1), ...

The first two give timm's names again, for timm_tables.py to translate; the last is applied to ours.

timm's ViTs -> ours: `VisionTransformer`, `VisionTransformerDistilled` (DeiT) and `Eva` (EVA, PE, DINOv3, ...).

    model = convert_from_timm(timm.create_model("vit_base_patch16_clip_224.openai", pretrained=True))

Modules are read in timm_modules.py, names translated by timm_tables.py, odd blocks rewritten in from_timm.py.
"""

import re
from collections.abc import Sequence

import torch
from torch import nn

from ..configuration_vitcls import ViTCLSConfig
from ..modeling_vitcls import ViTCLSPreTrainedModel
from .head_transfer import ClassifierChoice, assemble, split_classifier
from .timm_modules import TimmModule, class_name, has_pooler, read_model
from .timm_tables import rules_for
from .weight_rules import ConversionError, convert_weights


Weights = dict[str, torch.Tensor]


def rewritten_state_dict(model: TimmModule) -> Weights:
    """The model's state dict with odd blocks rewritten as ordinary ones."""
    weights = dict(model.state_dict())
    for index, block in enumerate(model.blocks):
        prefix = f"blocks.{index}."
        if class_name(block) == "ParallelThingsBlock":
            merge_branches(weights, prefix, len(block.attns))
        attention, name = (block.attn, f"{prefix}attn.") if hasattr(block, "attn") else (block, prefix)
        if hasattr(attention, "lambda_init"):
            settle_differential(weights, name, attention.lambda_init)
    return weights


def merge_branches(weights: Weights, prefix: str, branches: int) -> None:
    """Rewrite `attns.j` and `ffns.j` of a block as one attention and one MLP (arXiv 2203.09795, section 3).

    Norms see the same tokens, so that their scales and biases move into the projections behind them; LayerScale moves
    into the projections before it. The sum of the branches is then one product over all their heads and neurons.
    """
    attentions = [take_branch(weights, f"{prefix}attns.{index}.") for index in range(branches)]
    mlps = [take_branch(weights, f"{prefix}ffns.{index}.") for index in range(branches)]
    queries_keys_values = [behind_norm(branch, "attn.qkv") for branch in attentions]
    neurons = [behind_norm(branch, "mlp.fc1") for branch in mlps]
    for part, letter in enumerate("qkv"):
        thirds = [{kind: fused[kind].chunk(3)[part] for kind in fused} for fused in queries_keys_values]
        add_stacked(weights, f"{prefix}attn.{letter}_proj", thirds)
    add_stacked(weights, f"{prefix}mlp.fc1", neurons)
    add_summed(weights, f"{prefix}attn.proj", [before_scale(branch, "attn.proj") for branch in attentions])
    add_summed(weights, f"{prefix}mlp.fc2", [before_scale(branch, "mlp.fc2") for branch in mlps])
    for name, branch in (("norm1", attentions[0]), ("norm2", mlps[0])):
        weights[f"{prefix}{name}.weight"] = torch.ones_like(branch["norm.weight"])
        if "norm.bias" in branch:
            weights[f"{prefix}{name}.bias"] = torch.zeros_like(branch["norm.bias"])


def take_branch(weights: Weights, prefix: str) -> Weights:
    """Move one branch out of the state dict, with short names and a bias in every layer."""
    branch = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        if f"{layer}.weight" in branch and f"{layer}.bias" not in branch:
            branch[f"{layer}.bias"] = torch.zeros_like(branch[f"{layer}.weight"][:, 0])
    return branch


def behind_norm(branch: Weights, layer: str) -> Weights:
    """Weight and bias of a layer that takes in the scale and bias of the norm before it; summed in float64."""
    weight, bias = branch[f"{layer}.weight"], branch[f"{layer}.bias"].double()
    if "norm.bias" in branch:
        bias = bias + weight.double() @ branch["norm.bias"].double()
    return {"weight": weight * branch["norm.weight"], "bias": bias.to(weight.dtype)}


def before_scale(branch: Weights, layer: str) -> Weights:
    """Weight and bias of a layer that takes in the LayerScale behind it."""
    weight, bias = branch[f"{layer}.weight"], branch[f"{layer}.bias"]
    scale = branch.get("ls.gamma", torch.ones_like(bias))
    return {"weight": scale[:, None] * weight, "bias": scale * bias}


def add_stacked(weights: Weights, name: str, layers: Sequence[Weights]) -> None:
    """One layer that gives the outputs of all."""
    for kind in ("weight", "bias"):
        weights[f"{name}.{kind}"] = torch.cat([layer[kind] for layer in layers])


def add_summed(weights: Weights, name: str, layers: Sequence[Weights]) -> None:
    """One layer that takes the inputs of all and gives the sum of their outputs."""
    weights[f"{name}.weight"] = torch.cat([layer["weight"] for layer in layers], dim=1)
    weights[f"{name}.bias"] = torch.stack([layer["bias"] for layer in layers]).sum(dim=0)


def settle_differential(weights: Weights, prefix: str, lambda_init: float) -> None:
    """Replace the vectors (or two numbers) behind the share of the second attention map by the share itself."""
    if f"{prefix}lambda_a" in weights:
        first, second = (weights.pop(f"{prefix}lambda_{letter}").reshape(1).double() for letter in "ab")
    else:
        products = [weights.pop(f"{prefix}lambda_q{n}") * weights.pop(f"{prefix}lambda_k{n}") for n in "12"]
        first, second = (product.double().sum().reshape(1) for product in products)
    scale = weights[f"{prefix}sub_norm.weight"]
    weights[f"{prefix}second_share"] = (first.exp() - second.exp() + lambda_init).to(scale.dtype)
    weights[f"{prefix}sub_norm.weight"] = scale * (1 - lambda_init)


def turns_interleaved_channels(model: TimmModule) -> bool:
    """Whether rotary positions rotate neighboring channels."""
    is_rotary = getattr(model, "rope", None) is not None
    return is_rotary and not getattr(model.blocks[0].attn, "rotate_half", False)


def to_half_layout(weights: Weights, config: ViTCLSConfig) -> Weights:
    """Reorder the channels of queries and keys within each head, in our weights: even ones first, then odd ones.

    Their products, and so attention, stay the same; each pair that turns together is now half a head apart.
    """
    order = torch.arange(config.head_dim).view(-1, 2).T.flatten()

    def reorder(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if re.fullmatch(r"layers\.\d+\.attention\.[qk]_(proj|norm)\.(weight|bias)", name):
            return tensor.unflatten(0, (-1, config.head_dim))[:, order.to(tensor.device)].flatten(0, 1)
        return tensor

    return {name: reorder(name, tensor) for name, tensor in weights.items()}


CLASSES = ("VisionTransformer", "VisionTransformerDistilled", "Eva")


def convert_from_timm(
    model: nn.Module, *, classifier: ClassifierChoice = "keep", num_labels: int | None = None
) -> ViTCLSPreTrainedModel:
    """Take over a ViT of timm: same outputs, same dtype and device, in eval mode; the source stays as it is.

    With a classifier it becomes `ViTCLSForImageClassification`; without (`num_classes=0`) `ViTCLSModel`, whose
    `pooler_output` is what timm's model returns. Images of other sizes are taken as after `set_input_size`.

    Args:
        classifier: "keep" the source's, start a "new" one, or "drop" it (`ViTCLSModel`).
        num_labels: of a new classifier.

    Raises:
        ConversionError: for another class, a feature that ours lacks, which is named, or a choice of classifier that
            does not fit the source.
    """
    if class_name(model) not in CLASSES or not type(model).__module__.startswith("timm."):
        raise ConversionError(f"{class_name(model)} is none of timm's {', '.join(CLASSES)}: it cannot be converted")
    try:
        config = ViTCLSConfig(**read_model(model))
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(str(error)) from None
    weights = convert_weights(rewritten_state_dict(model), rules_for(model), config)
    if turns_interleaved_channels(model):
        weights = to_half_layout(weights, config)
    encoder, head = split_classifier(weights)
    return assemble(config, encoder, head, classifier, num_labels, with_pooler=has_pooler(model))
