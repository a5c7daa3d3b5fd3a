"""ViTCLSConfig: derived values, errors and their messages, and saving.

Random configurations are tested in test_properties.py.
"""

import copy
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fresh_processes import run_fresh
from helpers.local_hub import LocalHub
from helpers.tiny_models import SIZES, build_tiny_config, raises_one_line
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.configuration_vitcls import MAX_LABELS, SIZE_LIMITS


NAN = float("nan")

CLASS_VARIABLES = {"_skip_validation", "keys_to_ignore_at_inference", "base_model_tp_plan", "base_model_fsdp_plan"}

# Contradictory fields -> words of the error message that name the change to make.
CONTRADICTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_cls_tokens": 0}, ["num_cls_tokens=1", '"mean"']),
    ({"num_cls_tokens": 0, "pooling": "cls_mean"}, ["cls_mean", "num_cls_tokens=1"]),
    ({"hidden_size": 18, "num_attention_heads": 4}, ["num_attention_heads=4", "hidden_size=18", "3 heads"]),
    ({"image_size": 30}, ["image_size", "30", "24 or 32"]),
    ({"image_size": [32, 20]}, ["image_size", "width", "20", "16 or 24"]),
    ({"image_size": 4}, ["image_size", "4", "Use 8"]),
    ({"image_size": 32, "patch_size": [8, 12]}, ["image_size", "width", "24 or 36"]),
    ({"distillation_head": True}, ["distillation_head", "num_distillation_tokens=1"]),
    ({"distillation_inference": "distillation"}, ["distillation_inference", "num_distillation_tokens=1"]),
    (
        {"num_distillation_tokens": 1, "distillation_head": False, "distillation_inference": "distillation"},
        ["distillation_inference", "distillation_head"],
    ),
    ({"token_init": "zeros", "num_register_tokens": 2}, ["token_init", "registers", "trunc_normal"]),
    ({"position_embedding_type": "rope_2d", "hidden_size": 12}, ["rope_2d", "hidden_size", "4"]),
    ({"position_embedding_type": "sincos_2d", "hidden_size": 18}, ["sincos_2d", "hidden_size", "18"]),
    ({"cls_scopes": ["image", "image"]}, ["cls_scopes", "length 2", "num_cls_tokens is 1"]),
    ({"num_cls_tokens": 2, "cls_scopes": ["image"]}, ["cls_scopes", "length 1", "num_cls_tokens is 2"]),
    ({"cls_scopes": ["whole"]}, ["cls_scopes", "whole", '"image"']),
    ({"cls_scopes": ["tile"]}, ["'tile' must be \"image\" or [rows, columns, row, column]"]),
    ({"cls_scopes": [[2, 2, 0]]}, ["cls_scopes", "[2, 2, 0]"]),
    ({"cls_scopes": [[2, 2, 2, 0]]}, ["cls_scopes", "[2, 2, 2, 0]"]),
    ({"cls_scopes": [[2, 2, -1, 0]]}, ["cls_scopes", "[2, 2, -1, 0]"]),
    ({"cls_scopes": [[5, 1, 0, 0]]}, ["cls_scopes", "4 x 4 patches"]),
    ({"cls_scopes": [[2, 2, 0, 2]]}, ["cls_scopes", "[2, 2, 0, 2]"]),
    ({"cls_scopes": [[2, 2, 0, -1]]}, ["cls_scopes", "[2, 2, 0, -1]"]),
    ({"cls_scopes": [[1, 5, 0, 0]]}, ["cls_scopes", "4 x 4 patches"]),
    ({"tasks": {"species": 2, "age": 2}}, ["tasks", "2 tasks", "num_cls_tokens=2"]),
    ({"tasks": {"species": 2}, "pooling": "mean"}, ["tasks", 'pooling="cls"']),
    ({"tasks": {}}, ["tasks"]),
    ({"tasks": {"species": 0}}, ["tasks", "species"]),
    ({"tasks": {"species": ["cat", "cat"]}}, ["tasks", "species", "distinct"]),
    ({"tasks": {"no name": 2}}, ["tasks", "no name"]),
    (
        {"num_cls_tokens": 2, "tasks": {"species": 2, "age": 2}, "cls_scopes": ["image", [2, 2, 0, 0]]},
        ["cls_scopes", "age, species"],
    ),
    ({"gated_tokens": {"patches": 1}}, ["unknown group 'patches'", "cls, distillation, registers"]),
    ({"gated_tokens": {"cls": 0}}, ["from 1 to 1, but it is 0", "omit 'cls'"]),
    ({"gated_tokens": {"cls": 2}}, ["from 1 to 1, but it is 2"]),
    ({"register_neurons": [[0, 0]]}, ["register_neurons", "num_register_tokens=1"]),
    ({"num_register_tokens": 1, "register_neurons": [[2, 0]]}, ["[2, 0]", "a layer below 2"]),
    ({"num_register_tokens": 1, "register_neurons": [[-1, 0]]}, ["[-1, 0]"]),
    ({"num_register_tokens": 1, "register_neurons": [[0, 24]]}, ["[0, 24]", "a neuron below 24"]),
    ({"num_register_tokens": 1, "register_neurons": [[0, -1]]}, ["[0, -1]"]),
    ({"num_register_tokens": 1, "register_neurons": [[0, 1, 2]]}, ["[0, 1, 2] must be [layer, neuron]"]),
    ({"pooled_cls_tokens": []}, ["pooled_cls_tokens", "is empty"]),
    ({"num_cls_tokens": 2, "pooled_cls_tokens": [0, 2]}, ["contains 2", "from 0 to 1"]),
    ({"pooled_cls_tokens": [-1]}, ["contains -1"]),
    ({"attention_pool_heads": 3}, ["attention_pool_heads=3", "hidden_size=16"]),
    ({"rope_reference_grid": [4]}, ["rope_reference_grid", "[4]"]),
    ({"rope_reference_grid": [4, 0]}, ["rope_reference_grid", "[4, 0]"]),
    ({"rope_periods": [1.0, math.inf]}, ["rope_periods", "head_dim / 4 = 2", "inf"]),
    ({"rope_periods": [0.0, 1.0]}, ["rope_periods", "[0.0, 1.0]"]),
    ({"rope_periods": [1.0, 2.0, 3.0]}, ["rope_periods", "[1.0, 2.0, 3.0]"]),
    ({"num_labels": 3, "id2label": {0: "cat", 1: "dog"}}, ["num_labels", "id2label"]),
    ({"out_features": ["stage3"]}, ["out_features", "stage3"]),
    ({"out_indices": [3]}, ["out_indices", "3"]),
    ({"out_features": ["stem"], "out_indices": [1]}, ["out_features", "out_indices"]),
]

