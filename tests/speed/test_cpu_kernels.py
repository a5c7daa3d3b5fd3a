"""Products and attention of CPUs are as exact as in plain PyTorch, and every switch disables them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.compare import (
    NUM_MODELS,
    Tensors,
    assert_as_exact_in_half_precision,
    build_models,
    reorder_weights,
    stack_models,
)
from helpers.tiny_models import IMAGES, assert_same_outputs, each_dtype
from pytest import MonkeyPatch
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.vit.modeling_vit import eager_attention_forward

from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.speed import cpu_kernels
from modeling_vitcls.speed.cpu_kernels import attend_in_chunks


ONEDNN = "mkldnn::_linear_pointwise"
SDPA = "aten::scaled_dot_product_attention"


@pytest.fixture(autouse=True)
def use_chunked_attention(monkeypatch: MonkeyPatch) -> None:
    """Use chunked attention on all CPUs, with three heads per chunk of a tiny model."""
    monkeypatch.setattr(cpu_kernels, "HAS_AVX512_BFLOAT16", True)
    monkeypatch.setattr(cpu_kernels, "HAS_AMX", False)
    monkeypatch.setattr(cpu_kernels, "SCORES_PER_THREAD", 3 * 17**2 // torch.get_num_threads())


@pytest.fixture
def reorder_float32(monkeypatch: MonkeyPatch) -> None:
    reorder_weights(monkeypatch, torch.float32)


@pytest.fixture
def reorder_bfloat16(monkeypatch: MonkeyPatch) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU does not multiply bfloat16")
    reorder_weights(monkeypatch, torch.bfloat16)


def list_operators(function: Callable[..., Any], *args: Any) -> set[str]:
    """List the names of the operators that a call executes."""
    with profile() as profiled:
        function(*args)
    return {event.key for event in profiled.key_averages()}


# Values and gradients -----------------------------------------------------------------------------


@torch.no_grad()
def run(model: Any, dtype: torch.dtype, uses_autocast: bool) -> Tensors:
    """Return the logits of a model in a dtype."""
    images = IMAGES
    if not uses_autocast:
        model, images = model.to(dtype), images.to(dtype)
    is_enabled = uses_autocast and dtype != torch.float32
    with torch.autocast("cpu", dtype=dtype, enabled=is_enabled):
        return {"logits": model(images).logits}


@pytest.mark.parametrize(
    ("dtype", "uses_autocast", "fields"),
    [
        (torch.bfloat16, True, {"layer_scale_init_value": 0.1}),
        (torch.float16, True, {"mlp_type": "swiglu"}),
        (torch.bfloat16, False, {"num_register_tokens": 1, "cls_scopes": [[2, 2, 0, 1]]}),
        (torch.bfloat16, True, {"position_embedding_type": "rope_2d"}),
        (torch.bfloat16, True, {"mlp_type": "swiglu"}),
    ],
)
@pytest.mark.usefixtures("reorder_bfloat16")
def test_half_precision_is_as_exact_as_plain_pytorch(
    dtype: torch.dtype, uses_autocast: bool, fields: Fields
) -> None:
    """Errors against float32 are as large as in plain PyTorch."""
    results: list[list[Tensors]] = [[], [], []]
    for seed in range(NUM_MODELS):
        packed, plain = build_models(seed, **fields)
        runs = ((plain, torch.float32), (packed, dtype), (plain, dtype))
        for found, (model, own_dtype) in zip(results, runs, strict=True):
            found.append(run(model, own_dtype, uses_autocast))
    exact, found, expected = map(stack_models, results)
    assert_as_exact_in_half_precision(found, expected, exact)


def attend_in_eager_mode(*states: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the output of transformers' eager attention, [B, n, heads, head_dim]."""
    return eager_attention_forward(nn.Identity(), *states, None, scaling)[0]


