"""Flags: limits of values, combinations of flags, and conversion to configurations, recipes and command lines."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.options import (
    AugmentationOptions,
    BenchmarkOptions,
    DataOptions,
    DistillationOptions,
    EvaluateOptions,
    FinetuneOptions,
    InspectOptions,
    LeJEPAOptions,
    MAEOptions,
    ModelOptions,
    PredictOptions,
    PretrainOptions,
    RunOptions,
    TrainingOptions,
    get_flag_fields,
    parse_cls_scopes,
    to_arguments,
    to_flags,
)


# Required arguments of the option classes.
REQUIRED: dict[type, dict[str, Any]] = {
    DataOptions: {"dataset": "digits"},
    ModelOptions: {"model": "vitcls-tiny"},
    EvaluateOptions: {"model": "m", "data": DataOptions("digits")},
    PredictOptions: {"model": "m", "paths": ("a.jpg",)},
    InspectOptions: {"model": "m", "paths": ("a.jpg",)},
}

# Class, flag, accepted values, rejected values
LIMITS: list[tuple[type, str, list[Any], list[Any]]] = [
    (DataOptions, "held_out_fraction", [0.0, 0.99], [-0.1, 1.0]),
    (DataOptions, "folds", [None, 2], [1]),
    (AugmentationOptions, "crop_scale", [None, 0.01, 1], [0, 1.1]),
    (AugmentationOptions, "shift", [None, 0, 0.9], [-0.1, 1]),
    (TrainingOptions, "epochs", [None, 0.1], [0]),
    (TrainingOptions, "layer_decay", [None, 0.1, 1], [0, 1.1]),
    (TrainingOptions, "ema_decay", [None, 0.1, 0.9], [0, 1]),
    (TrainingOptions, "trainable", ["full", "head", "lora", "last-12"], ["none", "last", "last-0", "last-1x"]),
    (DistillationOptions, "distillation_alpha", [0.1, 1], [0, 1.1]),
    (MAEOptions, "mask_ratio", [0.1, 0.9], [0, 1]),
    (LeJEPAOptions, "global_crop_scale", [0.06, 1], [0.05, 1.1]),
    (RunOptions, "license", [None, "cc-by-4.0"], ["CC BY", "", "-mit", "MIT"]),
    (PredictOptions, "threshold", [0, 1], [-0.1, 1.1]),
    (InspectOptions, "num_images", [1], [0]),
    (BenchmarkOptions, "batch_sizes", [(1,)], [(4, 0)]),
]


@pytest.mark.parametrize(
    ("kind", "name", "accepted", "rejected"), LIMITS, ids=[f"{case[0].__name__}-{case[1]}" for case in LIMITS]
)
def test_limits_of_values(kind: type, name: str, accepted: list[Any], rejected: list[Any]) -> None:
    for value in accepted:
        assert getattr(kind(**REQUIRED.get(kind, {}) | {name: value}), name) == value
    for value in rejected:
        with raises_one_line(f"--{name.replace('_', '-')} is {value}, but it must be "):
            kind(**REQUIRED.get(kind, {}) | {name: value})


# Class, flags that are accepted, changes that are rejected, and the flag in the error message.
COMBINATIONS: list[tuple[type, dict[str, Any], dict[str, Any], str]] = [
    (DataOptions, {"folds": 3, "fold": 3}, {"fold": 4}, "--fold is 4"),
    (RunOptions, {"hub_checkpoint_branch": "dev", "push_to_hub": True}, {"push_to_hub": False}, "--push-to-hub"),
    (EvaluateOptions, {"frozen": "knn"}, {"backend": "onnx"}, "--backend"),
    (PredictOptions, {"paths": ("a",)}, {"paths": ()}, "PATHS"),
    (PredictOptions, {"paths": (), "list": Path("b")}, {"dataset": "c"}, "PATHS"),
    (PredictOptions, {"paths": (), "dataset": "c", "split": "test"}, {"paths": ("a",), "dataset": None}, "--dataset"),
    (PredictOptions, {"output": Path("a.JSON")}, {"output": Path("a.txt")}, "--output a.txt"),
    (PredictOptions, {"features": ("cls",), "output": Path("a.parquet")}, {"output": None}, "--features"),
    (PredictOptions, {"features": ("cls",), "output": Path("a")}, {"output": Path("a.csv")}, "--features"),
    (InspectOptions, {"paths": (), "dataset": "c"}, {"paths": ("a",)}, "PATHS"),
    (InspectOptions, {"output": Path("a.HTM")}, {"output": Path("a.json")}, "--output a.json"),
]


@pytest.mark.parametrize(("kind", "accepted", "changes", "words"), COMBINATIONS)
def test_combinations_of_flags(kind: type, accepted: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    kind(**REQUIRED.get(kind, {}) | accepted)
    with raises_one_line(words):
        kind(**REQUIRED.get(kind, {}) | accepted | changes)


def test_the_output_folder_of_a_run_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    with raises_one_line("--output-dir"):
        FinetuneOptions(tmp_path / "out", DataOptions("digits"), ModelOptions("m"))


def test_regions_of_cls_tokens() -> None:
    grid = [[2, 3, row, column] for row in (0, 1) for column in (0, 1, 2)]  # row by row
    assert parse_cls_scopes(["1x2", "image", "2x3"]) == [[1, 2, 0, 0], [1, 2, 0, 1], "image", *grid]
    for text in ("0x2", "2", "2x", "x2", "2x2x2", "images", "1000x2"):
        with raises_one_line(f"--cls-scopes requires `image` or ROWSxCOLUMNS, but got {text!r}"):
            ModelOptions("vitcls-tiny", cls_scopes=("image", text))


def test_specialized_layers() -> None:
    options = ModelOptions("vitcls-tiny", specialized_layers=("norm:3", "qkv:1"))
    assert options.get_config_values() == {"specialized_layers": {"norm": [0, 1, 2], "qkv": [0]}}
    for text in ("norm", "mlp:2", "qkv:0", "norm:1:2"):
        with raises_one_line("--specialized-layers", text):
            ModelOptions("vitcls-tiny", specialized_layers=(text,))


def test_fields_of_the_configuration() -> None:
    assert ModelOptions("vitcls-tiny").get_config_values() == {}
    options = ModelOptions("vitcls-tiny", num_register_tokens=0, cls_scopes=("image", "2x1"))
    scopes = ["image", [2, 1, 0, 0], [2, 1, 1, 0]]
    assert options.get_config_values() == {"num_register_tokens": 0, "cls_scopes": scopes, "num_cls_tokens": 3}
    assert ModelOptions("m", cls_scopes=("image",), num_cls_tokens=2).get_config_values()["num_cls_tokens"] == 2


DEFAULTS = """
    output_dir=out dataset=digits held_out_fraction=0.2 shuffle_buffer=1000 max_unreadable_images=100 num_workers=2
    model=m flip=True auto_augment=none
    gradient_accumulation_steps=1 warmup=0.1 weight_decay=0.05 label_smoothing=0.1 class_balance=none
    max_gradient_norm=1.0 trainable=full lora_rank=8 log_every=10 log_attention_every=100 evaluate_every=1 probe=True
    fit=squash keep_checkpoints=2 report=True hub_verify=True distillation=hard
    distillation_alpha=0.5 distillation_tau=3.0

    global_crops=2 local_crops=6 global_crop_scale=0.3 sigreg_weight=0.05 projector_width=1024

    mask_ratio=0.75 decoder_layers=4

    model=m dataset=digits held_out_fraction=0.2 shuffle_buffer=1000 max_unreadable_images=100 num_workers=2
    batch_size=64 backend=torch

    model=m dataset=digits batch_size=32 shard_size=10000 threshold=0.5 feature_dtype=float32 backend=torch

    model=m dataset=digits batch_size=32 output=report.html num_images=8 max_images=256
