"""Models with and without CPU kernels agree, every switch disables the kernels, and so does a faulty processor."""

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fresh_processes import run_fresh
from helpers.tiny_models import assert_same_outputs, build_images, build_tiny_config, randomize
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import profile

from modeling_vitcls import ViTCLSForImageClassification, cpu_kernels_vitcls
from modeling_vitcls.blocks_vitcls import ViTCLSAttention, ViTCLSMLP
from modeling_vitcls.cpu_kernels_vitcls import KERNEL_CLASSES, uninstall_cpu_kernels

from .altered_pytorch import Results, assert_same_results, load_with_altered_pytorch
from .compare import Tensors, assert_as_exact_in_half_precision, assert_equal_in_float32, run_step, stack_models


pytestmark = pytest.mark.usefixtures("low_thresholds")

ONEDNN = "mkldnn::_linear_pointwise"
FUSED_ATTENTION = "aten::scaled_dot_product_attention"
KERNELS = set(KERNEL_CLASSES.values())
NUM_MODELS = 8  # number of models over which rounding errors in half precision are compared

has_onednn = bool(cpu_kernels_vitcls.MIN_MULTIPLICATIONS)
needs_onednn = pytest.mark.skipif(not has_onednn, reason="no oneDNN kernel is faster on this CPU")
needs_bfloat16 = pytest.mark.skipif(
    not cpu_kernels_vitcls.HAS_AVX512_BFLOAT16, reason="this CPU has no bfloat16 instructions"
)

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tokens": {"num_register_tokens": 2, "num_distillation_tokens": 1},
    "all_tokens_read": {"pooling": "mean"},
    "swiglu": {"mlp_type": "swiglu"},
    "tanh_gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "norms": {"mlp_norm": True, "attention_norm": True, "qk_norm": True},
    "rotary": {"position_embedding_type": "rope_2d"},
    "scopes": {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
    "relative_positions": {"relative_position_bias": "layer"},
    "differential": {"attention_type": "differential"},
    "parallel": {"layer_type": "parallel"},
    "register_neurons": {"num_register_tokens": 1, "register_neurons": [[0, 3]]},
}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def build_models(seed: int = 0, **fields: Any) -> tuple[Any, Any]:
    """Return two classifiers with equal weights, with and without CPU kernels."""
    fast, plain = (randomize(ViTCLSForImageClassification(build_tiny_config(**fields)), seed) for _ in range(2))
    uninstall_cpu_kernels(plain)
    assert count_kernels(fast) and not count_kernels(plain)
    return fast, plain


def count_kernels(model: nn.Module) -> int:
    """Return the number of modules that CPU kernels compute."""
    return sum(type(module) in KERNELS for module in model.modules())


def list_operators(function: Callable[..., Any], *args: Any) -> set[str]:
    """Return the names of the operators that a call executes."""
    with profile() as profiled:
        function(*args)
    return {event.key for event in profiled.key_averages()}


# Values and gradients ------------------------------------------------------------------------------------------------


@each_variant
def test_float32(fields: dict[str, Any]) -> None:
    fast, plain = build_models(**fields)
    assert_equal_in_float32(run_step(fast, build_images()), run_step(plain, build_images()))
    with torch.no_grad():
        logits = [{"logits": model(build_images()).logits} for model in (fast, plain)]
    assert_equal_in_float32(*logits)


def test_training_mode() -> None:
    fast, plain = build_models(hidden_dropout_prob=0.3, drop_path_rate=0.5)
    steps = []
    for model in (fast, plain):
        torch.manual_seed(0)  # the same features are dropped
        steps.append(run_step(model.train(), build_images()))
    assert_equal_in_float32(*steps)


def compare_in_half_precision(run: Callable[[Any, torch.dtype], Tensors], dtype: torch.dtype, **fields: Any) -> None:
    """Compare the results of `run(model, dtype)` for several models; dtype is float32 for the exact result."""
    found, expected, exact = [], [], []
    for seed in range(NUM_MODELS):
        fast, plain = build_models(seed, **fields)
        exact.append(run(plain, torch.float32))
        found.append(run(fast, dtype))
        expected.append(run(plain, dtype))
    assert_as_exact_in_half_precision(stack_models(found), stack_models(expected), stack_models(exact))


@torch.no_grad()
def infer(model: Any, dtype: torch.dtype) -> Tensors:
    """Return logits and final hidden state of a model in a dtype."""
    pixel_values = build_images().to(dtype)
    hidden_state = model.to(dtype).vitcls(pixel_values).last_hidden_state
    return {"logits": model(pixel_values).logits, "last_hidden_state": hidden_state}


def train(model: Any, dtype: torch.dtype) -> Tensors:
    """Return logits and gradients of a model in a dtype."""
    return run_step(model.to(dtype), build_images().to(dtype))


