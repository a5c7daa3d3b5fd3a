"""Separate weights for special tokens: their formula, and copies that change no bit.

Compilation, export, FSDP2, token attention and remote code are tested with the other options of
layers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adaptation_cases import get_logged_lines
from helpers.tiny_models import (
    assert_same_outputs,
    build_images,
    build_tiny_config,
    get_largest_difference,
    randomize,
    save_and_load,
)
from torch.nn.functional import gelu, layer_norm, linear
from transformers import AutoModelForImageClassification

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel


SPECIALIZED = {"norm": [0, 1], "qkv": [1]}
MODELS: dict[str, dict[str, Any]] = {
    "cls": {},
    "all tokens": {"num_cls_tokens": 2, "num_distillation_tokens": 1, "num_register_tokens": 4},
    "registers only": {"num_cls_tokens": 0, "num_register_tokens": 2, "pooling": "mean"},
    "rotary": {
        "num_register_tokens": 2,
        "position_embedding_type": "rope_mixed",
        "qk_norm": True,
        "key_bias": False,
    },
    "post-norm": {"layer_type": "post", "norm_type": "rmsnorm", "cls_scopes": [[2, 2, 0, 1]]},
    "parallel": {
        "layer_type": "parallel",
        "attention_type": "differential",
        "num_register_tokens": 1,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_copied_weights_change_no_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))
    model.save_pretrained(tmp_path)
    adapted = model.adapt(specialized_layers=SPECIALIZED)
    loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path, specialized_layers=SPECIALIZED
    )

    assert adapted.config.specialized_layers == loaded.config.specialized_layers == SPECIALIZED
    assert_same_outputs(loaded.state_dict(), adapted.state_dict())

    models = (model, adapted, adapted.adapt(specialized_layers={"norm": [1], "qkv": [0, 1]}))
    for dtype in (torch.float32, torch.bfloat16):
        for size in ((32, 32), (24, 56)):
            images = build_images(3, *size)
            expected, *found = (
                each.to(dtype)(images, output_hidden_states=True) for each in models
            )
            for outputs in found:
                assert_same_outputs(outputs, expected)  # a difference of exactly 0


@torch.no_grad()
def test_special_tokens_and_patches_use_their_own_weights() -> None:
    """Compare with the formula of a layer, written out for the two kinds of tokens."""
    fields = {"num_distillation_tokens": 1, "num_register_tokens": 2, "layer_norm_eps": 0.1}
    model = randomize(
        ViTCLSModel(build_tiny_config(**fields, specialized_layers={"norm": [0], "qkv": [0]}))
    )
    weights = model.state_dict()

    def apply(function: Any, states: torch.Tensor, name: str, *arguments: Any) -> torch.Tensor:
        parts = zip(states.tensor_split([4], dim=1), ("special_tokens", "patches"), strict=True)
        outputs = []
        for tokens, part in parts:
            weight, bias = (
                weights[f"layers.0.{name}.{part}.{kind}"] for kind in ("weight", "bias")
            )
            outputs.append(function(tokens, *arguments, weight, bias))
        return torch.cat(outputs, dim=1)

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        return apply(
            lambda tokens, *values: layer_norm(tokens, (16,), *values, eps=0.1), states, name
        )

    layer = model.layers[0]
    states, expected = model(build_images(), output_hidden_states=True).hidden_states[:2]
    normalized = norm(states, "layernorm_before")
    query, key, value = (
        apply(linear, normalized, f"attention.{name}_proj").unflatten(-1, (2, 8)).transpose(1, 2)
        for name in "qkv"
    )
    mixed = (query @ key.mT / 8**0.5).softmax(dim=-1) @ value
    states = states + layer.attention.o_proj(mixed.transpose(1, 2).flatten(2))
    found = states + layer.mlp.fc2(gelu(layer.mlp.fc1(norm(states, "layernorm_after"))))
    assert get_largest_difference(found, expected) <= 1e-5


def test_both_sets_of_weights_learn_from_their_own_tokens() -> None:
    config = build_tiny_config(num_register_tokens=2, specialized_layers=SPECIALIZED)
    module = randomize(ViTCLSModel(config)).layers[1].attention.q_proj
    states = torch.randn(2, 3 + 16, 16, generator=torch.Generator().manual_seed(0))

    for part, tokens in (("special_tokens", slice(3)), ("patches", slice(3, None))):
        module.zero_grad()
        module(states)[:, tokens].sum().backward()
        for name, child in module.named_children():
            expected = (
                states[:, tokens].sum(dim=(0, 1)).expand(16, -1)
                if name == part
                else torch.zeros(16, 16)
            )
            assert get_largest_difference(child.weight.grad, expected) <= 1e-5


@torch.no_grad()
def test_specialized_layers_are_saved_and_removing_them_keeps_the_patch_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomize(
        ViTCLSForImageClassification(build_tiny_config(specialized_layers=SPECIALIZED))
    )

    assert_same_outputs(save_and_load(model, tmp_path)(build_images()), model(build_images()))

    caplog.clear()
    shared = model.adapt(specialized_layers=None)

    assert torch.equal(
        shared.vitcls.layers[1].attention.q_proj.weight,
        model.vitcls.layers[1].attention.q_proj.patches.weight,
    )

    lines = get_logged_lines(caplog)
    assert all(".special_tokens." in line for line in lines[:-1])
    assert lines[-1].startswith("specialized_layers: ")


def test_frozen_weights_stay_frozen() -> None:
    model = ViTCLSForImageClassification(build_tiny_config()).requires_grad_(False)
    assert not any(
        weight.requires_grad for weight in model.adapt(specialized_layers=SPECIALIZED).parameters()
    )
