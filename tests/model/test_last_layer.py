"""The last layer of a classifier computes only the tokens that the heads read.

It computes all tokens if others can read them.
"""

import pickle
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    BLOCKS,
    IMAGE_LABELS,
    IMAGES,
    MASK,
    TASKS,
    TOKENS,
    assert_same_outputs,
    build_random,
    build_tiny_config,
    get_largest_difference,
    raises_one_line,
    record_outputs,
)
from torch import nn
from torch.nn.functional import cross_entropy

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields


pytestmark = pytest.mark.usefixtures("no_grad")

# Fields, and the number of tokens that the classifiers read; None means all.
NUM_READ = [
    ({"num_hidden_layers": 1, "num_register_tokens": 3}, 1),
    ({"position_embedding_type": "rope_2d"}, 1),
    (TOKENS, 3),
    (TOKENS | {"distillation_head": False, "cls_pooling": "concat", "mlp_type": "swiglu"}, 2),
    (TOKENS | BLOCKS["scopes"] | {"pooled_cls_tokens": [1]}, 3),
    (TOKENS | {"fading_tokens": {"registers": 2}, "relative_position_bias": "layer"}, 3),
    (TOKENS | {"position_embedding_type": "rope_mixed", "qk_norm": True}, 3),
    (TOKENS | {"pooled_layers": [-2, -1]}, 3),
    (TOKENS | {"attention_type": "differential", "layer_type": "parallel"}, 3),
    (TOKENS | {"layer_type": "post", "layer_scale_init_value": 1.0}, 3),
    (TOKENS | {"pooling": "cls_mean"}, None),
    (TOKENS | {"pooling": "attention"}, None),
]


def compute_losses_and_gradients(model: Any, **inputs: Any) -> tuple[Any, list[torch.Tensor]]:
    """Return the outputs, and the gradients of a loss on both heads for every parameter."""
    model.zero_grad()
    output = model(IMAGES, **inputs)
    heads = [
        logits for logits in (output.cls_logits, output.distillation_logits) if logits is not None
    ]
    torch.stack([cross_entropy(logits, IMAGE_LABELS) for logits in heads]).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    # DDP waits for the gradients of all parameters
    assert all(gradient is not None for gradient in gradients)
    return (output.logits, output.cls_logits, output.distillation_logits), gradients


@pytest.mark.parametrize(("fields", "num_read"), NUM_READ, ids=str)
@torch.enable_grad()
def test_outputs_and_gradients_equal_those_of_all_tokens(
    fields: Fields, num_read: int | None
) -> None:
    model = build_random(ViTCLSForImageClassification, **fields)

    num_tokens = model.config.token_layout.num_prefix_tokens + 16
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        for mask in (None, MASK) if fields.items() >= TOKENS.items() else (None,):
            found = compute_losses_and_gradients(model, attention_mask=mask)
            model.config.compute_all_tokens = True
            wanted = compute_losses_and_gradients(model, attention_mask=mask)
            assert count_computed_tokens(model, attention_mask=mask) == num_tokens
            model.config.compute_all_tokens = False
            assert count_computed_tokens(model, attention_mask=mask) == (num_read or num_tokens)
            assert_same_outputs(found[0], wanted[0], 1e-5)
            for one, other in zip(found[1], wanted[1], strict=True):
                limit = 1e-5 * max(1.0, other.abs().max().item())
                assert get_largest_difference(one, other) <= limit


@pytest.mark.parametrize(("pooling", "num_read"), [("cls", 2), ("cls_mean", 2 + 16)])
def test_only_the_tokens_that_the_tasks_read_are_computed(pooling: str, num_read: int) -> None:
    fields = {"num_cls_tokens": 2, "tasks": TASKS, "pooling": pooling}
    model = build_random(ViTCLSForMultiTaskClassification, **fields)
    assert count_computed_tokens(model) == num_read
    found = model(IMAGES).logits
    model.config.compute_all_tokens = True
    for task, expected in model(IMAGES).logits.items():
        assert get_largest_difference(found[task], expected) <= 1e-5 * expected.abs().max().item()


