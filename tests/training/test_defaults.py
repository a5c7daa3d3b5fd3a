"""Defaults that depend on the weights, the image size and the number of images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import build_tiny_config, randomize

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.conversion.convert import convert_checkpoint
from modeling_vitcls.options import DataOptions, FinetuneOptions, ModelOptions, PretrainOptions, TrainingOptions
from modeling_vitcls.training.defaults import (
    RunProperties,
    describe_random_weights,
    get_run_properties,
    resolve_defaults,
)


SCRATCH = RunProperties("random weights", True, 96, 28, 2000)


def build_options(**groups: Any) -> FinetuneOptions:
    """Return the options of a run."""
    return FinetuneOptions(Path("out"), DataOptions("digits"), **({"model": ModelOptions("vitcls-tiny")} | groups))


def get_values(options: Any) -> dict[str, Any]:
    """Return the values that have defaults."""
    training, augmentation = options.training, options.augmentation
    return {
        "learning_rate": training.learning_rate,
        "layer_decay": training.layer_decay,
        "epochs": training.epochs,
        "initializer_range": options.model.initializer_range,
        "crop_scale": augmentation.crop_scale,
        "shift": augmentation.shift,
        "batch_size": training.batch_size,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"learning_rate": 1e-3, "layer_decay": 1.0, "initializer_range": 0.082, "crop_scale": 1.0}),
        ({"width": 192, "image_size": 224}, {"learning_rate": 5e-4, "initializer_range": 0.058, "crop_scale": 0.35}),
        ({"width": 4096}, {"initializer_range": 0.02}),
        ({"image_size": 65}, {"crop_scale": 0.35, "shift": 0.0}),
        ({"num_training_images": 9_999}, {"batch_size": 32, "epochs": 30.0}),
        ({"num_training_images": 10_000}, {"batch_size": 64, "epochs": 30.0}),
        (
            {"method": "pre-trained weights", "has_random_weights": False, "width": 768, "image_size": 224},
            {"learning_rate": 5e-5, "layer_decay": 0.75, "initializer_range": None, "epochs": 30.0},
        ),
        ({"method": "pre-trained weights", "width": 48}, {"learning_rate": 4e-4}),
        ({"method": "pre-trained weights", "width": 1536}, {"learning_rate": 5e-5}),
        ({"method": "pre-trained weights", "num_training_images": 10_000}, {"epochs": 10.0}),
        ({"method": "pre-trained weights", "num_training_images": None}, {"epochs": 10.0}),
        ({"method": "new head on frozen weights"}, {"learning_rate": 1e-3, "layer_decay": 1.0}),
        ({"method": "LoRA", "width": 768}, {"learning_rate": 5e-4, "layer_decay": 1.0}),
        ({"method": "self-supervised", "width": 96}, {"learning_rate": 5e-4, "initializer_range": 0.082}),
    ],
)
def test_values(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    options, _ = resolve_defaults(build_options(), replace(SCRATCH, **changes))
    values = get_values(options)
    assert {name: values[name] for name in expected} == expected


def test_every_default_can_be_overridden_and_the_reasons_are_printed() -> None:
    options, line = resolve_defaults(build_options(training=TrainingOptions(learning_rate=0.3)), SCRATCH)
    assert options.training.learning_rate == 0.3
    assert "random weights, width 96: initializer range 0.082" in line
    assert "image size 28: crop scale 1" in line
    assert "learning rate" not in line
    assert "random weights, 2,000 images: epochs 30, batch size 32" in line
    stream = replace(SCRATCH, num_training_images=None)
    assert "random weights, a stream: " in resolve_defaults(build_options(), stream)[1]
    assert resolve_defaults(options, SCRATCH) == (options, "")


def test_max_steps_replace_the_epochs() -> None:
    options, line = resolve_defaults(build_options(training=TrainingOptions(max_steps=3)), SCRATCH)
    assert options.training.epochs == 30.0 and "epochs" not in line


def test_facts_about_a_run(tmp_path: Path) -> None:
    assert get_run_properties(
        build_options(model=ModelOptions("vitcls-tiny", hidden_size=96, image_size=28)), 7
    ) == RunProperties("random weights", True, 96, 28, 7)
    assert get_run_properties(build_options(), 7) == RunProperties("random weights", True, 192, 224, 7)
    randomize(ViTCLSForImageClassification(build_tiny_config())).save_pretrained(tmp_path)
    ViTCLSImageProcessor(size=32).save_pretrained(tmp_path)
    model = ModelOptions(str(tmp_path), image_size=(48, 40))
    assert get_run_properties(build_options(model=model), None) == RunProperties(
        "pre-trained weights", False, 16, 48, None
    )
    for trainable, weights in (
        ("head", "new head on frozen weights"),
        ("lora", "LoRA"),
        ("last-1", "pre-trained weights"),
    ):
        options = build_options(model=model, training=TrainingOptions(trainable=trainable))
        assert get_run_properties(options, 7).method == weights
    options = PretrainOptions(Path("out"), DataOptions("digits"), model)
    assert get_run_properties(options, 7).method == "self-supervised"


def test_a_conversion_with_random_weights_is_not_pre_trained(tmp_path: Path) -> None:
    """It gets the learning rate and the number of epochs of random weights, and the run says so."""
    convert_checkpoint("timm:test_vit", tmp_path / "random", random_init=True)
    options = build_options(model=ModelOptions(str(tmp_path / "random")))
    run_properties = get_run_properties(options, 20_000)
    assert run_properties.method == "random weights" and run_properties.has_random_weights
    resolved, _ = resolve_defaults(options, run_properties)
    assert (resolved.training.epochs, resolved.training.layer_decay) == (30.0, 1.0)
    assert resolved.model.initializer_range is None  # the weights are those of the conversion
    assert "--random-init" in str(describe_random_weights("random", run_properties))
