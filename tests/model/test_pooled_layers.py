"""Heads that read the tokens of several layers (`config.pooled_layers`)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    TASKS,
    build_images,
    build_tiny_config,
    get_largest_difference,
    randomize,
    save_and_load,
)
from transformers import AutoModelForImageClassification

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)


POOLINGS: dict[str, dict[str, Any]] = {
    "cls": {},
    "several cls": {"num_cls_tokens": 3, "cls_pooling": "concat", "pooled_cls_tokens": [2, 0]},
    "mean": {"pooling": "mean", "num_register_tokens": 2},
    "cls_mean": {"pooling": "cls_mean"},
    "max": {"pooling": "max"},
}
LAYERS = ([-4, -3, -2, -1], [4, 1], [-2])


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    return randomize(ViTCLSForImageClassification(build_tiny_config(num_hidden_layers=4, **fields)))


@torch.no_grad()
@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("fields", POOLINGS.values(), ids=POOLINGS)
def test_the_head_reads_the_concatenated_poolings_of_the_normalized_layers(
    fields: dict[str, Any], layers: list[int]
) -> None:
    model = build_classifier(**fields, pooled_layers=layers)
    encoded = model.vitcls(build_images(), output_hidden_states=True)
    pool = ViTCLSModel(build_tiny_config(**fields)).pooler
    assert pool is not None
    expected = torch.cat(
        [pool(model.vitcls.layernorm(encoded.hidden_states[layer])) for layer in layers], dim=-1
    )
    assert encoded.pooler_output.shape == (2, model.config.pooled_size)
    assert get_largest_difference(encoded.pooler_output, expected) <= 1e-6
    assert get_largest_difference(model(build_images()).logits, model.classifier(expected)) <= 1e-5


@torch.no_grad()
def test_fewer_tokens_of_the_last_layer_do_not_change_the_logits() -> None:
    model = build_classifier(pooled_layers=[-2, -1], num_register_tokens=2)
    fewer = model(build_images()).logits
    assert (
        get_largest_difference(fewer, model(build_images(), compute_all_tokens=True).logits) <= 1e-5
    )


@torch.no_grad()
def test_the_last_layer_alone_is_the_default() -> None:
    default, explicit = (build_classifier(pooled_layers=layers) for layers in (None, [-1]))
    assert torch.equal(default(build_images()).logits, explicit(build_images()).logits)


@torch.no_grad()
def test_each_task_reads_its_cls_token_of_every_layer() -> None:
    config = build_tiny_config(
        num_hidden_layers=4, num_cls_tokens=2, tasks=TASKS, pooled_layers=[2, -1]
    )
    model = randomize(ViTCLSForMultiTaskClassification(config))
    outputs = model(build_images(), output_hidden_states=True)
    tokens = [model.vitcls.layernorm(outputs.hidden_states[layer]) for layer in (2, 4)]
    for index, (task, head) in enumerate(
        zip(["age", "species"], model.classifiers.values(), strict=True)
    ):
        expected = head(torch.cat([states[:, index] for states in tokens], dim=-1))
        assert get_largest_difference(outputs.logits[task], expected) <= 1e-5


def test_every_parameter_gets_a_gradient() -> None:
    model = build_classifier(pooled_layers=[1, -1]).train()
    model(build_images(), labels=torch.tensor([0, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradient_checkpointing_does_not_change_the_gradients() -> None:
    model = build_classifier(pooled_layers=[1, -1], pooling="cls_mean").train()
    gradients = []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(build_images(), labels=torch.tensor([0, 2])).loss.backward()
        gradients.append(model.vitcls.layers[0].mlp.fc1.weight.grad.clone())
    assert get_largest_difference(*gradients) <= 1e-6


@torch.no_grad()
def test_a_saved_model_is_loaded_by_the_auto_class(tmp_path: Path) -> None:
    model = build_classifier(pooled_layers=[-2, -1], pooling="cls_mean", pooled_norm=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.pooled_layers == [-2, -1]
    assert torch.equal(loaded(build_images()).logits, model(build_images()).logits)


@torch.no_grad()
def test_adapting_keeps_the_classifier(tmp_path: Path) -> None:
    model = build_classifier(pooled_layers=[-2, -1])
    adapted = model.adapt(num_register_tokens=2, gate_new_tokens=True)
    loaded = save_and_load(model, tmp_path, num_register_tokens=2, gate_new_tokens=True)
    for other in (adapted, loaded):
        assert (
            get_largest_difference(other(build_images()).logits, model(build_images()).logits)
            <= 1e-4
        )


def test_a_configuration_without_the_field_is_saved_without_it() -> None:
    assert "pooled_layers" not in build_tiny_config().to_diff_dict()


@torch.no_grad()
def test_compiled_models_read_the_same_layers() -> None:
    model = build_classifier(pooled_layers=[-3, -1], pooling="cls_mean")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (
        get_largest_difference(compiled(build_images()).logits, model(build_images()).logits)
        <= 1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_tokens_of_unpooled_layers_are_not_kept(pooling: str) -> None:
    model = build_classifier(pooled_layers=[-3, -1], pooling=pooling)
    outputs = model.vitcls(build_images())
    num_tokens = 1 if pooling == "cls" else 17
    assert {layer: tokens.shape[1] for layer, tokens in outputs.pooled_tokens.items()} == {
        2: num_tokens,
        4: 17,
    }
    assert outputs.hidden_states is None
