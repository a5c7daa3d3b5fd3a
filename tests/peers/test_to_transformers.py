"""Test conversion to classes of transformers: bit-identical round trips, and error messages."""

from typing import Any

import pytest
import torch
from helpers.source_checkpoints import refuses_conversion
from helpers.tiny_models import SIZES, assert_same_bits, get_largest_difference
from pytest import LogCaptureFixture

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
    convert_from_transformers,
    convert_to_transformers,
)
from peers.transformers_cases import CASES, compute_outputs, compute_source_outputs, images
from scripts.tools.random_weights import randomize_weights


pytestmark = pytest.mark.usefixtures("no_grad")

BASE = SIZES | {"intermediate_size": 32, "layer_norm_eps": 0.01}
LAYER_SCALE = {"layer_scale_init_value": 0.1}
REGISTERS = {"num_register_tokens": 4, "position_antialias": True}
DISTILLED = {"num_distillation_tokens": 1, "position_embedding_tokens": "all"}

ROUND_TRIPS = [
    "vit without pooler",
    "vit with mask token",
    "vit of rectangles",
    "vit classifier",
    "deit classifier",
    "deit distilled",
    "dinov2 swiglu",
    "registers classifier",
    "dinov3 gated",
    "dinov3 other biases",
]


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trips_are_bit_identical(name: str) -> None:
    source = CASES[name].build()
    back = convert_to_transformers(convert_from_transformers(source))
    assert type(back) is type(source)
    assert back.config.to_dict() == source.config.to_dict()
    assert_same_bits(back.state_dict(), source.state_dict())


# Model class, fields, and a case of the class of transformers.
SUPPORTED = [
    (
        ViTCLSModel,
        {"pooled_activation": "relu", "attention_head_size": 8},
        "vit",
    ),
    (ViTCLSModel, {"position_embedding_tokens": "all"}, "vit without pooler"),
    (
        ViTCLSModel,
        {"head_type": "mlp", "head_hidden_size": 7, "cls_pooling": "mean"},
        "vit without pooler",
    ),
    (ViTCLSForImageClassification, {}, "vit classifier"),
    (ViTCLSModel, {"position_embedding_type": "rope_2d"}, "dinov3"),
    (
        ViTCLSModel,
        {
            "position_embedding_type": "rope_2d",
            "mlp_type": "swiglu",
            "num_register_tokens": 2,
            "projection_bias": False,
        },
        "dinov3",
    ),
    (
        ViTCLSForImageClassification,
        DISTILLED,
        "deit distilled",
    ),
    (
        ViTCLSForImageClassification,
        DISTILLED | {"distillation_head": False},
        "deit classifier",
    ),
    (
        ViTCLSForImageClassification,
        {"pooling": "cls_mean"},
        "dinov2 classifier",
    ),
    # A frozen run stores class statistics, and transformers returns no distance
    (
        ViTCLSForImageClassification,
        {"class_statistics": {"tokens": [[-1, "cls"]], "num_classes": 3}},
        "vit classifier",
    ),
    # In an equivalent form
    (
        ViTCLSForImageClassification,
        LAYER_SCALE,
        "dinov2 classifier",
    ),
    (ViTCLSForImageClassification, LAYER_SCALE | {"pooling": "mean"}, "dinov2 classifier"),
    (
        ViTCLSForImageClassification,
        REGISTERS,
        "registers classifier",
    ),
    (
        ViTCLSForImageClassification,
        REGISTERS | {"pooling": "mean", "position_embedding_tokens": "all"},
        "registers classifier",
    ),
    (
        ViTCLSForImageClassification,
        DISTILLED | {"position_embedding_tokens": "cls"},
        "deit distilled",
    ),
    (ViTCLSModel, {"position_embedding_tokens": "patches"}, "vit without pooler"),
    (
        ViTCLSModel,
        REGISTERS | {"position_embedding_tokens": "all"},
        "registers",
    ),
    (
        ViTCLSModel,
        REGISTERS | {"position_embedding_tokens": "patches"},
        "registers",
    ),
]


@pytest.mark.parametrize("size", [(32, 32), (48, 24)], ids=["native", "interpolated"])
@pytest.mark.parametrize(("model_class", "values", "case"), SUPPORTED)
def test_converted_models_have_the_same_outputs(
    model_class: Any, values: dict, case: str, size: tuple[int, int]
) -> None:
    model = randomize_weights(model_class(ViTCLSConfig(**BASE | values)))
    converted = convert_to_transformers(model)
    assert type(converted).__name__ == CASES[case].model
    assert_same_outputs(model, converted, case, size)


def assert_same_outputs(model: Any, converted: Any, case: str, size: tuple[int, int]) -> None:
    outputs = compute_outputs(model, images(size))
    for name, value in compute_source_outputs(CASES[case], converted, images(size)).items():
        assert get_largest_difference(outputs[name], value) <= 1e-5, name


# The demo model, and others whose positions are resampled differently.
NATIVE_SIZE = [
    (
        ViTCLSForImageClassification,
        {"num_register_tokens": 2},
        "registers classifier",
    ),
    (ViTCLSModel, {"position_interpolation": "bilinear"}, "vit without pooler"),
]


@pytest.mark.parametrize(("model_class", "values", "case"), NATIVE_SIZE)
def test_models_that_are_exact_at_one_size_only_require_a_flag(
    model_class: Any, values: dict, case: str
) -> None:
    model = randomize_weights(model_class(ViTCLSConfig(**BASE | values)))
    with refuses_conversion("native_size_only=True"):
        convert_to_transformers(model)
    converted = convert_to_transformers(model, native_size_only=True)
    assert type(converted).__name__ == CASES[case].model
    assert_same_outputs(model, converted, case, model.config.image_height_width)


