"""Compare models with and without CPU kernels: outputs and gradients by name."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch

from modeling_vitcls import ViTCLSForImageClassification, pack
from modeling_vitcls.speed import cpu_kernels

from .tiny_models import IMAGE_LABELS, build_tiny_config, randomize


Tensors = dict[str, torch.Tensor]

# Maximum difference in float32, as a fraction of the largest value of the tensor
FLOAT32_LIMIT = 1e-5
NUM_MODELS = 8  # Number of models over which rounding errors are compared
# Maximum error in half precision, as a multiple of the error of plain PyTorch in the same
# precision: the mean over tensors, and the maximum. The rounding errors of two correct programs are
# equal only on average.
MEAN_RATIO, MAX_RATIO = 1.25, 2.0


def build_models(seed: int = 0, **fields: Any) -> tuple[Any, Any]:
    """Build two classifiers with equal weights, a packed one and a plain one."""
    first, plain = (
        randomize(ViTCLSForImageClassification(build_tiny_config(**fields)), seed).eval()
        for _ in range(2)
    )
    return pack(first), plain


def reorder_weights(monkeypatch: MonkeyPatch, dtype: torch.dtype) -> None:
    """Reorder weights of any width in a dtype, also where that is not the fastest."""
    if not cpu_kernels.HAS_ONEDNN:
        pytest.skip("this CPU or PyTorch has no oneDNN")
    monkeypatch.setattr(cpu_kernels, "REORDERED_DTYPES", {dtype})
    monkeypatch.setattr(cpu_kernels, "MIN_REORDERED_WIDTH", 0)


def run_step(model: Any, images: torch.Tensor, forward: Any = None) -> Tensors:
    """Return the logits and the gradient of the loss with respect to each trained parameter.

    Args:
        model: a classifier; its gradients are reset.
        images: two images.
        forward: function to call instead of the model, for example a compiled version.
    """
    model.zero_grad()
    # A compiled model has no truth value
    output = (model if forward is None else forward)(images, labels=IMAGE_LABELS)
    output.loss.backward()
    gradients = {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    return {"logits": output.logits.detach(), **gradients}


def assert_equal_in_float32(found: Tensors, plain: Tensors) -> None:
    """Check that each tensor differs by at most 1e-5 of its largest value."""
    assert found.keys() == plain.keys()
    assert found
    for name, expected in plain.items():
        difference = (found[name].double() - expected.double()).abs().max()
        limit = FLOAT32_LIMIT * select_scale(name, plain).abs().max()
        assert difference <= limit, f"{name}: {difference}, more than {limit}"


def assert_as_exact_in_half_precision(found: Tensors, plain: Tensors, exact: Tensors) -> None:
    """Check that errors against float32 are as large as those of plain PyTorch.

    Args:
        found: result of the kernels, in half precision.
        plain: result of plain PyTorch, in half precision.
        exact: result of plain PyTorch, in float32.
    """
    assert found.keys() == plain.keys() == exact.keys()
    assert found
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in plain.items()
    }
    errors, plain_errors = (get_relative_errors(values, exact) for values in (found, plain))
    assert plain_errors.max() > 0
    assert errors.mean() <= MEAN_RATIO * plain_errors.mean()
    assert errors.max() <= MAX_RATIO * plain_errors.max()


def get_relative_errors(values: Tensors, exact: Tensors) -> torch.Tensor:
    """Return the norm of each tensor's error, as a fraction of the norm of the tensor."""
    errors = [
        (values[name].double() - tensor.double()).norm() / select_scale(name, exact).double().norm()
        for name, tensor in exact.items()
    ]
    return torch.stack(errors)


def stack_models(tensors: Sequence[Tensors]) -> Tensors:
    """Return the tensors of several models, stacked by name.

    Errors are then relative to the norm over all models. In a single model, terms of a scalar's
    gradient may cancel by chance, so that rounding errors are as large as the sum.
    """
    return {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}


def select_scale(name: str, values: Tensors) -> torch.Tensor:
    """Return the tensor whose norm scales an error: itself, or the weight for a key bias.

    The gradient of a key bias is 0 up to rounding, because adding a constant to all scores has no
    effect.
    """
    return values[
        name.replace("k_proj.bias", "k_proj.weight").replace("k_norm.bias", "k_norm.weight")
    ]
