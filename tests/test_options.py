"""Flags: limits, combinations, and conversion to configurations and command lines."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.analysis.options import InspectOptions
from modeling_vitcls.cli.commands import PushOptions
from modeling_vitcls.data.options import AugmentationOptions, DataOptions
from modeling_vitcls.exporting.options import ExportOptions
from modeling_vitcls.inference.options import EvaluateOptions, PredictOptions
from modeling_vitcls.runtime.flags import check_types, to_flags
from modeling_vitcls.training.options import FinetuneOptions, ModelOptions, parse_cls_scopes
from scripts.benchmark import BenchmarkOptions
from scripts.study import StudyOptions


# Required arguments of the option classes.
REQUIRED = {
    DataOptions: {"dataset": "digits"},
    ModelOptions: {"model": "vitcls-tiny"},
    FinetuneOptions: {"model": "m", "dataset": "digits", "output_dir": Path("o")},
    PushOptions: {"model": Path("m")},
    EvaluateOptions: {"model": "m", "dataset": "digits"},
    PredictOptions: {"model": "m", "paths": ("a.jpg",), "output": Path("out.json")},
    InspectOptions: {"model": "m", "paths": ("a.jpg",)},
    StudyOptions: {"config": Path("c"), "output_dir": Path("o")},
    ExportOptions: {"model": "m", "output": Path("o")},
}


def check(kind: Any, flags: dict[str, Any]) -> None:
    """Build options and check them, as a command does."""
    options = kind(**REQUIRED.get(kind, {}) | flags)
    options.check()
    options.check_files()


# Class, flags, accepted values, rejected values
LIMITS = [
    (PushOptions, "license", [None, "apache-2.0"], ["Apache 2.0"]),
    (FinetuneOptions, "held_out_fraction", [0.0, 0.99], [-0.1, 1.0]),
    (DataOptions, "num_workers", [0], [-1]),
    (AugmentationOptions, "crop_scale", [None, 0.01, 1], [0, 1.1]),
    (AugmentationOptions, "mixup", [0], [-0.1]),
    (FinetuneOptions, "epochs learning_rate", [0.1], [0, math.inf]),
    (FinetuneOptions, "max_steps batch_size gradient_accumulation_steps", [1], [0]),
    (FinetuneOptions, "weight_decay seed", [0], [-1]),
    (FinetuneOptions, "warmup label_smoothing", [0, 0.9], [-0.1, 1]),
    (FinetuneOptions, "layer_decay", [None, 0.1, 1], [0, 1.1]),
    (
        FinetuneOptions,
        "trainable",
        ["full", "head", "lora", "last-12"],
        ["none", "last", "last-0", "last-1x"],
    ),
    (FinetuneOptions, "save_every keep_checkpoints", [1], [0]),
    (EvaluateOptions, "batch_size", [1], [0]),
    (PredictOptions, "threshold", [0, 1], [-0.1, 1.1]),
    (PredictOptions, "batch_size top_k", [1], [0]),
    (PredictOptions, "num_workers", [0], [-1]),
    (PredictOptions, "features", [None], [()]),
    (InspectOptions, "num_images max_images batch_size", [1], [0]),
    (BenchmarkOptions, "batch_sizes", [(1,)], [(4, 0)]),
    (BenchmarkOptions, "rounds", [1], [0]),
    (StudyOptions, "jobs threads", [1], [0]),
]


@pytest.mark.parametrize(("kind", "names", "accepted", "rejected"), LIMITS)
def test_values_outside_of_their_limits_are_errors(
    kind: type, names: str, accepted: list[Any], rejected: list[Any]
) -> None:
    for name in names.split():
        for value in accepted:
            check(kind, {name: value})
        for value in rejected:
            with raises_one_line(f"`{name}` is {value}", ", but it must be "):
                check(kind, {name: value})


# Class, flags that are accepted, changes that are rejected, and the flag in the error message.
COMBINATIONS = [
    (PredictOptions, {"paths": ("a",)}, {"paths": ()}, "`images`"),
    (PredictOptions, {"output": Path("a.JSON")}, {"output": Path("a.txt")}, "`output` is a.txt"),
    (PredictOptions, {}, {"model": ""}, "`model` is empty"),
    (
        PredictOptions,
        {"features": ("cls",), "output": Path("a.json")},
        {"output": None},
        "`features=('cls',)`",
    ),
    (
        PredictOptions,
        {"features": ("cls",), "output": Path("a.parquet")},
        {"output": Path("a.csv")},
        "`features=('cls',)`",
    ),
    (InspectOptions, {"paths": (), "dataset": "c"}, {"paths": ("a",)}, "`images`"),
    (InspectOptions, {"output": Path("a.HTM")}, {"output": Path("a.json")}, "`output` is a.json"),
    *((PredictOptions, {}, {name: "a"}, "`dataset`") for name in ("split", "image_column")),
    *(
        (InspectOptions, {}, {name: "a"}, "`dataset`")
        for name in ("image_column", "label_column", "label_separator")
    ),
]


@pytest.mark.parametrize(("kind", "accepted", "changes", "words"), COMBINATIONS)
def test_contradicting_flags_are_errors(
    kind: type, accepted: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    check(kind, accepted)
    with raises_one_line(words):
        check(kind, accepted | changes)


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ({"rotate": 10}, "from 0 to {'rotation': 180, 'shift': 0.9, 'zoom': 0.9"),
        ({"rotation": 181}, "rotation=181"),
        ({"zoom": "much"}, "zoom=much"),
    ],
)
def test_wrong_augmentations_are_errors(augment: dict[str, Any], words: str) -> None:
    check(AugmentationOptions, {"augment": {"rotation": 180, "zoom": 0.9}})
    with raises_one_line("`augment` has ", words):
        check(AugmentationOptions, {"augment": augment})


def test_grids_of_cls_tokens_are_listed_row_by_row() -> None:
    grid = [[2, 3, row, column] for row in (0, 1) for column in (0, 1, 2)]  # row by row
    assert parse_cls_scopes(["1x2", "image", "2x3"]) == [[1, 2, 0, 0], [1, 2, 0, 1], "image", *grid]
    for text in ("0x2", "2", "2x", "x2", "2x2x2", "images", "1000x2"):
        with raises_one_line(f"`cls_scopes` requires 'image' or ROWSxCOLUMNS, but got {text!r}"):
            check(ModelOptions, {"cls_scopes": ("image", text)})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("image_size", [32, 48], [32, 48]),
        ("image_size", np.array([32, 48]), [32, 48]),
        ("num_hidden_layers", np.int64(3), 3),
    ],
)
def test_lists_arrays_and_numbers_of_numpy_are_flags(name: str, value: Any, expected: Any) -> None:
    options = ModelOptions(model="m", **{name: value})
    assert to_flags(options)[name] == expected
    check_types(options, [name])


def test_flags_that_are_set_become_fields_of_the_configuration() -> None:
    assert ModelOptions(model="vitcls-tiny").get_config_values() == {}
    at_once = {"token_fade_in_steps": 0}
    assert ModelOptions(model="m", **at_once).get_config_values() == at_once

    options = ModelOptions(
        model="vitcls-tiny", num_register_tokens=0, cls_scopes=("image", "2x1"), image_size="native"
    )
    scopes = ["image", [2, 1, 0, 0], [2, 1, 1, 0]]

    assert options.get_config_values() == {
        "num_register_tokens": 0,
        "cls_scopes": scopes,
        "num_cls_tokens": 3,
    }
    assert (
        ModelOptions(model="m", cls_scopes=("image",), num_cls_tokens=2).get_config_values()[
            "num_cls_tokens"
        ]
        == 2
    )
