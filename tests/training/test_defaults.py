"""Defaults that depend on the weights, the image size and the number of images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import save_classifier
from helpers.tiny_options import build_tiny_options

from modeling_vitcls import ViTCLSConfig
from modeling_vitcls.training import defaults
from modeling_vitcls.training.defaults import resolve_defaults, resolve_schedule
from modeling_vitcls.training.model import InitialModel, resolve_initial_model
from modeling_vitcls.training.options import FinetuneOptions


PRETRAINED = {"folder": "checkpoint"}


def build_options(**flags: Any) -> FinetuneOptions:
    """Return the options of a run."""
    return FinetuneOptions(
        **{"output_dir": Path("out"), "dataset": "digits", "model": "vitcls-tiny"} | flags
    )


def build_initial(
    hidden_size: int = 96,
    image_size: int = 28,
    config_values: dict[str, Any] | None = None,
    **fields: Any,
) -> InitialModel:
    """Return an initial model with one patch per image; by default with random weights."""
    sizes = {"image_size": image_size, "patch_size": image_size, "num_attention_heads": 1}
    config = ViTCLSConfig(hidden_size=hidden_size, **sizes | (config_values or {}))
    return InitialModel(**{"name": "model", "folder": None, "config": config} | fields)


def get_values(options: Any) -> dict[str, Any]:
    """Return the values that have defaults."""
    flags = vars(options)
    return flags | (flags["augment"] or {}) | (flags["model_config"] or {})


def set_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(
        defaults, "PartialState", lambda: SimpleNamespace(device=torch.device(device))
    )


HEAD, LORA, LAST = (build_options(trainable=each) for each in ("head", "lora", "last-2"))


@pytest.mark.parametrize(
    ("options", "initial", "num_images", "expected"),
    [
        (
            None,
            {},
            2000,
            {
                "layer_decay": 1.0,
                "initializer_range": 0.082,
                "crop_scale": 1.0,
            },
        ),
        (
            None,
            {"hidden_size": 4096, "image_size": 65},
            9,
            {"initializer_range": 0.02, "crop_scale": 0.35, "shift": 0},
        ),
        (None, {"image_size": 64}, 9_999, {"batch_size": 32, "shift": 0.04}),
        (None, {}, 10_000, {"batch_size": 64}),
        (
            None,
            PRETRAINED | {"hidden_size": 384},
            9_999,
            {"layer_decay": 0.75, "model_config": None},
        ),
        (LAST, PRETRAINED | {"hidden_size": 1536}, 10_000, {"batch_size": 64}),
        (HEAD, PRETRAINED, 10_000, {"layer_decay": 1.0}),
        (LORA, PRETRAINED, 9, {"layer_decay": 1.0}),
    ],
)
def test_defaults_follow_the_weights_the_image_size_and_the_number_of_images(
    options: Any, initial: dict[str, Any], num_images: int | None, expected: dict[str, Any]
) -> None:
    model = build_initial(**initial)
    resolved, _ = resolve_defaults(options or build_options(), model, num_images)
    values = get_values(resolve_schedule(resolved, model, num_images, False, 1)[0])
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "initial", "num_images", "has_frozen_start", "expected"),
    [
        (build_options(), {}, 10_000, False, 30),
        (build_options(), PRETRAINED | {"hidden_size": 384}, 9_999, False, 30),
        (build_options(), PRETRAINED | {"hidden_size": 384}, 9_999, True, 5),
        (build_options(), PRETRAINED | {"hidden_size": 48}, 10_000, False, 10),
        (HEAD, PRETRAINED, 10_000, False, 30),
        (LORA, PRETRAINED, 9, False, 5),
    ],
)
def test_the_epochs_follow_the_weights_and_the_number_of_images(
    options: Any,
    initial: dict[str, Any],
    num_images: int,
    has_frozen_start: bool,
    expected: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_device(monkeypatch, "cuda")
    options, _ = resolve_schedule(
        options, build_initial(**initial), num_images, has_frozen_start, 1
    )
    assert options.epochs == expected


@pytest.mark.parametrize(
    ("options", "initial", "has_frozen_start", "expected"),
    [
        (build_options(), {}, False, 1e-3),
        (build_options(hidden_size=192), {}, False, 5e-4),
        (build_options(), PRETRAINED | {"hidden_size": 384}, False, 1e-4),
        (build_options(), PRETRAINED | {"hidden_size": 48}, False, 4e-4),
        (LAST, PRETRAINED | {"hidden_size": 1536}, False, 5e-5),
        (build_options(), PRETRAINED | {"hidden_size": 384}, True, 3e-5),
        (build_options(), PRETRAINED | {"hidden_size": 48}, True, 4e-4),
        (LAST, PRETRAINED | {"hidden_size": 1536}, True, 1e-5),
        (HEAD, PRETRAINED, False, 1e-3),
        (LORA, PRETRAINED | {"hidden_size": 384}, False, 5e-4),
        (LORA, PRETRAINED | {"hidden_size": 384}, True, 5e-4),
        (build_options(learning_rate=0.3), PRETRAINED, True, 0.3),
    ],
)
def test_the_learning_rate_follows_the_initial_weights_and_the_width(
    options: Any, initial: dict[str, Any], has_frozen_start: bool, expected: float
) -> None:
    options, _ = resolve_schedule(options, build_initial(**initial), 900, has_frozen_start, 1)
    assert options.learning_rate == expected


def test_every_default_can_be_overridden() -> None:
    initial = build_initial()
    flags = {"model": "vitcls-tiny", "crop_scale": None, "augment": {"shift": 0.0, "zoom": 0.1}}
    asked = build_tiny_options(Path("out"), "digits", **flags)
    options, lines = resolve_defaults(asked, initial, 2000)
    assert resolve_defaults(options, initial, 2000) == (options, lines)
    options, _ = resolve_schedule(options, initial, 2000, False, 1)
    assert options.augment == {"shift": 0.0, "zoom": 0.1}
    assert options.crop_scale == 1


def test_the_default_epochs_are_limited_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT-S/16 of 224 pixels computes 9.2 GFLOP per image, three times as many in a step."""
    set_device(monkeypatch, "cpu")

    def resolve(options: Any, num_images: int) -> Any:
        return resolve_schedule(options, build_initial(**PRETRAINED), num_images, False, 9.2e9)

    options, lines = resolve(build_options(), 9_000)
    assert options.epochs == 1e15 // (3 * 9.2e9 * 9_000) == 4
    assert "CPUs" in lines["epochs"]
    assert "`epochs=30`" in lines["epochs"]
    assert resolve(build_options(), 900)[0].epochs == 30
    assert resolve(build_options(), 10**6)[0].epochs == 1
    assert resolve(build_options(epochs=20.0), 9_000)[0].epochs == 20
    set_device(monkeypatch, "cuda")

    assert resolve(build_options(), 9_000)[0].epochs == 30


def test_only_a_preset_has_random_weights(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    for name, is_random in (("vitcls-tiny", True), (str(tmp_path), False)):
        initial = resolve_initial_model(name)
        assert initial.has_random_weights is is_random
        assert initial.config.hidden_size == (192 if is_random else 16)
        _, lines = resolve_defaults(build_options(), initial, 9)
        assert ("preset" in (lines["weights"] or "")) is is_random
