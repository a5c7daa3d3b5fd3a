"""Flags: limits of values, combinations of flags, and conversion to configurations, recipes and command lines."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.options import (
    AugmentationOptions,
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
    get_flag_names,
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

# Class, flag, accepted values, rejected values, and the requirement in the error message.
LIMITS: list[tuple[type, str, list[Any], list[Any], str]] = [
    (DataOptions, "held_out_fraction", [0.0, 0.99], [-0.1, 1.0], "at least 0 and below 1"),
    (DataOptions, "folds", [None, 2], [1], "2 or more"),
    (DataOptions, "shuffle_buffer", [1], [0], "1 or more"),
    (DataOptions, "split_seed", [0], [-1], "0 or more"),
    (DataOptions, "max_unreadable_images", [0], [-1], "0 or more"),
    (DataOptions, "num_workers", [0], [-1], "0 or more"),
    (AugmentationOptions, "crop_scale", [None, 0.01, 1], [0, 1.1], "above 0 and at most 1"),
    (AugmentationOptions, "rotation", [0, 180], [-1, 181], "from 0 to 180"),
    (AugmentationOptions, "rand_augment_operations", [1], [0], "1 or more"),
    (AugmentationOptions, "repeated_augmentation", [1], [0], "1 or more"),
    (AugmentationOptions, "rand_augment_magnitude", [0, 30], [-1, 31], "from 0 to 30"),
    (AugmentationOptions, "random_erasing", [0, 1], [-0.1, 1.1], "from 0 to 1"),
    (AugmentationOptions, "shift", [None, 0, 0.9], [-0.1, 1], "at least 0 and below 1"),
    (AugmentationOptions, "zoom", [0, 0.9], [-0.1, 1], "at least 0 and below 1"),
    (AugmentationOptions, "mixup", [0, 0.1], [-0.1], "0 or more"),
    (AugmentationOptions, "cutmix", [0, 0.1], [-0.1], "0 or more"),
    (TrainingOptions, "epochs", [None, 0.1], [0], "above 0"),
    (TrainingOptions, "max_steps", [None, 1], [0], "1 or more"),
    (TrainingOptions, "batch_size", [None, 1], [0], "1 or more"),
    (TrainingOptions, "gradient_accumulation_steps", [1], [0], "1 or more"),
    (TrainingOptions, "learning_rate", [None, 1e-9], [0, -1.0], "above 0"),
    (TrainingOptions, "layer_decay", [None, 0.1, 1], [0, 1.1], "above 0 and at most 1"),
    (TrainingOptions, "warmup", [0, 0.9], [-0.1, 1], "at least 0 and below 1"),
    (TrainingOptions, "weight_decay", [0], [-0.1], "0 or more"),
    (TrainingOptions, "label_smoothing", [0, 0.9], [-0.1, 1], "at least 0 and below 1"),
    (TrainingOptions, "max_gradient_norm", [0.1], [0], "above 0"),
    (TrainingOptions, "ema_decay", [None, 0.1, 0.9], [0, 1], "between 0 and 1"),
    (TrainingOptions, "lora_rank", [1], [0], "1 or more"),
    (TrainingOptions, "seed", [0], [-1], "0 or more"),
    (TrainingOptions, "log_every", [1], [0], "1 or more"),
    (TrainingOptions, "log_attention_every", [0], [-1], "0 or more"),
    (TrainingOptions, "evaluate_every", [1], [0], "1 or more"),
    (TrainingOptions, "patience", [None], [0], "1 or more"),
    (
        TrainingOptions,
        "trainable",
        ["full", "head", "lora", "last-1", "last-12"],
        ["none", "last", "last-0", "last-1x"],
        "full, head, lora or last-N such as last-2",
    ),
    (DistillationOptions, "distillation_alpha", [0.1, 1], [0, 1.1], "above 0 and at most 1"),
    (DistillationOptions, "distillation_tau", [0.1], [0], "above 0"),
    (DistillationOptions, "teacher_views", [0], [-1], "0 or more"),
    (MAEOptions, "mask_ratio", [0.1, 0.9], [0, 1], "between 0 and 1"),
    (MAEOptions, "decoder_layers", [1], [0], "1 or more"),
    (LeJEPAOptions, "local_crops", [0], [-1], "0 or more"),
    (LeJEPAOptions, "global_crop_scale", [0.06, 1], [0.05, 1.1], "above 0.05 and at most 1"),
    (LeJEPAOptions, "sigreg_weight", [0.01], [0, 1], "between 0 and 1"),
    (RunOptions, "save_every", [None, 1], [0], "1 or more"),
    (RunOptions, "keep_checkpoints", [1], [0], "1 or more"),
    (RunOptions, "hub_checkpoint_branch", [None], ["", "main"], "a branch other than main"),
    (RunOptions, "license", [None, "cc-by-4.0"], ["CC BY", "", "-mit", "MIT"], "a Hub license identifier"),
    (EvaluateOptions, "batch_size", [1], [0], "1 or more"),
    (EvaluateOptions, "frozen_repeats", [1], [0], "1 or more"),
    (
        EvaluateOptions,
        "frozen",
        [None, "knn", "logreg", "few-shot:5"],
        ["svm", "None", "few-shot:0", "few-shot:5x"],
        "knn, logreg or few-shot:N",
    ),
    (PredictOptions, "shard_size", [1], [0], "1 or more"),
    (PredictOptions, "batch_size", [1], [0], "1 or more"),
    (PredictOptions, "top_k", [None, 1], [0], "1 or more"),
    (PredictOptions, "num_workers", [None, 1], [0], "1 or more"),
    (PredictOptions, "threshold", [0, 1], [-0.1, 1.1], "from 0 to 1"),
    (InspectOptions, "num_images", [1], [0], "1 or more"),
    (InspectOptions, "max_images", [1], [0], "1 or more"),
    (InspectOptions, "batch_size", [1], [0], "1 or more"),
]


@pytest.mark.parametrize(
    ("kind", "name", "accepted", "rejected", "requirement"),
    LIMITS,
    ids=[f"{case[0].__name__}-{case[1]}" for case in LIMITS],
)
def test_limits_of_values(kind: type, name: str, accepted: list[Any], rejected: list[Any], requirement: str) -> None:
    for value in accepted:
        assert getattr(kind(**REQUIRED.get(kind, {}) | {name: value}), name) == value
    for value in rejected:
        with raises_one_line(f"--{name.replace('_', '-')} is {value}, but it must be {requirement}"):
            kind(**REQUIRED.get(kind, {}) | {name: value})


# Class, flags that are accepted, changes that are rejected, and a part of the error message.
COMBINATIONS: list[tuple[type, dict[str, Any], dict[str, Any], str]] = [
    (DataOptions, {"folds": 3, "fold": 1}, {"fold": 0}, "--fold is 0, but it must be from 1 to the value of --folds"),
    (DataOptions, {"folds": 3, "fold": 3}, {"fold": 4}, "--fold is 4"),
    (DataOptions, {"folds": 3, "fold": 2}, {"folds": None}, "--fold is 2"),
    (TrainingOptions, {"patience": 1, "select": "best"}, {"select": "last"}, "--patience requires --select best"),
    (
        RunOptions,
        {"hub_checkpoint_branch": "dev", "push_to_hub": True},
        {"push_to_hub": False},
        "--hub-checkpoint-branch requires --push-to-hub",
    ),
    (RunOptions, {"eval_benchmark": "a/b", "eval_task_id": "t"}, {"eval_task_id": None}, "require each other"),
    (RunOptions, {"eval_benchmark": "a/b", "eval_task_id": "t"}, {"eval_benchmark": None}, "require each other"),
    (RunOptions, {"eval_benchmark": "a/b", "eval_task_id": "t"}, {"eval_benchmark": "b"}, "a dataset on the Hub"),
    (RunOptions, {"eval_benchmark": "a/b", "eval_task_id": "t"}, {"eval_benchmark": "a/b/c"}, "a dataset on the Hub"),
    (PredictOptions, {"paths": ("a",)}, {"paths": ()}, "exactly one of PATHS, --list and --dataset"),
    (PredictOptions, {"paths": ("a",)}, {"list": Path("b")}, "exactly one of PATHS, --list and --dataset"),
    (PredictOptions, {"paths": ("a",)}, {"dataset": "c"}, "exactly one of PATHS, --list and --dataset"),
    (PredictOptions, {"paths": (), "list": Path("b")}, {"dataset": "c"}, "exactly one of PATHS"),
    *(
        (
            PredictOptions,
            {"paths": (), "dataset": "c", name: value},
            {"paths": ("a",), "dataset": None},
            "--split, --image-column and --streaming require --dataset",
        )
        for name, value in {"split": "test", "image_column": "x", "streaming": True}.items()
    ),
    *(
        (PredictOptions, {"output": Path(f"a{suffix}")}, {"output": Path("a.txt")}, "--output a.txt: set a .csv")
        for suffix in ("", ".csv", ".JSON", ".jsonl", ".parquet")
    ),
    (
        PredictOptions,
        {"features": ("cls",), "output": Path("a.parquet")},
        {"output": None},
        "--features cls cannot be written to a printed table",
    ),
    (
        PredictOptions,
        {"features": ("cls",), "output": Path("a")},
        {"output": Path("a.csv")},
        "--features cls cannot be written to a CSV file",
    ),
    (InspectOptions, {"paths": ("a",)}, {"paths": ()}, "Set either PATHS or --dataset"),
    (InspectOptions, {"paths": (), "dataset": "c"}, {"paths": ("a",)}, "Set either PATHS or --dataset"),
    *(
        (
            InspectOptions,
            {"paths": (), "dataset": "c", name: value},
            {"paths": ("a",), "dataset": None},
            "--image-column, --label-column and --label-separator require --dataset",
        )
        for name, value in {"image_column": "x", "label_column": ("x",), "label_separator": "|"}.items()
    ),
    (
        InspectOptions,
        {"output": Path("a.HTM")},
        {"output": Path("a.json")},
        "--output a.json: the file name must end in .html",
    ),
    (
        InspectOptions,
        {"json": Path("a.JSON")},
        {"json": Path("a.html")},
        "--json a.html: the file name must end",
    ),
]


@pytest.mark.parametrize(("kind", "accepted", "changes", "words"), COMBINATIONS)
def test_combinations_of_flags(kind: type, accepted: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    kind(**REQUIRED.get(kind, {}) | accepted)
    with raises_one_line(words):
        kind(**REQUIRED.get(kind, {}) | accepted | changes)


def test_an_existing_folder_is_an_output_for_any_name(tmp_path: Path) -> None:
    (tmp_path / "features.v2").mkdir()
    PredictOptions("m", ("a.jpg",), output=tmp_path / "features.v2", features=("cls",))
    with raises_one_line("features.v3"):
        PredictOptions("m", ("a.jpg",), output=tmp_path / "features.v3", features=("cls",))


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
    model=m flip=True auto_augment=none rand_augment_operations=2 rand_augment_magnitude=9 repeated_augmentation=1
    gradient_accumulation_steps=1 warmup=0.1 weight_decay=0.05 label_smoothing=0.1 class_balance=none
    max_gradient_norm=1.0 trainable=full lora_rank=8 log_every=10 log_attention_every=100 evaluate_every=1 probe=True
    fit=squash keep_checkpoints=2 report=True hub_verify=True distillation=hard
    distillation_alpha=0.5 distillation_tau=3.0

    global_crops=2 local_crops=6 global_crop_scale=0.3 sigreg_weight=0.05 projector_width=1024 projector_features=64

    mask_ratio=0.75 decoder_layers=4

    model=m dataset=digits held_out_fraction=0.2 shuffle_buffer=1000 max_unreadable_images=100 num_workers=2
    batch_size=64 frozen_layers=last frozen_repeats=10 backend=torch

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
    assert flags.keys() == get_flag_names(FinetuneOptions) - {"config"}
    assert flags["output_dir"] == "out" and flags["label_column"] == ["a", "b"] and flags["model"] == "vitcls-tiny"
    assert flags["distillation_tau"] == 3.0 and flags["flip"] is True and flags["teacher"] is None
    arguments = [to_arguments(name, flags[name]) for name in ("output_dir", "label_column", "flip")]
    assert arguments == [["--output-dir", "out"], ["--label-column", "a", "b"], ["--flip"]]
    assert to_arguments("hub_verify", False) == ["--no-hub-verify"] and to_arguments("seed", 0) == ["--seed", "0"]
