"""`token_attention`: the special tokens' rows of eager attention maps."""

import itertools
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    BLOCKS,
    IMAGES,
    LAYOUTS,
    MASK,
    TOKENS,
    Kind,
    assert_no_recording,
    assert_same_outputs,
    build_images,
    build_random,
    each_kind,
    get_largest_difference,
    raises_one_line,
)
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.model.attention_masks_vitcls import record_attention


pytestmark = pytest.mark.usefixtures("no_grad")

# Fields that change attention scores or masks.
ATTENTIONS = {
    "scopes": BLOCKS["scopes"],
    "fading": {"fading_tokens": {"registers": 2}},
    "scopes and fading": {"cls_scopes": [[2, 1, 1, 0], "image"], "fading_tokens": {"cls": 1}},
    "rotary": {"position_embedding_type": "rope_2d"},
    "mixed rotary": {"position_embedding_type": "rope_mixed"},
    "normalised queries": {"qk_norm": True},
    "relative positions": {"relative_position_bias": "layer"},
    "shared relative positions": {
        "relative_position_bias": "shared",
        "fading_tokens": {"registers": 1},
    },
    "differential": {"attention_type": "differential"},
    "parallel": {"layer_type": "parallel"},
    "post-norm": {"layer_type": "post", "attention_head_size": 12},
}


def run_eager(model: Any, pixels: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the special tokens' rows of the full maps, [batch, layer, head, token, key].

    The second value is the first output of the model; for an encoder, its last hidden states.
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    outputs = model(pixels, output_attentions=True, **inputs)
    model.set_attn_implementation(implementation)
    maps = torch.stack(outputs.attentions, dim=1)
    return maps[..., : model.config.token_layout.num_prefix_tokens, :], outputs[0]


@pytest.mark.parametrize(
    ("fields", "implementation"),
    [
        *((TOKENS | fields, "sdpa") for fields in ATTENTIONS.values()),
        *itertools.product(
            [
                *LAYOUTS.values(),
                TOKENS | ATTENTIONS["scopes"],
                TOKENS | ATTENTIONS["rotary"] | ATTENTIONS["normalised queries"],
                TOKENS | ATTENTIONS["differential"] | ATTENTIONS["normalised queries"],
            ],
            ["eager", "flex_attention", "sdpa"],
        ),
    ],
    ids=str,
)
def test_every_layout_and_attention_equals_eager_attention(
    fields: Fields, implementation: str
) -> None:
    model = build_random(ViTCLSModel, **fields)
    model.set_attn_implementation(implementation)
    num_special = model.config.token_layout.num_prefix_tokens
    for height, width in ((32, 32), (24, 56)):
        pixels = build_images(2, height, width)
        is_visible = torch.ones(2, num_special + height * width // 64, dtype=torch.long)
        is_visible[1, -12:-8] = 0
        for mask in (None, is_visible):
            with torch.compiler.set_stance(
                "force_eager"
            ):  # Compiling flex attention takes 50 CPU s
                rows = model.token_attention(pixels, attention_mask=mask)
                states = model(pixels, attention_mask=mask).last_hidden_state
            eager_rows, eager_states = run_eager(model, pixels, attention_mask=mask)
            assert rows.shape[-2:] == (num_special, is_visible.shape[1])
            assert_same_outputs(rows, eager_rows, 1e-5)
            assert get_largest_difference(states, eager_states) <= 1e-5
            assert get_largest_difference(rows.sum(-1), torch.ones(rows.shape[:-1])) <= 1e-5


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize(
    "fields", [{}, {"position_embedding_type": "rope_2d"}], ids=["learned", "rotary"]
)
def test_padding_masks_of_flash_attention_equal_eager_attention(fields: Fields) -> None:
    """The model and its token attention mask the same tokens as eager attention."""
    model = build_random(ViTCLSModel, **TOKENS | fields)
    eager, states = run_eager(model, IMAGES, attention_mask=MASK)
    wanted = states[MASK.bool()]
    unmasked = model(IMAGES).last_hidden_state[MASK.bool()]
    model.config._attn_implementation = "flash_attention_2"
    found = model(IMAGES, attention_mask=MASK).last_hidden_state[MASK.bool()]
    assert get_largest_difference(found, wanted) <= 1e-5 < get_largest_difference(unmasked, wanted)
    rows = model.token_attention(IMAGES, attention_mask=MASK)
    assert get_largest_difference(rows, eager) <= 1e-5
    assert rows[1, ..., 10:14].abs().max() == 0 < rows[0, ..., 10:14].min()


@each_kind
def test_every_class_has_the_rows_of_eager_attention(kind: Kind) -> None:
    model = kind.build()
    assert_same_outputs(model.token_attention(IMAGES), run_eager(model, IMAGES)[0], 1e-5)


def test_groups_and_layers_can_be_selected() -> None:
    model = build_random(ViTCLSModel, **TOKENS, num_hidden_layers=3)
    everything = model.token_attention(IMAGES)

    for tokens, places in {
        ("cls",): [0, 1],
        ("distillation",): [2],
        ("registers", "cls"): [0, 1, 3, 4, 5],  # in the order of the sequence
        (): [],
    }.items():
        assert torch.equal(
            model.token_attention(IMAGES, tokens=tokens), everything[:, :, :, places]
        )
    for layers, indices in {(2,): [1], (-1,): [2], (-3,): [0], (3, 1, 3): [2, 0, 2]}.items():
        assert torch.equal(
            model.token_attention(IMAGES, layers=list(layers)), everything[:, indices]
        )


def test_unknown_groups_and_layers_are_errors() -> None:
    model = build_random(ViTCLSModel)
    with pytest.raises(KeyError):
        model.token_attention(IMAGES, tokens=("cls", "patches"))
    for layer in (3, -3, 0):
        with raises_one_line("layers count from 1; layers=[1] is the first"):
            model.token_attention(IMAGES, layers=[1, layer])
    assert_no_recording(model)


def test_recorders_are_restored() -> None:
    model = build_random(ViTCLSForImageClassification)
    recorded: list[int] = []
    with (
        torch.no_grad(),
        record_attention(model.vitcls, [0, 1], lambda layer, *_: recorded.append(layer)),
    ):
        model.token_attention(IMAGES, layers=[1])
        model(IMAGES)
    assert recorded == [1, 0, 1]  # the recorder of the outer context is back after the inner one
    assert_no_recording(model)


@torch.enable_grad()
def test_gradients_equal_those_of_eager_attention() -> None:
    model = build_random(ViTCLSModel, **TOKENS)
    pixels = build_images().requires_grad_()
    gradients = []
    for rows in (model.token_attention(pixels), run_eager(model, pixels)[0]):
        gradients.append(torch.autograd.grad(rows.square().sum(), pixels)[0])
    assert gradients[0].abs().max() > 0
    assert get_largest_difference(*gradients) <= 1e-5


def test_compiled_models_have_the_same_rows_and_those_of_other_threads_stay_compiled() -> None:
    model = build_random(ViTCLSModel)
    expected = model.token_attention(IMAGES)
    num_calls = 0

    def count_calls(graph: Any, inputs: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            return graph(*args)

        return call

    model.compile(backend="eager", fullgraph=True)
    model(IMAGES)
    assert torch.equal(model.token_attention(IMAGES), expected)
    model(IMAGES)
    assert model._compiled_call_impl is not None

    other = torch.compile(nn.Linear(2, 2), backend=count_calls)
    other(torch.ones(1, 2))
    with record_attention(model, [0], lambda *_: None):
        other(torch.ones(1, 2))
    assert num_calls == 2