def train_under_autocast(model: Any, dtype: torch.dtype) -> Tensors:
    """Return logits and gradients of a model in float32 under autocast."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        return run_step(model, build_images())


@each_dtype
@each_variant
@pytest.mark.parametrize("run", [infer, train])
def test_half_precision(run: Callable[..., Tensors], fields: dict[str, Any], dtype: torch.dtype) -> None:
    compare_in_half_precision(run, dtype, **fields)


@each_dtype
@pytest.mark.parametrize("name", ["default", "swiglu", "differential"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    compare_in_half_precision(train_under_autocast, dtype, **VARIANTS[name])


# Transformations -----------------------------------------------------------------------------------------------------


def get_gradients_per_image(model: Any, dtype: torch.dtype) -> Tensors:
    """Return the gradients of each image's loss, by torch.func."""
    weights = {name: weight.detach() for name, weight in model.to(dtype).named_parameters()}

    def compute_loss(weights: Tensors, image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).logits.square().sum()

    return torch.func.vmap(torch.func.grad(compute_loss), in_dims=(None, 0))(weights, build_images().to(dtype))


@pytest.mark.parametrize("name", ["default", "swiglu", "differential"])
def test_torch_func(name: str) -> None:
    fast, plain = (get_gradients_per_image(model, torch.float32) for model in build_models(**VARIANTS[name]))
    assert_equal_in_float32(fast, plain)


