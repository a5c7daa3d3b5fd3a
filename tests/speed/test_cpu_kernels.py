"""CPU kernels have the outputs and gradients of plain PyTorch.

Every switch disables them, and unsupported cases are computed by plain PyTorch.
"""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.compare import (
    Tensors,
    assert_as_exact_in_half_precision,
    assert_equal_in_float32,
    run_step,
    stack_models,
)
from helpers.tiny_models import (
    assert_same_outputs,
    build_images,
    build_tiny_config,
    randomize,
    record_outputs,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.vit.modeling_vit import eager_attention_forward

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.speed import cpu_kernels, lean_layers
from modeling_vitcls.speed.cpu_kernels import (
    CPULinear,
    FastModule,
    attend_in_chunks,
)
from modeling_vitcls.speed.lean_layers import use_fast_modules


ONEDNN = "mkldnn::_linear_pointwise"
SDPA = "aten::scaled_dot_product_attention"
NUM_MODELS = 8  # number of models over which rounding errors are compared

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "swiglu": {"mlp_type": "swiglu"},
    "norms": {
        "mlp_norm": True,
        "hidden_act": "gelu_pytorch_tanh",
        "relative_position_bias": "layer",
    },
    "differential": {"attention_type": "differential", "layer_type": "parallel"},
    "scopes": {"num_register_tokens": 1, "cls_scopes": [[2, 2, 0, 1]]},
}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def use_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels for all sizes, wherever they are correct, even if they are not the fastest."""
    monkeypatch.setattr(lean_layers, "MIN_MULTIPLICATIONS_OF_KERNELS", 0)
    if cpu_kernels.HAS_ONEDNN:
        for has_gradients in (False, True):
            monkeypatch.setitem(cpu_kernels.MIN_MULTIPLICATIONS, (torch.float32, has_gradients), 0)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            monkeypatch.setitem(cpu_kernels.MIN_MULTIPLICATIONS, (torch.bfloat16, False), 0)


@pytest.fixture(autouse=True)
def use_chunked_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunked attention on all CPUs, with three heads per chunk of a tiny model."""
    monkeypatch.setattr(cpu_kernels, "HAS_AVX512_BFLOAT16", True)
    monkeypatch.setattr(cpu_kernels, "HAS_AMX", False)
    monkeypatch.setattr(cpu_kernels, "SCORES_PER_THREAD", 3 * 17**2 // torch.get_num_threads())


requires_onednn = pytest.mark.skipif(
    not cpu_kernels.HAS_ONEDNN, reason="this CPU or PyTorch has no oneDNN"
)


def build_models(seed: int = 0, **fields: Any) -> tuple[Any, Any]:
    """Return two classifiers with equal weights, with and without CPU kernels."""
    fast, plain = (
        randomize(ViTCLSForImageClassification(build_tiny_config(**fields)), seed) for _ in range(2)
    )
    use_fast_modules(fast)
    assert count_kernels(fast)
    assert not count_kernels(plain)
    return fast, plain


def count_kernels(model: nn.Module) -> int:
    """Return the number of modules that CPU kernels compute."""
    return sum(isinstance(module, FastModule) for module in model.modules())


def list_operators(function: Callable[..., Any], *args: Any) -> set[str]:
    """Return the names of the operators that a call executes."""
    with profile() as profiled:
        function(*args)
    return {event.key for event in profiled.key_averages()}


# Values and gradients -----------------------------------------------------------------------------


@each_variant
def test_outputs_and_gradients_in_float32_equal_plain_pytorch(fields: dict[str, Any]) -> None:
    steps: list[list[Tensors]] = [[], []]
    for seed in range(NUM_MODELS):
        models = build_models(seed, **fields)
        for results, model in zip(steps, models, strict=True):
            results.append(run_step(model, build_images()))
    assert_equal_in_float32(*map(stack_models, steps))
    with torch.no_grad():
        logits = [{"logits": model(build_images()).logits} for model in models]
    assert_equal_in_float32(*logits)


def train(model: Any, dtype: torch.dtype) -> Tensors:
    """Return logits and gradients of a model in a dtype."""
    return run_step(model.to(dtype), build_images().to(dtype))


def train_under_autocast(model: Any, dtype: torch.dtype) -> Tensors:
    """Return logits and gradients of a model in float32 under autocast."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        return run_step(model, build_images())


@torch.no_grad()
def infer(model: Any, dtype: torch.dtype) -> Tensors:
    """Return logits of a model in a dtype."""
    return {"logits": model.to(dtype)(build_images().to(dtype)).logits}


@pytest.mark.parametrize("is_emulated", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "run"),
    [
        ("default", torch.bfloat16, train),
        ("differential", torch.bfloat16, train_under_autocast),
        ("scopes", torch.bfloat16, infer),
        ("differential", torch.float16, train_under_autocast),
    ],
)
def test_half_precision_is_as_exact_as_plain_pytorch(
    name: str,
    dtype: torch.dtype,
    run: Callable[..., Tensors],
    is_emulated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Errors against float32 are as large as in plain PyTorch, also with emulated products."""
    if is_emulated:
        monkeypatch.setattr(cpu_kernels, "EMULATED_DTYPES", {dtype})
    found = []
    expected = []
    exact = []
    for seed in range(NUM_MODELS):
        fast, plain = build_models(seed, **VARIANTS[name])
        exact.append(run(plain, torch.float32))
        found.append(run(fast, dtype))
        expected.append(run(plain, dtype))

    assert_as_exact_in_half_precision(
        stack_models(found), stack_models(expected), stack_models(exact)
    )


Attention = Callable[..., Any]


def attend_in_eager_mode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return the output of transformers' eager attention, [B, n, heads, head_dim]."""
    return eager_attention_forward(nn.Identity(), query, key, value, None, scaling)[0]


def attend_with_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return the output of SDPA, [B, n, heads, head_dim]."""
    return nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(
        1, 2
    )


def compute_attention(attend: Attention, states: Tensors, dtype: torch.dtype) -> Tensors:
    """Return the output of an attention function, and the gradients of its inputs."""
    inputs = {name: state.to(dtype).requires_grad_() for name, state in states.items()}
    output = attend(*inputs.values(), 8**-0.5)
    output_grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(output, list(inputs.values()), output_grad)
    return {"output": output.detach(), **dict(zip(inputs, gradients, strict=True))}


def build_states(num_queries: int, score_scale: float = 1.0, key_offset: float = 0.0) -> Tensors:
    """Return random queries [4, 2, num_queries, 8], and keys and values [4, 2, 23, 8].

    The values are exact in bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": num_queries, "key": 23, "value": 23}
    states = {
        name: torch.randn(4, 2, length, 8, generator=generator) for name, length in shapes.items()
    }
    states["query"] *= score_scale
    states["key"] += key_offset
    return {name: state.bfloat16().float() for name, state in states.items()}


@pytest.mark.parametrize("num_queries", [23, 1])
def test_chunked_attention_in_float32_equals_eager_attention(num_queries: int) -> None:
    states = build_states(num_queries)
    found, expected = (
        compute_attention(attend, states, torch.float32)
        for attend in (attend_in_chunks, attend_in_eager_mode)
    )
    assert_equal_in_float32(found, expected)


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
    states = build_states(23, **settings)
    exact = compute_attention(attend_in_eager_mode, states, torch.float64)
    found, expected = (
        compute_attention(attend, states, torch.bfloat16)
        for attend in (attend_in_chunks, reference)
    )
    assert_as_exact_in_half_precision(found, expected, exact)


@pytest.mark.parametrize(("shape", "out"), [((2, 7, 48), 80), ((3, 48), 16), ((48,), 80)], ids=str)
@requires_onednn
def test_derivatives_of_a_linear_layer_equal_those_in_float64(
    shape: tuple[int, ...], out: int
) -> None:
    torch.manual_seed(0)
    layer = CPULinear(48, out, bias=len(shape) > 1)
    inputs = torch.randn(shape)
    assert ONEDNN in list_operators(compute_derivatives, layer, inputs)
    found = compute_derivatives(layer, inputs)
    for one, exact in zip(found, compute_derivatives(layer.double(), inputs.double()), strict=True):
        torch.testing.assert_close(
            one.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item()
        )


def compute_derivatives(layer: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return first and second derivatives of the output with respect to inputs and parameters."""
    inputs = inputs.detach().requires_grad_()
    wanted = [inputs, *layer.parameters()]
    first = torch.autograd.grad(layer(inputs).square().sum(), wanted, create_graph=True)
    return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), wanted)]


@torch.no_grad()
def test_attention_in_bfloat16_is_computed_in_chunks() -> None:
    fast, _ = build_models()
    assert SDPA not in list_operators(fast.bfloat16(), build_images().bfloat16())


@pytest.mark.parametrize(
    ("dtype", "fields", "inputs"),
    [
        (torch.float32, {}, {}),
        (torch.bfloat16, {}, {"attention_mask": torch.arange(34).view(2, 17) < 33}),
        (torch.bfloat16, {"attention_probs_dropout_prob": 0.1}, {}),
        (torch.bfloat16, {"num_register_tokens": 1184}, {}),
    ],
    ids=["float32", "mask", "dropout", "1201 keys"],
)
@torch.no_grad()
def test_sdpa_computes_what_chunks_do_not(
    dtype: torch.dtype, fields: dict[str, Any], inputs: dict[str, Any]
) -> None:
    model = build_models(**fields)[0].to(dtype).train()
    assert SDPA in list_operators(partial(model, **inputs), build_images().to(dtype))


# Transformations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "differential"])
def test_gradients_per_image_with_torch_func_equal_plain_pytorch(name: str) -> None:
    def compute_gradients(model: Any) -> Tensors:
        weights = {name: weight.detach() for name, weight in model.named_parameters()}

        def compute_loss(weights: Tensors, image: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, weights, (image[None],)).logits.square().sum()

        return torch.func.vmap(torch.func.grad(compute_loss), in_dims=(None, 0))(
            weights, build_images()
        )

    fast, plain = map(compute_gradients, build_models(**VARIANTS[name]))
    assert_equal_in_float32(fast, plain)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_models_equal_plain_pytorch(backend: str) -> None:
    fast, plain = build_models(num_register_tokens=2)
    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    assert_equal_in_float32(
        run_step(fast, build_images(), forward=compiled), run_step(plain, build_images())
    )
    with torch.no_grad():
        assert_equal_in_float32(
            {"logits": compiled(build_images()).logits}, {"logits": plain(build_images()).logits}
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_exported_programs_contain_no_kernels(dtype: torch.dtype) -> None:
    """An exported program may run on another machine: it is that of plain PyTorch."""
    fast, plain = (model.to(dtype) for model in build_models(num_register_tokens=2))
    programs = [torch.export.export(model, (build_images().to(dtype),)) for model in (fast, plain)]
    operators = [[str(node.target) for node in program.graph.nodes] for program in programs]
    assert operators[0] == operators[1]
    assert not any("mkldnn" in name for name in operators[0])


# Other libraries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("min_size", [0, 10**9], ids=["cpu_kernels", "lean_layers"])
def test_gradients_and_merged_weights_of_lora_equal_plain_pytorch(
    min_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one model, the terms of a rank-2 gradient may cancel; hence several models."""
    monkeypatch.setattr(lean_layers, "MIN_MULTIPLICATIONS_OF_KERNELS", min_size)
    steps: list[list[Tensors]] = [[], []]
    for seed in range(NUM_MODELS):
        for results, model in zip(steps, build_models(seed), strict=True):
            adapter = get_peft_model(
                model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "fc1"])
            )
            generator = torch.Generator().manual_seed(1)
            for name, weight in adapter.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(weight, std=0.3, generator=generator)
            results.append(run_step(adapter, build_images()))

    assert all("lora_" in name for name in steps[0][0] if name != "logits")
    assert len(steps[0][0]) > 1
    assert_equal_in_float32(*map(stack_models, steps))

    merged = adapter.merge_and_unload()
    with torch.no_grad():
        assert_equal_in_float32(
            {"logits": merged(build_images()).logits}, {"logits": steps[1][-1]["logits"]}
        )