# Fields with a wrong type or a value out of range.
WRONG_VALUES: list[tuple[str, Any]] = [
    *((name, value) for name in ("hidden_size", "num_attention_heads") for value in (0, -2, 16.0, "16", None, True)),
    *((name, value) for name in ("num_hidden_layers", "intermediate_size", "num_channels") for value in (0, -1, 1.5)),
    *(
        (f"num_{kind}_tokens", value)
        for kind in ("cls", "distillation", "register")
        for value in (-1, 1.0, "1", None, True)
    ),
    *(
        (name, value)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_drop_rate")
        for value in (-0.1, 1.0, 1.5, NAN, "0.1", None)
    ),
    *((name, value) for name in ("layer_norm_eps", "initializer_range", "rope_theta") for value in (0.0, -1.0, NAN)),
    *((name, value) for name in ("layer_norm_eps", "initializer_range", "rope_theta") for value in (math.inf, "1")),
    *((name, value) for name in ("image_size", "patch_size") for value in (0, -8, 8.0, "8", None, [8], [8, 8, 8])),
    *((name, value) for name in ("image_size", "patch_size") for value in ([8, 0], [8, -8], [8, 8.0], [], (8,))),
    *(
        (name, value)
        for name in (
            "token_init",
            "pooling",
            "cls_pooling",
            "head_type",
            "distillation_inference",
            "position_embedding_type",
            "position_embedding_tokens",
            "position_interpolation",
            "mlp_type",
            "mim_loss",
        )
        for value in ("other", "", None, 1, ["cls"])
    ),
    *((name, 1) for name in ("use_mask_token", "qkv_bias", "query_bias", "qk_norm", "pre_norm", "patch_bias")),
    *((name, "yes") for name in ("position_antialias", "mlp_bias", "norm_pixel_target", "apply_layernorm")),
    *(("layer_scale_init_value", value) for value in (NAN, math.inf, "1e-5")),
    *(("head_hidden_size", value) for value in (0, -1, 8.0)),
    *(("hidden_act", value) for value in ("geluu", "", None, 1)),
    *(("pooled_activation", value) for value in ("tanhh", "", 1)),
    *(("problem_type", value) for value in ("classification", 1)),
    *(("num_labels", value) for value in (-1, 2.0, "2")),
    *(("id2label", value) for value in (3, "cat", ["cat", "dog"], {"cat": 0}, {5: "cat"})),
    *(("label2id", value) for value in (3, "cat", ["cat", "dog"])),
    *(("cls_scopes", value) for value in ("image", 1, [None], [[2, 2, 0, 0.5]], [["a", 1, 0, 0]], {})),
    *(("tasks", value) for value in ("species", 3, ["species"], {"species": 1.5}, {"species": [1, 2]}, {1: 2})),
    *(("out_features", value) for value in ("stage1", 1, [1])),
    *(("out_indices", value) for value in ("1", [0.5], ["stage1"])),
]