"""


def test_defaults_of_flags() -> None:
    """The help texts, the documentation and published results depend on these values. Other flags are off."""
    run = Path("out"), DataOptions("digits"), ModelOptions("m")
    options = [
        FinetuneOptions(*run),
        PretrainOptions(*run).lejepa,
        PretrainOptions(*run).mae,
        EvaluateOptions("m", run[1]),
        PredictOptions("m", dataset="digits"),
        InspectOptions("m", dataset="digits"),
    ]
    flags = [{f"{name}={value}" for name, value in to_flags(each).items() if value} for each in options]
    assert flags == [set(text.split()) for text in DEFAULTS.split("\n\n")]


def test_flags_of_a_run_are_those_of_a_recipe() -> None:
    options = FinetuneOptions(
        Path("out"), DataOptions("digits", label_column=("a", "b")), ModelOptions("vitcls-tiny"), config=Path("a.yaml")
    )
    flags = to_flags(options)
    assert flags.keys() == get_flag_fields(FinetuneOptions).keys() - {"config"}
    assert flags["output_dir"] == "out" and flags["label_column"] == ["a", "b"] and flags["model"] == "vitcls-tiny"
    assert flags["distillation_tau"] == 3.0 and flags["flip"] is True and flags["teacher"] is None
    arguments = [to_arguments(name, flags[name]) for name in ("output_dir", "label_column", "flip")]
    assert arguments == [["--output-dir", "out"], ["--label-column", "a", "b"], ["--flip"]]
    assert to_arguments("hub_verify", False) == ["--no-hub-verify"] and to_arguments("seed", 0) == ["--seed", "0"]
