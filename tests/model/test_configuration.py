"""ViTCLSConfig: derived values, errors and their messages, and saving.

Random configurations are tested in test_properties.py.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.fresh_processes import run_python
from helpers.tiny_models import PROCESSOR, SIZES, build_tiny_config, edit_config, raises_one_line
from transformers import AutoConfig, PreTrainedConfig
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.model.configuration_vitcls import AUTO_MAP
from modeling_vitcls.runtime.files import read_json, write_json
from scripts.tools.make_field_tables import PAGE, build_tables, replace_tables


NAN = float("nan")

# Contradictory fields; the error names the first of them.
CONTRADICTIONS = [
    {"num_cls_tokens": 0},
    {"num_attention_heads": 4, "hidden_size": 18},
    {"image_size": [32, 20]},
    {"distillation_head": True},
    {
        "distillation_inference": "distillation",
        "num_distillation_tokens": 1,
        "distillation_head": False,
    },
    {"token_init": "zeros", "num_register_tokens": 2},
    {"token_init": "zeros", "num_cls_tokens": 2, "position_embedding_type": "rope_2d"},
    {"hidden_size": 12, "position_embedding_type": "rope_2d"},
    {"hidden_size": 18, "position_embedding_type": "sincos_2d"},
    {"num_cls_tokens": 0, "pooling": "cls_mean"},
    {"cls_scopes": ["image"], "num_cls_tokens": 2},
    *(
        {"cls_scopes": [scope]}
        for scope in ("whole", [2, 2, 0], [2, 2, 2, 0], [2, 2, 0, 2], [2, 2, -1, 0])
    ),
    *({"cls_scopes": [scope]} for scope in ([2, 2, 0, -1], [1, 5, 0, 0], [5, 1, 0, 0])),
    {"tasks": {"species": 2}, "pooling": "mean"},
    *({"pooled_layers": layers} for layers in ([], [0], [3], [-3], [2, -1], [1, 1])),
    {"pooled_layers": [1, 2], "pooling": "attention"},
    *(
        {"tasks": tasks}
        for tasks in ({"species": 2, "age": 2}, {"species": ["cat", "cat"]}, {"a b": 2}, {"age": 0})
    ),
    {"cls_scopes": ["image", [2, 2, 0, 0]], "num_cls_tokens": 2, "tasks": {"species": 2, "age": 2}},
    *({"fading_tokens": counts} for counts in ({"patches": 1}, {"cls": 2}, {"cls": 0})),
    {"pooled_cls_tokens": []},
    {"pooled_cls_tokens": [0, 2], "num_cls_tokens": 2},
    {"attention_pool_heads": 3},
    {"hidden_size": 16, "num_attention_heads": 3, "attention_head_size": 8, "pooling": "attention"},
    *({"rope_reference_grid": grid} for grid in ([4, 0], [4])),
    *({"rope_periods": periods} for periods in ([1.0, math.inf], [0.0, 1.0], [1.0])),
    *({"num_labels": number, "id2label": {0: "cat", 1: "dog"}} for number in (1, 3)),
    {"out_features": ["stage3"]},
    {"attention_type": "differential", "relative_position_bias": "layer"},
    {"attention_type": "differential", "position_embedding_type": "rope_2d"},
    {"attention_type": "differential", "attention_head_size": 7},
]

# Values of a wrong type or out of range.
WRONG_VALUES = [
    *(("hidden_size", value) for value in (16.0, "16", None, True)),
    *(("drop_path_rate", value) for value in (-0.1, 1.0, NAN)),
    *(("patch_size", value) for value in (0, [8], [8, 0], 5000)),
    ("image_size", 32_768),
    *(("hidden_act", value) for value in ("geluu", None)),
    ("pooled_activation", "tan"),
    *(("id2label", value) for value in ({5: "cat"}, [])),
    ("label2id", ["cat"]),
    *(("cls_scopes", value) for value in ("image", [[2, 2, 0, 0.5]])),
    ("layer_norm_eps", math.inf),
    *((name, 0.0) for name in ("initializer_range", "rope_theta")),
    *((name, 1.0) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    ("pooling", "other"),
    ("qkv_bias", 1),
    *((name, NAN) for name in ("layer_scale_init_value", "distance_threshold")),
    ("problem_type", "classification"),
    *(("num_labels", value) for value in (-1, True)),
    ("tasks", {"species": 1.5}),
    *(("num_register_tokens", value) for value in (-1, 100_001)),
    *(("attention_head_size", value) for value in (0, 1_000_001)),
    *(
        ("class_statistics", {"tokens": tokens, "num_classes": 2})
        for tokens in (5, [], [[-1, "cls", "x"]], [["-1", "cls"]], [[-3, "cls"]], [[-1, "max"]])
    ),
    *(
        ("class_statistics", {"tokens": [[-1, "cls"]], "num_classes": number})
        for number in ("3", -1, 10**12, 1)
    ),
]

# class variables, and fields of transformers
UNDOCUMENTED = {
    *("_skip_validation", "keys_to_ignore_at_inference", "base_model_fsdp_plan"),
    *("architectures", "id2label", "label2id", "problem_type"),
}


# Numbers of parameters with 1,000 labels in the papers' code (timm's vit_*_patch16_224 and
# deit_*_patch16_224).
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656), ("large", 304_326_632)],
)
def test_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = ViTCLSForImageClassification(ViTCLSConfig.from_preset(name, num_labels=1000))
    assert model.num_parameters() == parameters
    assert model.config.head_dim == 64


def test_presets_accept_overrides_and_names_of_the_command_line() -> None:
    config = ViTCLSConfig.from_preset("vitcls-tiny", hidden_size=96, num_register_tokens=4)
    assert config.hidden_size == 96
    assert config.num_attention_heads == 3
    assert config.num_register_tokens == 4
    assert ViTCLSConfig(num_channels=100_000).num_channels == 100_000  # the largest value
    with raises_one_line("huge", "tiny, small, base, large"):
        ViTCLSConfig.from_preset("huge")


def test_fields_are_documented_in_their_order() -> None:
    """The docstring lists the first group; the page has the text below each field."""
    body = [
        name.removeprefix("_") for name in ViTCLSConfig.__annotations__ if name not in UNDOCUMENTED
    ]
    docstring = ViTCLSConfig.__doc__.partition("**Tokens")[2].partition("Raises:")[0]
    table = build_tables().partition("### Heads")[0]
    first = re.findall(r"`(\w+)`", docstring)
    assert first == body[: len(first)] == re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \|", build_tables(), re.MULTILINE) == body
    page = PAGE.read_text()
    assert replace_tables(page) == page, "run scripts/tools/make_field_tables.py"


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
def test_too_large_values_are_errors_before_a_list_of_their_length_is_built(
    fields: Fields,
) -> None:
    tracemalloc.start()
    try:
        with raises_one_line(next(iter(fields)), "000"):
            ViTCLSConfig(**fields)
        assert tracemalloc.get_traced_memory()[1] < 2**20  # a list of 10^6 references takes 8 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("fields", CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_contradictions_are_errors(fields: Fields) -> None:
    with raises_one_line(next(iter(fields))):
        build_tiny_config(**fields)


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_a_wrong_value_names_its_field(name: str, value: Any) -> None:
    fields = {**SIZES, name: value}
    if name == "id2label":
        del fields["num_labels"]
    with raises_one_line(name):
        ViTCLSConfig(**fields)


def test_a_misspelt_keyword_is_an_error(tmp_path: Path) -> None:
    for keyword, meant in (
        ("num_regster_tokens", "num_register_tokens"),
        ("out_feature", "out_features"),
    ):
        with raises_one_line(keyword, meant):
            ViTCLSConfig(**{keyword: 4})

    ViTCLSModel(build_tiny_config()).save_pretrained(tmp_path)
    for load in (
        ViTCLSConfig,
        AutoConfig,
        ViTCLSModel,
        ViTCLSForImageClassification,
        ViTCLSBackbone,
    ):
        with raises_one_line("num_regster_tokens", "num_register_tokens"):
            load.from_pretrained(tmp_path, num_regster_tokens=4)


def test_an_unknown_field_of_a_file_is_kept_and_reported(tmp_path: Path) -> None:
    """The file may be from another version of the package."""
    build_tiny_config().save_pretrained(tmp_path)
    edit_config(tmp_path, num_regster_tokens=4)
    with CaptureLogger(logging.get_logger("modeling_vitcls.model.configuration_vitcls")) as logs:
        config = ViTCLSConfig.from_pretrained(tmp_path)
    assert "num_regster_tokens" in logs.out
    assert config.num_regster_tokens == 4
    assert config.num_register_tokens == 0
    config, _ = ViTCLSConfig.from_pretrained(tmp_path, return_unused_kwargs=True)  # as models do
    assert config.num_regster_tokens == 4


def test_loading_keywords_of_transformers_are_not_fields(tmp_path: Path) -> None:
    build_tiny_config().save_pretrained(tmp_path)
    config, unused = ViTCLSConfig.from_pretrained(
        tmp_path, pooling="mean", device_map="cpu", return_unused_kwargs=True, revision="main"
    )

    assert config.pooling == "mean"
    assert "device_map" in unused

    others = {
        "token": "hf_ann",
        "generation_config": None,
        "kernel_config": None,
        "tp_size": 1,
    }  # similar to fields

    for name, value in others.items():
        assert ViTCLSConfig.from_pretrained(tmp_path, **{name: value}).pooling == "cls"


def test_stored_labels_are_kept_until_their_number_or_names_change(tmp_path: Path) -> None:
    ViTCLSConfig(id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path)
    kept = ViTCLSConfig.from_pretrained(tmp_path)

    assert kept.id2label == {0: "cat", 1: "dog"}
    assert kept.label2id == {"cat": 0, "dog": 1}
    assert kept.num_labels == 2
    assert ViTCLSConfig.from_pretrained(tmp_path, num_labels=2).id2label == {0: "cat", 1: "dog"}

    more = ViTCLSConfig.from_pretrained(tmp_path, num_labels=4)
    assert more.num_labels == 4
    assert len(more.label2id) == 4

    renamed = ViTCLSConfig.from_pretrained(tmp_path, id2label={0: "a", 1: "b", 2: "c"})
    assert renamed.num_labels == 3
    assert renamed.label2id == {"a": 0, "b": 1, "c": 2}
    assert ViTCLSConfig(id2label={"0": "a"}, label2id={"a": "0"}).label2id == {"a": 0}

    ViTCLSConfig(id2label={index: str(index + 1) for index in range(12)}).save_pretrained(tmp_path)
    stored = ViTCLSConfig.from_pretrained(tmp_path)  # JSON sorts the names as text
    assert list(stored.label2id) == list(stored.id2label.values())


def test_stored_stages_apply_to_the_stored_number_of_layers_only(tmp_path: Path) -> None:
    """The stored stages apply only to models with the same number of layers."""
    build_tiny_config(out_features=["stem", "stage2"]).save_pretrained(tmp_path)
    assert ViTCLSConfig.from_pretrained(tmp_path, num_hidden_layers=2).out_features == [
        "stem",
        "stage2",
    ]
    assert ViTCLSConfig.from_pretrained(tmp_path, out_indices=[0, 1]).out_features == [
        "stem",
        "stage1",
    ]
    for num_layers in (1, 3):
        config = ViTCLSConfig.from_pretrained(tmp_path, num_hidden_layers=num_layers)
        assert config.out_features == [f"stage{num_layers}"]
        assert config.out_indices == [num_layers]
        assert config.stage_names == ["stem", "stage1", "stage2", "stage3"][: num_layers + 1]


SAVED_CONFIGS = [
    {},
    {"image_size": (24, 64), "patch_size": [4, 16]},
    {
        "num_labels": 1,
        "problem_type": "regression",
        "num_register_tokens": 1,
        "token_init": "zeros",
    },
    {"id2label": {0: "cat", 1: "dog", 2: "cow"}},
    {"num_cls_tokens": 2, "tasks": {"age": 1, "species": 2}, "cls_scopes": ["image", [4, 4, 0, 1]]},
    {"out_indices": [0, 1]},
    {"num_register_tokens": 2, "fading_tokens": {"cls": 1, "registers": 2}},
]


@pytest.mark.parametrize("fields", SAVED_CONFIGS, ids=str)
def test_saved_and_loaded_configs_are_equal(fields: Fields, tmp_path: Path) -> None:
    config = build_tiny_config(**fields) if "id2label" not in fields else ViTCLSConfig(**fields)
    config.save_pretrained(tmp_path)
    for loaded in (ViTCLSConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, ViTCLSConfig)
        assert _comparable(loaded) == _comparable(config)
        assert loaded.out_features == config.out_features
        assert loaded.out_indices == config.out_indices


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


def test_auto_classes_and_the_map_of_remote_code_agree() -> None:
    config = build_tiny_config()
    for auto_class in ("AutoModel", *[name for name in AUTO_MAP if "For" in name], "AutoBackbone"):
        model = getattr(transformers, auto_class).from_config(config)
        assert AUTO_MAP[auto_class] == f"modeling_vitcls.{type(model).__name__}"


class OwnClassifier(ViTCLSForImageClassification):
    """A classifier of a person, whose file is copied to the folder of the model."""


@pytest.mark.parametrize(
    ("model_class", "tasks", "module"),
    [
        (ViTCLSForMultiTaskClassification, {"age": 2}, "modeling_vitcls"),
        (OwnClassifier, None, "test_configuration"),
    ],
)
def test_a_saved_model_is_loaded_as_its_own_class(
    model_class: Any, tasks: Any, module: str, tmp_path: Path
) -> None:
    """Only the saved configuration names the code."""
    model = model_class(build_tiny_config(tasks=tasks))
    model.save_pretrained(tmp_path)
    auto_map = read_json(tmp_path / "config.json")["auto_map"]
    name = f"{module}.{model_class.__name__}"
    assert auto_map == AUTO_MAP | {"AutoModelForImageClassification": name}
    assert not hasattr(model.config, "auto_map")


def test_contradictory_assignments_are_errors_when_the_model_is_built(tmp_path: Path) -> None:
    config = build_tiny_config()
    config.num_cls_tokens = 0
    with raises_one_line("num_cls_tokens=1"):
        ViTCLSModel(config)
    with raises_one_line("num_cls_tokens=1"):
        config.save_pretrained(tmp_path)
    with raises_one_line("num_attention_heads"):
        build_tiny_config().num_attention_heads = 0


def test_every_field_of_the_architecture_is_saved(tmp_path: Path) -> None:
    """A folder is the same model for a version of the package with other defaults."""
    config = ViTCLSConfig(num_register_tokens=2, qkv_bias=False)
    config.save_pretrained(tmp_path)
    stored = read_json(tmp_path / "config.json")

    fields = {field.name for field in dataclasses.fields(ViTCLSConfig)}
    fields -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert {name for name in fields if not name.startswith("_")} <= stored.keys()
    assert stored["layer_norm_eps"] == 1e-6
    assert stored["hidden_act"] == "gelu"
    assert stored["pooled_layers"] is None
    assert stored["qkv_bias"] is False
    assert stored["auto_map"] == AUTO_MAP


def test_a_configuration_keeps_code_in_another_repository(tmp_path: Path) -> None:
    auto_map = {"AutoModel": "ann/code--modeling_vitcls.ViTCLSModel"}
    ViTCLSConfig(auto_map=auto_map).save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["auto_map"] == auto_map


def test_a_subclass_may_rename_fields() -> None:
    class Renamed(ViTCLSConfig):
        attribute_map = {"depth": "num_hidden_layers"}

    config = Renamed()
    config.depth = 5
    assert config.depth == config.num_hidden_layers == 5


# Runs without PyTorch.
READ_CONFIG = """
import sys
sys.modules["torch"] = None
from transformers import AutoConfig
print(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).token_counts)
"""


def test_a_checkpoint_that_stores_no_cls_pooling_reads_the_first_token(tmp_path: Path) -> None:
    build_tiny_config(num_cls_tokens=3).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    write_json(file, {k: v for k, v in read_json(file).items() if k != "cls_pooling"})
    assert ViTCLSConfig.from_pretrained(tmp_path).cls_pooling == "first"


def test_a_new_configuration_reads_all_cls_tokens_also_after_saving(tmp_path: Path) -> None:
    build_tiny_config(num_cls_tokens=3).save_pretrained(tmp_path)
    assert ViTCLSConfig.from_pretrained(tmp_path).cls_pooling == "mean"


def test_new_names_of_labels_are_saved(tmp_path: Path) -> None:
    config = ViTCLSConfig(id2label={0: "cat", 1: "dog"})
    config.id2label = {0: "Katze", 1: "Hund"}
    config.save_pretrained(tmp_path)
    assert ViTCLSConfig.from_pretrained(tmp_path).label2id == {"Katze": 0, "Hund": 1}


def test_contradicting_names_of_labels_are_not_saved(tmp_path: Path) -> None:
    """A folder with them cannot be loaded."""
    config = ViTCLSConfig(id2label={0: "cat", 1: "dog"})
    config.label2id = {"Katze": 0, "Hund": 1}
    with raises_one_line("`label2id` has ['Katze']"):
        config.save_pretrained(tmp_path)


def test_a_configuration_is_read_without_pytorch(tmp_path: Path) -> None:
    ViTCLSModel(build_tiny_config(num_register_tokens=3)).save_pretrained(tmp_path / "model")
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache")}
    done = run_python("-c", READ_CONFIG, tmp_path / "model", environment=environment)
    assert "(1, 0, 3)" in done.stdout


# Runs without the package. `first` and `second` are two checkpoints with different code.
REGISTER = """
import json, sys
from pathlib import Path