def test_the_defaults_are_vit_base_16() -> None:
    config = ViTCLSConfig()
    sizes = config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size
    assert sizes == (768, 12, 12, 3072)
    assert (config.image_height_width, config.patch_height_width, config.grid_size) == ((224, 224), (16, 16), (14, 14))
    assert (config.num_cls_tokens, config.num_distillation_tokens, config.num_register_tokens) == (1, 0, 0)


# Numbers of parameters with 1,000 labels in the papers' code (timm's vit_*_patch16_224 and deit_*_patch16_224).
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656), ("large", 304_326_632)],
)
def test_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = ViTCLSForImageClassification(ViTCLSConfig.from_preset(name, num_labels=1000))
    assert model.num_parameters() == parameters


def test_presets_accept_overrides_and_names_of_the_command_line() -> None:
    config = ViTCLSConfig.from_preset("vitcls-tiny", hidden_size=96, num_register_tokens=4)
    assert (config.hidden_size, config.num_attention_heads, config.num_register_tokens) == (96, 3, 4)


def test_an_unknown_preset_is_an_error() -> None:
    with raises_one_line("huge", "tiny, small, base, large"):
        ViTCLSConfig.from_preset("huge")
    with raises_one_line("num_regster_tokens", "num_register_tokens"):
        ViTCLSConfig.from_preset("tiny", num_regster_tokens=4)


def test_fields_are_documented_in_their_order() -> None:
    """Check that the docstring and the class body have the same two groups of fields."""
    documented = re.findall(r"^        ((?:\w+, )*\w+) \(", ViTCLSConfig.__doc__, re.MULTILINE)
    names = [name for group in documented for name in group.split(", ")]
    body = [name.removeprefix("_") for name in ViTCLSConfig.__annotations__ if name not in CLASS_VARIABLES]
    assert names == body


def test_fields_are_keyword_only() -> None:
    """Check that fields are keyword-only, so that their order can change. Saved files are sorted by name."""
    with raises_one_line("only keyword arguments"):
        ViTCLSConfig(4)
    for use_diff in (True, False):
        stored = json.loads(build_tiny_config(tasks={"age": 2}).to_json_string(use_diff=use_diff))
        assert list(stored) == sorted(stored)


