"""The special tokens: order, initialization, training, attention, and the heads' inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    IMAGE_LABELS,
    IMAGES,
    LAYOUTS,
    PARAMETERS,
    assert_same_outputs,
    build_images,
    build_random,
    build_tiny_config,
    each_layout,
    get_largest_difference,
    raises_one_line,
    randomize,
)
from pytest import approx

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.training.options import parse_cls_scopes


# Layout


@each_layout
def test_embeddings_follow_the_layout(layout: Fields) -> None:
    """Each group of rows is its own parameter; the patches are the projection."""
    config = build_tiny_config(**layout, position_embedding_type="none")
    embeddings = randomize(ViTCLSModel(config)).embeddings
    sequence = embeddings(IMAGES, (4, 4))

    assert sequence.shape == (2, config.token_layout.num_prefix_tokens + 16, 16)

    for name, group in config.token_layout.items():
        if name == "patches":
            expected = embeddings.patch_embeddings.projection(IMAGES).flatten(2).transpose(1, 2)
        elif group.stop > group.start:
            expected = getattr(embeddings, PARAMETERS[name]).expand(2, -1, -1)
        else:
            assert getattr(embeddings, PARAMETERS[name]) is None
            continue
        assert torch.equal(sequence[:, group], expected)


# Initialization and learning


@pytest.mark.parametrize(("token_init", "std"), [("trunc_normal", 0.02), ("near_zero", 1e-6)])
def test_random_token_inits_have_their_standard_deviation(token_init: str, std: float) -> None:
    counts = {"num_cls_tokens": 40, "num_distillation_tokens": 40, "num_register_tokens": 40}
    embeddings = ViTCLSModel(
        build_tiny_config(**counts, token_init=token_init, hidden_size=64)
    ).embeddings
    for parameter in PARAMETERS.values():
        tokens = getattr(embeddings, parameter)
        assert tokens.std().item() == approx(std, rel=0.1)
        assert abs(tokens.mean().item()) < std / 10


@pytest.mark.parametrize(
    ("layout", "token_init"),
    [
        (LAYOUTS["several_of_each"], "trunc_normal"),
        (LAYOUTS["several_of_each"], "near_zero"),
        ({}, "zeros"),
    ],
    ids=str,
)
def test_every_special_token_gets_gradient(layout: Fields, token_init: str) -> None:
    torch.manual_seed(0)
    model = ViTCLSForImageClassification(build_tiny_config(**layout, token_init=token_init)).train()
    model(IMAGES, labels=IMAGE_LABELS).loss.backward()
    for name in PARAMETERS.values():
        token = getattr(model.vitcls.embeddings, name)
        assert token is None or (token.grad.norm(dim=-1) > 0).all(), name


# Pooling: the head reads only the tokens of its pooling


def _mean_of_patches(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    return tokens["patches"].mean(dim=1)


# Name -> fields, and the pooled vector as a function of the tokens.
POOLED = {
    "cls": ({}, lambda tokens: tokens["cls"][:, 0]),
    "first": (
        {"num_cls_tokens": 3, "cls_pooling": "first"},
        lambda tokens: tokens["cls"][:, 0],
    ),
    "mean_of_cls": (
        {"num_cls_tokens": 3},
        lambda tokens: sum(tokens["cls"].unbind(1)) / 3,
    ),
    "selected_cls": (
        {"num_cls_tokens": 3, "cls_pooling": "concat", "pooled_cls_tokens": [2, 0]},
        lambda tokens: torch.cat([tokens["cls"][:, 2], tokens["cls"][:, 0]], dim=-1),
    ),
    "mean": ({"pooling": "mean"}, _mean_of_patches),
    "max": ({"pooling": "max"}, lambda tokens: tokens["patches"].max(dim=1).values),
    "cls_mean": (
        {"pooling": "cls_mean", "num_cls_tokens": 2, "cls_pooling": "concat"},
        lambda tokens: torch.cat([*tokens["cls"].unbind(1), _mean_of_patches(tokens)], dim=-1),
    ),
}


@pytest.mark.parametrize(("fields", "expected"), POOLED.values(), ids=POOLED)
def test_both_heads_read_only_their_tokens(fields: Fields, expected: Callable) -> None:
    config = build_tiny_config(**fields, num_register_tokens=2, num_distillation_tokens=2)
    model = randomize(ViTCLSForImageClassification(config))
    encoded = model.vitcls(IMAGES)
    output = model(IMAGES)
    assert encoded.pooler_output.shape == (2, config.pooled_size)
    assert get_largest_difference(encoded.pooler_output, expected(encoded.tokens)) < 1e-6
    assert get_largest_difference(output.cls_logits, model.classifier(encoded.pooler_output)) < 1e-6
    distilled = model.distillation_classifier(encoded.tokens["distillation"].mean(dim=1))
    assert get_largest_difference(output.distillation_logits, distilled) < 1e-6


# Scopes: the part of the image to which each CLS token attends

QUADRANTS = parse_cls_scopes(["2x2"])


def _build_scoped_model(attention: str = "sdpa", **fields: Any) -> ViTCLSModel:
    """Return a model with six CLS tokens: two without a scope, and one per quadrant."""
    config = build_tiny_config(
        **{
            "num_cls_tokens": 6,
            "cls_scopes": ["image", *QUADRANTS, [1, 1, 0, 0]],
            "num_register_tokens": 2,
            "num_hidden_layers": 1,
            **fields,
        }
    )
    model = randomize(ViTCLSModel(config))
    model.set_attn_implementation(attention)
    return model


def _get_receptive_field(model: ViTCLSModel, index: int, **inputs: Any) -> torch.Tensor:
    """Return a boolean mask [H, W] of the pixels that the token at `index` depends on."""
    pixels = build_images(1, **inputs.pop("size", {})).requires_grad_()
    model(pixels, **inputs).last_hidden_state[0, index].sum().backward()
    return (pixels.grad[0] != 0).any(dim=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_scoped_cls_token_depends_only_on_its_part(attention: str) -> None:
    model = _build_scoped_model(attention)
    for index, (_, _, row, column) in enumerate(QUADRANTS, start=1):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = True
        assert torch.equal(_get_receptive_field(model, index), inside)
    whole = torch.ones(32, 32, dtype=torch.bool)
    for index in (0, 5, 6, 7, 8, 20):  # CLS tokens without a scope, registers, patches
        assert torch.equal(_get_receptive_field(model, index), whole)


def test_scopes_are_applied_with_an_attention_mask() -> None:
    """A masked patch is masked for all tokens, inside or outside of their scopes."""
    model = _build_scoped_model()
    mask = torch.ones(1, 8 + 16, dtype=torch.long)
    mask[0, 8 + 0] = 0  # the patch at row 0, column 0
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[:16, :16] = True
    inside[:8, :8] = False
    assert torch.equal(_get_receptive_field(model, 1, attention_mask=mask), inside)
    whole = torch.ones(32, 32, dtype=torch.bool)
    whole[:8, :8] = False
    assert torch.equal(_get_receptive_field(model, 0, attention_mask=mask), whole)


def test_a_4d_mask_is_used_without_changes() -> None:
    model = build_random(ViTCLSModel)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[:, -1] = 0
    full_mask = mask.bool()[:, None, None].expand(2, 1, 17, 17)
    outputs = [model(IMAGES, attention_mask=each).last_hidden_state for each in (mask, full_mask)]
    assert_same_outputs(*outputs, 1e-6)
    assert get_largest_difference(outputs[0], model(IMAGES).last_hidden_state) > 1e-3


def test_cells_cover_an_uneven_grid_without_gap_or_overlap() -> None:
    scopes = parse_cls_scopes(["2x3"])
    model = _build_scoped_model(image_size=[40, 56], cls_scopes=scopes)  # 5 x 7 patches
    for size in ({"height": 40, "width": 56}, {"height": 24, "width": 88}):
        seen = sum(_get_receptive_field(model, index, size=size).int() for index in range(6))
        assert (seen == 1).all()


@pytest.mark.parametrize(
    ("attention", "size", "mask", "words"),
    [
        # other models use a 4D mask without changes, which would disable the scopes
        ("sdpa", (32, 32), torch.ones(1, 1, 24, 24), ("4-dimensional attention_mask",)),
        ("sdpa", (8, 32), None, ("2 x 2", "1 x 4")),
        ("flash_attention_2", (32, 32), None, ("flash_attention_2", "sdpa")),
        # a function of a person, to which transformers passes no mask
        ("my_attention", (32, 32), None, ("my_attention", "sdpa")),
    ],
    ids=["4D mask", "too few patches", "attention without masks", "own attention"],
)
def test_scopes_that_cannot_be_applied_are_errors(
    attention: str, size: tuple[int, int], mask: torch.Tensor | None, words: tuple[str, ...]
) -> None:
    model = _build_scoped_model()
    model.config._attn_implementation = attention
    with raises_one_line("cls_scopes", *words):
        model(build_images(1, *size), attention_mask=mask)


# Attention masks of the caller


@pytest.mark.parametrize("scopes", [None, ["image"]], ids=str)
@pytest.mark.parametrize("shape", [(2, 18), (2, 1, 17)], ids=str)
def test_masks_of_a_wrong_shape_are_errors(scopes: list | None, shape: tuple[int, ...]) -> None:
    model = build_random(ViTCLSModel, cls_scopes=scopes)
    mask = torch.ones(shape, dtype=torch.long)
    mask[..., -1] = 0
    with raises_one_line("attention_mask", "17"):
        model(IMAGES, attention_mask=mask)