import torch
import transformers
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel
from transformers import AutoModelForImageClassification
from transformers import BertConfig, BertModel, VisionTextDualEncoderModel

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

sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
text_model = BertModel(BertConfig(vocab_size=20, num_hidden_layers=1, **sizes))
dual = VisionTextDualEncoderModel(vision_model=model, text_model=text_model).eval()
dual.save_pretrained(work / "dual")
dual_again = VisionTextDualEncoderModel.from_pretrained(work / "dual").eval()

with torch.no_grad():
    features = [one.get_image_features(images).pooler_output for one in (dual, dual_again)]
assert torch.equal(*features) and features[0].std() > 0

config = AutoConfig.from_pretrained(first)
processors = [AutoImageProcessor.from_pretrained(first, backend=name) for name in (None, "pil")]
other = AutoModel.from_pretrained(second, trust_remote_code=True)
print(json.dumps({
    "backbone": type(AutoBackbone.from_config(config)).__name__,
    "classifier": type(AutoModelForImageClassification.from_config(config)).__name__,
    "processors": [type(processor).__name__ for processor in processors],
    "registered code for another checkpoint": other.version(),
}))
assert "modeling_vitcls" not in sys.modules
"""


@pytest.mark.slow
def test_one_line_registers_remote_code_for_composite_models(tmp_path: Path) -> None:
    first = tmp_path / "first"
    second = tmp_path / "second"
    ViTCLSModel(build_tiny_config()).save_pretrained(first)
    PROCESSOR.save_pretrained(first)
    shutil.copytree(first, second)
    for folder in (first, second):
        code = folder / "modeling_vitcls.py"
        code.write_text(
            f"{code.read_text()}\n\nViTCLSModel.version = lambda self: {folder.name!r}\n"
        )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    words = ["-I", "-c", REGISTER, first, second, tmp_path / "work"]
    run = run_python(*words, environment=environment, cwd=tmp_path)

    assert json.loads(run.stdout.splitlines()[-1]) == {
        "backbone": "ViTCLSBackbone",
        "classifier": "ViTCLSForImageClassification",
        "processors": ["ViTCLSImageProcessor", "ViTCLSImageProcessorPil"],
        "registered code for another checkpoint": "first",
    }


def _comparable(config: ViTCLSConfig) -> dict[str, Any]:
    """Return all values that describe the model, in a comparable form."""
    stored = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return json.loads(json.dumps(stored | {"architectures": None}))