def test_choices_are_documented() -> None:
    choices = {choice for field in _fields(ViTCLSConfig) for choice in getattr(field.type, "__args__", ())}
    strings = {choice for choice in choices if isinstance(choice, str)}
    assert {"cls_mean", "rope_2d", "near_zero"} <= strings
    assert not [choice for choice in strings if f'"{choice}"' not in ViTCLSConfig.__doc__]


def test_rectangles() -> None:
    config = build_tiny_config(image_size=[24, 64], patch_size=[4, 16])
    assert (config.image_height_width, config.patch_height_width) == ((24, 64), (4, 16))
    assert config.grid_size == (6, 4)
    assert build_tiny_config(image_size=(24, 64)).grid_size == (3, 8)


@pytest.mark.parametrize(
    ("fields", "vectors"),
    [
        ({}, 1),
        ({"num_cls_tokens": 3}, 1),
        ({"num_cls_tokens": 3, "cls_pooling": "mean"}, 1),
        ({"num_cls_tokens": 3, "cls_pooling": "concat"}, 3),
        ({"pooling": "cls_mean"}, 2),
        ({"pooling": "cls_mean", "num_cls_tokens": 3, "cls_pooling": "concat"}, 4),
        ({"pooling": "mean", "num_cls_tokens": 3, "cls_pooling": "concat"}, 1),
        ({"pooling": "max"}, 1),
        ({"pooling": "attention"}, 1),
    ],
)
def test_pooled_size(fields: dict[str, Any], vectors: int) -> None:
    assert build_tiny_config(**fields).pooled_size == vectors * 16


def test_the_distillation_head_depends_on_its_token_unless_set() -> None:
    assert not build_tiny_config().has_distillation_head
    assert build_tiny_config(num_distillation_tokens=1).has_distillation_head
    assert not build_tiny_config(num_distillation_tokens=1, distillation_head=False).has_distillation_head


@pytest.mark.parametrize(("fields", "words"), CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_contradictions_name_the_change_to_make(fields: dict[str, Any], words: list[str]) -> None:
    with raises_one_line(*words):
        build_tiny_config(**fields)


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_a_wrong_value_names_its_field(name: str, value: Any) -> None:
    fields = {**SIZES, name: value}
    if name == "id2label":
        del fields["num_labels"]
    with raises_one_line(name):
        ViTCLSConfig(**fields)


@pytest.mark.parametrize("name", SIZE_LIMITS)
def test_sizes_have_a_largest_value(name: str) -> None:
    largest = SIZE_LIMITS[name][1]
    with raises_one_line(f"`{name}`", f"{largest:,}", str(largest + 1)):
        ViTCLSConfig(**{name: largest + 1})


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**6},
        {"num_labels": 2 * 10**6},
        {"tasks": {"species": 2 * 10**6}},
        {"num_cls_tokens": 10**6, "cls_pooling": "concat"},
    ],
    ids=str,
)
def test_too_large_values_are_errors_before_a_list_of_their_length_is_built(fields: dict[str, Any]) -> None:
    tracemalloc.start()
    try:
        with raises_one_line(next(iter(fields)), "000"):
            ViTCLSConfig(**fields)
        assert tracemalloc.get_traced_memory()[1] < 2**20  # a list of 10^6 references takes 8 MB
    finally:
        tracemalloc.stop()


def test_the_largest_number_of_labels_is_accepted() -> None:
    assert ViTCLSConfig(num_labels=MAX_LABELS).num_labels == MAX_LABELS


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("num_regster_tokens", "num_register_tokens"),
        ("num_registers_tokens", "num_register_tokens"),
        ("patchsize", "patch_size"),
        ("num_label", "num_labels"),
        ("droppath_rate", "drop_path_rate"),
        ("position_embeding_type", "position_embedding_type"),
        ("out_feature", "out_features"),
    ],
)
def test_a_misspelt_keyword_is_an_error(keyword: str, meant: str) -> None:
    with raises_one_line(keyword, f"did you mean {meant}?"):
        ViTCLSConfig(**{keyword: 4})


def test_an_unknown_keyword_is_an_error() -> None:
    with raises_one_line("xyzzy"):
        ViTCLSConfig(xyzzy=1)