@each_dtype
def test_torch_func_in_half_precision(dtype: torch.dtype) -> None:
    compare_in_half_precision(get_gradients_per_image, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    fast, plain = build_models(num_register_tokens=2)
    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    assert_equal_in_float32(run_step(fast, build_images(), forward=compiled), run_step(plain, build_images()))
    with torch.no_grad():
        assert_equal_in_float32({"logits": compiled(build_images()).logits}, {"logits": plain(build_images()).logits})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_exported(dtype: torch.dtype) -> None:
    """An exported program is the program of plain PyTorch, because it may run on another machine."""
    fast, plain = (model.to(dtype) for model in build_models(num_register_tokens=2))
    programs = [torch.export.export(model, (build_images().to(dtype),)) for model in (fast, plain)]
    operators = [[str(node.target) for node in program.graph.nodes] for program in programs]
    assert operators[0] == operators[1]
    assert not any("mkldnn" in name for name in operators[0])
    pixel_values = build_images(seed=1).to(dtype)
    logits = [program.module()(pixel_values).logits for program in programs]
    assert torch.equal(*logits) and torch.equal(logits[1], plain(pixel_values).logits)


# Other libraries -----------------------------------------------------------------------------------------------------


def test_lora() -> None:
    adapted = []
    for model in build_models():
        adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1"]))
        generator = torch.Generator().manual_seed(1)
        for name, weight in adapter.named_parameters():
            if "lora_" in name:
                nn.init.normal_(weight, std=0.3, generator=generator)
        adapted.append(adapter)
    fast, plain = adapted
    assert count_kernels(fast) and not count_kernels(plain)
    steps = [run_step(model, build_images()) for model in adapted]
    assert all("lora_" in name for name in steps[0] if name != "logits") and len(steps[0]) > 1
    assert_equal_in_float32(*steps)
    with torch.no_grad():
        merged = [{"logits": model.merge_and_unload()(build_images()).logits} for model in adapted]
    assert_equal_in_float32(*merged)
    assert_equal_in_float32(merged[0], {"logits": steps[1]["logits"]})


@pytest.mark.slow
def test_fsdp2(two_processes: Path) -> None:
    results = torch.load(two_processes / "sharded.pt")
    assert any(name.startswith("CPU") for name in results[True]["classes"])
    assert not any(name.startswith("CPU") for name in results[False]["classes"])
    assert_equal_in_float32(results[True]["tensors"], results[False]["tensors"])


def save_and_load(model: nn.Module) -> Any:
    """Return a whole model that torch.save wrote."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copy_model",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), save_and_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(copy_model: Callable[[Any], Any]) -> None:
    fast, plain = build_models()
    copied = copy_model(fast)
    assert [type(module) for module in copied.modules()] == [type(module) for module in fast.modules()]
    assert_equal_in_float32(run_step(copied, build_images()), run_step(plain, build_images()))
    uninstall_cpu_kernels(copied)
    assert count_kernels(copied) == 0 and count_kernels(fast) > 0
    assert_same_outputs(run_step(copied, build_images()), run_step(plain, build_images()))


def test_a_pickled_model_is_plain_if_kernels_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = build_models()
    pickled = pickle.dumps(fast)
    monkeypatch.setenv("VITCLS_CPU_KERNELS", "0")
    found = pickle.loads(pickled)
    assert [type(module) for module in found.modules()] == [type(module) for module in plain.modules()]
    assert_same_outputs(run_step(found, build_images()), run_step(plain, build_images()))


def test_modules_are_those_of_plain_pytorch() -> None:
    fast, plain = build_models()
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in plain.named_modules()]
    for module, plain_module in zip(fast.modules(), plain.modules(), strict=True):
        assert isinstance(module, type(plain_module))
        assert vars(module).keys() == vars(plain_module).keys()  # the subclasses have no state


# Switches ------------------------------------------------------------------------------------------------------------


def test_kernels_are_installed_by_default() -> None:
    model, _ = build_models(num_hidden_layers=1)  # equal layers are printed once
    layer = model.vitcls.layers[0]
    for module in (layer.mlp, layer.mlp.fc1, layer.attention, layer.attention.q_proj, model.classifier):
        assert type(module) in KERNELS
        assert "cpu_kernels=True" in module.extra_repr().split(", ") and "" not in module.extra_repr().split(", ")
    assert str(model).count("cpu_kernels=True") == count_kernels(model)
    assert "CPULinear(in_features=16, out_features=24, bias=True, cpu_kernels=True)" in str(model)


@needs_onednn
def test_kernels_compute_by_default() -> None:
    """Without this check, the tests of the switches would pass without kernels."""
    model, _ = build_models()
    with torch.no_grad():
        assert ONEDNN in list_operators(model, build_images())
    assert {"LinearFunction", "OneDNNGELULinear"} <= list_operators(run_step, model, build_images())


def assert_plain(model: Any) -> None:
    """Check that inference and training execute no kernel, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        pixel_values = build_images().to(dtype)
        with torch.no_grad():
            operators = list_operators(model, pixel_values)
        operators |= list_operators(run_step, model, pixel_values)
        assert FUSED_ATTENTION in operators
        assert not {ONEDNN, "ChunkedAttention", "LinearFunction", "OneDNNGELULinear"} & operators


@needs_bfloat16
@torch.no_grad()
def test_attention_is_chunked_by_default_in_bfloat16() -> None:
    model, _ = build_models()
    assert FUSED_ATTENTION not in list_operators(model.bfloat16(), build_images().bfloat16())


def test_uninstalling() -> None:
    model, _ = build_models()
    uninstall_cpu_kernels(model)
    assert count_kernels(model) == 0 and "cpu_kernels" not in str(model)
    layer = model.vitcls.layers[0]
    assert (type(layer.mlp), type(layer.mlp.fc1), type(layer.attention)) == (ViTCLSMLP, nn.Linear, ViTCLSAttention)
    assert_plain(model)


def test_pytorchs_switch() -> None:
    model, plain = build_models()
    with torch.backends.mkldnn.flags(enabled=False):
        assert_plain(model)
    fast, _ = build_models()
    with torch.backends.mkldnn.flags(enabled=False):
        assert_same_outputs(run_step(fast, build_images()), run_step(plain, build_images()))


# Prints the classes of modules, and the operators of inference.
SWITCHED_OFF = """
import torch
from torch.profiler import profile
from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification, cpu_kernels_vitcls
cpu_kernels_vitcls.MIN_MULTIPLICATIONS.update(dict.fromkeys(cpu_kernels_vitcls.MIN_MULTIPLICATIONS, 0))
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
model = ViTCLSForImageClassification(ViTCLSConfig(image_size=32, patch_size=8, **sizes)).eval()
with profile() as profiled, torch.no_grad():
    model(torch.zeros(1, 3, 32, 32))
print(*(type(module).__name__ for module in model.modules()), *(event.key for event in profiled.key_averages()))
print(model)
"""


@pytest.mark.slow
@pytest.mark.parametrize("value", ["0", "1"])
def test_environment_variable(value: str) -> None:
    ran = run_fresh("-c", SWITCHED_OFF, environment={**os.environ, "VITCLS_CPU_KERNELS": value})
    assert ran.returncode == 0, ran.stderr[-4000:]
    is_on = value == "1"
    assert ("cpu_kernels=True" in ran.stdout) == is_on
    assert ("CPULinear" in ran.stdout) == is_on
    assert (ONEDNN in ran.stdout) == (is_on and has_onednn)


# Faulty processors ---------------------------------------------------------------------------------------------------

BAD_PROCESSORS = ["unknown_cpu", "operator_raises", "operator_is_wrong"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return faulty processor -> results on it."""
    return load_with_altered_pytorch(tmp_path_factory.mktemp("bad_processors"), BAD_PROCESSORS)


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_PROCESSORS)
def test_bad_processors(name: str, results: Results) -> None:
    assert_same_results(results[name], results["kernels_off"])
    for dtype in (torch.float32, torch.bfloat16):
        assert ONEDNN not in results[name][f"{dtype}/operators"]
        assert (ONEDNN in results["none"][f"{dtype}/operators"]) == has_onednn
