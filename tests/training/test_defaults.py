"""Defaults that depend on the weights, the image size and the number of images."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import save_classifier
from helpers.tiny_options import build_tiny_options

from modeling_vitcls import ViTCLSConfig
from modeling_vitcls.training.defaults import resolve_defaults, resolve_schedule
from modeling_vitcls.training.model import InitialModel, resolve_initial_model
from modeling_vitcls.training.options import FinetuneOptions


PRETRAINED = {"folder": "checkpoint"}


def build_options(**flags: Any) -> FinetuneOptions:
    """Return the options of a run."""
    return FinetuneOptions(
        **{"output_dir": Path("out"), "dataset": "digits", "model": "vitcls-tiny"} | flags
    )


def build_initial(hidden_size: int = 96, image_size: int = 28, **fields: Any) -> InitialModel:
    """Return an initial model with one patch per image; by default with random weights."""
    sizes = {"image_size": image_size, "patch_size": image_size, "num_attention_heads": 1}
    config = ViTCLSConfig(hidden_size=hidden_size, **sizes)
    return InitialModel(**{"name": "model", "folder": None, "config": config} | fields)


# Flags, initial model, number of images, whether a frozen model is the start, and values of the run
RESOLVED = [
    (
        {},
        {},
        2000,
        False,
        {"layer_decay": 1, "initializer_range": 0.082, "crop_scale": 1, "learning_rate": 1e-3},
    ),
    (
        {},
        {"hidden_size": 4096, "image_size": 65},
        9,
        False,
        {"initializer_range": 0.02, "crop_scale": 0.35, "shift": 0},
    ),
    ({}, {"image_size": 64}, 9_999, False, {"batch_size": 32, "shift": 0.04}),
    ({}, {}, 10_000, False, {"batch_size": 64, "epochs": 30}),
    ({"hidden_size": 192}, {}, 9, False, {"learning_rate": 5e-4}),
    (
        {},
        PRETRAINED | {"hidden_size": 384},
        9_999,
        False,
        {"layer_decay": 0.75, "model_config": None, "epochs": 30, "learning_rate": 1e-4},
    ),
    ({}, PRETRAINED | {"hidden_size": 384}, 9_999, True, {"epochs": 5, "learning_rate": 3e-5}),
    ({}, PRETRAINED | {"hidden_size": 48}, 10_000, False, {"epochs": 10, "learning_rate": 4e-4}),
    ({}, PRETRAINED | {"hidden_size": 48}, 9, True, {"learning_rate": 4e-4}),
    (
        {"trainable": "last-2"},
        PRETRAINED | {"hidden_size": 1536},
        10_000,
        False,
        {"batch_size": 64, "learning_rate": 5e-5},
    ),
    (
        {"trainable": "last-2"},
        PRETRAINED | {"hidden_size": 1536},
        9,
        True,
        {"learning_rate": 1e-5},
    ),
    (
        {"trainable": "head"},
        PRETRAINED,
        10_000,
        False,
        {"layer_decay": 1, "epochs": 30, "learning_rate": 1e-3},
    ),
    (
        {"trainable": "lora"},
        PRETRAINED | {"hidden_size": 384},
        9,
        False,
        {"layer_decay": 1, "epochs": 5, "learning_rate": 5e-4},
    ),
    ({"trainable": "lora"}, PRETRAINED | {"hidden_size": 384}, 9, True, {"learning_rate": 5e-4}),
    ({"learning_rate": 0.3}, PRETRAINED, 9, True, {"learning_rate": 0.3}),
]


@pytest.mark.parametrize(("flags", "initial", "num_images", "is_frozen", "expected"), RESOLVED)
def test_defaults_follow_the_weights_their_width_the_image_size_and_the_number_of_images(
    flags: dict[str, Any],
    initial: dict[str, Any],
    num_images: int,
    is_frozen: bool,
    expected: dict[str, Any],
) -> None:
    model = build_initial(**initial)
    resolved, _ = resolve_defaults(build_options(**flags), model, num_images)
    options, _ = resolve_schedule(resolved, model, num_images, is_frozen)
    values = vars(options) | (options.augment or {}) | (options.model_config or {})
    assert {name: values[name] for name in expected} == expected


def test_every_default_can_be_overridden() -> None:
    initial = build_initial()
    flags = {"model": "vitcls-tiny", "crop_scale": None, "augment": {"shift": 0.0, "zoom": 0.1}}
    asked = build_tiny_options(Path("out"), "digits", **flags)
    options, lines = resolve_defaults(asked, initial, 2000)
    assert resolve_defaults(options, initial, 2000) == (options, lines)
    options, _ = resolve_schedule(options, initial, 2000, False)
    assert options.augment == {"shift": 0.0, "zoom": 0.1}
    assert options.crop_scale == 1


def test_only_a_preset_has_random_weights(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    for name, is_random in (("vitcls-tiny", True), (str(tmp_path), False)):
        initial = resolve_initial_model(name)
        assert initial.has_random_weights is is_random
        assert initial.config.hidden_size == (192 if is_random else 16)
        _, lines = resolve_defaults(build_options(), initial, 9)
        assert ("preset" in (lines["weights"] or "")) is is_random