def test_a_misspelt_keyword_is_an_error_at_load(tmp_path: Path) -> None:
    ViTCLSModel(build_tiny_config()).save_pretrained(tmp_path)
    for load in (ViTCLSConfig, AutoConfig, ViTCLSModel, ViTCLSForImageClassification, ViTCLSBackbone):
        with raises_one_line("num_regster_tokens", "did you mean num_register_tokens?"):
            load.from_pretrained(tmp_path, num_regster_tokens=4)


def test_an_unknown_field_of_a_file_is_kept_and_reported(tmp_path: Path) -> None:
    """The file may be from another version of the package."""
    build_tiny_config().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text()) | {"num_regster_tokens": 4}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with CaptureLogger(logging.get_logger("modeling_vitcls.configuration_vitcls")) as logs:
        config = ViTCLSConfig.from_pretrained(tmp_path)
    assert "num_regster_tokens" in logs.out
    assert (config.num_regster_tokens, config.num_register_tokens) == (4, 0)
    config, _ = ViTCLSConfig.from_pretrained(tmp_path, return_unused_kwargs=True)  # as models do
    assert config.num_regster_tokens == 4


def test_loading_keywords_of_transformers_are_not_fields(tmp_path: Path) -> None:
    build_tiny_config().save_pretrained(tmp_path)
    config, unused = ViTCLSConfig.from_pretrained(
        tmp_path, pooling="mean", device_map="cpu", return_unused_kwargs=True, revision="main"
    )
    assert config.pooling == "mean"
    assert "device_map" in unused
    others = {"token": "hf_ann", "generation_config": None, "kernel_config": None, "tp_size": 1}  # similar to fields
    for name, value in others.items():
        assert ViTCLSConfig.from_pretrained(tmp_path, **{name: value}).pooling == "cls"


def test_overrides_at_load_are_validated_together(tmp_path: Path) -> None:
    build_tiny_config().save_pretrained(tmp_path)
    config = ViTCLSConfig.from_pretrained(tmp_path, num_cls_tokens=0, pooling="mean")
    assert (config.num_cls_tokens, config.pooling) == (0, "mean")
    with raises_one_line("num_cls_tokens=1"):
        ViTCLSConfig.from_pretrained(tmp_path, num_cls_tokens=0)
    with raises_one_line("pooling"):
        ViTCLSModel.from_pretrained(tmp_path, pooling="other")


def test_labels_at_load(tmp_path: Path) -> None:
    ViTCLSConfig(id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path)
    kept = ViTCLSConfig.from_pretrained(tmp_path)
    assert (kept.id2label, kept.label2id, kept.num_labels) == ({0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}, 2)
    assert ViTCLSConfig.from_pretrained(tmp_path, num_labels=2).id2label == {0: "cat", 1: "dog"}
    more = ViTCLSConfig.from_pretrained(tmp_path, num_labels=4)
    assert (more.num_labels, len(more.label2id)) == (4, 4)
    renamed = ViTCLSConfig.from_pretrained(tmp_path, id2label={0: "a", 1: "b", 2: "c"})
    assert (renamed.num_labels, renamed.label2id) == (3, {"a": 0, "b": 1, "c": 2})


def test_stages_at_load(tmp_path: Path) -> None:
    """The stored stages apply only to models with the same number of layers."""
    build_tiny_config(out_features=["stem", "stage2"]).save_pretrained(tmp_path)
    assert ViTCLSConfig.from_pretrained(tmp_path, num_hidden_layers=2).out_features == ["stem", "stage2"]
    for num_layers in (1, 3):
        config = ViTCLSConfig.from_pretrained(tmp_path, num_hidden_layers=num_layers)
        assert (config.out_features, config.out_indices) == ([f"stage{num_layers}"], [num_layers])
        assert config.stage_names == ["stem", "stage1", "stage2", "stage3"][: num_layers + 1]


