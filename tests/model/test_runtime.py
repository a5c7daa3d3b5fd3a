"""Gradient checkpointing, precision, attention implementations, compilation and export."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.compare import run_step
from helpers.tiny_models import (
    BLOCKS,
    IMAGES,
    POSITIONS,
    Kind,
    assert_same_outputs,
    build_images,
    build_random,
    build_tiny_config,
    each_kind,
    get_largest_difference,
    list_tensors,
)

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.conversion.weight_rules import Fields


# Gradient checkpointing and precision


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        BLOCKS["scopes"],
        BLOCKS["rope"] | BLOCKS["drop_path"],
        {"position_embedding_type": "rope_mixed"},
        {"pooled_layers": [1, -1], "pooling": "cls_mean"},
    ],
    ids=str,
)
def test_gradient_checkpointing_changes_no_gradient(fields: Fields, use_reentrant: bool) -> None:
    steps = []
    calls = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_random(ViTCLSForImageClassification, **fields).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        counted: list[int] = []
        model.vitcls.layers[1].attention.register_forward_pre_hook(
            lambda *_, counted=counted: counted.append(1)
        )
        torch.manual_seed(1)
        steps.append(run_step(model, IMAGES))
        calls.append(len(counted))

    assert calls == [1, 2]  # computed again for the backward pass
    assert_same_outputs(*steps, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_kind
def test_half_precision_is_close_to_float32_for_float32_images(
    kind: Kind, dtype: torch.dtype
) -> None:
    """Images may be float32; positions are resampled in float32 for other image sizes."""
    model = kind.model_class(build_tiny_config(**kind.fields)).eval()
    expected = model(IMAGES, **kind.inputs)
    model.to(dtype)
    output = model(IMAGES, **kind.inputs)

    for name, value in output.items():
        if name != "loss" and isinstance(value, torch.Tensor):
            assert value.dtype == dtype, name
    assert_same_outputs([each.float() for each in list_tensors(output)], expected, 0.1)
    for positions in POSITIONS:
        other = kind.build(position_embedding_type=positions).to(dtype)
        assert all(value.isfinite().all() for value in list_tensors(other(build_images(2, 24, 56))))


@each_kind
def test_autocast_is_close_to_float32_and_has_finite_gradients(kind: Kind) -> None:
    """Weights stay in float32, as in mixed-precision training."""
    model = kind.build(position_embedding_type="learned_rope_mixed", num_register_tokens=2)

    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        expected = model(IMAGES, **kind.inputs)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(IMAGES, **kind.inputs)
        values = zip(
            list_tensors(output.to_tuple()), list_tensors(expected.to_tuple()), strict=True
        )
        for got, exact in values:
            assert get_largest_difference(got.float(), exact) < 0.1 * exact.abs().max().clamp(
                min=1.0
            )
        sum(value.float().sum() for value in list_tensors(output)).backward()
        assert all(
            weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None
        )


# Compilation and export


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Few models contain all blocks, because tracing a model takes seconds.
TOGETHER = {
    "gated MLP": ["swiglu", "qk_norm", "no_key_bias", "layer_scale", "rope", "tokens", "mlp_head"],
    "bare": ["no_bias", "pre_norm", "relu", "sincos", "attention_pooling"],
    "scopes": ["scopes", "no_positions", "no_qkv_bias"],
    "random": ["drop_path", "dropout"],
}
SLOW_TO_TRACE = [name for name in TOGETHER if name != "bare"]


def merge_blocks(name: str) -> Fields:
    """Return the fields of all of these blocks."""
    return {field: value for block in TOGETHER[name] for field, value in BLOCKS[block].items()}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", TOGETHER)
def test_options_compile_into_one_graph_with_gradients(name: str) -> None:
    model = build_random(ViTCLSForImageClassification, **merge_blocks(name))
    model.train(name != "random")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = (run_step(model, IMAGES, forward=run) for run in (model, compiled))
    assert_same_outputs(found, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", POSITIONS)
def test_compiled_models_have_the_outputs_of_eager_models(kind: str) -> None:
    model = build_random(
        ViTCLSForImageClassification, **BLOCKS["scopes"], position_embedding_type=kind
    )
    compiled = torch.compile(model, fullgraph=True)
    for size in ((32, 32), (24, 56)):
        assert_same_outputs(compiled(build_images(2, *size)), model(build_images(2, *size)), 1e-5)


def check_exported(model: Any, *numbers: int) -> None:
    """Export a model for any number of images, and compare its outputs for some numbers."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (build_images(3),), dynamic_shapes=({0: batch},))
    for number in numbers:
        images = build_images(number)
        assert_same_outputs(program.module()(images), model(images).to_tuple(), 1e-6)


@pytest.mark.parametrize(
    "name", ["bare", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_TO_TRACE)]
)
def test_exported_programs_take_any_number_of_images(name: str) -> None:
    assert sorted(block for blocks in TOGETHER.values() for block in blocks) == sorted(BLOCKS)
    model = build_random(ViTCLSForImageClassification, **merge_blocks(name))
    check_exported(model, 1, 2, 7)


@each_kind
def test_models_of_each_class_can_be_exported(kind: Kind) -> None:
    check_exported(kind.build(), 5)


TRACED = {
    **{name: BLOCKS[name] for name in ("qk_norm", "rope", "sincos", "tokens")},
    "differential": {"attention_type": "differential"},
    "relative positions": {"relative_position_bias": "layer"},
    "antialiased": {"position_antialias": True},
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("fields", TRACED.values(), ids=TRACED)
def test_a_traced_model_takes_other_batches_and_sizes(fields: Fields) -> None:
    model = build_random(ViTCLSForImageClassification, **fields)
    traced = torch.jit.trace(model, build_images(3), strict=False)
    for images in (build_images(5), build_images(2, 48, 24)):
        assert_same_outputs(traced(images)["logits"], model(images).logits, 1e-6)


# Parallelism plans


def test_the_fsdp_plan_contains_only_existing_modules() -> None:
    model = ViTCLSModel(build_tiny_config())
    modules = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_modules()}
    assert set(model.config.base_model_fsdp_plan) <= modules
