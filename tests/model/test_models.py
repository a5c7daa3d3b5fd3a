"""The model classes: shapes, blocks, saving, masked image modeling, backbone, errors.

Special tokens are tested in test_tokens.py, positions in test_positions.py, losses in
test_losses.py, precision and compilation in test_runtime.py, equality with other implementations in
test_exactness.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    BLOCKS,
    IMAGE_LABELS,
    IMAGES,
    TASKS,
    Kind,
    assert_same_outputs,
    build_images,
    build_random,
    build_tiny_config,
    each_kind,
    each_layout,
    get_largest_difference,
    raises_one_line,
)
from pytest import approx
from torch import nn
from torch.testing import assert_close

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields


# Shapes


@pytest.mark.parametrize("head_hidden_size", [None, 7])
def test_the_mlp_head_is_two_linear_layers_with_a_gelu_between(
    head_hidden_size: int | None,
) -> None:
    fields = {"head_type": "mlp", "head_hidden_size": head_hidden_size, "pooling": "cls_mean"}
    model = build_random(ViTCLSForImageClassification, **fields)
    first, activation, second = model.classifier

    assert first.in_features == 32
    assert first.out_features == (head_hidden_size or 16)
    assert second.out_features == 3
    assert isinstance(activation, nn.GELU)

    pooled = model.vitcls(IMAGES).pooler_output
    assert torch.equal(model(IMAGES).logits, second(nn.functional.gelu(first(pooled))))


def test_the_pooled_vector_is_normalized_before_the_pooled_layer() -> None:
    fields = {"pooling": "cls_mean", "pooled_norm": True, "pooled_activation": "tanh"}
    model = build_random(ViTCLSModel, **fields, layer_norm_eps=0.1)
    output = model(IMAGES)
    assert output.pooler_output.shape == (2, 32)
    pooler = model.pooler
    pooled = torch.cat([output.tokens["cls"][:, 0], output.tokens["patches"].mean(dim=1)], dim=-1)
    pooled = nn.functional.layer_norm(
        pooled, (32,), pooler.layernorm.weight, pooler.layernorm.bias, eps=0.1
    )
    assert_same_outputs(output.pooler_output, pooler.dense(pooled).tanh(), 1e-5)


# Block options


def test_norms_start_as_identities_biases_at_zero_and_other_weights_normal() -> None:
    """Other weights are normal with the configured standard deviation."""
    config = build_tiny_config(
        hidden_size=64,
        image_size=64,
        pooling="attention",
        qk_norm=True,
        pre_norm=True,
        relative_position_bias="layer",
        layer_scale_init_value=0.1,
        head_type="mlp",
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    model = ViTCLSForMaskedImageModeling(config), ViTCLSForImageClassification(config)
    seen = []

    for name, parameter in (pair for one in model for pair in one.named_parameters()):
        if name.endswith(("bias", "relative_position_bias.tables")):
            assert not parameter.any(), name
        elif "norm" in name or "layer_scale" in name:
            assert torch.equal(
                parameter, torch.full_like(parameter, 1 if "norm" in name else 0.1)
            ), name
        else:
            # standard error of the deviation of so many values
            tolerance = 4 * 0.05 / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == approx(0.05, abs=tolerance), name
            seen.append(name.split(".")[-1])
    assert {"cls_token", "mask_token", "cls", "patches", "probe", "weight"} == set(seen)


def test_a_new_differential_model_starts_as_in_the_paper_with_two_maps_per_head() -> None:
    """peers/test_from_timm.py compares differential attention with that of timm."""
    fields = {"attention_type": "differential", "attn_implementation": "eager"}
    model = ViTCLSModel(build_tiny_config(**fields))
    attention = model.layers[0].attention
    assert attention.lambda_full.item() == approx(0.8)
    assert attention.head_norm.weight.mean().item() == approx(0.2)
    maps = model(IMAGES, output_attentions=True).attentions[0]
    assert maps.shape == (2, 2 * model.config.num_attention_heads, 17, 17)


@pytest.mark.parametrize(
    ("model_class", "fields", "inputs"),
    [
        (ViTCLSForImageClassification, BLOCKS["tokens"], {"labels": torch.tensor([0, -100])}),
        *(
            (ViTCLSForImageClassification, fields, {"labels": IMAGE_LABELS})
            for fields in ({"use_mask_token": True}, {"pooled_layers": [1, -1]})
        ),
        (
            ViTCLSForMultiTaskClassification,
            {"num_cls_tokens": 2, "tasks": TASKS, "pooled_norm": True},
            {"labels": {"age": torch.tensor([0, 1])}},
        ),
        (
            ViTCLSForMaskedImageModeling,
            BLOCKS["tokens"],
            {"bool_masked_pos": torch.zeros(2, 16, dtype=torch.bool)},
        ),
        (
            ViTCLSForMaskedImageModeling,
            BLOCKS["attention_pooling"],
            {"bool_masked_pos": torch.ones(2, 16, dtype=torch.bool)},
        ),
    ],
    ids=[
        "two_heads",
        "unused_mask_token",
        "two_layers",
        "missing_task",
        "nothing_masked",
        "no_pooler",
    ],
)
def test_every_parameter_has_a_gradient_in_every_step(
    model_class: type, fields: Fields, inputs: dict[str, Any]
) -> None:
    """Otherwise, distributed training stops with an error about unused parameters."""
    model = build_random(model_class, **fields).train()
    model(IMAGES, **inputs).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_drop_path_increases_linearly_over_the_layers(tmp_path: Path) -> None:
    ViTCLSModel(build_tiny_config(num_hidden_layers=5, drop_path_rate=0.4)).save_pretrained(
        tmp_path
    )
    layers = ViTCLSModel.from_pretrained(tmp_path).layers  # built on the meta device
    rates = [getattr(layer.drop_path, "rate", 0.0) for layer in layers]
    assert rates == approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("layer_type", "num_kinds"), [("standard", 4), ("post", 4), ("parallel", 2)]
)
def test_drop_path_drops_whole_branches_of_single_images(layer_type: str, num_kinds: int) -> None:
    """In training, the last layer adds one scaled branch, both, or nothing to each image."""
    torch.manual_seed(0)
    model = build_random(ViTCLSModel, drop_path_rate=0.3, layer_type=layer_type).train()
    states = model(build_images(1).expand(400, -1, -1, -1), output_hidden_states=True).hidden_states

    # the first layer drops nothing
    assert_same_outputs(states[1], states[1][:1].expand_as(states[1]), 1e-6)

    change = (states[2] - states[1]).flatten(1)
    kinds = change.round(decimals=3).unique(dim=0)

    # neither, attention, MLP, both; parallel branches are dropped together
    assert len(kinds) == num_kinds

    untouched = (change.abs().amax(dim=1) < 1e-6).float().mean().item()
    assert untouched == approx(0.3 if layer_type == "parallel" else 0.3**2, abs=0.06)
    if layer_type == "standard":
        layer = model.layers[1]
        branch = layer.attention(layer.layernorm_before(states[1][:1]))[0] / 0.7
        assert any(get_largest_difference(kind, branch.flatten()) < 2e-3 for kind in kinds)


@pytest.mark.parametrize(
    "fields", [{}, {"layer_type": "post"}, {"layer_type": "parallel"}], ids=str
)
def test_dropout_is_on_the_embeddings_and_on_both_branches_of_each_layer(
    fields: Fields,
) -> None:
    torch.manual_seed(0)
    model = build_random(ViTCLSModel, hidden_dropout_prob=0.5, **fields).train()
    branches: list[torch.Tensor] = []
    for layer in model.layers:
        layer.dropout.register_forward_hook(lambda module, inputs, output: branches.append(output))
    embedded = model(IMAGES, output_hidden_states=True).hidden_states[0]
    assert len(branches) == 4
    assert all(branch.shape == embedded.shape for branch in branches)
    for dropped in (embedded, *branches):
        assert (dropped == 0).float().mean().item() == approx(0.5, abs=0.1)


# Masked image modeling


@each_layout
@pytest.mark.parametrize("size", [(16, 32), (24, 20)], ids=str)
def test_masked_image_modeling_reconstructs_each_patch_from_its_token(
    layout: Fields, size: tuple[int, int]
) -> None:
    model = build_random(ViTCLSForMaskedImageModeling, **layout, patch_size=[8, 4])
    images = build_images(2, *size)
    mask = torch.rand(2, (size[0] // 8) * (size[1] // 4)) < 0.5
    output = model(images, bool_masked_pos=mask)
    with raises_one_line(f"not {list(mask.shape)}"):
        model(images, bool_masked_pos=mask[:1])

    def place(patches: torch.Tensor) -> torch.Tensor:
        """Place the pixels of patches [B, N, 96] side by side."""
        return nn.functional.fold(patches.mT, size, kernel_size=(8, 4), stride=(8, 4))

    patches = model.vitcls(images, bool_masked_pos=mask).tokens["patches"]
    expected = place(model.decoder.projection(patches))
    assert get_largest_difference(output.reconstruction, expected) <= 1e-6
    is_masked = place(mask[..., None].expand(-1, -1, 96).float()).bool()
    assert_close(output.loss, (expected - images).abs()[is_masked].mean())


# Errors


@each_kind
def test_images_of_a_wrong_shape_are_errors(kind: Kind) -> None:
    model = kind.build()
    for shape in ((2, 32, 32, 1), (2, 7, 32, 3), (2, 32, 7, 3)):
        batch, height, width, channels = shape
        with raises_one_line("num_channels" if channels == 1 else f"{height} x {width}"):
            model(build_images(batch, height, width, channels))


def test_classes_require_the_fields_that_they_read() -> None:
    with raises_one_line("tasks"):
        ViTCLSForMultiTaskClassification(build_tiny_config())
    with raises_one_line("tasks", "ViTCLSForMultiTaskClassification"):
        ViTCLSForImageClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS))
    fields = {"num_cls_tokens": 0, "pooling": "mean", "reshape_hidden_states": False}
    with raises_one_line("reshape_hidden_states", "num_cls_tokens"):
        ViTCLSBackbone(build_tiny_config(**fields))


def test_wrong_inputs_are_errors() -> None:
    model = ViTCLSForImageClassification(build_tiny_config(num_labels=0))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pixel_values": build_images(0)}, "(0, 3, 32, 32)"),
        ({"pixel_values": IMAGES[0]}, "(3, 32, 32)"),
        ({"pixel_values": [0.5]}, "list"),
        ({"pixel_values": IMAGES, "labels": torch.tensor([0, 0])}, "num_labels"),
        ({"pixel_values": IMAGES, "bool_masked_pos": torch.ones(2, 16)}, "use_mask_token"),
    ]

    for inputs, word in cases:
        with raises_one_line(word):
            model(**inputs)


@each_kind
def test_an_unknown_argument_is_an_error(kind: Kind) -> None:
    with raises_one_line("pixel_value", error=TypeError):
        kind.build()(IMAGES, pixel_value=IMAGES)