@pytest.mark.parametrize(
    "copy_model", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_have_the_kernels_that_the_environment_allows(
    copy_model: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, plain = build_models()
    copied = copy_model(fast)
    assert [type(module) for module in copied.modules()] == [
        type(module) for module in fast.modules()
    ]
    assert_equal_in_float32(run_step(copied, build_images()), run_step(plain, build_images()))
    monkeypatch.setenv("VITCLS_CPU_KERNELS", "0")
    assert count_kernels(copy_model(fast)) == 0


# Where kernels compute ----------------------------------------------------------------------------


@requires_onednn
def test_kernels_compute_by_default() -> None:
    model, _ = build_models()
    with torch.no_grad():
        operators = list_operators(model.vitcls, build_images())
    assert ONEDNN in operators
    assert "aten::gelu" not in operators
    assert {"LinearFunction", "OneDNNGELULinear"} <= list_operators(run_step, model, build_images())


@requires_onednn
@torch.no_grad()
def test_onednn_is_not_used_where_it_does_not_apply() -> None:
    layer = CPULinear(48, 80)
    inputs = torch.randn(2, 7, 48)

    assert ONEDNN in list_operators(layer, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ONEDNN not in list_operators(layer, inputs)
    with torch.backends.mkldnn.flags(enabled=False):
        assert ONEDNN not in list_operators(layer, inputs)
    assert "mkldnn" not in str(torch.jit.trace(layer, inputs).inlined_graph)

    with FlopCounterMode(display=False) as counter:
        layer(inputs)
    assert counter.get_total_flops() == 2 * 2 * 7 * 48 * 80
    assert layer.to("meta")(inputs.to("meta")).shape == (2, 7, 80)

    doubled = CPULinear(48, 80)
    before = doubled(inputs)

    for name, expected in (("bias", before + doubled.bias), ("weight", 2 * before)):
        nn.utils.parametrize.register_parametrization(doubled, name, Doubled())
        torch.testing.assert_close(doubled(inputs), expected)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "forward_hook") for name in ("norm", "activation_fn", "fc1", "fc2")]
    + [
        ("fc2", kind)
        for kind in ("forward", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    ],
)
def test_hooks_and_replaced_forwards_inside_an_mlp_are_called_once(name: str, kind: str) -> None:
    model, plain = build_models(mlp_norm=name == "norm")
    module = model.vitcls.layers[0].mlp.get_submodule(name)
    seen = record_outputs(module) if kind == "forward" else []
    if kind != "forward":
        getattr(module, f"register_{kind}")(lambda *values: seen.append(values))
    assert_equal_in_float32(run_step(model, build_images()), run_step(plain, build_images()))
    with torch.no_grad():
        model(build_images())
    assert len(seen) == (1 if "backward" in kind else 2)


# Switches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_onednn_switch_of_pytorch_disables_the_kernels(dtype: torch.dtype) -> None:
    fast, plain = build_models()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not {ONEDNN, "LinearFunction", "OneDNNGELULinear"} & list_operators(
            train, fast, dtype
        )
        assert_same_outputs(train(fast, dtype), train(plain, dtype))


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_products_that_fail_or_are_wrong_are_detected(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def multiply(
        inputs: torch.Tensor, weight: torch.Tensor, bias: Any, *others: Any
    ) -> torch.Tensor:
        if fault == "raises":
            raise NotImplementedError
        return inputs @ weight.T + 1

    monkeypatch.setattr(cpu_kernels, "onednn_linear", multiply)
    assert not cpu_kernels.is_onednn_correct()


def test_an_environment_variable_disables_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "1"):
        monkeypatch.setenv("VITCLS_CPU_KERNELS", value)
        model = use_fast_modules(ViTCLSForImageClassification(build_tiny_config()))
        assert bool(count_kernels(model)) == (value == "1")
