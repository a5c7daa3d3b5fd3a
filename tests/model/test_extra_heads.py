"""Extra heads: classifiers of further tasks, which change no bit of the other outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compare import run_step
from helpers.tiny_models import (
    IMAGES,
    TASKS,
    assert_same_bits,
    assert_same_outputs,
    build_images,
    build_random,
    build_tiny_config,
    each_dtype,
    get_largest_difference,
    raises_one_line,
    randomize,
)
from transformers import AutoModelForImageClassification

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    select_task,
)
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.speed.packed import pack


pytestmark = pytest.mark.usefixtures("no_grad")

LABELS = ["rain", "snow", "sun"]
HEADS = {
    "weather": {"labels": LABELS, "pooling": "cls_mean", "pooled_layers": [-2, -1]},
    "indoors": {"labels": LABELS[:2]},
    "objects": {
        "labels": LABELS[:1],
        "pooling": "mean",
        "problem_type": "multi_label_classification",
    },
}

# Models with the width of ViT-S, for which the products of one row and of all rows are computed by
# different kernels.
WIDE = {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "intermediate_size": 768,
    "image_size": 48,
    "patch_size": 16,
}
MODELS = {
    "cls": {},
    "mean": {"pooling": "mean", "num_register_tokens": 4},
    "several layers": {"pooled_layers": [-2, -1], "num_distillation_tokens": 1},
    "fading": {"num_register_tokens": 2, "fading_tokens": {"registers": 2}},
}


def build_pair(heads: dict[str, dict[str, Any]], **fields: Any) -> tuple[Any, Any]:
    """Return a classifier without extra heads, and the same classifier with extra heads."""
    model_class = (
        ViTCLSForMultiTaskClassification if "tasks" in fields else ViTCLSForImageClassification
    )
    model = build_random(model_class, **fields)
    extended = model.adapt(extra_heads=heads)
    extended.load_state_dict(
        randomize(model_class(extended.config)).state_dict() | model.state_dict()
    )
    return model, extended


def test_a_head_with_another_number_of_labels_is_new() -> None:
    model = build_random(
        ViTCLSForImageClassification, extra_heads={"parity": {"labels": ["odd", "even"]}}
    )
    adapted = model.adapt(extra_heads={"parity": {"labels": ["odd", "even", "zero"]}})
    assert adapted(IMAGES).task_logits["parity"].shape[1] == 3


# The other outputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("has_kernels", [True, False])
@each_dtype
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_logits_keep_their_bits(fields: Fields, dtype: torch.dtype, has_kernels: bool) -> None:
    model, extended = (each.to(dtype) for each in build_pair(HEADS, **WIDE | fields))
    if has_kernels:
        model, extended = pack(model), pack(extended)
    for batch_size in (1, 3, 16):
        images = build_images(batch_size, 48, 48).to(dtype)
        for compute_all_tokens in (True, False):
            for each in (model, extended):
                each.config.compute_all_tokens = compute_all_tokens
            assert torch.equal(extended(images).logits, model(images).logits)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_logits_of_saved_models_keep_their_bits(fields: Fields, tmp_path: Path) -> None:
    """A longer header in the weights file moves the weights, which changed products of one row."""
    images = build_images(1, 48, 48)
    outputs = []
    for name, model in zip(("old", "new"), build_pair(HEADS, **WIDE | fields), strict=True):
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        outputs.append(loaded(images))

    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert_same_outputs(outputs[1], model(images))
    assert loaded.config.extra_heads == HEADS


def test_the_logits_of_tasks_keep_their_bits() -> None:
    model, extended = build_pair(HEADS, **WIDE | {"tasks": TASKS, "num_cls_tokens": 2})
    images = build_images(3, 48, 48)
    assert extended(images).task_logits.keys() == HEADS.keys()
    found, expected = (each(images).logits for each in (extended, model))
    assert found.keys() == TASKS.keys()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("compute_all_tokens", [True, False])
def test_a_head_has_the_same_bits_whichever_other_heads_exist(compute_all_tokens: bool) -> None:
    _, extended = build_pair(HEADS, **WIDE)
    extended.config.compute_all_tokens = compute_all_tokens
    together = extended(build_images(3, 48, 48)).task_logits
    for name, head in HEADS.items():
        alone = extended.adapt(extra_heads={name: head})(build_images(3, 48, 48))
        assert torch.equal(alone.task_logits[name], together[name])


def test_hidden_states_and_attentions_are_those_of_one_pass() -> None:
    model, extended = build_pair(HEADS)
    for each in (model, extended):
        each.set_attn_implementation("eager")
    found = extended(IMAGES, output_hidden_states=True, output_attentions=True)
    expected = model(IMAGES, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert [each.shape for each in found[name]] == [each.shape for each in expected[name]]
        assert get_largest_difference(found[name][0], expected[name][0]) <= 1e-6, name


@torch.enable_grad()
def test_gradients_of_the_model_do_not_change() -> None:
    """The gradients are those of the same parameters, so that no extra head has one."""
    expected, found = (run_step(model, IMAGES) for model in build_pair(HEADS))
    assert not any("extra_heads" in name for name in found)
    assert_same_bits(found, expected)


# The heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute_all_tokens", [True, False])
def test_heads_read_the_normalized_tokens_of_their_layers(compute_all_tokens: bool) -> None:
    """The reference slices hidden states."""
    _, model = build_pair(HEADS, num_register_tokens=2)
    hidden_states = model(IMAGES, output_hidden_states=True).hidden_states
    tokens = [model.vitcls.layernorm(states) for states in hidden_states]
    inputs = {
        "weather": [
            tokens[1][:, 0],
            tokens[1][:, 3:].mean(1),
            tokens[2][:, 0],
            tokens[2][:, 3:].mean(1),
        ],
        "indoors": [tokens[2][:, 0]],
        "objects": [tokens[2][:, 3:].mean(1)],
    }
    model.config.compute_all_tokens = compute_all_tokens
    found = model(IMAGES).task_logits

    assert found.keys() == inputs.keys()
    for name, vectors in inputs.items():
        expected = model.extra_heads[f"task_{name}"](torch.cat(vectors, dim=1))
        assert get_largest_difference(found[name], expected) <= 1e-5


SELECTED = [{}, MODELS["several layers"], {"num_labels": 0}, {"tasks": TASKS, "num_cls_tokens": 2}]


@pytest.mark.parametrize("fields", SELECTED, ids=str)
def test_a_selected_task_is_a_classifier_with_the_same_bits(fields: Fields, tmp_path: Path) -> None:
    _, model = build_pair(HEADS, **WIDE | fields)
    images = build_images(3, 48, 48)
    for name, expected in model(images).task_logits.items():
        select_task(model, name).save_pretrained(tmp_path / name)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        assert torch.equal(loaded(images).logits, expected)
        assert list(loaded.config.id2label.values()) == HEADS[name]["labels"]
    with raises_one_line("indoors, objects, weather"):
        select_task(model, "whether")


@pytest.mark.slow
def test_compiled_models_compute_the_heads() -> None:
    _, model = build_pair(HEADS, pooled_layers=[-2, -1], pooling="cls_mean")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_outputs(compiled(IMAGES), model(IMAGES), 1e-5)


# Configuration -----------------------------------------------------------------------------------

HEAD = HEADS["indoors"]
ADDED = {"labels": ["x"], "adds_classes": True}
NO_CLS = {"num_cls_tokens": 0, "pooling": "mean"}
# Name -> extra heads, other fields, and a word of the error.
INVALID = {
    "name": ({"in doors": HEAD}, {}, "in doors"),
    "output name": ({"logits": HEAD}, {}, "logits"),
    "name of a task": ({"age": HEAD}, {"num_cls_tokens": 2, "tasks": TASKS}, "age"),
    "unknown field": ({"a": HEAD | {"poling": "mean"}}, {}, "poling"),
    "no labels": ({"a": {}}, {}, "labels"),
    "one label": ({"a": {"labels": ["x"]}}, {}, "2 to"),
    "equal labels": ({"a": {"labels": ["x", "x"]}}, {}, "distinct"),
    "pooling": ({"a": HEAD | {"pooling": "attention"}}, {}, "cls_mean"),
    "no CLS token": ({"a": HEAD}, NO_CLS, 'pooling="mean"'),
    "poolings": ({"a": HEAD | {"pooling": ["cls", "mean"]}}, {}, "one for each of"),
    "layer": ({"a": HEAD | {"pooled_layers": [3]}}, {}, "pooled_layers"),
    "layers": ({"a": HEAD | {"pooled_layers": -1}}, {}, "pooled_layers"),
    "problem type": ({"a": HEAD | {"problem_type": "regression"}}, {}, "single_label"),
    "threshold": ({"a": HEADS["objects"] | {"threshold": 1.5}}, {}, "threshold"),
    "added labels": ({"a": ADDED}, {}, "id2label"),
}


@pytest.mark.parametrize(("heads", "fields", "word"), INVALID.values(), ids=INVALID)
def test_invalid_heads_are_refused_in_one_line(
    heads: dict[str, Any], fields: Fields, word: str
) -> None:
    with raises_one_line("extra_heads", word):
        build_tiny_config(extra_heads=heads, **fields)
