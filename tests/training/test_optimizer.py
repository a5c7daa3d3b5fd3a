"""Groups of parameters, learning rates, and the updates of DeepSpeed."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.random_classifiers import build_random_model

from modeling_vitcls.options import TrainingOptions
from modeling_vitcls.training.optimizer import DeepSpeedOptimizerStep, build_parameter_groups, get_learning_rate


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_learning_rate_rises_then_falls() -> None:
    options = TrainingOptions(learning_rate=1.0, warmup=0.1)
    rates = [get_learning_rate(step, 100, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1.0 and rates == [*rates[:10], *sorted(rates[10:], reverse=True)]
    assert 0 < rates[-1] < 0.001
    assert rates[55] == pytest.approx(0.5)  # half of the cosine decay
    assert rates[40] == pytest.approx((1 + math.cos(math.pi / 3)) / 2)  # a third of it
    assert get_learning_rate(0, 1, replace(options, warmup=0.0)) == 1.0


def test_only_weights_of_linear_layers_and_patches_decay() -> None:
    model = build_random_model(num_distillation_tokens=1, pooling="attention", layer_scale_init_value=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_parameter_groups(model, weight_decay=0.05)
    assert len(groups) == 2
    by_decay = {group["weight_decay"]: [names[id(one)] for one in group["params"]] for group in groups}
    decayed, rest = by_decay[0.05], by_decay[0.0]
    assert len(decayed) + len(rest) == len(names)
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    tokens = ("cls_token", "distillation_token", "register_tokens", "position_embeddings.patches", "lambda1", "probe")
    for end in tokens:
        assert any(name.endswith(end) for name in rest), end
    assert all(name.endswith("weight") is ("norm" in name) for name in rest if name.endswith("weight"))


def test_learning_rates_decrease_from_the_head_to_the_tokens() -> None:
    model = build_random_model(num_hidden_layers=3, num_distillation_tokens=1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale_of = {
        names[id(parameter)]: group["lr_scale"]
        for group in build_parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert scale_of.keys() == set(names.values())
    expected = {"classifier": 1, "distillation_classifier": 1, "vitcls.layernorm": 1}
    expected |= {f"vitcls.layers.{index}": 0.5 ** (3 - index) for index in range(3)}
    expected |= {"vitcls.embeddings": 0.5**4}
    for name, scale in scale_of.items():
        (prefix,) = [prefix for prefix in expected if name.startswith(f"{prefix}.")]
        assert scale == expected[prefix], name


class Engine:
    """Stand-in for DeepSpeed's engine that records its calls."""

    def __init__(self, norm: float, calls: list[Any]) -> None:
        self.get_global_grad_norm = lambda: norm
        self.set_gradient_accumulation_boundary = lambda value: calls.append(("boundary", value))
        self.backward = lambda loss: calls.append(("backward", loss))
        self.step = lambda: calls.append("step")


@pytest.mark.parametrize(("reported", "norm"), [(2.5, 2.5), (0.0, 0.0), (-1.0, math.nan)])
def test_deepspeed_updates_between_the_checks(reported: float, norm: float) -> None:
    """DeepSpeed returns -1 for a norm that is not finite."""
    calls: list[Any] = []
    accelerator: Any = SimpleNamespace(sync_gradients=False)
    optimizer_step = DeepSpeedOptimizerStep(accelerator, Engine(reported, calls))
    optimizer_step.backward(torch.tensor(3.0))
    found = optimizer_step.step(calls.append, lambda: calls.append("before update"))
    assert calls[:-1] == [("boundary", False), ("backward", torch.tensor(3.0)), 0.0, "before update", "step"]
    assert [found, calls[-1]] == pytest.approx([norm, norm], nan_ok=True)