def count_computed_tokens(model: Any, **inputs: Any) -> int:
    """Return the number of tokens that the last layer returns, without a hook on it."""
    last_layer = model.vitcls.layers[-1]
    layer_class = type(last_layer)
    counts = []

    def count(layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = layer_class.forward(layer, *args, **kwargs)
        counts.append(output.shape[1])
        return output

    last_layer.__class__ = type(layer_class.__name__, (layer_class,), {"forward": count})
    model(IMAGES, **inputs)
    last_layer.__class__ = layer_class
    return counts[0]


@pytest.mark.parametrize("output", ["output_hidden_states", "output_attentions"])
def test_requested_outputs_contain_all_tokens(output: str) -> None:
    config = build_tiny_config(**TOKENS)
    config._attn_implementation = "eager"
    model = ViTCLSForImageClassification(config)
    assert count_computed_tokens(model, **{output: True}) == 22
    setattr(model.config, output, True)
    assert count_computed_tokens(model) == 22


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_other_attention_implementations_require_all_tokens(implementation: str) -> None:
    config = build_tiny_config(**TOKENS)
    config._attn_implementation = implementation
    assert not config.can_trim_last_layer


@pytest.mark.parametrize("pooling", ["mean", "max", "cls_mean", "attention"])
def test_another_pooling_set_in_the_configuration_leaves_the_logits(pooling: str) -> None:
    """The pooler was built for the first one, so the last layer must compute what it reads."""
    model = build_random(ViTCLSForImageClassification, pooling=pooling)
    expected = model(IMAGES).logits
    model.config.pooling = "cls"
    assert torch.equal(model(IMAGES).logits, expected)


# Hooks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mlp_type": "swiglu", "mlp_norm": True, "attention_norm": True},
        {"layer_type": "parallel"},
    ],
    ids=str,
)
@torch.enable_grad()
def test_hooks_receive_all_tokens(fields: Fields) -> None:
    """Forward and backward hooks on the last layer and each of its modules."""
    model = build_random(ViTCLSForImageClassification, **TOKENS, **fields)
    counts: list[int] = []

    def see(module: Any, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        counts.extend(
            tensor.shape[1]
            for tensor in tensors
            if isinstance(tensor, torch.Tensor) and tensor.ndim >= 3
        )

    modules = [model.vitcls, model.vitcls.layernorm, *model.vitcls.layers[-1].modules()]
    for module in modules:
        module.register_forward_hook(see)
        module.register_full_backward_hook(see)
    model(IMAGES).logits.sum().backward()
    assert set(counts) == {22}
    assert len(counts) >= len(modules)


class Logged(nn.Module):
    """A wrapper around a layer, which reads its output."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.num_tokens = 0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = self.layer(*args, **kwargs)
        self.num_tokens = output.shape[1]
        return output


def test_a_global_hook_a_patched_forward_and_a_wrapped_layer_see_all_tokens() -> None:
    model = build_random(ViTCLSForImageClassification, **TOKENS)
    expected = model(IMAGES).logits
    last_layer = model.vitcls.layers[-1]
    seen: list[int] = []

    def see(module: Any, inputs: Any, output: Any) -> None:
        if module is last_layer:
            seen.append(output.shape[1])

    handle = nn.modules.module.register_module_forward_hook(see)
    model(IMAGES)
    handle.remove()

    outputs = record_outputs(last_layer)
    model(IMAGES)
    del last_layer.forward
    assert seen == [outputs[0].shape[1]] == [22]

    logged = Logged(last_layer)
    model.vitcls.layers[-1] = logged
    assert_same_outputs(model(IMAGES).logits, expected, 1e-5)
    assert logged.num_tokens == 22


@pytest.mark.parametrize("pooled_layers", [None, [-2, -1]])
def test_a_model_with_fewer_layers_reads_the_last_ones(pooled_layers: list[int] | None) -> None:
    fields = TOKENS | {"num_hidden_layers": 3, "pooled_layers": pooled_layers}
    model = build_random(ViTCLSForImageClassification, **fields)
    short = build_random(ViTCLSForImageClassification, **fields | {"num_hidden_layers": 2})
    short.load_state_dict(model.state_dict(), strict=False)
    model.vitcls.layers = model.vitcls.layers[:2]
    assert torch.equal(model(IMAGES).logits, short(IMAGES).logits)


def test_a_head_of_a_layer_that_was_removed_is_an_error() -> None:
    model = ViTCLSForImageClassification(build_tiny_config(num_hidden_layers=3, pooled_layers=[3]))
    model.vitcls.layers = model.vitcls.layers[:2]
    with pytest.raises(ValueError, match="the heads read layer 3, but the model has 2 layers"):
        model(IMAGES)


def test_a_backbone_with_fewer_layers_has_the_maps_of_these_layers() -> None:
    backbone = build_random(ViTCLSBackbone, num_hidden_layers=3, out_features=["stage1"])
    (expected,) = backbone(IMAGES).feature_maps
    backbone.layers = backbone.layers[:2]
    assert torch.equal(backbone(IMAGES).feature_maps[0], expected)
    backbone.out_features = ["stage1", "stage3"]
    with raises_one_line("stage3", "2 layers"):
        backbone(IMAGES)


def test_an_output_with_all_tokens_of_the_last_layer_can_be_pickled() -> None:
    model = build_random(ViTCLSModel)
    expected = model(IMAGES, num_output_tokens=1, output_layers=[-1])
    assert expected.last_hidden_state.shape[1] == 1
    loaded = pickle.loads(pickle.dumps(expected))
    assert torch.equal(loaded.layer_tokens[-1], model(IMAGES).last_hidden_state)
