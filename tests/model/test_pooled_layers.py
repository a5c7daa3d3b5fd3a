"""Heads that read the tokens of several layers (`config.pooled_layers`)."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    IMAGES,
    TASKS,
    build_random,
    build_tiny_config,
    get_largest_difference,
)

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields


pytestmark = pytest.mark.usefixtures("no_grad")

# test_tokens.py compares these and other poolings of the last layer with formulas.
POOLINGS = {
    "cls": {},
    "several cls": {"num_cls_tokens": 3, "cls_pooling": "concat", "pooled_cls_tokens": [2, 0]},
    "cls_mean": {"pooling": "cls_mean"},
}
LAYERS = ([-4, -3, -2, -1], [4, 1], [-2])


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    return build_random(ViTCLSForImageClassification, num_hidden_layers=4, **fields)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("fields", POOLINGS.values(), ids=POOLINGS)
def test_the_head_reads_the_concatenated_poolings_of_the_normalized_layers(
    fields: Fields, layers: list[int]
) -> None:
    model = build_classifier(**fields, pooled_layers=layers)
    pool = ViTCLSModel(build_tiny_config(**fields)).pooler

    encoded = model.vitcls(IMAGES, output_hidden_states=True)
    states = [encoded.hidden_states[layer] for layer in layers]
    expected = torch.cat([pool(model.vitcls.layernorm(each)) for each in states], dim=-1)

    assert encoded.pooler_output.shape == (2, model.config.pooled_size)
    assert get_largest_difference(encoded.pooler_output, expected) <= 1e-6
    assert get_largest_difference(model(IMAGES).logits, model.classifier(expected)) <= 1e-5


def test_each_task_reads_its_cls_token_of_every_layer() -> None:
    fields = {"num_hidden_layers": 4, "num_cls_tokens": 2, "pooled_layers": [2, -1]}
    model = build_random(ViTCLSForMultiTaskClassification, tasks=TASKS, **fields)
    outputs = model(IMAGES, output_hidden_states=True)
    tokens = [model.vitcls.layernorm(outputs.hidden_states[layer]) for layer in (2, 4)]
    for index, (task, head) in enumerate(
        zip(["age", "species"], model.classifiers.values(), strict=True)
    ):
        expected = head(torch.cat([states[:, index] for states in tokens], dim=-1))
        assert get_largest_difference(outputs.logits[task], expected) <= 1e-5


def test_tokens_of_unpooled_layers_are_not_kept() -> None:
    model = build_classifier(pooled_layers=[-3, -1])
    outputs = model.vitcls(IMAGES, output_layers=[4])
    assert outputs.layer_tokens.keys() == {2, 4}
    assert outputs.hidden_states is None
