"""Groups of parameters, learning rates."""

import math
from collections import Counter
from typing import Any

import pytest
import timm
from helpers.tiny_models import build_random
from timm.optim import param_groups_layer_decay

from modeling_vitcls import ViTCLSForImageClassification, convert_from_timm
from modeling_vitcls.training.optimizer import build_parameter_groups, get_learning_rate


def test_learning_rate_rises_then_falls() -> None:
    rates = [get_learning_rate(step, 100, peak=1.0, warmup=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates == [*rates[:10], *sorted(rates[10:], reverse=True)]
    assert rates[55] == pytest.approx(0.5)  # half of the cosine decay
    assert rates[40] == pytest.approx((1 + math.cos(math.pi / 3)) / 2)  # a third of it
    assert get_learning_rate(0, 1, peak=1.0, warmup=0.0) == 1.0


def test_only_weights_of_linear_layers_and_patches_decay() -> None:
    fields = {"num_distillation_tokens": 1, "num_register_tokens": 1, "pooling": "attention"}
    model = build_random(ViTCLSForImageClassification, **fields, layer_scale_init_value=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_parameter_groups(model, weight_decay=0.05)

    by_decay = {
        group["weight_decay"]: [names[id(one)] for one in group["params"]] for group in groups
    }
    decayed, rest = by_decay[0.05], by_decay[0.0]
    assert len(decayed) + len(rest) == len(names)
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)

    tokens = (
        "cls_token",
        "distillation_token",
        "register_tokens",
        "position_embeddings.patches",
        "lambda1",
        "probe",
    )
    for end in tokens:
        assert any(name.endswith(end) for name in rest), end
    assert all(
        name.endswith("weight") is ("norm" in name) for name in rest if name.endswith("weight")
    )


def test_learning_rates_decrease_from_the_head_to_the_tokens() -> None:
    fields = {"num_hidden_layers": 3, "num_distillation_tokens": 1}
    model = build_random(ViTCLSForImageClassification, **fields)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale_of = {
        names[id(parameter)]: group["lr_scale"]
        for group in build_parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert scale_of.keys() == set(names.values())
    expected = {"classifier": 1, "distillation_classifier": 1, "vitcls.layernorm": 0.5}
    expected |= {f"vitcls.layers.{index}": 0.5 ** (3 - index) for index in range(3)}
    expected |= {"vitcls.embeddings": 0.5**4}
    for name, scale in scale_of.items():
        (prefix,) = [prefix for prefix in expected if name.startswith(f"{prefix}.")]
        assert scale == expected[prefix], name


def test_the_rate_of_each_parameter_is_that_of_timm() -> None:
    peer = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=5)
    expected = sum_by_scale(param_groups_layer_decay(peer, 0.05, layer_decay=0.5))
    model = convert_from_timm(peer)
    assert sum_by_scale(build_parameter_groups(model, 0.05, layer_decay=0.5)) == expected


def sum_by_scale(groups: list[dict[str, Any]]) -> dict[float, int]:
    """Count the parameters of each rate."""
    counts: Counter[float] = Counter()
    for group in groups:
        counts[group["lr_scale"]] += sum(each.numel() for each in group["params"])
    return counts