def test_gated_tokens_at_load(tmp_path: Path) -> None:
    """Gates stay with their tokens, the last of a group."""
    build_tiny_config(num_register_tokens=3, gated_tokens={"registers": 2}).save_pretrained(tmp_path)
    expected = {1: None, 2: {"registers": 1}, 3: {"registers": 2}, 5: {"registers": 4}}
    for num_registers, gated_tokens in expected.items():
        config = ViTCLSConfig.from_pretrained(tmp_path, num_register_tokens=num_registers, num_cls_tokens=2)
        assert config.gated_tokens == gated_tokens


def test_labels_at_construction() -> None:
    config = ViTCLSConfig(id2label={0: "cat", 1: "dog", 2: "cow"})
    assert (config.num_labels, config.label2id) == (3, {"cat": 0, "dog": 1, "cow": 2})
    assert ViTCLSConfig(num_labels=2, id2label={0: "cat", 1: "dog"}).num_labels == 2
    assert ViTCLSConfig(num_labels=0).num_labels == 0
    assert ViTCLSConfig(id2label={0: "crane", 1: "crane"}).num_labels == 2  # two ImageNet classes have this name


SAVED_CONFIGS = [
    {},
    {"image_size": (24, 64), "patch_size": [4, 16]},
    {"num_labels": 0},
    {"num_labels": 1, "problem_type": "regression"},
    {"id2label": {0: "cat", 1: "dog", 2: "cow"}},
    {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
    {"num_cls_tokens": 3, "tasks": {"species": ["cat", "dog"], "age": 3, "colour": 2}},
    {"num_cls_tokens": 2, "tasks": {"age": 3, "species": 2}, "cls_scopes": ["image", [2, 2, 0, 1]]},
    {"num_distillation_tokens": 1, "distillation_head": True, "distillation_inference": "distillation"},
    {"out_features": ["stem", "stage2"]},
    {"out_indices": [0, 1]},
    {"layer_scale_init_value": 1e-5, "drop_path_rate": 0.1, "layer_norm_eps": 1e-12},
    {"position_embedding_type": "rope_2d", "rope_periods": [1.0, 100.0], "rope_reference_grid": [1, 4]},
    {"num_register_tokens": 2, "gated_tokens": {"cls": 1, "registers": 2}, "register_neurons": [[0, 0], [1, 23]]},
    {"num_cls_tokens": 2, "pooled_cls_tokens": [1, 0], "cls_pooling": "concat", "pooled_activation": "tanh"},
]


@pytest.mark.parametrize("fields", SAVED_CONFIGS, ids=str)
def test_saved_and_loaded_configs_are_equal(fields: dict[str, Any], tmp_path: Path) -> None:
    config = build_tiny_config(**fields) if "id2label" not in fields else ViTCLSConfig(**fields)
    config.save_pretrained(tmp_path)
    for loaded in (ViTCLSConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, ViTCLSConfig)
        assert _comparable(loaded) == _comparable(config)
        assert (loaded.num_labels, loaded.label2id) == (config.num_labels, config.label2id)
        assert (loaded.out_features, loaded.out_indices) == (config.out_features, config.out_indices)


def test_tasks_are_ordered_by_name() -> None:
    """Task i uses CLS token i. JSON files, and dicts that are read from them, are sorted."""
    tasks = {"species": 2, "age": 3, "colour": ["red", "green"]}
    config = build_tiny_config(num_cls_tokens=3, tasks=tasks)
    for _ in range(2):
        assert list(config.task_labels().items()) == [
            ("age", ["LABEL_0", "LABEL_1", "LABEL_2"]),
            ("colour", ["red", "green"]),
            ("species", ["LABEL_0", "LABEL_1"]),
        ]
        config.tasks = tasks


def test_saved_files_contain_the_class_of_every_auto_class(tmp_path: Path) -> None:
    build_tiny_config().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_vitcls.ViTCLSConfig",
        "AutoModel": "modeling_vitcls.ViTCLSModel",
        "AutoModelForImageClassification": "modeling_vitcls.ViTCLSForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_vitcls.ViTCLSForMaskedImageModeling",
        "AutoBackbone": "modeling_vitcls.ViTCLSBackbone",
    }


