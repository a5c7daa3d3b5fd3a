"""Which parameters are trained, by `--trainable`.

    full      all
    head      what answers: the classifiers, and a pooler that has parameters; not the final norm (linear probing)
    last-N    the last N layers, the final norm and the head
    lora      low-rank additions to queries and values (Hu et al. 2021, arXiv 2106.09685), special tokens and the head

A parameter that the checkpoint did not have would stay random if it was frozen, so it is trained in any case: a
distillation token that was just added, for one, with its position and its gate. What is frozen already stays so (the
mask token).
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..blocks_vitcls import EncoderLayer, ViTCLSEmbeddings
from ..modeling_vitcls import ViTCLSModel
from .costs import first_trained_layer


ENCODER = "vitcls."
POOLER = "vitcls.pooler."
LORA_TARGETS = r".*\.layers\.\d+\.attention\.[qv]_proj"  # not those of an attention pooler
LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


def apply_trainable(
    model: nn.Module, trainable: str, lora_rank: int = 8, fresh: Collection[str] = frozenset()
) -> nn.Module:
    """Freeze what is not trained, in place; with "lora", queries and values get additions. Returns the model.

    Args:
        model: a ViTCLS classifier, on one device.
        trainable: "full", "head", "last-N" or "lora".
        fresh: names of the parameters that no checkpoint filled.

    Raises:
        ValueError: for more layers than there are, an unknown choice, or "lora" without PEFT.
    """
    if trainable == "full":
        return model
    names = {name for name, _ in model.named_parameters()}
    chosen = {name for name in names if is_head(name)} | layers_of(model, trainable)
    if trainable == "lora":
        chosen |= special_tokens(model)
    chosen |= with_companions(model, set(fresh))
    chosen -= {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if trainable == "lora":
        add_lora(model, lora_rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen or ".lora_" in name)
    return model


def is_head(name: str) -> bool:
    """Whether a parameter stands behind the encoder."""
    return not name.startswith(ENCODER) or name.startswith(POOLER)


def layers_of(model: Any, trainable: str) -> set[str]:
    """Names of the parameters that "last-N" adds to the head; none for the other choices."""
    if trainable in ("head", "lora"):
        return set()
    found = re.fullmatch(r"last-([1-9]\d*)", trainable)
    if found is None:
        raise ValueError(f"unknown --trainable {trainable!r}: use full, head, lora, or last-N such as last-2")
    num_trained, num_layers = int(found[1]), len(model.vitcls.layers)
    if num_trained > num_layers:
        raise ValueError(f"--trainable is {trainable} and the model has {num_layers} layers: lower it, or set full")
    prefixes = [f"{ENCODER}layers.{index}." for index in range(num_layers - num_trained, num_layers)]
    prefixes.append(f"{ENCODER}layernorm.")
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))}


def special_tokens(model: Any) -> set[str]:
    """Names of the parameters that are special tokens."""
    tokens = {id(token) for token in model.vitcls.embeddings.get_special_tokens().values()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in tokens}


def with_companions(model: Any, fresh: set[str]) -> set[str]:
    """Fresh parameters, with the positions and the gates of fresh tokens."""
    tokens = model.vitcls.embeddings.get_special_tokens()
    names = {name for name, _ in model.named_parameters()}
    new_groups = [
        group
        for group, token in tokens.items()
        if any(parameter is token and name in fresh for name, parameter in model.named_parameters())
    ]
    companions = {f"{ENCODER}embeddings.position_embeddings.{group}" for group in new_groups}
    if new_groups:
        companions.add(f"{ENCODER}gates.gates")
    return names & (fresh | companions)


def set_training(model: nn.Module) -> None:
    """Train mode, but for embeddings and layers that are frozen as a whole: they drop nothing out, so that what is
    built on them sees what it will see later. Nor are patches left out where embeddings and first layer are frozen.
    In place of `model.train()`, for wrapped models too."""
    model.train()
    for module in model.modules():
        if isinstance(module, ViTCLSModel) and module.patch_dropout is not None:
            module.patch_dropout.train(drops_patches(module))
        if isinstance(module, ViTCLSEmbeddings | EncoderLayer):
            module.train(any(parameter.requires_grad for parameter in module.parameters()))


def drops_patches(encoder: ViTCLSModel) -> bool:
    """Whether training leaves patches out: where they are asked for, and something learns before them or right after
    them."""
    return encoder.config.patch_drop_rate > 0 and first_trained_layer(encoder) == 0


# LoRA ----------------------------------------------------------------------------------------------------------------


def add_lora(model: nn.Module, rank: int) -> None:
    """Put PEFT's layers in place of the projections, with a scaling of 1: W x becomes W x + B A x."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--trainable lora needs PEFT: pip install peft") from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), model)


def merged_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with LoRA's additions -> that of the plain model, W + B A; any other as it is.

    It takes whole tensors, from wherever they were gathered.
    """
    plain = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        if name.endswith(LORA_A):
            layer = name.removesuffix(LORA_A)
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + weights[f"{layer}{LORA_B}"] @ down
    return plain
