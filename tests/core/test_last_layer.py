"""Classifiers compute the last layer only for the tokens that they read; their outputs are the same."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    BLOCKS,
    assert_same_outputs,
    build_images,
    build_tiny_config,
    get_largest_difference,
    randomize,
    record_outputs,
)
from torch.nn.functional import cross_entropy

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.modeling_vitcls import get_num_output_tokens


TOKENS: dict[str, Any] = {"num_cls_tokens": 2, "num_distillation_tokens": 1, "num_register_tokens": 3}

# Fields, and the number of tokens that the classifiers read; None means all.
READ: dict[str, tuple[dict[str, Any], int | None]] = {
    "one CLS": ({}, 1),
    "one CLS, registers": ({"num_register_tokens": 3}, 1),
    "one layer": ({"num_hidden_layers": 1, "num_register_tokens": 3}, 1),
    "several of each": (TOKENS, 3),
    "no distillation head": (TOKENS | {"distillation_head": False}, 2),
    "only the distillation head answers": (TOKENS | {"distillation_inference": "distillation"}, 3),
    "concatenated": (TOKENS | {"cls_pooling": "concat"}, 3),
    "mean of CLS tokens": (TOKENS | {"cls_pooling": "mean"}, 3),
    "the second CLS": (TOKENS | {"pooled_cls_tokens": [1]}, 3),
    "pooled norm": (TOKENS | {"pooled_norm": True, "pooled_activation": "tanh"}, 3),
    "scopes": (TOKENS | {"cls_scopes": ["image", [2, 2, 0, 1]]}, 3),
    "gates": (TOKENS | {"gated_tokens": {"registers": 2}}, 3),
    "relative positions": (TOKENS | {"relative_position_bias": "layer"}, 3),
    "shared relative positions": (TOKENS | {"relative_position_bias": "shared", "gated_tokens": {"cls": 1}}, 3),
    "rotary": (TOKENS | {"position_embedding_type": "rope_2d"}, 3),
    "mixed rotary": (TOKENS | {"position_embedding_type": "rope_mixed"}, 3),
    "normalised queries": (TOKENS | {"qk_norm": True, "attention_norm": True, "mlp_norm": True}, 3),
    "differential": (TOKENS | {"attention_type": "differential"}, 3),
    "parallel": (TOKENS | {"layer_type": "parallel"}, 3),
    "post-norm": (TOKENS | {"layer_type": "post", "layer_scale_init_value": 1.0}, 3),
    "gated MLP": (TOKENS | {"mlp_type": "swiglu", "final_norm": False}, 3),
    "neurons moved before": (TOKENS | {"register_neurons": [[0, 3]]}, 3),
    "neurons moved in the last layer": (TOKENS | {"register_neurons": [[1, 3]]}, None),
    "mean": (TOKENS | {"pooling": "mean"}, None),
    "max": (TOKENS | {"pooling": "max"}, None),
    "CLS and mean": (TOKENS | {"pooling": "cls_mean"}, None),
    "attention pooling": (TOKENS | {"pooling": "attention"}, None),
}
each_config = pytest.mark.parametrize(("fields", "num_read"), READ.values(), ids=READ)

MASK = torch.ones(2, 6 + 16, dtype=torch.long)
MASK[1, 10:14] = 0


def compute_losses_and_gradients(model: Any, **inputs: Any) -> tuple[Any, list[torch.Tensor]]:
    """Return the outputs, and the gradients of a loss on both heads with respect to every parameter."""
    model.zero_grad()
    output = model(build_images(), **inputs)
    heads = [logits for logits in (output.cls_logits, output.distillation_logits) if logits is not None]
    torch.stack([cross_entropy(logits, torch.tensor([0, 2])) for logits in heads]).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)  # DDP waits for the gradients of all parameters
    return (output.logits, output.cls_logits, output.distillation_logits), gradients


@each_config
def test_outputs_and_gradients_equal_those_of_all_tokens(fields: dict[str, Any], num_read: int | None) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))
    assert get_num_output_tokens(model.vitcls, {}) == num_read
    masks = [None, MASK] if fields.items() >= TOKENS.items() else [None]
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        for mask in masks:
            outputs = record_outputs(model.vitcls.layers[-1])
            found = compute_losses_and_gradients(model, attention_mask=mask)
            wanted = compute_losses_and_gradients(model, attention_mask=mask, output_hidden_states=True)
            num_tokens = model.config.token_layout.num_prefix_tokens + 16
            assert [output.shape[1] for output in outputs] == [num_read or num_tokens, num_tokens]
            assert_same_outputs(found[0], wanted[0], 1e-5)
            for one, other in zip(found[1], wanted[1], strict=True):
                assert get_largest_difference(one, other) <= 1e-5 * max(1.0, other.abs().max().item())


@torch.no_grad()
def test_requested_hidden_states_contain_all_tokens() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**TOKENS)))
    encoded = model.vitcls(build_images())
    assert encoded.last_hidden_state.shape == (2, 22, 16)
    assert encoded.tokens["registers"].shape == (2, 3, 16) and encoded.tokens["patches"].shape == (2, 16, 16)
    hidden_states = model(build_images(), output_hidden_states=True).hidden_states
    assert get_largest_difference(model.vitcls.layernorm(hidden_states[-1]), encoded.last_hidden_state) <= 1e-6
    model.set_attn_implementation("eager")
    assert [each.shape for each in model(build_images(), output_attentions=True).attentions] == [(2, 2, 22, 22)] * 2
    model.config.output_hidden_states = True
    assert model(build_images()).hidden_states[-1].shape == (2, 22, 16)


@torch.no_grad()
def test_other_attention_implementations_receive_all_tokens() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**TOKENS)))
    expected, outputs = model(build_images()).logits, record_outputs(model.vitcls.layers[-1])
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        assert get_largest_difference(model(build_images()).logits, expected) <= 1e-5
    assert [output.shape[1] for output in outputs] == [22]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = randomize(ViTCLSForImageClassification(build_tiny_config(**TOKENS, **BLOCKS["rope"]))).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        outputs = record_outputs(model.vitcls.layers[-1])
        gradients.append(compute_losses_and_gradients(model)[1])
        # does not count the recomputation, which happens inside `forward`
        assert [output.shape[1] for output in outputs] == [3]
    assert_same_outputs(*gradients, 1e-6)


@torch.no_grad()
def test_other_image_sizes_and_batches_of_one() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**TOKENS, position_embedding_type="rope_mixed")))
    for size in ((24, 56), (8, 8)):
        found, wanted = (model(build_images(1, *size), output_hidden_states=whole).logits for whole in (False, True))
        assert get_largest_difference(found, wanted) <= 1e-6