def test_configurations_share_no_mutable_values() -> None:
    build_tiny_config().auto_map.clear()
    stored = {"gated_tokens": {"cls": 1}, "unknown": 1}  # without num_cls_tokens, which is 1 by default
    before = copy.deepcopy(stored)
    assert ViTCLSConfig.from_dict(stored, num_cls_tokens=2).gated_tokens == {"cls": 2}
    assert stored == before and len(build_tiny_config().auto_map) == 5


def test_saved_files_of_multi_task_models_contain_their_class(tmp_path: Path) -> None:
    build_tiny_config(tasks={"species": 2}).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageClassification"] == "modeling_vitcls.ViTCLSForMultiTaskClassification"


def test_a_reference_to_shared_code_is_kept_until_the_configuration_is_saved(tmp_path: Path) -> None:
    build_tiny_config().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    own_code = stored["auto_map"]
    shared_code = {name: f"ann/code--{reference}" for name, reference in own_code.items()}
    (tmp_path / "config.json").write_text(json.dumps(stored | {"auto_map": shared_code}))
    config = ViTCLSConfig.from_pretrained(tmp_path)
    assert config.auto_map == shared_code
    config.save_pretrained(tmp_path)  # next to the code of this package
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == own_code


def test_a_configuration_can_be_pushed(hub: LocalHub, tmp_path: Path) -> None:
    folder = str(tmp_path / "mine")
    build_tiny_config(num_register_tokens=2).save_pretrained(folder, push_to_hub=True, repo_id="ann/mine")
    assert json.loads(hub.read("ann/mine", "config.json"))["num_register_tokens"] == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal(copied: Any) -> None:
    config = build_tiny_config(num_cls_tokens=2, tasks={"species": 2, "age": 3}, out_indices=[0, 1])
    assert _comparable(copied(config)) == _comparable(config)
    assert copied(config).task_labels() == config.task_labels()


def test_assigning_a_wrong_type_is_an_error() -> None:
    config = build_tiny_config()
    with raises_one_line("num_register_tokens"):
        config.num_register_tokens = "4"
    assert config.num_register_tokens == 0


def test_contradictory_assignments_are_errors_when_the_model_is_built(tmp_path: Path) -> None:
    config = build_tiny_config()
    config.num_cls_tokens = 0
    with raises_one_line("num_cls_tokens=1"):
        ViTCLSModel(config)
    with raises_one_line("num_cls_tokens=1"):
        config.save_pretrained(tmp_path)
    config = build_tiny_config()
    config.num_attention_heads = 0
    with raises_one_line("`num_attention_heads` must be between 1 and"):
        ViTCLSModel(config)


def test_every_auto_class_builds_the_class_of_this_package() -> None:
    config = build_tiny_config()
    assert isinstance(AutoConfig.for_model("vitcls"), ViTCLSConfig)
    classes = {
        AutoModel: ViTCLSModel,
        AutoModelForImageClassification: ViTCLSForImageClassification,
        AutoModelForMaskedImageModeling: ViTCLSForMaskedImageModeling,
        AutoBackbone: ViTCLSBackbone,
    }
    assert {auto_class: type(auto_class.from_config(config)) for auto_class in classes} == classes


def test_defaults_and_none_are_not_saved_except_sizes(tmp_path: Path) -> None:
    ViTCLSConfig(num_register_tokens=2, qkv_bias=False).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {"hidden_size": 768, "num_cls_tokens": 1, "image_size": 224, "pooling": "cls"}.items() <= stored.items()
    assert (stored["num_register_tokens"], stored["qkv_bias"]) == (2, False)
    assert None not in stored.values()
    assert not {"position_antialias", "rope_theta", "hidden_act", "layer_type"} & stored.keys()
    loaded = ViTCLSConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == ViTCLSConfig(num_register_tokens=2, qkv_bias=False).to_dict() | {
        name: loaded.to_dict()[name] for name in ("transformers_version", "architectures") if name in loaded.to_dict()
    }