def attend_with_sdpa(*states: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the output of SDPA, [B, n, heads, head_dim]."""
    return nn.functional.scaled_dot_product_attention(*states, scale=scaling).transpose(1, 2)


def compute_attention(attend: Callable[..., Any], states: Tensors, dtype: torch.dtype) -> Tensors:
    """Return the output of an attention function, and the gradients of its inputs."""
    inputs = {name: state.to(dtype).requires_grad_() for name, state in states.items()}
    output = attend(*inputs.values(), scaling=8**-0.5)
    output_grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(output, list(inputs.values()), output_grad)
    return {"output": output.detach(), **dict(zip(inputs, gradients, strict=True))}


def build_states(score_scale: float = 1.0, key_offset: float = 0.0) -> Tensors:
    """Return random queries, keys and values [4, 2, 23, 8], which are exact in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    states = {
        name: torch.randn(4, 2, 23, 8, generator=generator) for name in ("query", "key", "value")
    }
    states["query"] *= score_scale
    states["key"] += key_offset
    return {name: state.bfloat16().float() for name, state in states.items()}


@pytest.mark.parametrize(
    ("reference", "settings"),
    [
        (attend_in_eager_mode, {}),
        (attend_in_eager_mode, {"score_scale": 16.0}),
        # the keys of trained ViTs have a common offset; SDPA computes scores in float32
        (attend_with_sdpa, {"key_offset": 30.0}),
    ],
)
def test_chunked_attention_in_bfloat16_is_as_exact_as_in_pytorch(
    reference: Any, settings: dict[str, float]
) -> None:
    states = build_states(**settings)
    exact = compute_attention(attend_in_eager_mode, states, torch.float64)
    found, expected = (
        compute_attention(attend, states, torch.bfloat16)
        for attend in (attend_in_chunks, reference)
    )
    assert_as_exact_in_half_precision(found, expected, exact)


# Where kernels compute ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "fields", "has_mask"),
    [
        (torch.bfloat16, {}, False),
        (torch.float32, {}, False),
        (torch.bfloat16, {}, True),
        (torch.bfloat16, {"num_register_tokens": 1184}, False),
    ],
    ids=["chunks", "float32", "mask", "1201 keys"],
)
@torch.no_grad()
def test_sdpa_computes_what_chunks_do_not(
    dtype: torch.dtype,
    fields: Fields,
    has_mask: bool,
    request: pytest.FixtureRequest,
) -> None:
    model = build_models(**fields)[0].to(dtype)
    mask = torch.arange(34).view(2, 17) < 33 if has_mask else None
    operators = list_operators(partial(model, attention_mask=mask), IMAGES.to(dtype))
    assert (SDPA in operators) == (request.node.callspec.id != "chunks")


@pytest.mark.usefixtures("reorder_float32")
def test_packed_weights_compute_where_they_apply() -> None:
    model, plain = build_models()
    with torch.no_grad():
        assert ONEDNN in list_operators(model, IMAGES)
        assert "aten::gelu" not in list_operators(model, IMAGES)
        with torch.backends.mkldnn.flags(enabled=False):
            assert ONEDNN not in list_operators(model, IMAGES)
            assert_same_outputs(model(IMAGES), plain(IMAGES))
        with torch.autocast("cpu", dtype=torch.float16):
            assert ONEDNN not in list_operators(model, IMAGES)
        counts = []
        for each in (model, plain):
            with FlopCounterMode(display=False) as counter:
                each(IMAGES)
            counts.append(counter.get_total_flops())
    assert 0 < counts[0] < counts[1]  # The last layer computes CLS alone
    assert ONEDNN not in list_operators(model, IMAGES)  # with gradients


@pytest.mark.usefixtures("reorder_float32")
@torch.no_grad()
def test_weights_of_narrow_layers_are_not_reordered(monkeypatch: MonkeyPatch) -> None:
    model = build_models()[0]
    monkeypatch.setattr(cpu_kernels, "MIN_REORDERED_WIDTH", 1 + model.config.hidden_size)
    assert ONEDNN not in list_operators(model, IMAGES)


@each_dtype
@torch.no_grad()
def test_exported_programs_contain_no_kernels(dtype: torch.dtype) -> None:
    """An exported program may run on another machine: it is that of plain PyTorch."""
    fast, plain = (model.to(dtype) for model in build_models(num_register_tokens=2))
    fast(IMAGES.to(dtype))
    programs = [torch.export.export(model, (IMAGES.to(dtype),)) for model in (fast, plain)]
    operators = [[str(node.target) for node in program.graph.nodes] for program in programs]
    assert not any("mkldnn" in name for name in operators[0])


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_products_that_fail_or_are_wrong_are_detected(fault: str, monkeypatch: MonkeyPatch) -> None:
    def multiply(inputs: torch.Tensor, *others: Any) -> torch.Tensor:
        if fault == "raises":
            raise NotImplementedError
        return inputs.new_ones(4, 8)

    monkeypatch.setattr(cpu_kernels, "onednn_linear", multiply)
    assert not cpu_kernels.is_onednn_correct(torch.float32)
