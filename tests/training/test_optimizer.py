"""Groups of parameters, learning rates."""

import math

from helpers.tiny_models import build_random
from pytest import approx
from timm.optim import param_groups_layer_decay
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.training.optimizer import build_parameter_groups, get_learning_rate


def test_learning_rate_rises_then_falls() -> None:
    rates = [get_learning_rate(step, 100, peak=1.0, warmup=0.1) for step in range(100)]
    assert rates[:10] == approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates == [*rates[:10], *sorted(rates[10:], reverse=True)]
    assert rates[55] == approx(0.5)  # half of the cosine decay
    assert rates[40] == approx((1 + math.cos(math.pi / 3)) / 2)  # a third of it
    assert get_learning_rate(0, 1, peak=1.0, warmup=0.0) == 1.0


def test_only_weights_of_linear_layers_and_patches_decay() -> None:
    fields = {"num_distillation_tokens": 1, "num_register_tokens": 1, "pooling": "attention"}
    model = build_random(ViTCLSForImageClassification, **fields, layer_scale_init_value=0.1)
    decay_of = {
        id(parameter): group["weight_decay"]
        for group in build_parameter_groups(model, weight_decay=0.05)
        for parameter in group["params"]
    }
    layers = [each for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    decayed = {id(layer.weight) for layer in layers}
    assert decay_of == {id(each): 0.05 * (id(each) in decayed) for each in model.parameters()}


def test_learning_rates_decrease_from_the_head_to_the_tokens() -> None:
    """The final norm has the rate of the last layer, as in timm."""
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


def test_timm_groups_the_parameters_as_the_runs_do() -> None:
    fields = {"num_hidden_layers": 3, "num_distillation_tokens": 1, "num_register_tokens": 2}
    model = build_random(ViTCLSForImageClassification, **fields)
    settings = {"weight_decay": 0.05, "layer_decay": 0.5}
    timm_groups = param_groups_layer_decay(
        model, no_weight_decay_list=model.no_weight_decay(), **settings
    )
    own, timm = (
        {
            id(parameter): (group["lr_scale"], group["weight_decay"])
            for group in groups
            for parameter in group["params"]
        }
        for groups in (build_parameter_groups(model, **settings), timm_groups)
    )
    assert timm == own