# Runs without the package. `first` and `second` are two checkpoints with different code.
REGISTER = """
import json, sys
from pathlib import Path

import torch
import transformers
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import BertConfig, BertLMHeadModel, BertModel, UperNetConfig, UperNetForSemanticSegmentation
from transformers import VisionEncoderDecoderModel, VisionTextDualEncoderModel

first, second, work = map(Path, sys.argv[1:])
models = [AutoModel.from_pretrained(folder, trust_remote_code=True) for folder in (first, second)]
assert [model.version() for model in models] == ["first", "second"]  # each runs its own code
try:
    AutoConfig.for_model("vitcls")
    raise AssertionError("remote code has registered itself")
except ValueError:
    pass

model = models[0].eval()
for _ in range(2):
    type(model.config).register_auto_classes()
images = torch.rand(2, 3, 32, 32)

sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
text_model = BertModel(BertConfig(vocab_size=20, **sizes))
dual = VisionTextDualEncoderModel(vision_model=model, text_model=text_model).eval()
dual.save_pretrained(work / "dual")
dual_again = VisionTextDualEncoderModel.from_pretrained(work / "dual").eval()

backbone_config = AutoConfig.from_pretrained(first, out_indices=[1, 2])
settings = {"hidden_size": 16, "pool_scales": [1, 2], "num_labels": 3, "use_auxiliary_head": False}
upernet = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone_config, **settings)).eval()
upernet.save_pretrained(work / "upernet")
upernet_again = UperNetForSemanticSegmentation.from_pretrained(work / "upernet").eval()

decoder = BertLMHeadModel(BertConfig(vocab_size=20, is_decoder=True, add_cross_attention=True, **sizes))
captioner = VisionEncoderDecoderModel(encoder=model, decoder=decoder).eval()
captioner.save_pretrained(work / "captioner")
captioner_again = VisionEncoderDecoderModel.from_pretrained(work / "captioner").eval()
words = torch.tensor([[1, 2], [3, 4]])

with torch.no_grad():
    captions = [one(images, decoder_input_ids=words).logits for one in (captioner, captioner_again)]
    features = [one.get_image_features(images).pooler_output for one in (dual, dual_again)]
    maps = [one(images).logits for one in (upernet, upernet_again)]
assert torch.equal(*features) and features[0].std() > 0
assert torch.equal(*maps) and maps[0].std() > 0
assert torch.equal(*captions) and captions[0].std() > 0

config = AutoConfig.from_pretrained(first)
print(json.dumps({
    "backbone": type(AutoBackbone.from_config(config)).__name__,
    "classifier": type(AutoModelForImageClassification.from_config(config)).__name__,
    "processors": [type(AutoImageProcessor.from_pretrained(first, backend=name)).__name__ for name in (None, "pil")],
    "registered code for another checkpoint": AutoModel.from_pretrained(second, trust_remote_code=True).version(),
}))
assert "modeling_vitcls" not in sys.modules
"""


@pytest.mark.slow
def test_one_line_registers_remote_code_for_composite_models(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ViTCLSModel(build_tiny_config()).save_pretrained(first)
    ViTCLSImageProcessor(size=32).save_pretrained(first)
    shutil.copytree(first, second)
    for folder in (first, second):
        code = folder / "modeling_vitcls.py"
        code.write_text(f"{code.read_text()}\n\nViTCLSModel.version = lambda self: {folder.name!r}\n")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    words = ["-I", "-c", REGISTER, first, second, tmp_path / "work"]
    run = run_fresh(*words, environment=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "backbone": "ViTCLSBackbone",
        "classifier": "ViTCLSForImageClassification",
        "processors": ["ViTCLSImageProcessor", "ViTCLSImageProcessorPil"],
        "registered code for another checkpoint": "first",
    }


def _fields(cls: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _comparable(config: ViTCLSConfig) -> dict[str, Any]:
    """Return all values that describe the model, in a comparable form."""
    stored = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return json.loads(json.dumps(stored | {"architectures": None}))