def test_everything_about_the_model_is_kept() -> None:
    labels = {"id2label": {0: "ant", 1: "bee"}, "label2id": {"ant": 0, "bee": 1}}
    config = ViTCLSConfig(**BASE | labels | {"num_labels": 2, "hidden_dropout_prob": 0.1})
    model = ViTCLSForImageClassification(config).to(torch.bfloat16).train()

    converted = convert_to_transformers(model)
    assert converted.config.id2label == labels["id2label"]
    assert converted.config.label2id == labels["label2id"]
    assert converted.config.hidden_dropout_prob == 0.1
    assert converted.dtype == torch.bfloat16
    assert not converted.training
    assert model.training

    fields = {"layer_scale_init_value": 0.1, "attention_probs_dropout_prob": 0.2}
    rotary = {"position_embedding_type": "rope_2d", "rope_theta": 50.0}
    dinov2, dinov3 = (
        convert_to_transformers(ViTCLSModel(ViTCLSConfig(**BASE | fields | more)))
        for more in ({}, rotary)
    )
    assert dinov2.config.layerscale_value == 0.1
    assert dinov3.config.layerscale_value == 0.1
    assert dinov2.config.attention_probs_dropout_prob == 0.2
    assert dinov3.config.attention_dropout == 0.2
    assert dinov3.config.rope_theta == 50

    exact = convert_to_transformers(
        ViTCLSModel(ViTCLSConfig(**BASE, position_antialias=True)), native_size_only=True
    )
    assert type(exact).__name__ == "Dinov2WithRegistersModel"  # at all sizes, unlike ViTModel


def test_a_mask_token_is_dropped_with_a_warning(caplog: LogCaptureFixture) -> None:
    model = ViTCLSForImageClassification(ViTCLSConfig(**BASE, use_mask_token=True))
    with caplog.at_level("WARNING"):
        converted = convert_to_transformers(model)
    assert not [name for name in converted.state_dict() if "mask" in name]
    (line,) = caplog.messages
    assert "mask token" in line


UNSUPPORTED = [
    (
        ViTCLSForImageClassification,
        LAYER_SCALE | {"num_cls_tokens": 0, "pooling": "mean"},
        "num_cls_tokens=0",
    ),
    (ViTCLSModel, {"pooling": "attention"}, "pooler.k_proj.weight"),
    (ViTCLSModel, {"pooled_layers": [-2, -1]}, "pooled_layers=[-2, -1]"),
    (
        ViTCLSForImageClassification,
        LAYER_SCALE | {"pooled_layers": [1], "pooling": "cls_mean"},
        "pooled_layers=[1]",
    ),
    (ViTCLSModel, {"pooling": "mean", "pooled_activation": "tanh"}, "pooling='mean'"),
    (
        ViTCLSModel,
        {"position_antialias": True, "pooled_activation": "tanh"},
        "position_antialias=True",
    ),
    (
        ViTCLSModel,
        REGISTERS | {"fading_tokens": {"registers": 2}},
        "fading_tokens={'registers': 2}",
    ),
    (
        ViTCLSModel,
        {"qk_norm": True, "relative_position_bias": "layer"},
        "relative_position_bias='layer'",
    ),
    (ViTCLSForImageClassification, {"head_type": "mlp", "norm_type": "rmsnorm"}, "head_type='mlp'"),
    (
        ViTCLSForImageClassification,
        LAYER_SCALE | {"pooling": "cls_mean", "image_size": [32, 48]},
        "image_size=[32, 48]",
    ),
]


@pytest.mark.parametrize(("model_class", "values", "field"), UNSUPPORTED)
def test_errors_name_the_unsupported_field(model_class: Any, values: dict, field: str) -> None:
    with refuses_conversion(field):
        convert_to_transformers(model_class(ViTCLSConfig(**BASE | values)))


def test_tokens_go_home_when_they_are_faded_in_and_before_that_is_an_error_with_a_remedy() -> None:
    values = LAYER_SCALE | {"position_antialias": True, "pooling": "cls_mean"}
    plain = randomize_weights(ViTCLSForImageClassification(ViTCLSConfig(**BASE | values)))
    model = plain.adapt(num_register_tokens=4).eval()
    fade_in = model.vitcls.fade_in
    fade_in.progress.fill_(fade_in.FULL)
    expected = compute_outputs(model, images((32, 32)))

    converted = convert_to_transformers(model)
    assert type(converted).__name__ == "Dinov2WithRegistersForImageClassification"
    assert_same_outputs(model, converted, "registers classifier", (48, 24))
    assert model.vitcls.fade_in is fade_in
    assert torch.equal(compute_outputs(model, images((32, 32)))["logits"], expected["logits"])

    fade_in.progress[0] = fade_in.FULL // 2
    with refuses_conversion("fading_tokens", "--token-fade-in-steps 0"):
        convert_to_transformers(model)


@pytest.mark.parametrize(
    "model_class", [ViTCLSForMaskedImageModeling, ViTCLSForMultiTaskClassification, ViTCLSBackbone]
)
def test_other_tasks_raise_an_error(model_class: Any) -> None:
    with refuses_conversion(f"no class for the task of {model_class.__name__}"):
        convert_to_transformers(model_class(ViTCLSConfig(**BASE, tasks={"species": 2})))


def test_pooling_without_weights_is_left_to_the_user() -> None:
    """ViTModel has no mean of the patches. Its tokens are those of the model."""
    model = randomize_weights(
        ViTCLSModel(ViTCLSConfig(**BASE, pooling="mean", position_embedding_tokens="cls"))
    )
    native = convert_to_transformers(model)
    assert type(native).__name__ == "ViTModel"
    assert native.pooler is None
    assert_same_outputs(model, native, "vit without pooler", (32, 32))
