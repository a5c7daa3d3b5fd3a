"""Extension points: MLP activations, attention inputs, and kernels from the Hub."""

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fresh_processes import run_fresh
from helpers.tiny_models import build_images, build_tiny_config, get_largest_difference, raises_one_line, randomize
from transformers import AutoModelForImageClassification
from transformers.activations import ACT2FN
from transformers.utils.import_utils import is_kernels_available

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.cpu_kernels_vitcls import uninstall_cpu_kernels

from .source import PACKAGE


HUB_KERNEL = "kernels-community/flash-attn2"


# Activations ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("mlp_type", ["mlp", "glu", "swiglu"])
def test_activations_of_an_mlp(mlp_type: str, has_kernels: bool) -> None:
    fields = {"num_register_tokens": 1, "register_neurons": [[0, 3]]}
    model = randomize(ViTCLSModel(build_tiny_config(mlp_type=mlp_type, mlp_norm=True, **fields)))
    if not has_kernels:
        uninstall_cpu_kernels(model)
    mlp: Any = model.layers[0].mlp
    assert mlp.register_neurons.neurons == [3] and model.layers[1].mlp.register_neurons is None
    tokens = torch.randn(2, 5, 16)
    if mlp_type == "mlp":
        expected = ACT2FN["gelu"](tokens @ mlp.fc1.weight.T + mlp.fc1.bias)
        output = mlp.norm(mlp.register_neurons(expected)) @ mlp.fc2.weight.T + mlp.fc2.bias
    else:
        gate = ACT2FN["silu" if mlp_type == "swiglu" else "gelu"](tokens @ mlp.gate_proj.weight.T + mlp.gate_proj.bias)
        expected = gate * (tokens @ mlp.up_proj.weight.T + mlp.up_proj.bias)
        output = mlp.norm(mlp.register_neurons(expected)) @ mlp.down_proj.weight.T + mlp.down_proj.bias
    assert get_largest_difference(mlp.get_activations(tokens), expected) <= 1e-5 * expected.abs().max().item()
    assert get_largest_difference(mlp.project(expected), output) <= 1e-5 * output.abs().max().item()
    assert get_largest_difference(mlp(tokens), output) <= 1e-5 * output.abs().max().item()


# Attention -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": True, "position_embedding_type": "rope_2d"},
        {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
    ],
    ids=["default", "rotary", "scopes"],
)
def test_recorded_attention(fields: dict[str, Any], implementation: str) -> None:
    """The weights computed from queries, keys and mask equal those of eager attention."""
    model = randomize(ViTCLSModel(build_tiny_config(num_register_tokens=2, **fields)))
    model.set_attn_implementation("eager")
    expected = model(build_images(), output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    recorded: list[tuple[Any, ...]] = []
    for layer in model.layers:
        layer.attention.recorder = lambda *values: recorded.append(values)
    model(build_images())
    assert len(recorded) == 2
    for (query, key, value, mask, scaling, attended), weights in zip(recorded, expected, strict=True):
        scores = query @ key.transpose(2, 3) * scaling
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        assert get_largest_difference(scores.softmax(-1), weights) <= 1e-5
        mixed = (weights @ value).transpose(1, 2)
        assert get_largest_difference(attended, mixed) <= 1e-5 * mixed.abs().max().item()


@torch.no_grad()
def test_recorders_record_all_queries() -> None:
    """Check also the last layer, of which a classifier reads only one token."""
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    logits, queries = model(build_images()).logits, []
    for layer in model.vitcls.layers:
        layer.attention.recorder = lambda query, *others: queries.append(query.shape[2])
    assert get_largest_difference(model(build_images()).logits, logits) <= 1e-5 * logits.abs().max().item()
    assert queries == [17, 17]


# Hooks ---------------------------------------------------------------------------------------------------------------


def find_hooked_modules() -> list[tuple[Path, str]]:
    """Return (file, hooked expression) of each `X.register_..._hook(...)` in the package."""
    calls = [
        (file, node.func)
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    return [
        (file, ast.unparse(function.value))
        for file, function in calls
        if function.attr.startswith("register_") and function.attr.endswith("hook")
    ]


# `module` is the embedding layer or an encoder layer (ablation.py), `self.model` a whole model (exportable.py).
HOOKED = ("self.model", "model.base_model", "model.base_model.embeddings", "layer", "layer.mlp", "module")


def test_only_modules_that_compute_are_hooked() -> None:
    """Hooks are on whole models, embeddings, layers and MLPs, which exist in every model, but not on modules that
    return their input.
    """
    hooked = find_hooked_modules()
    assert hooked  # the search finds them
    for file, expression in hooked:
        assert expression in HOOKED, f"{expression} in {file.name}"


def test_an_encoder_contains_no_identity() -> None:
    """Identity modules exist only for some options, so hooks on them would not be called in all models."""
    for fields in ({}, {"layer_scale_init_value": 0.1, "qk_norm": True, "drop_path_rate": 0.1}):
        model = ViTCLSModel(build_tiny_config(**fields))
        assert not [name for name, module in model.named_modules() if isinstance(module, torch.nn.Identity)]


# Kernels from the Hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return the folder of a saved classifier."""
    randomize(ViTCLSForImageClassification(build_tiny_config())).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@torch.no_grad()
def test_use_kernels(checkpoint: Path) -> None:
    """Without a mapping for `ViTCLSMLP`, nothing is replaced. Without the package `kernels`, the error is one line."""
    logits = ViTCLSForImageClassification.from_pretrained(checkpoint)(build_images()).logits
    if not is_kernels_available():
        with raises_one_line("Kernels are not available", "pip install kernels"):
            ViTCLSForImageClassification.from_pretrained(checkpoint, use_kernels=True)
        return
    model = ViTCLSForImageClassification.from_pretrained(checkpoint, use_kernels=True)
    assert model.use_kernels
    assert torch.equal(model(build_images()).logits, logits)


def test_an_attention_kernel_that_cannot_be_loaded(checkpoint: Path) -> None:
    words = [HUB_KERNEL, "kernels", 'Use "sdpa"']
    for model_class in (ViTCLSForImageClassification, AutoModelForImageClassification):
        with raises_one_line(*words, error=(ImportError, ValueError)):
            model_class.from_pretrained(checkpoint, attn_implementation=HUB_KERNEL)
    with raises_one_line(*words, error=(ImportError, ValueError)):
        ViTCLSForImageClassification.from_pretrained(checkpoint, attn_implementation=HUB_KERNEL, image_size=48)


# Loads a classifier while a fake package `kernels` is installed whose kernels cannot be downloaded.
OFFLINE = """
import sys
from transformers import modeling_utils
from modeling_vitcls import ViTCLSForImageClassification

def lazy_import_flash_attention(implementation, *args, **kwargs):
    raise ValueError(f"An error occurred while loading '{implementation}':\\nno connection\\n\\ntry again.")

modeling_utils.lazy_import_flash_attention = lazy_import_flash_attention
try:
    ViTCLSForImageClassification.from_pretrained(sys.argv[1], attn_implementation=sys.argv[2])
except ValueError as error:
    print(error)
"""


def test_an_attention_kernel_that_cannot_be_downloaded(checkpoint: Path) -> None:
    ran = run_fresh("-c", OFFLINE, checkpoint, HUB_KERNEL, environment={**os.environ, "HF_HUB_OFFLINE": "1"})
    (line,) = [line for line in ran.stdout.splitlines() if line]
    assert HUB_KERNEL in line and "no connection try again" in line and 'Use "sdpa"' in line, ran.stderr[-4000:]
