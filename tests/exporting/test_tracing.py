"""Graphs in memory: fused attention, dynamic and fixed sizes, and example images."""

import pytest
import torch
from helpers.tiny_models import IMAGES, build_images, build_random, build_tiny_config
from torch.testing import assert_close

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.exporting.tracing import (
    GraphShape,
    NamedOutputsModel,
    get_smallest_size,
    select_graph_shape,
    trace_model,
)


def test_the_graph_has_fused_attention_for_any_attn_implementation() -> None:
    model = build_random(ViTCLSForImageClassification, num_register_tokens=1, num_hidden_layers=1)
    model.set_attn_implementation("eager")
    graph = trace_model(model, select_graph_shape(model, (48, 24), dynamic=True), torch.float32)
    operators = {str(node.target) for node in graph.graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in operators
    assert model.config._attn_implementation == "eager"  # the caller's model stays as it was
    for size in ((24, 48), (32, 32)):
        images = build_images(3, *size)
        assert_close(graph.module()(images)["logits"], model(images).logits)


@pytest.mark.parametrize("is_dynamic", [True, False])
def test_models_that_cannot_be_traced_are_errors(is_dynamic: bool) -> None:
    model = ViTCLSForImageClassification(build_tiny_config())
    model.vitcls.embeddings.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="cannot trace") as error:
        trace_model(model, select_graph_shape(model, None, is_dynamic), torch.float32)
    assert ("`dynamic=False`" in str(error.value)) is is_dynamic


def test_an_encoder_without_a_pooler_has_one_output() -> None:
    model = ViTCLSModel(build_tiny_config(), add_pooling_layer=False)
    assert list(NamedOutputsModel(model)(IMAGES)) == ["last_hidden_state"]


def test_the_smallest_size_contains_the_grids_of_cls_tokens() -> None:
    sizes = {"image_size": [32, 48], "patch_size": [8, 4], "num_cls_tokens": 3}
    scopes = {"cls_scopes": ["image", [2, 3, 1, 2], [1, 5, 0, 0]]}
    assert get_smallest_size(build_tiny_config(**sizes | scopes)) == (2 * 8, 5 * 4)
    assert get_smallest_size(build_tiny_config(**sizes)) == (2 * 8, 2 * 4)
    model = ViTCLSModel(build_tiny_config(**sizes | scopes))
    assert select_graph_shape(model, (24, 40), dynamic=True) == GraphShape(
        (24, 40), (16, 20), is_dynamic=True
    )


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, ""),
        ({"position_offset": 0.1, "position_embedding_type": "learned_rope_2d"}, "position_offset"),
        ({"position_interpolation": "crop"}, ""),
        (
            {"position_interpolation": "crop", "image_size": [32, 48]},
            "of a non-square grid",
        ),
        ({"position_antialias": True}, ""),
    ],
)
def test_positions_that_cannot_be_resampled_in_a_graph_fix_its_size(
    fields: Fields, word: str
) -> None:
    model = ViTCLSModel(build_tiny_config(**fields))
    shape = select_graph_shape(model, None, dynamic=True)
    assert word in shape.fixed_size_reason
    assert bool(shape.fixed_size_reason) == bool(word)
    assert shape.is_dynamic == (not word)
    assert shape.image_size == model.config.image_height_width
    assert shape.smallest_size == (shape.image_size if word else (16, 16))
